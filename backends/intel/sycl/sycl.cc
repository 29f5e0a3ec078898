// SPDX-License-Identifier: Apache-2.0
#include "backends/intel/sycl/sycl.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "backends/contexts.h"
#include "backends/intel/level_zero/context.h"
#include "backends/intel/sycl/shim.h"
#include "backends/known_pages.h"
#include "backends/opencl/build.h"
#include "base/environment.h"
#include "base/fork.h"
#include "base/text.h"

namespace ropewalk {
namespace {

constexpr int kSyclVersions[] = {9, 8};  // libsycl.so.9: compilers of 2026, .so.8: of 2025

// ---------------------------------------------------------------------------------------------------------------------
// The shim

std::string LibSycl(int version) { return Text("libsycl.so.", version); }

bool IsLoaded(int version) { return dlopen(LibSycl(version).c_str(), RTLD_LAZY | RTLD_NOLOAD) != nullptr; }

// Beside the library that holds this code. If that is a program, in lib/ beside its bin/, or in the Python package that
// it was installed with. The first place, if it is nowhere.
std::string ShimPath(int version) {
  namespace fs = std::filesystem;
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&ShimPath), &info) || !info.dli_fname) return "";
  std::error_code ignored;
  fs::path file = info.dli_fname;
  // A program that was found in PATH goes by its bare name.
  if (!file.has_parent_path() || !fs::exists(file, ignored)) file = fs::read_symlink("/proc/self/exe", ignored);
  const fs::path here = file.parent_path(), lib = here / "../lib";
  const std::string name = Text("libropewalk_sycl", version, ".so");
  std::vector<fs::path> places = {here, here / "..", lib, lib / "x86_64-linux-gnu", here / "../lib64"};
  for (const fs::directory_entry& entry : fs::directory_iterator(lib, ignored)) {
    if (!entry.path().filename().string().starts_with("python")) continue;
    for (const char* packages : {"site-packages", "dist-packages"}) {
      places.push_back(entry.path() / packages / "ropewalk");
    }
  }
  for (const fs::path& place : places) {
    if (fs::exists(place / name, ignored)) return (place / name).string();
  }
  return (here / name).string();
}

const char* NamedShim() {
  const char* named = EnvironmentVariable("ROPEWALK_LIBSYCL_SHIM");
  return named && *named ? named : nullptr;
}

bool HasShim(int version) {
  std::error_code ignored;
  return NamedShim() || std::filesystem::exists(ShimPath(version), ignored);
}

Status FindShim(std::string* path) {
  if (const char* named = NamedShim()) {
    *path = named;
    return {};
  }
  std::string loaded;
  for (const int version : kSyclVersions) {
    if (!IsLoaded(version)) continue;
    if (!loaded.empty()) {
      return Status::Unavailable(Text("rope: sycl_queue is given, but ", loaded, " and ", LibSycl(version),
                                      " are both loaded, and a queue does not say whose it is; set "
                                      "ROPEWALK_LIBSYCL_SHIM to the libropewalk_sycl*.so of the right one"));
    }
    loaded = LibSycl(version);
    *path = ShimPath(version);
  }
  if (loaded.empty()) {
    return Status::Unavailable("rope: sycl_queue is given, but neither libsycl.so.9 nor libsycl.so.8 is loaded here");
  }
  std::error_code ignored;
  if (std::filesystem::exists(*path, ignored)) return {};
  return Status::Unavailable(Text("rope: sycl_queue is given, but this build of Ropewalk has no ", *path, " for ",
                                  loaded, "; build it where SYCL's headers are installed (pip install intel-sycl-rt)"));
}

std::mutex opening_mutex;
std::atomic<const SyclShim*> opened{nullptr};  // once it is there, it stays
const OnFork kForgetOpening([] { new (&opening_mutex) std::mutex; });

Status OpenShim(const SyclShim** out) {
  if ((*out = opened.load(std::memory_order_acquire))) return {};
  const std::lock_guard lock(opening_mutex);
  std::string path;
  ROPEWALK_TRY(FindShim(&path));
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return Status::Unavailable(Text("rope: ", path, " cannot be opened: ", dlerror()));
  auto* function = reinterpret_cast<SyclShimFunction*>(dlsym(library, "ropewalk_sycl_shim"));
  const SyclShim* shim = function ? function() : nullptr;
  if (!shim || shim->version != kSyclShimVersion) {
    return Status::Unavailable(Text("rope: ", path, " is not of this version of Ropewalk"));
  }
  opened.store(shim, std::memory_order_release);
  *out = shim;
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// What is kept for a context and device of SYCL

Status Failed(const char* what, const char* error, const std::string& device) {
  return Status::Driver(Text("rope: ", what, " failed on the SYCL queue of ", device, ": ", error));
}

class SyclContext final : public SpirvContext {
 public:
  SyclContext(const SyclShim& shim, void* entry, const SyclQueueInfo& info, SpirvDevice device)
      : SpirvContext(Text(info.device_name, ", ", info.backend_name), device),
        shim_(shim),
        entry_(entry),
        info_(info) {}

  const SyclQueueInfo& info() const { return info_; }
  SyclContext* next = nullptr;
  KnownPages<12> pages;

 protected:
  // The kernel of the backend is built with its specialisation constants, then wrapped as SYCL's.
  Status Build(const RopeSpirvKey& key, SpirvKernel* kernel) override {
    if (info_.backend == kSyclLevelZero) {
      const LevelZeroDriver& driver = GetLevelZeroDriver();
      if (!driver.status.ok()) {
        return Status(driver.status.code(), Text("rope: Level Zero is not available: ", driver.status.text()));
      }
      ROPEWALK_TRY(BuildLevelZeroKernel(driver, static_cast<ze::Context>(info_.context),
                                        static_cast<ze::Device>(info_.device), key, kernel));
    } else {
      ROPEWALK_TRY(BuildOpenClKernel(info_.context, info_.device, key, kernel));
    }
    char error[kSyclErrorBytes];
    void* wrapped = nullptr;
    if (shim_.wrap(entry_, kernel->module, kernel->function, &wrapped, error)) {
      return Failed("taking over a kernel", error, device_name);
    }
    kernel->function = wrapped;
    return {};
  }
  Status Allocate(size_t bytes, void** out) override {
    char error[kSyclErrorBytes];
    return shim_.allocate(entry_, bytes, out, error) ? Failed("an allocation", error, device_name) : Status();
  }
  Status CopyIn(void* to, const void* from, size_t bytes) override { return Copy(to, from, bytes); }
  Status CopyOut(void* to, const void* from, size_t bytes) override { return Copy(to, from, bytes); }
  Status Wait() override {
    char error[kSyclErrorBytes];
    return shim_.wait(error) ? Failed("waiting", error, device_name) : Status();
  }

 private:
  Status Copy(void* to, const void* from, size_t bytes) {
    char error[kSyclErrorBytes];
    return shim_.copy(entry_, to, from, bytes, error) ? Failed("a copy", error, device_name) : Status();
  }

  const SyclShim& shim_;
  void* const entry_;  // of the first queue that had this context and device
  const SyclQueueInfo info_;
};

std::mutex contexts_mutex;
std::atomic<SyclContext*> contexts{nullptr};  // never freed

// A child of fork() has none of them: the driver's contexts are its parent's, and so are threads that hold their locks.
const OnFork kForgetContexts([] {
  new (&contexts_mutex) std::mutex;
  contexts.store(nullptr);
});

SyclContext* FindContext(const SyclQueueInfo& info) {
  for (SyclContext* c = contexts.load(std::memory_order_acquire); c; c = c->next) {
    if (c->info().context == info.context && c->info().device == info.device) return c;
  }
  return nullptr;
}

struct Queue {
  const SyclShim* shim = nullptr;
  void* entry = nullptr;
  SyclContext* context = nullptr;
};

Status DeviceOf(const SyclQueueInfo& info, SpirvDevice* out) {
  if (info.backend == kSyclOpenCl) return OpenClProperties(info.device, out);
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  if (!driver.status.ok()) {
    return Status(driver.status.code(),
                  Text("rope: sycl_queue is of Level Zero, but Level Zero is not available: ", driver.status.text()));
  }
  LevelZeroDevice device;
  ROPEWALK_TRY(DescribeLevelZeroDevice(driver, nullptr, static_cast<ze::Device>(info.device), &device));
  if (!device.unfit.empty()) {
    return Status::Unavailable(
        Text("rope: sycl_queue is on ", info.device_name, ", which ", device.unfit, "; move the tensors to the CPU"));
  }
  *out = device.properties;
  return {};
}

Status Enter(const RopeCall& call, Queue* out) {
  ROPEWALK_TRY(OpenShim(&out->shim));
  const SyclQueueInfo* info = nullptr;
  char error[kSyclErrorBytes];
  if (out->shim->find(call.sycl_queue, &out->entry, &info, error)) {
    return Status::Driver(Text("rope: sycl_queue cannot be used: ", error));
  }
  if (info->backend == kSyclOther) {
    return Status::Invalid(Text("rope: sycl_queue must be of Level Zero or OpenCL, but is of ", info->backend_name,
                                " (", info->device_name, ")"));
  }
  if ((out->context = FindContext(*info))) return {};
  const std::lock_guard lock(contexts_mutex);
  if ((out->context = FindContext(*info))) return {};
  SpirvDevice device;
  ROPEWALK_TRY(DeviceOf(*info, &device));
  out->context = new SyclContext(*out->shim, out->entry, *info, device);
  out->context->next = contexts.load(std::memory_order_relaxed);
  contexts.store(out->context, std::memory_order_release);
  return {};
}

// `call`: the tensors of a RopeCall, or a RopeBackwardCall.
template <class Call>
Status CheckPointers(const Queue& queue, const Call& call) {
  const auto ask = [&](const char* name, const void* pointer, bool* keep) -> Status {
    int32_t memory = kSyclUnknown;
    char error[kSyclErrorBytes];
    if (queue.shim->memory_of(queue.entry, pointer, &memory, error)) {
      return Failed(Text("asking about ", name).c_str(), error, queue.context->device_name);
    }
    if (memory == kSyclUnknown) {
      return Status::Invalid(Text("rope: ", name, " must be unified shared memory of the context of sycl_queue (",
                                  queue.context->device_name, "), but its data is not"));
    }
    if (memory == kSyclOtherDevice) {
      return Status::Invalid(Text("rope: ", name, " must be on the device of sycl_queue (", queue.context->device_name,
                                  "), but its data is on another one"));
    }
    *keep = true;
    return {};
  };
  return queue.context->pages.Check(call, 0, ask);
}

Status Launch(const Queue& queue, SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args) {
  SyclArgument arguments[kRopeSpirvArguments];
  for (uint32_t i = 0; i < args.count; ++i) arguments[i] = {&args.pointers[i], sizeof(void*), 1};
  arguments[args.count] = {args.data(), args.bytes, 0};
  char error[kSyclErrorBytes];
  if (queue.shim->launch(queue.entry, kernel->function, arguments, args.count + 1, grid.groups, grid.local, error)) {
    return Failed("the launch", error, queue.context->device_name);
  }
  CountLaunch(queue.context, kernel);
  return {};
}

}  // namespace

Status SyclLaunch(const RopeCall& call) {
  Queue queue;
  ROPEWALK_TRY(Enter(call, &queue));
  RopeSpirvPlan plan;
  ROPEWALK_TRY(PlanRopeSpirv(call, queue.context->properties, &plan));
  if (plan.empty()) return {};
  ROPEWALK_TRY(CheckPointers(queue, call.tensors));
  SpirvContext::Ready ready;
  ROPEWALK_TRY(queue.context->FindOrMake(call, plan, &ready));
  RopeSpirvArgs args;
  FillRopeSpirvArgs(call, plan, ready.frequencies, ready.fault, &args);
  return Launch(queue, ready.kernel, plan, args);
}

Status SyclLaunchBackward(const RopeBackwardCall& call) {
  Queue queue;
  ROPEWALK_TRY(Enter(call.turn, &queue));
  RopeSpirvBackwardPlan plan;
  ROPEWALK_TRY(PlanRopeSpirvBackward(call, queue.context->properties, &plan));
  if (plan.rows.empty() && plan.sums.empty()) return {};
  ROPEWALK_TRY(CheckPointers(queue, call));
  // The shim keeps its launches in order on any queue.
  return LaunchSpirvBackward(*queue.context, call, plan,
                             [&](SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args, bool) {
                               return Launch(queue, kernel, grid, args);
                             });
}

Status SyclBackwardWorkspace(const RopeBackwardCall& call, int64_t* elements) {
  Queue queue;
  ROPEWALK_TRY(Enter(call.turn, &queue));
  RopeSpirvBackwardPlan plan;
  ROPEWALK_TRY(PlanRopeSpirvBackward(call, queue.context->properties, &plan));
  *elements = plan.workspace;
  return {};
}

Status SyclPrepare(const RopeCall& call) {
  Queue queue;
  ROPEWALK_TRY(Enter(call, &queue));
  RopeSpirvPlan plan;
  ROPEWALK_TRY(PlanRopeSpirv(call, queue.context->properties, &plan));
  SpirvContext::Ready ready;
  return plan.empty() ? Status() : queue.context->FindOrMake(call, plan, &ready);
}

Status SyclExplain(const RopeCall& call, Explanation* explanation) {
  Queue queue;
  ROPEWALK_TRY(Enter(call, &queue));
  RopeSpirvPlan plan;
  ROPEWALK_TRY(PlanRopeSpirv(call, queue.context->properties, &plan));
  explanation->emplace_back("device", queue.context->device_name);
  explanation->emplace_back("queue", Text("SYCL (", queue.shim->sycl, ")"));
  ExplainSpirv("intel", call, plan, queue.context->FindKernel(plan.key), explanation);
  return {};
}

bool SyclIsLoaded() {
  return std::ranges::any_of(kSyclVersions, [](int version) { return HasShim(version) && IsLoaded(version); });
}

std::string SyclText(std::string* remedy) {
  std::string text;
  std::error_code ignored;
  if (const char* named = NamedShim()) {
    if (std::filesystem::exists(named, ignored)) return Text("SYCL queues by ROPEWALK_LIBSYCL_SHIM ", named);
    *remedy = "unset ROPEWALK_LIBSYCL_SHIM, or give it the path of a libropewalk_sycl*.so";
    return Text("no SYCL queues: ROPEWALK_LIBSYCL_SHIM is ", named, ", which is not there");
  }
  for (const int version : kSyclVersions) {
    if (HasShim(version)) Append(&text, Text(text.empty() ? "SYCL queues of " : " and ", LibSycl(version)));
  }
  if (!text.empty()) return text;
  *remedy = "for SYCL queues build Ropewalk where SYCL's headers are (scripts/setup.sh sycl, or ROPEWALK_SYCL_ROOTS)";
  return "no SYCL queues: this build has no shim for libsycl";
}

void ForEachSyclContext(const std::function<void(SpirvContext*)>& visit) {
  for (SyclContext* c = contexts.load(std::memory_order_acquire); c; c = c->next) visit(c);
}

}  // namespace ropewalk
