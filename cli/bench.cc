// ropewalk bench: the operation against the floor of the same bytes, from the caches to DRAM; medians, GB/s, time over
// the floor.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <set>
#include <utility>

#include "cli/common.h"
#include "cli/model_cases.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

struct BenchOptions {
  std::vector<std::string> models, shapes;
  std::vector<int64_t> tokens;
  std::vector<std::string> dtypes = {"bf16", "f16", "f32"};
  std::vector<std::string> pairings = {"neox", "interleaved"};
  std::vector<std::string> ops = {"rope", "norm+rope"};
  std::vector<int32_t> threads;
  std::string backend, json, csv;
  double seconds = 0.4;
  bool sweep = false;
};

struct Item {
  std::string label;   // of the model, or of the shape
  std::string memory;  // where the data lies: "L2", "L3", "DRAM"
  RopeCase test_case;
  int32_t threads;  // 0: not a question here
};

// A shape with every op and pairing asked for.
void AddVariants(const BenchOptions& options, const bench::Place& place, RopeCase c, std::vector<Item>* items,
                 int32_t threads) {
  for (const std::string& op : options.ops) {
    for (const std::string& pairing : options.pairings) {
      bench::SetVariant(op == "norm+rope", pairing == "neox" ? ROPEWALK_NEOX : ROPEWALK_INTERLEAVED, &c);
      std::string label = fmt::format("{}/{}x{}", c.q_heads, c.k_heads, c.head_dim);
      if (c.rotary_dim != c.head_dim) label += fmt::format(", {} of it", c.rotary_dim);
      items->push_back({label, place.MemoryOf(c), c, threads});
    }
  }
}

std::vector<Item> Items(const BenchOptions& options, const bench::Place& place) {
  std::vector<Item> items;
  std::vector<int32_t> threads = options.threads;
  if (!place.threaded()) {
    RequireNoThreads(!threads.empty(), options.backend);
    threads = {0};
  } else if (threads.empty()) {
    threads = {1};
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 1) threads.push_back(2);
  }
  WarnOfThreads(*std::ranges::max_element(threads));
  const std::vector<Model> models = options.models.empty() ? std::vector<Model>() : LoadModels(options.models);
  for (const std::string& dtype_name : options.dtypes) {
    const uint32_t dtype = ParseDtype(dtype_name);
    for (const int32_t count : threads) {
      for (const Model& model : models) {
        const std::vector<int64_t> tokens = options.tokens.empty() ? std::vector<int64_t>{1, 64, 2048} : options.tokens;
        for (const int64_t number : tokens) {
          // Its own pairing and norm.
          for (const RopeCase& c : ModelCases(model, number, dtype)) {
            items.push_back({ModelLabel(model, c), place.MemoryOf(c), c, count});
          }
        }
      }
      for (const std::string& shape : options.shapes) {
        AddVariants(options, place, ParseShape(shape, dtype), &items, count);
      }
      if (models.empty() && options.shapes.empty()) {
        for (const int64_t number : options.tokens.empty() ? place.Tokens(dtype) : options.tokens) {
          AddVariants(options, place, bench::ShapeCase(number, 32, 8, 128, dtype), &items, count);
        }
      }
    }
  }
  return items;
}

Json ToJson(const Item& item, const bench::Place& place, const bench::TimedCase& timed) {
  const RopeCase& c = item.test_case;
  return {{"label", item.label},
          {"device", place.device()},
          {"memory", item.memory},
          {"op", c.norm ? "norm+rope" : "rope"},
          {"pairing", c.pairing == ROPEWALK_NEOX ? "neox" : "interleaved"},
          {"dtype", ShortDtype(c.dtype)},
          {"threads", item.threads ? Json(item.threads) : Json()},
          {"tokens", c.tokens},
          {"q_heads", c.q_heads},
          {"k_heads", c.k_heads},
          {"head_dim", c.head_dim},
          {"rotary_dim", c.rotary_dim},
          {"held", timed.held},
          {"message", timed.message},
          {"worst", timed.worst},
          {"checked_tokens", timed.checked_tokens},
          {"bytes", timed.bytes},
          {"us", timed.time.ours * 1e6},
          {"floor_us", timed.time.floor * 1e6},
          {"of_floor", timed.time.of_floor},
          {"noisy", timed.time.noisy},
          {"gb_per_s", timed.gigabytes_per_second()},
          {"pairs", timed.time.pairs},
          {"calls", timed.time.calls},
          {"floor_kernel", timed.floor_shape},
          {"backend", timed.backend},
          {"kernel", timed.kernel}};
}

}  // namespace

std::string Csv(const Json& results) {
  std::string out;
  std::vector<std::string> cells;
  for (const auto& [key, value] : results[0].items()) cells.push_back(key);
  out += CsvLine(cells);
  for (const Json& result : results) {
    cells.clear();
    for (const auto& [key, value] : result.items())
      cells.push_back(value.is_string() ? value.get<std::string>() : value.dump());
    out += CsvLine(cells);
  }
  return out;
}

Json MachineOf(const bench::Place& place) {
  const bench::Caches caches = bench::CacheSizes();
  double load[3] = {0, 0, 0};
  if (getloadavg(load, 3) < 1) load[0] = -1;
  const std::time_t now = std::time(nullptr);
  return {{"device", place.device()},
          {"driver", place.driver()},
          {"cpu", bench::CpuName()},
          {"cores", sysconf(_SC_NPROCESSORS_ONLN)},
          {"l1_bytes", caches.l1},
          {"l2_bytes", caches.l2},
          {"l3_bytes", caches.l3},
          {"load_before", load[0]},
          {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(now))}};
}

namespace {

int Bench(const BenchOptions& options) {
  if (options.sweep) {
    if (!options.models.empty() || !options.shapes.empty() || !options.threads.empty() || options.tokens.size() > 1) {
      throw Failure(
          "--sweep has shapes of its own and runs on one thread: it goes with one number of --tokens, and not "
          "with --model, --shape or --threads");
    }
    if (!options.backend.starts_with("cpu") && !options.backend.empty()) {
      throw Failure(fmt::format("--sweep is of the CPU's kernels, so --backend must be cpu or cpu:TARGET, but is {}",
                                options.backend));
    }
    PlaceOf(options.backend);
    return Sweep({.dtypes = options.dtypes,
                  .pairings = options.pairings,
                  .ops = options.ops,
                  .tokens = options.tokens.empty() ? 0 : options.tokens[0],
                  .seconds = options.seconds,
                  .json = options.json,
                  .csv = options.csv});
  }
  bench::Place& place = PlaceOf(options.backend);
  const std::vector<Item> items = Items(options, place);
  if (items.empty()) throw Failure("nothing to time", kNotHeld);
  const Json machine = MachineOf(place);
  // 80 columns: what lines share stands over them.
  std::vector<std::string> lines;
  std::set<std::string> kernels;
  std::string heading;
  Json results = Json::array();
  std::vector<std::string> failures;
  {
    Progress progress("bench", static_cast<int64_t>(items.size()));
    CatchInterrupt();
    for (const Item& item : items) {
      const RopeCase& c = item.test_case;
      const std::string what = fmt::format("{}, {} {}, {}{}", item.label, bench::OpName(c), ShortDtype(c.dtype),
                                           Counted(c.tokens, "token"), ThreadsText(item.threads));
      progress.Step(what);
      bench::TimingOptions timing;
      timing.threads = std::max(item.threads, 1);
      timing.seconds = options.seconds;
      timing.full_check = int64_t{1} << 20;
      bench::TimedCase timed;
      const Status status = bench::TimeCase(c, timing, &timed, place);
      if (!status.ok()) timed.message = status.text();
      timed.held = timed.held && status.ok();
      if (!timed.held) failures.push_back(what + ": " + timed.message);
      results.push_back(ToJson(item, place, timed));
      std::string shared = fmt::format("{}, {}{}", item.label, ShortDtype(c.dtype), ThreadsText(item.threads));
      if (shared != heading) lines.push_back(heading = std::move(shared));
      const std::string call = fmt::format("{:>8}  {:<4}  {:<21}", c.tokens, item.memory, bench::OpName(c));
      if (timed.held) {
        kernels.insert(timed.kernel);
        lines.push_back(fmt::format("{}  {:>9.2f}  {:>9.2f}  {:>7.1f}  {:>8.3f}{}", call, timed.time.floor * 1e6,
                                    timed.time.ours * 1e6, timed.gigabytes_per_second(), timed.time.of_floor,
                                    timed.time.noisy ? "~" : ""));
      } else {
        lines.push_back(fmt::format("{}  {}", call, Verdict(false)));
      }
      if (Interrupted()) break;
    }
  }
  const bool held = failures.empty();
  Json out = {{"version", ropewalk_version()},
              {"machine", machine},
              {"held", held},
              {"asked", items.size()},
              {"results", results}};
  if (!options.json.empty()) WriteText(options.json, out.dump(2) + "\n");
  if (!options.csv.empty()) WriteText(options.csv, Csv(results));
  if (options.json != "-" && options.csv != "-") {
    fmt::print("{:>8}  {:<4}  {:<21}  {:>9}  {:>9}  {:>7}  {:>8}\n", "tokens", "in", "op", "floor us", "us", "GB/s",
               "of floor");
    for (const std::string& line : lines) fmt::print("{}\n", line);
    fmt::print("\n{}; load {:.1f}.\nEach result was checked before it was timed.\n", DeviceText(place),
               machine["load_before"].get<double>());
    PrintNote("in:", "where the data lies.");
    PrintNote("of floor:", fmt::format("our time over that of an in-place read-modify-write of the same bytes, median "
                                       "of pairs taken in turns; {}. ~: noisy, the middle half of the pairs lies "
                                       "further apart than by a quarter.",
                                       place.FloorText()));
    PrintNote("GB/s:", "bytes read and written over our median.");
    PrintNote("kernels:", fmt::format("{}", fmt::join(kernels, ", ")));
  }
  for (const std::string& failure : failures) fmt::print(stderr, "{}  {}\n", Verdict(false), failure);
  return EndOf(held, static_cast<int64_t>(results.size()), static_cast<int64_t>(items.size()));
}

}  // namespace

void AddBench(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command =
      app->add_subcommand("bench", "ours against the floor of the same bytes: medians, GB/s, time over the floor");
  AddModelOption(command, &options->models);
  command->add_option("--shape", options->shapes, "a shape of your own; may be repeated")
      ->type_name("tokens,q_heads,k_heads,head_dim[,rotary_dim]")
      ->delimiter(';');
  command
      ->add_option("--tokens", options->tokens,
                   "tokens in a call (default: to fill L2, L3 and DRAM; on CUDA 1 to 4096)")
      ->delimiter(',')
      ->check(Whole(1, kMostTokens));
  command->add_option("--dtype", options->dtypes, "bf16, f16, f32 (default: all three)")
      ->delimiter(',')
      ->check(Dtypes())
      ->type_name("DTYPE");
  command->add_option("--pairing", options->pairings, "neox, interleaved (default: both)")
      ->delimiter(',')
      ->check(CLI::IsMember({"neox", "interleaved"}))
      ->type_name("PAIRING");
  command->add_option("--op", options->ops, "rope, norm+rope (default: both)")
      ->delimiter(',')
      ->check(CLI::IsMember({"rope", "norm+rope"}))
      ->type_name("OP");
  command->add_option("--threads", options->threads, "threads of the CPU (default: 1, and 2 where there are two cores)")
      ->delimiter(',')
      ->check(Whole(1, 1024));
  command->add_option("--seconds", options->seconds, "of timing for each line")->check(Above0())->capture_default_str();
  AddPlaceOption(command, &options->backend);
  command->add_flag("--sweep", options->sweep,
                    "head sizes and rotated parts of every kind on one thread of the CPU, each beside 128 of 128; the "
                    "worst first");
  command->add_option("--json", options->json, "write JSON to this file, or print it")
      ->expected(0, 1)
      ->default_str("-")
      ->type_name("[FILE]");
  command->add_option("--csv", options->csv, "write CSV to this file, or print it")
      ->expected(0, 1)
      ->default_str("-")
      ->type_name("[FILE]");
  command->footer(
      "Examples:\n"
      "  ropewalk bench                               32/8 heads of 128, L2 to DRAM\n"
      "  ropewalk bench --shape 4096,24,24,128        one shape\n"
      "  ropewalk bench --model qwen3-8b              a model's own pairing and norm\n"
      "  ropewalk bench --backend cuda --dtype bf16   on the first NVIDIA GPU\n"
      "  ropewalk bench --sweep --seconds 0.05        what other head sizes cost\n"
      "  ropewalk bench --json out.json --csv o.csv   for machines\n\n"
      "Exit code 0 only if every result was right; speed never fails.");
  command->callback([options, exit_code] { *exit_code = Bench(*options); });
}

}  // namespace ropewalk::cli
