// Where a head lies in its row and where in its cache, and how a vector of it is written there.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_PLACE_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_PLACE_CUH_

#include "backends/cuda/kernel/token.cuh"

namespace ropewalk {

// Where a head lies: addresses of bytes, as the element types are the variant's.
struct HeadPlace {
  const char* in;
  char* out;
  char* cache;
  bool stored;          // it goes to the cache
  const void* weight;
  float inverse_scale;  // of an fp8 cache
};

// Stores the words if they are `wanted`. In the layout `few` this takes no branch (few.cuh says why).
template <class K, int kSize>
__device__ __forceinline__ void Put(bool wanted, char* at, const Words<kSize>& words) {
  if constexpr (K::kFewTokens) {
    StoreIf(wanted, at, words);
  } else {
    if (wanted) Store(at, words);
  }
}

template <class K, int kCount>
__device__ __forceinline__ void WriteCache(const HeadPlace& head, int begin, const float (&v)[kCount],
                                           const Words<kCount * kBytes<K::kDtype>>& packed) {
  if constexpr (K::kCacheDtype == K::kDtype) {
    Put<K>(head.stored, head.cache + begin * kBytes<K::kDtype>, packed);
  } else {
    float scaled[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scaled[i] = (Shape<K>::kReference ? RoundTo<K::kDtype>(v[i]) : v[i]) * head.inverse_scale;
    }
    Put<K>(head.stored, head.cache + begin, Pack<K::kCacheDtype, kCount>(scaled));
  }
}

// Writes a vector of a head: to its row if that is `wanted`, to its cache if the head goes there. `stores` is false if
// no head of the warp does.
template <class K>
__device__ __forceinline__ void Write(bool wanted, bool stores, const HeadPlace& head, int begin,
                                      const float (&v)[K::kVector], const Words<Shape<K>::kVectorBytes>& packed) {
  if constexpr (Shape<K>::kFlat) {
    *reinterpret_cast<Words<Shape<K>::kVectorBytes>*>(head.out + begin * kBytes<K::kDtype>) = packed;
  } else {
    Put<K>(wanted, head.out + begin * kBytes<K::kDtype>, packed);
  }
  constexpr bool kStores = K::kStoreK || (K::kFewTokens && Shape<K>::kVRides);
  if constexpr (kStores && !(Shape<K>::kFlat && K::kCacheDtype == K::kDtype)) {
    if (stores) WriteCache<K>(head, begin, v, packed);
  }
}

template <class K>
__device__ __forceinline__ float InverseScale(const float* scale, float inverse, int head, int stride) {
  if constexpr (K::kCacheDtype != kRopeE4M3 && K::kCacheDtype != kRopeE5M2) return 1.0f;
  if constexpr (!K::kScalePointers) return inverse;
  return scale ? 1.0f / __ldg(scale + static_cast<rw_i64>(head) * stride) : inverse;
}

// The offset of a head in a cache, in elements.
template <class K>
__device__ __forceinline__ rw_i64 CacheOffset(const rope_params& p, const rope_strides& cache, rw_i64 slot, int head) {
  rw_i64 page = 0, place = slot;
  if constexpr (K::kPageShift == 0) {
    page = slot / p.page_size;
    place = slot - page * p.page_size;
  } else if constexpr (K::kPageShift < 64) {
    page = slot >> (K::kPageShift - 1);
    place = slot - static_cast<rw_i64>(static_cast<rw_u64>(page) << (K::kPageShift - 1));  // a slot may be negative
  }
  if constexpr (K::kCacheHead != 0) {
    return page * K::kCachePage + place * K::kCacheToken + static_cast<rw_i64>(head) * K::kCacheHead;
  }
  return page * cache.batch + place * cache.token + head * cache.head;
}

// Where a head of v begins.
template <class K>
__device__ __forceinline__ char* RowOfV(const rope_cuda_args& a, const Token& t, int h) {
  const rope_strides& s = a.params.v;
  const rw_i64 at = K::kVToken != 0 ? t.token * K::kVToken + h * K::kVDim : t.token * s.token + h * s.head;
  return static_cast<char*>(const_cast<void*>(a.v)) + ((K::kBatched ? t.batch * s.batch : 0) + at) * kBytes<K::kDtype>;
}

// The place of head h: heads count from those of q over those of k to, in the layout `few` where v rides, those of v.
// The place of a head of v begins kRotaryOffset elements before it, so that all of v lies where q and k have their
// rotated part. `like` is a head of the same tensor, which says which tensor it is: the warp's first, so that a warp
// does not part.
template <class K>
__device__ __forceinline__ HeadPlace PlaceOf(const rope_cuda_args& a, const Token& t, int h, int like) {
  const rope_params& p = a.params;
  constexpr bool kOfV = K::kFewTokens && Shape<K>::kVRides;
  const bool of_q = like < QHeads<K>(p), of_v = kOfV && like >= QHeads<K>(p) + KHeads<K>(p);
  const int of_k = h - QHeads<K>(p), in_cache = of_v ? of_k - KHeads<K>(p) : of_k;
  HeadPlace place;
  if constexpr (K::kQHeads != 0) {
    // One multiply-add: BeginToken has placed t.q and t.k for this.
    place.out = (K::kPacked || of_q ? t.q : t.k) + static_cast<rw_i64>(h) * (K::kHeadDim * kBytes<K::kDtype>);
    place.in = place.out;
  } else {
    const auto lies = [&](void* in, void* out, const rope_strides& s, const rope_strides& s_out, int head) {
      place.out = static_cast<char*>(in) + Offset<K>(s, t.batch, t.token, head) * kBytes<K::kDtype>;
      place.in = place.out;
      if constexpr (K::kOutOfPlace) {
        place.out = static_cast<char*>(out) + Offset<K>(s_out, t.batch, t.token, head) * kBytes<K::kDtype>;
      }
    };
    if (of_q) {
      lies(a.q, a.q_out, p.q, p.q_out, h);
    } else {
      lies(a.k, K::kKStoreOnly ? a.k : a.k_out, p.k, K::kKStoreOnly ? p.k : p.k_out, of_k);
    }
  }
  // In rows where v lies behind k a head of v is just the next head, and already placed.
  if (K::kPacked < 2 && of_v) place.in = RowOfV<K>(a, t, in_cache) - K::kRotaryOffset * kBytes<K::kDtype>;
  place.weight = of_q ? a.q_weight : a.k_weight;
  place.cache = nullptr;
  place.stored = false;
  place.inverse_scale = 1.0f;
  if constexpr (K::kStoreK || kOfV) {
    place.stored = (of_v || (K::kStoreK && !of_q)) && t.slot >= 0;
    if (K::kFewTokens || place.stored) {
      const bool to_v = of_v || !K::kStoreK;  // q has an address too: in a cache that exists
      place.cache = static_cast<char*>(to_v ? a.v_cache : a.k_cache) +
                    (CacheOffset<K>(p, to_v ? p.v_cache : p.k_cache, t.slot, in_cache) -
                     (of_v ? K::kRotaryOffset : 0)) * kBytes<K::kCacheDtype>;
      place.inverse_scale =
          InverseScale<K>(of_v ? a.v_scale : a.k_scale, of_v ? a.v_inverse_scale : a.k_inverse_scale,
                          of_q ? 0 : in_cache, of_v ? p.v_scale_head : p.k_scale_head);
    }
  }
  return place;
}

template <class K>
__device__ __forceinline__ HeadPlace PlaceOf(const rope_cuda_args& a, const Token& t, int h) {
  return PlaceOf<K>(a, t, h, h);
}

// The place of a head of v, which counts from 0 here.
template <class K>
__device__ __forceinline__ HeadPlace PlaceOfV(const rope_cuda_args& a, const Token& t, int h) {
  const rope_params& p = a.params;
  HeadPlace place;
  place.in = RowOfV<K>(a, t, h);
  place.out = nullptr;
  place.weight = nullptr;
  place.cache = nullptr;
  place.stored = t.slot >= 0;
  place.inverse_scale = 1.0f;
  if (place.stored) {
    place.cache = static_cast<char*>(a.v_cache) +
                  CacheOffset<K>(p, p.v_cache, t.slot, h) * kBytes<K::kCacheDtype>;
    place.inverse_scale = InverseScale<K>(a.v_scale, a.v_inverse_scale, h, p.v_scale_head);
  }
  return place;
}

template <class K, int kCount = K::kVector>
__device__ __forceinline__ void StoreVector(const HeadPlace& head, int begin,
                                            const Words<kCount * kBytes<K::kDtype>>& words) {
  float v[kCount];
  Unpack<K::kDtype, kCount>(words, v);
  WriteCache<K>(head, begin, v, words);
}

// Stores a head of v that does not ride.
template <class K>
__device__ __forceinline__ void StoreV(const HeadPlace& head, int lane) {
  if (!head.stored) return;
#pragma unroll 2
  for (int i = lane; i < K::kVDim / K::kVector; i += K::kLanes) {
    StoreVector<K>(head, i * K::kVector, Load<Shape<K>::kVectorBytes>(head.in + i * Shape<K>::kVectorBytes));
  }
}

template <class K, int kSize>
__device__ __forceinline__ Words<kSize> Nans() {
  Words<kSize> words;
#pragma unroll
  for (int i = 0; i < Words<kSize>::kCount; ++i) {
    words.w[i] = K::kDtype == kRopeF16 ? 0x7e007e00 : K::kDtype == kRopeBF16 ? 0x7fc07fc0 : 0x7fc00000;
  }
  return words;
}

// Fills a head with NaN or copies it; each lane of the group does its part.
template <class K>
__device__ __forceinline__ void FillHead(const char* in, char* out, bool nan, int lane) {
  constexpr int kAccess = Shape<K>::kFlat ? 16 : Shape<K>::kVectorBytes;
#pragma unroll 1
  for (int i = lane; i < K::kHeadDim * kBytes<K::kDtype> / kAccess; i += K::kLanes) {
    Words<kAccess> words;
    if (nan) {
      words = Nans<K, kAccess>();
    } else {
      words = Load<kAccess>(in + i * kAccess);
    }
    Store(out + i * kAccess, words);
  }
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_PLACE_CUH_
