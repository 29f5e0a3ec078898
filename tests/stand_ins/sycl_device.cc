// SPDX-License-Identifier: Apache-2.0
#include "tests/stand_ins/sycl_device.h"

#include <mutex>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace ropewalk {
namespace {

thread_local std::string last_error;

template <class Result, class Body>
Result Guard(Result failed, const Body& body) {
  try {
    return body();
  } catch (const std::exception& exception) {
    last_error = exception.what();
    return failed;
  }
}

sycl::queue& Queue(void* queue) { return *static_cast<sycl::queue*>(queue); }

const char* Error() { return last_error.c_str(); }

void* MakeQueue(bool in_order) {
  return Guard<void*>(nullptr, [&]() -> void* {
    const sycl::device device(sycl::cpu_selector_v);
    static sycl::context* const context = new sycl::context(device);
    auto* const queue = in_order ? new sycl::queue(*context, device, sycl::property::queue::in_order())
                                 : new sycl::queue(*context, device);
    static std::mutex mutex;
    static auto* const queues = new std::vector<sycl::queue*>;  // for LeakSanitizer to find
    const std::lock_guard lock(mutex);
    return queues->emplace_back(queue);
  });
}

const char* Name(void* queue) {
  return Guard<const char*>("", [&] {
    static std::string name;
    name = Queue(queue).get_device().get_info<sycl::info::device::name>();
    return name.c_str();
  });
}

void* Allocate(void* queue, size_t bytes) {
  return Guard<void*>(nullptr, [&] { return sycl::aligned_alloc_device(256, bytes ? bytes : 1, Queue(queue)); });
}

void Free(void* queue, void* memory) {
  Guard<bool>(false, [&] { return sycl::free(memory, Queue(queue)), true; });
}

bool Copy(void* queue, void* to, const void* from, size_t bytes) {
  return Guard<bool>(false, [&] { return Queue(queue).memcpy(to, from, bytes).wait_and_throw(), true; });
}

bool Wait(void* queue) {
  return Guard<bool>(false, [&] { return Queue(queue).wait_and_throw(), true; });
}

bool FillLate(void* queue, void* memory, int value, size_t bytes) {
  return Guard<bool>(false, [&] {
    // Many fills one after the other: the last one comes late.
    sycl::event last;
    for (int i = 0; i < 50; ++i) {
      last = Queue(queue).submit([&](sycl::handler& handler) {
        handler.depends_on(last);
        handler.memset(memory, i == 49 ? value : i, bytes);
      });
    }
    return true;
  });
}

constexpr SyclDevice kDevice = {Error, MakeQueue, Name, Allocate, Free, Copy, Wait, FillLate};

}  // namespace
}  // namespace ropewalk

extern "C" __attribute__((visibility("default"))) const ropewalk::SyclDevice* sycl_device() {
  return &ropewalk::kDevice;
}
