// The SYCL side of SyclShim, compiled by a plain C++ compiler against SYCL's headers: no kernel is written in SYCL
// here.
// SPDX-License-Identifier: Apache-2.0
#include "backends/intel/sycl/shim.h"

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <sycl/backend.hpp>
#include <sycl/ext/oneapi/backend/level_zero.hpp>
#include <sycl/ext/oneapi/experimental/enqueue_functions.hpp>
#include <sycl/ext/oneapi/experimental/raw_kernel_arg.hpp>
#include <sycl/sycl.hpp>

namespace ropewalk {
namespace {

namespace syclex = sycl::ext::oneapi::experimental;
namespace level_zero = sycl::ext::oneapi::level_zero;

struct Entry {
  sycl::queue queue;
  size_t identity = 0;
  SyclQueueInfo info = {};
  std::atomic<bool> launched{false};  // since the last wait
  explicit Entry(const sycl::queue& q) : queue(q) {}
};

// Entries are never freed: a queue that one of them holds cannot be mistaken for a later one at its address, and the
// run-time may be gone before our destructors run.
constexpr size_t kMostQueues = 4096;
std::array<std::atomic<Entry*>, kMostQueues> entries{};
std::mutex entries_mutex;
// A child of fork() has none of the queues, nor of the threads that were looking at one.
[[maybe_unused]] const int kForgetEntries = pthread_atfork(nullptr, nullptr, [] {
  new (&entries_mutex) std::mutex;
  for (auto& entry : entries) entry.store(nullptr, std::memory_order_relaxed);
});

template <class Body>
int Guard(char* error, const Body& body) {
  const char* text = "an unknown exception";
  try {
    body();
    return 0;
  } catch (const std::exception& exception) {
    std::snprintf(error, kSyclErrorBytes, "%s", exception.what());
    return -1;
  } catch (...) {
    std::snprintf(error, kSyclErrorBytes, "%s", text);
    return -1;
  }
}

template <class... Parts>
int Fail(char* error, const char* format, const Parts&... parts) {
  std::snprintf(error, kSyclErrorBytes, format, parts...);
  return -1;
}

void Describe(Entry* entry) {
  SyclQueueInfo& info = entry->info;
  const sycl::queue& queue = entry->queue;
  const sycl::device device = queue.get_device();
  const sycl::context context = queue.get_context();
  info.in_order = queue.is_in_order();
  const char* name = "another backend";
  switch (queue.get_backend()) {
    case sycl::backend::opencl:
      info.backend = kSyclOpenCl;
      info.context = sycl::get_native<sycl::backend::opencl>(context);
      info.device = sycl::get_native<sycl::backend::opencl>(device);
      name = "OpenCL";
      break;
    case sycl::backend::ext_oneapi_level_zero:
      info.backend = kSyclLevelZero;
      info.context = sycl::get_native<sycl::backend::ext_oneapi_level_zero>(context);
      info.device = sycl::get_native<sycl::backend::ext_oneapi_level_zero>(device);
      name = "Level Zero";
      break;
    case sycl::backend::ext_oneapi_cuda: name = "CUDA"; break;
    case sycl::backend::ext_oneapi_hip: name = "HIP"; break;
    default: break;
  }
  std::snprintf(info.backend_name, sizeof(info.backend_name), "%s", name);
  std::snprintf(info.device_name, sizeof(info.device_name), "%s", device.get_info<sycl::info::device::name>().c_str());
}

int Find(const void* pointer, void** out, const SyclQueueInfo** info, char* error) {
  const auto& queue = *static_cast<const sycl::queue*>(pointer);
  const size_t identity = std::hash<sycl::queue>{}(queue);  // of what the copies of a queue share
  const auto look = [&](size_t* at) -> Entry* {
    for (size_t i = 0; i < kMostQueues; ++i) {
      const size_t slot = (identity / 64 + i) % kMostQueues;
      Entry* entry = entries[slot].load(std::memory_order_acquire);
      *at = slot;
      if (!entry || entry->identity == identity) return entry;
    }
    *at = kMostQueues;
    return nullptr;
  };
  size_t at = 0;
  Entry* entry = look(&at);
  if (!entry) {
    const int code = Guard(error, [&] {
      const std::lock_guard lock(entries_mutex);
      entry = look(&at);
      if (entry) return;
      if (at == kMostQueues) throw std::runtime_error("more than 4096 SYCL queues have been handed over");
      auto made = std::make_unique<Entry>(queue);
      made->identity = identity;
      Describe(made.get());
      entry = made.release();
      entries[at].store(entry, std::memory_order_release);
    });
    if (code) return code;
  }
  *out = entry;
  *info = &entry->info;
  return 0;
}

int Wrap(void* entry_pointer, void* module, void* kernel, void** out, char* error) {
  const auto* entry = static_cast<Entry*>(entry_pointer);
  return Guard(error, [&] {
    const sycl::context context = entry->queue.get_context();
    if (entry->info.backend == kSyclOpenCl) {
      *out = new sycl::kernel(sycl::make_kernel<sycl::backend::opencl>(static_cast<cl_kernel>(kernel), context));
      return;
    }
    constexpr auto kBackend = sycl::backend::ext_oneapi_level_zero;
    const auto bundle = sycl::make_kernel_bundle<kBackend, sycl::bundle_state::executable>(
        {static_cast<ze_module_handle_t>(module), level_zero::ownership::keep}, context);
    *out = new sycl::kernel(sycl::make_kernel<kBackend>(
        {bundle, static_cast<ze_kernel_handle_t>(kernel), level_zero::ownership::keep}, context));
  });
}

int Launch(void* entry_pointer, const void* kernel_pointer, const SyclArgument* arguments, uint32_t count,
           const uint32_t* groups, uint32_t local, char* error) {
  auto* entry = static_cast<Entry*>(entry_pointer);
  const auto& kernel = *static_cast<const sycl::kernel*>(kernel_pointer);
  return Guard(error, [&] {
    sycl::queue& queue = entry->queue;
    sycl::event before;
    if (!entry->info.in_order) before = queue.ext_oneapi_submit_barrier();
    const sycl::range<3> group(1, 1, local);  // OpenCL's dimension 0 is SYCL's last
    const sycl::range<3> all(groups[2], groups[1], size_t{groups[0]} * local);
    const auto work = [&](sycl::handler& handler) {
      if (!entry->info.in_order) handler.depends_on(before);
      for (uint32_t i = 0; i < count; ++i) {
        const SyclArgument& argument = arguments[i];
        if (argument.pointer) {
          void* pointer;
          std::memcpy(&pointer, argument.data, sizeof(pointer));
          handler.set_arg(static_cast<int>(i), pointer);
        } else {
          handler.set_arg(static_cast<int>(i), syclex::raw_kernel_arg(argument.data, argument.bytes));
        }
      }
      handler.parallel_for(sycl::nd_range<3>(all, group), kernel);
    };
    syclex::submit(queue, work);  // unlike queue.submit, makes no event
    if (!entry->info.in_order) queue.ext_oneapi_submit_barrier();
    if (!entry->launched.load(std::memory_order_relaxed)) entry->launched.store(true, std::memory_order_relaxed);
  });
}

int Allocate(void* entry_pointer, size_t bytes, void** out, char* error) {
  const auto* entry = static_cast<Entry*>(entry_pointer);
  const int code = Guard(error, [&] { *out = sycl::aligned_alloc_device(256, bytes, entry->queue); });
  if (code == 0 && !*out) return Fail(error, "there are no %zu bytes left on %s", bytes, entry->info.device_name);
  return code;
}

int Copy(void* entry_pointer, void* to, const void* from, size_t bytes, char* error) {
  auto* entry = static_cast<Entry*>(entry_pointer);
  return Guard(error, [&] { entry->queue.memcpy(to, from, bytes).wait_and_throw(); });
}

int MemoryOf(void* entry_pointer, const void* pointer, int32_t* memory, char* error) {
  const auto* entry = static_cast<Entry*>(entry_pointer);
  return Guard(error, [&] {
    const sycl::context context = entry->queue.get_context();
    switch (sycl::get_pointer_type(pointer, context)) {
      case sycl::usm::alloc::host: *memory = kSyclHost; break;
      case sycl::usm::alloc::shared: *memory = kSyclShared; break;
      case sycl::usm::alloc::device:
        *memory =
            sycl::get_pointer_device(pointer, context) == entry->queue.get_device() ? kSyclDevice : kSyclOtherDevice;
        break;
      default: *memory = kSyclUnknown;
    }
  });
}

int Wait(char* error) {
  return Guard(error, [&] {
    for (const auto& slot : entries) {
      Entry* entry = slot.load(std::memory_order_acquire);
      if (entry && entry->launched.exchange(false, std::memory_order_relaxed)) entry->queue.wait_and_throw();
    }
  });
}

constexpr SyclShim kShim = {kSyclShimVersion, ROPEWALK_LIBSYCL, Find, Wrap, Launch, Allocate, Copy, MemoryOf, Wait};

}  // namespace
}  // namespace ropewalk

extern "C" __attribute__((visibility("default"))) const ropewalk::SyclShim* ropewalk_sycl_shim() {
  return &ropewalk::kShim;
}
