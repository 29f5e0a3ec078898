// The gradient of norm and rotation. With n = x / rms, y = R (n * w) and g = R^T dY:
//
//   dX = (g w - n mean(g w n)) / rms                   one pass: reads x and dY, writes dX
//   dW = sum of g n over all heads of all tokens       two kernels: a sum of each work-group, then those added up (sums.cl)
//
// A work-group has heads of q or of k, not of both, so that its work-items add up one weight's gradient. A sub-group takes
// a token at a time, and the heads of that in turns; who owns what of a head, and which choices are constants, is as in
// rope.cl, but that a lane keeps one unit in registers, or none. Its sums lie where its unit is: in registers, or in the
// place of the lane's group in the workspace, which no other group touches before all have added up theirs.
// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/kernel/group.clh"
#include "backends/spirv/kernel/sum.clh"

typedef char rope_backward_params_size[sizeof(rope_backward_params) == ROPE_BACKWARD_PARAMS_SIZE ? 1 : -1];

// Floats wherever a float may lie.
#if ROPE_VECTOR == 1
#define RW_LOAD_SUMS(p) (*(p))
#define RW_STORE_SUMS(v, p) (*(p) = (v))
#else
#define RW_LOAD_SUMS(p) RW_CAT(vload, ROPE_VECTOR)(0, p)
#define RW_STORE_SUMS(v, p) RW_CAT(vstore, ROPE_VECTOR)(v, 0, p)
#endif

// Of one head.
typedef struct {
  rw_in x, grad, weight;
  rw_out out;
} rope_gradient;

RW_INLINE float rope_add_products(float sum, rw_floats v, rw_floats w) {
#if ROPE_VECTOR == 1
  return fma(v, w, sum);
#else
#define ROPE_ADD_PRODUCT(i) sum = fma(v.s##i, w.s##i, sum)
  ROPE_ADD_PRODUCT(0), ROPE_ADD_PRODUCT(1);
#if ROPE_VECTOR > 2
  ROPE_ADD_PRODUCT(2), ROPE_ADD_PRODUCT(3);
#endif
#if ROPE_VECTOR > 4
  ROPE_ADD_PRODUCT(4), ROPE_ADD_PRODUCT(5), ROPE_ADD_PRODUCT(6), ROPE_ADD_PRODUCT(7);
#endif
  return sum;
#endif
}

// A vector of g, times w.
RW_INLINE rw_floats rope_weighted(const __private rope_choices* k, const __private rope_all* a, rw_floats g, rw_in weight,
                                  int begin) {
  if (k->weight_dtype == kRopeNoDtype) return g;
  const rw_floats w = rw_load_floats(weight + begin * rw_size_of(k->weight_dtype), k->weight_dtype);
  return g * (a->s->zero_centered ? 1.0f + w : w);
}

// Goes on with the sum of x^2, or with that of g w n, over the vectors of a head.
RW_INLINE float rope_add_squares(float square, const __private rope_gradient* head, int begin) {
  const rw_floats x = rw_unpack(rw_load(head->x + begin * RW_SIZE));
  return rope_add_products(square, x, x);
}
RW_INLINE float rope_add_along(const __private rope_choices* k, const __private rope_all* a,
                               const __private rope_gradient* head, int begin, rw_floats x, rw_floats g, float rstd,
                               float along) {
  return rope_add_products(along, rope_weighted(k, a, g, head->weight, begin), x * rstd);
}

// The two vectors of a unit: x, and dY turned back. `plain`: choices that round nothing, as reference rounding rounds
// cosines and sines alone here.
RW_INLINE void rope_load_unit(const __private rope_choices* plain, const __private rope_all* a,
                              const __private rope_gradient* head, int begin, rw_floats cos, rw_floats sin,
                              __private rw_floats* x0, __private rw_floats* x1, __private rw_floats* g0,
                              __private rw_floats* g1) {
  const int second = begin + rope_unit_distance(plain, a);
  *x0 = rw_unpack(rw_load(head->x + begin * RW_SIZE));
  *x1 = rw_unpack(rw_load(head->x + second * RW_SIZE));
  *g0 = rw_unpack(rw_load(head->grad + begin * RW_SIZE));
  *g1 = rw_unpack(rw_load(head->grad + second * RW_SIZE));
  rope_rotate_unit(plain, g0, g1, cos, sin);
}

// Writes a vector of dX; n comes before its products, and of 1 / rms what makes greater first: products of subnormal
// numbers would lose what that brings back. What it adds to the weights' sums is returned.
RW_INLINE rw_floats rope_write_gradient(const __private rope_choices* k, const __private rope_all* a,
                                        const __private rope_gradient* head, int begin, rw_floats x, rw_floats g,
                                        float rstd, float mean_along) {
  const rw_floats unit = x * rstd;
  const float up = fmax(rstd, 1.0f), down = fmin(rstd, 1.0f);
  const rw_floats dx = down * fma(-unit, (rw_floats)(mean_along * up), rope_weighted(k, a, g * up, head->weight, begin));
  rw_store(head->out + begin * RW_SIZE, rw_pack(dx));
  return g * unit;
}

// The sums in memory: `at` is where those of a vector lie.
RW_INLINE void rope_put_sum(__global float* at, int head_dim, rw_floats high, rw_floats low) {
  RW_STORE_SUMS(high, at);
  RW_STORE_SUMS(low, at + head_dim);
}
RW_INLINE void rope_add_to_memory(__global float* at, int head_dim, rw_floats value) {
  rw_floats high = RW_LOAD_SUMS(at), low = RW_LOAD_SUMS(at + head_dim);
  rope_add_vector(&high, &low, value);
  rope_put_sum(at, head_dim, high, low);
}

ROPE_KERNEL void rope_backward_kernel(__global void* q, __global void* k_tensor, const __global void* positions,
                                      const __global void* offsets, const __global void* cos_table,
                                      const __global void* sin_table, const __global int* axes,
                                      const __global void* q_weight, const __global void* k_weight,
                                      __global void* q_out, __global void* k_out, const __global void* x_of_q,
                                      const __global void* x_of_k, __global float* sums, const __global rw_u64* turns,
                                      __global rope_fault* fault, rope_backward_params params) {
#ifdef ROPE_SPEC_0
  __local float exchange[ROPE_SUB_GROUP];
#else
  __local float* exchange = 0;
#endif
  // All fields of both structs: what clears the others is a copy that Intel's compiler keeps in memory.
#define ROPE_CHOICES(rounding)                                                                                           \
  {.interleaved = ROPE_CHOICE(0), .norm = 1, .weight_dtype = ROPE_CHOICE(2), .reference = (rounding),                    \
   .table_dtype = ROPE_CHOICE(4), .table_vector = ROPE_CHOICE(5), .axes = ROPE_CHOICE(6), .cache_dtype = kRopeNoDtype,   \
   .out_of_place = 1, .store_only = 0, .units = ROPE_CONSTANT(10), .lanes = ROPE_CONSTANT(11)}
  const rope_choices choices = ROPE_CHOICES(ROPE_CHOICE(3)), unrounded = ROPE_CHOICES(0);
  const int makes_sums = ROPE_CHOICE(7);
  const rope_all all = {.q = (rw_in)q, .k = (rw_in)k_tensor, .v = 0, .q_out = (rw_out)q_out, .k_out = (rw_out)k_out,
                        .k_cache = 0, .v_cache = 0, .positions = positions, .offsets = offsets, .cos = cos_table,
                        .sin = sin_table, .slots = 0, .axes = axes, .turns = turns, .q_weight = (rw_in)q_weight,
                        .k_weight = (rw_in)k_weight, .k_scale = 0, .v_scale = 0, .fault = fault, .p = &params.params,
                        .s = &params.shape};
  const __private rope_choices *k = &choices, *plain = &unrounded;
  const __private rope_all* a = &all;
  const __private rope_params* p = a->p;
  const __private rope_spirv_shape* s = a->s;
  const int head_dim = p->head_dim;

  const int id = (int)ROPE_LANE;
  const int lanes = k->lanes ? k->lanes : s->lanes;
  const int heads_at_once = k->lanes ? ROPE_HEADS_AT_ONCE(k->lanes) : s->heads_at_once;
  const int group = k->lanes ? id / k->lanes : rope_group_of(id, s->lane_multiplier);
  const int lane = id - group * lanes;
  const bool idle = !k->lanes && group >= heads_at_once;  // left over where lanes do not divide 16
  const int work_group = (int)get_group_id(0);
  const bool of_k = work_group >= params.q_groups;
  const int heads = of_k ? p->k_heads : p->q_heads;
  // The unit in registers.
  const bool keeps = k->units && (k->lanes || lane < s->units);
  const int begin0 = rope_unit_begin(k, a, lane), begin1 = begin0 + rope_unit_distance(k, a);

  const int sets = rope_sums_of_group(s->sub_groups, heads_at_once), size = rope_sums_size(head_dim);
  __global float* const of_work_group = sums + (rw_i64)work_group * sets * size;
  __global float* const own = of_work_group + (rw_i64)((int)ROPE_SUB_GROUP_INDEX * heads_at_once + group) * size;
  const rw_floats zero = (rw_floats)0.0f;
  rw_floats high0 = zero, low0 = zero, high1 = zero, low1 = zero;
  if (makes_sums && !idle) {
    if (!k->units) {
      RW_ROLLED for (int unit = lane; unit < s->units; unit += lanes) {
        const int begin = rope_unit_begin(k, a, unit);
        rope_put_sum(own + begin, head_dim, zero, zero);
        rope_put_sum(own + begin + rope_unit_distance(k, a), head_dim, zero, zero);
      }
    }
    RW_ROLLED for (int i = lane; i < s->rest; i += lanes) {
      rope_put_sum(own + rope_rest_begin(a, i), head_dim, zero, zero);
    }
  }

  const uint rows = (uint)(p->batch * p->tokens);
  const int of_its_kind = of_k ? params.k_groups : params.q_groups, place = of_k ? work_group - params.q_groups : work_group;
  const uint step = (uint)rope_row_step(of_its_kind, s->sub_groups);
  RW_ROLLED for (uint row = (uint)rope_first_row(place, s->sub_groups, (int)ROPE_SUB_GROUP_INDEX); row < rows; row += step) {
    const uint batch = row / (uint)p->tokens, token = row - batch * (uint)p->tokens;
    const rope_token t = rope_plan_token(k, a, batch, token, id == 0 && (!of_k || p->q_heads == 0));
    const rw_in x_row =
        of_k ? (rw_in)x_of_k + rope_offset(&params.k, &t, 0) * RW_SIZE
             : (rw_in)x_of_q + rope_offset(&params.q, &t, 0) * RW_SIZE;
    const rw_in grad_row = of_k ? a->k + rope_offset(&p->k, &t, 0) * RW_SIZE : a->q + rope_offset(&p->q, &t, 0) * RW_SIZE;
    const rw_out out_row =
        of_k ? a->k_out + rope_offset(&p->k_out, &t, 0) * RW_SIZE : a->q_out + rope_offset(&p->q_out, &t, 0) * RW_SIZE;
    const rw_i64 x_step = of_k ? params.k.head : params.q.head, grad_step = of_k ? p->k.head : p->q.head;
    const rw_i64 out_step = of_k ? p->k_out.head : p->q_out.head;
    if (t.poisoned) {
      RW_ROLLED for (int h = idle ? heads : group; h < heads; h += heads_at_once) {
        rope_head head;
        head.in = head.out = out_row + h * out_step * RW_SIZE;
        rope_fill_head(a, &head, 1, lane, lanes);
      }
      continue;
    }
    const rw_i64 position = k->axes ? 0 : rope_position_of(a, batch, token, 0);
    rw_floats cos, sin;
    if (keeps) rope_cos_sin_of(k, a, &t, position, lane, &cos, &sin);

    // All groups of a sub-group take the same number of turns, so that all its lanes meet at the sums of a head.
    RW_ROLLED for (int turn = 0; turn < heads; turn += heads_at_once) {
      const int h = turn + group;
      const bool works = !idle && h < heads;
      rope_gradient head;
      head.x = x_row + h * x_step * RW_SIZE;
      head.grad = grad_row + h * grad_step * RW_SIZE;
      head.out = out_row + h * out_step * RW_SIZE;
      head.weight = of_k ? a->k_weight : a->q_weight;
      rw_floats x0, x1, g0, g1;
      float square = 0.0f, along = 0.0f;
      if (works) {
        if (keeps) {
          rope_load_unit(plain, a, &head, begin0, cos, sin, &x0, &x1, &g0, &g1);
          square = rope_add_products(rope_add_products(square, x0, x0), x1, x1);
        }
        if (!k->units) {
          RW_ROLLED for (int unit = lane; unit < s->units; unit += lanes) {
            const int begin = rope_unit_begin(k, a, unit), second = begin + rope_unit_distance(k, a);
            square = rope_add_squares(rope_add_squares(square, &head, begin), &head, second);
          }
        }
        RW_ROLLED for (int i = lane; i < s->rest; i += lanes) {
          square = rope_add_squares(square, &head, rope_rest_begin(a, i));
        }
      }
      const float mean = rope_sum_of_group(k, square, lane, lanes, exchange) * s->inverse_head_dim + p->eps;
      const float rstd = ROPE_DTYPE == 1 ? rw_exact_rsqrt(mean) : rsqrt(mean);
      if (works) {
        if (keeps) {
          along = rope_add_along(k, a, &head, begin0, x0, g0, rstd, along);
          along = rope_add_along(k, a, &head, begin1, x1, g1, rstd, along);
        }
        if (!k->units) {
          RW_ROLLED for (int unit = lane; unit < s->units; unit += lanes) {
            const int begin = rope_unit_begin(k, a, unit), second = begin + rope_unit_distance(k, a);
            rw_floats c, sn, vx0, vx1, vg0, vg1;
            rope_cos_sin_of(k, a, &t, position, unit, &c, &sn);
            rope_load_unit(plain, a, &head, begin, c, sn, &vx0, &vx1, &vg0, &vg1);
            along = rope_add_along(k, a, &head, begin, vx0, vg0, rstd, along);
            along = rope_add_along(k, a, &head, second, vx1, vg1, rstd, along);
          }
        }
        RW_ROLLED for (int i = lane; i < s->rest; i += lanes) {
          const int begin = rope_rest_begin(a, i);
          along = rope_add_along(k, a, &head, begin, rw_unpack(rw_load(head.x + begin * RW_SIZE)),
                                 rw_unpack(rw_load(head.grad + begin * RW_SIZE)), rstd, along);
        }
      }
      const float mean_along = rope_sum_of_group(k, along, lane, lanes, exchange) * s->inverse_head_dim;
      if (!works) continue;
      if (keeps) {
        const rw_floats gain0 = rope_write_gradient(k, a, &head, begin0, x0, g0, rstd, mean_along);
        const rw_floats gain1 = rope_write_gradient(k, a, &head, begin1, x1, g1, rstd, mean_along);
        if (makes_sums) {
          rope_add_vector(&high0, &low0, gain0);
          rope_add_vector(&high1, &low1, gain1);
        }
      }
      if (!k->units) {
        RW_ROLLED for (int unit = lane; unit < s->units; unit += lanes) {
          const int begin = rope_unit_begin(k, a, unit), second = begin + rope_unit_distance(k, a);
          rw_floats c, sn, vx0, vx1, vg0, vg1;
          rope_cos_sin_of(k, a, &t, position, unit, &c, &sn);
          rope_load_unit(plain, a, &head, begin, c, sn, &vx0, &vx1, &vg0, &vg1);
          const rw_floats gain0 = rope_write_gradient(k, a, &head, begin, vx0, vg0, rstd, mean_along);
          const rw_floats gain1 = rope_write_gradient(k, a, &head, second, vx1, vg1, rstd, mean_along);
          if (makes_sums) {
            rope_add_to_memory(own + begin, head_dim, gain0);
            rope_add_to_memory(own + second, head_dim, gain1);
          }
        }
      }
      RW_ROLLED for (int i = lane; i < s->rest; i += lanes) {
        const int begin = rope_rest_begin(a, i);
        const rw_floats gain =
            rope_write_gradient(k, a, &head, begin, rw_unpack(rw_load(head.x + begin * RW_SIZE)),
                                rw_unpack(rw_load(head.grad + begin * RW_SIZE)), rstd, mean_along);
        if (makes_sums) rope_add_to_memory(own + begin, head_dim, gain);
      }
    }
  }

  if (!makes_sums) return;
  if (!idle && keeps) {
    rope_put_sum(own + begin0, head_dim, high0, low0);
    rope_put_sum(own + begin1, head_dim, high1, low1);
  }
  // Of all groups of the work-group, in their order, into the place of the first.
  barrier(CLK_GLOBAL_MEM_FENCE);
  RW_ROLLED for (int i = (int)get_local_id(0); i < head_dim; i += (int)get_local_size(0)) {
    float high = 0.0f, low = 0.0f;
    RW_ROLLED for (int set = 0; set < sets; ++set) {
      rope_add_sum(&high, &low, of_work_group + (rw_i64)set * size + i, head_dim);
    }
    of_work_group[i] = high;
    of_work_group[head_dim + i] = low;
  }
}
