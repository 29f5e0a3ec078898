// Memory that a thread works in beside the tensors. Not on its stack, which may be 64 KB small.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace ropewalk {

// Enough for the largest head_dim on the widest target. A page that no call uses takes an address and no memory.
inline constexpr size_t kCpuScratchBytes = 640 * 1024;

// The thread's own scratch, aligned to 64 bytes, between pages that nobody may touch. The thread's first call makes it,
// without malloc, and it stays until the thread ends. Threads that get none take turns at one of the process.
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
