// SPDX-License-Identifier: Apache-2.0
#include "measure/cuda_floor.h"

#include <algorithm>
#include <cstdlib>

#include "backends/cuda/nvrtc.h"
#include "base/text.h"

namespace ropewalk::bench {
namespace {

// Accesses are volatile, so that all loads of a thread are issued before its first store, and predicated, so that no
// branch stands between them.
constexpr const char* kAccesses = R"(
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
  if constexpr (B == 1)
    asm volatile(IF("%2", "st.global.u8 [%1], %0") :: "r"(x[0]), "l"(at), "r"(inside) : "memory");
}

template <class T> __device__ void LoadWord(unsigned inside, const T* at, T& x) {
  if constexpr (sizeof(T) == 4) asm volatile(IF("%2", "ld.global.u32 %0, [%1]") : "=r"(x) : "l"(at), "r"(inside));
  if constexpr (sizeof(T) == 8) asm volatile(IF("%2", "ld.global.u64 %0, [%1]") : "=l"(x) : "l"(at), "r"(inside));
}
)";

// Behind the constants of the rows.
constexpr const char* kWalk = R"(
// Where an access of a row lies: which bytes it reads, where they are written and stored.
struct Place {
  char *at, *out, *cache;
  Index slot_stride;
  unsigned kept, stored;
};
template <int B> __device__ Place Find(const Args& args, Index row, int column) {
  constexpr int kRun = kRunBytes / B, kSecond = kRuns0 * kRun, kThird = (kRuns0 + kRuns1) * kRun;
  constexpr bool kDense = (kRunStride0 == kRunBytes || !kRuns0) && (kRunStride1 == kRunBytes || !kRuns1) &&
                          (kRunStride2 == kRunBytes || !kRuns2);
  const bool third = kRuns2 && column >= kThird, second = kRuns1 && column >= kSecond && !third;
#define OF_PART(OF) (third ? OF(2) : second ? OF(1) : OF(0))
#define ROW_STRIDE(I) kRowStride##I
#define RUN_STRIDE(I) kRunStride##I
#define CACHE_RUN_STRIDE(I) kCacheRunStride##I
#define SLOT_STRIDE(I) kSlotStride##I
#define KEPT(I) kKept##I
#define STORED(I) kStored##I
  column -= third ? kThird : second ? kSecond : 0;
  const Index run = kDense ? 0 : column / kRun, of_row = row * OF_PART(ROW_STRIDE);
  const Index offset = of_row + (kDense ? (Index)column * B : run * OF_PART(RUN_STRIDE) + column % kRun * B);
  Place place;
  place.at = OF_PART(ROWS) + offset;
  place.out = OF_PART(OUT) + offset;
  place.kept = OF_PART(KEPT);
  place.stored = OF_PART(STORED);
  if constexpr (kStores) {
    constexpr int kPart = kNarrow ? B / 2 : B;
    place.cache = OF_PART(CACHE) + ((Index)(column / kRun) * OF_PART(CACHE_RUN_STRIDE) + column % kRun * kPart);
    place.slot_stride = OF_PART(SLOT_STRIDE);
  }
  return place;
}

// The upper byte of each element: what an fp8 cache takes of the bytes of 16-bit floats.
template <int B> __device__ void Narrow(const unsigned (&x)[4], unsigned (&narrow)[4]) {
  const auto half = [](unsigned pair) { return (pair >> 8 & 0xff) | (pair >> 16 & 0xff00); };
  if constexpr (B < 4) {
    narrow[0] = x[0] >> 8 & 0xff;
  } else {
#pragma unroll
    for (int word = 0; word < (B + 7) / 8; ++word)
      narrow[word] = half(x[2 * word]) | (B == 4 ? 0 : half(x[2 * word + 1]) << 16);
  }
}

// Flips bits of all runs: U accesses of B bytes in flight.
template <bool ByRow, int B, int U, int P> __device__ void Flip(const Args& args) {
  constexpr int kRow = (kRuns0 + kRuns1 + kRuns2) * (kRunBytes / B);
  const unsigned long long policy = CachePolicy<P>();
  const Index end = ByRow ? (Index)kRow : kRows * (Index)kRow;
  Index first = ByRow ? (Index)threadIdx.x : (Index)blockIdx.x * (Index)(blockDim.x * U) + (Index)threadIdx.x;
  long long slot_of_row = 0;
  if constexpr (kStores && ByRow) LoadWord(1, SLOTS + blockIdx.x, slot_of_row);
  do {
    Place place[U];
    unsigned inside[U], x[U][4], weight[U][4], position[U];
    long long slot[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Index i = first + u * (Index)blockDim.x;
      inside[u] = i < end;
      const Index row = ByRow ? (Index)blockIdx.x : i / kRow;
      const int column = (int)(ByRow ? i : i % kRow);
      place[u] = Find<B>(args, row, column);
      slot[u] = slot_of_row;
      if constexpr (kStores && !ByRow) LoadWord(inside[u] & place[u].stored, SLOTS + row, slot[u]);
      Load<B, P>(inside[u], place[u].at, policy, x[u]);
      if constexpr (kFew) {
        LoadWord(inside[u], POSITIONS + row, position[u]);
        Load<B, 0>(inside[u], WEIGHT + column % (kRunBytes / B) * B, 0, weight[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int word = 0; word < (B < 4 ? 1 : B / 4); ++word)
        x[u][word] ^= kFew ? position[u] ^ weight[u][word] : 0x80008000u;
      Store<B, P>(inside[u] & place[u].kept, place[u].out, policy, x[u]);
      if constexpr (kStores) {
        char* const cache = place[u].cache + (Index)slot[u] * place[u].slot_stride;
        const unsigned stored = inside[u] & place[u].stored;
        if constexpr (kNarrow) {
          unsigned narrow[4];
          Narrow<B>(x[u], narrow);
          Store<B / 2, P>(stored, cache, policy, narrow);
        } else {
          Store<B, P>(stored, cache, policy, x[u]);
        }
      }
    }
    first += U * (Index)blockDim.x;
  } while (ByRow && first < end);
}
)";

// Joins what lies one behind the other, in memory or in each row.
std::vector<CudaFloorTensor> Joined(std::span<const CudaFloorTensor> tensors) {
  std::vector<CudaFloorTensor> parts;
  for (const CudaFloorTensor& tensor : tensors) {
    const FloorRegion& region = tensor.rows;
    bool joined = false;
    for (CudaFloorTensor& part : parts) {
      FloorRegion& rows = part.rows;
      const bool alike = rows.bytes == region.bytes && rows.row_stride == region.row_stride &&
                         rows.run_stride == region.run_stride && !part.cache.bytes && !tensor.cache.bytes && part.out &&
                         tensor.out && part.out - rows.data == tensor.out - region.data;
      if (!alike || joined) continue;
      if (rows.runs == region.runs && rows.data + rows.rows * rows.row_stride == region.data) {  // the next batch entry
        rows.rows += region.rows;
        joined = true;
      } else if (rows.rows == region.rows && rows.data + rows.runs * rows.run_stride == region.data &&
                 (rows.runs + region.runs) * rows.run_stride <= rows.row_stride) {  // k behind q
        rows.runs += region.runs;
        joined = true;
      }
    }
    if (!joined) parts.push_back(tensor);
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

int64_t CudaFloorRows::written_bytes() const {
  int64_t bytes = 0;
  for (const Part& part : parts) {
    bytes += rows * part.runs * ((part.written == Written::kNot ? 0 : run_bytes) + part.cache_bytes);
  }
  return bytes;
}

std::vector<CudaFloorTensor> InPlace(std::span<const FloorRegion> regions) {
  std::vector<CudaFloorTensor> tensors;
  for (const FloorRegion& region : regions) tensors.push_back({region, region.data});
  return tensors;
}

Status RowsOf(std::span<const CudaFloorTensor> tensors, bool few, CudaFloorRows* out) {
  *out = CudaFloorRows();
  const std::vector<CudaFloorTensor> parts = Joined(tensors);
  const bool alike = std::ranges::all_of(parts, [&](const CudaFloorTensor& part) {
    return part.rows.rows == parts[0].rows.rows && part.rows.bytes == parts[0].rows.bytes;
  });
  if (parts.empty() || parts.size() > std::size(out->parts) || !alike) {
    return Status::Invalid("bench: the CUDA floor knows rows of q, k and v alone; batches must lie side by side");
  }
  const FloorRegion& first = parts[0].rows;
  out->few = few;
  out->rows = first.rows;
  out->run_bytes = first.bytes;
  uint64_t bits = 16 | static_cast<uint64_t>(out->run_bytes);
  int64_t cache_bytes = 0;  // of a run
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto& [rows, written, cache] = parts[i];
    CudaFloorRows::Part& part = out->parts[i];
    part.runs = rows.runs;
    part.row_stride = rows.row_stride;
    part.run_stride = rows.run_stride;
    // In the same rows: one pointer serves, as it does for the operation.
    part.behind = i > 0 && rows.row_stride == first.row_stride && rows.data > first.data &&
                  rows.data < first.data + first.row_stride;
    part.offset = part.behind ? rows.data - first.data : 0;
    part.written = !written               ? CudaFloorRows::Written::kNot
                   : written == rows.data ? CudaFloorRows::Written::kInPlace
                                          : CudaFloorRows::Written::kApart;
    bits |= reinterpret_cast<uintptr_t>(rows.data) | reinterpret_cast<uintptr_t>(written) |
            static_cast<uint64_t>(rows.row_stride) | static_cast<uint64_t>(rows.run_stride);
    if (!cache.bytes) continue;
    if ((cache.bytes != rows.bytes && 2 * cache.bytes != rows.bytes) || (cache_bytes && cache.bytes != cache_bytes) ||
        cache.rows <= 0 || cache.runs != rows.runs) {
      return Status::Invalid("bench: the CUDA floor knows caches of the rows' elements or of half their bytes alone");
    }
    cache_bytes = cache.bytes;
    part.cache_bytes = cache.bytes;
    part.slot_stride = cache.row_stride;
    part.cache_run_stride = cache.run_stride;
    out->slots = cache.rows;
    bits |= static_cast<uint64_t>(rows.bytes / cache.bytes) * (reinterpret_cast<uintptr_t>(cache.data) |
                                                               static_cast<uint64_t>(cache.row_stride) |
                                                               static_cast<uint64_t>(cache.run_stride));
  }
  out->access_bytes = static_cast<int>(bits & -bits);
  return {};
}

CudaFloorData FloorDataOf(std::span<const CudaFloorTensor> tensors) {
  CudaFloorData data;
  const std::vector<CudaFloorTensor> parts = Joined(tensors);
  for (size_t i = 0; i < std::min(parts.size(), std::size(CudaFloorRows().parts)); ++i) {
    data.pointers[kFloorRows + i] = parts[i].rows.data;
    data.pointers[kFloorOut + i] = parts[i].out;
    data.pointers[kFloorCache + i] = parts[i].cache.data;
  }
  return data;
}

const char* CudaFloorPointerName(int pointer) {
  constexpr const char* kNames[] = {"rows0",  "rows1",  "rows2",  "out0",  "out1",      "out2",
                                    "cache0", "cache1", "cache2", "slots", "positions", "weight"};
  return kNames[pointer];
}

std::vector<int> CudaFloorArguments(const CudaFloorRows& rows) {
  std::vector<int> pointers;
  const auto each = [&](int first, auto&& has) {
    for (int i = 0; i < static_cast<int>(std::size(rows.parts)); ++i) {
      if (rows.parts[i].runs && has(rows.parts[i])) pointers.push_back(first + i);
    }
  };
  each(kFloorRows, [](const CudaFloorRows::Part& part) { return !part.behind; });
  if (rows.stores()) pointers.push_back(kFloorSlots);
  if (rows.few) pointers.insert(pointers.end(), {kFloorPositions, kFloorWeight});
  each(kFloorOut, [](const CudaFloorRows::Part& part) { return part.written == CudaFloorRows::Written::kApart; });
  each(kFloorCache, [](const CudaFloorRows::Part& part) { return part.cache_bytes > 0; });
  return pointers;
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

int64_t CudaFloorBlocks(const CudaFloorRows& rows, const CudaFloorShape& shape) {
  return shape.by_row ? rows.rows : Ceil(rows.read_bytes() / shape.bytes, int64_t{shape.threads} * shape.in_flight);
}

namespace {

// What the kernels know of their rows: constants, the argument, and where in it each pointer is.
std::string Constants(const CudaFloorRows& rows) {
  // Numbers of accesses and distances in bytes: 32 bits where they suffice, with room for the last block.
  int64_t reach = rows.read_bytes(), cache_bytes = 0;
  for (const CudaFloorRows::Part& part : rows.parts) {
    reach = std::max({reach, rows.rows * std::abs(part.row_stride), rows.slots * std::abs(part.slot_stride)});
    cache_bytes = std::max(cache_bytes, part.cache_bytes);
  }
  std::string source = Text("using Index = ", reach < int64_t{1} << 30 ? "int" : "long long", ";\n");
  const auto constant = [&](const char* type, const std::string& name, int64_t value) {
    Append(&source, Text("constexpr ", type, " ", name, " = ", value, ";\n"));
  };
  constant("bool", "kFew", rows.few);
  constant("bool", "kStores", rows.stores());
  constant("bool", "kNarrow", cache_bytes > 0 && cache_bytes < rows.run_bytes);
  constant("Index", "kRows", rows.rows);
  constant("int", "kRunBytes", rows.run_bytes);
  for (size_t i = 0; i < std::size(rows.parts); ++i) {
    const CudaFloorRows::Part& part = rows.parts[i];
    constant("int", Text("kRuns", i), part.runs);
    constant("Index", Text("kRowStride", i), part.row_stride);
    constant("Index", Text("kRunStride", i), part.run_stride);
    constant("Index", Text("kSlotStride", i), part.slot_stride);
    constant("Index", Text("kCacheRunStride", i), part.cache_run_stride);
    constant("unsigned", Text("kKept", i), part.runs > 0 && part.written != CudaFloorRows::Written::kNot);
    constant("unsigned", Text("kStored", i), part.cache_bytes > 0);
  }

  const std::vector<int> arguments = CudaFloorArguments(rows);
  Append(&source, "struct Args {");
  for (const int pointer : arguments) {
    const char* type = pointer == kFloorSlots       ? "const long long*"
                       : pointer == kFloorPositions ? "const unsigned*"
                       : pointer == kFloorWeight    ? "const char*"
                                                    : "char*";
    Append(&source, Text(" ", type, " ", CudaFloorPointerName(pointer), ";"));
  }
  Append(&source, " };\n");
  const auto define = [&](const std::string& name, const std::string& text) {
    Append(&source, Text("#define ", name, " ", text, "\n"));
  };
  // The argument, if the kernel takes it.
  const auto argument = [&](int pointer, const std::string& otherwise) {
    const bool taken = std::ranges::find(arguments, pointer) != arguments.end();
    return taken ? Text("args.", CudaFloorPointerName(pointer)) : otherwise;
  };
  for (int i = 0; i < static_cast<int>(std::size(rows.parts)); ++i) {
    const CudaFloorRows::Part& part = rows.parts[i];
    const std::string none = "(char*)0";
    define(Text("ROWS_", i), part.behind ? Text("(args.rows0 + ", part.offset, ")") : argument(kFloorRows + i, none));
    define(Text("OUT_", i), argument(kFloorOut + i, Text("ROWS_", i)));
    define(Text("CACHE_", i), argument(kFloorCache + i, none));
  }
  define("ROWS(I)", "ROWS_##I");
  define("OUT(I)", "OUT_##I");
  define("CACHE(I)", "CACHE_##I");
  define("SLOTS", argument(kFloorSlots, "(const long long*)0"));
  define("POSITIONS", argument(kFloorPositions, "(const unsigned*)0"));
  define("WEIGHT", argument(kFloorWeight, "(const char*)0"));
  return source;
}

}  // namespace

std::string CudaFloorWalk(const CudaFloorRows& rows) {
  std::string source = Constants(rows) + kWalk;
  int next = 0;
  for (const CudaFloorShape& shape : CudaFloorShapes(rows)) {
    if (shape.kernel != next) continue;
    Append(&source, Text("extern \"C\" __global__ __launch_bounds__(768) void f", next++, "(const Args args) { Flip<",
                         shape.by_row ? "true, " : "false, ", shape.bytes, ", ", shape.in_flight, ", ", shape.policy,
                         ">(args); }\n"));
  }
  return source;
}

std::string CudaFloorSource(const CudaFloorRows& rows) { return kAccesses + CudaFloorWalk(rows); }

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

Status CudaFloor::Launch(const CudaFloorShape& shape, const CudaFloorData& data, cu::Stream stream) const {
  const auto blocks = static_cast<unsigned>(CudaFloorBlocks(rows_, shape));
  const auto threads = static_cast<unsigned>(shape.threads);
  const cu::LaunchConfig config = {blocks, 1, 1, threads, 1, 1, 0, stream, nullptr, 0};
  const void* args[kFloorPointers] = {};
  for (size_t i = 0; i < arguments_.size(); ++i) args[i] = data.pointers[arguments_[i]];
  void* parameters[] = {args};
  return driver_.Check(
      driver_.LaunchKernelEx(&config, functions_[static_cast<size_t>(shape.kernel)], parameters, nullptr),
      "cuLaunchKernelEx", Text(" for the floor (", ShapeName(shape), ")"));
}

}  // namespace ropewalk::bench
