// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/context.h"

#include <dlfcn.h>

#include <algorithm>

#include "backends/contexts.h"
#include "backends/cuda/tuned.h"
#include "backends/driver_library.h"
#include "base/fork.h"
#include "base/text.h"
#include "rope/fault_text.h"

namespace ropewalk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The driver

constexpr const char* kInstallDriver = "install the NVIDIA driver";

[[gnu::cold]] Status Load(CudaDriver* driver) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Helpers of its contexts

namespace {

// Lets this thread allocate and load while streams are being captured. Nothing that it does becomes part of a capture.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaDriver& driver) : driver_(driver) { driver_.ExchangeCaptureMode(&mode_); }
  ~RelaxedCapture() { driver_.ExchangeCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const CudaDriver& driver_;
  int mode_ = cu::kCaptureModeRelaxed;
};

constinit ContextLists<CudaContext> contexts_met;  // `own`: the primary one
const OnFork kForgetContexts([] { contexts_met.Forget(); });

auto& ContextsOf(int ordinal) { return contexts_met.All(GetCudaDriver().devices.size())[static_cast<size_t>(ordinal)]; }

CudaContext* FindOther(const ContextLists<CudaContext>::OfDevice& contexts, cu::Context handle) {
  return contexts.FindOther([&](const CudaContext& context) { return context.handle == handle && context.Alive(); });
}

// The primary context; retained for good, so that its handle stays what it is.
Status Primary(const CudaDriver& driver, int ordinal, CudaContext** out) {
  auto& contexts = ContextsOf(ordinal);
  const std::lock_guard lock(contexts_met.mutex);
  if (!contexts.own.load(std::memory_order_relaxed)) {
    cu::Context handle = nullptr;
    ROPEWALK_TRY(driver.Check(driver.PrimaryCtxRetain(&handle, driver.devices[static_cast<size_t>(ordinal)].handle),
                              "cuDevicePrimaryCtxRetain"));
    contexts.own.store(new CudaContext(driver, ordinal, handle, 0, true), std::memory_order_release);
  }
  *out = contexts.own.load(std::memory_order_relaxed);
  return {};
}

// The caller's current context on the device, met for the first time.
Status Adopt(const CudaDriver& driver, int ordinal, cu::Context handle, CudaContext** out) {
  const cu::Device device = driver.devices[static_cast<size_t>(ordinal)].handle;
  unsigned flags = 0;
  int active = 0;
  ROPEWALK_TRY(driver.Check(driver.PrimaryCtxGetState(device, &flags, &active), "cuDevicePrimaryCtxGetState"));
  if (active) {
    cu::Context primary = nullptr;
    ROPEWALK_TRY(driver.Check(driver.PrimaryCtxRetain(&primary, device), "cuDevicePrimaryCtxRetain"));
    driver.PrimaryCtxRelease(device);
    if (primary == handle) return Primary(driver, ordinal, out);
  }
  auto& contexts = ContextsOf(ordinal);
  const std::lock_guard lock(contexts_met.mutex);
  if ((*out = FindOther(contexts, handle))) return {};
  unsigned long long id = 0;
  ROPEWALK_TRY(driver.Check(driver.CtxGetId(handle, &id), "cuCtxGetId"));
  *out = new CudaContext(driver, ordinal, handle, id, false);
  contexts.AddOther(*out);
  return {};
}

}  // namespace

bool CudaContext::Alive() const {
  unsigned long long now = 0;
  return primary || (driver.CtxGetId(handle, &now) == cu::kSuccess && now == id);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

Status CudaContext::LoadKernel(const RopeCudaKey& key) {
  for (bool no_disk = false;; no_disk = true) {
    // Not under the lock: other variants may compile meanwhile.
    std::shared_ptr<const Cubin> cubin;
    ROPEWALK_TRY(GetCubin(key, device().properties, no_disk, &cubin));
    const std::lock_guard lock(mutex_);
    if (kernels_.Find(key)) return {};
    const RelaxedCapture relaxed(driver);
    ROPEWALK_TRY(Prepare());
    cu::Module module = nullptr;
    const cu::Result result = driver.ModuleLoadData(&module, cubin->bytes.data());
    const bool unfit =
        result == cu::kInvalidImage || result == cu::kNoBinaryForGpu || result == cu::kUnsupportedPtxVersion;
    if (unfit && !no_disk && cubin->source.starts_with("disk ")) continue;  // made for another driver: compile again
    ROPEWALK_TRY(driver.Check(result, "cuModuleLoadData",
                              Text(" for ", RopeCudaName(key), ", ", cubin->source,
                                   unfit ? Text("; the driver is for CUDA ", CudaVersionText(driver.version),
                                                ": use an NVRTC no newer than that (ROPEWALK_LIBNVRTC)")
                                         : "")));
    auto kernel = std::make_unique<CudaKernel>();
    kernel->key = key;
    kernel->name = RopeCudaName(key);
    kernel->source = cubin->source;
    Status status =
        driver.Check(driver.ModuleGetFunction(&kernel->function, module, RopeCudaFunction(key)), "cuModuleGetFunction");
    for (const auto& [attribute, value] : {std::pair{cu::kNumRegs, &kernel->registers},
                                           {cu::kLocalSizeBytes, &kernel->local_bytes},
                                           {cu::kSharedSizeBytes, &kernel->shared_bytes}}) {
      if (status.ok())
        status = driver.Check(driver.FuncGetAttribute(value, attribute, kernel->function), "cuFuncGetAttribute");
    }
    if (!status.ok()) {
      driver.ModuleUnload(module);
      return status;
    }
    kernels_.Insert(std::move(kernel));
    return {};
  }
}

void CudaContext::ForEachKernel(const std::function<void(const CudaKernel&)>& visit) const {
  const std::lock_guard lock(mutex_);
  for (const auto& kernel : kernels_.all()) visit(*kernel);
}

// ---------------------------------------------------------------------------------------------------------------------
// Frequencies

cu::DevicePtr CudaContext::FindFrequencies(const ropewalk_frequencies& frequencies) {
  if (const cu::DevicePtr address = frequencies_.Find(frequencies)) return address;
  const std::lock_guard lock(mutex_);
  return frequencies_.FindEqual(frequencies);
}

Status CudaContext::UploadFrequencies(const ropewalk_frequencies& frequencies) {
  const std::lock_guard lock(mutex_);
  if (frequencies_.FindEqual(frequencies)) return {};
  const RelaxedCapture relaxed(driver);
  ROPEWALK_TRY(Prepare());
  const std::string bytes = DeviceCopyOf(frequencies);
  cu::DevicePtr address = 0;
  ROPEWALK_TRY(Allocate(bytes.size(), &address));
  ROPEWALK_TRY(CopyIn(address, bytes.data(), bytes.size()));
  frequencies_.Keep(frequencies, address);
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory and faults

Status CudaContext::Allocate(size_t bytes, cu::DevicePtr* out) {
  constexpr size_t kAlignment = 256, kSlabBytes = 64 * 1024;
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (slab_bytes_ < bytes) {
    const size_t size = std::max(bytes, kSlabBytes);
    cu::DevicePtr slab = 0;
    ROPEWALK_TRY(driver.Check(driver.MemAlloc(&slab, size), "cuMemAlloc", Text(" for ", size, " bytes")));
    slab_ = slab;
    slab_bytes_ = size;
  }
  *out = slab_;
  slab_ += bytes;
  slab_bytes_ -= bytes;
  return {};
}

Status CudaContext::CopyIn(cu::DevicePtr to, const void* from, size_t bytes) {
  ROPEWALK_TRY(driver.Check(driver.MemcpyHtoDAsync(to, from, bytes, stream_), "cuMemcpyHtoDAsync"));
  return driver.Check(driver.StreamSynchronize(stream_), "cuStreamSynchronize");
}

Status CudaContext::ResetFaults() {
  const auto none = NoRopeFaults();
  return CopyIn(faults_, none.data(), sizeof(none));
}

Status CudaContext::Prepare() {
  if (!stream_) ROPEWALK_TRY(driver.Check(driver.StreamCreate(&stream_, cu::kStreamNonBlocking), "cuStreamCreate"));
  if (faults_) return {};
  ROPEWALK_TRY(Allocate(sizeof(rope_fault) * kRopeFaultRecords, &faults_));
  Status status = ResetFaults();
  if (!status.ok()) faults_ = 0;
  return status;
}

Status CudaContext::TakeFaults(std::string* text) {
  const std::lock_guard lock(mutex_);
  if (!faults_ || !launched.exchange(false)) return {};
  std::array<rope_fault, kRopeFaultRecords> faults;
  Status status = driver.Check(driver.CtxSynchronize(), "cuCtxSynchronize");
  if (status.ok()) {
    status = driver.Check(driver.MemcpyDtoHAsync(faults.data(), faults_, sizeof(faults), stream_), "cuMemcpyDtoHAsync");
  }
  if (status.ok()) status = driver.Check(driver.StreamSynchronize(stream_), "cuStreamSynchronize");
  if (!status.ok()) {
    launched.store(true);  // the next call asks again
    return status;
  }
  *text = RopeFaultText(faults);
  return text->empty() ? Status() : ResetFaults();
}

// ---------------------------------------------------------------------------------------------------------------------
// Which context

CudaContextScope::~CudaContextScope() {
  cu::Context popped = nullptr;
  if (pushed_) context_->driver.CtxPopCurrent(&popped);
}

Status CudaContextScope::Enter(const CudaDriver& driver, int ordinal) {
  const auto& contexts = ContextsOf(ordinal);
  cu::Context current = nullptr;
  ROPEWALK_TRY(driver.Check(driver.CtxGetCurrent(&current), "cuCtxGetCurrent"));
  CudaContext* primary = contexts.own.load(std::memory_order_acquire);
  if (current && primary && primary->handle == current) {
    context_ = primary;
    return {};
  }
  if (current) {
    if ((context_ = FindOther(contexts, current))) return {};
    cu::Device device = -1;
    ROPEWALK_TRY(driver.Check(driver.CtxGetDevice(&device), "cuCtxGetDevice"));
    if (device == driver.devices[static_cast<size_t>(ordinal)].handle)
      return Adopt(driver, ordinal, current, &context_);
  }
  if (!primary) ROPEWALK_TRY(Primary(driver, ordinal, &primary));
  return Enter(primary);
}

Status CudaContextScope::Enter(CudaContext* context) {
  ROPEWALK_TRY(context->driver.Check(context->driver.CtxPushCurrent(context->handle), "cuCtxPushCurrent"));
  context_ = context;
  pushed_ = true;
  return {};
}

void ForEachCudaContext(const std::function<void(CudaContext*)>& visit) {
  if (!CudaDriverWasLoaded()) return;
  contexts_met.ForEach(GetCudaDriver().devices.size(), visit);
}

}  // namespace ropewalk
