// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "ops/rope/rope_cpu_plan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ropewalk {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { Work(i); });
  }

  ~ThreadPool() {
    stop_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void Run(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
           const void* body_context) {
    const std::unique_lock lock(busy_, std::try_to_lock);
    const int64_t parts = RowParts(end - begin, grain, size());
    if (!lock.owns_lock() || parts <= 1) return body(begin, end, body_context);
    begin_ = begin;
    end_ = end;
    parts_ = parts;
    body_ = body;
    body_context_ = body_context;
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    Part(0);
    while (pending_.load(std::memory_order_acquire) != 0) Pause();
  }

 private:
  static void Pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  void Part(int64_t i) {
    if (i >= parts_) return;
    const RowRange part = RowPart({begin_, end_}, i, parts_);
    body_(part.begin, part.end, body_context_);
  }

  void Work(int index) {
    // Calls often follow each other within microseconds, and waking a sleeping thread takes as long.
    constexpr int kSpins = 4000;
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

  std::mutex busy_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  int64_t begin_ = 0, end_ = 0, parts_ = 0;
  void (*body_)(int64_t, int64_t, const void*) = nullptr;
  const void* body_context_ = nullptr;
  std::vector<std::thread> workers_;
};

namespace {

std::atomic<ThreadPool*> pool{nullptr};
std::atomic<int> wanted{1};
std::mutex making;

// A forked child has none of its parent's threads: it leaves their pool behind and makes its own at the first use.
void ForgetPool() {
  pool.store(nullptr);
  new (&making) std::mutex;
}
// From the start: another thread may be making the first pool, with the lock held, when this one forks.
[[maybe_unused]] const int kRegistered = pthread_atfork(nullptr, nullptr, ForgetPool);

ThreadPool* Pool() {
  if (ThreadPool* ready = pool.load(std::memory_order_acquire)) return ready;
  const std::lock_guard lock(making);
  if (!pool.load()) {
    pool.store(new ThreadPool(wanted.load()), std::memory_order_release);
  }
  return pool.load();
}

}  // namespace

void ResizeThreadPool(int threads) {
  const std::lock_guard lock(making);
  delete pool.exchange(nullptr);
  wanted.store(threads);
}

int ThreadPoolSize() { return wanted.load(std::memory_order_relaxed); }

void PoolParallelFor(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                     const void* body_context, void*) {
  Pool()->Run(begin, end, grain, body, body_context);
}

}  // namespace ropewalk
