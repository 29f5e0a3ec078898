// The opt-in pool: threads that wait for ranges of work. May be resized, and the process may fork, at any moment.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ropewalk {

// From the next call on there is a pool of `threads` threads, the caller's included. The old pool ends at once, or
// after the call that uses it.
void ResizeThreadPool(int threads);
int ThreadPoolSize();
// How many threads the pool has: fewer than were asked for if the system gave no more. 0: no pool was made yet.
int ThreadPoolStarted();

// Has the shape of ropewalk_parallel_for. While another thread uses the pool, the caller does all of its work alone.
void PoolParallelFor(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(int64_t begin, int64_t end, const void* body_context), const void* body_context,
                     void* context);

}  // namespace ropewalk
