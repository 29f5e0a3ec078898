// The threads of a measurement: the operation and the floor run on Ropewalk's own pool, split in the same way, so that
// neither waits while the other's threads spin.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

namespace ropewalk::bench {

class Team {
 public:
  // Serves Ropewalk's calls until it ends; one at a time.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  ropewalk_parallel_for parallel_for() const { return parallel_for_; }  // null: one thread

 private:
  ropewalk_parallel_for parallel_for_;
};

}  // namespace ropewalk::bench
