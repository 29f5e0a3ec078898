// The OpenCL C kernel: one body. The tensors' dtype and the width of an access are macros, ROPE_DTYPE and ROPE_VECTOR, as
// OpenCL C has no templates; what else costs speed is a specialisation constant, so that one SPIR-V module holds every
// variant; what costs none is read from the arguments, the same for all work-items.
//
// As in the CUDA kernel a group of lanes works on a head, here of one sub-group of 16, and a lane holds units of two
// vectors that belong together: in halves (neox) the second lies half the rotated part behind the first, and their elements
// pair up; of neighbours (interleaved) both vectors hold whole pairs, and lie apart only to keep accesses together. So no
// pairing needs a shuffle. A work-group is of one token; a lane's cosines and sines serve all its heads.
// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/kernel/sincos.clh"
#include "backends/spirv/kernel/vector.clh"
#include "backends/spirv/kernel/index.h"

#ifdef ROPE_SPEC_0
#define ROPE_CONSTANT_(number) ROPE_SPEC_##number
#define ROPE_CONSTANT(number) ROPE_CONSTANT_(number)
#define ROPE_LANE get_local_id(0)  // no sub-groups: the work-group is one
#define ROPE_SUB_GROUP_INDEX 0
#define ROPE_KERNEL __attribute__((reqd_work_group_size(ROPE_SUB_GROUP, 1, 1))) __kernel
#else
int __attribute__((overloadable)) __spirv_SpecConstant(int id, int value);
// Of cl_intel_subgroups; clang 15 does not declare them.
float __attribute__((overloadable, convergent)) intel_sub_group_shuffle(float value, uint lane);
float __attribute__((overloadable, convergent)) intel_sub_group_shuffle_xor(float value, uint mask);
#define ROPE_CONSTANT(number) __spirv_SpecConstant(number, 0)
#define ROPE_LANE get_sub_group_local_id()
#define ROPE_SUB_GROUP_INDEX get_sub_group_id()
#define ROPE_KERNEL __attribute__((intel_reqd_sub_group_size(ROPE_SUB_GROUP))) __kernel
#endif

// One layout on every compiler: a negative size does not compile.
typedef char rope_params_size[sizeof(rope_params) == ROPE_PARAMS_SIZE ? 1 : -1];
typedef char rope_spirv_params_size[sizeof(rope_spirv_params) == ROPE_SPIRV_PARAMS_SIZE ? 1 : -1];

#define ROPE_PAIRS_INSIDE(k) rope_pairs_inside((k)->interleaved, ROPE_VECTOR)
// Units that a lane can keep in registers.
#define ROPE_MAX_UNITS ROPE_MOST_UNITS(ROPE_VECTOR * RW_SIZE)

// The specialisation constants, in registers that become constants.
typedef struct {
  int interleaved, norm, weight_dtype, reference, table_dtype, table_vector, axes, cache_dtype, out_of_place, store_only;
  int units, lanes;
} rope_choices;

// All that the stages read. Inlined away.
typedef struct {
  rw_in q, k, v;
  rw_out q_out, k_out, k_cache, v_cache;
  const __global void *positions, *offsets, *cos, *sin, *slots;
  const __global int* axes;
  const __global rw_u64* turns;
  rw_in q_weight, k_weight;
  const __global float *k_scale, *v_scale;
  __global rope_fault* fault;
  const __private rope_params* p;
  const __private rope_spirv_shape* s;
} rope_all;

// What a token needs beside its heads.
typedef struct {
  rw_i64 batch, token;
  rw_i64 slot;   // < 0: not stored
  int left_out;  // padding with a position outside the table
  int poisoned;
} rope_token;

// Where a head lies.
typedef struct {
  rw_in in;
  rw_out out;
  rw_out cache;
  rw_in weight;
  float inverse_scale;  // of an fp8 cache
  int stored, written;  // to the cache; to `out`
} rope_head;

// The arithmetic of index.h for this kernel.
RW_INLINE int rope_unit_begin(const __private rope_choices* k, const __private rope_all* a, int unit) {
  return rope_begin_of(k->interleaved, ROPE_VECTOR, a->p->rotary_offset, unit);
}
RW_INLINE int rope_unit_distance(const __private rope_choices* k, const __private rope_all* a) {
  return rope_distance_of(k->interleaved, ROPE_VECTOR, a->p->rotary_dim);
}
RW_INLINE int rope_pair_of(const __private rope_choices* k, const __private rope_all* a, int unit, int i) {
  return rope_pair_at(k->interleaved, ROPE_VECTOR, a->p->rotary_dim, unit, i);
}
RW_INLINE int rope_rest_begin(const __private rope_all* a, int i) {
  return rope_rest_at(ROPE_VECTOR, a->s->before, a->p->rotary_dim, i);
}

RW_INLINE rw_i64 rope_position_of(const __private rope_all* a, rw_i64 batch, rw_i64 token, int axis) {
  const __private rope_params* p = a->p;
  rw_i64 position = token;
  if (a->s->positions_dtype != kRopeNoDtype) {
    position = rw_load_int(a->positions, axis * p->positions_axis + batch * p->positions_batch + token * p->positions_token,
                           a->s->positions_dtype);
  }
  if (a->s->offsets_dtype != kRopeNoDtype) {
    position += rw_load_int(a->offsets, batch * p->offsets_batch + token * p->offsets_token, a->s->offsets_dtype);
  }
  return position;
}

// Keeps the fault of the lowest row. Rare, so one after the other.
RW_INLINE void rope_record_fault(const __private rope_all* a, rw_i64 row, int kind, rw_i64 value, rw_i64 limit, int axis) {
  __global rope_fault* fault = a->fault;
  if (!fault) return;
  const rw_u64 key = (rw_u64)row * 4 + kind;
  if (key >= *(volatile __global rw_u64*)&fault->key) return;
  // One turn of the loop holds the lock and gives it back, so that no work-item can wait for one that waits for it.
  RW_ROLLED for (int done = 0; !done;) {
    if (atomic_cmpxchg((volatile __global uint*)&fault->lock, 0u, 1u) != 0u) continue;
    mem_fence(CLK_GLOBAL_MEM_FENCE);
    if (key < *(volatile __global rw_u64*)&fault->key) {
      *(volatile __global rw_i64*)&fault->value = value;
      *(volatile __global rw_i64*)&fault->limit = limit;
      *(volatile __global rw_i64*)&fault->tokens = a->p->tokens;
      *(volatile __global rw_u32*)&fault->axis = (rw_u32)axis;
      *(volatile __global rw_u64*)&fault->key = key;
    }
    mem_fence(CLK_GLOBAL_MEM_FENCE);
    atomic_xchg((volatile __global uint*)&fault->lock, 0u);
    done = 1;
  }
}

// Slot and position of the token; `reports`: whether this work-item tells of a fault.
RW_INLINE rope_token rope_plan_token(const __private rope_choices* k, const __private rope_all* a, rw_i64 batch,
                                     rw_i64 token, bool reports) {
  const __private rope_params* p = a->p;
  rope_token t = {batch, token, -1, 0, 0};
  const rw_i64 row = batch * p->tokens + token;
  int padding = 0;
  rw_i64 slot = -1;
  if (k->cache_dtype != kRopeNoDtype) {
    slot = rw_load_int(a->slots, batch * p->slots_batch + token * p->slots_token, a->s->slots_dtype);
    padding = slot < 0;
  }
  if (k->axes && a->s->check_axes) {
    RW_ROLLED for (int i = 0; i < p->rotary_dim / 2; ++i) {
      const int axis = a->axes[i];
      if (axis >= 0 && axis < p->axes) continue;
      t.poisoned = 1;
      if (reports) rope_record_fault(a, row, kRopeFaultAxis, axis, p->axes, i);
      return t;
    }
  }
  if (k->table_dtype != kRopeNoDtype) {
    // Only the rows that pairs take: another may hold anything.
    int last = -1;
    RW_ROLLED for (int i = 0; i < (k->axes ? p->rotary_dim / 2 : 1); ++i) {
      const int axis = k->axes ? a->axes[i] : 0;
      if (axis == last) continue;
      last = axis;
      const rw_i64 position = rope_position_of(a, batch, token, axis);
      if ((rw_u64)position < (rw_u64)p->rows) continue;
      t.left_out = padding;
      t.poisoned = !padding;
      if (reports && !padding) rope_record_fault(a, row, kRopeFaultPosition, position, p->rows, axis);
      return t;
    }
  }
  if (slot >= p->slots) {
    if (k->cache_dtype != kRopeNoDtype && reports) rope_record_fault(a, row, kRopeFaultSlot, slot, p->slots, 0);
  } else {
    t.slot = slot;
  }
  return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// Angles

// Pairs that follow each other in the table or among the turns come several at a time, 16 bytes of a table or 32 of turns;
// with neighbours they are two runs of half a vector.
RW_INLINE float rope_run1(rw_in p, int dtype) { return rw_load_float(p, 0, dtype); }
RW_INLINE float2 rope_run2(rw_in p, int dtype) {
  if (dtype == kRopeF32) return *(const __global float2*)p;
  const ushort2 v = *(const __global ushort2*)p;
  return (float2)(dtype == kRopeF16 ? rw_half_scalar(v.x) : rw_bf16_scalar(v.x),
                  dtype == kRopeF16 ? rw_half_scalar(v.y) : rw_bf16_scalar(v.y));
}
RW_INLINE float4 rope_run4(rw_in p, int dtype) {
  if (dtype == kRopeF32) return *(const __global float4*)p;
  const ushort4 v = *(const __global ushort4*)p;
  if (dtype == kRopeF16) {
    return (float4)(rw_half_scalar(v.x), rw_half_scalar(v.y), rw_half_scalar(v.z), rw_half_scalar(v.w));
  }
  return as_float4(convert_uint4(v) << 16);
}
#if ROPE_VECTOR == 8
RW_INLINE float8 rope_run8(rw_in p, int dtype) {
  if (dtype == kRopeF32) return (float8)(((const __global float4*)p)[0], ((const __global float4*)p)[1]);
  const ushort8 v = *(const __global ushort8*)p;
  return dtype == kRopeF16 ? rw_half_to_float(v) : rw_bf16_to_float(v);
}
#define ROPE_RUNS(load, at) ((rw_floats)(load##4((at), dtype), load##4((at) + second, dtype)))
#elif ROPE_VECTOR == 4
#define ROPE_RUNS(load, at) ((rw_floats)(load##2((at), dtype), load##2((at) + second, dtype)))
#elif ROPE_VECTOR == 2
#define ROPE_RUNS(load, at) ((rw_floats)(load##1((at), dtype), load##1((at) + second, dtype)))
#else
#define ROPE_RUNS(load, at) load##1(at, dtype)
#endif

RW_INLINE rw_floats rope_table_run(const __private rope_choices* k, rw_in at, int quarter) {
  const int dtype = k->table_dtype;
  if (!ROPE_PAIRS_INSIDE(k)) return RW_CAT(rope_run, ROPE_VECTOR)(at, dtype);
  const int second = quarter * rw_size_of(dtype);
  return ROPE_RUNS(rope_run, at);
}

RW_INLINE rw_ulongs rope_turns_of(const __private rope_choices* k, const __private rope_all* a, int unit) {
  const __global rw_u64* at = a->turns + rope_pair_of(k, a, unit, 0);
#if ROPE_VECTOR == 8
  if (ROPE_PAIRS_INSIDE(k)) {
    return (ulong8)(*(const __global ulong4*)at, *(const __global ulong4*)(at + a->p->rotary_dim / 4));
  }
  return (ulong8)(((const __global ulong4*)at)[0], ((const __global ulong4*)at)[1]);
#elif ROPE_VECTOR == 4
  if (ROPE_PAIRS_INSIDE(k)) {
    return (ulong4)(*(const __global ulong2*)at, *(const __global ulong2*)(at + a->p->rotary_dim / 4));
  }
  return *(const __global ulong4*)at;
#elif ROPE_VECTOR == 2
  if (ROPE_PAIRS_INSIDE(k)) return (ulong2)(at[0], at[a->p->rotary_dim / 4]);
  return *(const __global ulong2*)at;
#else
  return *at;
#endif
}

// Cosines and sines of the pairs of one unit.
RW_INLINE void rope_cos_sin_of(const __private rope_choices* k, const __private rope_all* a, const __private rope_token* t,
                               rw_i64 position, int unit, __private rw_floats* cos, __private rw_floats* sin) {
  const __private rope_params* p = a->p;
  const rw_uints flip = a->s->sine_flip;
#define ROPE_POSITION_AT(i) rope_position_of(a, t->batch, t->token, a->axes[rope_pair_of(k, a, unit, i)])
  if (k->table_dtype != kRopeNoDtype) {
    const int size = rw_size_of(k->table_dtype);
    const rw_i64 at_cos = t->batch * p->cos_batch, at_sin = t->batch * p->sin_batch;
    rw_floats s;
    if (k->table_vector) {
      const int pair = rope_pair_of(k, a, unit, 0);
      *cos = rope_table_run(k, (rw_in)a->cos + (at_cos + position * p->cos_row + pair) * size, p->rotary_dim / 4);
      s = rope_table_run(k, (rw_in)a->sin + (at_sin + position * p->sin_row + pair) * size, p->rotary_dim / 4);
    } else {
#define ROPE_ROW_AT(i) (k->axes ? ROPE_POSITION_AT(i) : position)
#define ROPE_COS_AT(i) \
  rw_load_float(a->cos, at_cos + ROPE_ROW_AT(i) * p->cos_row + rope_pair_of(k, a, unit, i) * p->cos_pair, k->table_dtype)
#define ROPE_SIN_AT(i) \
  rw_load_float(a->sin, at_sin + ROPE_ROW_AT(i) * p->sin_row + rope_pair_of(k, a, unit, i) * p->sin_pair, k->table_dtype)
      *cos = (rw_floats)(RW_EACH(ROPE_COS_AT));
      s = (rw_floats)(RW_EACH(ROPE_SIN_AT));
    }
    *sin = RW_AS(float, RW_AS(uint, s) ^ flip);
  } else {
    // The reduced phase is the product modulo 2^64; its upper half is what a float32 can tell apart.
    const rw_ulongs turns = rope_turns_of(k, a, unit);
    rw_ulongs at = (rw_ulongs)(rw_u64)position;
    if (k->axes) {
#define ROPE_UNSIGNED_AT(i) (rw_u64) ROPE_POSITION_AT(i)
      at = (rw_ulongs)(RW_EACH(ROPE_UNSIGNED_AT));
    }
    rw_floats c, s;
    rw_cos_sin(RW_CONVERT(uint, (at * turns) >> 32), &c, &s);
    c *= p->attention_scaling;
    s *= p->attention_scaling;
    s = RW_AS(float, RW_AS(uint, s) ^ flip);
    *cos = k->reference ? rw_round(c) : c;
    *sin = k->reference ? rw_round(s) : s;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// A unit: rotated, normalised

// (x, y) -> (x cos - y sin, y cos + x sin)
#define ROPE_ROTATE(name, type, round)                                                                    \
  RW_INLINE void name(const __private rope_choices* k, __private type* x, __private type* y, type c, type s) { \
    if (k->reference) {                                                                                   \
      const bool rounds = k->table_dtype == kRopeNoDtype || k->table_dtype == ROPE_DTYPE;                 \
      type xc = *x * c, ys = *y * s, yc = *y * c, xs = *x * s;                                            \
      if (rounds) xc = round(xc), ys = round(ys), yc = round(yc), xs = round(xs);                         \
      *x = xc - ys;                                                                                       \
      *y = yc + xs;                                                                                       \
    } else {                                                                                              \
      const type old = *x;                                                                                \
      *x = fma(-*y, s, old * c);                                                                          \
      *y = fma(old, s, *y * c);                                                                           \
    }                                                                                                     \
  }
ROPE_ROTATE(rope_rotate, rw_floats, rw_round)

RW_INLINE void rope_rotate_unit(const __private rope_choices* k, __private rw_floats* x, __private rw_floats* y, rw_floats c,
                                rw_floats s) {
#if ROPE_VECTOR > 1
  if (k->interleaved) {
    // Pairs of both vectors side by side; the first elements, then the second.
    rw_floats first = (rw_floats)(x->even, y->even), second = (rw_floats)(x->odd, y->odd);
    rope_rotate(k, &first, &second, c, s);
    x->even = first.lo;
    x->odd = second.lo;
    y->even = first.hi;
    y->odd = second.hi;
    return;
  }
#endif
  rope_rotate(k, x, y, c, s);
}

// v times 1 / rms times weight.
RW_INLINE rw_floats rope_normalise(const __private rope_choices* k, const __private rope_all* a, rw_floats v, float rstd,
                                   rw_in weight, int begin) {
  rw_floats factor = (rw_floats)1.0f;
  if (k->weight_dtype != kRopeNoDtype) {
    const rw_floats w = rw_load_floats(weight + begin * rw_size_of(k->weight_dtype), k->weight_dtype);
    factor = a->s->zero_centered ? 1.0f + w : w;
  }
  if (!k->reference) return v * rstd * factor;
  // Llama rounds, then multiplies by the weight; Gemma multiplies, then rounds.
  const rw_floats unit = v * rstd;
  return rw_round((a->s->zero_centered ? unit : rw_round(unit)) * factor);
}

RW_INLINE float rope_add_squares(float sum, rw_words words) {
  const rw_floats v = rw_unpack(words);
#if ROPE_VECTOR == 1
  return fma(v, v, sum);
#else
#define ROPE_ADD(i) sum = fma(v.s##i, v.s##i, sum)
  ROPE_ADD(0), ROPE_ADD(1);
#if ROPE_VECTOR > 2
  ROPE_ADD(2), ROPE_ADD(3);
#endif
#if ROPE_VECTOR > 4
  ROPE_ADD(4), ROPE_ADD(5), ROPE_ADD(6), ROPE_ADD(7);
#endif
  return sum;
#endif
}

// The sum over a group of lanes, for all of them. The whole sub-group takes part.
RW_INLINE float rope_sum_of_group(const __private rope_choices* k, float value, int lane, int lanes,
                                  __local float* exchange) {
#ifdef ROPE_SPEC_0
#define ROPE_FROM(index) (exchange[ROPE_LANE] = value, barrier(CLK_LOCAL_MEM_FENCE), exchange[index])
#define ROPE_DONE barrier(CLK_LOCAL_MEM_FENCE)
#else
#define ROPE_FROM(index) intel_sub_group_shuffle(value, (uint)(index))
#define ROPE_DONE
#endif
  const int id = (int)ROPE_LANE;
  if (k->lanes) {
    RW_UNROLL for (int mask = 8; mask > 0; mask /= 2) {
      if (mask >= k->lanes) continue;
#ifdef ROPE_SPEC_0
      const float other = ROPE_FROM(id ^ mask);
      ROPE_DONE;
#else
      const float other = intel_sub_group_shuffle_xor(value, (uint)mask);
#endif
      value += other;
    }
    return value;
  }
  const int begin = id - lane;
  RW_UNROLL for (int step = 8; step > 0; step /= 2) {
    const int from = begin + lane + step;
    const float other = ROPE_FROM(from < ROPE_SUB_GROUP ? from : id);
    ROPE_DONE;
    if (lane < step && lane + step < lanes) value += other;
  }
  value = ROPE_FROM(begin);
  ROPE_DONE;
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Where heads lie, and what is written there

RW_INLINE rw_i64 rope_slot_offset(const __private rope_all* a, const __private rope_strides* cache, rw_i64 slot) {
  const rw_i64 page = (rw_i64)(mul_hi((rw_u64)slot * 2, a->s->page_multiplier) >> a->s->page_shift);
  return page * cache->batch + (slot - page * a->p->page_size) * cache->token;
}
RW_INLINE rw_i64 rope_offset(const __private rope_strides* s, const __private rope_token* t, int head) {
  return t->batch * s->batch + t->token * s->token + head * s->head;
}
RW_INLINE float rope_inverse_scale(const __private rope_choices* k, const __global float* scale, float value, int head,
                                   int stride) {
  if (k->cache_dtype != kRopeE4M3 && k->cache_dtype != kRopeE5M2) return 1.0f;
  return 1.0f / (scale ? scale[(rw_i64)head * stride] : value);
}

RW_INLINE rw_in rope_in_of(const __private rope_all* a, const __private rope_token* t, int h) {
  const __private rope_params* p = a->p;
  return h < p->q_heads ? a->q + rope_offset(&p->q, t, h) * RW_SIZE
                        : a->k + rope_offset(&p->k, t, h - p->q_heads) * RW_SIZE;
}

RW_INLINE rope_head rope_head_of(const __private rope_choices* k, const __private rope_all* a, const __private rope_token* t,
                                 int h) {
  const __private rope_params* p = a->p;
  rope_head head;
  head.in = rope_in_of(a, t, h);
  // In place there is nothing to find.
  head.out = !k->out_of_place ? (rw_out)head.in
             : h < p->q_heads ? a->q_out + rope_offset(&p->q_out, t, h) * RW_SIZE
                              : a->k_out + rope_offset(&p->k_out, t, h - p->q_heads) * RW_SIZE;
  head.weight = h < p->q_heads ? a->q_weight : a->k_weight;
  head.written = !k->store_only || h < a->s->written_heads;
  return head;
}

// Where the head is stored.
RW_INLINE void rope_find_cache(const __private rope_choices* k, const __private rope_all* a, const __private rope_token* t,
                               int h, __private rope_head* head) {
  const __private rope_params* p = a->p;
  head->stored = 0;
  if (k->cache_dtype == kRopeNoDtype || !a->s->store_k || t->slot < 0 || h < p->q_heads) return;
  h -= p->q_heads;
  head->stored = 1;
  head->cache = a->k_cache + (rope_slot_offset(a, &p->k_cache, t->slot) + h * p->k_cache.head) * rw_size_of(k->cache_dtype);
  head->inverse_scale = rope_inverse_scale(k, a->k_scale, p->k_scale, h, p->k_scale_head);
}

RW_INLINE void rope_write_cache(const __private rope_choices* k, const __private rope_head* head, int begin, rw_floats v,
                                rw_words packed) {
  if (k->cache_dtype == ROPE_DTYPE) {
    rw_store(head->cache + begin * RW_SIZE, packed);
  } else {
    const rw_floats scaled = (k->reference ? rw_round(v) : v) * head->inverse_scale;
    *(__global rw_bytes*)(head->cache + begin) = rw_float_to_fp8(scaled, k->cache_dtype);
  }
}

RW_INLINE void rope_write(const __private rope_choices* k, const __private rope_head* head, int begin, rw_floats v) {
  const rw_words packed = rw_pack(v);
  if (head->written) rw_store(head->out + begin * RW_SIZE, packed);
  if (k->cache_dtype != kRopeNoDtype && head->stored) rope_write_cache(k, head, begin, v, packed);
}

// A vector outside the rotated part.
RW_INLINE void rope_write_rest(const __private rope_choices* k, const __private rope_all* a, const __private rope_head* head,
                               int begin, float rstd) {
  const rw_words words = rw_load(head->in + begin * RW_SIZE);
  if (k->norm) {
    rope_write(k, head, begin, rope_normalise(k, a, rw_unpack(words), rstd, head->weight, begin));
    return;
  }
  // The same bits, untouched by any conversion.
  if (k->out_of_place && head->written) rw_store(head->out + begin * RW_SIZE, words);
  if (k->cache_dtype != kRopeNoDtype && head->stored) rope_write_cache(k, head, begin, rw_unpack(words), words);
}

// A unit of a head from its words to memory.
RW_INLINE void rope_write_unit(const __private rope_choices* k, const __private rope_all* a, const __private rope_head* head,
                               int begin, rw_words x, rw_words y, float rstd, rw_floats cos, rw_floats sin) {
  const int distance = rope_unit_distance(k, a);
  rw_floats vx = rw_unpack(x), vy = rw_unpack(y);
  if (k->norm) {
    vx = rope_normalise(k, a, vx, rstd, head->weight, begin);
    vy = rope_normalise(k, a, vy, rstd, head->weight, begin + distance);
  }
  rope_rotate_unit(k, &vx, &vy, cos, sin);
  rope_write(k, head, begin, vx);
  rope_write(k, head, begin + distance, vy);
}

// A head of v to its cache.
RW_INLINE void rope_store_v(const __private rope_choices* k, const __private rope_all* a, const __private rope_token* t, int h,
                            int lane, int lanes) {
  const __private rope_params* p = a->p;
  rope_head head;
  const rw_in in = a->v + rope_offset(&p->v, t, h) * RW_SIZE;
  head.cache =
      a->v_cache + (rope_slot_offset(a, &p->v_cache, t->slot) + h * p->v_cache.head) * rw_size_of(k->cache_dtype);
  head.inverse_scale = rope_inverse_scale(k, a->v_scale, p->v_scale, h, p->v_scale_head);
  RW_ROLLED for (int i = lane; i < a->s->v_vectors; i += lanes) {
    const rw_words words = rw_load(in + i * ROPE_VECTOR * RW_SIZE);
    rope_write_cache(k, &head, i * ROPE_VECTOR, rw_unpack(words), words);
  }
}

// A lane's share of a head: NaN, or copied.
RW_INLINE void rope_fill_head(const __private rope_all* a, const __private rope_head* head, int nan, int lane, int lanes) {
  RW_ROLLED for (int i = lane; i < a->s->head_vectors; i += lanes) {
    const int at = i * ROPE_VECTOR * RW_SIZE;
#if ROPE_DTYPE == 1
    const rw_words nans = RW_AS(float, (rw_uints)0x7fc00000u);
#else
    const rw_words nans = (rw_words)(ushort)(ROPE_DTYPE == 2 ? 0x7e00 : 0x7fc0);
#endif
    rw_store(head->out + at, nan ? nans : rw_load(head->in + at));
  }
}

// ---------------------------------------------------------------------------------------------------------------------

ROPE_KERNEL void rope_kernel(__global void* q, __global void* k_tensor, const __global void* positions,
                             const __global void* offsets, const __global void* cos_table,
                             const __global void* sin_table, const __global int* axes, const __global void* q_weight,
                             const __global void* k_weight, __global void* q_out, __global void* k_out,
                             const __global void* v, __global void* k_cache, __global void* v_cache,
                             const __global void* slots, const __global float* k_scale, const __global float* v_scale,
                             const __global rw_u64* turns, __global rope_fault* fault, rope_spirv_params params) {
#ifdef ROPE_SPEC_0
  __local float exchange[ROPE_SUB_GROUP];
#else
  __local float* exchange = 0;
#endif
  // Where a device gains less by a variant than its build costs, the choice is an argument.
#define ROPE_CHOICE(number) (ROPE_CONSTANT(number) == kRopeSpecArgument ? params.shape.choices[number] : ROPE_CONSTANT(number))
  // By number, as a build from source has macros for the constants.
  const rope_choices choices = {.interleaved = ROPE_CHOICE(0), .norm = ROPE_CHOICE(1), .weight_dtype = ROPE_CHOICE(2),
                                .reference = ROPE_CHOICE(3), .table_dtype = ROPE_CHOICE(4),
                                .table_vector = ROPE_CHOICE(5), .axes = ROPE_CHOICE(6), .cache_dtype = ROPE_CHOICE(7),
                                .out_of_place = ROPE_CHOICE(8), .store_only = ROPE_CHOICE(9),
                                .units = ROPE_CONSTANT(10), .lanes = ROPE_CONSTANT(11)};
  const rope_all all = {.q = (rw_in)q, .k = (rw_in)k_tensor, .v = (rw_in)v, .q_out = (rw_out)q_out,
                        .k_out = (rw_out)k_out, .k_cache = (rw_out)k_cache, .v_cache = (rw_out)v_cache,
                        .positions = positions, .offsets = offsets, .cos = cos_table, .sin = sin_table, .slots = slots,
                        .axes = axes, .turns = turns, .q_weight = (rw_in)q_weight, .k_weight = (rw_in)k_weight,
                        .k_scale = k_scale, .v_scale = v_scale, .fault = fault, .p = &params.params,
                        .s = &params.shape};
  const __private rope_choices* k = &choices;
  const __private rope_all* a = &all;
  const __private rope_spirv_shape* s = a->s;

  const int id = (int)ROPE_LANE;
  const int lanes = k->lanes ? k->lanes : s->lanes;
  const int heads_at_once = k->lanes ? ROPE_HEADS_AT_ONCE(k->lanes) : s->heads_at_once;
  const int group = k->lanes ? id / k->lanes : rope_group_of(id, s->lane_multiplier);
  const int lane = id - group * lanes;
  const rw_i64 token = get_group_id(0), batch = get_group_id(2);
  const int heads = s->heads, all_heads = s->all_heads;
  // All groups of a sub-group take the same number of turns, so that all its lanes meet at the shuffles.
  const int step = s->step;
  const int turn_first = rope_first_head((int)get_group_id(1), s->sub_groups, (int)ROPE_SUB_GROUP_INDEX, heads_at_once);
  // Left over where lanes do not divide 16: idle. The constant form has none, nor a unit missing.
  const int first = !k->lanes && group >= heads_at_once ? 1 << 30 : turn_first + group;
#define ROPE_UNIT(i) (lane + (i) * lanes)
#define ROPE_HAS_UNIT(i) (k->lanes || ROPE_UNIT(i) < s->units)

  const rope_token here = {batch, token, -1, 0, 0};
  rw_words x[ROPE_MAX_UNITS], y[ROPE_MAX_UNITS];
#define ROPE_FETCH(h)                                                      \
  if (k->units && (h) < heads) {                                           \
    const rw_in in = rope_in_of(a, &here, h);                              \
    RW_UNROLL for (int i = 0; i < ROPE_MAX_UNITS; ++i) {                   \
      if (i >= k->units || !ROPE_HAS_UNIT(i)) continue;                    \
      const rw_in at = in + rope_unit_begin(k, a, ROPE_UNIT(i)) * RW_SIZE; \
      x[i] = rw_load(at);                                                  \
      y[i] = rw_load(at + rope_unit_distance(k, a) * RW_SIZE);             \
    }                                                                      \
  }
  // Asked for before anything waits.
  ROPE_FETCH(first)

  const rope_token t = rope_plan_token(k, a, batch, token, id == 0 && turn_first == 0);
  if (t.poisoned || t.left_out) {
    if (t.left_out && !k->out_of_place) return;
    RW_ROLLED for (int h = first; h < (k->store_only ? s->written_heads : heads); h += step) {
      const rope_head head = rope_head_of(k, a, &t, h);
      rope_fill_head(a, &head, t.poisoned, lane, lanes);
    }
    return;
  }
  const rw_i64 position = k->axes ? 0 : rope_position_of(a, batch, token, 0);
  rw_floats cos[ROPE_MAX_UNITS], sin[ROPE_MAX_UNITS];
  RW_UNROLL for (int i = 0; i < ROPE_MAX_UNITS; ++i) {
    if (i >= k->units || !ROPE_HAS_UNIT(i)) continue;
    rope_cos_sin_of(k, a, &t, position, ROPE_UNIT(i), &cos[i], &sin[i]);
  }

  int h = first;
  RW_ROLLED for (int turn = turn_first; turn < heads; turn += step) {
    rope_head head = rope_head_of(k, a, &t, h < heads ? h : 0);
    float rstd = 0.0f;
    if (k->norm) {
      if (h < heads) {
        RW_UNROLL for (int i = 0; i < ROPE_MAX_UNITS; ++i) {
          if (i >= k->units || !ROPE_HAS_UNIT(i)) continue;
          rstd = rope_add_squares(rope_add_squares(rstd, x[i]), y[i]);
        }
        if (!k->units) {
          RW_ROLLED for (int unit = lane; unit < s->units; unit += lanes) {
            const rw_in at = head.in + rope_unit_begin(k, a, unit) * RW_SIZE;
            rstd = rope_add_squares(rope_add_squares(rstd, rw_load(at)), rw_load(at + rope_unit_distance(k, a) * RW_SIZE));
          }
        }
        RW_ROLLED for (int i = lane; i < s->rest; i += lanes) {
          rstd = rope_add_squares(rstd, rw_load(head.in + rope_rest_begin(a, i) * RW_SIZE));
        }
      }
      rstd = rope_sum_of_group(k, rstd, lane, lanes, exchange);
      const float mean = rstd * s->inverse_head_dim + a->p->eps;
      rstd = ROPE_DTYPE == 1 || k->reference ? rw_exact_rsqrt(mean) : rsqrt(mean);
    }
    if (h < heads) {
      rope_find_cache(k, a, &t, h, &head);
      RW_UNROLL for (int i = 0; i < ROPE_MAX_UNITS; ++i) {
        if (i >= k->units || !ROPE_HAS_UNIT(i)) continue;
        rope_write_unit(k, a, &head, rope_unit_begin(k, a, ROPE_UNIT(i)), x[i], y[i], rstd, cos[i], sin[i]);
      }
      if (!k->units) {
        RW_ROLLED for (int unit = lane; unit < s->units; unit += lanes) {
          const int begin = rope_unit_begin(k, a, unit);
          const rw_in at = head.in + begin * RW_SIZE;
          rw_floats c, sn;
          rope_cos_sin_of(k, a, &t, position, unit, &c, &sn);
          rope_write_unit(k, a, &head, begin, rw_load(at), rw_load(at + rope_unit_distance(k, a) * RW_SIZE), rstd, c, sn);
        }
      }
      RW_ROLLED for (int i = lane; i < s->rest; i += lanes) {
        rope_write_rest(k, a, &head, rope_rest_begin(a, i), rstd);
      }
      h += step;
    }
    ROPE_FETCH(h)
  }
  if (k->cache_dtype != kRopeNoDtype && s->store_v && t.slot >= 0) {
    // After the heads of q and k, in the same order: the group that would take the head after them takes the first of v.
    RW_ROLLED for (; h < all_heads; h += step) rope_store_v(k, a, &t, h - heads, lane, lanes);
  }
}
