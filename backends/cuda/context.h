// What Ropewalk keeps in a CUDA context: loaded kernels, the turns of frequencies, the record of faults. The context is
// the caller's current one if it is the device's, else the device's primary context, which stays retained.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "backends/cuda/cache.h"
#include "backends/cuda/driver.h"
#include "backends/cuda/plan.h"
#include "backends/kernel_table.h"
#include "base/status.h"

namespace ropewalk {

struct CudaKernel {
  RopeCudaKey key;
  cu::Function function = nullptr;
  std::string name;    // RopeCudaName
  std::string source;  // where its cubin came from
  int registers = 0, local_bytes = 0, shared_bytes = 0;
  mutable std::atomic<int64_t> launches{0};
  mutable std::atomic<uint32_t> alone{0};  // bit n - 1: the same variant for n blocks at once could not be had
};

class CudaContext {
 public:
  CudaContext(const CudaDriver& driver_, int ordinal_, cu::Context handle_, unsigned long long id_, bool primary_)
      : driver(driver_), ordinal(ordinal_), handle(handle_), id(id_), primary(primary_) {}
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  const CudaDriver& driver;
  const int ordinal;  // of the device
  const cu::Context handle;
  const unsigned long long id;  // unique, while a handle may be used again
  const bool primary;
  CudaContext* next = nullptr;        // in the list of its device
  std::atomic<bool> launched{false};  // since the last TakeFaults

  const CudaDeviceInfo& device() const { return driver.devices[static_cast<size_t>(ordinal)]; }
  bool Alive() const;  // its owner may have destroyed it

  // Lock-free, without allocation.
  const CudaKernel* FindKernel(const RopeCudaKey& key) const { return kernels_.Find(key); }
  // The device copy of turns and then axes; 0 if there is none yet. Copies stay as long as the context, so that
  // captured graphs may use them after the Frequencies are released; equal frequencies share one (512 bytes for
  // rotary_dim 128).
  cu::DevicePtr FindFrequencies(const ropewalk_frequencies& frequencies);
  // One of four records, so that the message can name what the kernel does not know. Valid once a kernel is found.
  rope_fault* Fault(bool batched, bool offsets) const {
    return reinterpret_cast<rope_fault*>(faults_ + sizeof(rope_fault) * (batched * 1u + offsets * 2u));
  }

  // This context must be current. May allocate and wait, even while another stream is being captured.
  Status LoadKernel(const RopeCudaKey& key);
  Status UploadFrequencies(const ropewalk_frequencies& frequencies);
  // Waits for the context's work; "" or the first fault since the last call.
  Status TakeFaults(std::string* text);
  void ForEachKernel(const std::function<void(const CudaKernel&)>& visit) const;

 private:
  Status Prepare();  // the stream and the faults
  Status Allocate(size_t bytes, cu::DevicePtr* out);
  Status CopyIn(cu::DevicePtr to, const void* from, size_t bytes);
  Status ResetFaults();

  mutable std::mutex mutex_;
  KernelTable<const CudaKernel> kernels_;
  FrequencyCopies<cu::DevicePtr> frequencies_;
  cu::Stream stream_ = nullptr;  // for our copies; takes no part in the legacy stream's order
  cu::DevicePtr slab_ = 0;       // what is left of the last allocation
  size_t slab_bytes_ = 0;
  cu::DevicePtr faults_ = 0;
};

// Makes a context of the device current for as long as it lives.
class CudaContextScope {
 public:
  CudaContextScope() = default;
  ~CudaContextScope();
  CudaContextScope(const CudaContextScope&) = delete;
  CudaContextScope& operator=(const CudaContextScope&) = delete;

  // The current one if it is the device's, else the primary one.
  Status Enter(const CudaDriver& driver, int ordinal);
  Status Enter(CudaContext* context);
  CudaContext* context() const { return context_; }

 private:
  CudaContext* context_ = nullptr;
  bool pushed_ = false;
};

// All that have been entered so far.
void ForEachCudaContext(const std::function<void(CudaContext*)>& visit);

}  // namespace ropewalk
