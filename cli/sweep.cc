// ropewalk bench --sweep: what head sizes and rotated parts of every kind cost on the CPU beside 128 of 128.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "base/tensor.h"
#include "cli/model_cases.h"
#include "measure/place.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

// The most that a shape may cost: its time of a byte over that of 128 of 128.
constexpr double kAim = 1.3;
constexpr int64_t kHeads = 32;  // of q, and as many of k

struct Part {
  int64_t head_dim, rotary_dim, rotary_offset;
};

// Whole heads, halves and quarters of heads of many sizes; then parts of real models and odd ones.
std::vector<Part> Parts() {
  std::vector<Part> parts;
  for (const int64_t head_dim : {32, 40, 48, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256}) {
    parts.push_back({head_dim, head_dim, 0});
    parts.push_back({head_dim, head_dim / 2, 0});
    parts.push_back({head_dim, head_dim / 4, 0});
  }
  for (const Part part : {Part{80, 32, 0},
                          {192, 64, 128},
                          {576, 64, 512},
                          {96, 24, 72},
                          {80, 20, 60},
                          {128, 96, 0},
                          {128, 32, 96},
                          {256, 64, 192},
                          {34, 34, 0},
                          {50, 50, 0},
                          {70, 70, 0},
                          {98, 98, 0},
                          {100, 100, 0},
                          {130, 130, 0},
                          {160, 70, 0},
                          {128, 126, 1},
                          {512, 512, 0}}) {
    parts.push_back(part);
  }
  std::erase_if(parts, [](const Part& part) { return part.rotary_dim % 2 != 0; });
  return parts;
}

RopeCase CaseOf(const Part& part, int64_t tokens, uint32_t dtype, bool norm, int32_t pairing, Angles angles) {
  RopeCase c = bench::ShapeCase(tokens, kHeads, kHeads, part.head_dim, dtype);
  c.rotary_dim = part.rotary_dim;
  c.rotary_offset = part.rotary_offset;
  c.angles = angles;
  bench::SetVariant(norm, pairing, &c);
  return c;
}

// A call in place, checked, ready to be repeated.
struct Ready {
  std::unique_ptr<CaseCall> call;
  int64_t bytes = 0;  // that it must read
  std::string kernel;
};

Status MakeReady(const RopeCase& c, Ready* out) {
  bench::TimingOptions check;
  check.seconds = 0;
  check.full_check = int64_t{1} << 16;
  check.sampled_tokens = 4;
  bench::TimedCase checked;
  ROPEWALK_TRY(bench::TimeCase(c, check, &checked));
  if (!checked.held) return Status::Internal(checked.message);
  out->kernel = checked.kernel;
  ROPEWALK_TRY(CaseCall::Make(c, HostMemory(), &out->call));
  ROPEWALK_TRY(bench::SteadyWeights(*out->call));
  for (const auto& region : bench::RegionsOf(out->call->args(), bench::RotaryDim(*out->call))) {
    out->bytes += region.total();
  }
  return out->call->Reset();
}

// Cache lines, for each head, that hold what must be read and written of heads that lie one after the other.
double LinesOfHead(const RopeCase& c) {
  constexpr int64_t kLine = 64;
  const auto element = DtypeBytes(c.dtype);
  const int64_t first = c.norm ? 0 : c.rotary_offset, length = c.norm ? c.head_dim : c.rotary_dim;
  int64_t lines = 0, last = -1;
  for (int64_t head = 0; head < c.q_heads; ++head) {
    const int64_t begin = (head * c.head_dim + first) * element, end = begin + length * element;
    const int64_t to = (end - 1) / kLine;
    lines += to - std::max(last, begin / kLine - 1);
    last = to;
  }
  return static_cast<double>(lines) / static_cast<double>(c.q_heads);
}

std::string PartText(const RopeCase& c) {
  std::string text = fmt::format("{} of {}", c.rotary_dim, c.head_dim);
  if (c.rotary_offset) text += fmt::format(" at {}", c.rotary_offset);
  return text;
}

struct Line {
  RopeCase test_case;
  double us = 0;
  double ratio = 0, line_ratio = 0;  // of the time of a byte, of a cache line
  double whole_us = 0;               // of 128 of 128
};

Json ToJson(const Line& line) {
  const RopeCase& c = line.test_case;
  return {{"head_dim", c.head_dim},
          {"rotary_dim", c.rotary_dim},
          {"rotary_offset", c.rotary_offset},
          {"dtype", ShortDtype(c.dtype)},
          {"op", c.norm ? "norm+rope" : "rope"},
          {"pairing", c.pairing == ROPEWALK_NEOX ? "neox" : "interleaved"},
          {"angles", c.angles == Angles::kFrequencies ? "frequencies" : "table"},
          {"tokens", c.tokens},
          {"q_heads", c.q_heads},
          {"k_heads", c.k_heads},
          {"us", line.us},
          {"us_128_of_128", line.whole_us},
          {"ratio", line.ratio},
          {"line_ratio", line.line_ratio}};
}

}  // namespace

int Sweep(const SweepOptions& options) {
  const std::vector<Part> parts = Parts();
  const bench::Team team(1);
  const Json machine = MachineOf(bench::HostPlace());
  std::vector<Line> lines;
  std::vector<std::string> failures, kernels;
  const auto asked =
      static_cast<int64_t>(options.dtypes.size() * options.pairings.size() * options.ops.size() * 2 * parts.size());
  Progress progress("sweep", asked);
  CatchInterrupt();
  for (const std::string& dtype_name : options.dtypes) {
    const uint32_t dtype = ParseDtype(dtype_name);
    const int64_t tokens = options.tokens ? options.tokens : dtype == kF32 ? 32 : 64;
    for (const std::string& op : options.ops) {
      for (const std::string& pairing_name : options.pairings) {
        const int32_t pairing = pairing_name == "neox" ? ROPEWALK_NEOX : ROPEWALK_INTERLEAVED;
        for (const Angles angles : {Angles::kFrequencies, Angles::kTable}) {
          if (Interrupted()) break;
          const bool norm = op == "norm+rope";
          Ready whole;
          const RopeCase whole_case = CaseOf({128, 128, 0}, tokens, dtype, norm, pairing, angles);
          if (const Status status = MakeReady(whole_case, &whole); !status.ok()) throw Failure(status.text(), kNotHeld);
          if (std::ranges::find(kernels, whole.kernel) == kernels.end()) kernels.push_back(whole.kernel);
          for (const Part& part : parts) {
            if (Interrupted()) break;
            Line line{.test_case = CaseOf(part, tokens, dtype, norm, pairing, angles)};
            const RopeCase& c = line.test_case;
            const std::string what = fmt::format("{}, {} {}", PartText(c), bench::OpName(c), ShortDtype(dtype));
            progress.Step(what);
            Ready ready;
            int failed = 0;
            Status status = MakeReady(c, &ready);
            if (status.ok()) {
              const bench::Paired time =
                  bench::MeasurePaired([&] { failed |= ropewalk_rope(&ready.call->args(), nullptr); },
                                       [&] { failed |= ropewalk_rope(&whole.call->args(), nullptr); },
                                       [&] { failed |= ready.call->Reset().code() | whole.call->Reset().code(); },
                                       options.seconds, bench::CallsBeforeReset(c));
              line.us = time.ours * 1e6;
              line.whole_us = time.floor * 1e6;
              line.ratio =
                  time.ours / static_cast<double>(ready.bytes) / (time.floor / static_cast<double>(whole.bytes));
              line.line_ratio = time.ours / time.floor * LinesOfHead(whole_case) / LinesOfHead(c);
              if (failed) status = Status::Internal(ropewalk_last_error());
            }
            if (!status.ok()) failures.push_back(what + ": " + status.text());
            lines.push_back(std::move(line));
          }
        }
      }
    }
  }
  std::ranges::stable_sort(lines, [](const Line& a, const Line& b) { return a.ratio > b.ratio; });

  Json results = Json::array();
  Table table({"part", "type", "op", "angles", ">us", ">ratio", ">line"});
  int64_t above = 0, lines_above = 0;
  for (const Line& line : lines) {
    const RopeCase& c = line.test_case;
    above += line.ratio > kAim;
    lines_above += line.line_ratio > kAim;
    results.push_back(ToJson(line));
    table.Add({PartText(c), ShortDtype(c.dtype), bench::OpName(c),
               c.angles == Angles::kFrequencies ? "frequencies" : "table", fmt::format("{:.2f}", line.us),
               fmt::format("{:.2f}", line.ratio), fmt::format("{:.2f}", line.line_ratio)});
  }
  const bool held = failures.empty() && !lines.empty();
  if (!options.json.empty()) {
    const Json head = {
        {"version", ropewalk_version()}, {"machine", machine}, {"kernels", kernels}, {"aim", kAim}, {"above", above},
        {"lines_above", lines_above},    {"asked", asked},     {"held", held}};
    // A result a line: there are more than a thousand.
    std::string text = head.dump(1);
    text.resize(text.rfind('\n'));
    text += ",\n \"results\": [";
    for (size_t i = 0; i < results.size(); ++i) text += (i ? ",\n  " : "\n  ") + results[i].dump();
    WriteText(options.json, text + "\n ]\n}\n");
  }
  if (!options.csv.empty() && !results.empty()) WriteText(options.csv, Csv(results));
  if (options.json != "-" && options.csv != "-") {
    table.Print();
    fmt::print("\n{}; load {:.1f}.\nOne thread, {}/{} heads, {} tokens, in place. Each result was checked first.\n",
               machine["cpu"].get<std::string>(), machine["load_before"].get<double>(), kHeads, kHeads,
               lines.empty() ? 0 : lines[0].test_case.tokens);
    PrintNote("ratio:", fmt::format("the time of a byte that must be read and written (the rotated part, with the norm "
                                    "whole heads) over that of 128 of 128, medians of calls taken in turns. {} of {} "
                                    "are above {}.",
                                    above, lines.size(), kAim));
    PrintNote("line:", fmt::format("the same of a cache line of 64 bytes that holds such bytes: a small part of a head "
                                   "costs its whole line. {} of {} are above {}.",
                                   lines_above, lines.size(), kAim));
  }
  for (const std::string& failure : failures) fmt::print(stderr, "{}  {}\n", Verdict(false), failure);
  return EndOf(held, static_cast<int64_t>(lines.size()), asked);
}

}  // namespace ropewalk::cli
