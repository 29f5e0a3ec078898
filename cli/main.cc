// The command line: picks a subcommand, turns failures into one sentence and an exit code.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <new>

#include "cli/common.h"

namespace ropewalk::cli {
namespace {

int Main(int argc, char** argv) {
  CLI::App app("Ropewalk: rotary position embedding on queries and keys, at the speed of memory.", "ropewalk");
  app.set_version_flag("--version", ropewalk_version());
  app.require_subcommand(0, 1);
  app.get_formatter()->column_width(34);
  app.footer(
      "Start here:\n"
      "  ropewalk doctor                  what serves on this machine, and what would help\n"
      "  ropewalk run                     real models' shapes: checked, timed against the floor, explained\n"
      "  ropewalk run --model config.json one model of yours\n"
      "  ropewalk check                   every case against the double-precision reference\n"
      "  ropewalk SUBCOMMAND --help       examples of each\n\n"
      "Exit code: 0 if all held, 1 if something did not (or nothing ran), 2 if it could not be tried.");
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
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) {
      fmt::print("{}", app.help());
      return kCannot;
    }
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    fmt::print(stderr, "ropewalk: {} (try --help)\n", error.what());
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
