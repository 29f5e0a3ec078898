// The opt-in pool: threads that wait for ranges of work. May be resized, and the process may fork, at any moment.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ropewalk {

// From the next call on, a pool of `threads` threads, the caller's included. The one before ends: at once, or with the
// call that uses it.
void ResizeThreadPool(int threads);
int ThreadPoolSize();
// How many threads the pool has, which are fewer where the system gave no more; 0: none was made yet.
int ThreadPoolStarted();

// Has the shape of ropewalk_parallel_for. While another thread uses the pool, the caller does all of its work alone.
void PoolParallelFor(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(int64_t begin, int64_t end, const void* body_context), const void* body_context,
                     void* context);

}  // namespace ropewalk
