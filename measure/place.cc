// SPDX-License-Identifier: Apache-2.0
#include "measure/place.h"

#include "backends/cpu/thread_pool.h"
#include "base/text.h"
#include "measure/floor.h"
#include "measure/timed_case.h"

namespace ropewalk::bench {
namespace {

class Host final : public Place {
 public:
  DeviceMemory& memory() const override { return HostMemory(); }
  std::string device() const override { return CpuName(); }
  std::string driver() const override { return ""; }
  bool threaded() const override { return true; }
  std::string FloorText() const override {
    return Text("the best of ", FloorShapes(), " kernels, on the same threads");
  }
  std::vector<int64_t> Tokens(uint32_t dtype) const override { return TokensByCache(dtype); }
  std::string MemoryOf(const RopeCase& c) const override { return bench::MemoryOf(BytesOf(c)); }

  Status Time(const TimingOptions& options, CaseCall& call, TimedCase* out) override {
    const Team team(options.threads);
    const ropewalk_rope_args& args = call.args();
    Floor floor(RegionsOf(args, RotaryDim(call)), team.parallel_for());
    ROPEWALK_TRY(call.Reset());
    floor.Tune();
    out->floor_shape = FloorShapeName(floor.shape());
    out->bytes = 2 * floor.bytes();
    int failed = 0;
    out->time =
        MeasurePaired([&] { failed |= ropewalk_rope(&args, nullptr); }, [&] { floor.Run(); },
                      [&] { failed |= call.Reset().code(); }, options.seconds, CallsBeforeReset(call.test_case()));
    if (!failed) return {};
    return Status::Internal(Text("case ", call.test_case().name, " fails when repeated: ", ropewalk_last_error()));
  }
};

}  // namespace

Team::Team(int threads) : parallel_for_(threads > 1 ? PoolParallelFor : nullptr) { ropewalk_set_threads(threads); }
Team::~Team() { ropewalk_set_threads(1); }

Place& HostPlace() {
  static Host host;
  return host;
}

Status PlaceOf(std::string_view backend, Place** out) {
  if (backend.substr(0, backend.find(':')) == "cuda") return CudaPlace(out);
  // Tensors of the CPU are timed: a device with memory of its own would need a floor of its own.
  if (backend == "intel" || (backend == "opencl" && !OpenClWorksOnHost())) {
    return Status::Unavailable(Text("backend must be cpu, cuda, or opencl where the device works on the CPU's memory, ",
                                    "to be timed, but is ", backend, "; ropewalk check --backend ", backend,
                                    " holds its results to the reference"));
  }
  *out = &HostPlace();
  return {};
}

}  // namespace ropewalk::bench
