// libcuda, opened when first needed, with our own declarations of what we call: building needs no toolkit, and the
// library loads where there is no driver. What is declared at the end is in context.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "backends/cuda/plan.h"
#include "base/status.h"

namespace ropewalk {

// The driver's ABI, as far as it is used here. Values are those of cuda.h.
namespace cu {

using Result = int;
using Device = int;
using DevicePtr = unsigned long long;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;

enum : Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kUnsupportedPtxVersion = 222,
  kInvalidHandle = 400,
  kStreamCaptureUnsupported = 900,
  kStreamCaptureImplicit = 906,
};
enum { kMultiprocessorCount = 16, kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76 };  // of a device
enum { kSharedSizeBytes = 1, kLocalSizeBytes = 3, kNumRegs = 4 };                                // of a function
enum { kMemoryType = 2, kIsManaged = 8, kDeviceOrdinal = 9, kAccessFlags = 16 };                 // of a pointer
enum { kMemoryTypeHost = 1, kMemoryTypeDevice = 2 };
enum { kStreamNonBlocking = 1 };
enum { kCaptureModeRelaxed = 2 };
enum { kProgrammaticStreamSerialization = 6 };  // a launch attribute

struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int number;
    void* pointer;
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56);

}  // namespace cu

// X(name, symbol, parameters..): everything that is called.
#define ROPEWALK_CUDA_FUNCTIONS(X)                                                           \
  X(Init, "cuInit", unsigned)                                                                \
  X(DriverGetVersion, "cuDriverGetVersion", int*)                                            \
  X(GetErrorName, "cuGetErrorName", cu::Result, const char**)                                \
  X(GetErrorString, "cuGetErrorString", cu::Result, const char**)                            \
  X(DeviceGetCount, "cuDeviceGetCount", int*)                                                \
  X(DeviceGet, "cuDeviceGet", cu::Device*, int)                                              \
  X(DeviceGetName, "cuDeviceGetName", char*, int, cu::Device)                                \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", int*, int, cu::Device)                       \
  X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", cu::Context*, cu::Device)                  \
  X(PrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", cu::Device)                           \
  X(PrimaryCtxGetState, "cuDevicePrimaryCtxGetState", cu::Device, unsigned*, int*)           \
  X(CtxGetCurrent, "cuCtxGetCurrent", cu::Context*)                                          \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", cu::Context)                                      \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", cu::Context*)                                       \
  X(CtxGetDevice, "cuCtxGetDevice", cu::Device*)                                             \
  X(CtxGetId, "cuCtxGetId", cu::Context, unsigned long long*)                                \
  X(CtxSynchronize, "cuCtxSynchronize")                                                      \
  X(ExchangeCaptureMode, "cuThreadExchangeStreamCaptureMode", int*)                          \
  X(ModuleLoadData, "cuModuleLoadData", cu::Module*, const void*)                            \
  X(ModuleUnload, "cuModuleUnload", cu::Module)                                              \
  X(ModuleGetFunction, "cuModuleGetFunction", cu::Function*, cu::Module, const char*)        \
  X(FuncGetAttribute, "cuFuncGetAttribute", int*, int, cu::Function)                         \
  X(MemAlloc, "cuMemAlloc_v2", cu::DevicePtr*, size_t)                                       \
  X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", cu::DevicePtr, const void*, size_t, cu::Stream) \
  X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", void*, cu::DevicePtr, size_t, cu::Stream)       \
  X(StreamCreate, "cuStreamCreate", cu::Stream*, unsigned)                                   \
  X(StreamSynchronize, "cuStreamSynchronize", cu::Stream)                                    \
  X(StreamIsCapturing, "cuStreamIsCapturing", cu::Stream, int*)                              \
  X(StreamGetCtx, "cuStreamGetCtx", cu::Stream, cu::Context*)                                \
  X(PointerGetAttributes, "cuPointerGetAttributes", unsigned, int*, void**, cu::DevicePtr)   \
  X(LaunchKernelEx, "cuLaunchKernelEx", const cu::LaunchConfig*, cu::Function, void**, void**)

struct CudaDeviceInfo {
  cu::Device handle;
  std::string name;
  CudaDevice properties;
};

struct CudaDriver {
#define ROPEWALK_MEMBER(name, symbol, ...) cu::Result (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_CUDA_FUNCTIONS(ROPEWALK_MEMBER)
#undef ROPEWALK_MEMBER
  Status status;       // why it cannot be used
  std::string remedy;  // and what would help
  std::string path;
  int version = 0;  // 13000: 13.0
  std::vector<CudaDeviceInfo> devices;

  // OK, or "rope: <call> failed: CUDA_ERROR_.. (what that means)<context>".
  Status Check(cu::Result result, const char* call, const std::string& context) const;
  Status Check(cu::Result result, const char* call) const {
    return result == cu::kSuccess ? Status() : Check(result, call, std::string());  // every launch comes here
  }
};

// Opens the library at the first call: $ROPEWALK_LIBCUDA, one that is loaded already, or the system's.
const CudaDriver& GetCudaDriver();
// Whether GetCudaDriver was called: what only reports must not start the driver, which forbids fork().
bool CudaDriverWasLoaded();

std::string CudaVersionText(int version);                // 13000: "13.0"
std::string CudaArchText(const CudaDevice& properties);  // "sm_90"

}  // namespace ropewalk
