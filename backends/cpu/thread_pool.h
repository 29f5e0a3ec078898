// The opt-in pool: threads that wait for ranges of work. Safe across fork(): the child begins with none.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ropewalk {

class ThreadPool;

// The pool of `threads` threads, the caller's included. Ends the one before; no call may be using it.
void ResizeThreadPool(int threads);
int ThreadPoolSize();

// Has the shape of ropewalk_parallel_for. While another thread uses the pool, the caller does all of its work alone.
void PoolParallelFor(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(int64_t begin, int64_t end, const void* body_context), const void* body_context,
                     void* context);

}  // namespace ropewalk
