// ropewalk compile: bundles of kernels for machines without a compiler. It arrives with the CUDA backend.
// SPDX-License-Identifier: Apache-2.0
#include "cli/common.h"

namespace ropewalk::cli {

void AddCompile(CLI::App* app, int* exit_code) {
  CLI::App* command =
      app->add_subcommand("compile", "a bundle of kernels for machines without a compiler (with the CUDA backend)");
  // Takes what it will take, so that scripts written for it meet the message and not a complaint about an option.
  command->allow_extras();
  command->callback([exit_code] {
    *exit_code = kCannot;
    throw Failure(
        "compile arrives with the CUDA backend; the CPU's kernels are part of the library and need no bundle");
  });
}

}  // namespace ropewalk::cli
