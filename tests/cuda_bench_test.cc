// Timing on CUDA without a GPU: what is captured, replayed, put back and told, against a driver that stands in for
// libcuda, whose kernels are done on the host and whose clock each launch moves. The floor's kernels compile for real.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "backends/cuda/bundle.h"
#include "backends/cuda/nvrtc.h"
#include "bench/cuda_floor.h"
#include "bench/timed_case.h"
#include "core/text.h"
#include "tests/cuda_variants.h"
#include "tests/fake_libcuda.h"
#include "tests/fresh_process.h"

namespace ropewalk::bench {
namespace {

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// A process with the fake driver and compiler

FakeCuda& Fake() {
  static FakeCuda& fake = FakeOf<FakeCuda>(ROPEWALK_FAKE_LIBCUDA, "fake_cuda");
  return fake;
}

void WithFakes(const std::function<void(Place& place)>& body) {
  InChild([&] {
    ChangeEnvironment({"ROPEWALK_PDL", "ROPEWALK_BUNDLE", "FAKE_CUDA_DEVICES", "FAKE_NVRTC_FAIL"},
                      {{"ROPEWALK_LIBCUDA", ROPEWALK_FAKE_LIBCUDA},
                       {"ROPEWALK_LIBNVRTC", ROPEWALK_FAKE_NVRTC},
                       {"ROPEWALK_CACHE_DIR", Directory() + "/cache"},
                       {"FAKE_CUDA_LEGACY_STREAM", "1"}});
    Place* place = nullptr;
    const Status status = PlaceOf("cuda", &place);
    ASSERT_TRUE(status.ok()) << status.text();
    body(*place);
  });
}

class CudaBench : public ::testing::Test {
 protected:
  static void TearDownTestSuite() { fs::remove_all(Directory()); }
};

// ---------------------------------------------------------------------------------------------------------------------
// What kernels do

bool IsRope(const FakeLaunch& launch) { return launch.function == "rope_kernel"; }
bool InGraph(const FakeLaunch& launch) { return launch.in_graph; }

// The rotation of a kernel's arguments, by the CPU backend.
void Rotate(const rope_cuda_args& cuda, const ropewalk_frequencies* frequencies, const RopeCase& c) {
  const rope_params& p = cuda.params;
  int64_t q_shape[] = {p.tokens, p.q_heads, p.head_dim}, k_shape[] = {p.tokens, p.k_heads, p.head_dim};
  int64_t q_strides[] = {p.q.token, p.q.head, 1}, k_strides[] = {p.k.token, p.k.head, 1};
  int64_t positions_shape[] = {p.tokens}, weight_shape[] = {p.head_dim};
  const DLDataType bf16 = {kDLBfloat, 16, 1}, i64 = {kDLInt, 64, 1};
  DLTensor q = {cuda.q, {kDLCPU, 0}, 3, bf16, q_shape, q_strides, 0};
  DLTensor k = {cuda.k, {kDLCPU, 0}, 3, bf16, k_shape, k_strides, 0};
  const DLTensor positions = {const_cast<void*>(cuda.positions), {kDLCPU, 0}, 1, i64, positions_shape, nullptr, 0};
  const DLTensor q_weight = {const_cast<void*>(cuda.q_weight), {kDLCPU, 0}, 1, bf16, weight_shape, nullptr, 0};
  const DLTensor k_weight = {const_cast<void*>(cuda.k_weight), {kDLCPU, 0}, 1, bf16, weight_shape, nullptr, 0};
  ropewalk_rope_args args;
  args.q = &q;
  args.k = &k;
  args.positions = &positions;
  args.frequencies = frequencies;
  args.pairing = c.pairing;
  args.eps = c.eps;
  if (cuda.q_weight) {
    args.q_weight = &q_weight;
    args.k_weight = &k_weight;
  }
  EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
}

void FlipBytes(void* data, int64_t bytes) {
  auto* at = static_cast<unsigned char*>(data);
  for (int64_t i = 1; i < bytes; i += 2) at[i] ^= 0x80;
}

// Kernels of a case with q and k apart. `rope_us` for ours; the floor's kernel `best` takes `floor_us`, others longer.
struct Kernels {
  RopeCase c;
  double rope_us = 2, floor_us = 1;
  std::string best = "f1";
  unsigned best_threads = 128;
  bool rope_right = true, floor_right = true;
  ropewalk_frequencies* frequencies = nullptr;
  std::vector<const void*> replayed = {};  // q of ours in graphs, in turn
  int copied_before = -1, samples = 0;     // each sample begins with data put back
  unsigned char first_byte = 0;

  void Install() {
    ASSERT_EQ(ropewalk_frequencies_create(c.theta, c.rotary_dim, nullptr, 0, &frequencies), ROPEWALK_OK);
    Fake().execute = [this](const FakeLaunch& launch) {
      auto* const q = static_cast<unsigned char*>(IsRope(launch) ? launch.args.q : launch.pointers[0]);
      if (InGraph(launch)) {
        // What graphs leave behind must not be what the next sample begins with.
        const int copied = Fake().calls["cuMemcpyDtoDAsync_v2"];
        if (copied != copied_before) {
          if (samples++ == 0) first_byte = *q;
          EXPECT_EQ(*q, first_byte);
        }
        copied_before = copied;
        ++*q;
      }
      if (IsRope(launch)) {
        if (InGraph(launch)) {
          replayed.push_back(q);
        } else if (rope_right) {
          Rotate(launch.args, frequencies, c);
        }
        return rope_us;
      }
      if (!InGraph(launch) && floor_right) {
        FlipBytes(launch.pointers[0], c.tokens * c.q_heads * c.head_dim * 2);
        FlipBytes(launch.pointers[1], c.tokens * c.k_heads * c.head_dim * 2);
      }
      return launch.function == best && launch.block_x == best_threads ? floor_us : 1.5 * floor_us;
    };
  }
};

TimingOptions Quick() {
  TimingOptions options;
  options.seconds = 1e-3;
  options.cold_bytes = 16'000'000;
  return options;
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_F(CudaBench, FewTokensStayInTheCache) {
  WithFakes([](Place& place) {
    Kernels kernels{ShapeCase(64, 4, 2, 64, kBF16), 3, 1.5};
    kernels.Install();
    EXPECT_EQ(place.MemoryOf(kernels.c), "L2");
    EXPECT_EQ(place.device(), "Fake GPU");
    EXPECT_FALSE(place.threaded());
    for (int turn = 0; turn < 2; ++turn) {
      const int64_t allocated = Fake().allocated;
      kernels.replayed.clear();
      TimedCase timed;
      const Status status = TimeCase(kernels.c, Quick(), &timed, place);
      ASSERT_TRUE(status.ok()) << status.text();
      EXPECT_TRUE(timed.held) << timed.message;
      EXPECT_EQ(timed.backend, "cuda");
      EXPECT_EQ(timed.checked_tokens, 64);
      EXPECT_NEAR(timed.time.ours, 3e-6, 1e-9);
      EXPECT_NEAR(timed.time.floor, 1.5e-6, 1e-9);
      EXPECT_NEAR(timed.time.ratio, 0.5, 1e-3);
      EXPECT_GE(timed.time.pairs, 9);
      EXPECT_EQ(timed.time.calls, 680);  // 17 rounds of 5 x 8 calls: 2 ms of 3 us
      EXPECT_EQ(timed.bytes, 2 * 64 * 6 * 64 * 2);
      EXPECT_EQ(timed.floor_shape, "flat, 16 B x2, 128 threads");
      EXPECT_GE(kernels.samples, timed.time.pairs * 4);  // ours and three floors
      kernels.samples = 0;
      // Round eight copies, each far enough from the next one not to be taken for its k.
      const std::set<const void*> copies(kernels.replayed.begin(), kernels.replayed.end());
      EXPECT_EQ(copies.size(), 8u);
      for (size_t i = 8; i < 680; ++i) ASSERT_EQ(kernels.replayed[i], kernels.replayed[i - 8]);
      EXPECT_EQ(Fake().graphs, 0) << "graphs that were not destroyed";
      // The floor of such rows stays; the second time nothing is left behind.
      if (turn == 1) {
        EXPECT_EQ(Fake().allocated, allocated);
      }
    }
  });
}

TEST_F(CudaBench, FromKTokensOnTheCacheIsCold) {
  WithFakes([](Place& place) {
    Kernels kernels{ShapeCase(1024, 4, 2, 64, kBF16), 200, 100, "f0", 256};
    SetVariant(true, ROPEWALK_INTERLEAVED, &kernels.c);
    kernels.Install();
    EXPECT_EQ(place.MemoryOf(kernels.c), "DRAM");
    TimedCase timed;
    TimingOptions options = Quick();
    options.full_check = 1;  // some tokens alone
    const Status status = TimeCase(kernels.c, options, &timed, place);
    ASSERT_TRUE(status.ok()) << status.text();
    EXPECT_TRUE(timed.held) << timed.message;
    EXPECT_EQ(timed.checked_tokens, 128);
    EXPECT_NEAR(timed.time.ratio, 0.5, 1e-3);
    EXPECT_EQ(timed.floor_shape, "row, 16 B x1, 256 threads");
    const std::set<const void*> copies(kernels.replayed.begin(), kernels.replayed.end());
    EXPECT_EQ(copies.size(), 21u);  // 16 MB of 786,432 bytes
    EXPECT_EQ(timed.time.calls, 21);
  });
}

TEST_F(CudaBench, BigRowsAreCold) {
  WithFakes([](Place& place) {
    EXPECT_EQ(place.MemoryOf(ShapeCase(512, 256, 64, 256, kBF16)), "DRAM");
    EXPECT_EQ(place.MemoryOf(ShapeCase(512, 32, 8, 128, kBF16)), "L2");
  });
}

TEST_F(CudaBench, AWrongResultIsNotTimed) {
  WithFakes([](Place& place) {
    Kernels kernels{ShapeCase(64, 4, 2, 64, kBF16)};
    kernels.rope_right = false;
    kernels.Install();
    for (const int64_t full_check : {int64_t{1} << 20, int64_t{1}}) {
      TimedCase timed;
      TimingOptions options = Quick();
      options.full_check = full_check;
      const Status status = TimeCase(kernels.c, options, &timed, place);
      EXPECT_TRUE(status.ok()) << status.text();
      EXPECT_FALSE(timed.held);
      EXPECT_TRUE(timed.message.starts_with("q")) << timed.message;
      EXPECT_EQ(timed.time.pairs, 0);
    }
    EXPECT_EQ(Fake().calls["cuGraphLaunch"], 0);
  });
}

TEST_F(CudaBench, AFloorThatDoesNotMoveTheBytesIsAnError) {
  WithFakes([](Place& place) {
    Kernels kernels{ShapeCase(64, 4, 2, 64, kBF16)};
    kernels.floor_right = false;
    kernels.Install();
    TimedCase timed;
    const Status status = TimeCase(kernels.c, Quick(), &timed, place);
    EXPECT_EQ(status.text(),
              "the floor (flat, 16 B x2, 128 threads) does not flip the bytes of q and k; this is a bug in Ropewalk");
    EXPECT_EQ(Fake().graphs, 0);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The floor's kernels

FloorRegion Region(uintptr_t at, int64_t rows, int64_t row_stride, int64_t runs, int64_t run_stride, int64_t bytes) {
  return {reinterpret_cast<unsigned char*>(at), rows, row_stride, runs, run_stride, bytes};
}

TEST_F(CudaBench, RowsOfTheFloor) {
  CudaFloorRows rows;
  // k behind q in a packed row is one part with it.
  FloorRegion packed[] = {Region(0x1000, 8, 640, 3, 128, 128), Region(0x1180, 8, 640, 2, 128, 128)};
  ASSERT_TRUE(RowsOf(packed, false, &rows).ok());
  EXPECT_EQ(rows.parts[0].runs, 5);
  EXPECT_EQ(rows.parts[1].runs, 0);
  EXPECT_EQ(rows.access_bytes, 16);
  EXPECT_EQ(rows.bytes(), 8 * 640);
  // Apart, and only the rotated part of each head, which begins 24 bytes into it.
  FloorRegion apart[] = {Region(0x1018, 8, 384, 3, 128, 64), Region(0x4018, 8, 256, 2, 128, 64)};
  ASSERT_TRUE(RowsOf(apart, true, &rows).ok());
  EXPECT_EQ(rows.parts[1].runs, 2);
  EXPECT_EQ(rows.access_bytes, 8);
  EXPECT_EQ(rows.bytes(), 8 * 5 * 64);
  // Batch entries that lie side by side.
  FloorRegion batch[] = {Region(0x1000, 8, 128, 1, 128, 128), Region(0x1400, 8, 128, 1, 128, 128)};
  ASSERT_TRUE(RowsOf(batch, false, &rows).ok());
  EXPECT_EQ(rows.rows, 16);
  FloorRegion scattered[] = {Region(0x1000, 8, 128, 1, 128, 128), Region(0x2000, 8, 128, 1, 128, 128),
                             Region(0x3000, 8, 128, 1, 128, 128)};
  EXPECT_FALSE(RowsOf(scattered, false, &rows).ok());
}

TEST_F(CudaBench, FloorsCompile) {
  const Nvrtc* nvrtc = nullptr;
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) GTEST_SKIP() << status.text();
  FloorRegion dense[] = {Region(0x1000, 4096, 8192, 32, 256, 256), Region(0x9000000, 4096, 2048, 8, 256, 256)};
  FloorRegion partial[] = {Region(0x1008, 64, 8192, 32, 256, 72)};
  FloorRegion narrow[] = {Region(0x1002, 64, 30, 3, 10, 10)};
  FloorRegion huge[] = {Region(0x1000, 1 << 20, 8192, 32, 256, 256)};
  const std::span<const FloorRegion> all[] = {dense, partial, narrow, huge};
  for (const std::string& arch : BundleArchs()) {
    for (const auto& regions : all) {
      for (const bool few : {false, true}) {
        CudaFloorRows rows;
        ASSERT_TRUE(RowsOf(regions, few, &rows).ok());
        Compilation compilation;
        const Status status = CompileCuda(*nvrtc, CudaFloorSource(rows), arch, /*verbose=*/true, &compilation);
        ASSERT_TRUE(status.ok()) << status.text();
        const PtxasText said = ReadPtxas(compilation.log);
        EXPECT_EQ(said.warnings, "") << arch;
        EXPECT_EQ(said.spilled_bytes, 0) << arch;
        const std::vector<CudaFloorShape> shapes = CudaFloorShapes(rows);
        ASSERT_FALSE(shapes.empty());
        for (const CudaFloorShape& shape : shapes) EXPECT_LE(shape.bytes, rows.access_bytes);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The command

struct Ran {
  int code;
  std::string text;  // of both streams
};

Ran Command(const std::string& arguments, const std::string& environment = "") {
  const std::string line =
      Text("ROPEWALK_LIBCUDA='", ROPEWALK_FAKE_LIBCUDA, "' ROPEWALK_LIBNVRTC='", ROPEWALK_FAKE_NVRTC,
           "' ROPEWALK_CACHE_DIR='", Directory(), "/cache' FAKE_CUDA_LEGACY_STREAM=1 ROPEWALK_MODELS='",
           ROPEWALK_MODELS_DIR, "' ", environment, " '", ROPEWALK_COMMAND, "' ", arguments, " 2>&1");
  FILE* pipe = popen(line.c_str(), "r");
  if (!pipe) return {-1, "popen failed"};
  Ran ran = {0, ""};
  char buffer[4096];
  for (size_t count; (count = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) ran.text.append(buffer, count);
  const int status = pclose(pipe);
  ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return ran;
}

class CudaBenchCommand : public CudaBench {
 protected:
  void SetUp() override {
    if (std::string(ROPEWALK_COMMAND).empty()) GTEST_SKIP() << "the command line is not built for this machine";
  }
};

// The fake's kernels do nothing here, so that every result is wrong: which must be told, and nothing be timed.
TEST_F(CudaBenchCommand, BenchTellsTheDeviceAndWrongResults) {
  const std::string json = Directory() + "/bench.json";
  const Ran ran = Command("bench --backend cuda --tokens 64 --dtype bf16 --op rope --json " + json);
  EXPECT_EQ(ran.code, 1) << ran.text;
  EXPECT_NE(ran.text.find("Fake GPU, driver "), std::string::npos) << ran.text;
  EXPECT_NE(ran.text.find("for CUDA 13.0"), std::string::npos) << ran.text;
  EXPECT_NE(ran.text.find("32/8x128  L2       bf16         -      64  rope neox"), std::string::npos) << ran.text;
  EXPECT_NE(ran.text.find("FAILED  32/8x128, rope neox bf16, 64 tokens: q["), std::string::npos) << ran.text;
  std::ifstream file(json);
  const auto out = nlohmann::json::parse(file);
  EXPECT_EQ(out["machine"]["device"], "Fake GPU");
  ASSERT_EQ(out["results"].size(), 2u);
  for (const auto& result : out["results"]) {
    EXPECT_EQ(result["device"], "Fake GPU");
    EXPECT_EQ(result["backend"], "cuda");
    EXPECT_EQ(result["held"], false);
    EXPECT_TRUE(result["threads"].is_null());
    EXPECT_EQ(result["pairs"], 0);
  }
}

TEST_F(CudaBenchCommand, RunTellsTheDeviceAndWrongResults) {
  const Ran ran = Command("run --backend cuda --model qwen3-8b --tokens 1");
  EXPECT_EQ(ran.code, 1) << ran.text;
  EXPECT_NE(ran.text.find("Fake GPU, driver "), std::string::npos) << ran.text;
  EXPECT_EQ(ran.text.find("thread"), std::string::npos) << ran.text;
}

TEST_F(CudaBenchCommand, Refusals) {
  for (const char* command : {"bench", "run"}) {
    const Ran threads = Command(Text(command, " --backend cuda --threads 2"));
    EXPECT_EQ(threads.code, 2) << threads.text;
    EXPECT_NE(threads.text.find("--threads is for the CPU: leave it out with --backend cuda"), std::string::npos)
        << threads.text;
    const Ran absent = Command(Text(command, " --backend cuda"), "FAKE_CUDA_DEVICES=none");
    EXPECT_EQ(absent.code, 2) << absent.text;
    EXPECT_NE(absent.text.find("CUDA_ERROR_NO_DEVICE"), std::string::npos) << absent.text;
  }
}

}  // namespace
}  // namespace ropewalk::bench
