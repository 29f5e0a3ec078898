// The two functions of ropewalk/compat.hpp against a rotation in double, in every layout; and what they refuse.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <ropewalk/compat.hpp>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "conformance/reference.h"
#include "rope/arguments.h"

namespace ropewalk {
namespace {

constexpr int64_t kTokens = 6, kRows = 50;
constexpr int64_t kPositions[kTokens] = {49, 0, 7, 7, 13, 1};
constexpr int64_t kOffsets[kTokens] = {0, 3, 0, -7, 2, 48};

// A tensor on the host with `padding` elements after each row of the last dimension, which must never change.
struct Tensor {
  uint32_t dtype;
  int64_t padding;
  std::vector<int64_t> shape, strides;
  std::vector<char> bytes;
  DLTensor dl{};

  Tensor(uint32_t dtype_, std::vector<int64_t> shape_, int64_t padding_ = 0)
      : dtype(dtype_), padding(padding_), shape(std::move(shape_)), strides(shape.size()) {
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= shape[i] + (i + 1 == shape.size() ? padding : 0);
    }
    bytes.resize(static_cast<size_t>(stride * DtypeBytes(dtype)));
    const bool whole = dtype == kI32 || dtype == kI64;
    const uint8_t code = whole ? kDLInt : dtype == kBF16 ? kDLBfloat : kDLFloat;
    dl = {.data = bytes.data(),
          .device = {kDLCPU, 0},
          .ndim = static_cast<int32_t>(shape.size()),
          .dtype = {code, static_cast<uint8_t>(8 * DtypeBytes(dtype)), 1},
          .shape = shape.data(),
          .strides = padding ? strides.data() : nullptr,
          .byte_offset = 0};
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  int64_t count() const { return static_cast<int64_t>(bytes.size()) / DtypeBytes(dtype); }
  char* at(int64_t i) { return bytes.data() + i * DtypeBytes(dtype); }
  double number(int64_t i) { return LoadNumber(dtype, at(i)); }
  void Fill(double seed) {
    for (int64_t i = 0; i < count(); ++i) StoreNumber(dtype, 2 * std::sin(seed + 1.7 * static_cast<double>(i)), at(i));
  }
};

void FillTable(Tensor* table, int64_t rotary_dim) {
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < rotary_dim; ++i) {
      const int64_t pair = i % (rotary_dim / 2);
      const double angle =
          static_cast<double>(row) * std::pow(1e4, -2.0 * static_cast<double>(pair) / static_cast<double>(rotary_dim));
      StoreNumber(table->dtype, i < rotary_dim / 2 ? std::cos(angle) : std::sin(angle),
                  table->at(row * rotary_dim + i));
    }
  }
}

template <class T>
void FillWhole(Tensor* tensor, const int64_t (&values)[kTokens]) {
  for (int64_t i = 0; i < kTokens; ++i) {
    const T value = static_cast<T>(values[i]);
    std::memcpy(tensor->at(i), &value, sizeof(T));
  }
}

void FillInts(Tensor* tensor, const int64_t (&values)[kTokens]) {
  if (tensor->dtype == kI32) FillWhole<int32_t>(tensor, values);
  if (tensor->dtype == kI64) FillWhole<int64_t>(tensor, values);
}

// Half a unit in the last place, and float32's arithmetic in between.
double Bound(uint32_t dtype, double value) {
  const double unit = dtype == kBF16 ? 0x1p-8 : dtype == kF16 ? 0x1p-11 : 0x1p-24;
  return std::abs(value) * unit * 1.01 + 4e-6;
}

// `got` holds the elements of `before` in the same places; those of the heads are rotated by the table, the others are
// as they were. Elements of token t begin at t * token_stride, of its heads at head_stride.
void ExpectRotated(Tensor* before, Tensor* got, Tensor* table, int64_t heads, int64_t token_stride, int64_t head_stride,
                   int64_t rotary_dim, bool is_neox, bool offsets) {
  std::vector<bool> changed(static_cast<size_t>(got->count()), false);
  const int64_t half = rotary_dim / 2;
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t row = (kPositions[t] + (offsets ? kOffsets[t] : 0)) * rotary_dim;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < half; ++i) {
        const int64_t first = t * token_stride + head * head_stride + (is_neox ? i : 2 * i);
        const int64_t second = first + (is_neox ? half : 1);
        const double c = table->number(row + i), s = table->number(row + half + i);
        const double a = before->number(first), b = before->number(second);
        ASSERT_NEAR(got->number(first), a * c - b * s, Bound(got->dtype, a * c - b * s))
            << t << " " << head << " " << i;
        ASSERT_NEAR(got->number(second), b * c + a * s, Bound(got->dtype, b * c + a * s))
            << t << " " << head << " " << i;
        changed[static_cast<size_t>(first)] = changed[static_cast<size_t>(second)] = true;
      }
    }
  }
  const auto bytes = static_cast<size_t>(DtypeBytes(got->dtype));
  for (size_t i = 0; i < changed.size(); ++i) {
    if (changed[i]) continue;
    ASSERT_EQ(std::memcmp(before->bytes.data() + i * bytes, got->bytes.data() + i * bytes, bytes), 0)
        << "element " << i;
  }
}

struct FusedCase {
  uint32_t dtype, int_dtype;
  bool is_neox, with_offsets;
  int64_t head_dim, rope_dim;
};

void CheckFused(const FusedCase& c) {
  const auto [dtype, int_dtype, is_neox, with_offsets, head_dim, rope_dim] = c;
  SCOPED_TRACE(testing::Message() << "dtype " << dtype << " ints " << int_dtype << " neox " << is_neox << " offsets "
                                  << with_offsets << " head_dim " << head_dim << " rope_dim " << rope_dim);
  for (const uint32_t table_dtype : {uint32_t{kF32}, dtype}) {
    Tensor q(dtype, {kTokens, 4, head_dim}, 6), k(dtype, {kTokens, 2, head_dim}, 10);
    Tensor old_q(dtype, {kTokens, 4, head_dim}, 6), old_k(dtype, {kTokens, 2, head_dim}, 10);
    Tensor table(table_dtype, {kRows, rope_dim}), positions(int_dtype, {kTokens}), offsets(int_dtype, {kTokens});
    for (Tensor* x : {&q, &old_q}) x->Fill(0.0);
    for (Tensor* x : {&k, &old_k}) x->Fill(1.0);
    FillTable(&table, rope_dim);
    FillInts(&positions, kPositions);
    FillInts(&offsets, kOffsets);
    const DLTensor* added = with_offsets ? &offsets.dl : nullptr;
    Result result = compat::fused_qk_rope_with_cos_sin_cache_inplace(&q.dl, &k.dl, &table.dl, &positions.dl, rope_dim,
                                                                     is_neox, nullptr, added);
    ASSERT_TRUE(result) << result.text;
    ExpectRotated(&old_q, &q, &table, 4, 4 * (head_dim + 6), head_dim + 6, rope_dim, is_neox, with_offsets);
    ExpectRotated(&old_k, &k, &table, 2, 2 * (head_dim + 10), head_dim + 10, rope_dim, is_neox, with_offsets);
    // q alone, to the same bits.
    const std::vector<char> both = q.bytes;
    q.Fill(0.0);
    result = compat::fused_qk_rope_with_cos_sin_cache_inplace(&q.dl, nullptr, &table.dl, &positions.dl, rope_dim,
                                                              is_neox, nullptr, added);
    ASSERT_TRUE(result) << result.text;
    EXPECT_EQ(q.bytes, both);
  }
}

TEST(Compat, FusedRotatesInPlace) {
  constexpr std::pair<int64_t, int64_t> kDims[] = {{64, 64}, {128, 128}, {512, 512}, {256, 64}, {80, 80}, {96, 34}};
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    for (const uint32_t int_dtype : {kI32, kI64}) {
      for (const auto& [head_dim, rope_dim] : kDims) {
        for (const int options : {0, 1, 2, 3}) {
          CheckFused({dtype, int_dtype, (options & 1) != 0, (options & 2) != 0, head_dim, rope_dim});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// The shapes of positions and of a tensor of some heads.
struct Layout {
  bool batch, heads, flat_tokens;
  std::vector<int64_t> positions() const { return batch ? std::vector<int64_t>{2, 3} : std::vector<int64_t>{6}; }
  std::vector<int64_t> tensor(int64_t count, int64_t head_size) const {
    std::vector<int64_t> shape = flat_tokens ? std::vector<int64_t>{6} : positions();
    if (heads) {
      shape.insert(shape.end(), {count, head_size});
    } else {
      shape.push_back(count * head_size);
    }
    return shape;
  }
};

void CheckEmbedding(uint32_t dtype, const Layout& layout, bool is_neox, bool with_offsets, bool out_of_place) {
  SCOPED_TRACE(testing::Message() << "dtype " << dtype << " batch " << layout.batch << " heads " << layout.heads
                                  << " flat tokens " << layout.flat_tokens << " neox " << is_neox << " offsets "
                                  << with_offsets << " out of place " << out_of_place);
  for (const auto& sizes : {std::pair<int64_t, int64_t>{64, 64}, {128, 64}, {80, 80}, {10, 4}}) {
    const int64_t head_size = sizes.first, rotary_dim = sizes.second;
    const int64_t q_heads = 4, k_heads = 1, padding = layout.heads ? 0 : 8;
    const auto make = [&](int64_t heads) { return Tensor(dtype, layout.tensor(heads, head_size), padding); };
    Tensor query = make(q_heads), key = make(k_heads), old_query = make(q_heads), old_key = make(k_heads);
    Tensor new_query = make(q_heads), new_key = make(k_heads);
    for (Tensor* x : {&query, &old_query, &new_query}) x->Fill(0.0);
    for (Tensor* x : {&key, &old_key, &new_key}) x->Fill(1.0);
    Tensor table(dtype, {kRows, rotary_dim}), positions(kI64, layout.positions()), offsets(kI32, layout.positions());
    FillTable(&table, rotary_dim);
    FillInts(&positions, kPositions);
    FillInts(&offsets, kOffsets);
    const Result result = compat::rotary_embedding(
        &positions.dl, &query.dl, &key.dl, head_size, &table.dl, is_neox, nullptr, with_offsets ? &offsets.dl : nullptr,
        out_of_place ? &new_query.dl : nullptr, out_of_place ? &new_key.dl : nullptr);
    ASSERT_TRUE(result) << result.text;
    if (out_of_place) {
      EXPECT_EQ(query.bytes, old_query.bytes);
      EXPECT_EQ(key.bytes, old_key.bytes);
    }
    ExpectRotated(&old_query, out_of_place ? &new_query : &query, &table, q_heads, q_heads * head_size + padding,
                  head_size, rotary_dim, is_neox, with_offsets);
    ExpectRotated(&old_key, out_of_place ? &new_key : &key, &table, k_heads, k_heads * head_size + padding, head_size,
                  rotary_dim, is_neox, with_offsets);
  }
}

TEST(Compat, EmbeddingRotatesInEveryLayout) {
  constexpr Layout kLayouts[] = {{false, false, false}, {false, true, false}, {true, false, false},
                                 {true, true, false},   {true, false, true},  {true, true, true}};
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    for (const Layout& layout : kLayouts) {
      for (int options = 0; options < 8; ++options) {
        CheckEmbedding(dtype, layout, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Compat, Refuses) {
  Tensor q(kF32, {6, 2, 64}), k(kF32, {6, 1, 64}), flat(kF32, {6, 100}), few(kF32, {5, 2, 64}),
      batch(kF32, {1, 6, 2, 64});
  Tensor table(kF32, {kRows, 64}), wide(kF32, {kRows, 128}), positions(kI64, {6}), numbers(kF32, {6});
  for (Tensor* x : {&q, &k, &flat, &few, &batch}) x->Fill(0.0);
  const std::vector<char> before = q.bytes;
  const auto fused = [&](DLTensor* q_, DLTensor* k_, const DLTensor* table_, const DLTensor* positions_,
                         int64_t rope_dim) {
    return compat::fused_qk_rope_with_cos_sin_cache_inplace(q_, k_, table_, positions_, rope_dim, true);
  };
  const auto embed = [&](const DLTensor* positions_, DLTensor* q_, DLTensor* k_, int64_t head_size,
                         const DLTensor* table_) {
    return compat::rotary_embedding(positions_, q_, k_, head_size, table_, true);
  };
  const std::string a = "fused_qk_rope_with_cos_sin_cache_inplace: ", b = "rotary_embedding: ";
  const std::pair<Result, std::string> cases[] = {
      {fused(&batch.dl, nullptr, &table.dl, &positions.dl, 64), a + "q must be [tokens, heads, head_dim], but has 4"},
      {fused(nullptr, nullptr, &table.dl, &positions.dl, 64), a + "q is missing"},
      {fused(&q.dl, &few.dl, &table.dl, &positions.dl, 64), a + "k has 5 tokens, but q has 6"},
      {fused(&q.dl, &k.dl, &table.dl, nullptr, 64), a + "positions is missing"},
      {fused(&q.dl, &k.dl, nullptr, &positions.dl, 64), a + "cos_sin_cache is missing"},
      {fused(&q.dl, &k.dl, &table.dl, &numbers.dl, 64), a + "positions must be int32 or int64, but is float32"},
      {fused(&q.dl, &k.dl, &table.dl, &positions.dl, 0), a + "rope_dim must be at least 2"},
      {fused(&q.dl, &k.dl, &table.dl, &positions.dl, int64_t{1} << 40), a + "rope_dim must be at least 2, and at most"},
      {fused(&q.dl, &k.dl, &table.dl, &positions.dl, 32),
       a + "cos_sin_cache must be 32 wide for rope_dim 32, but is 64"},
      {fused(&q.dl, &k.dl, &wide.dl, &positions.dl, 128), a + "rope_dim must be at most head_dim 64, but is 128"},
      {embed(nullptr, &q.dl, &k.dl, 64, &table.dl), b + "positions is missing"},
      {embed(&positions.dl, nullptr, &k.dl, 64, &table.dl), b + "query is missing"},
      {embed(&positions.dl, &q.dl, &k.dl, 64, nullptr), b + "cos_sin_cache is missing"},
      {embed(&positions.dl, &q.dl, &k.dl, 0, &table.dl), b + "head_size must be at least 2, but is 0"},
      {embed(&positions.dl, &flat.dl, &k.dl, 64, &table.dl), b + "query must be [.., heads * 64] or [.., heads, 64]"},
      {embed(&positions.dl, &q.dl, &few.dl, 64, &table.dl), b + "key must be [.., heads * 64] or [.., heads, 64]"},
      {embed(&numbers.dl, &q.dl, &k.dl, 64, &table.dl), b + "positions must be int32 or int64, but is float32"},
      {embed(&positions.dl, &q.dl, &k.dl, 64, &wide.dl),
       b + "rotary_dim must be at most head_size 64, but is 128 (from cos_sin_cache)"},
      {embed(&positions.dl, &q.dl, &q.dl, 64, &table.dl), b + "key must not share memory with query"},
  };
  for (const auto& [result, text] : cases) {
    EXPECT_EQ(result.code, ROPEWALK_INVALID_ARGUMENT) << text;
    EXPECT_TRUE(result.text.starts_with(text)) << result.text << "\nwanted: " << text;
  }
  EXPECT_EQ(q.bytes, before);
}

}  // namespace
}  // namespace ropewalk
