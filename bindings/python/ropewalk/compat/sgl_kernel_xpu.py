"""The rotary functions of the sgl_kernel package for Intel GPUs, by their own names, arguments and meanings.

`fused_qk_norm_rope` has another YaRN ramp than its namesake for CUDA, and `rotary_embedding` returns new tensors.
`forward_xpu` is what SGLang's rotary layer does with them. They serve tensors of every device.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from . import _common
from .sgl_kernel import apply_rope_with_cos_sin_cache_inplace, fused_qk_rope_with_cos_sin_cache_inplace

__all__ = [
    "apply_rope_inplace_with_kvcache",
    "apply_rope_with_cos_sin_cache_inplace",
    "forward_xpu",
    "fused_inplace_qknorm_rope",
    "fused_q_norm_rope",
    "fused_qk_norm_rope",
    "fused_qk_rope_with_cos_sin_cache_inplace",
    "multimodal_rotary_embedding",
    "rotary_embedding",
]


class RotDimError(ValueError, RuntimeError):
    """Of a table whose width does not fit, or of positions: a ValueError as everywhere here, and a RuntimeError as in
    the original."""


def apply_rope_inplace_with_kvcache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    out_loc: torch.Tensor,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """`ropewalk.compat.sglang_jit.apply_rope_inplace_with_kvcache`, but that a token whose out_loc is negative is left
    as it is: neither rotated nor stored.

    Raises:
        ValueError: an argument does not fit (RotDimError: the width of the table). Nothing was written.
    """
    function = "apply_rope_inplace_with_kvcache"
    _common.tensors(function, q=q, cos_sin_cache=cos_sin_cache, positions=positions, out_loc=out_loc)
    rot_dim, head_dim = rope_dim or cos_sin_cache.shape[-1], q.shape[-1]
    if rot_dim % 2 or rot_dim > head_dim:
        raise RotDimError(f"{function}: rot_dim must be even and at most head_dim {head_dim}, but is {rot_dim}")
    for name, x in (("positions", positions), ("out_loc", out_loc)):
        if x.dim() != 1:
            raise RotDimError(f"{function}: {name} must be 1-D, [tokens], but is {list(x.shape)}")
        if x.shape[0] != q.shape[0]:
            raise RotDimError(
                f"{function}: {name} has {x.shape[0]} tokens, but q has {q.shape[0]}: {name}.size(0) must be q's"
            )
    _common.float_cache(function, cos_sin_cache)
    store = _common.flat_store(function, k, v, k_cache, v_cache, out_loc, {})
    if out_loc.shape == positions.shape:
        positions = torch.where(out_loc < 0, -1, positions)  # no row of the table: padding, which is left alone
    _common.rotate_3d(function, q, k, cos_sin_cache, positions, is_neox, rope_dim, {"slots": "out_loc"}, **store)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates query and key by a table into new tensors; autograd goes through it. The old ones are left as they are.

    Args:
        positions: [tokens] or [batch, tokens] int32 or int64, rows of the table.
        query, key: [.., heads * head_size] or [.., heads, head_size] with positions' shape in front, or the number of
            positions; bfloat16, float16 or float32; key may be None.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Returns:
        The new query and key, in the shapes of the old ones.

    Raises:
        ValueError: an argument does not fit.
    """
    return _common.rotate_flat_new("rotary_embedding", positions, query, key, head_size, cos_sin_cache, is_neox)


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
    factor: float = 1.0,
    low: float = 1.0,
    high: float = 1.0,
    attention_factor: float = 1.0,
    rotary_dim: int | None = None,
) -> None:
    """`ropewalk.compat.sglang_jit.fused_qk_norm_rope`, but for the meaning of low and high: with a factor other than 1
    the frequency of pair i is (f / factor) * (1 - r) + f * r with r = (2i - low) / (high - low) held to [0, 1].
    """
    _common.norm_rope("fused_qk_norm_rope", qkv, (num_heads_q, num_heads_k, num_heads_v), head_dim, eps,
                      (q_weight, k_weight), is_neox, position_ids, rotary_dim,
                      (base, factor, low, high, attention_factor), intel=True)  # fmt: skip


def multimodal_rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    mrope_section: list[int],
    head_size: int,
    rotary_dim: int,
    mrope_interleaved: bool,
    mrope_interleaved_glm: bool,
    is_neox: bool,
    axis_map: torch.Tensor | None = None,
) -> None:
    """`ropewalk.compat.sglang_jit.triton_mrope_fused`, under this name."""
    _common.mrope("multimodal_rotary_embedding", {"axes": "axis_map"}, positions, query, key, head_size, cos_sin_cache,
                  is_neox, rotary_dim, mrope_section, mrope_interleaved,
                  axis_map if mrope_interleaved and mrope_interleaved_glm else None)  # fmt: skip


def fused_q_norm_rope(
    q_input: torch.Tensor, q_output: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor, eps: float
) -> None:
    """RMSNorm without a weight of each head of q, then the rotation of pairs of neighbours at the end of the head.

    Args:
        q_input: [tokens, heads, head_dim] bfloat16, float16 or float32.
        q_output: like q_input; written.
        freqs_cis: [rows, rope_dim/2] complex, or [rows, rope_dim] float32 with a cosine and a sine for each pair, side
            by side.
        positions: [tokens] int32 or int64, rows of the table.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_q_norm_rope"
    _common.heads_apart(function, q_input)
    _common.tensors(function, q_output=q_output, freqs_cis=freqs_cis, positions=positions)
    if freqs_cis.is_complex():
        tables = _common.complex_tables(function, "freqs_cis", freqs_cis)
    elif freqs_cis.dim() == 2 and freqs_cis.shape[1] % 2 == 0:
        tables = {"cos": freqs_cis[:, ::2], "sin": freqs_cis[:, 1::2]}
    else:
        raise ValueError(f"{function}: freqs_cis must be [rows, rope_dim], but is {list(freqs_cis.shape)}")
    offset = q_input.shape[-1] - 2 * tables["cos"].shape[-1]
    if offset < 0:
        raise ValueError(
            f"{function}: freqs_cis must have at most head_dim/2 pairs, {q_input.shape[-1] // 2}, but has "
            f"{tables['cos'].shape[-1]}"
        )
    names = {"q": "q_input", "q_out": "q_output", "cos": "freqs_cis", "sin": "freqs_cis"}
    _common.rope(function, names, q_input, None, q_out=q_output, positions=positions, pairing="interleaved",
                 rotary_offset=offset, norm="rms", eps=eps, **tables)  # fmt: skip


def fused_inplace_qknorm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
) -> None:
    """`ropewalk.compat.sglang_jit.fused_inplace_qknorm_rope`; is_neox and what follows may be given by place."""
    _common.inplace_norm_rope(q, k, q_weight, k_weight, cos_sin_cache, positions, is_neox, eps, head_dim, rope_dim)


def forward_xpu(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The forward of SGLang's rotary layers on Intel GPUs, to be set as their method of that name:

        RotaryEmbedding.forward_xpu = ropewalk.compat.sgl_kernel_xpu.forward_xpu

    Every head size takes one kernel, which adds the offsets and fills the KV buffers too.

    Args:
        self: the layer: head_size, rotary_dim, is_neox_style, and cos_sin_cache [rows, rotary_dim] float32, float16 or
            bfloat16, which is used as it is.
        positions: [tokens] or [batch, tokens] int32 or int64.
        query, key: [.., heads * head_size] or [.., heads, head_size] with positions' shape in front, or the number of
            positions; rotated in place; key may be None.
        offsets: like positions, added to them.
        fused_set_kv_buffer_arg: a FusedSetKVBufferArg of `ropewalk.compat.sgl_kernel`, or any object with its fields.

    Returns:
        query and key themselves.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _common.rotate_flat("forward_xpu", positions, query, key, self.head_size, self.cos_sin_cache, self.is_neox_style,
                        self.rotary_dim, fused_set_kv_buffer_arg, offsets)  # fmt: skip
    return query, key
