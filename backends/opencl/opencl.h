// The OpenCL backend: the SPIR-V kernel on any OpenCL device that takes it, or the kernel's text on one that does not.
// Serves kDLOpenCL tensors, whose data are pointers to shared virtual memory (SVM) or unified shared memory (USM), and,
// forced, tensors on the CPU where the device works on all memory of the process.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/registry.h"

namespace ropewalk {

extern const Backend kOpenClBackend;

}  // namespace ropewalk
