// Memory that a thread works in beside the tensors. Not on its stack, which may be 64 KB small.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace ropewalk {

// For the largest head_dim of the widest target; of a page that a call does not use there is only the address.
inline constexpr size_t kCpuScratchBytes = 512 * 1024;

// The thread's own scratch, aligned to 64 bytes, between pages that cannot be touched. Made by the thread's first call,
// without malloc, and kept until the thread ends. A thread that cannot have one takes its turn at one of the process.
class CpuScratch {
 public:
  CpuScratch();
  ~CpuScratch();
  CpuScratch(const CpuScratch&) = delete;
  CpuScratch& operator=(const CpuScratch&) = delete;

  void* memory() const { return memory_; }

 private:
  void* memory_;
  bool shared_;
};

}  // namespace ropewalk
