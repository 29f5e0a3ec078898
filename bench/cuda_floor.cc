// SPDX-License-Identifier: Apache-2.0
#include "bench/cuda_floor.h"

#include <algorithm>
#include <cstdlib>

#include "backends/cuda/nvrtc.h"
#include "core/text.h"

namespace ropewalk::bench {
namespace {

// After constants of the rows. Accesses are volatile, so that all loads of a thread are issued before its first store,
// and predicated, so that no branch stands between them.
constexpr const char* kSource = R"(
struct Args { char* parts[2]; const unsigned* positions; const char* weight; };

template <int P> __device__ unsigned long long CachePolicy() {
  unsigned long long policy = 0;
  if constexpr (P == 2) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

#define IF(INSIDE, ACCESS) "{ .reg .pred p; setp.ne.u32 p, " INSIDE ", 0; @p " ACCESS "; }"
#define LOAD16(MODIFIERS, HINT)                                                                  \
  asm volatile(IF("%5", "ld.global" MODIFIERS ".v4.u32 {%0,%1,%2,%3}, [%4]" HINT)                \
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(at), "r"(inside), "l"(policy))
#define STORE16(MODIFIERS, HINT)                                                                 \
  asm volatile(IF("%5", "st.global" MODIFIERS ".v4.u32 [%4], {%0,%1,%2,%3}" HINT)                \
               :: "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(at), "r"(inside), "l"(policy) : "memory")

template <int B, int P>
__device__ void Load(unsigned inside, const char* at, unsigned long long policy, unsigned (&x)[4]) {
  if constexpr (B == 16 && P == 0) LOAD16("", "");
  if constexpr (B == 16 && P == 1) LOAD16(".L1::no_allocate", "");
  if constexpr (B == 16 && P == 2) LOAD16(".L1::evict_first.L2::cache_hint", ", %6");
  if constexpr (B == 8)
    asm volatile(IF("%3", "ld.global.v2.u32 {%0,%1}, [%2]") : "=r"(x[0]), "=r"(x[1]) : "l"(at), "r"(inside));
  if constexpr (B == 4) asm volatile(IF("%2", "ld.global.u32 %0, [%1]") : "=r"(x[0]) : "l"(at), "r"(inside));
  if constexpr (B == 2) {
    unsigned short half;
    asm volatile(IF("%2", "ld.global.u16 %0, [%1]") : "=h"(half) : "l"(at), "r"(inside));
    x[0] = half;
  }
}

template <int B, int P>
__device__ void Store(unsigned inside, char* at, unsigned long long policy, const unsigned (&x)[4]) {
  if constexpr (B == 16 && P == 0) STORE16("", "");
  if constexpr (B == 16 && P == 1) STORE16(".L1::no_allocate", "");
  if constexpr (B == 16 && P == 2) STORE16(".L1::evict_first.L2::cache_hint", ", %6");
  if constexpr (B == 8)
    asm volatile(IF("%3", "st.global.v2.u32 [%2], {%0,%1}") :: "r"(x[0]), "r"(x[1]), "l"(at), "r"(inside) : "memory");
  if constexpr (B == 4) asm volatile(IF("%2", "st.global.u32 [%1], %0") :: "r"(x[0]), "l"(at), "r"(inside) : "memory");
  if constexpr (B == 2)
    asm volatile(IF("%2", "st.global.u16 [%1], %0") :: "h"((unsigned short)x[0]), "l"(at), "r"(inside) : "memory");
}

template <int B> __device__ char* At(const Args& args, Index row, int column) {
  constexpr int kRun = kRunBytes / B;
  constexpr bool kDense = kRunStride0 == kRunBytes && (kRuns1 == 0 || kRunStride1 == kRunBytes);
  const bool second = kRuns1 && column >= kRuns0 * kRun;
  char* const part = second ? args.parts[1] : args.parts[0];
  const Index row_stride = second ? kRowStride1 : kRowStride0, run_stride = second ? kRunStride1 : kRunStride0;
  if (second) column -= kRuns0 * kRun;
  const Index place = kDense ? (Index)column * B : column / kRun * run_stride + column % kRun * B;
  return part + (row * row_stride + place);
}

// Flips bits of all runs: U accesses of B bytes in flight.
template <bool ByRow, int B, int U, int P> __device__ void Flip(const Args& args) {
  constexpr int kRow = (kRuns0 + kRuns1) * (kRunBytes / B);
  const unsigned long long policy = CachePolicy<P>();
  const Index end = ByRow ? (Index)kRow : kRows * (Index)kRow;
  Index first = ByRow ? (Index)threadIdx.x : (Index)blockIdx.x * (Index)(blockDim.x * U) + (Index)threadIdx.x;
  do {
    char* at[U];
    unsigned inside[U], x[U][4], weight[U][4], position[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Index i = first + u * (Index)blockDim.x;
      inside[u] = i < end;
      const Index row = ByRow ? (Index)blockIdx.x : i / kRow;
      const int column = (int)(ByRow ? i : i % kRow);
      at[u] = At<B>(args, row, column);
      Load<B, P>(inside[u], at[u], policy, x[u]);
      if constexpr (kFew) {
        asm volatile(IF("%2", "ld.global.u32 %0, [%1]") : "=r"(position[u]) : "l"(args.positions + row), "r"(inside[u]));
        Load<B, 0>(inside[u], args.weight + column % (kRunBytes / B) * B, 0, weight[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int word = 0; word < (B < 4 ? 1 : B / 4); ++word)
        x[u][word] ^= kFew ? position[u] ^ weight[u][word] : 0x80008000u;
      Store<B, P>(inside[u], at[u], policy, x[u]);
    }
    first += U * (Index)blockDim.x;
  } while (ByRow && first < end);
}
)";

// Joins regions that lie one behind the other, in memory or in each row.
std::vector<FloorRegion> Parts(std::span<const FloorRegion> regions) {
  std::vector<FloorRegion> parts;
  for (const FloorRegion& region : regions) {
    bool joined = false;
    for (FloorRegion& part : parts) {
      const bool alike =
          part.bytes == region.bytes && part.row_stride == region.row_stride && part.run_stride == region.run_stride;
      if (!alike || joined) continue;
      if (part.runs == region.runs && part.data + part.rows * part.row_stride == region.data) {  // the next batch entry
        part.rows += region.rows;
        joined = true;
      } else if (part.rows == region.rows && part.data + part.runs * part.run_stride == region.data &&
                 (part.runs + region.runs) * part.run_stride <= part.row_stride) {  // k behind q
        part.runs += region.runs;
        joined = true;
      }
    }
    if (!joined) parts.push_back(region);
  }
  return parts;
}

int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::string ShapeName(const CudaFloorShape& shape) {
  constexpr const char* kPolicies[] = {"", ", not in L1", ", evict first"};
  return Text(shape.by_row ? "row" : "flat", ", ", shape.bytes, " B x", shape.in_flight, ", ", shape.threads,
              " threads", kPolicies[shape.policy]);
}

Status RowsOf(std::span<const FloorRegion> regions, bool few, CudaFloorRows* out) {
  *out = {};
  const std::vector<FloorRegion> parts = Parts(regions);
  const bool alike = std::ranges::all_of(
      parts, [&](const FloorRegion& part) { return part.rows == parts[0].rows && part.bytes == parts[0].bytes; });
  if (parts.empty() || parts.size() > 2 || !alike) {
    return Status::Invalid("bench: the CUDA floor knows rows of q and of k alone; batches must lie side by side");
  }
  out->few = few;
  out->rows = parts[0].rows;
  out->run_bytes = parts[0].bytes;
  uint64_t bits = 16 | static_cast<uint64_t>(out->run_bytes);
  for (size_t i = 0; i < parts.size(); ++i) {
    out->parts[i] = {parts[i].runs, parts[i].row_stride, parts[i].run_stride};
    bits |= reinterpret_cast<uintptr_t>(parts[i].data) | static_cast<uint64_t>(parts[i].row_stride) |
            static_cast<uint64_t>(parts[i].run_stride);
  }
  out->access_bytes = static_cast<int>(bits & -bits);
  return {};
}

CudaFloorData FloorDataOf(std::span<const FloorRegion> regions) {
  CudaFloorData data;
  const std::vector<FloorRegion> parts = Parts(regions);
  for (size_t i = 0; i < std::min<size_t>(parts.size(), 2); ++i) data.parts[i] = parts[i].data;
  return data;
}

std::vector<CudaFloorShape> CudaFloorShapes(const CudaFloorRows& rows) {
  std::vector<CudaFloorShape> shapes;
  int kernels = 0;
  const auto add = [&](bool by_row, int bytes, int in_flight, int policy, std::initializer_list<int> threads) {
    if (bytes > rows.access_bytes) return;
    for (const int count : threads) shapes.push_back({by_row, bytes, in_flight, policy, kernels, count});
    ++kernels;
  };
  if (rows.few) {
    for (const int bytes : {16, 8, 4, 2}) {
      if (bytes == 2 && rows.access_bytes > 2) continue;
      for (const int in_flight : {1, 2}) {
        if (in_flight == 1 || bytes >= 8) add(false, bytes, in_flight, 0, {32, 64, 128, 256, 512});
      }
    }
    return shapes;
  }
  const int bytes = rows.access_bytes;
  for (const int policy : {0, 1, 2}) {
    if (policy && bytes < 16) continue;
    for (const int in_flight : {1, 2, 4}) {
      add(true, bytes, in_flight, policy, {128, 256, 384, 512, 768});
      add(false, bytes, in_flight, policy, {128, 256, 512});
    }
  }
  return shapes;
}

std::string CudaFloorSource(const CudaFloorRows& rows) {
  const auto& [q, k] = rows.parts;
  // Numbers of accesses and distances in bytes: 32 bits where they suffice, with room for the last block.
  const int64_t reach = rows.rows * std::max(std::abs(q.row_stride), std::abs(k.row_stride));
  const bool narrow = std::max(rows.bytes(), reach) < int64_t{1} << 30;
  std::string source = Text("using Index = ", narrow ? "int" : "long long", ";\n");
  const auto constant = [&](const char* type, const char* name, int64_t value) {
    Append(&source, Text("constexpr ", type, " ", name, " = ", value, ";\n"));
  };
  constant("bool", "kFew", rows.few);
  constant("Index", "kRows", rows.rows);
  constant("int", "kRunBytes", rows.run_bytes);
  constant("int", "kRuns0", q.runs);
  constant("Index", "kRowStride0", q.row_stride);
  constant("Index", "kRunStride0", q.run_stride);
  constant("int", "kRuns1", k.runs);
  constant("Index", "kRowStride1", k.row_stride);
  constant("Index", "kRunStride1", k.run_stride);
  Append(&source, kSource);
  int next = 0;
  for (const CudaFloorShape& shape : CudaFloorShapes(rows)) {
    if (shape.kernel != next) continue;
    Append(&source, Text("extern \"C\" __global__ __launch_bounds__(768) void f", next++, "(const Args args) { Flip<",
                         shape.by_row ? "true, " : "false, ", shape.bytes, ", ", shape.in_flight, ", ", shape.policy,
                         ">(args); }\n"));
  }
  return source;
}

Status CudaFloor::Make(const CudaDriver& driver, const CudaDevice& device, const CudaFloorRows& rows,
                       std::unique_ptr<CudaFloor>* out) {
  const Nvrtc* nvrtc = nullptr;
  std::string arch;
  Compilation compilation;
  ROPEWALK_TRY(OpenNvrtc(&nvrtc));
  ROPEWALK_TRY(ChooseArch(*nvrtc, device, &arch));
  ROPEWALK_TRY(CompileCuda(*nvrtc, CudaFloorSource(rows), arch, /*verbose=*/false, &compilation));
  std::unique_ptr<CudaFloor> floor(new CudaFloor(driver, rows));
  floor->shapes_ = CudaFloorShapes(rows);
  ROPEWALK_TRY(driver.Check(driver.ModuleLoadData(&floor->module_, compilation.cubin.data()), "cuModuleLoadData"));
  for (int number = 0; number <= floor->shapes_.back().kernel; ++number) {
    floor->functions_.emplace_back();
    ROPEWALK_TRY(
        driver.Check(driver.ModuleGetFunction(&floor->functions_.back(), floor->module_, Text("f", number).c_str()),
                     "cuModuleGetFunction"));
  }
  *out = std::move(floor);
  return {};
}

CudaFloor::~CudaFloor() {
  if (module_) driver_.ModuleUnload(module_);
}

Status CudaFloor::Launch(const CudaFloorShape& shape, const CudaFloorData& data, const void* positions,
                         const void* weight, cu::Stream stream) const {
  const int64_t accesses = rows_.rows * rows_.runs() * rows_.run_bytes / shape.bytes;
  const int64_t blocks = shape.by_row ? rows_.rows : Ceil(accesses, int64_t{shape.threads} * shape.in_flight);
  const cu::LaunchConfig config = {
      static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(shape.threads), 1, 1, 0, stream, nullptr, 0};
  struct {
    CudaFloorData data;
    const void* positions;
    const void* weight;
  } args{data, positions, weight};
  void* parameters[] = {&args};
  return driver_.Check(
      driver_.LaunchKernelEx(&config, functions_[static_cast<size_t>(shape.kernel)], parameters, nullptr),
      "cuLaunchKernelEx", Text(" for the floor (", ShapeName(shape), ")"));
}

}  // namespace ropewalk::bench
