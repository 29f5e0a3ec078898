// libOpenCL, opened when first needed, with our own declarations of what we call, and the devices that can serve:
// building needs no headers, and the library loads where there is no OpenCL.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backends/spirv/plan.h"
#include "base/status.h"
#include "base/text.h"

namespace ropewalk {

// OpenCL's ABI, as far as it is used here. Values are those of CL/cl.h and CL/cl_ext.h.
namespace cl {

using Int = int32_t;
using Uint = uint32_t;
using Bits = uint64_t;
using Platform = struct PlatformTag*;
using Device = struct DeviceTag*;
using Context = struct ContextTag*;
using Queue = struct QueueTag*;
using Program = struct ProgramTag*;
using Kernel = struct KernelTag*;
using Event = struct EventTag*;

enum : Int { kSuccess = 0, kDeviceNotFound = -1, kNoPlatforms = -1001 };
enum : Bits { kCpu = 1 << 1, kGpu = 1 << 2, kAnyType = 0xffffffff };
enum : Bits { kCoarseGrainBuffer = 1 << 0, kFineGrainBuffer = 1 << 1, kFineGrainSystem = 1 << 2 };  // SVM
enum : Bits { kReadWrite = 1 << 0 };
enum : Uint {
  kPlatformName = 0x0902,
  kDeviceType = 0x1000,
  kMaxComputeUnits = 0x1002,
  kMaxWorkGroupSize = 0x1004,
  kAddressBits = 0x100d,
  kCompilerAvailable = 0x1028,
  kDeviceName = 0x102b,
  kDriverVersion = 0x102d,
  kDeviceExtensions = 0x1030,
  kDevicePlatform = 0x1031,
  kSvmCapabilities = 0x1053,
  kIlVersion = 0x105b,
  kSubGroupSizes = 0x4108,  // of cl_intel_required_subgroup_size
  kQueueContext = 0x1090,
  kQueueDevice = 0x1091,
  kProgramBuildLog = 0x1183,
  kFineGrainSystemAccess = 0x11b7,  // of a kernel
};

}  // namespace cl

#define ROPEWALK_OPENCL_FUNCTIONS(F)                                                                         \
  F(GetPlatformIDs, "clGetPlatformIDs", cl::Uint, cl::Platform*, cl::Uint*)                                  \
  F(GetPlatformInfo, "clGetPlatformInfo", cl::Platform, cl::Uint, size_t, void*, size_t*)                    \
  F(GetDeviceIDs, "clGetDeviceIDs", cl::Platform, cl::Bits, cl::Uint, cl::Device*, cl::Uint*)                \
  F(GetDeviceInfo, "clGetDeviceInfo", cl::Device, cl::Uint, size_t, void*, size_t*)                          \
  F(RetainContext, "clRetainContext", cl::Context)                                                           \
  F(RetainCommandQueue, "clRetainCommandQueue", cl::Queue)                                                   \
  F(ReleaseCommandQueue, "clReleaseCommandQueue", cl::Queue)                                                 \
  F(GetCommandQueueInfo, "clGetCommandQueueInfo", cl::Queue, cl::Uint, size_t, void*, size_t*)               \
  F(BuildProgram, "clBuildProgram", cl::Program, cl::Uint, const cl::Device*, const char*, void*, void*)     \
  F(GetProgramBuildInfo, "clGetProgramBuildInfo", cl::Program, cl::Device, cl::Uint, size_t, void*, size_t*) \
  F(ReleaseProgram, "clReleaseProgram", cl::Program)                                                         \
  F(SetKernelArg, "clSetKernelArg", cl::Kernel, cl::Uint, size_t, const void*)                               \
  F(SetKernelArgSvmPointer, "clSetKernelArgSVMPointer", cl::Kernel, cl::Uint, const void*)                   \
  F(SetKernelExecInfo, "clSetKernelExecInfo", cl::Kernel, cl::Uint, size_t, const void*)                     \
  F(EnqueueNdRange, "clEnqueueNDRangeKernel", cl::Queue, cl::Kernel, cl::Uint, const size_t*, const size_t*, \
    const size_t*, cl::Uint, const cl::Event*, cl::Event*)                                                   \
  F(EnqueueSvmMemcpy, "clEnqueueSVMMemcpy", cl::Queue, cl::Uint, void*, const void*, size_t, cl::Uint,       \
    const cl::Event*, cl::Event*)                                                                            \
  F(ReleaseEvent, "clReleaseEvent", cl::Event)                                                               \
  F(Finish, "clFinish", cl::Queue)

struct OpenClLibrary;

// A device that can serve, or why it cannot.
struct OpenClDevice {
  cl::Platform platform = nullptr;
  cl::Device handle = nullptr;
  std::string name;  // "AMD EPYC"
  std::string text;  // "AMD EPYC (CPU, Intel(R) OpenCL 2026.22.10.0, SPIR-V)"
  bool gpu = false;
  bool spirv = false;          // takes SPIR-V with sub-groups of 16; else the kernel is built from its text
  bool system_memory = false;  // works on any memory of the process: tensors on the CPU serve
  bool usm = false;            // cl_intel_unified_shared_memory
  SpirvDevice properties;
  std::string refusal;  // "" if it can serve
};

struct OpenClLibrary {
  Status status;  // why there is nothing to use
  std::string remedy;
  std::string path;
  // Those that can serve first, of these the GPUs before the others; ROPEWALK_OPENCL_DEVICE leaves only those whose
  // name holds its text. kDLOpenCL tensors name a device by its place here.
  std::vector<OpenClDevice> devices;

#define ROPEWALK_DECLARE(name, symbol, ...) cl::Int (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_OPENCL_FUNCTIONS(ROPEWALK_DECLARE)
#undef ROPEWALK_DECLARE
  cl::Context (*CreateContext)(const intptr_t*, cl::Uint, const cl::Device*, void*, void*, cl::Int*) = nullptr;
  cl::Queue (*CreateQueue)(cl::Context, cl::Device, const cl::Bits*, cl::Int*) = nullptr;
  cl::Program (*CreateProgramWithSource)(cl::Context, cl::Uint, const char**, const size_t*, cl::Int*) = nullptr;
  cl::Kernel (*CreateKernel)(cl::Program, const char*, cl::Int*) = nullptr;
  void* (*SvmAlloc)(cl::Context, cl::Bits, size_t, cl::Uint) = nullptr;
  void* (*GetExtension)(cl::Platform, const char*) = nullptr;
  // OpenCL 2.1 and 2.2; null in older loaders.
  cl::Program (*CreateProgramWithIl)(cl::Context, const void*, size_t, cl::Int*) = nullptr;
  cl::Int (*SetProgramSpecializationConstant)(cl::Program, cl::Uint, size_t, const void*) = nullptr;

  // OK, or a sentence on a call that failed: "rope: clFinish failed: CL_OUT_OF_RESOURCES on ..". What follows is put
  // together only then, so that a launch allocates nothing.
  template <class... Context>
  Status Check(cl::Int result, const char* call, const Context&... context) const {
    return result == cl::kSuccess ? Status() : Failure(result, call, Text(context...));
  }
  static Status Failure(cl::Int result, const char* call, const std::string& context);
};

// Opened at the first call; never closed.
const OpenClLibrary& GetOpenCl();
bool OpenClWasLoaded();
// What the devices of the library can do; for a device that a caller's queue brings.
OpenClDevice DescribeOpenClDevice(const OpenClLibrary& library, cl::Platform platform, cl::Device device);

}  // namespace ropewalk
