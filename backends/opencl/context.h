// What Ropewalk keeps for a device in an OpenCL context: the caller's, which their queue brings, or one of ours.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "backends/opencl/build.h"
#include "backends/opencl/library.h"
#include "backends/spirv/context.h"
#include "backends/spirv/plan.h"
#include "base/status.h"

namespace ropewalk {

class OpenClContext final : public SpirvContext {
 public:
  OpenClContext(const OpenClLibrary& library_, const OpenClDevice& device_, cl::Context handle_, std::string name,
                bool ours_);

  const OpenClLibrary& library;
  const OpenClDevice device;
  const cl::Context handle;  // retained for good, so that it stays what it is
  const bool ours;
  OpenClContext* next = nullptr;

  // Sets the arguments and enqueues; the kernel's lock is taken here. `queue` is one of this context and device. After
  // the event `before`, if there is one; `done`, if given, gets the launch's own, which the caller releases.
  Status Launch(SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args, cl::Queue queue,
                cl::Event before = nullptr, cl::Event* done = nullptr);
  // A queue of ours, in order.
  Status OwnQueue(cl::Queue* queue);

 protected:
  Status Build(const RopeSpirvKey& key, SpirvKernel* kernel) override;
  Status Allocate(size_t bytes, void** out) override;
  Status CopyIn(void* to, const void* from, size_t bytes) override;
  Status CopyOut(void* to, const void* from, size_t bytes) override;
  Status Wait() override;

 private:
  // The extension's functions, as far as the device has them.
  struct Usm {
    cl::Int (*set_kernel_arg)(cl::Kernel, cl::Uint, const void*) = nullptr;
    void* (*allocate)(cl::Context, cl::Device, const cl::Bits*, size_t, cl::Uint, cl::Int*) = nullptr;
    cl::Int (*copy)(cl::Queue, cl::Uint, void*, const void*, size_t, cl::Uint, const cl::Event*, cl::Event*) = nullptr;
  };

  Status Copy(void* to, const void* from, size_t bytes);
  Status Remember(cl::Queue queue);

  Usm usm_;
  std::mutex queues_mutex_;
  std::atomic<cl::Queue> own_queue_{nullptr};
  std::atomic<cl::Queue> last_queue_{nullptr};
  std::vector<cl::Queue> queues_;  // launched on since the last Wait(); retained
};

// The context of the device, ours or the queue's. `place` is that of the device in library.devices.
Status FindOpenClContext(const OpenClLibrary& library, size_t place, cl::Queue queue, OpenClContext** out);
// All that have been met so far.
void ForEachOpenClContext(const std::function<void(OpenClContext*)>& visit);

}  // namespace ropewalk
