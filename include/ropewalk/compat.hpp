// Two functions that SGLang calls on Intel GPUs, under their own names and argument order, over ropewalk.hpp. They
// serve tensors of every device. docs/compat.md says what differs.
//
//   auto r = ropewalk::compat::rotary_embedding(&positions, &query, &key, 128, &cos_sin_cache, true);
//   if (!r) std::puts(r.text.c_str());
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_COMPAT_HPP_
#define ROPEWALK_COMPAT_HPP_

#include <ropewalk/ropewalk.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

namespace ropewalk::compat {
namespace detail {

using Names = std::initializer_list<std::pair<std::string_view, std::string_view>>;

// A refusal with the names that the function's caller knows: the same text, word by word.
inline Result Renamed(Result result, std::string_view function, Names names) {
  constexpr std::string_view kWord = "abcdefghijklmnopqrstuvwxyz_";
  if (result) return result;
  std::string_view rest = result.text;
  if (rest.starts_with("rope: ")) rest.remove_prefix(6);
  std::string text(function);
  text += ": ";
  while (!rest.empty()) {
    const size_t letters = std::min(rest.find_first_not_of(kWord), rest.size());
    std::string_view word = rest.substr(0, letters ? letters : std::min(rest.find_first_of(kWord), rest.size()));
    rest.remove_prefix(word.size());
    for (const auto& [from, to] : names) {
      if (word == from) {
        word = to;
        break;
      }
    }
    text += word;
  }
  return {result.code, std::move(text)};
}

inline Result Refuse(std::string_view function, const std::string& why) {
  return {ROPEWALK_INVALID_ARGUMENT, std::string(function) + ": " + why};
}

// One rotation by a table. `positions` and the table are needed here, which the operation itself could do without.
inline Result Rotate(std::string_view function, Names names, const RopeArgs& args, void* stream) {
  if (!args.positions) return Refuse(function, "positions is missing");
  if (!args.cos_sin) return Refuse(function, "cos_sin_cache is missing");
  return Renamed(rope(args, stream), function, names);
}

// [.., heads, head_size] of a tensor that has the heads in a row or apart, behind positions' shape or the number of
// positions. It points into itself.
struct Heads {
  DLTensor view{};
  int64_t shape[4]{}, strides[4]{};

  Heads() = default;
  Heads(const Heads&) = delete;
  Heads& operator=(const Heads&) = delete;

  // Whether the tensor has such a layout.
  bool Split(const DLTensor& tensor, const DLTensor& positions, int64_t head_size) {
    const int lead = positions.ndim;
    int ndim = tensor.ndim;
    if (lead < 1 || lead > 2 || ndim < 2 || ndim > lead + 2 || !tensor.shape || !positions.shape) return false;
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      shape[i] = tensor.shape[i];
      strides[i] = tensor.strides ? tensor.strides[i] : stride;
      stride *= shape[i];
    }
    const auto leads = [&] { return std::equal(positions.shape, positions.shape + lead, shape); };
    if (lead == 2 && ndim < 4 && !leads() && shape[0] == positions.shape[0] * positions.shape[1]) {
      std::copy_backward(shape, shape + ndim, shape + ndim + 1);
      std::copy_backward(strides, strides + ndim, strides + ndim + 1);
      ++ndim;
      std::copy_n(positions.shape, 2, shape);
      strides[0] = strides[1] * shape[1];
    }
    if (!leads()) return false;
    if (ndim == lead + 1 && shape[lead] % head_size == 0) {
      shape[lead + 1] = head_size;
      shape[lead] /= head_size;
      strides[lead + 1] = strides[lead];
      strides[lead] *= head_size;
      ++ndim;
    }
    view = tensor;
    view.ndim = ndim;
    view.shape = shape;
    view.strides = strides;
    return ndim == lead + 2 && shape[lead + 1] == head_size;
  }
};

}  // namespace detail

// Rotates the first rope_dim elements of each head of q and k in place by a table.
//   q, k           [tokens, heads, head_dim] float32, float16 or bfloat16, any token and head strides; k may be null
//   cos_sin_cache  [rows, rope_dim] float32, float16 or bfloat16: cosines, then sines
//   positions      [tokens] int32 or int64, rows of the table
//   is_neox        pairs (i, i + rope_dim/2); else (2i, 2i + 1)
//   stream         as in ropewalk_rope
//   offsets        null, or [tokens] int32 or int64, added to positions
//   sycl_queue     a sycl::queue* to work on instead of stream, for tensors in its unified shared memory (Intel GPUs)
inline Result fused_qk_rope_with_cos_sin_cache_inplace(DLTensor* q, DLTensor* k, const DLTensor* cos_sin_cache,
                                                       const DLTensor* positions, int64_t rope_dim, bool is_neox,
                                                       void* stream = nullptr, const DLTensor* offsets = nullptr,
                                                       void* sycl_queue = nullptr) {
  constexpr std::string_view kName = "fused_qk_rope_with_cos_sin_cache_inplace";
  if (q && q->ndim != 3) {
    return detail::Refuse(kName,
                          "q must be [tokens, heads, head_dim], but has " + std::to_string(q->ndim) + " dimensions");
  }
  if (rope_dim < 2 || rope_dim > std::numeric_limits<int32_t>::max()) {
    return detail::Refuse(kName,
                          "rope_dim must be at least 2, and at most head_dim, but is " + std::to_string(rope_dim));
  }
  return detail::Rotate(kName, {{"cos_sin", "cos_sin_cache"}, {"rotary_dim", "rope_dim"}},
                        {.pairing = is_neox ? ROPEWALK_NEOX : ROPEWALK_INTERLEAVED,
                         .q = q,
                         .k = k,
                         .positions = positions,
                         .offsets = offsets,
                         .cos_sin = cos_sin_cache,
                         .rotary_dim = static_cast<int32_t>(rope_dim),
                         .sycl_queue = sycl_queue},
                        stream);
}

// Rotates query and key by a table, in place, or into query_out and key_out if they are given.
//   positions      [tokens] or [batch, tokens] int32 or int64, rows of the table
//   query, key     [.., heads * head_size] or [.., heads, head_size] with positions' shape, or the number of positions,
//                  in front, each its own; float32, float16 or bfloat16; key may be null
//   cos_sin_cache  [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines; rotary_dim <= head_size
//   is_neox        pairs (i, i + rotary_dim/2); else (2i, 2i + 1)
//   stream         as in ropewalk_rope
//   offsets        null, or like positions and added to them
//   sycl_queue     as above
inline Result rotary_embedding(const DLTensor* positions, DLTensor* query, DLTensor* key, int64_t head_size,
                               const DLTensor* cos_sin_cache, bool is_neox, void* stream = nullptr,
                               const DLTensor* offsets = nullptr, DLTensor* query_out = nullptr,
                               DLTensor* key_out = nullptr, void* sycl_queue = nullptr) {
  constexpr std::string_view kName = "rotary_embedding";
  if (!positions) return detail::Refuse(kName, "positions is missing");
  if (head_size < 2) return detail::Refuse(kName, "head_size must be at least 2, but is " + std::to_string(head_size));
  const std::pair<const char*, DLTensor*> tensors[] = {
      {"query", query}, {"key", key}, {"query_out", query_out}, {"key_out", key_out}};
  detail::Heads heads[4];
  for (int i = 0; i < 4; ++i) {
    const auto& [name, tensor] = tensors[i];
    if (tensor && !heads[i].Split(*tensor, *positions, head_size)) {
      const std::string size = std::to_string(head_size);
      std::string what(name);
      what.append(" must be [.., heads * ").append(size).append("] or [.., heads, ").append(size);
      return detail::Refuse(kName, what + "], positions' shape in front");
    }
  }
  const auto view = [&](int i) { return tensors[i].second ? &heads[i].view : nullptr; };
  return detail::Rotate(kName,
                        {{"q", "query"},
                         {"k", "key"},
                         {"q_out", "query_out"},
                         {"k_out", "key_out"},
                         {"cos_sin", "cos_sin_cache"},
                         {"head_dim", "head_size"}},
                        {.pairing = is_neox ? ROPEWALK_NEOX : ROPEWALK_INTERLEAVED,
                         .q = view(0),
                         .k = view(1),
                         .positions = positions,
                         .offsets = offsets,
                         .cos_sin = cos_sin_cache,
                         .q_out = view(2),
                         .k_out = view(3),
                         .sycl_queue = sycl_queue},
                        stream);
}

}  // namespace ropewalk::compat

#endif  // ROPEWALK_COMPAT_HPP_
