// The command line: picks a subcommand, turns failures into one sentence and an exit code.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/common.h"

namespace ropewalk::cli {
namespace {

constexpr size_t kColumn = 34, kCommandColumn = 14;  // where descriptions begin, of options and of subcommands

// Descriptions in 80 columns.
class Narrow : public CLI::Formatter {
 public:
  std::string make_option_desc(const CLI::Option* option) const override {
    std::string text = Wrapped(CLI::Formatter::make_option_desc(option), kColumn);
    const std::string indent = "\n" + std::string(kColumn, ' ');  // which CLI11 puts there itself
    for (size_t at = 0; (at = text.find(indent, at)) != std::string::npos;) text.replace(at, indent.size(), "\n");
    return text;
  }

  // A long list of choices goes on over lines.
  std::string make_option_opts(const CLI::Option* option) const override {
    constexpr size_t kChoices = 66;
    std::string text = CLI::Formatter::make_option_opts(option);
    for (size_t start = 0; text.size() - start > kChoices;) {
      const size_t comma = text.rfind(',', start + kChoices);
      if (comma == std::string::npos || comma <= start) break;
      text.insert(comma + 1, "\n      ");
      start = comma + 1;
    }
    return text;
  }

  std::string make_subcommand(const CLI::App* command) const override {
    return fmt::format("  {:<{}}{}\n", command->get_name(), kCommandColumn - 2,
                       Wrapped(command->get_description(), kCommandColumn));
  }
};

// How many letters must be changed, put in or taken out to make one word of the other.
size_t Distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])}));
    }
  }
  return row.back();
}

// What a word that is no subcommand may have meant; "" if nothing is near.
std::string Meant(const CLI::App& app, const std::string& word) {
  std::string nearest;
  size_t least = 3;
  for (const CLI::App* command : app.get_subcommands(nullptr)) {
    const size_t distance = Distance(word, command->get_name());
    if (distance < least) least = distance, nearest = command->get_name();
  }
  return nearest;
}

int Main(int argc, char** argv) {
  CLI::App app("Ropewalk: rotary position embedding on queries and keys, at the speed of memory.", "ropewalk");
  app.set_version_flag("-v,-V,--version", ropewalk_version());
  app.require_subcommand(0, 1);
  const auto formatter = std::make_shared<Narrow>();
  formatter->column_width(kColumn);
  app.formatter(formatter);  // before the subcommands, which take it over
  app.footer(
      "Start here:\n"
      "  ropewalk doctor                   what serves here, and what would help\n"
      "  ropewalk run                      real models' shapes: checked and timed\n"
      "  ropewalk run --model config.json  one model of yours\n"
      "  ropewalk check                    every case against the reference\n"
      "  ropewalk SUBCOMMAND --help        examples of each\n\n"
      "Exit code: 0 if all held, 1 if something did not (or nothing ran), 2 if it could\n"
      "not be tried, 130 after Ctrl-C.");
  std::string help = "--help", version = "--version";  // as words, too
  int exit_code = kHeld;
  AddDoctor(&app, &exit_code);
  AddRun(&app, &exit_code);
  AddCheck(&app, &exit_code);
  AddBench(&app, &exit_code);
  AddExplain(&app, &exit_code);
  AddCompile(&app, &exit_code);
  AddTune(&app, &exit_code);
  AddDescribe(&app, &exit_code);
  AddFloor(&app, &exit_code);
  AddManual(&app, &exit_code);
  if (argc == 2 && argv[1] == std::string_view("help")) argv[1] = help.data();
  if (argc == 2 && argv[1] == std::string_view("version")) argv[1] = version.data();
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) {
      fmt::print("{}", app.help());
      return kCannot;
    }
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    const bool in_command = !app.get_subcommands().empty();
    const std::string first = argc > 1 ? argv[1] : "";
    const std::string meant = in_command ? "" : Meant(app, first);
    const std::vector<std::string> rest = app.remaining(true);
    if (!meant.empty()) {
      fmt::print(stderr, "ropewalk: there is no {}: did you mean ropewalk {}?\n", first, meant);
    } else if (in_command && rest.size() == 1 && !rest[0].starts_with('-') &&
               app.get_subcommands()[0]->get_option_no_throw("--model") != nullptr) {
      fmt::print(stderr, "ropewalk: {} was not expected: a model is given by --model {}\n", rest[0], rest[0]);
    } else {
      fmt::print(stderr, "ropewalk: {} (try --help)\n", error.what());
    }
    return kCannot;
  } catch (const Failure& failure) {
    fmt::print(stderr, "ropewalk: {}\n", failure.what());
    return failure.code();
  }
  return exit_code;
}

}  // namespace
}  // namespace ropewalk::cli

int main(int argc, char** argv) {
  try {
    const int code = ropewalk::cli::Main(argc, argv);
    // What was printed may still be on its way: to a full disk, or to where nobody listens.
    std::cout.flush();
    if (std::fflush(stdout) == 0 && !std::ferror(stdout) && std::cout) return code;
    std::fprintf(stderr, "ropewalk: cannot write the output: %s\n", std::strerror(errno));
    return ropewalk::cli::kCannot;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "ropewalk: out of memory: try fewer cases or tokens\n");
    return ropewalk::cli::kCannot;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ropewalk: %s\n", error.what());
    return ropewalk::cli::kCannot;
  }
}
