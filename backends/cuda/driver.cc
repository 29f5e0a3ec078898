// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/driver.h"

#include <dlfcn.h>

#include "backends/cuda/tuned.h"
#include "backends/driver_library.h"
#include "base/text.h"

namespace ropewalk {
namespace {

constexpr const char* kInstallDriver = "install the NVIDIA driver";

Status Load(CudaDriver* driver) {
  std::string why;
  driver->remedy = kInstallDriver;
  void* library = OpenLibrary("ROPEWALK_LIBCUDA", "libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", &driver->path, &why);
  if (!library) return Status::Unavailable(why);
#define ROPEWALK_FIND(name, symbol, ...)                                           \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, symbol)); \
  if (!driver->name && why.empty()) why = symbol;
  ROPEWALK_CUDA_FUNCTIONS(ROPEWALK_FIND)
#undef ROPEWALK_FIND
  if (!why.empty()) {
    if (driver->DriverGetVersion) driver->DriverGetVersion(&driver->version);
    driver->remedy = "install an NVIDIA driver for CUDA 12.0 or newer";
    return Status::Unavailable(
        Text(driver->path, " (CUDA ", CudaVersionText(driver->version), ") is too old: it has no ", why));
  }
  if (const Status status = driver->Check(driver->Init(0), "cuInit"); !status.ok()) {
    driver->remedy = Text("check that nvidia-smi sees a GPU, and CUDA_VISIBLE_DEVICES");
    return Status::Unavailable(Text(driver->path, ": ", status.text().substr(sizeof("rope: ") - 1)));
  }
  ROPEWALK_TRY(driver->Check(driver->DriverGetVersion(&driver->version), "cuDriverGetVersion"));
  int count = 0;
  ROPEWALK_TRY(driver->Check(driver->DeviceGetCount(&count), "cuDeviceGetCount"));
  for (int i = 0; i < count; ++i) {
    CudaDeviceInfo info;
    char name[256] = "";
    ROPEWALK_TRY(driver->Check(driver->DeviceGet(&info.handle, i), "cuDeviceGet"));
    ROPEWALK_TRY(driver->Check(driver->DeviceGetName(name, sizeof(name), info.handle), "cuDeviceGetName"));
    info.name = name;
    info.properties.measured = info.name.find("H200") != std::string::npos;
    for (const auto& [attribute, value] : {std::pair{cu::kMultiprocessorCount, &info.properties.sm_count},
                                           {cu::kComputeCapabilityMajor, &info.properties.major},
                                           {cu::kComputeCapabilityMinor, &info.properties.minor}}) {
      ROPEWALK_TRY(driver->Check(driver->DeviceGetAttribute(value, attribute, info.handle), "cuDeviceGetAttribute"));
    }
    info.properties.tuned = LoadTunedShapes(info.name, driver->version);
    driver->devices.push_back(std::move(info));
  }
  if (driver->devices.empty()) return Status::Unavailable(Text(driver->path, " sees no GPU"));
  driver->remedy.clear();
  return {};
}

}  // namespace

Status CudaDriver::Check(cu::Result result, const char* call, const std::string& context) const {
  if (result == cu::kSuccess) return {};
  const char* error_name = nullptr;
  const char* error_text = nullptr;
  if (GetErrorName(result, &error_name) != cu::kSuccess) error_name = nullptr;
  if (GetErrorString(result, &error_text) != cu::kSuccess) error_text = nullptr;
  return Status::Driver(Text("rope: ", call, " failed: ", error_name ? error_name : Text("CUDA error ", result).c_str(),
                             error_text ? Text(" (", error_text, ")") : "", context));
}

const CudaDriver& GetCudaDriver() { return Once<CudaDriver, Load>::Get(); }
bool CudaDriverWasLoaded() { return Once<CudaDriver, Load>::WasLoaded(); }

std::string CudaVersionText(int version) { return Text(version / 1000, ".", version % 1000 / 10); }

std::string CudaArchText(const CudaDevice& properties) { return Text("sm_", properties.major, properties.minor); }

}  // namespace ropewalk
