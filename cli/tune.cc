// ropewalk tune: the fastest shapes of the CUDA kernel for models or shapes, searched on this machine's GPU.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "backends/cuda/shapes.h"
#include "backends/cuda/tuned.h"
#include "cli/common.h"
#include "cli/model_cases.h"
#include "measure/cuda_tune.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

struct TuneOptions {
  std::vector<std::string> models, shapes;
  std::vector<int64_t> tokens;
  std::string dtype = "bf16", json;
  std::vector<std::string> pairings = {"neox"};
  std::vector<std::string> ops = {"rope", "norm+rope", "norm+rope+store", "norm+rope+store:fp8"};
  std::vector<std::string> angles = {"frequencies", "table"};
  double seconds = 0;
  bool all = false, dry_run = false, near = false;
};

// A shape with every op, pairing and angle source asked for.
void AddVariants(const TuneOptions& options, const RopeCase& c, std::vector<RopeCase>* cases) {
  for (const std::string& op : options.ops) {
    for (const std::string& pairing : options.pairings) {
      for (const std::string& angles : options.angles) {
        const bool stores = op.find("store") != std::string::npos;
        if (stores && (c.k_heads == 0 || (angles == "table" && options.angles.size() > 1))) continue;
        RopeCase one = c;
        one.layout = Layout::kPacked;
        one.norm = op.starts_with("norm");
        one.weight = one.norm ? Weight::kPlain : Weight::kNone;
        one.pairing = pairing == "neox" ? ROPEWALK_NEOX : ROPEWALK_INTERLEAVED;
        one.angles = angles == "table" ? Angles::kPacked : Angles::kFrequencies;
        if (stores) {
          one.cache = Cache::kNhd;
          one.cache_dtype = op.find(":fp8") != std::string::npos ? static_cast<uint32_t>(kE4M3) : 0;
          one.k_store_only = op.ends_with(":k-only");
        }
        bench::Complete(&one);
        cases->push_back(one);
      }
    }
  }
}

std::vector<RopeCase> Cases(const TuneOptions& options) {
  std::vector<int64_t> tokens = options.tokens;
  std::vector<RopeCase> cases;
  const uint32_t dtype = ParseDtype(options.dtype);
  std::vector<RopeCase> bases;
  for (const std::string& text : options.shapes) bases.push_back(ParseShape(text, dtype));
  for (const int64_t count : tokens.empty() ? std::vector<int64_t>{0} : tokens) {
    for (const RopeCase& base : bases) {
      RopeCase c = bench::ShapeCase(count ? count : base.tokens, base.q_heads, base.k_heads, base.head_dim, dtype);
      c.rotary_dim = base.rotary_dim;
      AddVariants(options, c, &cases);
    }
  }
  if (options.shapes.empty()) {
    if (tokens.empty()) tokens = {1, 8, 64, 256, 512, 1024, 2048, 4096};
    for (const Model& model : LoadModels(options.models)) {
      for (const int64_t count : tokens) {
        for (const RopeCase& base : ModelCases(model, count, dtype)) {
          cases.push_back(base);
          for (const uint32_t cache : {uint32_t{0}, static_cast<uint32_t>(kE4M3)}) {
            RopeCase stored = base;
            stored.cache = Cache::kNhd;
            stored.cache_dtype = cache;
            bench::Complete(&stored);
            if (base.k_heads > 0) cases.push_back(stored);
          }
        }
      }
    }
  }
  if (cases.empty()) throw Failure("--op: a store needs k heads, but no shape has any");
  for (RopeCase& c : cases) {  // as an engine's rows of q, k and v, and as bench/gpu_compare.py times them
    c.v_behind = c.layout == Layout::kPacked && c.cache == Cache::kNone;
    c.positions = Positions::kArange;
    bench::Complete(&c);
  }
  return cases;
}

std::string LayoutText(const RopeCudaShape& s) {
  return s.few ? fmt::format("few: {} elements, {} heads, {} warps{}", s.vector, s.in_flight, s.cut,
                             s.tokens > 1 ? fmt::format(", {} tokens", s.tokens) : "")
               : fmt::format("many: {} elements{}, {} stages, {} turns, {} tokens{}{}", s.vector,
                             s.flat ? fmt::format(" flat {}", s.flat) : "", s.in_flight, s.cut, s.tokens,
                             s.warp_tokens > 1 ? fmt::format(", {} a warp", s.warp_tokens) : "",
                             s.resident ? fmt::format(", {} resident", s.resident) : "");
}

std::string ShapeText(const RopeCudaShape& s) {
  constexpr const char* kStarts[] = {"", ", next at the end", ", next early", ", next at once"};
  return LayoutText(s) + (s.share > 1 ? fmt::format(", {} units a thread", s.share) : "") +
         kStarts[std::min<size_t>(s.start, 3)];
}

int Tune(const TuneOptions& options) {
  const std::vector<RopeCase> cases = Cases(options);
  std::unique_ptr<bench::CudaTuner> tuner;
  if (const Status status = bench::CudaTuner::Make(&tuner); !status.ok()) throw Failure(status.text());
  // By the case's place, as searches do not end in that order.
  struct Found {
    std::vector<std::string> row;
    std::string line;
    std::optional<RopeCudaTuned::Entry> kept;
  };
  std::map<size_t, Found> all_found;
  constexpr double kWorthKeeping = 1.02;  // less is noise
  std::vector<std::string> failures;
  double most = 1;
  size_t visited = 0, done = 0;
  const auto start = std::chrono::steady_clock::now();
  {
    Progress progress("tune", static_cast<int64_t>(cases.size()));
    CatchInterrupt();
    const auto visit = [&](const RopeCase& c, const Status& status, const bench::TunedCase& tuned) {
      progress.Step(c.name);
      ++visited;
      const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      const bool go_on = (options.seconds <= 0 || spent < options.seconds) && !Interrupted();
      if (!status.ok()) {
        failures.push_back(c.name + ": " + status.text());
        return go_on;
      }
      ++done;
      for (const bench::TriedShape& tried : tuned.tried) {
        if (!tried.wrong.empty()) failures.push_back(c.name + ", " + ShapeText(tried.shape) + ": " + tried.wrong);
      }
      if (tuned.tried.empty() || !tuned.tried[0].wrong.empty()) return go_on;
      const bench::TriedShape& best = tuned.tried[0];
      const double gain = tuned.before / best.seconds;
      Found& found = all_found[static_cast<size_t>(&c - cases.data())];
      if (gain > kWorthKeeping) found.kept = {FeaturesOf(tuned.call, tuner->device().properties), best.shape};
      most = std::max(most, gain);
      const std::string stages =
          fmt::format("{}{}{}{}", bench::OpName(c), c.angles == Angles::kFrequencies ? "" : " table",
                      c.cache == Cache::kNone ? ""
                      : c.cache_dtype & kFp8  ? " + fp8 store"
                                              : " + store",
                      c.k_store_only ? ", k only" : "");
      found.row = {fmt::format("{}/{}x{}", c.q_heads, c.k_heads, c.head_dim),
                   std::to_string(c.tokens),
                   stages,
                   fmt::format("{:.2f}", tuned.before * 1e6),
                   fmt::format("{:.2f}", best.seconds * 1e6),
                   fmt::format("{:.3f}", gain),
                   ShapeText(best.shape),
                   tuned.origin};
      Json tried = Json::array();
      for (const bench::TriedShape& one : tuned.tried) {
        if (!one.wrong.empty() || (!options.all && !one.compared)) continue;
        tried.push_back({one.shape.numbers(), std::round(one.seconds * 1e10) / 1e4});
      }
      found.line = Json{{"case", c.name},
                        {"tokens", c.tokens},
                        {"q_heads", c.q_heads},
                        {"k_heads", c.k_heads},
                        {"head_dim", c.head_dim},
                        {"rotary_dim", c.rotary_dim},
                        {"norm", c.norm},
                        {"table", c.angles != Angles::kFrequencies},
                        {"interleaved", c.pairing != ROPEWALK_NEOX},
                        {"cache", StoreKind(tuned.call.variant)},
                        {"before_us", tuned.before * 1e6},
                        {"before", tuned.before_shape.numbers()},
                        {"tried", tried}}
                       .dump() +
                   "\n";
      if (options.json.empty()) return go_on;
      std::string lines;
      for (const auto& [place, one] : all_found) lines += one.line;
      WriteText(options.json, lines);
      return go_on;
    };
    if (const Status status = tuner->Tune(cases, {.near = options.near}, visit); !status.ok())
      throw Failure(status.text());
  }
  Table table({"shape", ">tokens", "stages", ">before us", ">best us", ">gain", "plan", "before from"});
  std::vector<RopeCudaTuned::Entry> found;
  for (const auto& [place, one] : all_found) {
    table.Add(one.row);
    if (one.kept) found.push_back(*one.kept);
  }
  table.Print();
  fmt::print("\n{} of {} shapes searched; the most that one gained: {:.3f} times.\n", done, cases.size(), most);
  if (!found.empty() && !options.dry_run) {
    std::string path;
    const Status kept = KeepTunedShapes(tuner->device().name, tuner->driver().version, found, &path);
    if (!kept.ok()) throw Failure(kept.text(), kNotHeld);
    fmt::print("{} kept in {}: later processes take them (`ropewalk explain` says \"tuned here\").\n", found.size(),
               path);
  }
  for (const std::string& failure : failures) fmt::print(stderr, "{}  {}\n", Verdict(false), failure);
  return EndOf(failures.empty() && done > 0, static_cast<int64_t>(visited), static_cast<int64_t>(cases.size()));
}

}  // namespace

void AddTune(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<TuneOptions>();
  CLI::App* command = app->add_subcommand("tune", "searches the fastest CUDA kernels for models or shapes on this GPU");
  AddModelOption(command, &options->models);
  command->add_option("--shape", options->shapes, "a shape of your own instead of models; may be repeated")
      ->type_name("tokens,q_heads,k_heads,head_dim[,rotary_dim]")
      ->delimiter(';');
  command->add_option("--tokens", options->tokens, "tokens in a call (default: of models, 1 to 4096 in 8 steps)")
      ->delimiter(',')
      ->check(Above0());
  AddDtypeOption(command, &options->dtype);
  command->add_option("--pairing", options->pairings, "of shapes: neox, interleaved (default: neox)")
      ->delimiter(',')
      ->check(CLI::IsMember({"neox", "interleaved"}))
      ->type_name("PAIRING");
  std::vector<std::string> ops;
  for (const char* stores : {"", "+store", "+store:fp8", "+store:k-only", "+store:fp8:k-only"}) {
    for (const char* op : {"rope", "norm+rope"}) ops.push_back(std::string(op) + stores);
  }
  command
      ->add_option("--op", options->ops,
                   "of shapes: rope, norm+rope, either with +store or +store:fp8, and these with :k-only")
      ->delimiter(',')
      ->check(CLI::IsMember(ops))
      ->type_name("OP");
  command->add_option("--angles", options->angles, "of shapes: frequencies, table (default: both; stores: frequencies)")
      ->delimiter(',')
      ->check(CLI::IsMember({"frequencies", "table"}))
      ->type_name("SOURCE");
  command->add_option("--seconds", options->seconds, "begin no new search after so many; 0: search all")
      ->capture_default_str();
  command->add_option("--json", options->json, "write a line of JSON for each shape to this file")->type_name("FILE");
  command->add_flag("--all", options->all, "with all that were tried in the JSON, not only the best few");
  command->add_flag("--near", options->near,
                    "only shapes close to those chosen now, or by the model or rules: a third of the time");
  command->add_flag("--dry-run", options->dry_run, "keep nothing");
  command->footer(
      "Examples:\n"
      "  ropewalk tune --model qwen3-8b      a model's shapes at 1 to 4096 tokens\n"
      "  ropewalk tune --shape 512,28,4,128  one shape, every stage\n\n"
      "Each candidate's result is compared with the reference before it is timed. What\n"
      "gains 2 % or more is kept beside the compiled kernels, for this device, driver\n"
      "and version of Ropewalk.\n"
      "Exit code 0 only if every candidate was right.");
  command->callback([options, exit_code] { *exit_code = Tune(*options); });
}

}  // namespace ropewalk::cli
