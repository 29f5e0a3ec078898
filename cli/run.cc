// ropewalk run: real models' shapes: checked against the reference, timed against the floor, explained.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdlib>
#include <set>

#include "cli/common.h"
#include "cli/model_cases.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

struct RunOptions {
  std::vector<std::string> models;
  std::string dtype = "bf16", backend;
  std::vector<int64_t> tokens;
  int32_t threads = 0;  // 0: not given
  double seconds = 0;
  bool json = false;
};

// One model's layer type at one number of tokens.
struct ModelItem {
  const Model* model;
  RopeCase test_case;
};

// Decode, a small batch and prefill; prefill is cut so that many models stay a matter of seconds.
std::vector<int64_t> TokensFor(const RunOptions& options, const ModelConfig& config, size_t models) {
  if (!options.tokens.empty()) return options.tokens;
  constexpr int64_t kManyModelsElements = int64_t{12} << 20;
  int64_t prefill = 2048;
  const int64_t per_token = (config.q_heads + config.k_heads) * config.head_dim;
  while (models > 4 && prefill > 512 && prefill * per_token > kManyModelsElements) prefill /= 2;
  return {1, 64, prefill};
}

std::string Checked(const bench::TimedCase& timed) {
  std::string verdict = fmt::format("{} {:.2f}", Verdict(timed.held), timed.worst);
  if (timed.checked_tokens == timed.tokens) return verdict;
  return fmt::format("{} ({} tokens)", verdict, timed.checked_tokens);
}

Json ToJson(const ModelItem& item, const bench::TimedCase& timed) {
  const RopeCase& c = item.test_case;
  return {{"model", item.model->config.name},
          {"layer_type", c.layer_type},
          {"config", item.model->path},
          {"op", bench::OpName(c)},
          {"tokens", c.tokens},
          {"q_heads", c.q_heads},
          {"k_heads", c.k_heads},
          {"head_dim", c.head_dim},
          {"rotary_dim", c.rotary_dim},
          {"rotary_offset", c.rotary_offset},
          {"dtype", ShortDtype(c.dtype)},
          {"held", timed.held},
          {"message", timed.message},
          {"worst", timed.worst},
          {"checked_tokens", timed.checked_tokens},
          {"us", timed.time.ours * 1e6},
          {"floor_us", timed.time.floor * 1e6},
          {"of_floor", timed.time.of_floor},
          {"noisy", timed.time.noisy},
          {"bytes", timed.bytes},
          {"gb_per_s", timed.gigabytes_per_second()},
          {"floor_kernel", timed.floor_shape},
          {"backend", timed.backend},
          {"kernel", timed.kernel}};
}

int Run(const RunOptions& options) {
  bench::Place& place = PlaceOf(options.backend);
  if (!place.threaded()) RequireNoThreads(options.threads != 0, options.backend);
  const int32_t threads = place.threaded() ? std::max(options.threads, 1) : 0;
  WarnOfThreads(threads);
  const std::vector<Model> models = LoadModels(options.models);
  std::vector<ModelItem> items;
  for (const Model& model : models) {
    for (const int64_t tokens : TokensFor(options, model.config, models.size())) {
      for (const RopeCase& c : ModelCases(model, tokens, ParseDtype(options.dtype))) items.push_back({&model, c});
    }
  }
  if (items.empty()) throw Failure("nothing ran: no model to run", kNotHeld);

  bench::TimingOptions timing;
  timing.threads = std::max(threads, 1);
  // About half a minute over all that is timed, and never too short to be steady.
  timing.seconds =
      options.seconds > 0 ? options.seconds : std::clamp(20.0 / static_cast<double>(items.size()), 0.05, 0.5);
  timing.full_check = int64_t{2} << 20;

  // 80 columns: what a model's lines share stands over them.
  std::vector<std::string> lines;
  std::set<std::string> kernels;
  std::string heading;
  Json results = Json::array();
  std::vector<std::string> failures;
  {
    Progress progress("run", static_cast<int64_t>(items.size()));
    CatchInterrupt();
    for (const ModelItem& item : items) {
      if (Interrupted()) break;
      const RopeCase& c = item.test_case;
      const std::string label = ModelLabel(*item.model, c);
      const std::string what = fmt::format("{}, {}", label, Counted(c.tokens, "token"));
      progress.Step(what);
      bench::TimedCase timed;
      const Status status = bench::TimeCase(c, timing, &timed, place);
      if (!status.ok()) {
        timed.held = false;
        timed.message = status.text();
      }
      if (!timed.held) failures.push_back(what + ": " + timed.message);
      results.push_back(ToJson(item, timed));
      const std::string part = c.rotary_dim == c.head_dim ? "" : fmt::format("{} of ", c.rotary_dim);
      std::string shared =
          fmt::format("{}: {}/{} heads, {}{}, {}", label, c.q_heads, c.k_heads, part, c.head_dim, bench::OpName(c));
      if (shared != heading) lines.push_back(heading = std::move(shared));
      if (!timed.held) {
        lines.push_back(fmt::format("{:>10}  {}", c.tokens, Checked(timed)));
        continue;
      }
      kernels.insert(timed.kernel);
      lines.push_back(fmt::format("{:>10}  {:>10.2f}  {:>7.1f}  {:>8.2f}{}  {}", c.tokens, timed.time.ours * 1e6,
                                  timed.gigabytes_per_second(), timed.time.of_floor, timed.time.noisy ? '~' : ' ',
                                  Checked(timed)));
    }
  }
  const bool held = failures.empty();
  const auto end = [&] {
    return EndOf(held, static_cast<int64_t>(results.size()), static_cast<int64_t>(items.size()));
  };
  if (options.json) {
    const Json out = {{"version", ropewalk_version()},
                      {"device", place.device()},
                      {"driver", place.driver()},
                      {"cpu", bench::CpuName()},
                      {"threads", threads ? Json(threads) : Json()},
                      {"held", held},
                      {"asked", items.size()},
                      {"results", results}};
    fmt::print("{}\n", out.dump(2));
    return end();
  }
  fmt::print("{:>10}  {:>10}  {:>7}  {:>8}   {}\n", "tokens", "us", "GB/s", "of floor", "checked");
  for (const std::string& line : lines) fmt::print("{}\n", line);
  double load = 0;
  getloadavg(&load, 1);
  fmt::print("\n{}{}, {}; load {:.1f}.\n", DeviceText(place), ThreadsText(threads), options.dtype, load);
  PrintNote(
      "checked:",
      "largest error, in units of the tolerance, against the double-precision reference; the rounding to the dtype is "
      "within it, so that 16-bit dtypes come near 1.");
  PrintNote("of floor:",
            fmt::format("our time over that of an in-place read-modify-write of the same bytes in the same run; at few "
                        "tokens, which lie in the caches, the arithmetic and the call itself show. The floor is {}. ~: "
                        "noisy, as the middle half of the measurements lies further apart than by a quarter.",
                        place.FloorText()));
  PrintNote("kernels:", fmt::format("{}", fmt::join(kernels, ", ")));
  fmt::print("\n");
  for (const std::string& failure : failures) fmt::print("{}  {}\n", Verdict(false), failure);
  fmt::print("{}: {} of {}\n", Verdict(held), Counted(static_cast<int64_t>(results.size()), "shape"),
             Counted(static_cast<int64_t>(models.size()), "model"));
  return end();
}

}  // namespace

void AddRun(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command = app->add_subcommand("run", "real models' shapes: checked, timed against the floor, explained");
  AddModelOption(command, &options->models);
  AddDtypeOption(command, &options->dtype);
  command->add_option("--tokens", options->tokens, "tokens in a call (default: 1, 64 and up to 2048)")
      ->delimiter(',')
      ->check(Whole(1, kMostTokens));
  command->add_option("--threads", options->threads, "threads of the CPU (default: 1)")->check(Whole(1, 1024));
  command->add_option("--seconds", options->seconds, "of timing for each line (default: about 20 in all)")
      ->check(Above0());
  AddPlaceOption(command, &options->backend);
  command->add_flag("--json", options->json, "print JSON");
  command->footer(
      "Examples:\n"
      "  ropewalk run                                   all that come with Ropewalk\n"
      "  ropewalk run --model qwen3-8b --tokens 1,4096  one of them, at your sizes\n"
      "  ropewalk run --model path/to/config.json       yours\n"
      "  ropewalk run --backend cuda                    on the first NVIDIA GPU\n\n"
      "Exit code 0 only if every result is within the tolerance of the reference.");
  command->callback([options, exit_code] { *exit_code = Run(*options); });
}

}  // namespace ropewalk::cli
