// What the subcommands share: errors, tables, progress, models, frequencies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "models/model_config.h"

namespace ropewalk::cli {

// In the order in which fields were added.
using Json = nlohmann::ordered_json;

// What a command ends with.
enum ExitCode : int {
  kHeld = 0,           // everything asked for held
  kNotHeld = 1,        // a check failed, or nothing ran
  kCannot = 2,         // bad usage, a missing file, an absent backend
  kInterrupted = 130,  // by Ctrl-C, as shells count it: what was done until then is printed
};

// Ends a command with one sentence on stderr.
class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& text, ExitCode code = kCannot) : std::runtime_error(text), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

// Throws what the library said unless `code` is ROPEWALK_OK.
void Require(int code);
// Parses text that the library returned; null is a failure.
Json Parsed(const char* text);

// Columns as wide as their cells need; numbers to the right.
class Table {
 public:
  // A heading that begins with '>' makes a right-aligned column.
  explicit Table(std::vector<std::string> headings);
  void Add(std::vector<std::string> cells);
  void Print() const;

 private:
  std::vector<std::string> headings_;
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;
};

// The text in lines of at most 80 columns, of which those after the first begin with `indent` spaces, where the first
// one begins already.
std::string Wrapped(std::string_view text, size_t indent);
// A line of what is told below a table: a name of at most 10 columns, and the text behind it.
void PrintNote(std::string_view name, std::string_view text);
std::string Lower(std::string_view text);  // ASCII letters
// "1 case", "2 cases".
std::string Counted(int64_t count, std::string_view noun);

// "ok" or "FAILED", in colour on a terminal.
std::string Verdict(bool held);

// From now on Ctrl-C only asks for the end, once: a second one ends the process.
void CatchInterrupt();
bool Interrupted();
// What a loop of `asked` parts that asks Interrupted() after each ends with, having done so many. Says on stderr what
// Ctrl-C left undone.
int EndOf(bool held, int64_t done, int64_t asked);

// One line on stderr that is written over; silent where stderr is not a terminal.
class Progress {
 public:
  Progress(std::string label, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void Step(std::string_view what);  // before each part of the work

 private:
  std::string label_;
  int64_t total_, done_ = 0;
  bool shown_;
};

struct Model {
  std::string path;
  std::string json;
  ModelConfig config;
};

// Files, directories of configurations, or names; none: all models that come with Ropewalk. Throws Failure.
std::vector<Model> LoadModels(const std::vector<std::string>& paths);
// The directory of the models that come with Ropewalk; "" if there is none. `tried` gets the places looked at.
std::string ModelsDirectory(std::vector<std::string>* tried);

// The folders of Python packages beside this command, if it came with one: PREFIX/lib/python3*/site-packages.
std::vector<std::filesystem::path> PythonPackages();

struct FrequenciesDeleter {
  void operator()(ropewalk_frequencies* frequencies) const { ropewalk_frequencies_release(frequencies); }
};
using FrequenciesPtr = std::unique_ptr<ropewalk_frequencies, FrequenciesDeleter>;
FrequenciesPtr ModelFrequencies(const Model& model, const std::string& layer_type, int64_t sequence_length);
FrequenciesPtr PlainFrequencies(double theta, int64_t rotary_dim);

// For options that are numbers above 0; and whole numbers in a range: what is larger than fits is else cut in silence.
CLI::Validator Above0();
CLI::Validator Whole(uint64_t low, uint64_t high);
constexpr uint64_t kMostTokens = uint64_t{1} << 31;
// False for anything but the digits of a number that fits.
bool ParseWhole(std::string_view text, uint64_t* number);

// Writes to the path, or to stdout for "-".
void WriteText(const std::string& path, const std::string& text);
// One line for a CSV file; quotes where needed.
std::string CsvLine(const std::vector<std::string>& cells);

// Of describe: a sentence with a capital, but for an argument's name, and a full stop; and what --python prints,
// bindings/python/ropewalk/_face.py for this description.
std::string Sentence(std::string text);
std::string PythonFace(const Json& description);

// The subcommands. Each adds itself to `app`; when it is the one chosen, it runs and sets `exit_code`.
void AddDoctor(CLI::App* app, int* exit_code);
void AddRun(CLI::App* app, int* exit_code);
void AddCheck(CLI::App* app, int* exit_code);
void AddBench(CLI::App* app, int* exit_code);
void AddExplain(CLI::App* app, int* exit_code);
void AddCompile(CLI::App* app, int* exit_code);
void AddDescribe(CLI::App* app, int* exit_code);
void AddTune(CLI::App* app, int* exit_code);
void AddFloor(CLI::App* app, int* exit_code);
void AddManual(CLI::App* app, int* exit_code);

}  // namespace ropewalk::cli
