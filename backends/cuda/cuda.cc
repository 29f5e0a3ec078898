// The CUDA backend: finds the driver when first asked, compiles the exact variant, launches it on the caller's stream.
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <atomic>
#include <cstddef>
#include <optional>
#include <string_view>

#include "backends/contexts.h"
#include "backends/cuda/bundle.h"
#include "backends/cuda/cache.h"
#include "backends/cuda/context.h"
#include "backends/cuda/driver.h"
#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/nvrtc.h"
#include "backends/cuda/shapes.h"
#include "backends/known_pages.h"
#include "backends/registry.h"
#include "base/environment.h"
#include "base/text.h"

namespace ropewalk {
namespace {

constexpr int kOldestMajor = 8;  // sm_80

std::atomic<RopeCudaLayout> forced_layout{RopeCudaLayout::kAny};
constinit thread_local std::optional<RopeCudaShape> tried_shape;

// ROPEWALK_PDL=0 turns programmatic dependent launch off.
bool DependentLaunchAllowed() {
  static std::atomic<int> allowed{-1};
  int known = allowed.load(std::memory_order_relaxed);
  if (known < 0) {
    const char* value = EnvironmentVariable("ROPEWALK_PDL");
    allowed.store(known = !value || std::string_view(value) != "0", std::memory_order_relaxed);
  }
  return known != 0;
}

std::string DeviceText(const CudaDriver& driver, int ordinal) {
  const CudaDeviceInfo& info = driver.devices[static_cast<size_t>(ordinal)];
  return Text("cuda:", ordinal, " (", info.name, ", ", CudaArchText(info.properties), ")");
}

// The device of the call, if it can serve.
Status Usable(const CudaDriver& driver, const RopeCall& call) {
  ROPEWALK_TRY(Opened(driver, "CUDA", call));
  const int ordinal = call.device.device_id;
  const auto count = static_cast<int>(driver.devices.size());
  if (ordinal < 0 || ordinal >= count) {
    return Status::Invalid(Text("rope: q is on cuda:", ordinal, ", but this machine has ", count,
                                count == 1 ? " CUDA device" : " CUDA devices"));
  }
  if (driver.devices[static_cast<size_t>(ordinal)].properties.major < kOldestMajor) {
    return Status::Unavailable(Text("rope: q is on ", DeviceText(driver, ordinal),
                                    ", but sm_80 or newer is needed; move the tensors to the CPU"));
  }
  return {};
}

// Whether there is a compiler, or the kernel is loaded already. Once a compiler was found, later calls take no lock.
bool CanBeHad(const RopeCudaKey& key, const CudaDevice& device) {
  static constinit std::atomic<bool> compiler{false};
  if (compiler.load(std::memory_order_relaxed)) return true;
  NvrtcFile file;
  std::string source;
  if (!LocateNvrtc(&file).ok()) return FindCubinSource(key, device, &source).ok();
  compiler.store(true, std::memory_order_relaxed);
  return true;
}

Status Plan(const CudaDriver& driver, const RopeCall& call, RopeCudaLayout layout, RopeCudaPlan* plan) {
  ROPEWALK_TRY(Usable(driver, call));
  const CudaDevice& device = driver.devices[static_cast<size_t>(call.device.device_id)].properties;
  RopeCudaOptions options = {DependentLaunchAllowed() && !call.disable_pdl, layout};
  const std::optional<RopeCudaShape> tried = tried_shape;
  if (tried) options.shape = &*tried;
  ROPEWALK_TRY(PlanRopeCuda(call, device, options, plan));
  // Without a compiler only kernels of bundles serve.
  if (plan->grid_x && !tried && !CanBeHad(plan->key, device)) {
    options.rules = true;
    ROPEWALK_TRY(PlanRopeCuda(call, device, options, plan));
  }
  // 0.2 us, and only for calls of a new shape: a plan that is wrong is refused, never launched.
  return CheckRopeCudaPlan(call, device, *plan);
}

// What a launch needs and prepare() makes.
struct Ready {
  const CudaKernel* kernel = nullptr;
  bool may_be_better = false;  // a kernel with fewer registers was not tried yet
  cu::DevicePtr frequencies = 0;
};

uint32_t AtOnceBit(const RopeCudaPlan& plan) { return uint32_t{1} << (plan.at_once - 1); }

// The kernel for a plan, of those that are loaded: the plan's own, or with fewer registers where that lets its grid run
// at once.
void FindKernel(const CudaContext& context, const RopeCudaPlan& plan, Ready* ready) {
  const CudaKernel* own = context.FindKernel(plan.key);
  ready->kernel = own;
  ready->may_be_better = false;
  if (!own || !plan.at_once || own->registers < plan.crowded_from || own->registers > plan.crowded_to) return;
  const CudaKernel* limited = context.FindKernel(AtOnceKey(plan));
  ready->may_be_better = !limited && !(own->alone.load(std::memory_order_relaxed) & AtOnceBit(plan));
  if (limited && limited->registers < plan.crowded_from && limited->local_bytes <= kAtOnceSpill)
    ready->kernel = limited;
}

bool FindReady(CudaContext* context, const RopeCall& call, const RopeCudaPlan& plan, Ready* ready) {
  FindKernel(*context, plan, ready);
  if (NeedsFrequencies(call)) ready->frequencies = context->FindFrequencies(*call.frequencies);
  return ready->kernel && (ready->frequencies || !NeedsFrequencies(call));
}

Status MakeReady(CudaContext* context, const RopeCall& call, const RopeCudaPlan& plan, Ready* ready) {
  if (!context->FindKernel(plan.key)) ROPEWALK_TRY(context->LoadKernel(plan.key));
  FindKernel(*context, plan, ready);
  if (ready->may_be_better && !context->LoadKernel(AtOnceKey(plan)).ok()) {  // the one that is there serves as well
    ready->kernel->alone.fetch_or(AtOnceBit(plan), std::memory_order_relaxed);
  }
  if (NeedsFrequencies(call)) ROPEWALK_TRY(context->UploadFrequencies(*call.frequencies));
  if (!FindReady(context, call, plan, ready)) return Status::Internal("rope: a kernel was loaded, but is not found");
  return {};
}

bool Capturing(const CudaDriver& driver, void* stream) {
  int capturing = 0;
  const cu::Result result = driver.StreamIsCapturing(static_cast<cu::Stream>(stream), &capturing);
  return result == cu::kStreamCaptureImplicit || capturing != 0;
}

Status RefuseCapture(const CudaDriver& driver, const RopeCall& call, const RopeCudaKey& key, const Ready& ready) {
  if (!Capturing(driver, call.stream)) return {};
  return Status::Invalid(Text("rope: the stream is being captured, but ",
                              ready.kernel ? std::string("these frequencies are not on the device yet")
                                           : Text("the kernel (", RopeCudaName(key), ") is not loaded yet"),
                              "; call prepare() with these arguments before the capture"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Pointers

KnownPages<21> known_pages;  // 2 MB, the granularity of device memory

Status AskPointer(const CudaDriver& driver, int ordinal, const char* name, cu::DevicePtr pointer, bool* keep) {
  int attributes[] = {cu::kMemoryType, cu::kIsManaged, cu::kDeviceOrdinal, cu::kAccessFlags};
  uint64_t memory_type = 0, managed = 0, access = 0;
  int owner = -1;
  void* values[] = {&memory_type, &managed, &owner, &access};
  ROPEWALK_TRY(driver.Check(driver.PointerGetAttributes(4, attributes, values, pointer), "cuPointerGetAttributes",
                            Text(" for ", name)));
  *keep = false;
  if (managed & 0xff) return {};
  if (static_cast<uint32_t>(memory_type) != cu::kMemoryTypeDevice) {
    return Status::Invalid(
        Text("rope: ", name, " is said to be on cuda:", ordinal, ", but its data is in host memory"));
  }
  // Another device's memory serves if it is mapped for this one.
  if (owner != ordinal && static_cast<uint32_t>(access) == 0) {
    return Status::Invalid(
        Text("rope: ", name, " is said to be on cuda:", ordinal, ", but its data is on cuda:", owner));
  }
  *keep = true;
  return {};
}

Status CheckPointers(const CudaDriver& driver, const RopeCall& call) {
  const int ordinal = call.device.device_id;
  const auto ask = [&](const char* name, const void* pointer, bool* keep) {
    return AskPointer(driver, ordinal, name, reinterpret_cast<cu::DevicePtr>(pointer), keep);
  };
  return known_pages.Check(call.tensors, static_cast<uint64_t>(ordinal), ask);
}

// The driver calls a stream of another context an invalid handle. This says what is wrong.
Status LaunchFailed(CudaContext* context, const RopeCall& call, cu::Result result) {
  const CudaDriver& driver = context->driver;
  cu::Context owner = nullptr;
  const auto stream = static_cast<cu::Stream>(call.stream);
  if ((result == cu::kInvalidHandle || result == cu::kInvalidContext || result == cu::kInvalidValue) && stream &&
      driver.StreamGetCtx(stream, &owner) == cu::kSuccess && owner != context->handle) {
    cu::Device device = -1;
    cu::Context popped = nullptr;
    if (driver.CtxPushCurrent(owner) == cu::kSuccess) {
      driver.CtxGetDevice(&device);
      driver.CtxPopCurrent(&popped);
    }
    for (size_t i = 0; i < driver.devices.size(); ++i) {
      if (driver.devices[i].handle != device || static_cast<int>(i) == context->ordinal) continue;
      return Status::Invalid(Text("rope: q is on cuda:", context->ordinal, ", but the stream is one of cuda:", i));
    }
    return Status::Invalid(
        Text("rope: the stream belongs to another context of cuda:", context->ordinal, " than the current one"));
  }
  return driver.Check(result, "cuLaunchKernelEx", Text(" on cuda:", context->ordinal));
}

// ---------------------------------------------------------------------------------------------------------------------
// The backend

bool Serves(DLDevice device) { return DeviceType(device) == kDLCUDA || DeviceType(device) == kDLCUDAManaged; }

Availability Available() {
  const CudaDriver& driver = GetCudaDriver();
  if (!driver.status.ok()) return {false, driver.status.text(), driver.remedy};
  std::string detail = Text("driver for CUDA ", CudaVersionText(driver.version));
  bool usable = false, bundled = true;
  for (size_t i = 0; i < driver.devices.size(); ++i) {
    const CudaDevice& properties = driver.devices[i].properties;
    const bool new_enough = properties.major >= kOldestMajor;
    Append(&detail, Text("; ", DeviceText(driver, static_cast<int>(i)),
                         new_enough ? "" : " is too old: sm_80 or newer is needed"));
    usable |= new_enough;
    bundled &= !new_enough || BundlesServe(properties);
  }
  if (!usable) return {false, detail, "use a GPU of compute capability 8.0 (Ampere) or newer"};
  const Nvrtc* nvrtc = nullptr;
  const Status compiler = OpenNvrtc(&nvrtc);
  Append(&detail,
         Text("; ", compiler.ok() ? NvrtcText(*nvrtc) : compiler.text(), "; kernels kept in ", DiskCacheText()));
  for (const std::string& bundle : BundleTexts()) Append(&detail, Text("; bundle ", bundle));
  if (!compiler.ok() && !bundled)
    return {false, detail, "install NVRTC (pip install nvidia-cuda-nvrtc), or set ROPEWALK_BUNDLE"};
  return {true, detail, "", {"few", "many"}};
}

// What a launch needs beside the tensors' addresses and the stream. It is the same for all calls of one shape in one
// context.
struct Prepared {
  uint64_t shape = 0;  // RopeCall::shape; 0: none
  RopeCudaLayout layout = RopeCudaLayout::kAny;
  CudaContext* context = nullptr;
  RopeCudaPlan plan;
  Ready ready;
  rope_cuda_args args;
};

// Those of the thread's last shapes.
constinit thread_local std::array<Prepared, 4> prepared_shapes = {};

Status PrepareLaunch(const CudaDriver& driver, CudaContext* context, const RopeCall& call, Prepared* prepared) {
  prepared->context = nullptr;
  if (!FindReady(context, call, prepared->plan, &prepared->ready)) {
    ROPEWALK_TRY(RefuseCapture(driver, call, prepared->plan.key, prepared->ready));
    ROPEWALK_TRY(MakeReady(context, call, prepared->plan, &prepared->ready));
  } else if (prepared->ready.may_be_better && !Capturing(driver, call.stream)) {
    ROPEWALK_TRY(MakeReady(context, call, prepared->plan, &prepared->ready));
  }
  rope_cuda_args& args = prepared->args;
  args.turns = reinterpret_cast<const rw_u64*>(prepared->ready.frequencies);
  args.k_inverse_scale = 1.0f / call.params.k_scale;
  args.v_inverse_scale = 1.0f / call.params.v_scale;
  args.rows = call.params.rows;
  args.slot_count = call.params.slots;
  args.fault = context->Fault(call.params.batch > 1, call.tensors.offsets != nullptr);
  args.params = call.params;
  if (!prepared->ready.may_be_better) prepared->context = context;  // else a call that is not captured looks again
  return {};
}

void SetAddresses(const RopeCall& call, const Ready& ready, rope_cuda_args* args) {
  const RopeTensors& t = call.tensors;
#define X(name, type) args->name = t.name;
  ROPE_TENSORS(X)
#undef X
  if (!t.axes && call.variant.axes) {
    args->axes = reinterpret_cast<const int*>(ready.frequencies + AxesOffset(*call.frequencies));
  }
}

Status LaunchPrepared(const RopeCall& call, Prepared* prepared) {
  const CudaDriver& driver = GetCudaDriver();
  const RopeCudaLayout layout = forced_layout.load(std::memory_order_relaxed);
  if (prepared->shape == 0 || prepared->shape != call.shape || prepared->layout != layout) {
    prepared->shape = 0;
    prepared->layout = layout;
    prepared->context = nullptr;
    ROPEWALK_TRY(Plan(driver, call, layout, &prepared->plan));
  }
  const RopeCudaPlan& plan = prepared->plan;
  if (plan.grid_x == 0) return {};

  CudaContextScope scope;
  ROPEWALK_TRY(scope.Enter(driver, call.device.device_id));
  CudaContext* const context = scope.context();
  ROPEWALK_TRY(CheckPointers(driver, call));
  if (prepared->context != context) ROPEWALK_TRY(PrepareLaunch(driver, context, call, prepared));
  prepared->shape = call.shape;
  SetAddresses(call, prepared->ready, &prepared->args);

  cu::LaunchAttribute attribute;
  attribute.id = cu::kProgrammaticStreamSerialization;
  attribute.value.number = 1;
  const cu::LaunchConfig config = {plan.grid_x, plan.grid_y,
                                   1,           plan.key.threads,
                                   1,           1,
                                   0,           static_cast<cu::Stream>(call.stream),
                                   &attribute,  plan.key.dependent_launch ? 1u : 0u};
  void* parameters[] = {&prepared->args};
  const cu::Result result = driver.LaunchKernelEx(&config, prepared->ready.kernel->function, parameters, nullptr);
  if (result != cu::kSuccess) return LaunchFailed(context, call, result);
  CountLaunch(context, prepared->ready.kernel);
  return {};
}

Status Launch(const RopeCall& call) {
  if (call.shape) return LaunchPrepared(call, &prepared_shapes[call.shape % prepared_shapes.size()]);
  Prepared once;
  return LaunchPrepared(call, &once);
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient

Status PlanBackward(const CudaDriver& driver, const RopeBackwardCall& call, RopeCudaBackwardPlan* plan) {
  ROPEWALK_TRY(Usable(driver, call.turn));
  return PlanRopeCudaBackward(call, driver.devices[static_cast<size_t>(call.turn.device.device_id)].properties, plan);
}

Status BackwardWorkspace(const RopeBackwardCall& call, int64_t* elements) {
  RopeCudaBackwardPlan plan;
  ROPEWALK_TRY(PlanBackward(GetCudaDriver(), call, &plan));
  *elements = plan.workspace;
  return {};
}

Status CheckBackwardPointers(const CudaDriver& driver, const RopeBackwardCall& call) {
  const int ordinal = call.turn.device.device_id;
  const auto ask = [&](const char* name, const void* pointer, bool* keep) {
    return AskPointer(driver, ordinal, name, reinterpret_cast<cu::DevicePtr>(pointer), keep);
  };
  return known_pages.Check(call, static_cast<uint64_t>(ordinal), ask);
}

Status LaunchBackward(const RopeBackwardCall& call) {
  const CudaDriver& driver = GetCudaDriver();
  const RopeCall& turn = call.turn;
  RopeCudaBackwardPlan plan;
  ROPEWALK_TRY(PlanBackward(driver, call, &plan));
  CudaContextScope scope;
  ROPEWALK_TRY(scope.Enter(driver, turn.device.device_id));
  CudaContext* const context = scope.context();
  ROPEWALK_TRY(CheckBackwardPointers(driver, call));
  const int blocks = plan.q_blocks + plan.k_blocks;
  Ready ready, sums;
  for (const auto& [key, kernel] : {std::pair(&plan.key, &ready), std::pair(&plan.sums_key, &sums)}) {
    if (key == &plan.sums_key ? plan.sums_blocks == 0 : blocks == 0) continue;
    RopeCudaPlan any_grid;
    any_grid.key = *key;
    if (FindReady(context, turn, any_grid, kernel)) continue;
    if (Capturing(driver, turn.stream)) {
      return Status::Invalid(Text("rope: the stream is being captured, but the kernel (", RopeCudaName(*key),
                                  ") is not loaded yet; do the call once before the capture"));
    }
    ROPEWALK_TRY(MakeReady(context, turn, any_grid, kernel));
  }

  rope_backward_cuda_args args = {};
  SetAddresses(turn, ready, &args.turn);
  args.turn.turns = reinterpret_cast<const rw_u64*>(ready.frequencies);
  args.turn.rows = turn.params.rows;
  args.turn.fault = blocks ? context->Fault(turn.params.batch > 1, turn.tensors.offsets != nullptr) : nullptr;
  args.turn.params = turn.params;
  args.q = call.q;
  args.k = call.k;
  args.q_strides = call.q_strides;
  args.k_strides = call.k_strides;
  // From a whole row of 32 bytes on: the workspace is larger by what that may take.
  constexpr uintptr_t kLine = kRopeSumsElements * sizeof(float);
  args.sums = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(call.workspace) + kLine - 1) / kLine * kLine);
  args.q_weight_grad = call.q_weight_grad;
  args.k_weight_grad = call.k_weight_grad;
  args.q_blocks = plan.q_blocks;
  args.k_blocks = plan.k_blocks;
  cu::LaunchAttribute attribute;
  attribute.id = cu::kProgrammaticStreamSerialization;
  attribute.value.number = 1;
  const auto launch = [&](const CudaKernel* kernel, unsigned grid, unsigned threads) -> Status {
    const cu::LaunchConfig config = {grid,       1,
                                     1,          threads,
                                     1,          1,
                                     0,          static_cast<cu::Stream>(turn.stream),
                                     &attribute, plan.key.dependent_launch ? 1u : 0u};
    void* parameters[] = {&args};
    const cu::Result result = driver.LaunchKernelEx(&config, kernel->function, parameters, nullptr);
    if (result != cu::kSuccess) return LaunchFailed(context, turn, result);
    CountLaunch(context, kernel);
    return {};
  };
  if (blocks) ROPEWALK_TRY(launch(ready.kernel, static_cast<unsigned>(blocks), plan.key.threads));
  if (plan.sums_blocks) ROPEWALK_TRY(launch(sums.kernel, plan.sums_blocks, plan.sums_key.threads));
  return {};
}

Status Prepare(const RopeCall& call) {
  const CudaDriver& driver = GetCudaDriver();
  RopeCudaPlan plan;
  ROPEWALK_TRY(Plan(driver, call, forced_layout.load(std::memory_order_relaxed), &plan));
  if (plan.grid_x == 0) return {};
  CudaContextScope scope;
  ROPEWALK_TRY(scope.Enter(driver, call.device.device_id));
  Ready ready;
  const bool is_ready = FindReady(scope.context(), call, plan, &ready) && !ready.may_be_better;
  return is_ready ? Status() : MakeReady(scope.context(), call, plan, &ready);
}

Status Explain(const RopeCall& call, Explanation* explanation) {
  const CudaDriver& driver = GetCudaDriver();
  RopeCudaPlan plan;
  ROPEWALK_TRY(Plan(driver, call, forced_layout.load(std::memory_order_relaxed), &plan));
  const auto add = [&](const char* key, std::string value) { explanation->emplace_back(key, std::move(value)); };
  add("device", DeviceText(driver, call.device.device_id));
  if (plan.grid_x == 0) {
    add("kernel", "none");
    add("why", "there is no work");
    return {};
  }
  Ready ready;
  ForEachCudaContext([&](CudaContext* context) {
    if (context->ordinal == call.device.device_id && !ready.kernel) FindKernel(*context, plan, &ready);
  });
  const CudaKernel* const kernel = ready.kernel;
  add("kernel", Text("cuda ", kernel ? kernel->name : RopeCudaName(plan.key)));
  if (kernel) {
    add("source", Text("memory, from ", kernel->source));
    add("registers", Text(kernel->registers));
    add("spilled bytes", Text(kernel->local_bytes));
    add("shared bytes", Text(kernel->shared_bytes));
  } else {
    std::string source;
    ROPEWALK_TRY(
        FindCubinSource(plan.key, driver.devices[static_cast<size_t>(call.device.device_id)].properties, &source));
    add("source", source);
  }
  if (plan.at_once) {
    add("at once", Text(plan.at_once, " blocks of a multiprocessor, by fewer than ", plan.crowded_from,
                        " registers: the first call may compile another kernel for that"));
  }
  add("angles", NeedsFrequencies(call) ? "frequencies" : "table");
  add("grid", Text(plan.grid_x, " x ", plan.grid_y));
  add("block", Text(plan.key.threads));
  add("dependent launch", plan.key.dependent_launch  ? "yes"
                          : call.disable_pdl         ? "no (disable_pdl)"
                          : DependentLaunchAllowed() ? "no"
                                                     : "no (ROPEWALK_PDL=0)");
  add("why", plan.why);
  add("plan", OriginName(plan.origin));
  std::string shape;
  for (const int number : plan.shape.numbers()) shape += Text(shape.empty() ? "" : " ", number);
  add("shape", shape);
  return {};
}

Status CheckFaults() {
  return FirstFault(ForEachCudaContext, [](CudaContext* context, std::string* text) -> Status {
    if (!context->Alive()) return {};
    CudaContextScope scope;
    ROPEWALK_TRY(scope.Enter(context));
    return context->TakeFaults(text);
  });
}

Status Force(const std::string& part) {
  if (!part.empty() && part != "few" && part != "many") {
    return Status::Invalid(Text("force_backend: the layout of cuda must be few or many, but is \"", part, "\""));
  }
  forced_layout.store(part.empty()    ? RopeCudaLayout::kAny
                      : part == "few" ? RopeCudaLayout::kFew
                                      : RopeCudaLayout::kMany);
  return {};
}

void Counters(std::vector<std::pair<std::string, int64_t>>* counters) {
  AddCounters("cuda", ForEachCudaContext, counters);
}

}  // namespace

void TryRopeCudaShape(const std::optional<RopeCudaShape>& shape) {
  tried_shape = shape;
  prepared_shapes = {};
}

const Backend kCudaBackend = {"cuda",      Serves, Available, Launch,         Prepare,          Explain,
                              CheckFaults, Force,  Counters,  LaunchBackward, BackwardWorkspace};

}  // namespace ropewalk
