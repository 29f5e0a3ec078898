// Google Benchmark: the shapes of `ropewalk bench` with their bytes declared, the floor beside each, and what a call
// costs when there is next to nothing to do.
// SPDX-License-Identifier: Apache-2.0
#include <benchmark/benchmark.h>

#include <memory>
#include <string>

#include "base/text.h"
#include "measure/floor.h"
#include "measure/place.h"
#include "measure/timed_case.h"
#include "rope/call.h"

namespace ropewalk::bench {
namespace {

struct Prepared {
  std::unique_ptr<CaseCall> call;
  std::string error;
};

// The case, ready to run and known to be right.
Prepared Prepare(const RopeCase& c, int threads) {
  Prepared out;
  TimingOptions check;
  check.threads = threads;
  check.seconds = 0;
  check.full_check = int64_t{1} << 20;
  TimedCase timed;
  if (const Status status = TimeCase(c, check, &timed); !status.ok()) {
    out.error = status.text();
  } else if (!timed.held) {
    out.error = timed.message;
  } else if (const Status made = CaseCall::Make(c, HostMemory(), &out.call); !made.ok()) {
    out.error = made.text();
  } else if (const Status steady = SteadyWeights(*out.call); !steady.ok()) {
    out.error = steady.text();
  }
  return out;
}

void TimeRope(benchmark::State& state, const RopeCase& c, int threads) {
  Prepared prepared = Prepare(c, threads);
  if (!prepared.error.empty()) return state.SkipWithError(prepared.error.c_str());
  const Team team(threads);
  const ropewalk_rope_args& args = prepared.call->args();
  const int64_t before_reset = CallsBeforeReset(c);
  int64_t calls = 0;
  for (auto _ : state) {
    if (++calls % before_reset == 0) {
      state.PauseTiming();
      if (!prepared.call->Reset().ok()) state.SkipWithError("reset failed");
      state.ResumeTiming();
    }
    if (ropewalk_rope(&args, nullptr) != ROPEWALK_OK) state.SkipWithError(ropewalk_last_error());
  }
  state.SetBytesProcessed(state.iterations() * 2 * BytesOf(c));
}

void TimeFloor(benchmark::State& state, const RopeCase& c, int threads) {
  std::unique_ptr<CaseCall> call;
  if (const Status status = CaseCall::Make(c, HostMemory(), &call); !status.ok()) {
    return state.SkipWithError(status.text().c_str());
  }
  const Team team(threads);
  Floor floor(RegionsOf(call->args(), c.rotary_dim), team.parallel_for());
  floor.Tune();
  state.SetLabel(FloorShapeName(floor.shape()));
  for (auto _ : state) {
    floor.Run();
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * floor.bytes());
}

// The whole cost of ropewalk_rope: arguments checked, lowered, dispatched, one head rotated.
void TimeCall(benchmark::State& state, const RopeCase& c) { TimeRope(state, c, 1); }

// The checks alone: what lower() costs, with nothing launched.
void TimeChecks(benchmark::State& state, const RopeCase& c) {
  std::unique_ptr<CaseCall> call;
  if (const Status status = CaseCall::Make(c, HostMemory(), &call); !status.ok()) {
    return state.SkipWithError(status.text().c_str());
  }
  for (auto _ : state) {
    RopeCall lowered;
    if (!LowerRope(call->args(), nullptr, &lowered).ok()) state.SkipWithError("refused");
    benchmark::DoNotOptimize(lowered);
  }
}

void RegisterCalls() {
  RopeCase c = ShapeCase(1, 1, 0, 128, kBF16);
  benchmark::RegisterBenchmark("call/q", TimeCall, c);
  benchmark::RegisterBenchmark("checks/q", TimeChecks, c);
  c.k_heads = 1;
  Complete(&c);
  benchmark::RegisterBenchmark("call/q,k", TimeCall, c);
  benchmark::RegisterBenchmark("checks/q,k", TimeChecks, c);
  SetVariant(true, ROPEWALK_NEOX, &c);
  benchmark::RegisterBenchmark("call/q,k,norm", TimeCall, c);
  benchmark::RegisterBenchmark("checks/q,k,norm", TimeChecks, c);
  c.cache = Cache::kNhd;
  Complete(&c);
  benchmark::RegisterBenchmark("call/q,k,norm,store", TimeCall, c);
  benchmark::RegisterBenchmark("checks/q,k,norm,store", TimeChecks, c);
}

void RegisterShapes() {
  struct NamedDtype {
    const char* name;
    uint32_t dtype;
  };
  for (const NamedDtype dtype : {NamedDtype{"bf16", kBF16}, NamedDtype{"f16", kF16}, NamedDtype{"f32", kF32}}) {
    std::vector<int64_t> sizes = TokensByCache(dtype.dtype);
    sizes.insert(sizes.begin(), 1);
    for (const int64_t tokens : sizes) {
      for (const int threads : {1, 2}) {
        RopeCase c = ShapeCase(tokens, 32, 8, 128, dtype.dtype);
        const std::string tail =
            Text("/32,8x128/", dtype.name, "/tokens:", tokens, "/", MemoryOf(BytesOf(c)), "/threads:", threads);
        benchmark::RegisterBenchmark(("floor" + tail).c_str(), TimeFloor, c, threads)->UseRealTime();
        for (const bool norm : {false, true}) {
          for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
            SetVariant(norm, pairing, &c);
            const std::string name =
                Text(norm ? "norm+rope" : "rope", pairing == ROPEWALK_NEOX ? "/neox" : "/interleaved", tail);
            benchmark::RegisterBenchmark(name.c_str(), TimeRope, c, threads)->UseRealTime();
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace ropewalk::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("cpu", ropewalk::bench::CpuName());
  benchmark::AddCustomContext("ropewalk", ropewalk_version());
  ropewalk::bench::RegisterCalls();
  ropewalk::bench::RegisterShapes();
  const size_t ran = benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return ran > 0 ? 0 : 1;
}
