// SPDX-License-Identifier: Apache-2.0
#include "backends/opencl/library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "backends/driver_library.h"
#include "base/environment.h"
#include "base/text.h"

namespace ropewalk {
namespace {

constexpr const char* kInstallLoader =
    "install an OpenCL loader and a driver (Debian, Ubuntu: apt-get install ocl-icd-libopencl1)";

// Those that a user may meet; the others go by their number.
const char* ErrorName(cl::Int code) {
  switch (code) {
    case -1: return "CL_DEVICE_NOT_FOUND";
    case -3: return "CL_COMPILER_NOT_AVAILABLE";
    case -4: return "CL_MEM_OBJECT_ALLOCATION_FAILURE";
    case -5: return "CL_OUT_OF_RESOURCES";
    case -6: return "CL_OUT_OF_HOST_MEMORY";
    case -11: return "CL_BUILD_PROGRAM_FAILURE";
    case -30: return "CL_INVALID_VALUE";
    case -33: return "CL_INVALID_DEVICE";
    case -34: return "CL_INVALID_CONTEXT";
    case -36: return "CL_INVALID_COMMAND_QUEUE";
    case -38: return "CL_INVALID_MEM_OBJECT";
    case -42: return "CL_INVALID_BINARY";
    case -43: return "CL_INVALID_BUILD_OPTIONS";
    case -44: return "CL_INVALID_PROGRAM";
    case -46: return "CL_INVALID_KERNEL_NAME";
    case -49: return "CL_INVALID_ARG_INDEX";
    case -50: return "CL_INVALID_ARG_VALUE";
    case -51: return "CL_INVALID_ARG_SIZE";
    case -52: return "CL_INVALID_KERNEL_ARGS";
    case -54: return "CL_INVALID_WORK_GROUP_SIZE";
    case -55: return "CL_INVALID_WORK_ITEM_SIZE";
    case -59: return "CL_INVALID_OPERATION";
    case -71: return "CL_INVALID_SPEC_ID";
    case -1001: return "CL_PLATFORM_NOT_FOUND_KHR";
    default: return nullptr;
  }
}

template <class Value>
Value Info(const OpenClLibrary& library, cl::Device device, cl::Uint what) {
  Value value{};
  if (library.GetDeviceInfo(device, what, sizeof(value), &value, nullptr) != cl::kSuccess) return Value{};
  return value;
}

// `get(bytes, buffer, &bytes_needed)`.
template <class Get>
std::string TextInfo(const Get& get) {
  size_t size = 0;
  if (get(size_t{0}, nullptr, &size) != cl::kSuccess || size == 0) return "";
  std::string text(size, '\0');
  if (get(size, text.data(), nullptr) != cl::kSuccess) return "";
  return text.c_str();
}

bool SubGroupsOf16(const OpenClLibrary& library, cl::Device device) {
  size_t size = 0;
  if (library.GetDeviceInfo(device, cl::kSubGroupSizes, 0, nullptr, &size) != cl::kSuccess) return false;
  std::vector<size_t> sizes(size / sizeof(size_t));
  if (sizes.empty() || library.GetDeviceInfo(device, cl::kSubGroupSizes, size, sizes.data(), nullptr) != cl::kSuccess) {
    return false;
  }
  return std::ranges::find(sizes, size_t{ROPE_SUB_GROUP}) != sizes.end();
}

Status Load(OpenClLibrary* library) {
  std::string why;
  library->remedy = kInstallLoader;
  void* handle = OpenLibrary("ROPEWALK_LIBOPENCL", "libOpenCL.so.1", nullptr, &library->path, &why);
  if (!handle) return Status::Unavailable(why);
  const auto find = [&](auto* function, const char* symbol, bool needed) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(handle, symbol));
    if (!*function && needed && why.empty()) why = symbol;
  };
#define ROPEWALK_FIND(name, symbol, ...) find(&library->name, symbol, true);
  ROPEWALK_OPENCL_FUNCTIONS(ROPEWALK_FIND)
#undef ROPEWALK_FIND
  find(&library->CreateContext, "clCreateContext", true);
  find(&library->CreateQueue, "clCreateCommandQueueWithProperties", true);
  find(&library->CreateProgramWithSource, "clCreateProgramWithSource", true);
  find(&library->CreateKernel, "clCreateKernel", true);
  find(&library->SvmAlloc, "clSVMAlloc", true);
  find(&library->GetExtension, "clGetExtensionFunctionAddressForPlatform", true);
  find(&library->CreateProgramWithIl, "clCreateProgramWithIL", false);
  find(&library->SetProgramSpecializationConstant, "clSetProgramSpecializationConstant", false);
  if (!why.empty()) {
    library->remedy = "install an OpenCL loader for OpenCL 2.0 or newer";
    return Status::Unavailable(Text(library->path, " is too old: it has no ", why));
  }

  library->remedy =
      "install a driver for OpenCL (Intel GPUs: intel-opencl-icd; any CPU: pip install intel-opencl-rt "
      "intel-cmplr-lib-rt, or pocl-opencl-icd)";
  cl::Uint count = 0;
  const cl::Int platforms_result = library->GetPlatformIDs(0, nullptr, &count);
  if (platforms_result == cl::kNoPlatforms || (platforms_result == cl::kSuccess && count == 0)) {
    return Status::Unavailable(Text(library->path, " finds no driver"));
  }
  ROPEWALK_TRY(library->Check(platforms_result, "clGetPlatformIDs"));
  std::vector<cl::Platform> platforms(count);
  ROPEWALK_TRY(library->Check(library->GetPlatformIDs(count, platforms.data(), nullptr), "clGetPlatformIDs"));
  const char* wanted = EnvironmentVariable("ROPEWALK_OPENCL_DEVICE");
  std::string others;
  for (const cl::Platform platform : platforms) {
    cl::Uint device_count = 0;
    if (library->GetDeviceIDs(platform, cl::kAnyType, 0, nullptr, &device_count) != cl::kSuccess) continue;
    std::vector<cl::Device> devices(device_count);
    if (library->GetDeviceIDs(platform, cl::kAnyType, device_count, devices.data(), nullptr) != cl::kSuccess) continue;
    for (const cl::Device device : devices) {
      OpenClDevice described = DescribeOpenClDevice(*library, platform, device);
      if (wanted && *wanted && described.text.find(wanted) == std::string::npos) {
        Append(&others, Text(others.empty() ? "" : ", ", described.text));
        continue;
      }
      library->devices.push_back(std::move(described));
    }
  }
  if (library->devices.empty()) {
    if (!others.empty()) {
      library->remedy = "unset ROPEWALK_OPENCL_DEVICE, or give it a part of a device's name";
      return Status::Unavailable(
          Text("ROPEWALK_OPENCL_DEVICE is \"", wanted, "\", but the devices of ", library->path, " are ", others));
    }
    return Status::Unavailable(Text(library->path, " sees no device"));
  }
  std::ranges::stable_sort(library->devices, {}, [](const OpenClDevice& device) {
    return (device.refusal.empty() ? 0 : 2) + (device.gpu ? 0 : 1);
  });
  if (const OpenClDevice& best = library->devices.front(); !best.refusal.empty()) {
    return Status::Unavailable(Text(best.text, " ", best.refusal));
  }
  library->remedy.clear();
  return {};
}

}  // namespace

OpenClDevice DescribeOpenClDevice(const OpenClLibrary& library, cl::Platform platform, cl::Device device) {
  OpenClDevice d;
  d.platform = platform;
  d.handle = device;
  const auto text = [&](cl::Uint what) {
    return TextInfo([&](size_t bytes, void* buffer, size_t* needed) {
      return library.GetDeviceInfo(device, what, bytes, buffer, needed);
    });
  };
  const std::string platform_name = TextInfo([&](size_t bytes, void* buffer, size_t* needed) {
    return library.GetPlatformInfo(platform, cl::kPlatformName, bytes, buffer, needed);
  });
  d.name = text(cl::kDeviceName);
  d.gpu = Info<cl::Bits>(library, device, cl::kDeviceType) & cl::kGpu;
  const bool cpu = Info<cl::Bits>(library, device, cl::kDeviceType) & cl::kCpu;
  const auto svm = Info<cl::Bits>(library, device, cl::kSvmCapabilities);
  const std::string extensions = text(cl::kDeviceExtensions);
  d.system_memory = svm & cl::kFineGrainSystem;
  d.usm = extensions.find("cl_intel_unified_shared_memory") != std::string::npos;
  // ROPEWALK_OPENCL_SOURCE=1 asks for the kernel's text where SPIR-V would serve too.
  const char* source = EnvironmentVariable("ROPEWALK_OPENCL_SOURCE");
  const bool takes_spirv = text(cl::kIlVersion).find("SPIR-V") != std::string::npos && library.CreateProgramWithIl &&
                           library.SetProgramSpecializationConstant && !*RopeSpirvMissing() &&
                           !(source && std::string_view(source) == "1");
  // The modules shuffle by SPV_INTEL_subgroups, and convert 16-bit floats as such.
  const bool sub_groups = SubGroupsOf16(library, device) && extensions.find("cl_intel_subgroups") != std::string::npos;
  const bool float16 = extensions.find("cl_khr_fp16") != std::string::npos;
  d.spirv = takes_spirv && sub_groups && float16;
  const auto units = static_cast<int>(Info<cl::Uint>(library, device, cl::kMaxComputeUnits));
  d.properties.threads = d.gpu ? units * 8 : units;
  // A CPU takes a second for a build. ROPEWALK_OPENCL_GENERAL=0 asks for the exact variants there too.
  const char* general = EnvironmentVariable("ROPEWALK_OPENCL_GENERAL");
  d.properties.general = general && *general ? std::string_view(general) != "0" : !d.gpu;
  // Without sub-groups a work-group is what a sub-group would be.
  d.properties.max_local =
      d.spirv ? static_cast<int>(std::min<size_t>(Info<size_t>(library, device, cl::kMaxWorkGroupSize), 128))
              : ROPE_SUB_GROUP;
  d.text = Text(d.name, " (",
                d.gpu ? "GPU"
                : cpu ? "CPU"
                      : "accelerator",
                ", ", platform_name, " ", text(cl::kDriverVersion), d.spirv ? ", SPIR-V" : ", from source", ")");
  if (Info<cl::Uint>(library, device, cl::kAddressBits) != 64) {
    d.refusal = "has no 64-bit addresses";
  } else if (!d.system_memory && !d.usm && !svm) {
    d.refusal = "has neither shared virtual memory nor cl_intel_unified_shared_memory";
  } else if (!d.spirv && !Info<cl::Uint>(library, device, cl::kCompilerAvailable)) {
    d.refusal = *RopeSpirvMissing() ? "has no compiler, and this Ropewalk no SPIR-V"
                : !takes_spirv      ? "takes no SPIR-V and has no compiler"
                : !sub_groups       ? "has no sub-groups of 16 and no compiler"
                                    : "has no 16-bit floats (cl_khr_fp16) and no compiler";
  }
  return d;
}

Status OpenClLibrary::Failure(cl::Int result, const char* call, const std::string& context) {
  const char* name = ErrorName(result);
  return Status::Driver(Text("rope: ", call, " failed: ", name ? Text(name) : Text("OpenCL error ", result), context));
}

const OpenClLibrary& GetOpenCl() { return Once<OpenClLibrary, Load>::Get(); }
bool OpenClWasLoaded() { return Once<OpenClLibrary, Load>::WasLoaded(); }

}  // namespace ropewalk
