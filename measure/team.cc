// SPDX-License-Identifier: Apache-2.0
#include "measure/team.h"

#include "backends/cpu/thread_pool.h"

namespace ropewalk::bench {

Team::Team(int threads) : parallel_for_(threads > 1 ? PoolParallelFor : nullptr) { ropewalk_set_threads(threads); }
Team::~Team() { ropewalk_set_threads(1); }

}  // namespace ropewalk::bench
