// ropewalk explain: which backend, kernel and source serve a model's calls, and why, for each combination of stages.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "cli/common.h"
#include "cli/model_cases.h"
#include "conformance/case_call.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

struct ExplainOptions {
  std::vector<std::string> models;
  std::string dtype = "bf16", backend;
  int64_t tokens = 1;
  bool json = false;
};

struct Stages {
  std::string name;
  RopeCase test_case;
};

// Whether the model's pairs are mapped to rows of positions, which a table made by row number does not know.
bool HasAxes(const RopeCase& c) {
  std::unique_ptr<CaseCall> call;
  return CaseCall::Make(c, HostMemory(), &call).ok() && call->frequencies() &&
         ropewalk_frequencies_axes(call->frequencies());
}

// The stages as the model has them, then with a store, and with angles from a table.
std::vector<Stages> Combinations(const RopeCase& base) {
  std::vector<Stages> out;
  const std::string rotate = base.norm ? "norm + rope" : "rope";
  out.push_back({rotate + ", in place", base});
  RopeCase c = base;
  c.out_of_place = true;
  out.push_back({rotate + ", out of place", c});
  c = base;
  c.angles = Angles::kTable;
  if (!HasAxes(base)) out.push_back({rotate + ", from a table", c});
  if (base.k_heads > 0) {
    c = base;
    c.cache = Cache::kNhd;
    out.push_back({rotate + " + store", c});
    c.cache_dtype = kE4M3;
    out.push_back({rotate + " + store in fp8", c});
  }
  for (Stages& stages : out) bench::Complete(&stages.test_case);
  return out;
}

int Explain(const ExplainOptions& options) {
  if (!options.backend.empty()) Require(ropewalk_force_backend(options.backend.c_str()));
  Json results = Json::array();
  for (const Model& model : LoadModels(options.models)) {
    for (const RopeCase& base : ModelCases(model, options.tokens, ParseDtype(options.dtype))) {
      for (const Stages& stages : Combinations(base)) {
        std::unique_ptr<CaseCall> call;
        Json result = {{"model", ModelLabel(model, base)}, {"stages", stages.name}};
        const Status status = CaseCall::Make(stages.test_case, HostMemory(), &call);
        if (!status.ok()) throw Failure(fmt::format("{}, {}: {}", model.path, stages.name, status.text()));
        const char* text = ropewalk_explain(&call->args());
        if (!text) {
          result["refused"] = ropewalk_last_error();
        } else {
          const Json explained = Json::parse(text);
          for (const auto& [key, value] : explained.items()) result[key] = value;
        }
        results.push_back(result);
      }
    }
  }
  const bool held = std::ranges::none_of(results, [](const Json& result) { return result.contains("refused"); });
  if (options.json) {
    fmt::print("{}\n", results.dump(2));
    return held ? kHeld : kNotHeld;
  }
  // Whatever the backend tells. What all calls share is said once, what a model's calls share once for the model.
  std::vector<std::string> keys;
  for (const Json& result : results) {
    for (const auto& [key, value] : result.items()) {
      if (key != "model" && key != "stages" && std::ranges::find(keys, key) == keys.end()) keys.push_back(key);
    }
  }
  const auto text_of = [](const Json& result, const std::string& key) {
    if (!result.contains(key)) return std::string();
    return result[key].is_string() ? result[key].get<std::string>() : result[key].dump();
  };
  // Takes from `left` those that a range of results shares, and prints them.
  const auto print_shared = [&](auto begin, auto end, std::vector<std::string>* left, size_t indent) {
    std::erase_if(*left, [&](const std::string& key) {
      const std::string first = text_of(*begin, key);
      if (!std::all_of(begin, end, [&](const Json& result) { return text_of(result, key) == first; })) return false;
      if (!first.empty()) fmt::print("{:{}}{}\n", "", indent, Wrapped(key + ": " + first, indent + 2));
      return true;
    });
  };
  print_shared(results.begin(), results.end(), &keys, 0);
  for (auto begin = results.begin(); begin != results.end();) {
    const std::string model = text_of(*begin, "model");
    const auto end = std::find_if(begin, results.end(), [&](const Json& r) { return text_of(r, "model") != model; });
    fmt::print("\n{}\n", model);
    std::vector<std::string> own = keys;
    print_shared(begin, end, &own, 2);
    for (; begin != end; ++begin) {
      std::string line = text_of(*begin, "stages"), more;
      for (const std::string& key : own) {
        const std::string value = text_of(*begin, key);
        if (value.empty()) continue;
        if (key == "kernel") {
          line += ": " + value;
        } else {
          more += fmt::format("{}{} {}", more.empty() ? "" : ", ", key, value);
        }
      }
      fmt::print("  {}\n", Wrapped(line, 4));
      if (!more.empty()) fmt::print("    {}\n", Wrapped(more, 4));
    }
  }
  return held ? kHeld : kNotHeld;
}

}  // namespace

void AddExplain(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<ExplainOptions>();
  CLI::App* command =
      app->add_subcommand("explain", "backend, kernel, source, why: for each model and combination of stages");
  AddModelOption(command, &options->models);
  AddDtypeOption(command, &options->dtype);
  command->add_option("--tokens", options->tokens, "tokens in the call")
      ->check(Whole(1, kMostTokens))
      ->capture_default_str();
  command->add_option("--backend", options->backend, "force a backend, or one CPU target: cpu, cpu:avx2");
  command->add_flag("--json", options->json, "print JSON");
  command->footer("Examples:\n  ropewalk explain --model qwen3-8b\n  ropewalk explain --backend cpu:avx2 --json");
  command->callback([options, exit_code] { *exit_code = Explain(*options); });
}

}  // namespace ropewalk::cli
