// The gradient's second kernel: adds up the sums that the work-groups of the first have left, in an order that is always the
// same. A work-group takes 16 elements of a weight's gradient, each work-item every so many sums of one of them.
// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/kernel/args.h"
#include "backends/spirv/kernel/sum.clh"

typedef char rope_sums_params_size[sizeof(rope_sums_params) == ROPE_SUMS_PARAMS_SIZE ? 1 : -1];

__kernel void rope_sums_kernel(const __global float* sums, __global float* q_weight_grad, __global float* k_weight_grad,
                               rope_sums_params params) {
  __local float highs[ROPE_SUMS_MOST_ITEMS], lows[ROPE_SUMS_MOST_ITEMS];
  const int head_dim = params.head_dim, id = (int)get_local_id(0), items = (int)get_local_size(0);
  const int element = (int)get_group_id(0) * ROPE_SUMS_ELEMENTS + id % ROPE_SUMS_ELEMENTS;
  // Those of q first, where they are wanted.
  const bool of_k = !q_weight_grad || get_group_id(1) == 1;
  const int begin = of_k ? params.q_groups : 0, count = of_k ? params.k_groups : params.q_groups;
  float high = 0.0f, low = 0.0f;
  if (element < head_dim) {
    RW_ROLLED for (int i = id / ROPE_SUMS_ELEMENTS; i < count; i += items / ROPE_SUMS_ELEMENTS) {
      rope_add_sum(&high, &low, sums + (rw_i64)(begin + i) * params.stride + element, head_dim);
    }
  }
  highs[id] = high;
  lows[id] = low;
  barrier(CLK_LOCAL_MEM_FENCE);
  if (id >= ROPE_SUMS_ELEMENTS || element >= head_dim) return;
  RW_ROLLED for (int i = id + ROPE_SUMS_ELEMENTS; i < items; i += ROPE_SUMS_ELEMENTS) {
    rope_add_float(&high, &low, highs[i]);
    low += lows[i];
  }
  (of_k ? k_weight_grad : q_weight_grad)[element] = high + low;
}
