"""The rotary functions of the sgl_kernel package for CUDA and AMD GPUs, by their own names and arguments.

`fused_qk_norm_rope` and `can_use_fused_qk_norm_rope` are those of `ropewalk.compat.sglang_jit`: CUDA's ahead-of-time
kernel and the one compiled at run time have one meaning. What the package for Intel GPUs means by the same names is in
`ropewalk.compat.sgl_kernel_xpu`.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import _common
from .sglang_jit import can_use_fused_qk_norm_rope, fused_qk_norm_rope

__all__ = [
    "FusedSetKVBufferArg",
    "apply_rope_with_cos_sin_cache_inplace",
    "can_use_fused_qk_norm_rope",
    "fused_qk_norm_rope",
    "fused_qk_rope_with_cos_sin_cache_inplace",
    "rotary_embedding",
]


@dataclass
class FusedSetKVBufferArg:
    """That of `ropewalk.compat.sglang_jit`, its fields in the order of sgl_kernel."""

    value: torch.Tensor
    k_buffer: torch.Tensor
    v_buffer: torch.Tensor
    k_scale: Any = None
    v_scale: Any = None
    cache_loc: torch.Tensor | None = None


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """`ropewalk.compat.sglang_jit.rotary_embedding`, but returns nothing."""
    _common.rotate_flat("rotary_embedding", positions, query, key, head_size, cos_sin_cache, is_neox,
                        rounding=_common.rounding_as(query, cos_sin_cache))  # fmt: skip


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
    fused_set_kv_buffer_arg: Any = None,
    enable_pdl: bool | None = None,
) -> None:
    """Rotates query and key in place by a table, and stores key and value where asked to.

    Args:
        positions: [tokens] int32 or int64, rows of the table.
        query, key: [tokens, heads * head_size] or [tokens, heads, head_size] bfloat16, float16 or float32.
        cos_sin_cache: [rows, rotary_dim] float32: cosines, then sines.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).
        fused_set_kv_buffer_arg: a FusedSetKVBufferArg, or any object with its fields: rotated key and value are also
            written to rows cache_loc of the buffers.
        enable_pdl: False: no programmatic dependent launch; else Ropewalk launches so where it is safe.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_with_cos_sin_cache_inplace"
    _common.float_cache(function, cos_sin_cache)
    _common.rotate_flat(function, positions, query, key, head_size, cos_sin_cache, is_neox,
                        buffers=fused_set_kv_buffer_arg, disable_pdl=enable_pdl is False)  # fmt: skip


def fused_qk_rope_with_cos_sin_cache_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    rope_dim: int,
    is_neox: bool,
) -> None:
    """Rotates the first rope_dim elements of each head of q and k in place by a table.

    Args:
        q, k: [tokens, heads, head_dim] bfloat16, float16 or float32, any token and head strides, so also slices
            [..., :rope_dim] of wider heads.
        cos_sin_cache: [rows, rope_dim] float32, float16 or bfloat16: cosines, then sines.
        positions: [tokens] int32 or int64, rows of the table.
        rope_dim: even.
        is_neox: True: pairs (i, i + rope_dim/2); False: pairs (2i, 2i + 1).

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_rope_with_cos_sin_cache_inplace"
    _common.whole(function, "rope_dim", rope_dim, 2)
    _common.rotate_3d(function, q, k, cos_sin_cache, positions, is_neox, rope_dim)
