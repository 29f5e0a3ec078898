// SPDX-License-Identifier: Apache-2.0
#include "conformance/runner.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/text.h"
#include "conformance/case_call.h"

namespace ropewalk {
namespace {

// * stands for any run, ? for any character.
bool Glob(std::string_view name, std::string_view pattern) {
  size_t n = 0, p = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++n;
      ++p;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

// Who would serve the call.
Status Explain(const ropewalk_rope_args& args, CaseResult* result) {
  const char* text = ropewalk_explain(&args);
  if (!text) return Status::Invalid(ropewalk_last_error());
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object()) return Status::Internal(Text("ropewalk_explain gave no JSON: ", text));
  result->backend = json.value("backend", "");
  result->kernel = json.value("kernel", "");
  return {};
}

// Faults must be recorded exactly where the reference met one.
Status CheckFaults(const std::string& expected, std::string* message) {
  const int code = ropewalk_check_faults();
  const std::string text = code == ROPEWALK_OK ? "" : ropewalk_last_error();
  if (code != ROPEWALK_OK && code != ROPEWALK_FAULT) return {static_cast<ropewalk_code>(code), text};
  if (expected.empty() && code == ROPEWALK_FAULT) {
    *message = Text("a fault was recorded, but all is in range: ", text);
  } else if (!expected.empty() && code == ROPEWALK_OK) {
    *message = Text(expected, " is out of range, but no fault was recorded");
  } else if (text.find(expected) == std::string::npos) {
    *message = Text("the fault must name ", expected, ", but its text is: ", text);
  }
  return {};
}

Status RunAndVerify(CaseCall& call, CaseResult* result) {
  ROPEWALK_TRY(call.Run());
  // Once more: what is kept of a first call serves the second, as it does in a model.
  ROPEWALK_TRY(call.Reset());
  ROPEWALK_TRY(call.Run());
  ROPEWALK_TRY(call.Verify(&result->message, &result->worst, &result->elements));
  std::string fault;
  ROPEWALK_TRY(CheckFaults(call.expected_fault(), &fault));
  if (result->message.empty()) result->message = std::move(fault);
  return {};
}

Status RunForward(const RopeCase& c, DeviceMemory& memory, CaseResult* result) {
  std::unique_ptr<CaseCall> call;
  ROPEWALK_TRY(CaseCall::Make(c, memory, &call));
  ROPEWALK_TRY(Explain(call->args(), result));
  return RunAndVerify(*call, result);
}

Status RunBackward(const RopeCase& c, DeviceMemory& memory, CaseResult* result) {
  std::unique_ptr<CaseCall> call;
  ROPEWALK_TRY(CaseCall::MakeBackward(c, memory, &call));
  return RunAndVerify(*call, result);
}

CaseResult ResultOf(const RopeCase& c, const Status& status, CaseResult result) {
  result.name = c.name;
  if (!status.ok()) {
    result.message = status.text();
    (void)ropewalk_check_faults();  // the next case starts clean
  }
  result.passed = result.message.empty();
  return result;
}

// What a signal handler may read: the rerun of the case in hand.
char case_in_hand[1024];

void OnCrash(int signal) {
  if (case_in_hand[0] && write(STDERR_FILENO, case_in_hand, std::strlen(case_in_hand)) < 0) return;
  std::signal(signal, SIG_DFL);
  raise(signal);
}

void TakeInHand(const std::string& rerun) {
  const std::string text = rerun.empty() ? rerun : Text("the process ended in: ", rerun, "\n");
  std::strncpy(case_in_hand, text.c_str(), sizeof(case_in_hand) - 1);
}

}  // namespace

void PrintCaseOnCrash() {
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, OnCrash);
}

bool MatchesFilter(std::string_view name, std::string_view filter) {
  if (filter.find_first_of("*?") == std::string_view::npos) return name.find(filter) != std::string_view::npos;
  return Glob(name, filter);
}

CaseResult RunCase(const RopeCase& c, DeviceMemory& memory) {
  CaseResult result;
  const Status status = RunForward(c, memory, &result);
  return ResultOf(c, status, std::move(result));
}

CaseResult RunBackwardCase(const RopeCase& c, DeviceMemory& memory) {
  CaseResult result;
  const Status status = RunBackward(c, memory, &result);
  return ResultOf(c, status, std::move(result));
}

RunSummary RunCases(std::span<const RopeCase> cases, DeviceMemory& memory, const RunOptions& options) {
  RunSummary summary;
  std::vector<const RopeCase*> chosen;
  for (const RopeCase& c : cases) {
    // A whole name means that case alone, not those which it begins.
    if (c.name == options.filter) chosen.assign(1, &c);
    if (c.name == options.filter) break;
    if (MatchesFilter(c.name, options.filter)) chosen.push_back(&c);
  }
  if (chosen.empty()) {
    summary.error = Text("no case matches \"", options.filter, "\": nothing ran");
    return summary;
  }
  if (!options.backend.empty() && ropewalk_force_backend(options.backend.c_str()) != ROPEWALK_OK) {
    summary.error = ropewalk_last_error();
    return summary;
  }
  (void)ropewalk_check_faults();  // of earlier calls
  const std::string backend = options.backend.substr(0, options.backend.find(':'));
  for (const RopeCase* c : chosen) {
    const std::string rerun =
        Text("ropewalk check ", options.backend.empty() ? Text() : Text("--backend ", options.backend, " "), "--case '",
             c->name, "'", options.source.empty() ? "" : " ", options.source);
    TakeInHand(rerun);
    CaseResult result = (options.run ? options.run : RunCase)(*c, memory);
    TakeInHand("");
    result.rerun = rerun;
    if (result.passed && !options.run && !backend.empty() && result.backend != backend) {
      result.passed = false;
      result.message = Text("backend ", backend, " is forced, but ", result.backend, " served");
    }
    ++summary.run;
    summary.failed += !result.passed;
    summary.elements += result.elements;
    if (result.passed && result.worst > summary.worst) {
      summary.worst = result.worst;
      summary.worst_case = c->name;
    }
    const auto count = [&](RunSummary::Count& entry) {
      ++entry.run;
      entry.failed += !result.passed;
    };
    for (const std::string& tag : CaseTags(*c)) count(summary.tags[tag]);
    // A kernel's name begins with its backend; "none" does not.
    const bool named = result.kernel.starts_with(result.backend);
    if (!result.backend.empty()) {
      count(summary.kernels[named ? result.kernel : Text(result.backend, " ", result.kernel)]);
    }
    if (options.progress) options.progress(result, summary.run, static_cast<int64_t>(chosen.size()));
    const bool failed = !result.passed;
    if (failed) summary.failures.push_back(std::move(result));
    // An access that a GPU refuses costs the context: nothing after it can run.
    if (const Status lost = failed ? memory.Synchronize() : Status(); !lost.ok()) {
      summary.error = Text("the device is lost (", lost.text(), ") since ", c->name, ": ",
                           static_cast<int64_t>(chosen.size()) - summary.run, " cases did not run; again: ", rerun);
      break;
    }
    if (options.max_failures > 0 && summary.failed >= options.max_failures) break;
    if (options.stop && options.stop()) break;
  }
  if (!options.backend.empty()) (void)ropewalk_force_backend(nullptr);
  return summary;
}

}  // namespace ropewalk
