"""TransformerEngine's rotary function (`transformer_engine.pytorch.attention.rope`), by its own name and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from . import _common

__all__ = ["apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """Rotates t by angles, into a new tensor; autograd goes through it.

    Args:
        t: [tokens, batch, heads, head_dim] (sbhd), [batch, tokens, heads, head_dim] (bshd) or, with cu_seqlens,
            [all tokens, heads, head_dim] (thd); bfloat16, float16 or float32.
        freqs: [rows, 1, 1, rotary_dim] float32: the angle of each pair, twice: in each half, or side by side.
        start_positions: [batch] int32 or int64: the row of each sequence's first token.
        interleaved: False: pairs (i, i + rotary_dim/2); True: pairs (2i, 2i + 1).
        fused: taken and ignored.
        cu_seqlens: [batch + 1] int32: where each sequence begins, and the end.
        cp_size, cp_rank: must be 1 and 0: no context parallelism.

    Returns:
        A tensor like t, rounded once from float32.

    Raises:
        ValueError: an argument does not fit.
    """
    function = "apply_rotary_pos_emb"
    _common.tensors(function, t=t, freqs=freqs)
    if tensor_format not in ("sbhd", "bshd", "thd"):
        raise ValueError(f"{function}: tensor_format must be 'sbhd', 'bshd' or 'thd', but is {tensor_format!r:.60}")
    if cp_size != 1 or cp_rank != 0:
        raise ValueError(f"{function}: cp_size must be 1 and cp_rank 0, but are {cp_size} and {cp_rank}")
    if t.dim() != (3 if tensor_format == "thd" else 4):
        raise ValueError(f"{function}: t must be as tensor_format, {tensor_format}, says, but is {list(t.shape)}")
    if freqs.dim() != 4 or freqs.shape[1] != 1 or freqs.shape[2] != 1 or freqs.shape[3] % 2:
        raise ValueError(f"{function}: freqs must be [rows, 1, 1, rotary_dim], but is {list(freqs.shape)}")
    angles = _common.one_copy(function, "freqs", freqs[:, 0, 0], neighbours=interleaved).float()
    x = t.transpose(0, 1) if tensor_format == "sbhd" else t
    first = 0 if start_positions is None else start_positions
    if tensor_format == "thd":
        _common.tensors(function, cu_seqlens=cu_seqlens)
        positions = _common.ragged(cu_seqlens, first, x.shape[0])
    else:
        if start_positions is None and freqs.shape[0] < x.shape[1]:
            raise ValueError(
                f"{function}: freqs must have a row for each token, {x.shape[1]}, but has {freqs.shape[0]}"
            )
        positions = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        positions = positions if start_positions is None else positions + start_positions[:, None]
    names = {"q": "t", "cos": "freqs", "sin": "freqs"}
    new = _common.differentiable(function, names, x, None, positions=positions, cos=angles.cos(), sin=angles.sin(),
                                 pairing=_common.pairing(not interleaved))[0]  # fmt: skip
    return new.transpose(0, 1) if tensor_format == "sbhd" else new
