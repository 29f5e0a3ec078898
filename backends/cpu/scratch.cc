// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include "base/fork.h"
#include "base/thread_key.h"

namespace ropewalk {
namespace {

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void* Map() {
  const size_t page = PageBytes();
  void* mapped = mmap(nullptr, kCpuScratchBytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* memory = static_cast<char*>(mapped) + page;
  if (mprotect(memory, kCpuScratchBytes, PROT_READ | PROT_WRITE) == 0) return memory;
  munmap(mapped, kCpuScratchBytes + 2 * page);
  return nullptr;
}

void Unmap(void* memory) {
  const size_t page = PageBytes();
  munmap(static_cast<char*>(memory) - page, kCpuScratchBytes + 2 * page);
}

constinit ThreadKey own_scratch(Map, Unmap);

alignas(64) char shared_scratch[kCpuScratchBytes];
constinit ForkMutex shared_mutex;

}  // namespace

CpuScratch::CpuScratch() : memory_(own_scratch.Get()), shared_(!memory_) {
  if (!shared_) return;
  shared_mutex.lock();
  memory_ = shared_scratch;
}

CpuScratch::~CpuScratch() {
  if (shared_) shared_mutex.unlock();
}

}  // namespace ropewalk
