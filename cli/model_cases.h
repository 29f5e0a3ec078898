// Options and helpers of the subcommands that work on models: run, check, bench, explain.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/common.h"
#include "conformance/cases.h"
#include "measure/place.h"
#include "rope/arguments.h"

namespace ropewalk::cli {

void AddModelOption(CLI::App* command, std::vector<std::string>* models);
CLI::Validator Dtypes();  // their names, in any case
void AddDtypeOption(CLI::App* command, std::string* dtype);

// For what is timed: a backend, forced; its place is a GPU's for CUDA, else the host.
void AddPlaceOption(CLI::App* command, std::string* backend);
bench::Place& PlaceOf(const std::string& backend);              // throws Failure
void RequireNoThreads(bool given, const std::string& backend);  // throws Failure
void WarnOfThreads(int32_t threads);                            // on stderr, if they are more than the cores
std::string DeviceText(const bench::Place& place);              // "NVIDIA H200, driver 580.95.05 for CUDA 13.0"
std::string ThreadsText(int32_t threads);                       // ", 2 threads", "" for 0

uint32_t ParseDtype(const std::string& name);  // "bf16", "bfloat16", ..
const char* ShortDtype(uint32_t dtype);        // "bf16"

// A case from "tokens,q_heads,k_heads,head_dim[,rotary_dim]". Throws Failure.
RopeCase ParseShape(const std::string& text, uint32_t dtype);

// The operation on the model's shapes, one case a layer type. Throws Failure.
std::vector<RopeCase> ModelCases(const Model& model, int64_t tokens, uint32_t dtype);
// "Gemma-3-4B (sliding_attention)"
std::string ModelLabel(const Model& model, const RopeCase& c);

// Of bench --sweep: what head sizes and rotated parts of every kind cost on the CPU beside 128 of 128.
struct SweepOptions {
  std::vector<std::string> dtypes, pairings, ops;
  int64_t tokens = 0;  // 0: 64, or 32 in float32
  double seconds = 0;  // of timing for each line
  std::string json, csv;
};

// Returns an ExitCode.
int Sweep(const SweepOptions& options);

// What the other lines of bench are written with.
Json MachineOf(const bench::Place& place);
std::string Csv(const Json& results);

}  // namespace ropewalk::cli
