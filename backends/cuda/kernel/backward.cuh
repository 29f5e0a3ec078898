// The gradient of norm and rotation. With n = x / rms, y = R (n * w) and g = R^T dY:
//
//   dX = (g w - n mean(g w n)) / rms                   one pass: reads x and dY, writes dX
//   dW = sum of g n over all heads of all tokens       two kernels: each block's sum, then those added up (sums.cuh)
//
// A block has heads of q or of k, not of both, so that its threads add up one weight's gradient. All heads of q, and all
// of k, are dealt to the warps in pieces of a few turns, in the order of memory: what all warps read at a time lies
// together. In a turn each group of a warp takes a head. Who owns what of a head, rope.cuh draws. No sum depends on which
// block is first.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_

#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/kernel/sums.cuh"

namespace ropewalk {

// Where a group is: its head, and where x, dY and dX of it lie.
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
  static_assert(!S::kFlat && K::kQHeads == 0, "a thread fetches what it owns by itself, and strides are not constants");
  constexpr int kSize = kBytes<K::kDtype>, kWarps = K::kThreads / 32, kGroups = 32 / K::kLanes;
  const rope_cuda_args& a = b.turn;
  const rope_params& p = a.params;
  const bool of_k = static_cast<int>(blockIdx.x) >= b.q_blocks;
  const int heads = of_k ? p.k_heads : p.q_heads;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32 % K::kLanes;
  const bool idle = Idle(S::kGrid, thread);

  // The heads of all tokens are dealt to the warps, kGroups of them a turn and kPiece turns at a time.
  constexpr int kPiece = kRopePieceTurns;
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
  // way from behind its last head to the next token's first.
  const auto jump = static_cast<int>((warps - 1) * (kPiece * kGroups) + kGroups);
  const int jump_tokens = jump / heads;
  const auto wrap_of = [&](const rope_strides& s) { return (s.token - s.head * heads) * kSize; };
  const rw_i64 x_wrap = wrap_of(x_strides), grad_wrap = wrap_of(grad_strides), out_wrap = wrap_of(out_strides);
  const auto go_on = [&](HeadCursor& at) {
    const bool jumps = --at.left == 0;
    const int step = jumps ? jump : kGroups;
    int tokens = jumps ? jump_tokens : 0;
    at.head += step - tokens * heads;
    if (at.head >= heads) {
      const int more = heads >= kGroups || jumps ? 1 : at.head / heads;
      at.head -= more * heads;
      tokens += more;
    }
    if (jumps) at.left = kPiece;
    at.new_token = tokens != 0;
    at.token += tokens;
    if (K::kBatched && at.token >= p.tokens) {
      const int batches = at.token / static_cast<int>(p.tokens);
      at.batch += batches;
      at.token -= batches * static_cast<int>(p.tokens);
      place(at);
      return;
    }
    const auto advance = [&](const rope_strides& s, rw_i64 wrap) { return step * (s.head * kSize) + tokens * wrap; };
    at.x += advance(x_strides, x_wrap);
    at.grad += advance(grad_strides, grad_wrap);
    at.out += advance(out_strides, out_wrap);
  };

  if constexpr (K::kDependentLaunch != 0) {
    WaitForOthers();
    LetTheNextStart<1>();  // all blocks run at once, so that the next kernel's take the place of none
  }

  // x and dY of the next heads are on their way through shared memory where an asynchronous copy carries a vector, else
  // those of one head to registers. A thread reads what it fetched itself, so there is no barrier.
  constexpr int kAhead = S::kStaged ? K::kInFlight : 1;
  __shared__ Aligned<16> staged[S::kStaged ? (2 * K::kInFlight * S::kStageBytes + 15) / 16 : 1];
  Share<K> x, grad;
  const auto staged_at = [&](int stage, int number) {
    return reinterpret_cast<Words<S::kVectorBytes>*>(reinterpret_cast<char*>(staged) + stage * S::kStageBytes) +
           number * K::kThreads + threadIdx.x;
  };
  // The position of a token comes the same way.
  using PositionInt = typename IntOf<K::kPositionsDtype>::Type;
  constexpr bool kFetchPosition = S::kStaged && !K::kAxes && K::kPositionsDtype != kRopeNoDtype;
  __shared__ PositionInt positions[kFetchPosition ? K::kInFlight * K::kThreads : 1];
  int to_fetch = count;
  HeadCursor ahead = {};
  const auto fetch = [&](int stage) {
    if (to_fetch > 0) {
      const auto get = [&](Share<K>& to, const char* from, int place) {
        EachVector<K>(lane, to, [&](Words<S::kVectorBytes>& words, int begin, int number) {
          if constexpr (S::kStaged) {
            CopyAsync<S::kVectorBytes>(staged_at(place, number), from + begin * kSize);
          } else {
            words = Load<S::kVectorBytes>(from + begin * kSize);
          }
        });
      };
      get(x, ahead.x, 2 * stage);
      get(grad, ahead.grad, 2 * stage + 1);
      if constexpr (kFetchPosition) {
        if (ahead.new_token) {
          CopyAsync<sizeof(PositionInt)>(&positions[stage * K::kThreads + thread],
                                         static_cast<const PositionInt*>(a.positions) +
                                             (K::kBatched ? ahead.batch * p.positions_batch : 0) +
                                             Index<K>(ahead.token, p.positions_token));
        }
      }
      if (--to_fetch > 0) go_on(ahead);
    }
    if constexpr (S::kStaged) asm volatile("cp.async.commit_group;" ::: "memory");
  };
  HeadCursor at = {};
  if (count > 0) {
    const rw_i64 row = first / heads;
    at.head = static_cast<int>(first - row * heads);
    at.batch = K::kBatched ? static_cast<int>(row / p.tokens) : 0;
    at.token = static_cast<int>(row - at.batch * p.tokens);
    at.new_token = true;
    at.left = kPiece;
    place(at);
    ahead = at;
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
    if constexpr (S::kStaged) asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
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
    EachVector<K>(lane, x, [&](Words<S::kVectorBytes>& words, int, int number) {
      if constexpr (S::kStaged) words = *staged_at(2 * stage, number);
      Unpack<K::kDtype, K::kVector>(words, n.v[number]);
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) square = fmaf(n.v[number][j], n.v[number][j], square);
    });
    EachVector<K>(lane, grad, [&](Words<S::kVectorBytes>& words, int, int number) {
      if constexpr (S::kStaged) words = *staged_at(2 * stage + 1, number);
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
    if (!works) continue;
    char* const out = at.out;
    go_on(at);
    if ((S::kTable || K::kCheckAxes) && poisoned) {
      FillHead<K>(nullptr, out, true, lane);
    } else {
      EachVector<K>(lane, weights, [&](const WeightWords<K>&, int begin, int number) {
        float dx[K::kVector];
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) {
          const float unit = n.v[number][j];
          dx[j] = scale_down * fmaf(-unit, mean_along, scaled.v[number][j]);
          if constexpr (K::kSums != 0) {
            run[number * K::kVector + j] = fmaf(g.v[number][j], unit, run[number * K::kVector + j]);
          }
        }
        Store(out + begin * kSize, Pack<K::kDtype, K::kVector>(dx));
      });
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
