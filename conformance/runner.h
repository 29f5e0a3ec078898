// Runs cases on a backend and compares every byte with the reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "conformance/cases.h"
#include "conformance/memory.h"

namespace ropewalk {

struct CaseResult {
  std::string name;
  bool passed = false;
  std::string message;  // of the first bad element, or of the call's refusal; "" if passed
  std::string rerun;    // the command that runs this case alone
  std::string backend;  // who served, from ropewalk_explain
  std::string kernel;
  double worst = 0;      // the largest error in units of its tolerance
  int64_t elements = 0;  // compared
};

struct RunOptions {
  std::string backend = "cpu";  // for ropewalk_force_backend: "cpu", "cpu:avx2"; "": as it is chosen
  std::string filter = {};      // see MatchesFilter
  std::string source = {};      // options of `ropewalk check` that make these cases, for the rerun; "": the list
  int64_t max_failures = 0;     // stop after so many; 0: never
  std::function<void(const CaseResult& result, int64_t done, int64_t total)> progress = {};
  std::function<bool()> stop = {};                                       // asked after each case; true: the last one
  CaseResult (*run)(const RopeCase& c, DeviceMemory& memory) = nullptr;  // null: RunCase
};

struct RunSummary {
  struct Count {
    int64_t run = 0, failed = 0;
  };
  int64_t run = 0, failed = 0;
  int64_t elements = 0;
  double worst = 0;
  std::string worst_case;
  std::string error;  // why nothing could run; "" else
  std::vector<CaseResult> failures;
  std::map<std::string, Count> tags;     // by CaseTags
  std::map<std::string, Count> kernels;  // by "backend kernel"
  bool ok() const { return error.empty() && run > 0 && failed == 0; }
};

// A substring, or with * and ? a pattern for the whole name. "" matches all.
bool MatchesFilter(std::string_view name, std::string_view filter);

// Runs one case, or its gradient, twice on the backend that now serves `memory`.
CaseResult RunCase(const RopeCase& c, DeviceMemory& memory);
CaseResult RunBackwardCase(const RopeCase& c, DeviceMemory& memory);

// From now on a signal that ends the process while a case runs first prints the command that runs this case alone.
void PrintCaseOnCrash();

// Runs those of `cases` that the filter names, with the backend forced meanwhile. Nothing having run is an error.
RunSummary RunCases(std::span<const RopeCase> cases, DeviceMemory& memory, const RunOptions& options);

}  // namespace ropewalk
