// Where cases are timed: the memory that their tensors lie in, the floor there, the clock. The host, or a CUDA device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "conformance/case_call.h"
#include "conformance/cases.h"
#include "conformance/memory.h"

namespace ropewalk::bench {

struct TimingOptions;
struct TimedCase;

class Place {
 public:
  virtual ~Place() = default;
  virtual DeviceMemory& memory() const = 0;
  virtual std::string device() const = 0;  // its name
  virtual std::string driver() const = 0;  // "" on the host
  virtual bool threaded() const = 0;       // whether a number of threads means anything
  // What "of floor" was measured with, for the line below a table.
  virtual std::string FloorText() const = 0;
  // Sizes worth timing for 32/8 heads of 128.
  virtual std::vector<int64_t> Tokens(uint32_t dtype) const = 0;
  // Where the data of the calls lies: "L1", "L2", "L3", "L3+DRAM", "DRAM".
  virtual std::string MemoryOf(const RopeCase& c) const = 0;
  // Times a call in place, whose result is known to be right, against the floor of the same bytes.
  virtual Status Time(const TimingOptions& options, CaseCall& call, TimedCase* out) = 0;
};

// The threads of a measurement: the operation and the floor run on Ropewalk's own pool, split in the same way, so that
// neither waits while the other's threads spin.
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

Place& HostPlace();
Status CudaPlace(Place** out);  // cuda:0
// The place that a backend works at: "", "cpu:avx2", "cuda:few", ..
Status PlaceOf(std::string_view backend, Place** out);

}  // namespace ropewalk::bench
