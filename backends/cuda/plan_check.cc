// Whether a plan of the CUDA kernel fits its call. backends/cuda/kernel/shape.h says what the kernel does with its
// constants, and this file reads it as the kernel does. What the constants must be is worked out again, from the call.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "backends/cuda/plan.h"
#include "base/text.h"

namespace ropewalk {
namespace {

constexpr int64_t kSharedBytes = 48 * 1024;  // of a block, without asking for more
constexpr int64_t kMostThreads = 1024, kMostGridX = INT32_MAX, kMostGridY = 65535;

class PlanProof {
 public:
  PlanProof(const RopeCall& call, const CudaDevice& device, const RopeCudaPlan& plan)
      : v_(call.variant),
        p_(call.params),
        t_(call.tensors),
        device_(device),
        plan_(plan),
        key_(plan.key),
        shape_(ShapeOf(ChoicesOf(plan.key))),
        rows_(p_.batch * p_.tokens),
        heads_(int64_t{p_.q_heads} + (t_.k ? p_.k_heads : 0)),
        all_heads_(heads_ + (v_.store_v ? p_.k_heads : 0)) {}

  Status Run() {
    Sizes();
    if (ok()) Block();
    if (ok()) Owners();
    if (ok()) Places();
    if (ok()) Vectors();
    return Result();
  }

 private:
  bool ok() const { return !why_; }
  void Require(bool holds, const char* why) {
    if (!holds && !why_) why_ = why;
  }
  Status Result() const {
    if (ok()) return {};
    return Status::Internal(Text("rope: the CUDA plan (", RopeCudaName(key_), ", grid ", plan_.grid_x, " x ",
                                 plan_.grid_y, ") is wrong: it ", why_));
  }

  // The call's own numbers.
  void Sizes() {
    Require(key_.variant == v_, "is of another variant");
    Require(key_.head_dim == p_.head_dim && key_.rotary_dim == p_.rotary_dim &&
                key_.rotary_offset == p_.rotary_offset && key_.v_dim == (v_.store_v ? p_.v_dim : 0),
            "is of other heads");
    Require(key_.q_heads == 0 || (key_.q_heads == p_.q_heads && key_.k_heads == p_.k_heads),
            "is of other numbers of heads");
    Require(key_.batched == (p_.batch > 1), "takes a batch for none, or none for one");
    Require(key_.unit_scaling == (p_.attention_scaling == 1.0f), "is of another attention scaling");
    Require(std::bit_cast<uint32_t>(key_.eps) == std::bit_cast<uint32_t>(v_.norm ? p_.eps : 0.0f), "is of another eps");
    Require(key_.scale_pointers || (!t_.k_scale && !t_.v_scale), "looks for the scales in the params");
  }

  void Block() {
    Require(key_.vector > 0 && key_.lanes > 0 && key_.lanes <= 32, "has no vectors or lanes");
    if (!ok()) return;
    Require(Deals(shape_.grid), "deals the groups of a block so that some are left over");
    Require(key_.threads <= kMostThreads, "has more threads than a block may");
    Require(shape_.shared_bytes <= kSharedBytes, "needs more shared memory than a block has");
    const int most = std::max<int>(key_.min_blocks, plan_.at_once);
    Require(most <= MostCudaBlocks(device_), "asks for more blocks than a multiprocessor holds");
    Require(int64_t{most} * key_.threads <= 2048, "asks for more threads than a multiprocessor holds");
    Require(plan_.at_once == 0 || int64_t{plan_.at_once} * device_.sm_count >= int64_t{plan_.grid_x} * plan_.grid_y,
            "says that its blocks run at once");
    Require(plan_.grid_x <= kMostGridX && plan_.grid_y >= 1 && plan_.grid_y <= kMostGridY, "has a grid out of range");
    Require(device_.major >= 9 || !key_.dependent_launch, "starts dependent launches, which the device has not");
    Require(key_.dependent_launch <= 3, "starts the next kernel at no known time");
    Require(!key_.flat || shape_.flat, "is said to fetch side by side, but has no stages");
    Require(!shape_.flat || WarpTokens(shape_.grid) == 1, "fetches side by side, but the threads of a warp part");
    Require(!key_.few_tokens || WarpTokens(shape_.grid) == 1, "is for few tokens, but the threads of a warp part");
    Require(key_.few_tokens || plan_.grid_y == 1, "spreads heads over blocks that take them in turns");
    Require(!key_.few_tokens || key_.in_flight > 0, "is for few tokens, but its groups take no head");
    Require(shape_.grid.rounds == 1 || !v_.store_v || shape_.v_rides,
            "gives groups several heads at once, but those of v have no place among them");
  }

  // Each token has its groups; among them each head has one.
  void Owners() {
    const rope_grid& g = shape_.grid;
    const int64_t tokens = BlockTokens(g), blocks = plan_.grid_x;
    Require(blocks * tokens >= rows_, "has too few blocks for the tokens");
    Require((blocks - 1) * tokens < rows_, "has a block without a token");
    // For the first token of a block: each place of a turn is taken by one of the token's own groups. The same rule
    // gives the other tokens theirs.
    const int at_once = HeadsAtOnce(g);
    std::array<uint8_t, 2048> fixed;
    std::vector<uint8_t> large;
    uint8_t* taken = fixed.data();
    if (at_once > static_cast<int>(fixed.size())) {
      large.resize(static_cast<size_t>(at_once));
      taken = large.data();
    }
    std::fill_n(taken, at_once, uint8_t{0});
    int64_t owners = 0;
    for (int warp = 0; warp < g.threads / 32; ++warp) {
      for (int group = 0; group < GroupsPerWarp(g); ++group) {
        const int thread = warp * 32 + group * g.lanes;
        const int token = TokenInBlock(g, thread);
        Require(token >= 0 && token < tokens, "gives a group a token of another block");
        if (token != 0) continue;
        for (int round = 0; round < g.rounds; ++round) {
          const int place = GroupFirst(g, thread) + round * WarpShare(g);
          Require(place >= 0 && place < at_once, "gives a group a head out of its turn");
          if (!ok()) return;
          Require(taken[place]++ == 0, "gives a head to two groups");
          ++owners;
        }
      }
    }
    Require(owners == at_once, "leaves a head of a turn without a group");
    // A turn takes `at_once` heads. The next block, or the next turn, takes the heads behind them, and heads of v that
    // do not ride go on from there.
    const int64_t turns_end = shape_.v_rides ? all_heads_ : heads_;
    const int64_t places = int64_t{plan_.grid_y} * at_once;
    Require(!key_.few_tokens || places >= turns_end, "leaves heads without a block");
    Require(!key_.few_tokens || places - at_once < std::max(turns_end, all_heads_), "has a block without a head");
    Require(
        !key_.full || (key_.few_tokens && places == turns_end && GroupsPerWarp(g) * g.lanes == 32 && key_.q_heads != 0),
        "says that every group has a head, but one has none");
    if (key_.alike) {
      const int64_t k_heads = t_.k ? p_.k_heads : 0;
      Require(key_.few_tokens && key_.q_heads != 0 && p_.q_heads % WarpHeads(g) == 0 && k_heads % WarpHeads(g) == 0,
              "says that the heads of a warp are of one tensor, but some are of two");
    }
  }

  // The facts in the key about where tensors lie.
  void Places() {
    const int bytes = RopeDtypeBytes(v_.dtype);
    const bool steps = p_.tokens > 1;
    const auto lies = [&](const rope_strides& s, int64_t heads, int64_t head_stride, int64_t token_stride) {
      return (heads <= 1 || s.head == head_stride) && (!steps || s.token == token_stride);
    };
    const char* const q = static_cast<const char*>(t_.q);
    if (key_.q_heads) {
      Require(!v_.out_of_place, "writes in place what goes elsewhere");
      Require(lies(p_.q, p_.q_heads, p_.head_dim, key_.q_token), "has other strides than q");
      Require((key_.k_token != 0) == (t_.k != nullptr), "has k where there is none, or none where there is");
      Require(!t_.k || lies(p_.k, p_.k_heads, p_.head_dim, key_.k_token), "has other strides than k");
    }
    if (key_.packed) {
      Require(key_.q_heads && t_.k && key_.k_token == key_.q_token && (p_.batch == 1 || p_.k.batch == p_.q.batch) &&
                  static_cast<const char*>(t_.k) == q + int64_t{p_.q_heads} * p_.head_dim * bytes,
              "takes k for q's neighbour in a row, which it is not");
    }
    if (key_.packed == 2) {
      Require(v_.store_v && p_.v_dim == p_.head_dim && key_.v_token == key_.q_token &&
                  (p_.batch == 1 || p_.v.batch == p_.q.batch) &&
                  static_cast<const char*>(t_.v) == q + heads_ * p_.head_dim * bytes,
              "takes v for k's neighbour in a row, which it is not");
    }
    if (key_.v_token) {
      Require(v_.store_v && lies(p_.v, p_.k_heads, p_.v_dim, key_.v_token), "has other strides than v");
    }
    if (v_.cache_dtype != kRopeNoDtype) {
      const auto page_size = static_cast<uint64_t>(p_.page_size);
      Require(
          key_.page_shift == 0 || (key_.page_shift == kFlatPages ? p_.page_size == p_.slots
                                                                 : page_size == uint64_t{1} << (key_.page_shift - 1)),
          "has pages of another size");
      if (key_.cache_head) {
        const auto is = [&](const rope_strides& s) {
          return (p_.k_heads == 1 || s.head == key_.cache_head) && s.token == key_.cache_token &&
                 (key_.page_shift == kFlatPages || s.batch == key_.cache_page);
        };
        Require((!v_.store_k || is(p_.k_cache)) && (!v_.store_v || is(p_.v_cache)), "has other strides than a cache");
      }
    }
    if (key_.dense_indices && steps) {
      Require((!v_.positions_dtype || p_.positions_token == 1) && (!v_.offsets_dtype || p_.offsets_token == 1) &&
                  (!v_.slots_dtype || p_.slots_token == 1),
              "skips no position, offset or slot, but there are gaps");
    }
    if (key_.table_row) {
      Require(v_.table_dtype && p_.cos_row == key_.table_row && p_.sin_row == key_.table_row && p_.cos_pair == 1 &&
                  p_.sin_pair == 1,
              "has other strides than the table");
    }
  }

  // Whether a tensor allows accesses of `bytes`.
  bool Aligned(const void* data, int element, std::initializer_list<int64_t> strides, int64_t bytes) const {
    if (!data) return true;
    const int64_t unit = std::min<int64_t>(16, bytes & -bytes);  // of what several accesses carry, each is aligned
    if (reinterpret_cast<uintptr_t>(data) % static_cast<uint64_t>(unit) != 0) return false;
    return std::ranges::all_of(strides, [&](int64_t stride) { return stride % unit * element % unit == 0; });
  }
  bool Aligned(const void* data, int element, const rope_strides& s, int64_t bytes) const {
    const bool several = p_.batch > 1;
    return Aligned(data, element, {several ? s.batch : 0, p_.tokens > 1 ? s.token : 0, s.head}, bytes);
  }

  // Accesses lie within a head, and are aligned.
  void Vectors() {
    const int bytes = RopeDtypeBytes(v_.dtype), cache_bytes = RopeDtypeBytes(v_.cache_dtype), vector = key_.vector;
    const bool rest_matters = v_.norm || v_.out_of_place || v_.store_k;
    Require(p_.rotary_dim % (2 * vector) == 0 && p_.rotary_offset % vector == 0 && p_.head_dim % vector == 0,
            "has vectors across the parts of a head");
    Require(p_.rotary_offset + p_.rotary_dim <= p_.head_dim, "rotates more than a head");
    Require(shape_.flat ? vector * bytes <= 32 : vector * bytes <= 16 && (vector & (vector - 1)) == 0,
            "has vectors that no access carries");
    Require(shape_.units * 2 * vector == p_.rotary_dim && shape_.units <= shape_.units_per_lane * key_.lanes,
            "leaves a part of the rotated part");
    Require(!rest_matters || (shape_.rest * vector == p_.head_dim - p_.rotary_dim &&
                              shape_.rest <= shape_.rest_per_lane * key_.lanes),
            "leaves a part of a head");
    Require(!v_.store_v || (shape_.flat && shape_.v_rides ? p_.v_dim * bytes % 16 : p_.v_dim % vector) == 0,
            "has vectors across the end of v's heads");
    // Flat takes 16 bytes at a time, of rows and of caches of the same dtype; fp8 codes by the vector, or 8 at a time.
    const int64_t row_bytes = shape_.flat ? 16 : int64_t{vector} * bytes;
    Require(!shape_.flat || (shape_.span_bytes % 16 == 0 && shape_.span_begin * bytes % 16 == 0 &&
                             int64_t{vector} * bytes % 4 == 0),
            "has copies across the parts of a head");
    Require(Aligned(t_.q, bytes, p_.q, row_bytes) && Aligned(t_.q_out, bytes, p_.q_out, row_bytes) &&
                Aligned(t_.k, bytes, p_.k, row_bytes) && Aligned(t_.k_out, bytes, p_.k_out, row_bytes),
            "has vectors that are not aligned in q or k");
    const bool v_flat = shape_.flat && shape_.v_rides;
    Require(!v_.store_v || Aligned(t_.v, bytes, p_.v, v_flat ? 16 : int64_t{vector} * bytes),
            "has vectors that are not aligned in v");
    if (v_.cache_dtype != kRopeNoDtype) {
      const bool same = v_.cache_dtype == v_.dtype;
      const int64_t of_k = same ? row_bytes : shape_.staged_codes ? 8 : vector;
      const int64_t of_v = same ? (v_flat ? 16 : int64_t{vector} * bytes) : v_flat ? 16 / bytes : vector;
      const auto cache = [&](const void* data, const rope_strides& s, int64_t access) {
        return Aligned(data, cache_bytes, {s.batch, s.token, p_.k_heads > 1 ? s.head : 0}, access);
      };
      Require(cache(t_.k_cache, p_.k_cache, of_k) && cache(t_.v_cache, p_.v_cache, of_v),
              "has vectors that are not aligned in a cache");
    }
    if (v_.weight_dtype != kRopeNoDtype) {
      const int weight_bytes = RopeDtypeBytes(v_.weight_dtype);
      Require(Aligned(t_.q_weight, weight_bytes, {}, int64_t{vector} * weight_bytes) &&
                  Aligned(t_.k_weight, weight_bytes, {}, int64_t{vector} * weight_bytes),
              "has vectors that are not aligned in a weight");
    }
    if (v_.table_dtype != kRopeNoDtype) {
      const int table_bytes = RopeDtypeBytes(v_.table_dtype), run = shape_.run;
      const int step = std::min<int>(key_.table_vector, run);
      Require(step > 0 && run % step == 0, "has accesses to the table that do not make a run of pairs");
      if (ok() && step > 1) {
        // The pairs that a run begins with: of neighbours that share a vector also those half the pairs away.
        const bool halves = shape_.pairs_inside && !shape_.adjacent;
        Require(p_.cos_pair == 1 && p_.sin_pair == 1 && !v_.axes && (!halves || p_.rotary_dim / 4 % step == 0),
                "takes pairs together that do not follow each other in the table");
        const int64_t batch_cos = p_.batch > 1 ? p_.cos_batch : 0, batch_sin = p_.batch > 1 ? p_.sin_batch : 0;
        Require(Aligned(t_.cos, table_bytes, {batch_cos, p_.cos_row}, int64_t{step} * table_bytes) &&
                    Aligned(t_.sin, table_bytes, {batch_sin, p_.sin_row}, int64_t{step} * table_bytes),
                "has accesses that are not aligned in the table");
      }
    }
  }

  const RopeVariant& v_;
  const rope_params& p_;
  const RopeTensors& t_;
  const CudaDevice& device_;
  const RopeCudaPlan& plan_;
  const RopeCudaKey& key_;
  const rope_shape shape_;
  const int64_t rows_, heads_, all_heads_;
  const char* why_ = nullptr;
};

}  // namespace

Status CheckRopeCudaPlan(const RopeCall& call, const CudaDevice& device, const RopeCudaPlan& plan) {
  const rope_params& p = call.params;
  const RopeCudaKey& key = plan.key;
  if (plan.grid_x == 0) {
    const bool work = p.batch * p.tokens != 0 && p.q_heads + int64_t{call.tensors.k ? p.k_heads : 0} != 0;
    return work ? Status::Internal("rope: the CUDA plan is wrong: it has no blocks, but there is work") : Status();
  }
  // What the sizes are divided by.
  if (key.vector == 0 || key.lanes == 0 || key.lanes > 32 || key.threads == 0 || key.token_groups == 0) {
    return Status::Internal("rope: the CUDA plan is wrong: it has no vectors, lanes, threads or groups");
  }
  return PlanProof(call, device, plan).Run();
}

}  // namespace ropewalk
