// Which shape of the CUDA kernel is fast for a call.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "backends/cuda/plan.h"

namespace ropewalk {

inline int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool Stores(const RopeVariant& v) { return v.cache_dtype != kRopeNoDtype; }
inline bool StoresFp8(const RopeVariant& v) { return Stores(v) && v.cache_dtype != v.dtype; }
inline bool StoresKOnly(const RopeVariant& v) { return v.store_k == kRopeStoreOnly; }
// As features and the table have it: 0 none, 1 of the same dtype, 2 of fp8; 3 and 4 with k in its cache alone.
inline uint8_t StoreKind(const RopeVariant& v) {
  return static_cast<uint8_t>(Stores(v) + StoresFp8(v) + 2 * StoresKOnly(v));
}

inline constexpr int kH200Multiprocessors = 132;  // of the device that was searched on

RopeCudaFeatures FeaturesOf(const RopeCall& call, const CudaDevice& device);

// The shape of a call, and where it comes from.
RopeCudaShape ChooseRopeCudaShape(const RopeCall& call, const CudaDevice& device, RopeCudaLayout layout,
                                  RopeCudaOrigin* origin);
// By rules alone, which have few variants for all numbers of tokens.
RopeCudaShape RopeCudaShapeByRules(const RopeCall& call, const CudaDevice& device, RopeCudaLayout layout);

// Whether a candidate may be fast for a call: of few tokens not for many bytes, and the other way round.
bool RopeCudaShapeSuits(const RopeCall& call, const CudaDevice& device, const RopeCudaShape& shape);
// What the ways of choosing take, for a search to begin with: the one that is chosen, which may be the best of a bad
// neighbourhood, the model's, and those of the rules for few and for many tokens. Each once.
std::vector<RopeCudaShape> RopeCudaChoices(const RopeCall& call, const CudaDevice& device);
// Shapes that may be fast for a call, for a search on its device: those choices, then those that differ in what matters
// most. `near`: instead those that differ from that shape in one thing.
std::vector<RopeCudaShape> RopeCudaCandidates(const RopeCall& call, const CudaDevice& device,
                                              const RopeCudaShape* near = nullptr);

// What this thread's next calls are laid out by (cuda.cc), for a search to try; none: as it is chosen.
void TryRopeCudaShape(const std::optional<RopeCudaShape>& shape);

// Heads of a token: of q and k, and with those of v that are stored.
struct HeadCount {
  int64_t heads = 0, all = 0;
};
inline HeadCount HeadsOf(const RopeCall& call) {
  const rope_params& p = call.params;
  const int64_t heads = int64_t{p.q_heads} + (call.tensors.k ? p.k_heads : 0);
  return {heads, heads + (call.variant.store_v ? p.k_heads : 0)};
}

// How a head is dealt to threads by accesses of so many elements.
struct HeadDeal {
  int vector = 0, lanes = 0, units = 0, rest = 0;
  int per_warp() const { return 32 / lanes; }
  bool regular() const { return (lanes & (lanes - 1)) == 0; }
};
// `share`: so many units for each thread, if they divide those of a head.
HeadDeal DealHead(const RopeCall& call, int vector, int share = 1);

// The elements of a vector for `vector` wanted of a shape (0: the widest) where accesses are of a thread's own.
int PlainVector(const RopeCall& call, int wanted);
// Whether heads fetched side by side may be worked on in vectors of so many elements.
bool FlatVectorFits(const RopeCall& call, int vector);

}  // namespace ropewalk
