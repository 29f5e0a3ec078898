// SPDX-License-Identifier: Apache-2.0
#include "backends/opencl/build.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "base/environment.h"
#include "base/text.h"
#include "base/wide_stack.h"

namespace ropewalk {
namespace {

std::string BuildLog(const OpenClLibrary& library, cl::Program program, cl::Device device) {
  size_t size = 0;
  if (library.GetProgramBuildInfo(program, device, cl::kProgramBuildLog, 0, nullptr, &size) != cl::kSuccess) return "";
  std::string log(size, '\0');
  if (library.GetProgramBuildInfo(program, device, cl::kProgramBuildLog, size, log.data(), nullptr) != cl::kSuccess) {
    return "";
  }
  log.resize(std::strlen(log.c_str()));
  while (!log.empty() && (log.back() == '\n' || log.back() == ' ')) log.pop_back();
  return log;
}

Status CreateProgram(const OpenClLibrary& library, cl::Context context, const OpenClDevice& device,
                     const RopeSpirvKey& key, cl::Program* program) {
  cl::Int result = cl::kSuccess;
  if (!device.spirv) {
    const char* source = RopeOpenClSource();
    *program = library.CreateProgramWithSource(context, 1, &source, nullptr, &result);
    return library.Check(result, "clCreateProgramWithSource", " on ", device.text);
  }
  const SpirvModule* module = RopeSpirvModuleOf(key);
  if (!module) return Status::Internal(Text("rope: there is no SPIR-V for ", RopeSpirvName(key)));
  *program = library.CreateProgramWithIl(context, module->bytes, module->size, &result);
  ROPEWALK_TRY(library.Check(result, "clCreateProgramWithIL", " on ", device.text, " for ", module->name));
  for (const SpirvConstant& constant : RopeSpirvConstants(key)) {
    result = library.SetProgramSpecializationConstant(*program, constant.id, sizeof(constant.value), &constant.value);
    if (result == cl::kSuccess) continue;
    library.ReleaseProgram(*program);
    return library.Check(result, "clSetProgramSpecializationConstant", " on ", device.text);
  }
  return {};
}

// A device that a caller brings.
Status Describe(void* device, const OpenClLibrary** library, OpenClDevice* out) {
  *library = &GetOpenCl();
  // The devices found do not matter here, only that the library is there.
  if (!(*library)->BuildProgram) return (*library)->status;
  cl::Platform platform = nullptr;
  const auto handle = static_cast<cl::Device>(device);
  ROPEWALK_TRY((*library)->Check(
      (*library)->GetDeviceInfo(handle, cl::kDevicePlatform, sizeof(platform), &platform, nullptr), "clGetDeviceInfo"));
  *out = DescribeOpenClDevice(**library, platform, handle);
  return out->refusal.empty() ? Status() : Status::Unavailable(Text("rope: ", out->text, " ", out->refusal));
}

}  // namespace

Status BuildOpenClKernel(const OpenClLibrary& library, cl::Context context, const OpenClDevice& device,
                         const RopeSpirvKey& key, cl::Kernel* kernel, double* milliseconds, cl::Program* keep) {
  const auto begin = std::chrono::steady_clock::now();
  cl::Program program = nullptr;
  ROPEWALK_TRY(CreateProgram(library, context, device, key, &program));
  std::string options = device.spirv ? std::string() : Text("-cl-std=CL1.2 ", RopeOpenClDefines(key));
  // Intel's GPU driver would else take 32-bit offsets into each tensor.
  if (device.gpu && device.usm) options += " -cl-intel-greater-than-4GB-buffer-required";
  // Not -cl-opt-disable: Intel's run-time for CPUs then heeds no sub-groups, and numbers are wrong.
  if (const char* more = EnvironmentVariable("ROPEWALK_OPENCL_OPTIONS")) Append(&options, Text(" ", more));
  cl::Int result = cl::kSuccess;
  OnWideStack([&] { result = library.BuildProgram(program, 1, &device.handle, options.c_str(), nullptr, nullptr); });
  Status status;
  if (result != cl::kSuccess) {
    status = library.Check(result, "clBuildProgram",
                           Text(" for ", RopeSpirvName(key), " on ", device.text, ", ",
                                device.spirv ? "which refuses the SPIR-V" : "which refuses the source",
                                "; its log: ", BuildLog(library, program, device.handle)));
  } else {
    cl::Int created = cl::kSuccess;
    *kernel = library.CreateKernel(program, RopeSpirvFunction(key), &created);
    status = library.Check(created, "clCreateKernel", " for ", RopeSpirvName(key), " on ", device.text);
  }
  if (keep && status.ok()) {
    *keep = program;
  } else {
    library.ReleaseProgram(program);  // the kernel keeps it
  }
  *milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  return status;
}

Status BuildOpenClKernel(void* context, void* device, const RopeSpirvKey& key, SpirvKernel* kernel) {
  const OpenClLibrary* library = nullptr;
  OpenClDevice described;
  ROPEWALK_TRY(Describe(device, &library, &described));
  cl::Kernel built = nullptr;
  cl::Program program = nullptr;  // kept: Intel's CPU run-time no longer tells a kernel's program once it is released
  double milliseconds = 0;
  ROPEWALK_TRY(
      BuildOpenClKernel(*library, static_cast<cl::Context>(context), described, key, &built, &milliseconds, &program));
  kernel->module = program;
  kernel->function = built;
  return {};
}

Status OpenClProperties(void* device, SpirvDevice* out) {
  const OpenClLibrary* library = nullptr;
  OpenClDevice described;
  ROPEWALK_TRY(Describe(device, &library, &described));
  *out = described.properties;
  return {};
}

}  // namespace ropewalk
