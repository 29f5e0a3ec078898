// The OpenCL C kernel: one body. The tensors' dtype and the width of an access are macros, ROPE_DTYPE and ROPE_VECTOR, as
// OpenCL C has no templates; what else costs speed is a specialisation constant, so that one SPIR-V module holds every
// variant; what costs none is read from the arguments, the same for all work-items.
//
// As in the CUDA kernel a group of lanes works on a head, here of one sub-group of 16, and a lane holds units of two
// vectors that belong together: in halves (neox) the second lies half the rotated part behind the first, and their elements
// pair up; of neighbours (interleaved) both vectors hold whole pairs, and lie apart only to keep accesses together. So no
// pairing needs a shuffle. A work-group is of one token; a lane's cosines and sines serve all its heads.
// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/kernel/group.clh"

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

// ---------------------------------------------------------------------------------------------------------------------
// Where heads lie, and what is written there

RW_INLINE rw_i64 rope_slot_offset(const __private rope_all* a, const __private rope_strides* cache, rw_i64 slot) {
  const rw_i64 page = (rw_i64)(mul_hi((rw_u64)slot * 2, a->s->page_multiplier) >> a->s->page_shift);
  return page * cache->batch + (slot - page * a->p->page_size) * cache->token;
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
