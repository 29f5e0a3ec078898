// The one list of cases: conformance runs them, benchmarks time them, the docs name them. A case says what a call looks
// like; conformance/case_call.h makes the call.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "models/model_config.h"
#include "rope/arguments.h"

namespace ropewalk {

enum class Layout : uint8_t {
  kSeparate,    // each tensor contiguous on its own
  kPacked,      // q, k and v are views of one row a token
  kTransposed,  // [batch, tokens, heads, dim] views of [batch, heads, tokens, dim] memory
  kPadded,      // gaps between heads, tokens and batches
  kMisaligned,  // contiguous, one element off any alignment, through byte_offset
  kReversed,    // tokens by a negative stride
};
enum class Weight : uint8_t { kNone, kPlain, kZeroCentered };
enum class Angles : uint8_t {
  kFrequencies,  // computed
  kTable,        // cos and sin [rows, pairs]
  kPacked,       // cos_sin [rows, rotary_dim]
  kFullWidth,    // cos and sin are the first halves of [rows, rotary_dim] (Hugging Face)
  kRepeated,     // every second column of [rows, rotary_dim] (diffusers)
  kTransposed,   // the row's stride is 1, the pair's is rows
  kPerBatch,     // cos and sin [batch, rows, pairs]
};
enum class Positions : uint8_t {
  kNone,  // none given: 0, 1, 2, ..
  kArange,
  kRandom,  // 0 .. 4095, or below the table's rows
  kListed,  // those of the accuracy promise, and their negatives
};
enum class Axes : uint8_t {
  kNone,
  kSections,     // mrope: pairs in three runs
  kInterleaved,  // mrope: pairs in turn, the rest temporal (Qwen3-VL)
  kTwo,          // 2-D vision: the first half of the pairs height, the second width
};
enum class Cache : uint8_t {
  kNone,
  kFlat,  // [slots, heads, dim]
  kNhd,   // [pages, page_size, heads, dim]
  kHnd,   // the same, as a view of [pages, heads, page_size, dim]
};
enum class Scale : uint8_t { kNone, kHost, kTensor, kPerHead };
enum class Slots : uint8_t {
  kAll,      // a shuffle of the slots
  kSkips,    // every third -1
  kNothing,  // all -1
};
enum class Data : uint8_t {
  kNormal,
  kLarge,
  kTiny,
  kNonFinite,
  kMixed
};  // mixed: zeros, tiny and large beside each other
// What is wrong with some tokens of the call; kPaddedPosition: the slot is -1 and the position out of range.
enum class Bad : uint8_t { kNone, kPosition, kSlot, kAxis, kPaddedPosition };

struct RopeCase {
  std::string name = {};  // made of what differs from these defaults; unique

  std::string model = {};  // of a real model's shape: "Llama-3.1-8B"
  uint32_t dtype = kBF16;
  int64_t batch = 0;  // 0: three dimensions
  int64_t tokens = 5;
  int64_t q_heads = 3, k_heads = 2;  // k_heads 0: no k
  int64_t head_dim = 128;
  int64_t rotary_dim = 0;  // 0: the whole head
  int64_t rotary_offset = 0;
  Layout layout = Layout::kSeparate;
  int64_t row_gap = 0;    // packed: elements behind the last head of a row
  bool v_behind = false;  // packed: the row holds v, though no store takes it
  bool out_of_place = false;
  Data data = Data::kNormal;

  int32_t pairing = ROPEWALK_NEOX;
  bool inverse = false;
  int32_t rounding = ROPEWALK_ROUND_FUSED;

  bool norm = false;
  Weight weight = Weight::kNone;
  uint32_t weight_dtype = 0;  // 0: dtype
  double eps = 1e-6;

  Angles angles = Angles::kFrequencies;
  double theta = 10000.0;
  std::string scaling = {};  // JSON for ropewalk_frequencies_create
  int64_t sequence_length = 0;
  std::string config = {};  // text of a config.json, instead of theta and scaling
  std::string layer_type = {};
  uint32_t table_dtype = kF32;

  Positions positions = Positions::kArange;
  uint32_t positions_dtype = kI64;
  bool positions_broadcast = false;  // [1, tokens], or [tokens] with a batch
  uint32_t offsets_dtype = 0;        // 0: no offsets
  Axes axes = Axes::kNone;
  uint32_t axes_dtype = 0;  // kI32: through the argument `axes`; 0: through the frequencies

  Cache cache = Cache::kNone;
  uint32_t cache_dtype = 0;  // 0: dtype
  int64_t page_size = 16;
  bool store_k = true, store_v = true;
  bool k_store_only = false;
  int64_t v_dim = 0;  // 0: head_dim
  Scale scale = Scale::kNone;
  Slots slots = Slots::kAll;
  uint32_t slots_dtype = kI64;

  Bad bad = Bad::kNone;
};

// All cases, in one order, with unique names.
const std::vector<RopeCase>& RopeCases();

// So many others, drawn from all that a case can say: heads of real models and of tensor-parallel ranks of them, heads
// of any number; the same for the same seed everywhere. Four by four they are calls of one shape with other numbers of
// tokens, which the same kernel often serves.
std::vector<RopeCase> RandomRopeCases(uint64_t seed, int64_t count);
inline constexpr int64_t kCallsOfAShape = 4;

// What engines send: each of AllModelHeads() with 1, 7, 33, 64 and 200 tokens, in one mode each, so that the modes go
// round; or, `all` of it: every model as tensor-parallel ranks of 1, 2, 4 and 8 have it, in every mode.
std::vector<RopeCase> EngineCases(bool all);

// Cases of the gradient: every `step`-th of RopeCases() that has one; so many of RandomRopeCases, without their stores,
// three of four with a norm. Lists of their own, so that the operation's stay as they are.
std::vector<RopeCase> BackwardCases(size_t step);
std::vector<RopeCase> RandomBackwardCases(uint64_t seed, int64_t count);

// "pairing=neox", "cache=hnd", ..: stages and options that the case exercises.
std::vector<std::string> CaseTags(const RopeCase& c);

// The operation on a model's shapes: one case for each layer type. `json` is the text of its config.json.
std::vector<RopeCase> CasesOfModel(const ModelConfig& model, std::string_view json, int64_t tokens, uint32_t dtype);

// Names the case after its fields; for those made by hand.
std::string CaseName(const RopeCase& c);

// A call with every argument that can be given together.
RopeCase EveryArgumentCase(Angles angles);

}  // namespace ropewalk
