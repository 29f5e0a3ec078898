// Ways in which real rotary-embedding kernels broke, each as a test here. Numbers in comments name the public thread.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "backends/cpu/dispatch.h"
#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/reference.h"
#include "conformance/runner.h"
#include "rope/call.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

void ExpectPass(RopeCase c) {
  c.name = CaseName(c);
  const CaseResult result = RunCase(c, HostMemory());
  EXPECT_TRUE(result.passed) << c.name << "\n  " << result.message;
  EXPECT_GT(result.elements, 0) << c.name;
}

// q alone [tokens, heads, dim], float32, with positions.
struct Simple {
  std::vector<float> data;
  std::vector<int64_t> place;
  int64_t shape[3], tokens;
  DLTensor q, positions;
  ropewalk_frequencies* frequencies = nullptr;
  ropewalk_rope_args args;

  Simple(int64_t tokens_, int64_t heads, int64_t dim, int64_t rotary_dim, double theta = 10000.0,
         const char* scaling = nullptr)
      : data(static_cast<size_t>(tokens_ * heads * dim), 1.0f),
        place(static_cast<size_t>(tokens_)),
        shape{tokens_, heads, dim},
        tokens(tokens_) {
    q = {data.data(), {kDLCPU, 0}, 3, {kDLFloat, 32, 1}, shape, nullptr, 0};
    positions = {place.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &tokens, nullptr, 0};
    EXPECT_EQ(ropewalk_frequencies_create(theta, rotary_dim, scaling, 0, &frequencies), ROPEWALK_OK)
        << ropewalk_last_error();
    args.q = &q;
    args.positions = &positions;
    args.frequencies = frequencies;
  }
  ~Simple() { ropewalk_frequencies_release(frequencies); }
  Simple(const Simple&) = delete;
  Simple& operator=(const Simple&) = delete;
  int Run() { return ropewalk_rope(&args, nullptr); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Lanes, pairs, strides

// vllm#51049, flashinfer#3117: heads handled together must not leak into each other, also beyond 10,240 heads in all.
TEST(Failures, PartialNeoxNonPowerOfTwo) {
  for (const int64_t rotary_dim : {32, 48, 64, 96, 6}) {
    ExpectPass({.tokens = 3, .head_dim = 128, .rotary_dim = rotary_dim, .norm = true});
  }
  ExpectPass({.tokens = 1200, .q_heads = 7, .k_heads = 2, .head_dim = 32, .rotary_dim = 24, .norm = true});
}

// sglang#19059: all lanes of a group in use.
TEST(Failures, FullRotaryOfEveryLaneCount) {
  for (const int64_t head_dim : {8, 16, 32, 64, 128, 256, 512}) ExpectPass({.head_dim = head_dim});
}

// TRT-LLM#13985: heads that do not divide into groups.
TEST(Failures, OddHeadCounts) {
  for (const int64_t heads : {1, 3, 5, 7, 9, 33}) {
    ExpectPass({.tokens = 2, .q_heads = heads, .k_heads = heads, .head_dim = 64, .norm = true});
  }
}

// vllm#43676: rotary_dim must be the table's width, not the head's.
TEST(Failures, RotaryDimComesFromTheTable) {
  const auto call = MakeCall({.head_dim = 128, .rotary_dim = 64, .angles = Angles::kPacked});
  call->args().rotary_dim = 0;
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
}

// Megatron-LM#5317: a table narrower than what the kernel reads is refused.
TEST(Failures, TableNarrowerThanRotaryDim) {
  const auto call = MakeCall({.head_dim = 64, .rotary_dim = 16, .angles = Angles::kTable});
  call->args().rotary_dim = 64;
  const Status status = call->Run();
  EXPECT_EQ(status.code(), ROPEWALK_INVALID_ARGUMENT);
  EXPECT_NE(status.text().find("cos must be 32 wide for rotary_dim 64, but is 8 wide"), std::string::npos)
      << status.text();
}

// sglang#20316, sglang#22868: the store takes the whole head, the rotated part and the rest.
TEST(Failures, UnrotatedTailReachesTheCache) {
  for (const uint32_t cache_dtype : {kBF16, kE4M3}) {
    ExpectPass({.head_dim = 128, .rotary_dim = 32, .cache = Cache::kFlat, .cache_dtype = cache_dtype, .v_dim = 128});
  }
}

// pie#603: exponent and pairing of partial rotary come from rotary_dim, not from head_dim.
TEST(Failures, PartialRotaryPairsWithinItsPart) {
  Simple simple(1, 1, 8, 4);
  simple.place = {100};
  simple.data = {1, 2, 3, 4, 5, 6, 7, 8};
  simple.q.data = simple.data.data();
  simple.positions.data = simple.place.data();
  ASSERT_EQ(simple.Run(), ROPEWALK_OK);
  const double angles[] = {100.0, 100.0 * std::pow(10000.0, -0.5)};
  for (size_t i = 0; i < 2; ++i) {
    const double x = static_cast<double>(i) + 1, y = static_cast<double>(i) + 3;
    EXPECT_NEAR(simple.data[i], x * std::cos(angles[i]) - y * std::sin(angles[i]), 1e-5);
    EXPECT_NEAR(simple.data[i + 2], y * std::cos(angles[i]) + x * std::sin(angles[i]), 1e-5);
  }
  for (size_t i = 4; i < 8; ++i) EXPECT_EQ(simple.data[i], static_cast<float>(i + 1));
}

// coreai-models#66: the other convention pairs across the whole head, with frequencies of zero.
TEST(Failures, ProportionalPairsAcrossTheHead) {
  Simple simple(1, 1, 8, 8, 10000.0, "{\"rope_type\": \"proportional\", \"partial_rotary_factor\": 0.5}");
  simple.place[0] = 3;
  simple.data = {1, 2, 3, 4, 5, 6, 7, 8};
  simple.q.data = simple.data.data();
  ASSERT_EQ(simple.Run(), ROPEWALK_OK);
  EXPECT_NEAR(simple.data[0], 1 * std::cos(3.0) - 5 * std::sin(3.0), 1e-5);
  const double second = 3.0 * std::pow(10000.0, -2.0 / 8);
  EXPECT_NEAR(simple.data[5], 6 * std::cos(second) + 2 * std::sin(second), 1e-5);
  EXPECT_EQ(simple.data[2], 3);
  EXPECT_EQ(simple.data[6], 7);
}

// sglang#35096, LightLLM#1459: widths that are no power of two must neither rotate the next head nor read past the
// table.
TEST(Failures, RotaryDimSixStaysInItsHead) {
  for (const Angles angles : {Angles::kTable, Angles::kPacked, Angles::kFrequencies}) {
    for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
      ExpectPass({.tokens = 3, .q_heads = 5, .head_dim = 6, .pairing = pairing, .angles = angles});
      ExpectPass({.tokens = 3, .q_heads = 5, .head_dim = 10, .rotary_dim = 6, .pairing = pairing, .angles = angles});
    }
  }
}

// fla#1177: 33 must not become 34.
TEST(Failures, OddRotaryDimIsRefused) {
  const auto call = MakeCall({.head_dim = 64, .rotary_dim = 34, .angles = Angles::kTable});
  call->args().rotary_dim = 33;
  EXPECT_EQ(call->Run().code(), ROPEWALK_INVALID_ARGUMENT);
}

// flash-attention#1195
TEST(Failures, HeadDim72Interleaved) {
  ExpectPass({.tokens = 300, .q_heads = 2, .head_dim = 72, .pairing = ROPEWALK_INTERLEAVED});
}

// sglang#20559, ColossalAI#6429: q and k have strides and head counts of their own; shapes of latent attention.
TEST(Failures, StridesOfQAndKDiffer) {
  const auto call = MakeCall({.tokens = 4,
                              .q_heads = 8,
                              .k_heads = 1,
                              .head_dim = 576,
                              .rotary_dim = 64,
                              .rotary_offset = 512,
                              .layout = Layout::kPadded,
                              .pairing = ROPEWALK_INTERLEAVED});
  ASSERT_NE(call->args().q->strides[0], call->args().k->strides[0]);
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
}

// Liger#342: one head is no reason to skip k.
TEST(Failures, KOfOneHead) { ExpectPass({.q_heads = 1, .k_heads = 1, .head_dim = 64}); }

// FlagGems#5143, llama.cpp#20274: in place gives the bits of out of place, with strides too.
TEST(Failures, InPlaceHasNoHazard) {
  for (const Layout layout : {Layout::kSeparate, Layout::kPadded, Layout::kTransposed}) {
    for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
      const auto out = MakeCall({.tokens = 9,
                                 .head_dim = 80,
                                 .rotary_dim = 60,
                                 .layout = layout,
                                 .out_of_place = true,
                                 .pairing = pairing,
                                 .norm = true});
      ASSERT_TRUE(out->Run().ok());
      EXPECT_EQ(MessageOf(*out), "");
      // The same data again, in place.
      ropewalk_rope_args args = out->args();
      args.q_out = args.k_out = nullptr;
      ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK);
      const DLTensor &q = *out->args().q, &q_out = *out->args().q_out;
      for (int64_t token = 0; token < 9; ++token) {
        for (int64_t head = 0; head < 3; ++head) {
          const auto row = [&](const DLTensor& tensor) {
            return static_cast<const char*>(tensor.data) + tensor.byte_offset + 2 * RowOffset(tensor, 0, token, head);
          };
          ASSERT_EQ(std::memcmp(row(q), row(q_out), 80 * 2), 0) << token << ", " << head;
        }
      }
    }
  }
}

// TRT-LLM#13052: pair i takes entry i of the table, in both pairings; duplicated tables are views with stride 2.
TEST(Failures, InterleavedTableHasOneEntryAPair) {
  for (const Angles angles : {Angles::kTable, Angles::kRepeated, Angles::kFullWidth}) {
    ExpectPass({.head_dim = 64, .pairing = ROPEWALK_INTERLEAVED, .angles = angles, .positions = Positions::kRandom});
  }
}

// shainet#111, sglang#13495: at position 0 both pairings agree, further on they must not.
TEST(Failures, PairingsDifferBeyondPositionZero) {
  Simple neox(2, 1, 16, 16), interleaved(2, 1, 16, 16);
  neox.place[1] = interleaved.place[1] = 5;
  for (size_t i = 0; i < 32; ++i) neox.data[i] = interleaved.data[i] = static_cast<float>(i % 16);
  interleaved.args.pairing = ROPEWALK_INTERLEAVED;
  ASSERT_EQ(neox.Run(), ROPEWALK_OK);
  ASSERT_EQ(interleaved.Run(), ROPEWALK_OK);
  for (size_t i = 0; i < 16; ++i) EXPECT_EQ(neox.data[i], interleaved.data[i]);
  int differ = 0;
  for (size_t i = 16; i < 32; ++i) differ += neox.data[i] != interleaved.data[i];
  EXPECT_GE(differ, 14);
}

// ---------------------------------------------------------------------------------------------------------------------
// Precision

// imp#1316, mlxcel#1055: recover the phase of pair 0, whose angle is the position itself.
TEST(Failures, PhaseOfPairZeroFarOut) {
  for (const int64_t position : {int64_t{40}, int64_t{2000}, int64_t{16000}, int64_t{131071}, int64_t{1000000},
                                 int64_t{10000000}, int64_t{2147483647}, int64_t{-131071}, int64_t{1} << 40}) {
    Simple simple(1, 1, 2, 2);
    simple.place[0] = position;
    simple.data = {1, 0};
    simple.q.data = simple.data.data();
    ASSERT_EQ(simple.Run(), ROPEWALK_OK);
    const long double angle = static_cast<long double>(position);
    // turns are rounded to 2^-65 of a turn a position
    const double slack = std::abs(static_cast<double>(position)) * 0x1p-64 * std::numbers::pi;
    EXPECT_NEAR(simple.data[0], static_cast<double>(std::cos(angle)), 0x1p-20 + slack) << position;
    EXPECT_NEAR(simple.data[1], static_cast<double>(std::sin(angle)), 0x1p-20 + slack) << position;
  }
}

// imp#1630: the same on the branch of scaled frequencies.
TEST(Failures, ScaledFrequenciesFarOut) {
  ExpectPass({.dtype = kF32,
              .head_dim = 64,
              .scaling = "{\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 4096}",
              .positions = Positions::kListed,
              .positions_dtype = kI64,
              .cache = Cache::kFlat,
              .cache_dtype = kF32,
              .v_dim = 64});
}

// sgl-kernel-xpu#287, TRT-LLM#16069: tables of every dtype, the arithmetic in float32.
TEST(Failures, TablesOfEveryDtypeForEveryTensor) {
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    for (const uint32_t table_dtype : {kF32, kF16, kBF16}) {
      ExpectPass({.dtype = dtype,
                  .head_dim = 64,
                  .angles = Angles::kPacked,
                  .table_dtype = table_dtype,
                  .positions = Positions::kRandom});
    }
  }
}

// sglang#33117: the table keeps its bytes, call after call (every byte of it is compared).
TEST(Failures, TableIsNotConvertedInPlace) {
  const auto call = MakeCall({.head_dim = 64, .angles = Angles::kPacked, .table_dtype = kF32});
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
  std::vector<char> before(static_cast<size_t>(call->args().cos_sin->shape[0] * 64 * 4));
  std::memcpy(before.data(), call->args().cos_sin->data, before.size());
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(std::memcmp(before.data(), call->args().cos_sin->data, before.size()), 0);
}

// sglang#27540: the mean square in float32, also where the squares leave the tensors' precision.
TEST(Failures, MeanSquareInFloat32) {
  for (const uint32_t dtype : {kF16, kBF16}) {
    ExpectPass({.dtype = dtype, .head_dim = 256, .norm = true});
    ExpectPass({.dtype = dtype, .head_dim = 256, .data = Data::kLarge, .norm = true});  // squares beyond float16
  }
}

// vllm#53203: 1 + weight in float32; in bfloat16 a weight of 2^-9 would vanish.
TEST(Failures, OneIsAddedToGemmaWeightsInFloat32) {
  for (const int32_t rounding : {ROPEWALK_ROUND_FUSED, ROPEWALK_ROUND_REFERENCE}) {
    const auto call = MakeCall({.tokens = 1,
                                .k_heads = 0,
                                .head_dim = 64,
                                .rounding = rounding,
                                .norm = true,
                                .weight = Weight::kZeroCentered,
                                .weight_dtype = kBF16,
                                .positions = Positions::kNone});
    const auto set = [](const ropewalk_rope_args& args) {
      auto* q = static_cast<uint16_t*>(args.q->data);
      auto* weight = static_cast<uint16_t*>(args.q_weight->data);
      for (int i = 0; i < 64; ++i) {
        StoreNumber(kBF16, 1.0, q + i);
        StoreNumber(kBF16, 1.5 * 0x1p-8, weight + i);  // 1 + it lies between two bfloat16 numbers, above the middle
      }
    };
    set(call->args());
    set(call->host_args());
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(LoadNumber(kBF16, call->args().q->data), 1.0 + 0x1p-7);
  }
}

// mold#1074: and added once.
TEST(Failures, ZeroCenteredWeightOfZeroIsTheIdentity) {
  const auto zero = MakeCall({.tokens = 1,
                              .k_heads = 0,
                              .head_dim = 64,
                              .norm = true,
                              .weight = Weight::kZeroCentered,
                              .weight_dtype = kF32,
                              .positions = Positions::kNone});
  std::memset(zero->args().q_weight->data, 0, 64 * 4);
  std::memset(zero->host_args().q_weight->data, 0, 64 * 4);
  ASSERT_TRUE(zero->Run().ok());
  EXPECT_EQ(MessageOf(*zero), "");
}

// sglang#36665: an fp8 cache is rounded once from the exact number, in reference rounding from k as it is stored.
TEST(Failures, Fp8RoundsOnce) {
  for (const int32_t rounding : {ROPEWALK_ROUND_FUSED, ROPEWALK_ROUND_REFERENCE}) {
    ExpectPass({.tokens = 64,
                .head_dim = 128,
                .rounding = rounding,
                .angles = Angles::kTable,
                .cache = Cache::kNhd,
                .cache_dtype = kE4M3,
                .v_dim = 128});
  }
}

// aiter#4102: the OCP encodings, not those with another bias.
TEST(Failures, Fp8IsOcp) {
  for (const auto& [dtype, one] : {std::pair<uint32_t, int>{kE4M3, 0x38}, std::pair<uint32_t, int>{kE5M2, 0x3C}}) {
    const auto call = MakeCall({.tokens = 1,
                                .q_heads = 1,
                                .k_heads = 1,
                                .head_dim = 16,
                                .positions = Positions::kNone,
                                .cache = Cache::kFlat,
                                .cache_dtype = dtype,
                                .v_dim = 16});
    for (int i = 0; i < 16; ++i) {
      StoreNumber(kBF16, 1.0, static_cast<uint16_t*>(call->args().k->data) + i);
      StoreNumber(kBF16, -1.0, static_cast<uint16_t*>(call->args().v->data) + i);
    }
    ASSERT_TRUE(call->Run().ok());
    const int64_t slot = *static_cast<const int64_t*>(call->args().slots->data);
    const auto* k = static_cast<const uint8_t*>(call->args().k_cache->data) + slot * 16;
    const auto* v = static_cast<const uint8_t*>(call->args().v_cache->data) + slot * 16;
    for (int i = 0; i < 16; ++i) {
      EXPECT_EQ(k[i], one);
      EXPECT_EQ(v[i], one | 0x80);
    }
  }
}

// sglang#34347, sglang#37315: no multiplication and addition may be contracted where the chain rounds between them.
TEST(Failures, ReferenceRoundingIsNotContracted) {
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
      ExpectPass({.dtype = dtype,
                  .tokens = 64,
                  .head_dim = 128,
                  .pairing = pairing,
                  .rounding = ROPEWALK_ROUND_REFERENCE,
                  .angles = Angles::kTable,
                  .table_dtype = dtype,
                  .positions = Positions::kRandom});
    }
  }
}

// intel-xpu-backend-for-triton#7118: nothing is flushed to zero.
TEST(Failures, SubnormalsAreKept) {
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    ExpectPass({.dtype = dtype, .head_dim = 64, .data = Data::kTiny, .positions = Positions::kRandom});
  }
}

// A pair of which one element is tiny, both are, or one is zero, among others that are not.
TEST(Failures, SubnormalsAreKeptBesideOthers) {
  for (const uint32_t dtype : {kBF16, kF16, kF32}) {
    for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
      for (const int32_t head_dim : {64, 80, 128, 256}) {
        for (const bool norm : {false, true}) {
          ExpectPass({.dtype = dtype,
                      .tokens = 9,
                      .head_dim = head_dim,
                      .data = Data::kMixed,
                      .pairing = pairing,
                      .norm = norm,
                      .positions = Positions::kRandom});
        }
      }
    }
  }
}

#if defined(__x86_64__)
// llvm#57589: another library of the process has set flush-to-zero and denormals-are-zero. A subnormal float16 is a
// number all the same, and the caller's modes are as they were.
TEST(Failures, TheCallersModesOfFloats) {
  constexpr unsigned kFlags = 0x3f, kFlushAndZero = 0x8040;
  int calls = 0;
  for (const CpuTarget& target : CpuTargets()) {
    if (!target.supported()) continue;
    SCOPED_TRACE(target.name);
    ASSERT_EQ(ropewalk_force_backend(Text("cpu:", target.name).c_str()), ROPEWALK_OK);
    for (const auto& [dtype, data] :
         {std::pair{kF16, Data::kTiny}, std::pair{kF16, Data::kMixed}, std::pair{kF16, Data::kNormal},
          std::pair{kBF16, Data::kNormal}, std::pair{kF32, Data::kNormal}}) {
      for (const bool norm : {false, true}) {
        for (const int64_t head_dim : {64, 96}) {
          for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
            const auto call = MakeCall({.dtype = dtype,
                                        .tokens = 5,
                                        .head_dim = head_dim,
                                        .data = data,
                                        .pairing = pairing,
                                        .norm = norm,
                                        .positions = Positions::kRandom});
            const unsigned before = _mm_getcsr(), during = (before & ~kFlags) | kFlushAndZero;
            _mm_setcsr(during);
            const Status status = call->Run();
            const unsigned after = _mm_getcsr();
            _mm_setcsr(before);
            ASSERT_TRUE(status.ok()) << status.text();
            EXPECT_EQ(after & ~kFlags, during);
            EXPECT_EQ(MessageOf(*call), "") << call->test_case().name;
            ++calls;
          }
        }
      }
    }
  }
  EXPECT_GE(calls, 40);
  ASSERT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK);
}
#endif

// pegainfer#174, batch invariance: a token's bits do not depend on what else is in the call.
TEST(Failures, TokensDoNotDependOnTheirNeighbours) {
  const auto call = MakeCall({.tokens = 40, .head_dim = 96, .norm = true, .positions = Positions::kRandom});
  const size_t row = 96 * 3 * 2;
  std::vector<char> alone(40 * row);
  const auto* first = static_cast<const char*>(call->host_args().q->data);
  std::memcpy(alone.data(), first, alone.size());
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
  for (int64_t token = 0; token < 40; ++token) {
    int64_t shape[] = {1, 3, 96}, one = 1;
    DLTensor q = *call->args().q, positions = *call->args().positions;
    q.data = alone.data() + token * static_cast<int64_t>(row);
    q.strides = nullptr;
    q.shape = shape;
    positions.byte_offset += static_cast<uint64_t>(8 * token);
    positions.shape = &one;
    ropewalk_rope_args args;
    args.q = &q;
    args.positions = &positions;
    args.frequencies = call->frequencies();
    args.norm = ROPEWALK_NORM_RMS;
    ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  }
  EXPECT_EQ(std::memcmp(alone.data(), call->args().q->data, alone.size()), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// sglang#10713, vllm#48894: tokens past the table are NaN, their neighbours are right, and the first is named.
TEST(Failures, PositionPastTheTable) {
  ExpectPass({.tokens = 9, .head_dim = 64, .angles = Angles::kPacked, .bad = Bad::kPosition});
  const auto call = MakeCall({.tokens = 9, .head_dim = 64, .angles = Angles::kPacked, .bad = Bad::kPosition});
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);
  EXPECT_NE(std::string(ropewalk_last_error()).find("positions[1] is 73"), std::string::npos) << ropewalk_last_error();
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK);  // told once
}

TEST(Failures, NegativePositionInATable) {
  const auto call = MakeCall({.tokens = 3, .head_dim = 64, .angles = Angles::kTable});
  const int64_t before = -1;
  std::memcpy(static_cast<char*>(call->args().positions->data) + 16, &before, 8);
  std::memcpy(static_cast<char*>(call->host_args().positions->data) + 16, &before, 8);
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);
  EXPECT_NE(std::string(ropewalk_last_error()).find("positions[2] is -1"), std::string::npos) << ropewalk_last_error();
}

// aiter#3235, vllm#13922: padding under CUDA graphs has slot -1 and any position; it is left alone, and is no fault.
TEST(Failures, SlotMinusOneWithGarbagePosition) {
  for (const bool out_of_place : {false, true}) {
    ExpectPass({.tokens = 8,
                .head_dim = 64,
                .out_of_place = out_of_place,
                .angles = Angles::kTable,
                .cache = Cache::kNhd,
                .cache_dtype = kBF16,
                .v_dim = 64,
                .bad = Bad::kPaddedPosition});
  }
}

// vllm#57682: slot -1 alone: rotated, not stored.
TEST(Failures, SlotMinusOneIsRotatedButNotStored) {
  ExpectPass({.head_dim = 64, .cache = Cache::kFlat, .cache_dtype = kBF16, .v_dim = 64, .slots = Slots::kNothing});
}

TEST(Failures, SlotPastTheCache) {
  ExpectPass({.tokens = 6, .head_dim = 64, .cache = Cache::kNhd, .cache_dtype = kE4M3, .v_dim = 64, .bad = Bad::kSlot});
}

// sglang#32477: NaN in a padded row must not reach slot 0.
TEST(Failures, PaddedRowsDoNotPoisonSlotZero) {
  const auto call = MakeCall({.tokens = 2,
                              .q_heads = 1,
                              .k_heads = 1,
                              .head_dim = 16,
                              .cache = Cache::kFlat,
                              .cache_dtype = kBF16,
                              .v_dim = 16,
                              .slots = Slots::kNothing});
  for (int i = 0; i < 32; ++i) {
    StoreNumber(kBF16, NAN, static_cast<uint16_t*>(call->args().k->data) + i);
    StoreNumber(kBF16, NAN, static_cast<uint16_t*>(call->args().v->data) + i);
  }
  const std::vector<char> before(static_cast<char*>(call->args().k_cache->data),
                                 static_cast<char*>(call->args().k_cache->data) + 16 * 2);
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(std::memcmp(before.data(), call->args().k_cache->data, before.size()), 0);
}

// NaN and infinity stay in their own head.
TEST(Failures, NonFiniteNumbersStayInTheirHead) {
  for (const bool norm : {false, true}) {
    ExpectPass({.tokens = 12, .head_dim = 64, .data = Data::kNonFinite, .norm = norm});
  }
}

// qkan#26: a contiguous view at any element is aligned enough.
TEST(Failures, MisalignedView) {
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    ExpectPass({.dtype = dtype, .head_dim = 64, .layout = Layout::kMisaligned});
  }
}

// sgl-kernel-xpu#467: q, k and v as slices of one row.
TEST(Failures, PackedRows) {
  ExpectPass({.tokens = 11,
              .q_heads = 7,
              .k_heads = 3,
              .head_dim = 80,
              .layout = Layout::kPacked,
              .norm = true,
              .cache = Cache::kHnd,
              .cache_dtype = kBF16,
              .v_dim = 72});
}

// vllm#43684, mlx#3659: more tokens than a dimension of a grid holds.
TEST(Failures, MoreThan65535Tokens) {
  ExpectPass({.tokens = 65535 + 9, .q_heads = 1, .k_heads = 0, .head_dim = 8});
  ExpectPass({.batch = 70000, .tokens = 1, .q_heads = 1, .k_heads = 0, .head_dim = 4});
}

// flashinfer#1129: int64 positions are read as such.
TEST(Failures, PositionsBeyond32Bits) {
  Simple simple(1, 1, 2, 2);
  simple.place[0] = (int64_t{1} << 32) + 7;
  simple.data = {1, 0};
  simple.q.data = simple.data.data();
  ASSERT_EQ(simple.Run(), ROPEWALK_OK);
  EXPECT_NEAR(simple.data[0], static_cast<double>(std::cos(4294967303.0L)), 1e-6);
}

// sglang#35345: rows of positions beyond the first must count.
TEST(Failures, EveryAxisOfPositionsCounts) {
  for (const Axes axes : {Axes::kSections, Axes::kInterleaved}) {
    ExpectPass({.tokens = 7, .head_dim = 128, .positions = Positions::kRandom, .axes = axes});
    const auto call = MakeCall({.tokens = 1, .k_heads = 0, .head_dim = 128, .axes = axes});
    ASSERT_TRUE(call->Run().ok());
    std::vector<char> first(static_cast<char*>(call->args().q->data), static_cast<char*>(call->args().q->data) + 256);
    for (int64_t axis = 1; axis < 3; ++axis) {
      ASSERT_TRUE(call->Reset().ok());
      auto* positions = static_cast<int64_t*>(call->args().positions->data);
      positions[axis] += 11;
      ASSERT_TRUE(call->Run().ok());
      EXPECT_NE(std::memcmp(first.data(), call->args().q->data, first.size()), 0) << axis;
    }
  }
}

// Models hand over rows of positions that no pair takes (text positions first); what is in them must not matter.
TEST(Failures, UnusedRowsOfPositionsDoNotMatter) {
  const auto call =
      MakeCall({.tokens = 3, .head_dim = 64, .angles = Angles::kTable, .axes = Axes::kSections, .axes_dtype = kI32});
  int64_t shape[] = {4, 3};
  std::vector<int64_t> rows(12, int64_t{1} << 40);  // the fourth row stays so
  std::memcpy(rows.data(), call->args().positions->data, 9 * sizeof(int64_t));
  DLTensor positions = *call->args().positions;
  positions.data = rows.data();
  positions.shape = shape;
  positions.strides = nullptr;
  call->args().positions = &positions;
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << ropewalk_last_error();
}

// A map of pairs to axes with a stride: served as it is, or refused; never read as if it were contiguous.
TEST(Failures, AxesWithAStride) {
  const auto call =
      MakeCall({.tokens = 3, .head_dim = 64, .angles = Angles::kTable, .axes = Axes::kSections, .axes_dtype = kI32});
  std::vector<int32_t> spread(64, 1000);
  for (size_t i = 0; i < 32; ++i) spread[2 * i] = static_cast<const int32_t*>(call->args().axes->data)[i];
  int64_t two = 2;
  DLTensor axes = *call->args().axes;
  axes.data = spread.data();
  axes.strides = &two;
  call->args().axes = &axes;
  const Status status = call->Run();
  if (status.ok()) {
    EXPECT_EQ(MessageOf(*call), "");
    EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << ropewalk_last_error();
  } else {
    EXPECT_EQ(status.code(), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_NE(status.text().find("axes"), std::string::npos) << status.text();
  }
}

// sglang#23609: no tokens, no heads of k: no work and no error, and later calls work.
TEST(Failures, ZeroTokens) {
  for (const int64_t batch : {0, 2}) {
    const auto call = MakeCall({.batch = batch,
                                .tokens = 0,
                                .head_dim = 64,
                                .norm = true,
                                .angles = Angles::kTable,
                                .cache = Cache::kNhd,
                                .cache_dtype = kBF16,
                                .v_dim = 64});
    EXPECT_TRUE(call->Run().ok());
    EXPECT_EQ(MessageOf(*call), "");
  }
  ExpectPass({.head_dim = 64});
}

TEST(Failures, ZeroHeadsOfK) {
  const auto call = MakeCall({.tokens = 3, .head_dim = 64});
  int64_t shape[] = {3, 0, 64};
  DLTensor k = *call->args().k;
  k.shape = shape;
  k.strides = nullptr;
  k.data = nullptr;
  call->args().k = &k;
  EXPECT_TRUE(call->Run().ok());
}

// Strides between no elements may be anything: an address worked out from them could leave the address space.
TEST(Failures, StridesOfNoHeads) {
  const auto call = MakeCall({.tokens = 3, .head_dim = 64});
  int64_t shape[] = {3, 0, 64}, strides[] = {-(int64_t{1} << 59), 64, 1};
  DLTensor k = *call->args().k;
  k.shape = shape;
  k.strides = strides;
  call->args().k = &k;
  RopeCall lowered;
  ASSERT_TRUE(LowerRope(call->args(), nullptr, &lowered).ok());
  EXPECT_EQ(lowered.params.k.token, 0);
  EXPECT_EQ(lowered.params.k_out.token, 0);
  EXPECT_TRUE(call->Run().ok());
}

// ---------------------------------------------------------------------------------------------------------------------
// The store

// sglang#19636: the rotated k is in the live tensor as well as in the cache.
TEST(Failures, KIsWrittenBackWhenStored) {
  const auto call = MakeCall({.tokens = 5, .head_dim = 64, .cache = Cache::kFlat, .cache_dtype = kBF16, .v_dim = 64});
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
  const auto* slots = static_cast<const int64_t*>(call->args().slots->data);
  for (int64_t token = 0; token < 5; ++token) {
    const auto* k = static_cast<const uint16_t*>(call->args().k->data) + RowOffset(*call->args().k, 0, token, 0);
    const auto* cached =
        static_cast<const uint16_t*>(call->args().k_cache->data) + RowOffset(*call->args().k_cache, 0, slots[token], 0);
    EXPECT_EQ(std::memcmp(k, cached, 2 * 64 * 2), 0) << token;
  }
}

// k only stored: its pages may even be read-only, whatever becomes of the token.
TEST(Failures, KThatIsOnlyStoredIsOnlyRead) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    for (const uint32_t cache_dtype : {dtype, static_cast<uint32_t>(kE4M3)}) {
      for (const Bad bad : {Bad::kNone, Bad::kPosition, Bad::kPaddedPosition, Bad::kSlot}) {
        for (const int64_t head_dim : {64, 100}) {  // vectors alone, and with what is left of one
          const auto call = MakeCall({.dtype = dtype,
                                      .tokens = 8,
                                      .head_dim = head_dim,
                                      .rotary_dim = head_dim == 64 ? 64 : 40,
                                      .norm = head_dim == 64,
                                      .angles = Angles::kTable,
                                      .cache = Cache::kNhd,
                                      .cache_dtype = cache_dtype,
                                      .k_store_only = true,
                                      .v_dim = 64,
                                      .slots = Slots::kSkips,
                                      .bad = bad});
          const DLTensor k = *call->args().k;
          const size_t bytes = static_cast<size_t>(8 * 2 * head_dim) * k.dtype.bits / 8;
          void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
          ASSERT_NE(memory, MAP_FAILED);
          std::memcpy(memory, DataOf(k), bytes);
          ASSERT_EQ(mprotect(memory, bytes + page, PROT_READ), 0);
          DLTensor there = k;
          there.data = memory;
          there.byte_offset = 0;
          call->args().k = &there;
          ASSERT_TRUE(call->Run().ok());  // a write would be a SIGSEGV
          EXPECT_EQ(MessageOf(*call), "");
          EXPECT_EQ(ropewalk_check_faults() == ROPEWALK_OK, bad == Bad::kNone || bad == Bad::kPaddedPosition);
          munmap(memory, bytes + page);
        }
      }
    }
  }
}

// What is only read may be read twice: k of one head for all (a stride of 0), k beside v in the same memory (MLA), and
// even k that is q, where q has an output.
TEST(Failures, KThatIsOnlyStoredMayShareMemory) {
  const auto call = MakeCall({.tokens = 5,
                              .q_heads = 2,
                              .head_dim = 64,
                              .out_of_place = true,
                              .cache = Cache::kNhd,
                              .cache_dtype = kBF16,
                              .k_store_only = true});
  const ropewalk_rope_args before = call->args();
  DLTensor k = *before.k;
  int64_t strides[] = {64, 0, 1};
  k.strides = strides;
  for (const DLTensor* other : std::initializer_list<const DLTensor*>{before.k, before.q, before.v}) {
    k.data = other->data;
    call->args().k = &k;
    EXPECT_TRUE(call->Run().ok()) << ropewalk_last_error();
    call->args().k_store_only = 0;
    EXPECT_EQ(call->Run().code(), ROPEWALK_INVALID_ARGUMENT);
    call->args().k_store_only = 1;
  }
  // The rotated k of each head is that of the one.
  const auto* slots = static_cast<const int64_t*>(before.slots->data);
  for (int64_t token = 0; token < 5; ++token) {
    const DLTensor& cache = *before.k_cache;
    const auto at = [&](int64_t head) {
      return static_cast<const uint16_t*>(cache.data) + RowOffset(cache, slots[token] / 16, slots[token] % 16, head);
    };
    EXPECT_EQ(std::memcmp(at(0), at(1), 64 * 2), 0) << token;
  }
}

// sglang#19107: both caches take the slot as it is given, fp8 too.
TEST(Failures, SlotsServeBothCaches) {
  for (const uint32_t cache_dtype : {kBF16, kE4M3, kE5M2}) {
    ExpectPass({.tokens = 20,
                .head_dim = 64,
                .cache = Cache::kHnd,
                .cache_dtype = cache_dtype,
                .page_size = 6,
                .v_dim = 40,
                .slots = Slots::kSkips});
  }
}

// vllm#37041: nothing may be remembered by address: other numbers at the same place give other results.
TEST(Failures, NothingIsCachedByAddress) {
  for (const Angles angles : {Angles::kTable, Angles::kFrequencies}) {
    const auto call =
        MakeCall({.head_dim = 64, .norm = true, .weight = Weight::kPlain, .weight_dtype = kF32, .angles = angles});
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(MessageOf(*call), "");
    auto* weight = static_cast<float*>(call->host_args().q_weight->data);
    for (int i = 0; i < 64; ++i) weight[i] = weight[i] * 2 + 1;
    if (call->host_args().cos) static_cast<float*>(call->host_args().cos->data)[0] = 0.25f;
    ASSERT_TRUE(call->Reset().ok());  // the new numbers, to the old addresses
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(MessageOf(*call), "");
  }
}

// sglang#34620: a refused call has written nothing.
TEST(Failures, ARefusedCallWritesNothing) {
  const auto call = MakeCall({.tokens = 5, .head_dim = 64, .cache = Cache::kFlat, .cache_dtype = kBF16, .v_dim = 64});
  call->args().v_cache->shape[2] = 63;
  EXPECT_EQ(call->Run().code(), ROPEWALK_INVALID_ARGUMENT);
  std::string message;
  ASSERT_TRUE(call->VerifyUntouched(&message).ok());
  EXPECT_EQ(message, "");
}

// ---------------------------------------------------------------------------------------------------------------------
// Scaling rules: what reaches the result

double Length(const char* scaling) {
  Simple simple(1, 1, 64, 64, 10000.0, scaling);
  simple.place[0] = 1234;
  for (size_t i = 0; i < 64; ++i) simple.data[i] = i < 32 ? 1.0f : 0.0f;
  EXPECT_EQ(simple.Run(), ROPEWALK_OK);
  return std::hypot(simple.data[0], simple.data[32]);
}

// vllm#46280, TRT-LLM#16379, exllamav3#259: applied, once.
TEST(Failures, AttentionFactorIsAppliedOnce) {
  EXPECT_NEAR(Length("{\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 4096}"),
              0.1 * std::log(4.0) + 1, 1e-6);
  EXPECT_NEAR(Length("{\"rope_type\": \"yarn\", \"factor\": 64.0, \"attention_factor\": 1.0, "
                     "\"original_max_position_embeddings\": 4096}"),
              1.0, 1e-6);
}

// vllm#48623: mscale equal to mscale_all_dim gives exactly one.
TEST(Failures, EqualMscalesGiveOne) {
  EXPECT_NEAR(Length("{\"rope_type\": \"yarn\", \"factor\": 40.0, \"mscale\": 1.0, \"mscale_all_dim\": 1.0, "
                     "\"original_max_position_embeddings\": 4096}"),
              1.0, 1e-6);
}

// Back is back: the inverse undoes the rotation, the scaling squared aside.
TEST(Failures, InverseUndoesTheRotation) {
  Simple simple(3, 2, 64, 64);
  simple.place = {0, 1000003, -77};
  simple.positions.data = simple.place.data();
  for (size_t i = 0; i < simple.data.size(); ++i) simple.data[i] = std::sin(static_cast<float>(i));
  const std::vector<float> before = simple.data;
  ASSERT_EQ(simple.Run(), ROPEWALK_OK);
  simple.args.inverse = 1;
  ASSERT_EQ(simple.Run(), ROPEWALK_OK);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_NEAR(simple.data[i], before[i], 2e-6) << i;
}

}  // namespace
}  // namespace ropewalk
