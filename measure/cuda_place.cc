// Cases timed on a CUDA device, by graphs of many calls that are replayed. From 1,024 tokens on the calls go round so
// many buffers that nothing is left in the L2 cache; below, everything stays there. The floor is searched on the very
// buffers, and the best of it takes turns with ours.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <utility>

#include "backends/cuda/context.h"
#include "base/text.h"
#include "measure/cuda_floor.h"
#include "measure/cuda_graphs.h"
#include "measure/place.h"
#include "measure/timed_case.h"

namespace ropewalk::bench {
namespace {

constexpr double kGraphSeconds = 2e-3;  // a graph shall take about so long
constexpr int64_t kMaxGraphCalls = 1600;
constexpr size_t kBestFloors = 3;  // floors that are timed beside ours

// Ours or a floor, in a graph.
struct Contender {
  std::function<Status(size_t copy)> call;
  CudaGraph graph = nullptr;
  int64_t calls = 0;  // in the graph
  std::vector<double> seconds = {};
};

class Cuda final : public Place {
 public:
  explicit Cuda(const CudaDriver& driver) : driver_(driver) {
    int bytes = 0;
    if (driver_.DeviceGetAttribute(&bytes, cu::kL2CacheBytes, info().handle) == cu::kSuccess) l2_bytes_ = bytes;
  }

  DeviceMemory& memory() const override { return CudaMemory(); }
  std::string device() const override { return info().name; }
  std::string driver() const override {
    std::string version;  // of the kernel module, where the system tells
    std::ifstream("/sys/module/nvidia/version") >> version;
    return Text(version, version.empty() ? "" : " ", "for CUDA ", CudaVersionText(driver_.version));
  }
  bool threaded() const override { return false; }
  std::string FloorText() const override {
    return Text("the best of a search over kernels; CUDA graphs, a cold L2 (", l2_bytes_ >> 20, " MB) from ",
                kColdTokens, " tokens on");
  }
  std::vector<int64_t> Tokens(uint32_t) const override { return {1, 64, 256, 1024, 4096}; }
  std::string MemoryOf(const RopeCase& c) const override { return Cold(c) ? "DRAM" : "L2"; }

  Status Time(const TimingOptions& options, CaseCall& call, TimedCase* out) override {
    CudaContextScope scope;
    ROPEWALK_TRY(scope.Enter(driver_, 0));
    std::unique_ptr<CudaGraphs> graphs;
    ROPEWALK_TRY(CudaGraphs::Open(driver_, &graphs));
    Copies copies(memory(), *graphs);
    ROPEWALK_TRY(copies.Make(call, CopyCount(call.test_case(), l2_bytes_, options.cold_bytes)));
    Race race{*graphs, copies, Cold(call.test_case())};

    Search* search = nullptr;
    ROPEWALK_TRY(FindFloors(race, &search));
    out->bytes = search->rows.read_bytes() + search->rows.written_bytes();
    std::vector<Contender> contenders;
    contenders.push_back({[&](size_t i) -> Status {
      if (ropewalk_rope(&copies.calls()[i].args, graphs->stream()) == ROPEWALK_OK) return {};
      return Status::Internal(Text("case ", call.test_case().name, " fails when repeated: ", ropewalk_last_error()));
    }});
    for (const CudaFloorShape& shape : search->finalists) contenders.push_back(FloorOf(race, *search, shape));
    for (Contender& contender : contenders) ROPEWALK_TRY(race.Load(&contender));
    ROPEWALK_TRY(race.Run(&contenders, options.seconds));

    size_t best = 1;
    for (size_t i = 2; i < contenders.size(); ++i) {
      if (Median(contenders[i].seconds) < Median(contenders[best].seconds)) best = i;
    }
    const std::vector<double>&ours = contenders[0].seconds, &floor = contenders[best].seconds;
    std::vector<double> ratios;
    for (size_t i = 0; i < ours.size(); ++i) ratios.push_back(ours[i] / floor[i]);
    out->floor_shape = ShapeName(search->finalists[best - 1]);
    out->time = {Median(ours),        Median(floor), Median(ratios), static_cast<int>(ours.size()),
                 contenders[0].calls, Noisy(ratios)};
    return {};
  }

 private:
  // The copies of one case and those who work on them in turns.
  struct Race {
    CudaGraphs& graphs;
    Copies& copies;
    bool cold;

    // A replay on the first data, seconds of one call.
    Status Sample(Contender* contender) {
      double seconds = 0;
      ROPEWALK_TRY(copies.Restore());
      ROPEWALK_TRY(graphs.Replay(contender->graph, &seconds));
      contender->seconds.push_back(seconds / static_cast<double>(contender->calls));
      return {};
    }

    // A graph of about kGraphSeconds.
    Status Load(Contender* contender) {
      const size_t count = copies.calls().size();
      // Once on each copy before: what a first call asks the driver for is no part of a graph.
      for (size_t i = 0; i < count; ++i) ROPEWALK_TRY(contender->call(i));
      ROPEWALK_TRY(graphs.Wait());
      const auto capture = [&](int64_t calls) {
        contender->calls = calls;
        return graphs.Capture(
            [&]() -> Status {
              for (int64_t i = 0; i < calls; ++i) ROPEWALK_TRY(contender->call(static_cast<size_t>(i) % count));
              return {};
            },
            &contender->graph);
      };
      const auto round = static_cast<int64_t>(cold ? count : 5 * count);
      ROPEWALK_TRY(capture(round));
      ROPEWALK_TRY(Sample(contender));
      const double seconds = contender->seconds.back() * static_cast<double>(round);
      contender->seconds.clear();
      const auto rounds =
          std::min(static_cast<int64_t>(std::ceil(kGraphSeconds / std::max(seconds, 1e-9))), kMaxGraphCalls / round);
      return seconds < kGraphSeconds / 2 && rounds > 1 ? capture(round * rounds) : Status();
    }

    Status Run(std::vector<Contender>* contenders, double seconds) {
      constexpr int kMinRounds = 9, kMaxRounds = 400;
      const size_t count = contenders->size();
      double spent = 0;
      for (int number = 0; number < kMinRounds || (number < kMaxRounds && spent < seconds); ++number) {
        Status status;
        spent += SecondsOf([&] {
          for (size_t i = 0; i < count && status.ok(); ++i) {
            status = Sample(&(*contenders)[number % 2 ? i : count - 1 - i]);
          }
        });
        ROPEWALK_TRY(std::move(status));
      }
      return {};
    }
  };

  // The floors of rows that are laid out alike.
  struct Search {
    CudaFloorRows rows;
    std::unique_ptr<CudaFloor> floor;
    Block positions, weight;
    std::vector<CudaFloorShape> finalists;
  };

  const CudaDeviceInfo& info() const { return driver_.devices.front(); }
  bool Cold(const RopeCase& c) const { return RunsCold(c, l2_bytes_); }

  static Contender FloorOf(Race& race, const Search& search, const CudaFloorShape& shape) {
    return {[&race, &search, shape](size_t i) {
      CudaFloorData data = FloorDataOf(InPlace(race.copies.calls()[i].regions));
      data.pointers[kFloorPositions] = search.positions.data();
      data.pointers[kFloorWeight] = search.weight.data();
      return search.floor->Launch(shape, data, race.graphs.stream());
    }};
  }

  // The best few shapes for such rows, searched at the first time.
  Status FindFloors(Race& race, Search** out) {
    CudaFloorRows rows;
    ROPEWALK_TRY(RowsOf(InPlace(race.copies.calls()[0].regions), !race.cold, &rows));
    const auto [entry, fresh] = searches_.try_emplace(CudaFloorSource(rows), nullptr);
    *out = entry->second.get();
    if (!fresh) return {};
    std::unique_ptr<Search> search(new Search{rows, nullptr, Block(memory()), Block(memory()), {}});
    if (const Status status = SearchFloors(race, search.get()); !status.ok()) {
      searches_.erase(entry);
      return status;
    }
    *out = search.get();
    entry->second = std::move(search);
    return {};
  }

  Status SearchFloors(Race& race, Search* search) const {
    constexpr int kSamples = 3;
    const CudaFloorRows& rows = search->rows;
    ROPEWALK_TRY(CudaFloor::Make(driver_, info().properties, rows, &search->floor));
    const std::vector<uint32_t> positions(static_cast<size_t>(rows.rows), kFloorFlip);
    const std::vector<char> weight(static_cast<size_t>(rows.run_bytes));
    ROPEWALK_TRY(search->positions.Allocate(positions.size() * sizeof(uint32_t)));
    ROPEWALK_TRY(search->weight.Allocate(weight.size()));
    ROPEWALK_TRY(memory().CopyIn(search->positions.data(), positions.data(), positions.size() * sizeof(uint32_t)));
    ROPEWALK_TRY(memory().CopyIn(search->weight.data(), weight.data(), weight.size()));

    std::vector<std::pair<double, size_t>> best;
    const std::vector<CudaFloorShape>& shapes = search->floor->shapes();
    for (size_t i = 0; i < shapes.size(); ++i) {
      Contender contender = FloorOf(race, *search, shapes[i]);
      ROPEWALK_TRY(race.Load(&contender));
      for (int sample = 0; sample < kSamples; ++sample) ROPEWALK_TRY(race.Sample(&contender));
      best.emplace_back(*std::ranges::min_element(contender.seconds), i);
    }
    std::ranges::sort(best);
    best.resize(std::min(best.size(), kBestFloors));
    for (const auto& [seconds, i] : best) {
      bool right = false;
      ROPEWALK_TRY(race.copies.Restore());
      ROPEWALK_TRY(FloorOf(race, *search, shapes[i]).call(0));
      ROPEWALK_TRY(race.graphs.Wait());
      ROPEWALK_TRY(race.copies.CheckFloor(&right));
      if (!right) {
        return Status::Internal(Text("the floor (", ShapeName(shapes[i]), ") does not flip the bytes of q and k"));
      }
      search->finalists.push_back(shapes[i]);
    }
    return {};
  }

  const CudaDriver& driver_;
  int64_t l2_bytes_ = 0;
  std::map<std::string, std::unique_ptr<Search>> searches_;  // by the floor's source
};

}  // namespace

Status CudaPlace(Place** out) {
  const CudaDriver& driver = GetCudaDriver();
  if (!driver.status.ok()) {
    return Status::Unavailable(Text("bench: CUDA is not available: ", driver.status.text(), "; ", driver.remedy));
  }
  // Never destroyed: the driver may be gone before our destructors run.
  static Cuda* const cuda = new Cuda(driver);
  *out = cuda;
  return {};
}

}  // namespace ropewalk::bench
