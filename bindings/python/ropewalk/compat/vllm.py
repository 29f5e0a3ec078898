"""vLLM's rotary operators (`torch.ops._C`; for Intel GPUs `torch.ops._xpu_C`), by their own names and arguments.

Errors of an argument are ValueErrors (TypeErrors where its type is wrong); nothing was written then.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from . import _common

__all__ = [
    "apply_rotary_emb",
    "deepseek_scaling_rope",
    "fused_qk_norm_mrope",
    "fused_qk_norm_rope",
    "fused_qk_norm_rope_kvcache",
    "multimodal_rotary_embedding",
    "rotary_embedding",
]


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
    if slots.dim() == 1:
        slots = _common.slot_of_each(slots, qkv.shape[0])
    outputs = [x.unflatten(-1, (-1, head_dim)) if x.dim() == 2 and x.shape[1] % head_dim == 0 else x
               for x in (q_out, k_out)]  # fmt: skip
    names = {"v": "qkv", "k_cache": "key_cache", "v_cache": "value_cache"}
    _common.norm_rope_heads(function, names, q, k, (q_weight, k_weight), eps, is_neox, positions=positions,
                            cos_sin=cos_sin_cache, q_out=outputs[0], k_out=outputs[1], v=v, k_cache=key_cache,
                            v_cache=value_cache, slots=slots)  # fmt: skip


def fused_qk_norm_mrope(
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
    positions: torch.Tensor,
    mrope_section_t: int,
    mrope_section_h: int,
) -> None:
    """As `fused_qk_norm_rope`, by positions with three axes.

    Args:
        positions: [3, tokens] int32 or int64, rows of the table: time, height and width.
        mrope_section_t, mrope_section_h: how many pairs time and height have; width has the others.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_norm_mrope"
    q, k = _common.packed(function, qkv, num_heads_q, num_heads_k, num_heads_v, head_dim)
    _common.tensors(function, cos_sin_cache=cos_sin_cache, positions=positions)
    pairs = cos_sin_cache.shape[-1] // 2
    sections = [mrope_section_t, mrope_section_h, pairs - mrope_section_t - mrope_section_h]
    axes = _common.axes_of(function, sections, pairs, False, cos_sin_cache.device)
    _common.norm_rope_heads(function, {}, q, k, (q_weight, k_weight), eps, is_neox, positions=positions,
                            cos_sin=cos_sin_cache, axes=axes)  # fmt: skip


def multimodal_rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    mrope_section: list[int],
) -> None:
    """As `rotary_embedding`, by positions with three axes.

    Args:
        positions: [3, tokens] int32 or int64, rows of the table: time, height and width.
        mrope_section: how many pairs each axis has, one behind the other.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.mrope("multimodal_rotary_embedding", {}, positions, query, key, head_size, cos_sin_cache, is_neox, 0,
                  list(mrope_section) if isinstance(mrope_section, (list, tuple)) else mrope_section)  # fmt: skip


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool = False) -> torch.Tensor:
    """vLLM's function for Intel GPUs (`vllm_xpu_kernels.rotary`): x by a row of the table for each token; autograd goes
    through it.

    Args:
        x: [tokens, heads, head_dim] or [batch, tokens, heads, head_dim] bfloat16, float16 or float32.
        cos, sin: [tokens, rotary_dim/2] float32, float16 or bfloat16.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Returns:
        A tensor like x.

    Raises:
        ValueError: an argument does not fit.
    """
    function = "apply_rotary_emb"
    _common.tensors(function, x=x, cos=cos, sin=sin)
    if x.dim() not in (3, 4):
        raise ValueError(f"{function}: x must be [batch?, tokens, heads, head_dim], but is {list(x.shape)}")
    return _common.differentiable(function, {"q": "x"}, x, None, cos=cos, sin=sin,
                                  pairing=_common.pairing(is_neox))[0]  # fmt: skip


def deepseek_scaling_rope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    rotary_dim: int,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's function for Intel GPUs: query and key by a table into new tensors; autograd goes through it.

    Args:
        positions: [tokens] int32 or int64, rows of the table.
        query, key: [tokens, heads, head_dim] bfloat16, float16 or float32.
        offsets: like positions, added to them.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Returns:
        The new query and key.

    Raises:
        ValueError: an argument does not fit.
    """
    function = "deepseek_scaling_rope"
    _common.tensors(function, positions=positions, query=query, key=key, cos_sin_cache=cos_sin_cache)
    table = _common.by_table(function, cos_sin_cache, positions, is_neox, rotary_dim)
    return _common.rotate_new(function, {"q": "query", "k": "key"}, query, key, offsets=offsets, **table)
