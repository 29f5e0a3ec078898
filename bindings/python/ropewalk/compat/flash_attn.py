"""flash-attn's `apply_rotary_emb` (`flash_attn.layers.rotary`), by its own name and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from . import _common

__all__ = ["apply_rotary_emb"]


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotates the heads of x by a table; autograd goes through it.

    Args:
        x: [batch, tokens, heads, head_dim] bfloat16, float16 or float32; with cu_seqlens [all tokens, heads, head_dim].
        cos, sin: [rows, rotary_dim/2] float32, float16 or bfloat16.
        interleaved: False: pairs (i, i + rotary_dim/2); True: pairs (2i, 2i + 1).
        inplace: write to x.
        seqlen_offsets: the position of each sequence's first token: a number, or [batch] int32 or int64.
        cu_seqlens: [batch + 1] int32: where each sequence begins, and the end.
        max_seqlen: taken and ignored.

    Returns:
        x, or a tensor like it. Tokens without a row in the table are as they are in x: those before the first row, by
        negative offsets (left padding), those past the last, by offsets in a tensor, and those behind cu_seqlens[-1].

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rotary_emb"
    _common.tensors(function, x=x, cos=cos, sin=sin)
    if x.dim() != (4 if cu_seqlens is None else 3):
        shape = "[batch, tokens, heads, head_dim]" if cu_seqlens is None else "[tokens, heads, head_dim]"
        raise ValueError(f"{function}: x must be {shape}, but is {list(x.shape)}")
    rows, positions, inside = cos.shape[0], None, None
    if cu_seqlens is not None:
        _common.tensors(function, cu_seqlens=cu_seqlens)
        positions = _common.ragged(cu_seqlens, seqlen_offsets, x.shape[0])
        inside = torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]
        inside = inside & (positions >= 0) & (positions < rows)
    elif isinstance(seqlen_offsets, torch.Tensor):
        if seqlen_offsets.shape != x.shape[:1]:
            raise ValueError(f"{function}: seqlen_offsets must be [{x.shape[0]}], but is {list(seqlen_offsets.shape)}")
        token = torch.arange(x.shape[1], device=x.device, dtype=seqlen_offsets.dtype)
        positions = seqlen_offsets[:, None] + token
        inside = (positions >= 0) & (positions < rows)
    else:
        _common.whole(function, "seqlen_offsets", seqlen_offsets)
        if seqlen_offsets + x.shape[1] > rows:
            raise ValueError(
                f"{function}: cos and sin must have a row for each token, {seqlen_offsets + x.shape[1]} with "
                f"seqlen_offsets, but have {rows}"
            )
        if seqlen_offsets != 0:
            positions = torch.arange(seqlen_offsets, seqlen_offsets + x.shape[1], device=x.device)[None]
            inside = (positions >= 0).expand(x.shape[:2]) if seqlen_offsets < 0 else None
    known = inside is not None and inside.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and inside.all():
        inside = None  # elsewhere a look would wait for the device
    options = {"cos": cos, "sin": sin, "pairing": _common.pairing(not interleaved)}
    if inside is None:
        return _common.differentiable(function, {"q": "x"}, x, None, inplace, positions=positions, **options)[0]
    positions = torch.where(inside, positions, 0)
    turned = _common.differentiable(function, {"q": "x"}, x, None, positions=positions, **options)[0]
    if known:
        turned[~inside] = x[~inside]
    else:
        turned = torch.where(inside[..., None, None], turned, x)
    return x.copy_(turned) if inplace else turned
