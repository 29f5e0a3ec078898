// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "backends/cpu/plan.h"
#include "base/fork.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ropewalk {
namespace {

// Calls often follow each other within microseconds, and waking a sleeping thread takes as long.
constexpr int kSpins = 4000;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Used by one thread at a time: by the one that has taken it out.
class ThreadPool {
 public:
  // Of fewer threads if the system gives no more.
  ThreadPool(int threads, uint64_t epoch_) : epoch(epoch_) {
    try {
      workers_.reserve(static_cast<size_t>(threads - 1));
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { Work(i); });
    } catch (const std::bad_alloc&) {
    } catch (const std::system_error&) {
    }
  }

  ~ThreadPool() {
    stop_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  const uint64_t epoch;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void Run(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
           const void* body_context) {
    const int64_t parts = RowParts(end - begin, grain, size());
    if (parts <= 1) return body(begin, end, body_context);
    begin_ = begin;
    end_ = end;
    parts_ = parts;
    body_ = body;
    body_context_ = body_context;
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    Part(0);
    for (int i = 0; pending_.load(std::memory_order_acquire) != 0; ++i) {
      i < kSpins ? Pause() : std::this_thread::yield();
    }
  }

 private:
  void Part(int64_t i) {
    if (i >= parts_) return;
    const RowRange part = RowPart({begin_, end_}, i, parts_);
    body_(part.begin, part.end, body_context_);
  }

  void Work(int index) {
    uint32_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) Pause();
      generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      Part(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::atomic<uint32_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  int64_t begin_ = 0, end_ = 0, parts_ = 0;
  void (*body_)(int64_t, int64_t, const void*) = nullptr;
  const void* body_context_ = nullptr;
  std::vector<std::thread> workers_;
};

// The pool has one owner at a time: `idle`, or the call that has taken it from there. A new size, and a forked child,
// begin a new epoch, and an epoch has at most one pool. A call that gives back the pool of an older epoch ends it. So
// no call loses the pool that it uses, and nobody waits for one.
std::atomic<uint64_t> epoch{1};
std::atomic<uint64_t> made_epoch{0};  // the last one for which a pool was made
std::atomic<ThreadPool*> idle{nullptr};
std::atomic<int> wanted{1};
std::atomic<int> started{0};  // of `wanted`; 0: no pool was made yet

// A child has none of its parent's threads: it leaves their pool behind and makes its own at the first use.
const OnFork kForgetPool([] {
  idle.store(nullptr);
  started.store(0);
  epoch.fetch_add(1);
});

// Null if another call has it.
ThreadPool* Take() {
  if (ThreadPool* const pool = idle.exchange(nullptr)) {
    if (pool->epoch == epoch.load()) return pool;
    delete pool;
  }
  const uint64_t now = epoch.load();
  uint64_t made = made_epoch.load();
  if (made >= now || !made_epoch.compare_exchange_strong(made, now)) return nullptr;
  auto* const pool = new (std::nothrow) ThreadPool(wanted.load(), now);
  if (pool && now == epoch.load()) started.store(pool->size());
  return pool;
}

void PutBack(ThreadPool* pool) {
  while (pool) {
    if (pool->epoch != epoch.load()) {
      delete pool;
      return;
    }
    const uint64_t own = pool->epoch;
    pool = idle.exchange(pool);  // what another epoch has left there
    if (!pool && own != epoch.load()) pool = idle.exchange(nullptr);
  }
}

}  // namespace

void ResizeThreadPool(int threads) {
  wanted.store(threads);
  started.store(0);
  epoch.fetch_add(1);
  delete idle.exchange(nullptr);
}

int ThreadPoolSize() { return wanted.load(std::memory_order_relaxed); }
int ThreadPoolStarted() { return started.load(std::memory_order_relaxed); }

void PoolParallelFor(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                     const void* body_context, void*) {
  ThreadPool* const pool = Take();
  if (!pool) return body(begin, end, body_context);
  pool->Run(begin, end, grain, body, body_context);
  PutBack(pool);
}

}  // namespace ropewalk
