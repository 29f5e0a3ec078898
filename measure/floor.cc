// SPDX-License-Identifier: Apache-2.0
#include "measure/floor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "measure/measure.h"

namespace ropewalk::bench {
namespace {

// Flips the sign of 16-bit floats and a sign or a low mantissa bit of 32-bit ones, so that no value becomes a NaN or
// denormal, however often it runs.
constexpr uint64_t kMask = 0x8000800080008000u;

typedef uint64_t Vector16 __attribute__((vector_size(16), aligned(1), may_alias));
#if defined(__x86_64__)
typedef uint64_t Vector32 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint64_t Vector64 __attribute__((vector_size(64), aligned(1), may_alias));
#endif

void FlipTail(unsigned char* data, int64_t bytes) {
  constexpr auto kMask16 = static_cast<uint16_t>(kMask);
  for (; bytes >= 16; bytes -= 16, data += 16) {
    Vector16* p = reinterpret_cast<Vector16*>(data);  // auto would lose its alignment
    *p = *p ^ kMask;
  }
  for (; bytes >= 2; bytes -= 2, data += 2) {
    uint16_t value;
    std::memcpy(&value, data, 2);
    value ^= kMask16;
    std::memcpy(data, &value, 2);
  }
}

// One kernel for each vector width: kUnroll vectors in flight, kAhead bytes of prefetch (0: none).
#define ROPEWALK_FLOOR_KERNEL(Name, Vector, TARGET)                                        \
  template <int kUnroll, int kAhead>                                                       \
  TARGET void Name(unsigned char* data, int64_t bytes) {                                   \
    constexpr int64_t kWidth = sizeof(Vector);                                             \
    constexpr int64_t kStep = kUnroll * kWidth;                                            \
    int64_t i = 0;                                                                         \
    for (; i + kStep <= bytes; i += kStep) {                                               \
      if constexpr (kAhead > 0) {                                                          \
        for (int64_t line = 0; line < kStep; line += 64) {                                 \
          __builtin_prefetch(data + i + line + kAhead, 1);                                 \
        }                                                                                  \
      }                                                                                    \
      Vector values[kUnroll];                                                              \
      _Pragma("GCC unroll 8") for (int u = 0; u < kUnroll; ++u) {                          \
        values[u] = *reinterpret_cast<const Vector*>(data + i + u * kWidth);               \
      }                                                                                    \
      _Pragma("GCC unroll 8") for (int u = 0; u < kUnroll; ++u) {                          \
        *reinterpret_cast<Vector*>(data + i + u * kWidth) = values[u] ^ kMask;             \
      }                                                                                    \
    }                                                                                      \
    for (; i + kWidth <= bytes; i += kWidth) {                                             \
      Vector* p = reinterpret_cast<Vector*>(data + i); /* auto would lose its alignment */ \
      *p = *p ^ kMask;                                                                     \
    }                                                                                      \
    FlipTail(data + i, bytes - i);                                                         \
  }

ROPEWALK_FLOOR_KERNEL(Flip16, Vector16, )
#if defined(__x86_64__)
ROPEWALK_FLOOR_KERNEL(Flip32, Vector32, __attribute__((target("avx2"))))
ROPEWALK_FLOOR_KERNEL(Flip64, Vector64, __attribute__((target("avx512f"))))
#endif

using FlipFunction = void (*)(unsigned char* data, int64_t bytes);
struct Shape {
  const char* name;
  FlipFunction flip;
  int vector_bytes;
};

#if defined(__x86_64__)
constexpr Shape kShapes64[] = {
    {"64 B x1", Flip64<1, 0>, 64},
    {"64 B x4", Flip64<4, 0>, 64},
    {"64 B x8", Flip64<8, 0>, 64},
    {"64 B x1, prefetch 1 KB", Flip64<1, 1024>, 64},
    {"64 B x4, prefetch 512 B", Flip64<4, 512>, 64},
    {"64 B x4, prefetch 2 KB", Flip64<4, 2048>, 64},
    {"64 B x8, prefetch 4 KB", Flip64<8, 4096>, 64},
    // Where 64-byte vectors slow the clock or are split in two.
    {"32 B x8", Flip32<8, 0>, 32},
    {"32 B x8, prefetch 2 KB", Flip32<8, 2048>, 32},
};
constexpr Shape kShapes32[] = {
    {"32 B x2", Flip32<2, 0>, 32},
    {"32 B x8", Flip32<8, 0>, 32},
    {"32 B x4, prefetch 512 B", Flip32<4, 512>, 32},
    {"32 B x8, prefetch 2 KB", Flip32<8, 2048>, 32},
    {"32 B x8, prefetch 4 KB", Flip32<8, 4096>, 32},
};
#endif
constexpr Shape kShapes16[] = {
    {"16 B x4", Flip16<4, 0>, 16},
    {"16 B x8", Flip16<8, 0>, 16},
    {"16 B x8, prefetch 512 B", Flip16<8, 512>, 16},
    {"16 B x8, prefetch 2 KB", Flip16<8, 2048>, 16},
};

std::span<const Shape> Shapes() {
#if defined(__x86_64__)
  static const bool has64 = __builtin_cpu_supports("avx512f"), has32 = __builtin_cpu_supports("avx2");
  if (has64) return kShapes64;
  if (has32) return kShapes32;
#endif
  return kShapes16;
}

// Joins runs into rows, and rows into one run, where nothing lies between them.
FloorRegion JoinedRuns(FloorRegion region) {
  if (region.runs == 1 || region.run_stride == region.bytes) {
    region.bytes *= region.runs;
    region.runs = 1;
  }
  return region;
}

}  // namespace

int FloorShapes() { return static_cast<int>(Shapes().size()); }
const char* FloorShapeName(int shape) { return Shapes()[static_cast<size_t>(shape)].name; }
int FloorVectorBytes() { return Shapes()[0].vector_bytes; }

void FloorRows(int shape, std::span<const FloorRegion> regions, int64_t begin, int64_t end) {
  const FlipFunction flip = Shapes()[static_cast<size_t>(shape)].flip;
  for (const FloorRegion& region : regions) {
    if (region.runs == 1 && region.row_stride == region.bytes) {
      flip(region.data + begin * region.row_stride, (end - begin) * region.bytes);
      continue;
    }
    for (int64_t row = begin; row < end; ++row) {
      unsigned char* data = region.data + row * region.row_stride;
      for (int64_t run = 0; run < region.runs; ++run, data += region.run_stride) flip(data, region.bytes);
    }
  }
}

Floor::Floor(std::vector<FloorRegion> regions, ropewalk_parallel_for parallel_for) : parallel_for_(parallel_for) {
  std::ranges::transform(regions, std::back_inserter(regions_), JoinedRuns);
  // As the CPU backend does: no part below 32 KB.
  int64_t row_bytes = 1;
  for (const FloorRegion& region : regions_) row_bytes += region.runs * region.bytes;
  grain_ = std::max<int64_t>(1, 32 * 1024 / row_bytes);
}

void Floor::Run(int shape) const {
  const int64_t rows = regions_.empty() ? 0 : regions_[0].rows;
  if (!parallel_for_ || rows < 2 * grain_) return FloorRows(shape, regions_, 0, rows);
  struct Work {
    int shape;
    std::span<const FloorRegion> regions;
  } work{shape, regions_};
  parallel_for_(
      0, rows, grain_,
      [](int64_t begin, int64_t end, const void* context) {
        const auto& w = *static_cast<const Work*>(context);
        FloorRows(w.shape, w.regions, begin, end);
      },
      &work, nullptr);
}

void Floor::Tune() {
  // Rounds over all shapes, and the best time of each: a slow moment of the machine must not decide.
  constexpr int kRounds = 7;
  const double once = SecondsOf([&] { Run(0); });
  const int calls = std::clamp(static_cast<int>(50e-6 / std::max(once, 1e-9)), 1, 1000);
  std::vector<double> best(static_cast<size_t>(FloorShapes()), HUGE_VAL);
  for (int round = 0; round < kRounds; ++round) {
    for (int shape = 0; shape < FloorShapes(); ++shape) {
      double& seconds = best[static_cast<size_t>(shape)];
      seconds = std::min(seconds, SecondsOf([&] {
                           for (int call = 0; call < calls; ++call) Run(shape);
                         }));
    }
  }
  shape_ = static_cast<int>(std::ranges::min_element(best) - best.begin());
}

int64_t Floor::bytes() const {
  int64_t total = 0;
  for (const FloorRegion& region : regions_) total += region.total();
  return total;
}

}  // namespace ropewalk::bench
