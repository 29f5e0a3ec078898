// SPDX-License-Identifier: Apache-2.0
#include "measure/cuda_tune.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "backends/cuda/cache.h"
#include "backends/cuda/context.h"
#include "backends/cuda/shapes.h"
#include "base/text.h"
#include "measure/measure.h"
#include "measure/token_check.h"

namespace ropewalk::bench {
namespace {

constexpr double kHopeless = 1.25;  // times the best: not timed again
constexpr size_t kVaried = 2;       // the best of the first round, whose neighbours are tried
constexpr size_t kFinalists = 4;    // that are timed in turns with the one chosen before
constexpr int kSamples = 3, kRounds = 7;
constexpr double kGain = 1.015;    // is looked at again
constexpr int kConfirmations = 4;  // even, so that with the first there is one in the middle

constexpr size_t kAtATime = 2;  // searches, each with about 2 GB on the device; four were no faster on 16 cores

// On a search's share of the processor.
Status Compile(const std::vector<RopeCudaKey>& keys, const CudaDevice& device) {
  const size_t most_threads = std::max<size_t>(1, std::thread::hardware_concurrency() / kAtATime);
  std::atomic<size_t> next{0};
  std::vector<Status> results(keys.size());
  const auto compile = [&] {
    for (size_t i = next++; i < keys.size(); i = next++) {
      std::shared_ptr<const Cubin> cubin;
      results[i] = GetCubin(keys[i], device, /*no_disk=*/false, &cubin);
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(keys.size(), most_threads); ++i) {
    threads.emplace_back(compile);
  }
  compile();
  for (std::thread& thread : threads) thread.join();
  for (const Status& result : results) ROPEWALK_TRY(Status(result));
  return {};
}

Status PlanOf(const RopeCall& call, const CudaDevice& device, const RopeCudaShape& shape, RopeCudaPlan* plan) {
  ROPEWALK_TRY(PlanRopeCuda(call, device, {.dependent_launch = true, .shape = &shape}, plan));
  return CheckRopeCudaPlan(call, device, *plan);
}

std::vector<RopeCudaShape> FirstShapes(const RopeCall& call, const CudaDevice& device, const TuneOptions& options) {
  if (!options.near) return RopeCudaCandidates(call, device);
  return RopeCudaChoices(call, device);
}

// One case under search. Several are at a time, as most of a search's time goes into compiling; who holds `timing` has
// the device and the shape that is tried to itself.
class Search {
 public:
  Search(const CudaDevice& device, CudaGraphs& graphs, DeviceMemory& memory, std::mutex& timing, TunedCase* out)
      : device_(device),
        graphs_(graphs),
        memory_(memory),
        timing_(timing),
        copies_(memory, graphs),
        narrow_data_(memory),
        out_(*out) {}

  Status Make(const RopeCase& c, const TuneOptions& options, int64_t l2_bytes) {
    const std::lock_guard lock(timing_);
    options_ = options;
    ROPEWALK_TRY(CaseCall::Make(c, memory_, &call_));
    ROPEWALK_TRY(SteadyWeights(*call_));
    ROPEWALK_TRY(LowerRope(call_->args(), nullptr, &out_.call));
    check_.Choose(*call_, options.sampled_tokens);
    const int64_t count = CopyCount(c, l2_bytes, options.cold_bytes);
    ROPEWALK_TRY(copies_.Make(*call_, count));
    calls_in_graph_ = RunsCold(c, l2_bytes) ? std::max<int64_t>(count, 32) : 20 * count;
    return MakeNarrow();
  }

  Status Run() {
    RopeCudaPlan plan;
    ROPEWALK_TRY(PlanRopeCuda(out_.call, device_, {.dependent_launch = true}, &plan));
    out_.origin = OriginName(plan.origin);
    out_.before_shape = plan.shape;
    ROPEWALK_TRY(Try(FirstShapes(out_.call, device_, options_)));
    for (int round = 0; round < (options_.near ? 2 : 1); ++round) {
      const std::vector<TriedShape> best = Best(kVaried);
      for (const TriedShape& tried : best) {
        ROPEWALK_TRY(Try(RopeCudaCandidates(out_.call, device_, &tried.shape)));
      }
    }
    return Compare();
  }

 private:
  // Those of the shapes that are plans of their own.
  Status Try(const std::vector<RopeCudaShape>& shapes) {
    std::vector<RopeCudaShape> work;
    std::vector<RopeCudaKey> keys;
    for (const RopeCudaShape& shape : shapes) {
      RopeCudaPlan plan;
      ROPEWALK_TRY(PlanOf(out_.call, device_, shape, &plan));
      std::string identity(reinterpret_cast<const char*>(&plan.key), sizeof(plan.key));
      Append(&identity, Text(plan.grid_x, " ", plan.grid_y));
      if (!known_.insert(identity).second) continue;
      work.push_back(shape);
      keys.push_back(plan.key);
    }
    ROPEWALK_TRY(Compile(keys, device_));
    const std::lock_guard lock(timing_);
    for (const RopeCudaShape& shape : work) {
      TriedShape tried;
      tried.shape = shape;
      ROPEWALK_TRY(TimeOne(&tried));
      out_.tried.push_back(std::move(tried));
    }
    return {};
  }

  // The positions in 32 bits, which engines have as well as 64. A shape serves both dtypes, and one of them may take
  // half as long again: blocks of the next kernel of the stream come to their places a little earlier or later.
  Status MakeNarrow() {
    const DLTensor* wide = copies_.calls()[0].args.positions;
    if (!wide || wide->dtype.bits != 64) return {};
    int64_t count = 1;
    for (int32_t i = wide->ndim; i-- > 0;) {
      if (wide->strides && wide->shape[i] > 1 && wide->strides[i] != count) return {};
      count *= wide->shape[i];
    }
    std::vector<int64_t> values(static_cast<size_t>(count));
    ROPEWALK_TRY(memory_.CopyOut(values.data(), static_cast<const char*>(wide->data) + wide->byte_offset,
                                 values.size() * sizeof(int64_t)));
    std::vector<int32_t> narrow(values.size());
    std::ranges::transform(values, narrow.begin(), [](int64_t value) { return static_cast<int32_t>(value); });
    ROPEWALK_TRY(narrow_data_.Allocate(narrow.size() * sizeof(int32_t)));
    ROPEWALK_TRY(memory_.CopyIn(narrow_data_.data(), narrow.data(), narrow.size() * sizeof(int32_t)));
    narrow_ = *wide;
    narrow_.data = narrow_data_.data();
    narrow_.byte_offset = 0;
    narrow_.dtype.bits = 32;
    return LowerRope(ArgsOf(0, /*narrow=*/true), nullptr, &narrow_call_);
  }

  Status CompileNarrow(const std::vector<std::optional<RopeCudaShape>>& shapes) {
    std::vector<RopeCudaKey> keys;
    for (const std::optional<RopeCudaShape>& shape : shapes) {
      RopeCudaPlan plan;
      ROPEWALK_TRY(
          PlanRopeCuda(narrow_call_, device_, {.dependent_launch = true, .shape = shape ? &*shape : nullptr}, &plan));
      keys.push_back(plan.key);
    }
    return Compile(keys, device_);
  }

  ropewalk_rope_args ArgsOf(size_t copy, bool narrow) {
    ropewalk_rope_args args = copies_.calls()[copy].args;
    if (narrow) args.positions = &narrow_;
    return args;
  }

  Status Call(size_t copy, bool narrow = false) {
    const ropewalk_rope_args args = ArgsOf(copy, narrow);
    if (ropewalk_rope(&args, graphs_.stream()) == ROPEWALK_OK) return {};
    return Status::Internal(Text("tune: a call fails: ", ropewalk_last_error()));
  }

  Status TimeOne(TriedShape* tried) {
    TryRopeCudaShape(tried->shape);
    ROPEWALK_TRY(copies_.RestoreFirst());
    ROPEWALK_TRY(Call(0));
    ROPEWALK_TRY(graphs_.Wait());
    double worst = 0;
    ROPEWALK_TRY(check_.Run(copies_.calls()[0].args, memory_, &tried->wrong, &worst));
    if (!tried->wrong.empty()) return {};
    CudaGraph graph;
    ROPEWALK_TRY(Capture(&graph));
    std::vector<double> seconds;
    for (int i = 0; i < kSamples; ++i) {
      ROPEWALK_TRY(Sample(graph, &seconds));
      if (seconds[0] > kHopeless * best_) break;
    }
    tried->seconds = Median(seconds);
    best_ = std::min(best_, tried->seconds);
    return {};
  }

  Status Capture(CudaGraph* graph, bool narrow = false) {
    return graphs_.Capture(
        [&]() -> Status {
          for (int64_t i = 0; i < calls_in_graph_; ++i) {
            ROPEWALK_TRY(Call(static_cast<size_t>(i) % copies_.calls().size(), narrow));
          }
          return {};
        },
        graph);
  }
  Status Sample(const CudaGraph& graph, std::vector<double>* seconds) {
    double all = 0;
    ROPEWALK_TRY(graphs_.Replay(graph, &all));
    seconds->push_back(all / static_cast<double>(calls_in_graph_));
    return {};
  }

  std::vector<TriedShape> Best(size_t count) {
    std::erase_if(out_.tried, [&](const TriedShape& tried) {
      if (!tried.wrong.empty()) wrong_.push_back(tried);
      return !tried.wrong.empty();
    });
    std::ranges::stable_sort(out_.tried, {}, &TriedShape::seconds);
    return {out_.tried.begin(), out_.tried.begin() + static_cast<std::ptrdiff_t>(std::min(count, out_.tried.size()))};
  }

  // The medians of shapes that take turns, each with the dtype of positions that is slower; nothing stands for the one
  // chosen before. In graphs of their own.
  Status InTurns(const std::vector<std::optional<RopeCudaShape>>& shapes, std::vector<double>* medians) {
    const size_t dtypes = narrow_.data ? 2 : 1;
    if (narrow_.data) ROPEWALK_TRY(CompileNarrow(shapes));
    const std::lock_guard lock(timing_);
    std::vector<CudaGraph> graphs(shapes.size() * dtypes);
    for (size_t i = 0; i < graphs.size(); ++i) {
      TryRopeCudaShape(shapes[i / dtypes]);
      ROPEWALK_TRY(Call(0, i % dtypes));  // loads the kernel, which a capture does not
      ROPEWALK_TRY(Capture(&graphs[i], i % dtypes));
    }
    ROPEWALK_TRY(copies_.Restore());
    std::vector<std::vector<double>> seconds(graphs.size());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < graphs.size(); ++i) ROPEWALK_TRY(Sample(graphs[i], &seconds[i]));
    }
    for (size_t i = 0; i < graphs.size(); i += dtypes) {
      medians->push_back(std::max(Median(seconds[i]), Median(seconds[i + dtypes - 1])));
    }
    return {};
  }

  // The best few and the one chosen before. What seems a gain is timed again, in new graphs.
  Status Compare() {
    std::vector<std::optional<RopeCudaShape>> shapes;
    for (const TriedShape& finalist : Best(kFinalists)) shapes.emplace_back(finalist.shape);
    shapes.emplace_back();
    std::vector<double> medians;
    ROPEWALK_TRY(InTurns(shapes, &medians));
    for (size_t i = 0; i + 1 < medians.size(); ++i) {
      out_.tried[i].seconds = medians[i];
      out_.tried[i].compared = true;
    }
    out_.before = medians.back();
    Best(0);
    if (!out_.tried.empty() && out_.before > kGain * out_.tried[0].seconds) {
      std::vector<double> best = {out_.tried[0].seconds}, before = {out_.before};
      for (int i = 0; i < kConfirmations; ++i) {
        medians.clear();
        ROPEWALK_TRY(InTurns({std::nullopt, out_.tried[0].shape}, &medians));
        before.push_back(medians[0]);
        best.push_back(medians[1]);
      }
      out_.before = Median(before);
      out_.tried[0].seconds = Median(best);
    }
    out_.tried.insert(out_.tried.end(), wrong_.begin(), wrong_.end());
    return {};
  }

  const CudaDevice device_;
  TuneOptions options_;
  CudaGraphs& graphs_;
  DeviceMemory& memory_;
  std::mutex& timing_;
  std::unique_ptr<CaseCall> call_;
  TokenCheck check_;
  Copies copies_;
  Block narrow_data_;
  DLTensor narrow_ = {};
  RopeCall narrow_call_;
  TunedCase& out_;
  std::set<std::string> known_;  // plans
  std::vector<TriedShape> wrong_;
  int64_t calls_in_graph_ = 1;
  double best_ = 1e9;
};

}  // namespace

Status CudaTuner::Make(std::unique_ptr<CudaTuner>* out) {
  const CudaDriver& driver = GetCudaDriver();
  if (!driver.status.ok()) {
    return Status::Unavailable(Text("tune: CUDA is not available: ", driver.status.text(), "; ", driver.remedy));
  }
  out->reset(new CudaTuner(driver, CudaMemory()));
  int bytes = 0;
  if (driver.DeviceGetAttribute(&bytes, cu::kL2CacheBytes, driver.devices.front().handle) == cu::kSuccess) {
    (*out)->l2_bytes_ = bytes;
  }
  return {};
}

Status CudaTuner::Tune(std::span<const RopeCase> cases, const TuneOptions& options,
                       const std::function<bool(const RopeCase&, const Status&, const TunedCase&)>& visit) {
  const CudaDevice& device = driver_.devices.front().properties;
  CudaContextScope scope;
  ROPEWALK_TRY(scope.Enter(driver_, 0));
  std::unique_ptr<CudaGraphs> graphs;
  ROPEWALK_TRY(CudaGraphs::Open(driver_, &graphs));
  std::mutex timing, visiting;
  std::atomic<size_t> next{0};
  std::atomic<bool> stopped{false};
  std::exception_ptr thrown;
  // Memory that is asked for or given back has the device wait, and would end another search's capture.
  const auto end = [&timing](Search* search) {
    const std::lock_guard lock(timing);
    TryRopeCudaShape(std::nullopt);
    delete search;
  };
  const auto search_one = [&](const RopeCase& c, TunedCase* tuned) -> Status {
    CudaContextScope here;
    ROPEWALK_TRY(here.Enter(driver_, 0));
    const std::unique_ptr<Search, decltype(end)> search(new Search(device, *graphs, memory_, timing, tuned), end);
    ROPEWALK_TRY(search->Make(c, options, l2_bytes_));
    return search->Run();
  };
  const auto work = [&] {
    for (size_t i = next++; i < cases.size() && !stopped; i = next++) {
      try {
        TunedCase tuned;
        const Status status = search_one(cases[i], &tuned);
        const std::lock_guard lock(visiting);
        if (!visit(cases[i], status, tuned)) stopped = true;
      } catch (...) {
        const std::lock_guard lock(visiting);
        thrown = std::current_exception();
        stopped = true;
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(kAtATime, cases.size()); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (thrown) std::rethrow_exception(thrown);
  return {};
}

}  // namespace ropewalk::bench
