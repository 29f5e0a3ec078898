// The gradient of norm and rotation. With n = x / rms, y = R (n * w) and g = R^T dY:
//
//   dX = (g w - n mean(g w n)) / rms                   one pass: reads x and dY, writes dX
//   dW = sum of g n over all heads of all tokens       two kernels: each block's sum, then those added up (sums.cuh)
//
// A block has heads of q or of k, not of both, so that its threads add up one weight's gradient. All heads of q, and all
// of k, are dealt to the warps in pieces of a few turns, in the order of memory: what all warps read at a time lies
// together. In a turn each group of a warp takes a head. Who owns what of a head, rope.cuh draws. No sum depends on which
// block is first.
//
// In the layout `flat` the lanes of a warp fetch and write a turn's heads side by side, 16 bytes each, whichever lane owns
// them: an access stays whole where the half of a head fills no sectors of 32 bytes, as in heads of 80.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_

#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/kernel/sums.cuh"

namespace ropewalk {

// A head on its way.
struct HeadOnWay {
  int batch, token;
  bool new_token;     // the head before was another token's
  rw_i64 left_bytes;  // flat: of the tensor, from its turn's first head on
  char* out;          // else: where its dX goes
};

// The next head to be fetched by a group, and where x, dY and dX of it lie.
struct HeadCursor {
  int batch, token, head;
  int left;        // turns of its piece, with this one
  bool new_token;  // the head before was another token's
  const char *x, *grad;
  char* out;
};

template <class K>
__device__ __forceinline__ void BackwardBody(const rope_backward_cuda_args& b) {
  using S = Shape<K>;
  static_assert(Deals(S::kGrid) && S::kWarpTokens == 1 && TokenWarps(S::kGrid) == 1, "a warp has all its groups");
  static_assert(K::kQHeads == 0, "strides are not constants");
  static_assert(!S::kFlat || S::kSpan == K::kHeadDim, "whole heads are fetched");
  constexpr int kSize = kBytes<K::kDtype>, kWarps = K::kThreads / 32, kGroups = 32 / K::kLanes;
  constexpr int kHeadBytes = K::kHeadDim * kSize, kTurnCopies = kGroups * kHeadBytes / 16;
  const rope_cuda_args& a = b.turn;
  const rope_params& p = a.params;
  const bool of_k = static_cast<int>(blockIdx.x) >= b.q_blocks;
  const int heads = of_k ? p.k_heads : p.q_heads;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32 % K::kLanes;
  const bool idle = Idle(S::kGrid, thread);

  // The heads of all tokens are dealt to the warps, kGroups of them a turn and kPiece turns at a time.
  constexpr int kPiece = RopePieceTurns(K::kFlat);
  const rw_i64 all = p.batch * p.tokens * heads, all_turns = (all + kGroups - 1) / kGroups;
  const rw_i64 pieces = (all_turns + kPiece - 1) / kPiece;
  const rw_i64 warps = rw_i64{of_k ? b.k_blocks : b.q_blocks} * kWarps;
  const rw_i64 warp = rw_i64{static_cast<int>(blockIdx.x) - (of_k ? b.q_blocks : 0)} * kWarps + thread / 32;
  const rw_i64 own = (pieces - warp + warps - 1) / warps;  // pieces of this warp
  const bool has_last = own > 0 && warp + (own - 1) * warps == pieces - 1;
  const auto turns = static_cast<int>(own * kPiece - (has_last ? pieces * kPiece - all_turns : 0));
  const int group = GroupInWarp(S::kGrid, thread);
  const rw_i64 first = warp * (kPiece * kGroups) + group;
  // The last turn of all may have no head for a group.
  const int count = idle ? 0 : has_last && (all_turns - 1) * kGroups + group >= all ? turns - 1 : turns;

  const rope_strides& x_strides = of_k ? b.k_strides : b.q_strides;
  const rope_strides& grad_strides = of_k ? p.k : p.q;
  const rope_strides& out_strides = of_k ? p.k_out : p.q_out;
  const auto place = [&](HeadCursor& at) {
    const auto of = [&](const void* data, const rope_strides& s) {
      return static_cast<const char*>(data) + Offset<K>(s, at.batch, at.token, at.head) * kSize;
    };
    at.x = of(of_k ? b.k : b.q, x_strides);
    at.grad = of(of_k ? a.k : a.q, grad_strides);
    at.out = const_cast<char*>(of(of_k ? a.k_out : a.q_out, out_strides));
  };
  // To the next turn: the one beside it, or the first one of the warp's next piece. Each token that is passed adds the
  // way from behind its last head to the next token's first. In flat there is no way between. Returns how many heads
  // on that is.
  const auto jump = static_cast<int>((warps - 1) * (kPiece * kGroups) + kGroups);
  const int jump_tokens = jump / heads;
  const auto wrap_of = [&](const rope_strides& s) { return (s.token - s.head * heads) * kSize; };
  const rw_i64 x_wrap = wrap_of(x_strides), grad_wrap = wrap_of(grad_strides), out_wrap = wrap_of(out_strides);
  const auto go_on = [&](HeadCursor& at) {
    const bool jumps = --at.left == 0;
    if (jumps) at.left = kPiece;
    const int step = jumps ? jump : kGroups;
    int tokens = jumps ? jump_tokens : 0;
    at.head += step - tokens * heads;
    if (at.head >= heads) {
      const int more = heads >= kGroups || jumps ? 1 : at.head / heads;
      at.head -= more * heads;
      tokens += more;
    }
    at.new_token = tokens != 0;
    at.token += tokens;
    if (K::kBatched && at.token >= p.tokens) {
      const int batches = at.token / static_cast<int>(p.tokens);
      at.batch += batches;
      at.token -= batches * static_cast<int>(p.tokens);
      if constexpr (!S::kFlat) place(at);
      return step;
    }
    const auto advance = [&](const rope_strides& s, rw_i64 wrap) { return step * (s.head * kSize) + tokens * wrap; };
    if constexpr (!S::kFlat) {
      at.x += advance(x_strides, x_wrap);
      at.grad += advance(grad_strides, grad_wrap);
      at.out += advance(out_strides, out_wrap);
    }
    return step;
  };

  if constexpr (K::kDependentLaunch != 0) {
    WaitForOthers();
    LetTheNextStart<1>();  // all blocks run at once, so that the next kernel's take the place of none
  }

  // Flat: all heads lie side by side. The bytes from the next turn's first head on; and what(copy) for each 16 bytes of a
  // turn that this thread copies, if so many lie there.
  const rw_i64 all_bytes = all * kHeadBytes;
  rw_i64 left_bytes = all_bytes - warp * (kPiece * kGroups) * kHeadBytes;
  const auto each_copy = [&](rw_i64 left, const auto& what) {
#pragma unroll
    for (int i = 0; i < (kTurnCopies + 31) / 32; ++i) {
      const int copy = thread % 32 + 32 * i;
      if ((kTurnCopies % 32 == 0 || copy < kTurnCopies) && copy * 16 < left) what(copy);
    }
  };

  // x and dY of the next heads are on their way through shared memory where an asynchronous copy carries a vector, else
  // those of one head to registers. A thread reads what it fetched itself, so there is no barrier; but in flat, where dX
  // goes out through the last of the places.
  constexpr int kAhead = S::kStaged ? K::kInFlight : 1, kPlaces = 2 * K::kInFlight + (S::kFlat ? 1 : 0);
  __shared__ Aligned<16> staged[S::kStaged ? (kPlaces * S::kStageBytes + 15) / 16 : 1];
  Share<K> x, grad;
  const auto warp_at = [&](int place) {  // flat
    return staged + (place * S::kStageBytes / 16 + thread / 32 * kTurnCopies);
  };
  const auto staged_at = [&](int place, int begin, int number) {
    if constexpr (S::kFlat) {
      return reinterpret_cast<Words<S::kVectorBytes>*>(reinterpret_cast<char*>(warp_at(place)) + group * kHeadBytes +
                                                       begin * kSize);
    } else {
      return reinterpret_cast<Words<S::kVectorBytes>*>(reinterpret_cast<char*>(staged) + place * S::kStageBytes) +
             number * K::kThreads + threadIdx.x;
    }
  };
  // The position of a token comes the same way.
  using PositionInt = typename IntOf<K::kPositionsDtype>::Type;
  constexpr bool kFetchPosition = S::kStaged && !K::kAxes && K::kPositionsDtype != kRopeNoDtype;
  __shared__ PositionInt positions[kFetchPosition ? K::kInFlight * K::kThreads : 1];
  int to_fetch = S::kFlat ? turns : count;
  HeadCursor ahead = {};
  HeadOnWay on_way[kAhead] = {};  // the one to be worked on first
  const auto fetch = [&](int stage) {
#pragma unroll
    for (int i = 0; i + 1 < kAhead; ++i) on_way[i] = on_way[i + 1];
    on_way[kAhead - 1] = {ahead.batch, ahead.token, ahead.new_token, S::kFlat ? left_bytes : 0, ahead.out};
    if constexpr (S::kFlat) __syncwarp();  // all have read what was there
    if (to_fetch > 0) {
      if constexpr (S::kFlat) {
        const rw_i64 begin = all_bytes - left_bytes;
        each_copy(left_bytes, [&](int copy) {
          CopyAsync<16>(warp_at(2 * stage) + copy, static_cast<const char*>(of_k ? b.k : b.q) + begin + copy * 16);
          CopyAsync<16>(warp_at(2 * stage + 1) + copy, static_cast<const char*>(of_k ? a.k : a.q) + begin + copy * 16);
        });
      }
      const auto get = [&](Share<K>& to, const char* from, int place) {
        EachVector<K>(lane, to, [&](Words<S::kVectorBytes>& words, int begin, int number) {
          if constexpr (S::kStaged) {
            CopyAsync<S::kVectorBytes>(staged_at(place, begin, number), from + begin * kSize);
          } else {
            words = Load<S::kVectorBytes>(from + begin * kSize);
          }
        });
      };
      if constexpr (!S::kFlat) {
        get(x, ahead.x, 2 * stage);
        get(grad, ahead.grad, 2 * stage + 1);
      }
      if constexpr (kFetchPosition) {
        if (ahead.new_token && (!S::kFlat || turns - to_fetch < count)) {
          CopyAsync<sizeof(PositionInt)>(&positions[stage * K::kThreads + thread],
                                         static_cast<const PositionInt*>(a.positions) +
                                             (K::kBatched ? ahead.batch * p.positions_batch : 0) +
                                             Index<K>(ahead.token, p.positions_token));
        }
      }
      if (--to_fetch > 0) left_bytes -= rw_i64{go_on(ahead)} * kHeadBytes;
    }
    if constexpr (S::kStaged) asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (S::kFlat ? turns > 0 : count > 0) {
    const rw_i64 row = first / heads;
    ahead.head = static_cast<int>(first - row * heads);
    ahead.batch = K::kBatched ? static_cast<int>(row / p.tokens) : 0;
    ahead.token = static_cast<int>(row - ahead.batch * p.tokens);
    ahead.new_token = true;
    ahead.left = kPiece;
    place(ahead);
  }
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) fetch(stage);

  ShareWeights<K> weights;
  LoadWeights<K>(of_k ? a.k_weight : a.q_weight, lane, weights);
  using Sizes = Sums<K>;
  constexpr int kSlots = K::kSums ? Sizes::kSlots : 1;
  __shared__ Sum shared_sums[K::kSums ? Sizes::kPart * K::kThreads : 1];
  Sum own_sums[K::kSums && !Sizes::kShared ? kSlots : 1];
  float run[kSlots];
  const auto sum_at = [&](int slot) -> Sum& {
    return Sizes::kShared ? shared_sums[slot * K::kThreads + thread] : own_sums[slot];
  };
  if constexpr (K::kSums != 0) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      run[slot] = 0.0f;
      sum_at(slot) = {0.0f, 0.0f};
    }
  }
  const auto end_run = [&] {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      AddTo(sum_at(slot), run[slot]);
      run[slot] = 0.0f;
    }
  };

  Angles<K> angles;
  bool poisoned = false;
  int stage = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const bool works = turn < count;
    const HeadOnWay at = on_way[0];
    if constexpr (S::kStaged) asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
    if constexpr (S::kFlat) __syncwarp();
    if (works && at.new_token) {
      Token t = {at.batch, at.token, nullptr, nullptr, -1, false, false};
      rw_i64 position = 0;
      if constexpr (kFetchPosition) {
        position = positions[stage * K::kThreads + thread];
        if constexpr (K::kOffsetsDtype != kRopeNoDtype) {
          position += LoadInt<K::kOffsetsDtype>(
              a.offsets, (K::kBatched ? t.batch * p.offsets_batch : 0) + Index<K>(t.token, p.offsets_token));
        }
      } else if constexpr (!K::kAxes) {
        position = PositionOf<K>(a, t.batch, t.token, 0);
      }
      CheckToken<K>(a, t.batch * p.tokens + t.token, -1, position, lane == 0 && (!of_k || p.q_heads == 0), t);
      poisoned = t.poisoned;
      if (!(S::kTable || K::kCheckAxes) || !poisoned) FindAngles<K>(a, t, position, lane, true, angles);
    }
    Floats<K> n, g;
    float square = 0.0f;
    EachVector<K>(lane, x, [&](Words<S::kVectorBytes>& words, int begin, int number) {
      if constexpr (S::kStaged) words = *staged_at(2 * stage, begin, number);
      Unpack<K::kDtype, K::kVector>(words, n.v[number]);
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) square = fmaf(n.v[number][j], n.v[number][j], square);
    });
    EachVector<K>(lane, grad, [&](Words<S::kVectorBytes>& words, int begin, int number) {
      if constexpr (S::kStaged) words = *staged_at(2 * stage + 1, begin, number);
      Unpack<K::kDtype, K::kVector>(words, g.v[number]);
    });
#pragma unroll
    for (int i = 0; i < S::kUnitsPerLane; ++i) {
      if (HasUnit<K>(lane, i)) {
        RotateUnit<Unrounded<K>>(g.v[2 * i], g.v[2 * i + 1], angles.cos[i], angles.sin[i]);
      }
    }
    const float mean = SumOfGroup<K::kLanes>(square, lane) * (1.0f / K::kHeadDim) + __uint_as_float(K::kEpsBits);
    const float rstd = K::kDtype == kRopeF32 ? __frcp_rn(__fsqrt_rn(mean)) : InverseRoot<K::kEpsBits>(mean);
    // n before its products, and what makes greater first: those of subnormal numbers would lose what that brings back.
    const float scale_up = fmaxf(rstd, 1.0f), scale_down = fminf(rstd, 1.0f);
    Floats<K> scaled;  // g w as large as scale_up makes it
    float along = 0.0f;
    EachVector<K>(lane, weights, [&](const WeightWords<K>& words, int, int number) {
      float w[K::kVector];
      if constexpr (K::kWeight != kRopeNoWeight) Unpack<K::kWeightDtype, K::kVector>(words, w);
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) {
        const float factor = K::kWeight == kRopeNoWeight ? 1.0f : K::kWeight == kRopeWeight ? w[j] : 1.0f + w[j];
        n.v[number][j] *= rstd;
        scaled.v[number][j] = g.v[number][j] * scale_up * factor;
        along = fmaf(scaled.v[number][j], n.v[number][j], along);
      }
    });
    const float mean_along = SumOfGroup<K::kLanes>(along, lane) * (1.0f / K::kHeadDim);
    fetch(stage);  // to where this head's values lay, which have all been read
    stage = stage + 1 == kAhead ? 0 : stage + 1;
    const bool fills = (S::kTable || K::kCheckAxes) && poisoned;
    if (!S::kFlat && !works) continue;
    if (!S::kFlat && fills) {
      FillHead<K>(nullptr, at.out, true, lane);
    } else if (works) {
      EachVector<K>(lane, weights, [&](const WeightWords<K>&, int begin, int number) {
        float dx[K::kVector];
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) {
          const float unit = n.v[number][j];
          dx[j] = scale_down * fmaf(-unit, mean_along, scaled.v[number][j]);
          if constexpr (K::kSums != 0) {
            float& term = run[number * K::kVector + j];
            if (!S::kFlat || !fills) term = fmaf(g.v[number][j], unit, term);
          }
        }
        const auto words = Pack<K::kDtype, K::kVector>(dx);
        if constexpr (S::kFlat) {
          *staged_at(kPlaces - 1, begin, number) = fills ? Nans<K, S::kVectorBytes>() : words;
        } else {
          Store(at.out + begin * kSize, words);
        }
      });
    }
    if constexpr (S::kFlat) {
      __syncwarp();
      char* const out = static_cast<char*>(of_k ? a.k_out : a.q_out) + (all_bytes - at.left_bytes);
      each_copy(at.left_bytes, [&](int copy) { Store(out + copy * 16, warp_at(kPlaces - 1)[copy].words); });
    }
    if constexpr (K::kSums != 0) {
      if (turn % Sizes::kRun == Sizes::kRun - 1) end_run();
    }
  }
  if constexpr (S::kStaged) asm volatile("cp.async.wait_all;" ::: "memory");

  // The block's sums: of the threads that own an element, in their order. head_dim floats, and as many behind.
  if constexpr (K::kSums != 0) {
    end_run();
    constexpr int kRow = RopeSumsRow(K::kHeadDim);
    float* const sums = b.sums + static_cast<rw_i64>(blockIdx.x) * (2 * kRow);
#pragma unroll 1
    for (int begin = 0; begin < kSlots; begin += Sizes::kPart) {
      if constexpr (!Sizes::kShared) {
#pragma unroll 1
        for (int slot = begin; slot < kSlots && slot < begin + Sizes::kPart; ++slot) {
          shared_sums[(slot - begin) * K::kThreads + thread] = own_sums[slot];
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int i = thread; i < Sizes::kPart * K::kLanes; i += K::kThreads) {
        const int slot = begin + i / K::kLanes, owner = i % K::kLanes;
        const int element = slot < kSlots ? ElementOf<K>(owner, slot) : -1;
        if (element < 0) continue;
        // Four sums whose additions do not wait for each other, then those.
        Sum parts[4] = {};
        constexpr int kOwners = kWarps * kGroups;
#pragma unroll
        for (int of = 0; of < kOwners; ++of) {
          const int by = of / kGroups * 32 + of % kGroups * K::kLanes + owner;
          AddTo(parts[of % 4], shared_sums[(slot - begin) * K::kThreads + by]);
        }
        AddTo(parts[0], parts[1]);
        AddTo(parts[2], parts[3]);
        AddTo(parts[0], parts[2]);
        const Sum sum = parts[0];
        sums[element] = sum.total;
        sums[kRow + element] = sum.lost;
      }
      __syncthreads();
    }
  }
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_
