// SPDX-License-Identifier: Apache-2.0
#include "cli/common.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <utility>

#include "base/environment.h"
#include "conformance/models.h"

namespace ropewalk::cli {
namespace fs = std::filesystem;

void Require(int code) {
  if (code != ROPEWALK_OK) throw Failure(ropewalk_last_error(), code == ROPEWALK_FAULT ? kNotHeld : kCannot);
}

Json Parsed(const char* text) {
  if (!text) throw Failure(ropewalk_last_error());
  return Json::parse(text);
}

// ---- tables ---------------------------------------------------------------------------------------------------------

namespace {

// Columns that a cell takes on a terminal: escape sequences and the later bytes of UTF-8 take none.
size_t Width(std::string_view text) {
  size_t width = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\033') {
      while (i < text.size() && text[i] != 'm') ++i;
    } else if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) {
      ++width;
    }
  }
  return width;
}

// A terminal that knows no escape sequences, such as Emacs's, says so.
bool KnowsEscapes(int file) {
  const char* kind = std::getenv("TERM");
  return isatty(file) && !(kind && std::string_view(kind) == "dumb");
}

bool Coloured() {
  static const bool coloured = KnowsEscapes(STDOUT_FILENO) && !std::getenv("NO_COLOR");
  return coloured;
}

}  // namespace

Table::Table(std::vector<std::string> headings) {
  for (std::string& heading : headings) {
    const bool right = heading.starts_with('>');
    right_.push_back(right);
    headings_.push_back(right ? heading.substr(1) : std::move(heading));
  }
}

void Table::Add(std::vector<std::string> cells) {
  cells.resize(headings_.size());
  rows_.push_back(std::move(cells));
}

void Table::Print() const {
  std::vector<size_t> widths;
  for (size_t i = 0; i < headings_.size(); ++i) {
    size_t width = Width(headings_[i]);
    for (const auto& row : rows_) width = std::max(width, Width(row[i]));
    widths.push_back(width);
  }
  const auto print = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (size_t i = 0; i < cells.size(); ++i) {
      const std::string pad(widths[i] - Width(cells[i]), ' ');
      line += right_[i] ? pad + cells[i] : cells[i] + pad;
      if (i + 1 < cells.size()) line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    fmt::print("{}\n", line);
  };
  print(headings_);
  std::vector<std::string> rule;
  rule.reserve(widths.size());
  for (const size_t width : widths) rule.emplace_back(width, '-');
  print(rule);
  for (const auto& row : rows_) print(row);
  std::fflush(stdout);
}

std::string Wrapped(std::string_view text, size_t indent) {
  constexpr size_t kWidth = 80;
  std::string out;
  size_t column = indent;
  while (!text.empty()) {
    const std::string_view word = text.substr(0, text.find(' '));
    text.remove_prefix(std::min(word.size() + 1, text.size()));
    if (column > indent && column + 1 + Width(word) > kWidth) {
      out += "\n" + std::string(indent, ' ');
      column = indent;
    } else if (column > indent) {
      out += ' ';
      ++column;
    }
    out += word;
    column += Width(word);
  }
  return out;
}

void PrintNote(std::string_view name, std::string_view text) { fmt::print("{:<10}{}\n", name, Wrapped(text, 10)); }

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower;
}

std::string Counted(int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

std::string Verdict(bool held) {
  const char* text = held ? "ok" : "FAILED";
  if (!Coloured()) return text;
  return fmt::format("\033[{}m{}\033[0m", held ? 32 : 31, text);
}

// ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

namespace {

volatile std::sig_atomic_t interrupted = 0;

void OnInterrupt(int) {
  interrupted = 1;
  constexpr std::string_view kNote = "\ninterrupted: ends when this part is done; Ctrl-C again ends at once\n";
  if (write(STDERR_FILENO, kNote.data(), kNote.size()) < 0) return;  // nobody reads it
}

}  // namespace

void CatchInterrupt() {
  struct sigaction action = {}, before = {};
  action.sa_handler = OnInterrupt;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  // A shell that starts a command behind itself has it ignore Ctrl-C.
  if (sigaction(SIGINT, nullptr, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(SIGINT, &action, nullptr);
}

bool Interrupted() { return interrupted != 0; }

int EndOf(bool held, int64_t done, int64_t asked) {
  if (!Interrupted() || done >= asked) return held ? kHeld : kNotHeld;
  fmt::print(stderr, "interrupted: {} of {} done\n", done, asked);
  return kInterrupted;
}

// ---- progress -------------------------------------------------------------------------------------------------------

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)), total_(total), shown_(KnowsEscapes(STDERR_FILENO)) {}

Progress::~Progress() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void Progress::Step(std::string_view what) {
  ++done_;
  if (!shown_) return;
  // Cut to one line of a narrow terminal, since a line that wraps cannot be written over.
  std::string line = fmt::format("{} {}/{}  {}", label_, done_, total_, what);
  if (line.size() > 78) line = line.substr(0, 75) + "...";
  fmt::print(stderr, "\r{}\033[K", line);
  std::fflush(stderr);
}

// ---- models ---------------------------------------------------------------------------------------------------------

namespace {

Model LoadModel(const ConfigText& config) {
  Model model;
  model.path = config.place;
  model.json = config.json;
  const Status status = ReadModelConfig(model.json, model.path, &model.config);
  if (!status.ok()) throw Failure(status.text());
  if (!model.config.rule.warnings.empty()) fmt::print(stderr, "{}\n", model.config.rule.warnings);
  if (model.config.name.empty()) model.config.name = config.name;
  return model;
}

std::vector<fs::path> ConfigsIn(const fs::path& directory) {
  // A model's own directory, as Hugging Face lays it out.
  if (fs::exists(directory / "config.json")) return {directory / "config.json"};
  // Ours, beside which an older installation may have left others.
  if (fs::exists(directory / "models.json")) return {directory / "models.json"};
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().extension() == ".json") paths.push_back(entry.path());
  }
  std::ranges::sort(paths);
  return paths;
}

std::vector<ConfigText> ReadAll(const std::vector<fs::path>& paths) {
  std::vector<ConfigText> configs;
  for (const fs::path& path : paths) {
    if (const Status status = ReadConfigs(path.string(), &configs); !status.ok()) throw Failure(status.text());
  }
  return configs;
}

bool HoldsModels(const fs::path& directory) {
  std::error_code ignored;
  return fs::is_directory(directory, ignored) && !ConfigsIn(directory).empty();
}

}  // namespace

std::vector<fs::path> PythonPackages() {
  std::vector<fs::path> places;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (error) return places;
  for (const char* lib : {"lib", "lib64"}) {
    for (const auto& entry : fs::directory_iterator(program.parent_path().parent_path() / lib, error)) {
      if (entry.path().filename().string().starts_with("python3")) places.push_back(entry.path() / "site-packages");
    }
  }
  return places;
}

std::string ModelsDirectory(std::vector<std::string>* tried) {
  std::vector<fs::path> places;
  // Said by the user, it is taken or refused. A folder `models` of some other project is passed over.
  if (const char* variable = EnvironmentVariable("ROPEWALK_MODELS"); variable && *variable) {
    if (!HoldsModels(variable)) {
      throw Failure(fmt::format("ROPEWALK_MODELS is {}, but no model configuration (*.json) is there", variable));
    }
    return variable;
  }
  std::error_code error;
  std::vector<ConfigText> found;
  if (fs::exists("models/models.json", error) && ReadConfigs("models/models.json", &found).ok() &&
      std::ranges::find(found, "qwen3-8b", &ConfigText::name) != found.end()) {
    places.emplace_back("models");
  }
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (!error) places.push_back(program.parent_path().parent_path() / "share/ropewalk/models");
  for (const fs::path& packages : PythonPackages()) places.push_back(packages / "ropewalk/models");
  for (const fs::path& place : places) {
    if (HoldsModels(place)) return place.string();
    if (tried) tried->push_back(place.string());
  }
  return "";
}

namespace {

// One of the models that come with Ropewalk, by its name in models.json or by that which `run` prints, in any case.
Model NamedModel(const std::string& name) {
  const std::string directory = ModelsDirectory(nullptr), wanted = Lower(name);
  std::vector<ConfigText> configs;
  if (!directory.empty()) configs = ReadAll(ConfigsIn(directory));
  std::vector<std::string> names;
  for (const ConfigText& config : configs) {
    if (Lower(config.name) == wanted) return LoadModel(config);
    names.push_back(config.name);
  }
  for (const ConfigText& config : configs) {
    Model model = LoadModel(config);
    const std::string own = Lower(model.config.name);
    if (own == wanted || own.substr(own.rfind('/') + 1) == wanted) return model;
  }
  std::string text = fmt::format("--model: no such file or directory: {}", name);
  if (std::ranges::count(name, '/') == 1 && name.front() != '.' && !name.ends_with(".json")) {
    text += " (a name on the Hub? download its config.json, and give that)";
  }
  if (!names.empty()) text += fmt::format("; the models that come with Ropewalk: {}", fmt::join(names, ", "));
  throw Failure(text);
}

}  // namespace

std::vector<Model> LoadModels(const std::vector<std::string>& paths) {
  std::vector<Model> models;
  std::vector<std::string> places = paths;
  if (places.empty()) {
    std::vector<std::string> tried;
    const std::string directory = ModelsDirectory(&tried);
    if (directory.empty()) {
      throw Failure(fmt::format("no models found in {}: give --model CONFIG.json, or set ROPEWALK_MODELS",
                                fmt::join(tried, ", ")));
    }
    places.push_back(directory);
  }
  for (const std::string& place : places) {
    std::error_code error;
    if (!fs::exists(place, error)) {
      models.push_back(NamedModel(place));
      continue;
    }
    const bool directory = fs::is_directory(place, error);
    const std::vector<ConfigText> found = ReadAll(directory ? ConfigsIn(place) : std::vector<fs::path>{place});
    if (found.empty()) throw Failure(fmt::format("no model configuration (*.json) in {}", place));
    for (const ConfigText& config : found) models.push_back(LoadModel(config));
  }
  return models;
}

FrequenciesPtr ModelFrequencies(const Model& model, const std::string& layer_type, int64_t sequence_length) {
  ropewalk_frequencies* frequencies = nullptr;
  Require(ropewalk_frequencies_from_config(model.json.c_str(), model.path.c_str(),
                                           layer_type.empty() ? nullptr : layer_type.c_str(), sequence_length,
                                           &frequencies));
  return FrequenciesPtr(frequencies);
}

FrequenciesPtr PlainFrequencies(double theta, int64_t rotary_dim) {
  ropewalk_frequencies* frequencies = nullptr;
  Require(ropewalk_frequencies_create(theta, rotary_dim, nullptr, 0, &frequencies));
  return FrequenciesPtr(frequencies);
}

CLI::Validator Whole(uint64_t low, uint64_t high) {
  return CLI::Validator(
      [low, high](std::string& text) -> std::string {
        uint64_t number = 0;
        if (ParseWhole(text, &number) && number >= low && number <= high) return "";
        return fmt::format("must be a whole number from {} to {}, but is {}", low, high, text);
      },
      "");
}

bool ParseWhole(std::string_view text, uint64_t* number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *number);
  return error == std::errc() && end == text.data() + text.size();
}

CLI::Validator Above0() {
  return CLI::Validator(
      [](std::string& text) {
        double number = 0;
        return CLI::detail::lexical_cast(text, number) && number > 0 ? ""
                                                                     : fmt::format("must be above 0, but is {}", text);
      },
      "");
}

// ---- output ---------------------------------------------------------------------------------------------------------

void WriteText(const std::string& path, const std::string& text) {
  if (path == "-") {
    fmt::print("{}", text);
    return;
  }
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw Failure(fmt::format("cannot write {}", path));
}

std::string CsvLine(const std::vector<std::string>& cells) {
  std::string line;
  for (const std::string& cell : cells) {
    if (!line.empty() || &cell != cells.data()) line += ',';
    if (cell.find_first_of(",\"\n") == std::string::npos) {
      line += cell;
      continue;
    }
    line += '"';
    for (const char c : cell) line += c == '"' ? std::string("\"\"") : std::string(1, c);
    line += '"';
  }
  return line + "\n";
}

}  // namespace ropewalk::cli
