// Whether tensors' data is memory of the device. Asking a driver about a pointer costs tenths of a microsecond, so the
// answer is kept for the pointer's page; a hit is one load and one comparison. Only "this is memory of that device" is
// kept, so that a stale answer can let a freed page pass, as without the check, but never refuse a good one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/status.h"
#include "rope/call.h"

namespace ropewalk {

struct TensorName {
  const char* name;
  size_t offset;
};
inline constexpr TensorName kTensorNames[] = {
#define X(name, type) {#name, offsetof(RopeTensors, name)},
    ROPE_TENSORS(X)
#undef X
};

template <int kPageShift>
class KnownPages {
 public:
  // `ask(name, pointer, &keep)` is called for each tensor that is not known to be memory of `device` (a small number).
  template <class Ask>
  Status Check(const RopeTensors& tensors, uint64_t device, const Ask& ask) {
    for (const TensorName& tensor : kTensorNames) {
      const void* pointer;
      std::memcpy(&pointer, reinterpret_cast<const char*>(&tensors) + tensor.offset, sizeof(pointer));
      if (!pointer) continue;
      const uint64_t page = reinterpret_cast<uintptr_t>(pointer) >> kPageShift;
      const uint64_t entry = page * 4096 + device % 4095 + 1;
      std::atomic<uint64_t>& known = pages_[page % pages_.size()];
      if (known.load(std::memory_order_relaxed) == entry) continue;
      bool keep = false;
      ROPEWALK_TRY(ask(tensor.name, pointer, &keep));
      if (keep) known.store(entry, std::memory_order_relaxed);
    }
    return {};
  }

 private:
  std::array<std::atomic<uint64_t>, 1024> pages_{};
};

}  // namespace ropewalk
