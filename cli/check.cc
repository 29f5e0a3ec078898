// ropewalk check: every case against the double-precision reference, on the backend that is forced.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "cli/common.h"
#include "cli/model_cases.h"
#include "conformance/runner.h"

namespace ropewalk::cli {
namespace {

struct CheckOptions {
  std::string backend = "cpu", pattern;
  std::vector<std::string> models;
  int64_t max_failures = 0, random = 0;
  uint64_t seed = 1;
  int32_t threads = 1;
  std::string shard;
  bool engines = false, gradients = false, list = false, json = false;
};

// The cases of the list, those of the models named, of all models as engines call them, or random ones.
std::vector<RopeCase> Cases(const CheckOptions& options) {
  if (options.gradients) return options.random ? RandomBackwardCases(options.seed, options.random) : BackwardCases(1);
  if (options.random) return RandomRopeCases(options.seed, options.random);
  if (options.engines) return EngineCases(true);
  if (options.models.empty()) return RopeCases();
  std::vector<RopeCase> cases;
  for (const Model& model : LoadModels(options.models)) {
    for (const uint32_t dtype : {kBF16, kF16, kF32}) {
      for (const int64_t tokens : {1, 7, 64}) {
        const std::vector<RopeCase> found = ModelCases(model, tokens, dtype);
        cases.insert(cases.end(), found.begin(), found.end());
      }
    }
  }
  return cases;
}

// What a rerun must say besides the backend and the case.
std::string Source(const CheckOptions& options) {
  std::string words;
  for (const std::string& model : options.models) words += fmt::format(" --model '{}'", model);
  if (options.random) words += fmt::format(" --random {} --seed {}", options.random, options.seed);
  if (options.engines) words += " --engines";
  if (options.gradients) words += " --gradients";
  if (options.threads != 1) words += fmt::format(" --threads {}", options.threads);
  return words.empty() ? words : words.substr(1);
}

Json ToJson(const RunSummary& summary, int64_t asked, const CheckOptions& options) {
  const auto counts = [](const std::map<std::string, RunSummary::Count>& of) {
    Json out = Json::object();
    for (const auto& [name, count] : of) out[name] = {{"run", count.run}, {"failed", count.failed}};
    return out;
  };
  Json out = {{"version", ropewalk_version()},
              {"backend", options.backend},
              {"held", summary.ok()},
              {"asked", asked},
              {"run", summary.run},
              {"failed", summary.failed},
              {"elements", summary.elements},
              {"worst", summary.worst},
              {"worst_case", summary.worst_case},
              {"error", summary.error},
              {"options", counts(summary.tags)},
              {"kernels", counts(summary.kernels)}};
  out["failures"] = Json::array();
  for (const CaseResult& failure : summary.failures) {
    out["failures"].push_back({{"case", failure.name}, {"message", failure.message}, {"rerun", failure.rerun}});
  }
  return out;
}

// One line for each stage or option: how many cases exercised each of its values.
void PrintOptions(const RunSummary& summary) {
  Table table({"stage or option", "cases run (failed)"});
  std::string option, values;
  const auto flush = [&] {
    if (!option.empty()) table.Add({option, values});
    values.clear();
  };
  for (const auto& [tag, count] : summary.tags) {
    const size_t equals = tag.find('=');
    const std::string name = tag.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : tag.substr(equals + 1);
    if (name != option) {
      flush();
      option = name;
    }
    if (!values.empty()) values += ", ";
    if (!value.empty()) values += value + " ";
    values += std::to_string(count.run);
    if (count.failed) values += fmt::format(" ({} failed)", count.failed);
  }
  flush();
  table.Print();
}

// Every n-th run of cases from the k-th on, for "k/n": calls of one shape stay together, so that one process compiles
// their kernel.
void TakeShard(const std::string& shard, std::vector<RopeCase>* cases) {
  if (shard.empty()) return;
  uint64_t k = 0, n = 0;
  const size_t slash = std::min(shard.find('/'), shard.size());
  const std::string_view text = shard;
  if (!ParseWhole(text.substr(0, slash), &k) || !ParseWhole(text.substr(std::min(slash + 1, text.size())), &n) ||
      k >= n) {
    throw Failure(fmt::format("--shard must be K/N with K < N, but is \"{}\"", shard));
  }
  std::vector<RopeCase> taken;
  for (size_t i = 0; i < cases->size(); ++i) {
    if (i / kCallsOfAShape % n == k) taken.push_back(std::move((*cases)[i]));
  }
  *cases = std::move(taken);
}

int Check(const CheckOptions& options) {
  std::vector<RopeCase> cases = Cases(options);
  TakeShard(options.shard, &cases);
  if (options.list) {
    int64_t listed = 0;
    for (const RopeCase& c : cases) {
      if (!MatchesFilter(c.name, options.pattern)) continue;
      fmt::print("{}\n", c.name);
      ++listed;
    }
    if (listed == 0) throw Failure(fmt::format("no case matches \"{}\"", options.pattern), kNotHeld);
    return kHeld;
  }
  Require(ropewalk_set_threads(options.threads));
  PrintCaseOnCrash();
  const int64_t matching =
      std::ranges::count_if(cases, [&](const RopeCase& c) { return MatchesFilter(c.name, options.pattern); });
  RunSummary summary;
  {
    Progress progress("check", matching);
    RunOptions run;
    run.backend = options.backend;
    run.filter = options.pattern;
    run.source = Source(options);
    run.max_failures = options.max_failures;
    run.progress = [&](const CaseResult& result, int64_t, int64_t) { progress.Step(result.name); };
    run.stop = Interrupted;
    if (options.gradients) run.run = RunBackwardCase;
    CatchInterrupt();
    summary = RunCases(cases, MemoryOf(options.backend), run);
  }
  const bool tried = summary.run > 0 || matching == 0;  // not with a backend that is absent
  if (options.json) {
    fmt::print("{}\n", ToJson(summary, matching, options).dump(2));
    return tried ? EndOf(summary.ok(), summary.run, matching) : kCannot;
  }
  if (!summary.error.empty() && summary.run == 0) throw Failure(summary.error, tried ? kNotHeld : kCannot);
  PrintOptions(summary);
  fmt::print("\n");
  Table kernels({"backend and kernel", ">cases", ">failed"});
  for (const auto& [kernel, count] : summary.kernels) {
    kernels.Add({kernel, std::to_string(count.run), std::to_string(count.failed)});
  }
  kernels.Print();
  fmt::print("\n");
  for (const CaseResult& failure : summary.failures) {
    fmt::print("{}  {}\n        {}\n        again: {}\n", Verdict(false), failure.name, failure.message, failure.rerun);
  }
  if (!summary.error.empty()) fmt::print("{}\n", summary.error);
  fmt::print("{}: {} ran, {} failed; {} compared", Verdict(summary.ok()), Counted(summary.run, "case"), summary.failed,
             Counted(summary.elements, "element"));
  if (summary.worst_case.empty()) {
    fmt::print("\n");
  } else {
    fmt::print("; worst error {:.3f} of the tolerance ({})\n", summary.worst, summary.worst_case);
  }
  return EndOf(summary.ok(), summary.run, matching);
}

}  // namespace

void AddCheck(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<CheckOptions>();
  CLI::App* command =
      app->add_subcommand("check", "conformance: every case against the reference; how to rerun a failure");
  command->add_option("--backend", options->backend, "what to force: a backend, or one CPU target as in cpu:avx2")
      ->capture_default_str();
  command->add_option("--case", options->pattern, "only cases whose name holds this text; * and ? match the whole name")
      ->type_name("PATTERN");
  command
      ->add_option("--shard", options->shard,
                   "only every N-th run of four cases from the K-th on, to share them among processes")
      ->type_name("K/N");
  AddModelOption(command, &options->models);
  command->add_option("--random", options->random, "so many cases drawn at random instead of those of the list")
      ->check(Whole(1, 1000000))
      ->excludes("--model");
  command
      ->add_flag("--engines", options->engines,
                 "what engines send instead of the list: the heads of real models, as tensor-parallel ranks have them")
      ->excludes("--model")
      ->excludes("--random");
  command->add_flag("--gradients", options->gradients, "the gradient of each case instead, of those that store nothing")
      ->excludes("--model")
      ->excludes("--engines");
  command->add_option("--seed", options->seed, "other random cases for another number")
      ->check(Whole(0, UINT64_MAX))
      ->needs("--random")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "threads of the CPU backend")
      ->check(Whole(1, 1024))
      ->capture_default_str();
  command->add_option("--max-failures", options->max_failures, "stop after so many; 0: never")
      ->check(Whole(0, INT64_MAX))
      ->capture_default_str();
  command->add_flag("--list", options->list, "print the names of the cases and run none");
  command->add_flag("--json", options->json, "print JSON");
  command->footer(
      "Examples:\n"
      "  ropewalk check                            all cases\n"
      "  ropewalk check --backend cpu:avx2         on one target of the CPU\n"
      "  ropewalk check --case '*rms*' --list      which cases a pattern means\n"
      "  ropewalk check --model my/config.json     one model's shapes, in three dtypes\n"
      "  ropewalk check --random 1000 --seed 7     a thousand cases that no list has\n"
      "  ropewalk check --engines --case Phi-4     one model's heads, over 1 to 8 ranks\n"
      "  ropewalk check --gradients                the gradient of every case\n\n"
      "A tolerance is half a unit in the last place of the output and 2^-20 of the\n"
      "pair's length (2^-21 in float32).\n"
      "Exit code 1 if a case fails or none ran.");
  command->callback([options, exit_code] { *exit_code = Check(*options); });
}

}  // namespace ropewalk::cli
