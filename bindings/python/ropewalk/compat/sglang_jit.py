"""SGLang's rotary kernels that are compiled at run time, by their own names and arguments.

Everything works in place on torch tensors of every device that Ropewalk serves. Every error of an argument is a
ValueError (a TypeError where its type is wrong) that names the argument, its value and what is accepted; nothing was
written then.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import _common

__all__ = [
    "FusedSetKVBufferArg",
    "apply_rope_inplace",
    "apply_rope_inplace_with_kvcache",
    "apply_rope_with_cos_sin_cache_inplace",
    "can_use_fused_inplace_qknorm_rope",
    "can_use_fused_qk_norm_rope",
    "fused_inplace_qknorm_rope",
    "fused_qk_norm_mrope",
    "fused_qk_norm_rope",
    "fused_qk_rope_reshape_and_cache",
    "fused_qknorm_rope_out_of_place",
    "fused_qknorm_rope_pack_kv",
    "rotary_embedding",
    "table_qk_norm_rope_",
    "triton_mrope_fused",
]


@dataclass
class FusedSetKVBufferArg:
    """The KV buffers that a rotation also fills.

    Args:
        value: [tokens, k_heads * v_dim] or [tokens, k_heads, v_dim], like key.
        k_buffer, v_buffer: [slots, k_heads * head_dim] or [slots, k_heads, head_dim]; key's dtype or fp8.
        cache_loc: [tokens] int32 or int64: the slot of each token; negative: not stored.
        k_scale, v_scale: of fp8 buffers, which hold k / k_scale.
    """

    value: torch.Tensor
    k_buffer: torch.Tensor
    v_buffer: torch.Tensor
    cache_loc: torch.Tensor
    k_scale: Any = None
    v_scale: Any = None


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    base: float,
    is_neox: bool,
    position_ids: torch.Tensor,
    factor: float,
    low: float,
    high: float,
    attention_factor: float,
    rotary_dim: int | None = None,
) -> None:
    """RMSNorm of each head of q and k, then the rotation, in place in packed rows. V is left alone.

    The frequency of pair i is f = base^(-2i/rotary_dim). With a factor other than 1 (YaRN: Peng et al., "YaRN", 2023)
    it is (f / factor) * r + f * (1 - r) with r = (i - low) / (high - low) held to [0, 1]; if |high - low| <= 1e-6, high
    is raised by 0.001. The angles are computed exactly at every position.

    Args:
        qkv: [tokens, (num_heads_q + num_heads_k + num_heads_v) * head_dim] bfloat16, float16 or float32; rows at any
            distance.
        head_dim: even.
        eps: of the norm.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).
        position_ids: [tokens] int32 or int64.
        attention_factor: multiplies the rotated elements.
        rotary_dim: the first elements of a head that are rotated; even. None: head_dim.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.norm_rope("fused_qk_norm_rope", qkv, (num_heads_q, num_heads_k, num_heads_v), head_dim, eps,
                      (q_weight, k_weight), is_neox, position_ids, rotary_dim,
                      (base, factor, low, high, attention_factor))  # fmt: skip


def _devices(device: torch.device | str | None) -> list[torch.device | str]:
    if device is not None:
        return [device]
    return [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()] or ["cpu"]


def can_use_fused_qk_norm_rope(
    head_dim: int,
    is_neox: bool,
    dtype: torch.dtype,
    yarn: bool = False,
    *,
    num_heads_q: int = 32,
    num_heads_k: int = 8,
    num_heads_v: int = 8,
    eps: float = 1e-6,
    rotary_dim: int | None = None,
    num_tokens: int | Iterable[int] = 1,
    position_dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
) -> bool:
    """Whether `fused_qk_norm_rope` serves such calls here. Never raises.

    On a GPU it compiles and loads the kernel, so that the first call need not. The kernel is specialised for more than
    the first four arguments say: give the others as the calls will have them, and the numbers of tokens of interest, to
    have that very one built.

    Args:
        yarn: whether attention_factor will be other than 1.
        device: where the tensors will be. None: on the current device of every kind of GPU that torch finds here,
            CUDA's and Intel's; where there is none, on the CPU. The backend is the one that serves such tensors: the
            forced one, if `ropewalk.force_backend` has named one.

    Returns:
        True if the call would be served.
    """
    try:
        if not isinstance(dtype, torch.dtype):
            return False
        heads = (num_heads_q, num_heads_k, num_heads_v)
        counts = [num_tokens] if isinstance(num_tokens, int) else list(num_tokens)
        for on in _devices(device):
            weight = torch.empty(head_dim, dtype=dtype, device=on)
            for tokens in counts:
                qkv = torch.empty((tokens, sum(heads) * head_dim), dtype=dtype, device=on)
                position_ids = torch.empty(tokens, dtype=position_dtype, device=on)
                _common.norm_rope("fused_qk_norm_rope", qkv, heads, head_dim, eps, (weight, weight), is_neox,
                                  position_ids, rotary_dim, (1e4, 1.0, 0.0, 1.0, 2.0 if yarn else 1.0),
                                  call=_common.check)  # fmt: skip
        return True
    except Exception:  # it promises an answer
        return False


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotates q and k in place by a table.

    Args:
        q, k: [tokens, heads, head_dim] bfloat16, float16 or float32, any token and head strides; their dtypes and head
            sizes may differ.
        cos_sin_cache: [rows, rope_dim] float32: cosines, then sines.
        positions: [tokens] int32 or int64, rows of the table.
        is_neox: True: pairs (i, i + rope_dim/2); False: pairs (2i, 2i + 1).
        rope_dim: the first elements of a head that are rotated. 0: what the table says.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_inplace"
    _common.float_cache(function, cos_sin_cache)
    _common.rotate_3d(function, q, k, cos_sin_cache, positions, is_neox, rope_dim)


def apply_rope_inplace_with_kvcache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    out_loc: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """As `apply_rope_inplace`; the rotated k and v as it is are also written to rows `out_loc` of the caches.

    Args:
        q, k: [tokens, heads, head_dim], of one dtype and head size.
        v: [tokens, k_heads, v_dim] or [tokens, k_heads * v_dim], k's dtype.
        k_cache: [slots, k_heads * head_dim] or [slots, k_heads, head_dim], k's dtype or fp8; v_cache likewise with
            v_dim.
        out_loc: [tokens] int32 or int64; negative: not stored.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_inplace_with_kvcache"
    _common.float_cache(function, cos_sin_cache)
    store = _common.flat_store(function, k, v, k_cache, v_cache, out_loc, {})
    _common.rotate_3d(function, q, k, cos_sin_cache, positions, is_neox, rope_dim, {"slots": "out_loc"}, **store)


def apply_rope_with_cos_sin_cache_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
    fused_args: Any = None,
) -> None:
    """`apply_rope_inplace`, or `apply_rope_inplace_with_kvcache` if fused_args (a FusedSetKVBufferArg) is given."""
    function = "apply_rope_with_cos_sin_cache_inplace"
    _common.float_cache(function, cos_sin_cache)
    store = {} if fused_args is None else _common.stored(function, k, fused_args)
    _common.rotate_3d(function, q, k, cos_sin_cache, positions, is_neox, rope_dim, _common.BUFFERS, **store)


def fused_inplace_qknorm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
    round_norm_before_rope: bool = False,
    cache_has_full_width: bool = False,
) -> None:
    """RMSNorm of each head of q and k, then the rotation by a table, in place.

    Args:
        q, k: [tokens, heads, head_dim] or [batch, tokens, heads, head_dim] bfloat16, float16 or float32.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        cos_sin_cache: [rows, rope_dim] float32, float16 or bfloat16: cosines, then sines.
        positions: [tokens], [batch, tokens] or [batch * tokens] int32 or int64.
        is_neox: True: pairs (i, i + rope_dim/2); False: pairs (2i, 2i + 1).
        head_dim, rope_dim: 0: what the tensors say.
        round_norm_before_rope: round to q's dtype after the norm too, and, with a table of that dtype, each product;
            costs a second pass.
        cache_has_full_width: cos_sin_cache is [rows, 2 * rope_dim]: every element has a cosine and a sine of its own,
            as transformers and diffusers hold them; costs another pass, and room for q and k.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.inplace_norm_rope(q, k, q_weight, k_weight, cos_sin_cache, positions, is_neox, eps, head_dim, rope_dim,
                              round_norm_before_rope, cache_has_full_width)  # fmt: skip


def can_use_fused_inplace_qknorm_rope(
    head_dim: int,
    rope_dim: int,
    is_neox: bool,
    dtype: torch.dtype,
    cache_dtype: torch.dtype = torch.float32,
    round_norm_before_rope: bool = False,
    pack_kv: bool = False,
    cache_has_full_width: bool = False,
    *,
    num_heads_q: int = 24,
    num_heads_k: int = 24,
    num_tokens: int = 1,
    position_dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> bool:
    """Whether `fused_inplace_qknorm_rope`, or with pack_kv `fused_qknorm_rope_pack_kv`, serves such calls here. Never
    raises.

    On a GPU it compiles and loads the kernels, as `can_use_fused_qk_norm_rope` does; what the call will have is given
    by the arguments from num_heads_q on.

    Args:
        cache_dtype: of cos_sin_cache.
        device: as for `can_use_fused_qk_norm_rope`.

    Returns:
        True if the call would be served.
    """
    try:
        if not (isinstance(dtype, torch.dtype) and isinstance(cache_dtype, torch.dtype)):
            return False
        if not 0 < rope_dim <= head_dim or (pack_kv and cache_has_full_width):
            return False
        width = 2 * rope_dim if cache_has_full_width else rope_dim
        for on in _devices(device):
            q = torch.empty((num_tokens, num_heads_q, head_dim), dtype=dtype, device=on)
            k = torch.empty((num_tokens, num_heads_k, head_dim), dtype=dtype, device=on)
            weight = torch.empty(head_dim, dtype=dtype, device=on)
            cache = torch.empty((num_tokens, width), dtype=cache_dtype, device=on)
            positions = torch.zeros(num_tokens, dtype=position_dtype, device=on)
            others = (weight, weight, cache, positions, is_neox, 1e-6, head_dim, rope_dim, round_norm_before_rope)
            if pack_kv:
                q, k = q[None], k[None]
                _pack_kv(q, k, k, k[:, :0], k[:, :0], torch.stack((k, k)), *others, only_check=True)
            else:
                _common.inplace_norm_rope(q, k, *others, cache_has_full_width, only_check=True)
        return True
    except Exception:  # it promises an answer
        return False


def fused_qknorm_rope_out_of_place(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
    round_norm_before_rope: bool = False,
    cache_has_full_width: bool = False,
) -> None:
    """`fused_inplace_qknorm_rope` into other tensors; q and k stay as they are.

    Args:
        q_out, k_out: like q and k, any strides; written.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qknorm_rope_out_of_place"
    _common.tensors(function, q_out=q_out, k_out=k_out)
    _common.inplace_norm_rope(q, k, q_weight, k_weight, cos_sin_cache, positions, is_neox, eps, head_dim, rope_dim,
                              round_norm_before_rope, cache_has_full_width, function=function,
                              outputs=(q_out, k_out))  # fmt: skip


def fused_qknorm_rope_pack_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    packed_kv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
    round_norm_before_rope: bool = False,
) -> None:
    """`fused_inplace_qknorm_rope`, but k goes behind a prefix into one tensor with v; k itself stays as it is.

    Args:
        q: [batch, tokens, q_heads, head_dim], rotated in place; k, v: [batch, tokens, k_heads, head_dim].
        k_prefix, v_prefix: [batch, prefix_tokens, k_heads, head_dim], k's dtype; copied as they are.
        packed_kv: [2, batch, prefix_tokens + tokens, k_heads, head_dim], k's dtype; written: k_prefix and the rotated
            k, then v_prefix and v.
        positions: [tokens], [batch, tokens] or [batch * tokens] int32 or int64.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _pack_kv(q, k, v, k_prefix, v_prefix, packed_kv, q_weight, k_weight, cos_sin_cache, positions, is_neox, eps,
             head_dim, rope_dim, round_norm_before_rope)  # fmt: skip


def _pack_kv(
    q: Any,
    k: Any,
    v: Any,
    k_prefix: Any,
    v_prefix: Any,
    packed_kv: Any,
    *others: Any,
    only_check: bool = False,
) -> None:
    """`fused_qknorm_rope_pack_kv`; others: the arguments of `fused_inplace_qknorm_rope` from q_weight on."""
    function = "fused_qknorm_rope_pack_kv"
    _common.tensors(function, q=q, k=k, v=v, k_prefix=k_prefix, v_prefix=v_prefix, packed_kv=packed_kv)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{function}: {name} must be [batch, tokens, heads, head_dim], but is {list(x.shape)}")
    if k_prefix.dim() != 4:
        raise ValueError(
            f"{function}: k_prefix must be [batch, prefix_tokens, k_heads, head_dim], but is {list(k_prefix.shape)}"
        )
    batch, tokens, *head = k.shape
    prefix = k_prefix.shape[1]
    shapes = {
        "v": (v, [batch, tokens, *head]),
        "k_prefix": (k_prefix, [batch, prefix, *head]),
        "v_prefix": (v_prefix, [batch, prefix, *head]),
        "packed_kv": (packed_kv, [2, batch, prefix + tokens, *head]),
    }
    for name, (x, shape) in shapes.items():
        if list(x.shape) != shape:
            raise ValueError(f"{function}: {name} must be {shape}, but is {list(x.shape)}")
        if x.dtype != k.dtype or x.device != k.device:
            raise ValueError(f"{function}: {name} must be {k.dtype} on {k.device}, but is {x.dtype} on {x.device}")
    _common.without_gradient(function, v=v, k_prefix=k_prefix, v_prefix=v_prefix, packed_kv=packed_kv)
    keys, values = packed_kv.unbind()
    _common.inplace_norm_rope(q, k, *others, function=function, outputs=(q, keys[:, prefix:]), only_check=only_check,
                              output_names={"q_out": "q", "k_out": "packed_kv"})  # fmt: skip
    if not only_check:
        keys[:, :prefix] = k_prefix
        values[:, :prefix] = v_prefix
        values[:, prefix:] = v


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates query and key in place by a table, and returns them.

    Args:
        positions: [tokens] or [batch, tokens] int32 or int64, rows of the table.
        query, key: [.., heads * head_size] or [.., heads, head_size] with positions' shape in front; key may be None.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines. A 16-bit one of
            query's dtype has each product rounded to it; with another the rotation is in float32 and rounds once.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.rotate_flat("rotary_embedding", positions, query, key, head_size, cos_sin_cache, is_neox,
                        rounding=_common.rounding_as(query, cos_sin_cache))  # fmt: skip
    return query, key


def fused_qk_norm_mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    axis_map: torch.Tensor,
    eps: float,
    *,
    value: torch.Tensor | None = None,
    key_cache: torch.Tensor | None = None,
    value_cache: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """RMSNorm of each head of q and k, then the rotation of halves by positions with three axes, in place; with the
    last four the rotated k and value also go into the caches.

    Args:
        q, k: [tokens, heads, head_dim] bfloat16, float16 or float32.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.
        positions: [3, tokens] int32 or int64, rows of the table.
        axis_map: [rotary_dim/2] int32 or int64: the axis of each pair.
        value: [tokens, k_heads, head_dim] or [tokens, k_heads * head_dim].
        key_cache, value_cache: [slots, k_heads * head_dim] or [slots, k_heads, head_dim] of k's dtype or fp8.
        slots: [tokens] int32 or int64; negative: not stored.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_norm_mrope"
    _common.heads_apart(function, q)
    _common.tensors(function, cos_sin_cache=cos_sin_cache, positions=positions, axis_map=axis_map)
    names = {"axes": "axis_map", "v": "value", "k_cache": "key_cache", "v_cache": "value_cache"}
    store = {}
    if slots is not None or key_cache is not None or value_cache is not None or value is not None:
        _common.tensors(function, value=value, key_cache=key_cache, value_cache=value_cache, slots=slots)
        store = _common.flat_store(function, k, value, key_cache, value_cache, slots, names)
    _common.rope(function, names, q, k, positions=positions, axes=axis_map.int(), cos_sin=cos_sin_cache, norm="rms",
                 q_weight=q_weight, k_weight=k_weight, eps=eps, **store)  # fmt: skip


def table_qk_norm_rope_(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    num_q_heads: int,
    num_k_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    """RMSNorm of each head of q and k, then the rotation of halves by a table, in place in packed rows. V is left as it
    is.

    Args:
        qkv: [tokens, heads * head_dim] bfloat16, float16 or float32: q, then k, then whatever follows.
        positions: [tokens] int32 or int64, rows of the table.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "table_qk_norm_rope_"
    _common.tensors(function, qkv=qkv, positions=positions, cos_sin_cache=cos_sin_cache)
    names = {"num_heads_q": "num_q_heads", "num_heads_k": "num_k_heads"}
    for name, value, least in (("num_q_heads", num_q_heads, 0), ("num_k_heads", num_k_heads, 0),
                               ("head_dim", head_dim, 2)):  # fmt: skip
        _common.whole(function, name, value, least)
    others, rest = divmod(qkv.shape[-1], head_dim)
    others -= num_q_heads + num_k_heads
    if qkv.dim() != 2 or rest or others < 0:
        raise ValueError(
            f"{function}: qkv must be [tokens, heads * {head_dim}] with at least num_q_heads + num_k_heads = "
            f"{num_q_heads + num_k_heads} heads, but is {list(qkv.shape)}"
        )
    q, k = _common.packed(function, qkv, num_q_heads, num_k_heads, others, head_dim)
    _common.norm_rope_heads(function, names, q, k, (q_weight, k_weight), eps, True, positions=positions,
                            cos_sin=cos_sin_cache)  # fmt: skip


def triton_mrope_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    mrope_section: list[int],
    head_size: int,
    rotary_dim: int,
    mrope_interleaved: bool,
    mrope_interleaved_glm: bool,
    is_neox_style: bool,
    axis_map: torch.Tensor | None,
) -> None:
    """Rotates q and k in place by positions with three axes.

    Args:
        q, k: [tokens, heads * head_size] bfloat16, float16 or float32.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.
        positions: [3, tokens] int32 or int64: time, height and width.
        mrope_section: how many pairs each axis has: one behind the other, or, with mrope_interleaved, by turns.
        mrope_interleaved_glm: by axis_map, [rotary_dim/2]: the axis of each pair.
        is_neox_style: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.mrope("triton_mrope_fused", {"q": "q", "k": "k", "axes": "axis_map"}, positions, q, k, head_size,
                  cos_sin_cache, is_neox_style, rotary_dim, mrope_section, mrope_interleaved,
                  axis_map if mrope_interleaved and mrope_interleaved_glm else None)  # fmt: skip


def fused_qk_rope_reshape_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    pos: torch.Tensor,
    cos_sin: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    v_scale: torch.Tensor | float | None,
    is_neox: bool,
    flash_layout: bool,
    apply_scale: bool = True,
    offs: torch.Tensor | None = None,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    output_zeros: bool = True,
    zeros_out: torch.Tensor | None = None,
    swa_slot_mapping: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Rotates q and k by a table into q_out and k_out (which may be q and k), and stores k and v in a paged cache.

    Args:
        q: [tokens, q_heads, head_dim]; k, v: [tokens, k_heads, head_dim], of one dtype.
        key_cache, value_cache: [pages, page_size, k_heads, head_dim] of that dtype or fp8.
        slot_mapping: [at most tokens] int32 or int64; negative, and tokens behind the last: not stored.
        pos, offs: [tokens] int32 or int64, rows of the table, and what is added to them.
        cos_sin: [rows, head_dim]: cosines, then sines.
        k_scale, v_scale: of fp8 caches, with apply_scale.
        flash_layout: must be True: caches in blocks of x elements are not served.
        swa_slot_mapping: must be None.

    Returns:
        q_out, k_out, key_cache, value_cache and, with output_zeros, zeros of q's shape.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_rope_reshape_and_cache"
    _common.heads_apart(function, q)
    _common.tensors(function, k=k, v=v, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping,
                    pos=pos, cos_sin=cos_sin)  # fmt: skip
    if not flash_layout:
        raise ValueError(f"{function}: flash_layout must be True, but is {flash_layout}")
    if swa_slot_mapping is not None:
        raise ValueError(f"{function}: swa_slot_mapping must be None, but is a tensor")
    missing = q.shape[0] - slot_mapping.shape[0] if slot_mapping.dim() == 1 else 0
    if missing > 0:
        slot_mapping = torch.nn.functional.pad(slot_mapping, (0, missing), value=-1)
    fp8 = key_cache.element_size() == 1 and apply_scale
    scales = {"k_scale": k_scale, "v_scale": v_scale} if fp8 else {}
    q_out = torch.empty_like(q) if q_out is None else q_out
    k_out = torch.empty_like(k) if k_out is None else k_out
    names = {"k_cache": "key_cache", "v_cache": "value_cache", "slots": "slot_mapping", "positions": "pos",
             "offsets": "offs", "cos_sin": "cos_sin"}  # fmt: skip
    outputs = {} if q_out is q and k_out is k else {"q_out": q_out, "k_out": k_out}
    _common.rope(function, names, q, k, positions=pos, offsets=offs, cos_sin=cos_sin, pairing=_common.pairing(is_neox),
                 v=v, k_cache=key_cache, v_cache=value_cache, slots=slot_mapping, **outputs, **scales)  # fmt: skip
    result = (q_out, k_out, key_cache, value_cache)
    if not output_zeros and zeros_out is None:
        return result
    return *result, torch.zeros_like(q) if zeros_out is None else zeros_out.zero_()
