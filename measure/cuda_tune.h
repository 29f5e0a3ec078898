// The search for the fastest shape of the CUDA kernel for a call, on the device at hand.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backends/cuda/driver.h"
#include "backends/cuda/plan.h"
#include "base/status.h"
#include "conformance/cases.h"
#include "conformance/memory.h"
#include "measure/cuda_graphs.h"

namespace ropewalk::bench {

struct TriedShape {
  RopeCudaShape shape;
  double seconds =
      0;  // of a call, the median; if compared, of the dtype of positions, 32 or 64 bits, that takes longer
  bool compared = false;  // in the last round, beside the shape that was chosen before
  std::string wrong;      // why it was not timed: its result differs from the reference
};

struct TunedCase {
  RopeCall call;      // lowered; its tensors are gone
  double before = 0;  // seconds with the shape that was chosen before
  RopeCudaShape before_shape;
  std::string origin;             // where that came from
  std::vector<TriedShape> tried;  // the fastest first
};

struct TuneOptions {
  int64_t sampled_tokens = 8;        // that a result is compared with the reference at
  int64_t cold_bytes = 800'000'000;  // of the buffers that calls go round where caches shall be cold
  bool near = false;                 // only shapes close to the chosen one, the model's and the rules'
};

class CudaTuner {
 public:
  static Status Make(std::unique_ptr<CudaTuner>* out);  // cuda:0
  // Searches the cases and calls visit(case, what went wrong, what was found): once for each, one call at a time, on
  // any thread, in the order in which searches end. Once it has returned false no search begins. A shape whose result
  // is wrong is told and never timed.
  Status Tune(std::span<const RopeCase> cases, const TuneOptions& options,
              const std::function<bool(const RopeCase&, const Status&, const TunedCase&)>& visit);

  const CudaDriver& driver() const { return driver_; }
  const CudaDeviceInfo& device() const { return driver_.devices.front(); }

 private:
  CudaTuner(const CudaDriver& driver, DeviceMemory& memory) : driver_(driver), memory_(memory) {}

  const CudaDriver& driver_;
  DeviceMemory& memory_;
  int64_t l2_bytes_ = 0;
};

}  // namespace ropewalk::bench
