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
#include <string_view>
#include <utility>

#include "base/status.h"
#include "rope/backward.h"
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

// What a tensor of RopeBackwardCall::turn is called by whoever asks for the gradient.
inline const char* NameInBackward(const char* name) {
  const std::string_view own = name;
  return own == "q"       ? "q_grad"
         : own == "k"     ? "k_grad"
         : own == "q_out" ? "q_grad_out"
         : own == "k_out" ? "k_grad_out"
                          : name;
}

template <int kPageShift>
class KnownPages {
 public:
  // `ask(name, pointer, &keep)` is called for each tensor that is not known to be memory of `device` (a small number).
  template <class Ask>
  Status Check(const RopeTensors& tensors, uint64_t device, const Ask& ask) {
    for (const TensorName& tensor : kTensorNames) {
      ROPEWALK_TRY(CheckOne(tensor.name, At(tensors, tensor.offset), device, ask));
    }
    return {};
  }
  // Likewise of a gradient, by the caller's names.
  template <class Ask>
  Status Check(const RopeBackwardCall& call, uint64_t device, const Ask& ask) {
    for (const TensorName& tensor : kTensorNames) {
      ROPEWALK_TRY(CheckOne(NameInBackward(tensor.name), At(call.turn.tensors, tensor.offset), device, ask));
    }
    const std::pair<const char*, const void*> own[] = {{"q", call.q},
                                                       {"k", call.k},
                                                       {"q_weight_grad", call.q_weight_grad},
                                                       {"k_weight_grad", call.k_weight_grad},
                                                       {"workspace", call.workspace}};
    for (const auto& [name, pointer] : own) ROPEWALK_TRY(CheckOne(name, pointer, device, ask));
    return {};
  }

 private:
  static const void* At(const RopeTensors& tensors, size_t offset) {
    const void* pointer;
    std::memcpy(&pointer, reinterpret_cast<const char*>(&tensors) + offset, sizeof(pointer));
    return pointer;
  }
  template <class Ask>
  Status CheckOne(const char* name, const void* pointer, uint64_t device, const Ask& ask) {
    if (!pointer) return {};
    const uint64_t page = reinterpret_cast<uintptr_t>(pointer) >> kPageShift;
    const uint64_t entry = page * 4096 + device % 4095 + 1;
    std::atomic<uint64_t>& known = pages_[page % pages_.size()];
    if (known.load(std::memory_order_relaxed) == entry) return {};
    bool keep = false;
    ROPEWALK_TRY(ask(name, pointer, &keep));
    if (keep) known.store(entry, std::memory_order_relaxed);
    return {};
  }

  std::array<std::atomic<uint64_t>, 1024> pages_{};
};

}  // namespace ropewalk
