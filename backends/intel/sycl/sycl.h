// Calls on a caller's sycl::queue (RopeCall::sycl_queue), of Level Zero or of OpenCL. What needs SYCL is in the shim
// (shim.h), which is opened here for the libsycl that the process has loaded.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

#include "backends/registry.h"
#include "backends/spirv/context.h"

namespace ropewalk {

Status SyclLaunch(const RopeCall& call);
Status SyclLaunchBackward(const RopeBackwardCall& call);
Status SyclBackwardWorkspace(const RopeBackwardCall& call, int64_t* elements);
Status SyclPrepare(const RopeCall& call);
Status SyclExplain(const RopeCall& call, Explanation* explanation);

// Whether the process holds a libsycl that one of our shims is for.
bool SyclIsLoaded();
// For doctor: "SYCL queues of libsycl.so.9 and libsycl.so.8", or that there is no shim and what would help.
std::string SyclText(std::string* remedy);
// One for each context and device that a queue has had.
void ForEachSyclContext(const std::function<void(SpirvContext*)>& visit);

}  // namespace ropewalk
