// Builds the kernel for an OpenCL device. Depends on nothing that Ropewalk keeps, so that it serves a SYCL queue too
// whose device is one of OpenCL's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/opencl/library.h"
#include "backends/spirv/context.h"
#include "backends/spirv/plan.h"
#include "base/status.h"

namespace ropewalk {

// The variant from SPIR-V with specialisation constants, or from the kernel's text where the device takes no SPIR-V.
// `milliseconds` gets what the driver took.
Status BuildOpenClKernel(const OpenClLibrary& library, cl::Context context, const OpenClDevice& device,
                         const RopeSpirvKey& key, cl::Kernel* kernel, double* milliseconds,
                         cl::Program* keep = nullptr);

// The same for handles that come from elsewhere: a cl_context and a cl_device_id; `kernel->function` gets the
// cl_kernel, `kernel->module` its cl_program.
Status BuildOpenClKernel(void* context, void* device, const RopeSpirvKey& key, SpirvKernel* kernel);
// What a plan needs to know of such a device; refuses one that cannot serve.
Status OpenClProperties(void* device, SpirvDevice* out);

}  // namespace ropewalk
