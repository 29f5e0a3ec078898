// How calls on a CUDA device are timed: by graphs of many calls, through functions of libcuda that only benchmarks
// call, on copies of what a call works on, for calls that follow each other to go round: so many that a cold L2 cache
// stays cold.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "backends/cuda/driver.h"
#include "base/status.h"
#include "measure/timed_case.h"

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

inline constexpr int64_t kColdTokens = 1024;  // from so many on the caches shall be cold

// Whether calls of the case shall find a cold L2 cache, and how many copies they go round.
bool RunsCold(const RopeCase& c, int64_t l2_bytes);
int64_t CopyCount(const RopeCase& c, int64_t l2_bytes, int64_t cold_bytes);

// Memory of a device that frees itself.
class Block {
 public:
  explicit Block(DeviceMemory& memory) : memory_(&memory) {}
  Block(Block&& other) noexcept : memory_(other.memory_), data_(std::exchange(other.data_, nullptr)) {}
  Block& operator=(Block&&) = delete;
  ~Block() {
    if (data_) memory_->Free(data_);
  }
  Status Allocate(size_t bytes) { return memory_->Allocate(bytes, &data_); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  DeviceMemory* memory_;
  void* data_ = nullptr;
};

class Copies {
 public:
  Copies(DeviceMemory& memory, CudaGraphs& graphs) : memory_(memory), graphs_(graphs) {}

  // So many copies of q, k, v and the caches, each as the first call finds it, and the arguments of calls on them.
  Status Make(CaseCall& call, int64_t count);
  // Puts the first data back, in the stream's order: of all copies, or of the first.
  Status Restore() { return Restore(/*all=*/true); }
  Status RestoreFirst() { return Restore(/*all=*/false); }

  struct Call {
    std::array<DLTensor, 5> tensors = {};
    ropewalk_rope_args args;
    std::vector<FloorRegion> regions;  // of q and k
  };
  const std::vector<Call>& calls() const { return calls_; }

  // Whether the first copy is what the floor makes of the first data.
  Status CheckFloor(bool* right);

 private:
  // What several tensors lie in, as in packed rows, is copied as one.
  struct Part {
    Part(Span on_device, Span on_host, DeviceMemory& memory)
        : device(on_device), host(on_host), block(memory), untouched(memory) {}
    Span device, host;
    Block block, untouched;
    size_t first = 0, stride = 0, bytes = 0;
  };

  void Add(Span device, Span host);
  void* At(size_t copy, const void* address) const;  // the place in a copy of an address in the call's own data
  Status Restore(bool all);

  DeviceMemory& memory_;
  CudaGraphs& graphs_;
  std::vector<Part> parts_;
  std::vector<Call> calls_;
};

}  // namespace bench
}  // namespace ropewalk
