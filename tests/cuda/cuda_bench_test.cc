// Timing on CUDA without a GPU: what is captured, replayed, put back and told, against a driver that stands in for
// libcuda, whose kernels are done on the host and whose clock each launch moves. The floor's kernels compile for real.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstdlib>
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
#include "base/text.h"
#include "conformance/variants.h"
#include "measure/cuda_floor.h"
#include "measure/timed_case.h"
#include "tests/fresh_process.h"
#include "tests/stand_ins/fake_libcuda.h"

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
      EXPECT_NEAR(timed.time.of_floor, 2, 1e-3);
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
    EXPECT_NEAR(timed.time.of_floor, 2, 1e-3);
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
  const FloorRegion packed[] = {Region(0x1000, 8, 640, 3, 128, 128), Region(0x1180, 8, 640, 2, 128, 128)};
  ASSERT_TRUE(RowsOf(InPlace(packed), false, &rows).ok());
  EXPECT_EQ(rows.parts[0].runs, 5);
  EXPECT_EQ(rows.parts[1].runs, 0);
  EXPECT_EQ(rows.access_bytes, 16);
  EXPECT_EQ(rows.read_bytes(), 8 * 640);
  EXPECT_EQ(rows.written_bytes(), 8 * 640);
  // Apart, and only the rotated part of each head, which begins 24 bytes into it.
  const FloorRegion apart[] = {Region(0x1018, 8, 384, 3, 128, 64), Region(0x4018, 8, 256, 2, 128, 64)};
  ASSERT_TRUE(RowsOf(InPlace(apart), true, &rows).ok());
  EXPECT_EQ(rows.parts[1].runs, 2);
  EXPECT_EQ(rows.access_bytes, 8);
  EXPECT_EQ(rows.read_bytes(), 8 * 5 * 64);
  // Batch entries that lie side by side.
  const FloorRegion batch[] = {Region(0x1000, 8, 128, 1, 128, 128), Region(0x1400, 8, 128, 1, 128, 128)};
  ASSERT_TRUE(RowsOf(InPlace(batch), false, &rows).ok());
  EXPECT_EQ(rows.rows, 16);
  const FloorRegion scattered[] = {Region(0x1000, 8, 128, 1, 128, 128), Region(0x2000, 8, 128, 1, 128, 128),
                                   Region(0x3000, 8, 128, 1, 128, 128), Region(0x4000, 8, 128, 1, 128, 128)};
  EXPECT_FALSE(RowsOf(InPlace(scattered), false, &rows).ok());
}

// A call of the floor in memory of the test, between guards: q, k and v in packed rows or apart.
struct FloorCall {
  static constexpr int64_t kGuard = 4096;
  struct alignas(256) Block {
    unsigned char bytes[256];
    bool operator==(const Block& other) const { return std::ranges::equal(bytes, other.bytes); }
  };
  struct Memory {
    std::vector<Block> blocks;
    std::string name;
  };
  int64_t tokens, heads[3], head_bytes, part_bytes;
  bool packed, few, store = false, narrow = false, k_only = false, out_of_place = false;
  int64_t slots = 0;  // odd, so that tokens have different ones

  std::vector<Memory> memory = {};
  std::vector<int64_t> slot_of = {};
  std::vector<CudaFloorTensor> tensors = {};

  // Allocates, and fills with numbers that depend on the place.
  void Make() {
    const int64_t row = (heads[0] + heads[1] + heads[2]) * head_bytes;
    const auto allocate = [&](const std::string& name, int64_t bytes) -> unsigned char* {
      Memory& made = memory.emplace_back(Memory{{}, name});
      made.blocks.resize(static_cast<size_t>((bytes + 2 * kGuard + 255) / 256));
      unsigned seed = static_cast<unsigned>(memory.size()) * 977;
      for (Block& block : made.blocks) {
        for (unsigned char& byte : block.bytes)
          byte = static_cast<unsigned char>((seed = seed * 1664525 + 1013904223) >> 24);
      }
      return made.blocks[0].bytes + kGuard;
    };
    unsigned char* const rows = packed ? allocate("rows", tokens * row) : nullptr;
    int64_t before = 0;
    for (int i = 0; i < 3; ++i) {
      if (heads[i] == 0 || (i == 2 && !store)) continue;
      CudaFloorTensor tensor;
      const int64_t stride = packed ? row : heads[i] * head_bytes;
      unsigned char* const data = packed ? rows + before : allocate(Text("tensor ", i), tokens * stride);
      tensor.rows = {data, tokens, stride, heads[i], head_bytes, part_bytes};
      before += heads[i] * head_bytes;
      const bool written = i == 0 || (i == 1 && !k_only);
      if (written) tensor.out = out_of_place ? allocate(Text("out ", i), tokens * stride) : tensor.rows.data;
      if (store && i > 0) {
        const int64_t bytes = narrow ? part_bytes / 2 : part_bytes;
        tensor.cache = {
            allocate(Text("cache ", i), slots * heads[i] * bytes), slots, heads[i] * bytes, heads[i], bytes, bytes};
      }
      tensors.push_back(tensor);
    }
    for (int64_t token = 0; token < tokens; ++token) slot_of.push_back((token * 2 + 3) % std::max<int64_t>(slots, 1));
  }

  // What the floor must do to the memory.
  void Do() {
    for (const CudaFloorTensor& tensor : tensors) {
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < tensor.rows.runs; ++head) {
          const int64_t offset = token * tensor.rows.row_stride + head * tensor.rows.run_stride;
          std::vector<unsigned char> run(tensor.rows.data + offset, tensor.rows.data + offset + part_bytes);
          FlipBytes(run.data(), part_bytes);
          if (tensor.out) std::ranges::copy(run, tensor.out + offset);
          if (!tensor.cache.bytes) continue;
          unsigned char* at = tensor.cache.data + slot_of[static_cast<size_t>(token)] * tensor.cache.row_stride +
                              head * tensor.cache.bytes;
          for (size_t i = narrow ? 1 : 0; i < run.size(); i += narrow ? 2 : 1) *at++ = run[i];
        }
      }
    }
  }

  CudaFloorData Data(const std::vector<uint32_t>& positions, const std::vector<char>& weight) const {
    CudaFloorData data = FloorDataOf(tensors);
    data.pointers[kFloorSlots] = slot_of.data();
    data.pointers[kFloorPositions] = positions.data();
    data.pointers[kFloorWeight] = weight.data();
    return data;
  }
};

std::vector<FloorCall> FloorCalls() {
  std::vector<FloorCall> calls;
  for (const bool packed : {true, false}) {
    for (const bool few : {true, false}) {
      calls.push_back({5, {3, 2, 2}, 32, 32, packed, few});
      calls.push_back({5, {3, 1, 1}, 32, 24, packed, few});  // of each head a part
      calls.push_back({3, {1, 0, 0}, 10, 10, packed, few});  // accesses of 2 bytes
      for (const bool narrow : {false, true}) {
        calls.push_back({5, {3, 2, 2}, 32, 32, packed, few, true, narrow, false, false, 9});
        calls.push_back({4, {2, 1, 1}, 48, 48, packed, few, true, narrow, true, false, 7});  // k stored only
        calls.push_back({4, {2, 1, 1}, 20, 20, packed, few, true, narrow, false, true, 7});  // out of place
      }
    }
  }
  return calls;
}

// The kernels' walk over the rows, compiled for the host: lanes one after the other, whose accesses are those of
// memory.
TEST_F(CudaBench, TheFloorMovesTheBytesOfTheCall) {
  constexpr const char* kHost = R"(
#include <cstring>
#define __device__
#define __global__
#define __launch_bounds__(N)
static struct { unsigned x; } threadIdx, blockIdx, blockDim;
template <int P> unsigned long long CachePolicy() { return 0; }
template <int B, int P> void Load(unsigned inside, const char* at, unsigned long long, unsigned (&x)[4]) {
  if (inside) { if ((unsigned long long)at % B) __builtin_trap(); std::memcpy(x, at, B); }
}
template <int B, int P> void Store(unsigned inside, char* at, unsigned long long, const unsigned (&x)[4]) {
  if (inside) { if ((unsigned long long)at % B) __builtin_trap(); std::memcpy(at, x, B); }
}
template <class T> void LoadWord(unsigned inside, const T* at, T& x) { if (inside) x = *at; }
)";
  if (std::string(ROPEWALK_HOST_CXX).empty()) GTEST_SKIP() << "no compiler for the machine that runs this";
  int number = 0;
  fs::create_directories(Directory());
  std::string source = kHost, table = "extern \"C\" void (*const kernels[])(const void*, unsigned, unsigned) = {";
  std::vector<FloorCall> calls = FloorCalls();
  std::vector<CudaFloorRows> all_rows;
  for (const FloorCall& made : calls) {
    FloorCall call = made;
    call.Make();
    CudaFloorRows& rows = all_rows.emplace_back();
    const Status status = RowsOf(call.tensors, call.few, &rows);
    ASSERT_TRUE(status.ok()) << status.text();
    std::string walk = CudaFloorWalk(rows);
    for (size_t at; (at = walk.find("extern \"C\" ")) != std::string::npos;) walk.erase(at, 11);
    std::string undefined;  // the macros of one walk must not meet the next one
    for (size_t at = 0; (at = walk.find("#define ", at)) != std::string::npos;) {
      at += 8;
      undefined += Text("#undef ", walk.substr(at, walk.find_first_of(" (", at) - at), "\n");
    }
    source += Text("namespace n", number, " {\n", walk, undefined);
    for (const CudaFloorShape& shape : CudaFloorShapes(rows)) {
      if (source.find(Text("void run", number, "_", shape.kernel, "(")) != std::string::npos) continue;
      source += Text("void run", number, "_", shape.kernel,
                     "(const void* args, unsigned blocks, unsigned threads) { blockDim.x = threads;\n"
                     "for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)\n"
                     "for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) f",
                     shape.kernel, "(*(const Args*)args); }\n");
      table += Text("n", number, "::run", number, "_", shape.kernel, ", ");
    }
    source += "}\n";
    ++number;
  }
  const std::string base = Directory() + "/walk";
  std::ofstream(base + ".cc") << source << table << "};\n";
  const std::string command =
      Text(ROPEWALK_HOST_CXX, " -std=c++17 -w -O0 -fPIC -shared ", base, ".cc -o ", base, ".so");
  ASSERT_EQ(std::system(command.c_str()), 0);
  void* const library = dlopen((base + ".so").c_str(), RTLD_NOW);
  ASSERT_NE(library, nullptr) << dlerror();
  auto* const kernels = static_cast<void (*const*)(const void*, unsigned, unsigned)>(dlsym(library, "kernels"));
  ASSERT_NE(kernels, nullptr);

  int first_kernel = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::vector<CudaFloorShape> shapes = CudaFloorShapes(all_rows[i]);
    for (const CudaFloorShape& shape : shapes) {
      FloorCall want = calls[i], got = calls[i];
      want.Make();
      want.Do();
      got.Make();
      const CudaFloorRows& rows = all_rows[i];
      const std::vector<uint32_t> positions(static_cast<size_t>(rows.rows), kFloorFlip);
      const std::vector<char> weight(static_cast<size_t>(rows.run_bytes));
      const CudaFloorData data = got.Data(positions, weight);
      std::vector<const void*> args;
      for (const int pointer : CudaFloorArguments(rows)) args.push_back(data.pointers[pointer]);
      kernels[first_kernel + shape.kernel](args.data(), static_cast<unsigned>(CudaFloorBlocks(rows, shape)),
                                           static_cast<unsigned>(shape.threads));
      ASSERT_EQ(want.memory.size(), got.memory.size());
      for (size_t m = 0; m < want.memory.size(); ++m) {
        EXPECT_TRUE(want.memory[m].blocks == got.memory[m].blocks)
            << "call " << i << ", " << want.memory[m].name << ", " << ShapeName(shape);
      }
      EXPECT_EQ(rows.stores(), calls[i].store);
    }
    first_kernel += shapes.back().kernel + 1;
  }
}

TEST_F(CudaBench, FloorsCompile) {
  const Nvrtc* nvrtc = nullptr;
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) GTEST_SKIP() << status.text();
  const FloorRegion dense[] = {Region(0x1000, 4096, 8192, 32, 256, 256), Region(0x9000000, 4096, 2048, 8, 256, 256)};
  const FloorRegion partial[] = {Region(0x1008, 64, 8192, 32, 256, 72)};
  const FloorRegion narrow[] = {Region(0x1002, 64, 30, 3, 10, 10)};
  const FloorRegion huge[] = {Region(0x1000, 1 << 20, 8192, 32, 256, 256)};
  std::vector<std::vector<CudaFloorTensor>> all = {InPlace(dense), InPlace(partial), InPlace(narrow), InPlace(huge)};
  for (const bool fp8 : {false, true}) {
    std::vector<CudaFloorTensor> store = InPlace(dense);
    store.push_back({Region(0x19000000, 4096, 2048, 8, 256, 256)});
    for (size_t i = 1; i < 3; ++i) {
      const int64_t bytes = fp8 ? 128 : 256;
      store[i].cache = Region(0x29000000 + i * 0x8000000, 4096, 8 * bytes, 8, bytes, bytes);
    }
    all.push_back(store);
  }
  for (const std::string& arch : BundleArchs()) {
    for (const std::vector<CudaFloorTensor>& tensors : all) {
      for (const bool few : {false, true}) {
        CudaFloorRows rows;
        ASSERT_TRUE(RowsOf(tensors, few, &rows).ok());
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
  EXPECT_NE(ran.text.find("32/8x128, bf16\n      64  L2    rope neox "), std::string::npos) << ran.text;
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

// The kernels for other programs. No GPU is asked for.
TEST_F(CudaBenchCommand, FloorGivesItsKernels) {
  const std::string cubin = Directory() + "/floor.cubin";
  const Ran ran = Command(
      "floor --tokens 64 --heads 4,2,2 --head-dim 64 --few --cache fp8 --slots 80 --k-store-only --arch sm_90a -o " +
          cubin,
      "FAKE_CUDA_DEVICES=none");
  ASSERT_EQ(ran.code, 0) << ran.text;
  const auto out = nlohmann::json::parse(ran.text);
  EXPECT_EQ(out["arguments"].dump(), R"(["rows0","slots","positions","weight","cache1","cache2"])");
  EXPECT_EQ(out["read_bytes"], 64 * 8 * 64 * 2);
  EXPECT_EQ(out["written_bytes"], 64 * 4 * 64 * 2 + 64 * 4 * 64);
  EXPECT_EQ(out["position"], kFloorFlip);
  EXPECT_EQ(out["shapes"][0]["name"], "flat, 16 B x1, 32 threads");
  EXPECT_EQ(out["shapes"][0]["blocks"], 64 * 8 * 64 * 2 / 16 / 32);
  EXPECT_NE(out["source"].get<std::string>().find("void f0("), std::string::npos);
  EXPECT_GT(fs::file_size(cubin), 0u);

  const struct {
    const char *arguments, *text;
  } refused[] = {
      {"", "give one of --few and --many"},
      {"--few --heads 1,2", "--heads must be q,k,v heads"},
      {"--few --rotary-dim 3", "--rotary-dim must be even and at most --head-dim"},
      {"--few --k-store-only", "--k-store-only needs --cache"},
      {"--few --cache fp8 --dtype f32", "--cache fp8 needs --dtype bf16 or f16"},
      {"--few --cache same --heads 4,2,1", "--cache needs as many heads of v as of k"},
      {"--few --cache same --rotary-dim 64", "--rotary-dim is for calls without --cache"},
  };
  for (const auto& [arguments, text] : refused) {
    const Ran not_done = Command(Text("floor ", arguments));
    EXPECT_EQ(not_done.code, 2) << arguments;
    EXPECT_NE(not_done.text.find(text), std::string::npos) << not_done.text;
  }
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
