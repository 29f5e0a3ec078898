// Whether a plan of a SPIR-V kernel fits its call: what the kernel takes for granted of its grid, its shape and its
// accesses. Walks the kernel's own loops over the kernel's own index arithmetic (backends/spirv/kernel/index.h).
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "backends/spirv/kernel/index.h"
#include "backends/spirv/plan.h"
#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {
namespace {

constexpr int kMostVectors = 8192;  // of a head: its largest size, in accesses of one element

class Checker {
 public:
  Checker(const RopeCall& call, const SpirvDevice& device, const RopeSpirvPlan& plan)
      : v_(call.variant), p_(call.params), t_(call.tensors), device_(device), plan_(plan), s_(plan.shape) {}

  std::string Fault() {
    if (!Begin()) return std::move(fault_);
    if (Grid() && Same("entry", plan_.key.entry, kSpirvRope)) {
      Choices() && Shape() && Lanes() &&
          Same("step", s_.step, int64_t{plan_.groups[1]} * s_.sub_groups * s_.heads_at_once) && Heads() && Elements() &&
          Tensors() && Tables() && Pages();
    }
    return std::move(fault_);
  }
  // Of the gradient. The call must be its turn, out of place.
  std::string Fault(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan) {
    backward_ = &call;
    if (Begin()) {
      Rows(plan) && Same("entry", plan_.key.entry, kSpirvBackward) && Choices() && Shape() && Lanes() &&
          Same("step", s_.step, s_.heads_at_once) && Elements() && Tensors() && Tables();
    }
    if (fault_.empty()) Sums(plan);
    return std::move(fault_);
  }

 private:
  // Both false and a sentence, or true.
  template <class... Parts>
  bool Require(bool holds, const Parts&... parts) {
    if (!holds) fault_ = Text(parts...);
    return holds;
  }
  bool Same(const char* what, int64_t got, int64_t want) {
    return Require(got == want, what, " must be ", want, ", but is ", got);
  }

  // False: the rest need not be looked at.
  bool Begin() {
    heads_ = p_.q_heads + (t_.k ? p_.k_heads : 0);
    all_heads_ = heads_ + (v_.store_v ? p_.k_heads : 0);
    vector_ = plan_.key.vector;
    bytes_ = RopeDtypeBytes(v_.dtype);
    const bool work = p_.batch > 0 && p_.tokens > 0 && all_heads_ > 0;
    if (plan_.empty()) {
      if (work) fault_ = "a call with work has no work-groups";
      return false;
    }
    return Require(work, "a call without work has ", plan_.groups[0], " work-groups");
  }

  // ---- the grid: work-groups of one token

  bool Grid() {
    return Same("groups[0], one a token,", plan_.groups[0], p_.tokens) &&
           Same("groups[2], one a batch entry,", plan_.groups[2], p_.batch) &&
           Require(plan_.groups[1] >= 1, "groups[1] must be at least 1, but is 0") &&
           Require(plan_.groups[1] <= static_cast<uint32_t>(all_heads_), "groups[1] must be at most ", all_heads_,
                   ", one a head, but is ", plan_.groups[1]) &&
           Group();
  }
  bool Group() {
    return Require(plan_.local > 0 && plan_.local % ROPE_SUB_GROUP == 0, "a work-group must be of whole sub-groups of ",
                   ROPE_SUB_GROUP, ", but has ", plan_.local, " work-items") &&
           Require(plan_.local <= static_cast<uint32_t>(std::max(device_.max_local, 1)), "a work-group may have ",
                   device_.max_local, " work-items, but has ", plan_.local) &&
           Same("dtype", plan_.key.dtype, v_.dtype) &&
           Require(std::has_single_bit(static_cast<unsigned>(vector_)) && vector_ * bytes_ <= 16,
                   "an access must be of a power of two of elements and 16 bytes at most, but is of ", vector_,
                   " elements of ", bytes_, " bytes");
  }

  // ---- the gradient's grids: work-groups of q, then of k, and the rows of each; the sums that they leave

  bool Rows(const RopeSpirvBackwardPlan& plan) {
    const auto dealt = [&](const char* name, int32_t groups, int heads) {
      return heads == 0
                 ? Same(name, groups, 0)
                 : Require(groups >= 1, name, " must be at least 1, as there are ", heads, " heads, but is ", groups);
    };
    return dealt("q_groups", plan.q_groups, p_.q_heads) && dealt("k_groups", plan.k_groups, heads_ - p_.q_heads) &&
           Same("groups[0]", plan_.groups[0], int64_t{plan.q_groups} + plan.k_groups) &&
           Same("groups[1]", plan_.groups[1], 1) && Same("groups[2]", plan_.groups[2], 1) && Group() &&
           RowsOf("q", plan.q_groups) && RowsOf("k", plan.k_groups);
  }
  // The first rows are the numbers below the step, each once: then every row has one owner.
  bool RowsOf(const char* name, int32_t groups) {
    const int step = rope_row_step(groups, s_.sub_groups);
    std::vector<uint8_t> owners(static_cast<size_t>(std::max(step, 0)));
    for (int group = 0; group < groups; ++group) {
      for (int sub_group = 0; sub_group < static_cast<int>(plan_.local) / ROPE_SUB_GROUP; ++sub_group) {
        const int row = rope_first_row(group, s_.sub_groups, sub_group);
        if (!Require(row >= 0 && row < step && owners[static_cast<size_t>(row)]++ == 0, "work-group ", group, " of ",
                     name, " begins at row ", row, ", which is another's, as every ", step, "th is taken")) {
          return false;
        }
      }
    }
    return Require(std::ranges::count(owners, 0) == 0, "rows of ", name, " have no owner");
  }
  bool Sums(const RopeSpirvBackwardPlan& plan) {
    const int weights = (backward_->q_weight_grad ? 1 : 0) + (backward_->k_weight_grad ? 1 : 0);
    if (weights == 0) {
      return Require(plan.sums.empty() && plan.workspace == 0, "no weight's gradient is wanted, but there are sums");
    }
    const int64_t sets = plan_.empty() ? 0 : int64_t{plan_.local / ROPE_SUB_GROUP} * s_.heads_at_once;
    return Same("workspace", plan.workspace, plan_.groups[0] * sets * 2 * p_.head_dim) &&
           Same("the entry of the sums", plan.sums_key.entry, kSpirvSums) &&
           Same("groups[0] of the sums, one for so many elements,", plan.sums.groups[0],
                (p_.head_dim + ROPE_SUMS_ELEMENTS - 1) / ROPE_SUMS_ELEMENTS) &&
           Same("groups[1] of the sums, one a weight,", plan.sums.groups[1], weights) &&
           Same("groups[2] of the sums", plan.sums.groups[2], 1) &&
           Require(plan.sums.local > 0 && plan.sums.local % ROPE_SUMS_ELEMENTS == 0 &&
                       plan.sums.local <= ROPE_SUMS_MOST_ITEMS &&
                       plan.sums.local <= static_cast<uint32_t>(std::max(device_.max_local, 1)),
                   "a work-group of the sums must have whole ", ROPE_SUMS_ELEMENTS, "s of work-items, at most ",
                   std::min(device_.max_local, ROPE_SUMS_MOST_ITEMS), ", but has ", plan.sums.local);
  }

  // ---- the kernel's choices are those of the call

  bool Choices() {
    const auto& constants = plan_.key.constants;
    const int want[] = {v_.pairing == ROPEWALK_INTERLEAVED,
                        v_.norm,
                        v_.weight == kRopeNoWeight ? int{kRopeNoDtype} : v_.weight_dtype,
                        v_.rounding == kRopeRoundReference,
                        v_.table_dtype,
                        -1,  // see Tables()
                        v_.axes != 0,
                        backward_ ? backward_->HasWeightGrads() : int{v_.cache_dtype},
                        v_.out_of_place,
                        v_.store_k == kRopeStoreOnly};
    static_assert(std::size(want) == kRopeSpecUnits && kRopeSpecLanes == kRopeSpecUnits + 1);
    for (int i = 0; i < int{kRopeSpecUnits}; ++i) {
      const auto at = static_cast<size_t>(i);
      choices_[at] = constants[at] == kRopeSpecArgument ? s_.choices[i] : constants[at];
      if (!Require(s_.choices[i] == choices_[at], "constant ", i, " is ", int{constants[at]}, ", but choice ", i,
                   " is ", int{s_.choices[i]})) {
        return false;
      }
      if (want[i] >= 0 &&
          !Require(choices_[at] == want[i], "choice ", i, " must be ", want[i], ", but is ", choices_[at]))
        return false;
    }
    interleaved_ = choices_[kRopeSpecInterleaved];
    each_ = constants[kRopeSpecUnits];
    fixed_lanes_ = constants[kRopeSpecLanes];
    rest_matters_ = v_.norm || v_.out_of_place || v_.store_k != kRopeNoStore;
    return true;
  }

  // ---- the numbers that the kernel reads

  bool Shape() {
    const bool stores_v = v_.store_v != 0;
    return Same("positions_dtype", s_.positions_dtype, v_.positions_dtype) &&
           Same("offsets_dtype", s_.offsets_dtype, v_.offsets_dtype) &&
           Same("slots_dtype", s_.slots_dtype, v_.slots_dtype) && Same("check_axes", s_.check_axes, v_.axes == 2) &&
           Same("store_k", s_.store_k, v_.store_k != kRopeNoStore) && Same("store_v", s_.store_v, stores_v) &&
           Same("zero_centered", s_.zero_centered, v_.weight == kRopeZeroCenteredWeight) &&
           Same("sine_flip", s_.sine_flip, v_.inverse ? 0x80000000u : 0u) &&
           Require(s_.inverse_head_dim == 1.0f / static_cast<float>(p_.head_dim), "inverse_head_dim must be 1 / ",
                   p_.head_dim, ", but is ", static_cast<double>(s_.inverse_head_dim)) &&
           Same("heads", s_.heads, heads_) && Same("all_heads", s_.all_heads, all_heads_) &&
           Same("written_heads", s_.written_heads,
                p_.q_heads + (t_.k && v_.store_k != kRopeStoreOnly ? p_.k_heads : 0)) &&
           Same("the elements of head_vectors", int64_t{s_.head_vectors} * vector_, p_.head_dim) &&
           Same("the elements of v_vectors", int64_t{s_.v_vectors} * vector_, stores_v ? p_.v_dim : 0) &&
           Same("the elements of units", int64_t{s_.units} * 2 * vector_, p_.rotary_dim) &&
           Same("the elements of before", int64_t{s_.before} * vector_, p_.rotary_offset) &&
           Same("the elements of rest", int64_t{s_.rest} * vector_, rest_matters_ ? p_.head_dim - p_.rotary_dim : 0);
  }

  // ---- lanes: work-items that share a head

  bool Lanes() {
    if (!Require(s_.lanes >= 1 && s_.lanes <= ROPE_SUB_GROUP, "lanes must be from 1 to ", ROPE_SUB_GROUP, ", but are ",
                 s_.lanes) ||
        !Same("heads_at_once", s_.heads_at_once, ROPE_HEADS_AT_ONCE(s_.lanes)) ||
        !Same("sub_groups", s_.sub_groups, plan_.local / ROPE_SUB_GROUP)) {
      return false;
    }
    for (int id = 0; id < ROPE_SUB_GROUP; ++id) {
      const int group = rope_group_of(id, s_.lane_multiplier);
      if (!Require(group == id / s_.lanes, "work-item ", id, " must be of group ", id / s_.lanes,
                   ", but lane_multiplier ", s_.lane_multiplier, " gives ", group)) {
        return false;
      }
    }
    const int most = backward_ ? 1 : ROPE_MOST_UNITS(vector_ * bytes_);
    if (!Require(each_ <= most, "a lane can keep ", most, " units, but is to keep ", each_)) return false;
    if (fixed_lanes_) {
      return Require(fixed_lanes_ == 4 || fixed_lanes_ == 8 || fixed_lanes_ == 16,
                     "constant lanes must be 4, 8 or 16, but are ", fixed_lanes_) &&
             Same("constant lanes", fixed_lanes_, s_.lanes) &&
             Require(each_ > 0 && fixed_lanes_ * each_ == s_.units, "constant lanes must have all their units, but ",
                     fixed_lanes_, " lanes of ", each_, " units are to take ", s_.units);
    }
    return Require(each_ == 0 || s_.lanes * each_ >= s_.units, s_.lanes, " lanes of ", each_,
                   " units leave some of the ", s_.units, " out");
  }

  // ---- heads: each one's owner, by the kernel's loop

  bool Heads() {
    std::array<uint8_t, 1024> few = {};
    std::vector<uint8_t> many;
    if (all_heads_ > static_cast<int>(few.size())) many.resize(static_cast<size_t>(all_heads_));
    uint8_t* const owners = many.empty() ? few.data() : many.data();
    const auto take = [&](int h) { owners[h] = static_cast<uint8_t>(std::min(2, owners[h] + 1)); };
    for (uint32_t share = 0; share < plan_.groups[1]; ++share) {
      for (int sub_group = 0; sub_group < s_.sub_groups; ++sub_group) {
        const int first = rope_first_head(static_cast<int>(share), s_.sub_groups, sub_group, s_.heads_at_once);
        for (int group = 0; group < s_.heads_at_once; ++group) {
          int h = first + group;
          for (; h < s_.heads; h += s_.step) take(h);
          for (; h < s_.all_heads; h += s_.step) take(h);
        }
      }
    }
    const auto wrong = std::find_if(owners, owners + all_heads_, [](uint8_t count) { return count != 1; });
    const auto h = static_cast<int>(wrong - owners);
    if (h == all_heads_) return true;  // there is no owner to tell of
    return Require(false, "head ", h, " of ", all_heads_, *wrong ? " has several owners" : " has no owner");
  }

  // ---- elements of a head: each one's owner, and the pair that turns it

  bool Elements() {
    const int head_vectors = s_.head_vectors, half = p_.rotary_dim / 2;
    const bool inside = rope_pairs_inside(interleaved_, vector_);
    const int distance = rope_distance_of(interleaved_, vector_, p_.rotary_dim);
    std::fill_n(owners_.begin(), head_vectors, uint8_t{0});
    const auto take = [&](int begin, const char* what, int index) {
      if (!Require(begin >= 0 && begin % vector_ == 0 && begin + vector_ <= p_.head_dim, what, " ", index,
                   " begins at element ", begin, ", which is no vector of ", vector_, " in a head of ", p_.head_dim)) {
        return false;
      }
      uint8_t& owners = owners_[static_cast<size_t>(begin / vector_)];
      return Require(owners++ == 0, what, " ", index, " takes element ", begin, ", which has an owner");
    };
    for (int lane = 0; lane < s_.lanes; ++lane) {
      for (int i = 0; each_ ? i < each_ : lane + i * s_.lanes < s_.units; ++i) {
        const int unit = lane + i * s_.lanes;
        if (!fixed_lanes_ && unit >= s_.units) continue;
        const int begin = rope_begin_of(interleaved_, vector_, p_.rotary_offset, unit);
        if (!take(begin, "unit", unit) || !take(begin + distance, "unit", unit)) return false;
        for (int j = 0; j < vector_; ++j) {
          // The elements that rope_rotate_unit turns by the j-th cosine and sine of the unit.
          const int first =
              !inside ? begin + j : (2 * j < vector_ ? begin + 2 * j : begin + distance + 2 * j - vector_);
          const int second = !inside ? first + distance : first + 1;
          const int pair = rope_pair_at(interleaved_, vector_, p_.rotary_dim, unit, j);
          const int want_first = p_.rotary_offset + (interleaved_ ? 2 * pair : pair);
          const int want_second = want_first + (interleaved_ ? 1 : half);
          if (!Require(pair >= 0 && pair < half && first == want_first && second == want_second, "unit ", unit,
                       " turns elements ", first, " and ", second, " by pair ", pair)) {
            return false;
          }
        }
      }
      for (int i = lane; i < s_.rest; i += s_.lanes) {
        if (!take(rope_rest_at(vector_, s_.before, p_.rotary_dim, i), "rest", i)) return false;
      }
    }
    for (int i = 0; i < head_vectors; ++i) {
      const int element = i * vector_;
      const bool rotated = element >= p_.rotary_offset && element < p_.rotary_offset + p_.rotary_dim;
      if (owners_[static_cast<size_t>(i)] == 0 && (rotated || rest_matters_))
        return Require(false, "element ", element, " of a head of ", p_.head_dim, " has no owner");
    }
    return true;
  }

  // ---- accesses are aligned

  bool Aligned(const char* name, const void* data, int element_bytes, int elements,
               std::initializer_list<int64_t> strides) {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(elements * element_bytes) == 0 &&
                         std::ranges::all_of(strides, [&](int64_t stride) { return stride % elements == 0; });
    return Require(!data || aligned, name, " allows no access of ", elements, " elements of ", element_bytes, " bytes");
  }

  bool Tensors() {
    const int cache = RopeDtypeBytes(v_.cache_dtype), weight = RopeDtypeBytes(v_.weight_dtype);
    const auto aligned = [&](const char* name, const void* data, int element_bytes, const rope_strides& s) {
      return Aligned(name, data, element_bytes, vector_, {s.batch, s.token, s.head});
    };
    if (backward_ && !(aligned("x of q", backward_->q, bytes_, backward_->q_strides) &&
                       aligned("x of k", backward_->k, bytes_, backward_->k_strides))) {
      return false;
    }
    return aligned("q", t_.q, bytes_, p_.q) && aligned("k", t_.k, bytes_, p_.k) &&
           aligned("q_out", t_.q_out, bytes_, p_.q_out) && aligned("k_out", t_.k_out, bytes_, p_.k_out) &&
           aligned("v", t_.v, bytes_, p_.v) && aligned("k_cache", t_.k_cache, cache, p_.k_cache) &&
           aligned("v_cache", t_.v_cache, cache, p_.v_cache) &&
           (!choices_[kRopeSpecWeightDtype] || (Aligned("q_weight", t_.q_weight, weight, vector_, {}) &&
                                                Aligned("k_weight", t_.k_weight, weight, vector_, {})));
  }

  // A unit's pairs come in one run, or with neighbours in two.
  bool Tables() {
    const bool table = choices_[kRopeSpecTableDtype] != kRopeNoDtype, wide = choices_[kRopeSpecTableVector] != 0;
    if (table && !wide) return true;
    if (!table && wide) return Require(false, "the table is read by vectors, but there is none");
    const bool inside = rope_pairs_inside(interleaved_, vector_);
    const int run = inside ? vector_ / 2 : vector_;
    const int bytes = table ? RopeDtypeBytes(v_.table_dtype) : 8;
    const int access = std::min(run, table ? 16 / bytes : 4);  // elements; of turns, which are allocated for 32 bytes
    if (table) {
      if (!Require(!v_.axes && p_.cos_pair == 1 && p_.sin_pair == 1,
                   "the table is read by vectors, but its pairs do not lie side by side") ||
          !Aligned("cos", t_.cos, bytes, access, {p_.cos_batch, p_.cos_row}) ||
          !Aligned("sin", t_.sin, bytes, access, {p_.sin_batch, p_.sin_row})) {
        return false;
      }
    }
    const auto pair_at = [&](int unit, int i) { return rope_pair_at(interleaved_, vector_, p_.rotary_dim, unit, i); };
    for (int unit = 0; unit < s_.units; ++unit) {
      for (int begin = 0; begin < vector_; begin += run) {
        if (!Require(
                pair_at(unit, begin) % access == 0 && pair_at(unit, begin + run - 1) == pair_at(unit, begin) + run - 1,
                "unit ", unit, " asks for ", access, " pairs from pair ", pair_at(unit, begin), " on at once")) {
          return false;
        }
      }
      if (inside && !Same("the second run of a unit", pair_at(unit, run) - pair_at(unit, 0), p_.rotary_dim / 4))
        return false;
    }
    return true;
  }

  // ---- the page of a slot: a multiplication and a shift give what a division would, of every slot below 2^63

  bool Pages() {
    if (v_.cache_dtype == kRopeNoDtype) return true;
    __extension__ using Wide = unsigned __int128;
    const auto size = static_cast<uint64_t>(std::max<int64_t>(p_.page_size, 1));
    // n m / 2^e is n / d rounded down for each n < 2^63 if 2^e <= m d <= 2^e + 2^(e - 63) (Granlund, Montgomery 1994).
    const int shift = s_.page_shift;
    if (!Require(shift >= 0 && shift < 64, "page_shift must be from 0 to 63, but is ", shift)) return false;
    const Wide product = Wide{s_.page_multiplier} * size, low = Wide{1} << (63 + shift);
    return Require(product >= low && product - low <= Wide{1} << shift, "page_multiplier ", s_.page_multiplier,
                   " and page_shift ", shift, " do not divide by a page_size of ", size);
  }

  const RopeVariant& v_;
  const rope_params& p_;
  const RopeTensors& t_;
  const SpirvDevice& device_;
  const RopeSpirvPlan& plan_;
  const rope_spirv_shape& s_;
  const RopeBackwardCall* backward_ = nullptr;  // of a gradient
  int heads_ = 0, all_heads_ = 0, vector_ = 1, bytes_ = 2;
  std::array<int, kRopeSpecUnits> choices_ = {};
  int interleaved_ = 0, each_ = 0, fixed_lanes_ = 0;
  bool rest_matters_ = false;
  std::array<uint8_t, kMostVectors> owners_;  // by vector of a head
  std::string fault_;
};

}  // namespace

std::string RopeSpirvPlanFault(const RopeCall& call, const SpirvDevice& device, const RopeSpirvPlan& plan) {
  return Checker(call, device, plan).Fault();
}

std::string RopeSpirvBackwardPlanFault(const RopeBackwardCall& call, const SpirvDevice& device,
                                       const RopeSpirvBackwardPlan& plan) {
  RopeCall turn = call.turn;
  turn.variant.out_of_place = 1;
  return Checker(turn, device, plan.rows).Fault(call, plan);
}

}  // namespace ropewalk
