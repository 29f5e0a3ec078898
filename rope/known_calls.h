// The last calls of a thread, so that one that differs from them in addresses only is not checked and lowered again:
// a model makes the same few calls in every layer. Looking one up takes a tenth of a microsecond, lowering it up to
// one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <array>
#include <cstdint>

#include "rope/call.h"

namespace ropewalk {

// Calls of one shape have addresses that agree modulo this: the widest access is of 8 float32 weights.
inline constexpr uintptr_t kAddressClass = 32;

class KnownCalls {
 public:
  // One of them, lowered.
  struct Known {
    struct Tensor {
      uint16_t offset;  // in ropewalk_rope_args
      bool strided, empty, written, is_value, is_scales;
      DLDevice device;
      int32_t ndim;
      DLDataType dtype;
      int64_t shape[4], strides[4];
      uintptr_t address;
      int64_t begin, end;  // of the bytes that it spans, from its address
      uint32_t entangled;  // bits of the tensors, itself among them, whose span meets its own
      float value;         // is_value: what lowering read
    };
    static constexpr int kMostTensors = 18;

    static constexpr size_t kWords = sizeof(ropewalk_rope_args) / sizeof(uint64_t);

    RopeCall call;
    std::array<uint64_t, kWords> words;  // the arguments, without the addresses of tensors
    std::array<uint64_t, kWords> mask;   // 0 where those are
    uint64_t frequencies_id = 0;
    int count = 0;
    bool in_use = false;
    Tensor tensors[kMostTensors];
  };

  // Protects a known call from being replaced: a thread that waits for others may be given another call meanwhile.
  class Use {
   public:
    explicit Use(Known* known) : known_(known) { known_->in_use = true; }
    ~Use() { known_->in_use = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Known* known_;
  };

  // The call as LowerRope would make it, or null if no known call is like it.
  Known* Find(const ropewalk_rope_args& args, void* stream);
  // `call` is what LowerRope made of `args`. Null if there is no room, each call that is kept being in use.
  Known* Remember(const ropewalk_rope_args& args, const RopeCall& call);

 private:
  static constexpr unsigned kMost = 4;
  std::array<Known, kMost> known_ = {};
  unsigned last_ = 0;  // found or remembered
};

}  // namespace ropewalk
