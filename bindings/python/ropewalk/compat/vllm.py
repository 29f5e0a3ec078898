"""vLLM's rotary operators (`torch.ops._C`), by their own names and arguments.

Errors of an argument are ValueErrors (TypeErrors where its type is wrong); nothing was written then.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from . import _common

__all__ = ["fused_qk_norm_rope", "fused_qk_norm_rope_kvcache", "rotary_embedding"]


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotates query and key in place by a table.

    Args:
        positions: [tokens] or [batch, tokens] int32 or int64, rows of the table.
        query, key: positions' shape, or the number of positions, in front; behind it heads * head_size elements, or
            heads, head_size. key may be None.
        cos_sin_cache: [rows, rotary_dim] of any of the three dtypes: cosines, then sines. One of query's own 16-bit
            dtype is calculated with in that dtype, as the original does: each product rounds, then the sum.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).
        rope_dim_offset: where the rotated part begins in a head.
        inverse: rotate by the negative angles.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.rotate_flat("rotary_embedding", positions, query, key, head_size, cos_sin_cache, is_neox,
                        rounding=_common.rounding_as(query, cos_sin_cache), rotary_offset=rope_dim_offset,
                        inverse=inverse)  # fmt: skip


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    forced_token_heads_per_warp: int = -1,
) -> None:
    """RMSNorm of each head of q and k, then the rotation by a table, in place in packed rows. V is left alone.

    Args:
        qkv: [tokens, (num_heads_q + num_heads_k + num_heads_v) * head_dim] bfloat16, float16 or float32; rows at any
            distance.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).
        position_ids: [tokens] int32 or int64, rows of the table.
        forced_token_heads_per_warp: taken and ignored.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_norm_rope"
    q, k = _common.packed(function, qkv, num_heads_q, num_heads_k, num_heads_v, head_dim)
    _common.tensors(function, cos_sin_cache=cos_sin_cache, position_ids=position_ids)
    _common.norm_rope_heads(function, {"positions": "position_ids"}, q, k, (q_weight, k_weight), eps, is_neox,
                            positions=position_ids, cos_sin=cos_sin_cache)  # fmt: skip


def fused_qk_norm_rope_kvcache(
    qkv: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    token_heads_per_warp: int = -1,
) -> None:
    """As `fused_qk_norm_rope`, into q_out and k_out, and into a paged KV cache: new k and v as it is. qkv is only read.

    Args:
        q_out, k_out: [tokens, heads * head_dim] or [tokens, heads, head_dim] of qkv's dtype.
        key_cache, value_cache: [pages, page_size, num_heads_k, head_dim] of qkv's dtype, any strides.
        slots: [at most tokens] int32 or int64: page * page_size + place of each token; -1, and tokens behind the last:
            not stored.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_norm_rope_kvcache"
    q, k = _common.packed(function, qkv, num_heads_q, num_heads_k, num_heads_v, head_dim)
    _common.tensors(function, q_out=q_out, k_out=k_out, cos_sin_cache=cos_sin_cache, positions=positions,
                    key_cache=key_cache, value_cache=value_cache, slots=slots)  # fmt: skip
    if num_heads_v != num_heads_k:
        raise ValueError(f"{function}: num_heads_v must be num_heads_k, {num_heads_k}, but is {num_heads_v}")
    v = qkv.view(qkv.shape[0], -1, head_dim)[:, num_heads_q + num_heads_k :]
    missing = qkv.shape[0] - slots.shape[0] if slots.dim() == 1 else 0
    if missing > 0:
        slots = torch.nn.functional.pad(slots, (0, missing), value=-1)
    outputs = [x.unflatten(-1, (-1, head_dim)) if x.dim() == 2 and x.shape[1] % head_dim == 0 else x
               for x in (q_out, k_out)]  # fmt: skip
    names = {"v": "qkv", "k_cache": "key_cache", "v_cache": "value_cache"}
    _common.norm_rope_heads(function, names, q, k, (q_weight, k_weight), eps, is_neox, positions=positions,
                            cos_sin=cos_sin_cache, q_out=outputs[0], k_out=outputs[1], v=v, k_cache=key_cache,
                            v_cache=value_cache, slots=slots)  # fmt: skip
