// A libOpenCL that hides what the real one under it can do, or refuses: what is not defined here the loader finds in
// the real library, which this one needs. FAKE_CL holds words: no_spirv, no_sub_groups, no_float16, no_svm, no_system,
// no_compiler, refuse_il, refuse_build, other_device.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "backends/opencl/library.h"

namespace ropewalk {
namespace {

std::atomic<int> builds{0}, enqueues{0};

bool Told(const char* word) {
  const char* words = std::getenv("FAKE_CL");
  return words && std::strstr(words, word);
}

template <class Function>
Function Real(const char* symbol) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, symbol));
}

}  // namespace
}  // namespace ropewalk

using namespace ropewalk;  // NOLINT: a library of C functions

extern "C" {

__attribute__((visibility("default"))) int fake_opencl_builds() { return builds; }
__attribute__((visibility("default"))) int fake_opencl_enqueues() { return enqueues; }

__attribute__((visibility("default"))) cl::Int clGetDeviceInfo(cl::Device device, cl::Uint what, size_t size,
                                                               void* value, size_t* needed) {
  const auto real = Real<cl::Int (*)(cl::Device, cl::Uint, size_t, void*, size_t*)>("clGetDeviceInfo");
  const cl::Int result = real(device, what, size, value, needed);
  if (result != cl::kSuccess || !value) return result;
  if (what == cl::kIlVersion && Told("no_spirv")) std::memset(value, 0, size);
  if (what == cl::kSubGroupSizes && Told("no_sub_groups")) {
    for (size_t i = 0; i < size / sizeof(size_t); ++i) static_cast<size_t*>(value)[i] = 8;
  }
  if (what == cl::kSvmCapabilities && Told("no_svm")) *static_cast<cl::Bits*>(value) = 0;
  if (what == cl::kSvmCapabilities && Told("no_system")) *static_cast<cl::Bits*>(value) &= cl::kCoarseGrainBuffer;
  if (what == cl::kDeviceExtensions && Told("no_svm")) {
    if (char* usm = std::strstr(static_cast<char*>(value), "cl_intel_unified_shared_memory")) *usm = '#';
  }
  if (what == cl::kDeviceExtensions && Told("no_float16")) {
    if (char* float16 = std::strstr(static_cast<char*>(value), "cl_khr_fp16")) *float16 = '#';
  }
  if (what == cl::kCompilerAvailable && Told("no_compiler")) *static_cast<cl::Uint*>(value) = 0;
  return result;
}

__attribute__((visibility("default"))) cl::Program clCreateProgramWithIL(cl::Context context, const void* il,
                                                                         size_t size, cl::Int* result) {
  if (Told("refuse_il")) {
    *result = -42;
    return nullptr;
  }
  const auto real = Real<cl::Program (*)(cl::Context, const void*, size_t, cl::Int*)>("clCreateProgramWithIL");
  return real(context, il, size, result);
}

__attribute__((visibility("default"))) cl::Int clBuildProgram(cl::Program program, cl::Uint count,
                                                              const cl::Device* devices, const char* options,
                                                              void* notify, void* data) {
  ++builds;
  const auto real =
      Real<cl::Int (*)(cl::Program, cl::Uint, const cl::Device*, const char*, void*, void*)>("clBuildProgram");
  return real(program, count, devices, Told("refuse_build") ? "-no-such-option" : options, notify, data);
}

__attribute__((visibility("default"))) cl::Int clEnqueueNDRangeKernel(cl::Queue queue, cl::Kernel kernel, cl::Uint dims,
                                                                      const size_t* offset, const size_t* global,
                                                                      const size_t* local, cl::Uint waits,
                                                                      const cl::Event* wait, cl::Event* event) {
  ++enqueues;
  const auto real = Real<decltype(&clEnqueueNDRangeKernel)>("clEnqueueNDRangeKernel");
  return real(queue, kernel, dims, offset, global, local, waits, wait, event);
}

__attribute__((visibility("default"))) cl::Int clGetCommandQueueInfo(cl::Queue queue, cl::Uint what, size_t size,
                                                                     void* value, size_t* needed) {
  const auto real = Real<cl::Int (*)(cl::Queue, cl::Uint, size_t, void*, size_t*)>("clGetCommandQueueInfo");
  const cl::Int result = real(queue, what, size, value, needed);
  if (what == cl::kQueueDevice && value && Told("other_device")) std::memset(value, 1, size);
  return result;
}

}  // extern "C"
