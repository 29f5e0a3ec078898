// CUDA graphs of many calls and how long they take, through functions of libcuda that only benchmarks call.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "backends/cuda/driver.h"
#include "base/status.h"

namespace ropewalk {

namespace cu {

using Graph = struct GraphTag*;
using GraphExec = struct GraphExecTag*;
using Event = struct EventTag*;
enum { kL2CacheBytes = 38 };  // of a device
enum { kCaptureModeThreadLocal = 1 };

}  // namespace cu

namespace bench {

using CudaGraph = std::shared_ptr<cu::GraphExecTag>;

// A stream of the context that is current, which must stay so.
class CudaGraphs {
 public:
  static Status Open(const CudaDriver& driver, std::unique_ptr<CudaGraphs>* out);
  ~CudaGraphs();
  CudaGraphs(const CudaGraphs&) = delete;
  CudaGraphs& operator=(const CudaGraphs&) = delete;

  cu::Stream stream() const { return stream_; }
  // What `body` puts on the stream, instead of doing it.
  Status Capture(const std::function<Status()>& body, CudaGraph* graph);
  // Seconds of a replay that is queued behind another one.
  Status Replay(const CudaGraph& graph, double* seconds);
  // From device memory to device memory, in the stream's order.
  Status Copy(void* to, const void* from, size_t bytes);
  Status Wait();

 private:
  struct Functions;
  explicit CudaGraphs(const CudaDriver& driver) : driver_(driver) {}

  const CudaDriver& driver_;
  std::shared_ptr<const Functions> functions_;
  cu::Stream stream_ = nullptr;
  cu::Event begin_ = nullptr, end_ = nullptr;
};

}  // namespace bench
}  // namespace ropewalk
