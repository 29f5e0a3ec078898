// SPDX-License-Identifier: Apache-2.0
#include "backends/opencl/context.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "backends/contexts.h"
#include "base/fork.h"
#include "base/text.h"

namespace ropewalk {
namespace {

// A cl_kernel with the arguments that it holds: those that are the same again need not be set.
struct Held {
  cl::Kernel kernel = nullptr;
  bool complete = false;  // all have been set once
  RopeSpirvArgs args{};
};

}  // namespace

OpenClContext::OpenClContext(const OpenClLibrary& library_, const OpenClDevice& device_, cl::Context handle_,
                             std::string name, bool ours_)
    : SpirvContext(std::move(name), device_.properties),
      library(library_),
      device(device_),
      handle(handle_),
      ours(ours_) {
  if (!device.usm) return;
  const auto find = [&](auto* function, const char* symbol) {
    *function =
        reinterpret_cast<std::remove_pointer_t<decltype(function)>>(library.GetExtension(device.platform, symbol));
  };
  find(&usm_.set_kernel_arg, "clSetKernelArgMemPointerINTEL");
  find(&usm_.allocate, "clDeviceMemAllocINTEL");
  find(&usm_.copy, "clEnqueueMemcpyINTEL");
  if (!usm_.set_kernel_arg || !usm_.allocate || !usm_.copy) usm_ = {};
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch

Status OpenClContext::Launch(SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args, cl::Queue queue,
                             cl::Event before, cl::Event* done) {
  auto& held = *static_cast<Held*>(kernel->function);
  const std::lock_guard lock(kernel->mutex);
  const bool complete = held.complete;
  held.complete = false;
  for (cl::Uint i = 0; i < args.count; ++i) {
    const void* pointer = args.pointers[i];
    // Drivers bind the allocation at the address, which may be another by now; only what is null or ours stays.
    if (complete && pointer == held.args.pointers[i] && (!pointer || i >= args.ours)) continue;
    const cl::Int result = pointer && usm_.set_kernel_arg && !device.system_memory
                               ? usm_.set_kernel_arg(held.kernel, i, pointer)
                               : library.SetKernelArgSvmPointer(held.kernel, i, pointer);
    if (result != cl::kSuccess) {
      return Status::Invalid(Text("rope: ", i < args.ours ? args.names[i] : "memory of ours", " is said to be on ",
                                  device_name, ", but ",
                                  library.Check(result, "clSetKernelArgSVMPointer").text().substr(6),
                                  ": its data must be a pointer to SVM or USM of the context of the queue"));
    }
    held.args.pointers[i] = pointer;
  }
  if (!complete || std::memcmp(args.data(), held.args.data(), args.bytes) != 0) {
    ROPEWALK_TRY(
        library.Check(library.SetKernelArg(held.kernel, args.count, args.bytes, args.data()), "clSetKernelArg"));
    std::memcpy(&held.args.params, args.data(), args.bytes);
  }
  held.complete = true;
  const size_t global[3] = {size_t{grid.groups[0]} * grid.local, grid.groups[1], grid.groups[2]};
  const size_t local[3] = {grid.local, 1, 1};
  ROPEWALK_TRY(library.Check(library.EnqueueNdRange(queue, held.kernel, 3, nullptr, global, local, before ? 1 : 0,
                                                    before ? &before : nullptr, done),
                             "clEnqueueNDRangeKernel", " on ", device_name));
  if (last_queue_.load(std::memory_order_relaxed) != queue) ROPEWALK_TRY(Remember(queue));
  CountLaunch(this, kernel);
  return {};
}

Status OpenClContext::Remember(cl::Queue queue) {
  const std::lock_guard lock(queues_mutex_);
  if (std::ranges::find(queues_, queue) == queues_.end()) {
    ROPEWALK_TRY(library.Check(library.RetainCommandQueue(queue), "clRetainCommandQueue"));
    queues_.push_back(queue);
  }
  last_queue_.store(queue, std::memory_order_relaxed);
  return {};
}

Status OpenClContext::OwnQueue(cl::Queue* queue) {
  *queue = own_queue_.load(std::memory_order_acquire);
  if (*queue) return {};
  const std::lock_guard lock(queues_mutex_);
  *queue = own_queue_.load(std::memory_order_relaxed);
  if (*queue) return {};
  cl::Int result = cl::kSuccess;
  *queue = library.CreateQueue(handle, device.handle, nullptr, &result);
  ROPEWALK_TRY(library.Check(result, "clCreateCommandQueueWithProperties", " on ", device_name));
  own_queue_.store(*queue, std::memory_order_release);
  return {};
}

Status OpenClContext::Wait() {
  std::vector<cl::Queue> queues;
  {
    const std::lock_guard lock(queues_mutex_);
    queues.swap(queues_);
    last_queue_.store(nullptr, std::memory_order_relaxed);
  }
  Status status;
  for (const cl::Queue queue : queues) {
    const cl::Int result = library.Finish(queue);
    library.ReleaseCommandQueue(queue);
    if (status.ok()) status = library.Check(result, "clFinish", " on ", device_name);
  }
  return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels and memory

Status OpenClContext::Build(const RopeSpirvKey& key, SpirvKernel* kernel) {
  auto held = std::make_unique<Held>();
  double milliseconds = 0;
  ROPEWALK_TRY(BuildOpenClKernel(library, handle, device, key, &held->kernel, &milliseconds));
  if (device.system_memory) {
    const cl::Uint yes = 1;  // pointers of any memory; a device that needs no telling may refuse the call
    (void)library.SetKernelExecInfo(held->kernel, cl::kFineGrainSystemAccess, sizeof(yes), &yes);
  }
  kernel->source = Text(device.spirv ? "from SPIR-V in " : "from source in ", std::lround(milliseconds), " ms");
  kernel->function = held.release();
  return {};
}

Status OpenClContext::Allocate(size_t bytes, void** out) {
  constexpr size_t kAlignment = 64;
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  cl::Int result = cl::kSuccess;
  *out = device.system_memory ? std::aligned_alloc(kAlignment, bytes)
         : usm_.allocate      ? usm_.allocate(handle, device.handle, nullptr, bytes, kAlignment, &result)
                              : library.SvmAlloc(handle, cl::kReadWrite, bytes, kAlignment);
  return *out ? Status() : Status::Driver(Text("rope: ", device_name, " has no ", bytes, " bytes left"));
}

Status OpenClContext::Copy(void* to, const void* from, size_t bytes) {
  if (device.system_memory) {
    std::memcpy(to, from, bytes);
    return {};
  }
  cl::Queue queue = nullptr;
  ROPEWALK_TRY(OwnQueue(&queue));
  const auto copy = usm_.copy ? usm_.copy : library.EnqueueSvmMemcpy;
  return library.Check(copy(queue, 1, to, from, bytes, 0, nullptr, nullptr),
                       usm_.copy ? "clEnqueueMemcpyINTEL" : "clEnqueueSVMMemcpy");
}

Status OpenClContext::CopyIn(void* to, const void* from, size_t bytes) { return Copy(to, from, bytes); }
Status OpenClContext::CopyOut(void* to, const void* from, size_t bytes) { return Copy(to, from, bytes); }

// ---------------------------------------------------------------------------------------------------------------------
// Which context

namespace {

std::mutex contexts_mutex;
std::atomic<OpenClContext*> contexts{nullptr};

// A child of fork() has none of them: the driver's contexts are its parent's, and so are threads that hold their locks.
const OnFork kForgetContexts([] {
  new (&contexts_mutex) std::mutex;
  contexts.store(nullptr);
});

OpenClContext* FindAmong(cl::Context handle, cl::Device device, const OpenClLibrary& library, size_t place) {
  for (OpenClContext* c = contexts.load(std::memory_order_acquire); c; c = c->next) {
    if (handle ? c->handle == handle && c->device.handle == device
               : c->ours && c->device.handle == library.devices[place].handle) {
      return c;
    }
  }
  return nullptr;
}

}  // namespace

Status FindOpenClContext(const OpenClLibrary& library, size_t place, cl::Queue queue, OpenClContext** out) {
  const OpenClDevice& device = library.devices[place];
  cl::Context handle = nullptr;
  if (queue) {
    cl::Device owner = nullptr;
    ROPEWALK_TRY(library.Check(library.GetCommandQueueInfo(queue, cl::kQueueContext, sizeof(handle), &handle, nullptr),
                               "clGetCommandQueueInfo", ": the stream must be a cl_command_queue, or null"));
    ROPEWALK_TRY(library.Check(library.GetCommandQueueInfo(queue, cl::kQueueDevice, sizeof(owner), &owner, nullptr),
                               "clGetCommandQueueInfo", ": the stream must be a cl_command_queue, or null"));
    if (owner != device.handle) {
      const auto it = std::ranges::find(library.devices, owner, &OpenClDevice::handle);
      return Status::Invalid(Text("rope: q is on opencl:", place, " (", device.text, "), but the queue is one of ",
                                  it != library.devices.end()
                                      ? Text("opencl:", it - library.devices.begin(), " (", it->text, ")")
                                      : Text("another device")));
    }
  }
  if ((*out = FindAmong(handle, device.handle, library, place))) return {};
  const std::lock_guard lock(contexts_mutex);
  if ((*out = FindAmong(handle, device.handle, library, place))) return {};
  const bool ours = !handle;
  cl::Int result = cl::kSuccess;
  if (ours) {
    handle = library.CreateContext(nullptr, 1, &device.handle, nullptr, nullptr, &result);
    ROPEWALK_TRY(library.Check(result, "clCreateContext", " on ", device.text));
  } else {
    ROPEWALK_TRY(library.Check(library.RetainContext(handle), "clRetainContext"));
  }
  auto* context = new OpenClContext(library, device, handle, Text("opencl:", place, " (", device.text, ")"), ours);
  context->next = contexts.load(std::memory_order_relaxed);
  contexts.store(context, std::memory_order_release);
  *out = context;
  return {};
}

void ForEachOpenClContext(const std::function<void(OpenClContext*)>& visit) {
  for (OpenClContext* c = contexts.load(std::memory_order_acquire); c; c = c->next) visit(c);
}

}  // namespace ropewalk
