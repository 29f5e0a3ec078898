"""A function by its parameters."""


# SPDX-License-Identifier: Apache-2.0
def fused_qk_norm_rope(
    qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, base, is_neox, position_ids, factor,
    low, high, attention_factor, rotary_dim=None,
):  # fmt: skip
    raise NotImplementedError
