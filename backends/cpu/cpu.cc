// The CPU backend: always there, the fastest target chosen at run time.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "backends/cpu/dispatch.h"
#include "backends/cpu/plan.h"
#include "backends/cpu/row_plan.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/thread_pool.h"
#include "backends/registry.h"
#include "base/environment.h"
#include "base/fork.h"
#include "base/text.h"
#include "rope/fault_text.h"

namespace ropewalk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Targets and kernels

constexpr int kMaxTargets = 8;
constexpr int kKernels = 3 * 2 * 2 * 2 * 4;

std::atomic<const CpuTarget*> forced_target{nullptr};
std::array<std::array<std::atomic<int64_t>, kKernels>, kMaxTargets> launches{};
std::array<std::atomic<int64_t>, kMaxTargets> backward_launches{};

// Null if there is none. Threads that look for it at once find the same.
const CpuTarget* BestTarget() {
  static std::atomic<const CpuTarget*> best{nullptr};
  const CpuTarget* known = best.load(std::memory_order_relaxed);
  if (known) return known;
  for (const CpuTarget& target : CpuTargets()) {
    if (!target.supported()) continue;
    best.store(&target, std::memory_order_relaxed);
    return &target;
  }
  return nullptr;
}

// What is wrong with ROPEWALK_CPU_TARGET: no call is served then, until a target is forced.
std::atomic<const std::string*> wrong_environment{nullptr};

const CpuTarget* Target() {
  const CpuTarget* target = forced_target.load(std::memory_order_acquire);
  if (target) return target;
  return wrong_environment.load(std::memory_order_relaxed) ? nullptr : BestTarget();
}

// 0: no store, 1: in the dtype of k, 2 and 3: fp8.
int StoreIndex(const RopeVariant& v) {
  return v.cache_dtype == kRopeNoDtype ? 0 : v.cache_dtype == kRopeE4M3 ? 2 : v.cache_dtype == kRopeE5M2 ? 3 : 1;
}

int KernelIndex(const RopeVariant& v) {
  return ((((v.dtype - kRopeF32) * 2 + v.pairing) * 2 + v.norm) * 2 + v.rounding) * 4 + StoreIndex(v);
}

std::string KernelName(int index) {
  constexpr const char* kDtypes[] = {"float32", "float16", "bfloat16"};
  constexpr const char* kStores[] = {"", " store", " store_e4m3", " store_e5m2"};
  return Text(kDtypes[index / 32], index / 16 % 2 ? " interleaved" : " neox", index / 8 % 2 ? " rms" : "",
              index / 4 % 2 ? " reference" : "", kStores[index % 4]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults: the first since the last check

constinit ForkMutex fault_mutex;
// Never destroyed: calls while the process ends are answered too.
std::string& FaultText() {
  static auto* const text = new std::string;
  return *text;
}

void RecordFault(const RopeCall& call, int64_t row, const RowPlan& plan) {
  const rope_params& p = call.params;
  const rope_fault fault = {.key = static_cast<rw_u64>(row) << 2 | static_cast<rw_u64>(plan.fault),
                            .value = plan.fault_value,
                            .limit = plan.fault == kRopeFaultPosition ? p.rows
                                     : plan.fault == kRopeFaultSlot   ? p.slots
                                                                      : p.axes,
                            .tokens = p.tokens,
                            .lock = 0,
                            .axis = static_cast<rw_u32>(plan.fault_axis)};
  std::string text = RopeFaultText(fault, p.batch > 1, call.tensors.offsets != nullptr);
  const std::lock_guard lock(fault_mutex);
  if (FaultText().empty()) FaultText() = std::move(text);
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

struct Splitter {
  ropewalk_parallel_for parallel_for;
  void* context;
  const Splitter* next;
};
constinit ForkMutex splitter_mutex;
std::atomic<const Splitter*> caller_splitter{nullptr};  // old ones are kept: a call may still hold one

void Split(int64_t rows, int64_t grain, void (*body)(int64_t, int64_t, const void*), const void* context) {
  if (const Splitter* splitter = caller_splitter.load(std::memory_order_acquire)) {
    splitter->parallel_for(0, rows, grain, body, context, splitter->context);
  } else if (ThreadPoolSize() > 1) {
    PoolParallelFor(0, rows, grain, body, context, nullptr);
  } else {
    body(0, rows, context);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The backend

bool Serves(DLDevice device) { return DeviceType(device) == kDLCPU || DeviceType(device) == kDLCUDAHost; }

Availability Available() {
  const CpuTarget* target = Target();
  if (const std::string* wrong = wrong_environment.load(); wrong && !target) {
    return {false, *wrong, "set it to one of these, or unset it"};
  }
  if (!target)
    return {false, "this CPU has none of the instruction sets that Ropewalk is built for (SSE4.2 at least)",
            "use a CPU made after 2009"};
  Availability availability{true, Text("target ", target->name, forced_target.load() ? " (forced)" : ""), ""};
  for (const CpuTarget& candidate : CpuTargets()) {
    if (candidate.supported()) availability.parts.push_back(candidate.name);
  }
  return availability;
}

struct Work {
  const RopeCall* call;
  CpuKernel kernel;
  FirstFault* first_fault;

  static void Do(int64_t begin, int64_t end, const void* context) {
    const Work& work = *static_cast<const Work*>(context);
    const CpuScratch scratch;
    work.kernel(*work.call, begin, end, work.first_fault, scratch.memory());
  }
};

Status Launch(const RopeCall& call) {
  const CpuTarget* target = Target();
  if (!target) return Status::Unavailable(Text("rope: ", Available().detail));
  const RopeCpuPlan plan = PlanRopeCpu(call);
  if (plan.rows == 0 || int64_t{call.params.q_heads} + call.params.k_heads == 0) return {};
#ifndef NDEBUG
  if (const std::string fault = RopeCpuPlanFault(call, plan, ThreadPoolSize()); !fault.empty())
    return Status::Internal(Text("rope: a plan for the CPU is wrong: ", fault));
#endif
  FirstFault first_fault;
  const Work work{&call, target->choose(call.variant), &first_fault};

  if (plan.one_part) {
    Work::Do(0, plan.rows, &work);
  } else {
    Split(plan.rows, plan.grain, Work::Do, &work);
  }
  launches[static_cast<size_t>(target - CpuTargets().data())][static_cast<size_t>(KernelIndex(call.variant))].fetch_add(
      1, std::memory_order_relaxed);
  if (const int64_t row = first_fault.row(); row != INT64_MAX) RecordFault(call, row, first_fault.plan());
  return {};
}

struct BackwardWork {
  const RopeBackwardCall* call;
  const RopeCpuBackwardPlan* plan;
  CpuBackwardKernel kernel;
  FirstFault* first_fault;

  static void Rows(int64_t begin, int64_t end, const void* context) {
    const BackwardWork& work = *static_cast<const BackwardWork*>(context);
    const CpuScratch scratch;
    work.kernel(*work.call, begin, end, work.first_fault, scratch.memory(), nullptr);
  }
  static void Chunks(int64_t begin, int64_t end, const void* context) {
    const BackwardWork& work = *static_cast<const BackwardWork*>(context);
    const RopeCpuBackwardPlan& plan = *work.plan;
    const CpuScratch scratch;
    const int64_t rows = work.call->turn.params.batch * work.call->turn.params.tokens;
    for (int64_t i = begin; i < end; ++i) {
      work.kernel(*work.call, i * plan.chunk_rows, std::min(rows, (i + 1) * plan.chunk_rows), work.first_fault,
                  scratch.memory(), work.call->workspace + i * plan.chunk_sums);
    }
  }
};

// The sums of the chunks, in their order.
void AddChunks(const RopeBackwardCall& call, const RopeCpuBackwardPlan& plan) {
  const int64_t dim = call.turn.params.head_dim;
  int64_t first = 0;  // where the sums of the weight lie in a chunk's
  for (float* grad : {call.q_weight_grad, call.k_weight_grad}) {
    if (!grad) continue;
    // Many elements at a time: an addition that waits for the one before takes 4 cycles, 30 us for heads of 128.
    constexpr int64_t kAtOnce = 64;
    for (int64_t begin = 0; begin < dim; begin += kAtOnce) {
      const int64_t count = std::min(kAtOnce, dim - begin);
      double totals[kAtOnce] = {};
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const float* high = call.workspace + first + chunk * plan.chunk_sums + begin;
        const float* low = high + dim;
        for (int64_t i = 0; i < count; ++i) totals[i] += static_cast<double>(high[i]) + static_cast<double>(low[i]);
      }
      for (int64_t i = 0; i < count; ++i) grad[begin + i] = static_cast<float>(totals[i]);
    }
    first += 2 * dim;
  }
}

Status LaunchBackward(const RopeBackwardCall& call) {
  const CpuTarget* target = Target();
  if (!target) return Status::Unavailable(Text("rope: ", Available().detail));
  const RopeCpuPlan rows = PlanRopeCpu(call.turn);
  const RopeCpuBackwardPlan plan = PlanRopeCpuBackward(call);
  FirstFault first_fault;
  const BackwardWork work{&call, &plan, target->backward, &first_fault};
  if (plan.chunks > 1) {
    Split(plan.chunks, 1, BackwardWork::Chunks, &work);
  } else if (plan.chunks == 1) {
    BackwardWork::Chunks(0, 1, &work);
  } else if (rows.rows > 0 && !rows.one_part) {
    Split(rows.rows, rows.grain, BackwardWork::Rows, &work);
  } else if (rows.rows > 0) {
    BackwardWork::Rows(0, rows.rows, &work);
  }
  AddChunks(call, plan);
  if (rows.rows > 0)
    backward_launches[static_cast<size_t>(target - CpuTargets().data())].fetch_add(1, std::memory_order_relaxed);
  if (const int64_t row = first_fault.row(); row != INT64_MAX) RecordFault(call.turn, row, first_fault.plan());
  return {};
}

Status BackwardWorkspace(const RopeBackwardCall& call, int64_t* elements) {
  const RopeCpuBackwardPlan plan = PlanRopeCpuBackward(call);
  *elements = plan.chunks * plan.chunk_sums;
  return {};
}

Status Prepare(const RopeCall&) { return {}; }  // compiled ahead

std::string PoolText() {
  const int size = ThreadPoolSize(), started = ThreadPoolStarted();
  return Text("pool of ", size,
              started && started < size ? Text(", of which the system gave ", started, " threads") : Text());
}

Status Explain(const RopeCall& call, Explanation* explanation) {
  const CpuTarget* target = Target();
  if (!target) return Status::Unavailable(Text("rope: ", Available().detail));
  const RopeVariant& v = call.variant;
  const bool native = std::string_view(target->name) == "avx3_bf16" && v.dtype == kRopeBF16 && v.rounding == 0;
  explanation->emplace_back("kernel", Text("cpu:", target->name, " ", KernelName(KernelIndex(v))));
  explanation->emplace_back("target", target->name);
  explanation->emplace_back("source", "built in");
  explanation->emplace_back("angles", NeedsFrequencies(call) ? "frequencies" : "table");
  explanation->emplace_back("rounding to bfloat16", v.dtype != kRopeBF16 ? "none" : native ? "AVX512_BF16" : "integer");
  explanation->emplace_back("threads", caller_splitter.load() ? "the caller's parallel_for"
                                       : ThreadPoolSize() > 1 ? PoolText()
                                                              : "1 (ropewalk_set_threads makes a pool)");
  explanation->emplace_back("why",
                            Text("q is on the CPU; ", target->name,
                                 forced_target.load() ? " is forced" : " is the best target that this CPU runs"));
  return {};
}

Status CheckFaults() {
  const std::lock_guard lock(fault_mutex);
  if (FaultText().empty()) return {};
  return Status::Fault(std::exchange(FaultText(), {}));
}

Status Force(const std::string& part) {
  if (part.empty()) {
    forced_target.store(nullptr);
    return {};
  }
  std::string names;
  for (const CpuTarget& target : CpuTargets()) {
    if (!target.supported()) continue;
    if (part == target.name) {
      forced_target.store(&target, std::memory_order_release);
      return {};
    }
    Append(&names, Text(names.empty() ? "" : ", ", target.name));
  }
  return Status::Invalid(Text("force_backend: the target of cpu must be one of ", names, ", but is \"", part, "\""));
}

void Counters(std::vector<std::pair<std::string, int64_t>>* counters) {
  const auto targets = CpuTargets();
  for (size_t t = 0; t < targets.size(); ++t) {
    for (int k = 0; k < kKernels; ++k) {
      const int64_t count = launches[t][static_cast<size_t>(k)].load(std::memory_order_relaxed);
      if (count) counters->emplace_back(Text("cpu:", targets[t].name, " ", KernelName(k)), count);
    }
    const int64_t count = backward_launches[t].load(std::memory_order_relaxed);
    if (count) counters->emplace_back(Text("cpu:", targets[t].name, " backward"), count);
  }
}

// ROPEWALK_CPU_TARGET forces a target from the start, as ropewalk_force_backend("cpu:..") does later.
[[maybe_unused]] const bool kForcedByEnvironment = [] {
  const char* name = EnvironmentVariable("ROPEWALK_CPU_TARGET");
  if (!name) return false;
  const Status status = Force(name);
  if (!status.ok()) wrong_environment.store(new std::string(Text("ROPEWALK_CPU_TARGET: ", status.text())));
  return status.ok();
}();

}  // namespace

const Backend kCpuBackend = {"cpu",       Serves, Available, Launch,         Prepare,          Explain,
                             CheckFaults, Force,  Counters,  LaunchBackward, BackwardWorkspace};

Status SetParallelFor(ropewalk_parallel_for parallel_for, void* context) {
  const std::lock_guard lock(splitter_mutex);
  static const Splitter* kept = nullptr;
  if (!parallel_for) {
    caller_splitter.store(nullptr);
    return {};
  }
  for (const Splitter* splitter = kept; splitter; splitter = splitter->next) {
    if (splitter->parallel_for == parallel_for && splitter->context == context) {
      caller_splitter.store(splitter);
      return {};
    }
  }
  kept = new Splitter{parallel_for, context, kept};
  caller_splitter.store(kept);
  return {};
}

Status SetThreads(int32_t threads) {
  if (threads < 1 || threads > 1024)
    return Status::Invalid(Text("set_threads: threads must be from 1 to 1024, but is ", threads));
  ResizeThreadPool(threads);
  return {};
}

}  // namespace ropewalk
