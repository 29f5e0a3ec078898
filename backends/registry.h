// A backend is a struct: what it is called, whether it can serve here, and how to launch. Absent ones say why.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk {

struct Availability {
  bool available = false;
  std::string detail;                   // what serves, or why it cannot
  std::string remedy;                   // what would help; "" if nothing is missing
  std::vector<std::string> parts = {};  // what force_backend("name:part") takes here
};

// Key and value, in the order in which explain() shows them.
using Explanation = std::vector<std::pair<std::string, std::string>>;

struct Backend {
  const char* name;
  // Whether tensors on this device are its own.
  bool (*serves)(DLDevice device);
  Availability (*availability)();
  // The operation on the caller's stream. `call` lives until launch returns.
  Status (*launch)(const RopeCall& call);
  Status (*prepare)(const RopeCall& call);
  Status (*explain)(const RopeCall& call, Explanation* explanation);
  // OK, or the first fault since the last call; clears it.
  Status (*check_faults)();
  // A part of the backend to force, as in "cpu:avx2"; "" ends it.
  Status (*force)(const std::string& part);
  // Appends {"kernel", launches}.
  void (*counters)(std::vector<std::pair<std::string, int64_t>>* counters);
  // The gradient of a call with a norm; without one `launch` turns it back.
  Status (*launch_backward)(const RopeBackwardCall& call);
  // How many elements of a workspace it needs.
  Status (*backward_workspace)(const RopeBackwardCall& call, int64_t* elements);
};

extern const Backend kCpuBackend, kCudaBackend, kIntelBackend, kOpenClBackend;
// All, the available and the absent.
std::span<const Backend* const> Backends();
// The one that serves a call with q on `device`; honours ropewalk_force_backend.
Status ChooseBackend(DLDevice device, const Backend** backend);
Status ForceBackend(const char* name);

// Who does the CPU backend's rows: the caller's function, or a pool of so many threads.
Status SetParallelFor(ropewalk_parallel_for parallel_for, void* context);
Status SetThreads(int32_t threads);

}  // namespace ropewalk
