"""The functions of kernels-community's package `rotary`, by their own names and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from . import _common
from .transformers import apply_rotary_pos_emb

__all__ = ["apply_rotary", "apply_rotary_transformers"]


def apply_rotary(
    x1: torch.Tensor,
    x2: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out1: torch.Tensor,
    out2: torch.Tensor,
    conj: bool,
) -> None:
    """Turns pairs whose two elements are given apart: out1 = x1 cos - x2 sin, out2 = x1 sin + x2 cos.

    Args:
        x1, x2: [batch?, tokens, heads, rotary_dim/2] bfloat16, float16 or float32. The halves of a head, or its even
            and its odd elements, are served where they lie; others are copied together.
        cos, sin: [1 or batch?, tokens, 1, rotary_dim/2] or [tokens, rotary_dim/2].
        out1, out2: like x1 and x2, or these themselves; written.
        conj: turn by the negative angles.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rotary"
    _common.tensors(function, x1=x1, x2=x2, cos=cos, sin=sin, out1=out1, out2=out2)
    _common.without_gradient(function, x1=x1, x2=x2, cos=cos, sin=sin, out1=out1, out2=out2)
    if x1.dim() not in (3, 4):
        raise ValueError(f"{function}: x1 must be [.., tokens, heads, rotary_dim/2], but is {list(x1.shape)}")
    for name, x in (("x2", x2), ("out1", out1), ("out2", out2)):
        if x.shape != x1.shape or x.dtype != x1.dtype or x.device != x1.device:
            raise ValueError(
                f"{function}: {name} must be like x1, {list(x1.shape)} {x1.dtype} on {x1.device}, but is "
                f"{list(x.shape)} {x.dtype} on {x.device}"
            )
    tables = {}
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() > 2:
            if table.shape[-2] != 1:
                raise ValueError(
                    f"{function}: {name} must be [1 or batch?, tokens, 1, rotary_dim/2], but is {list(table.shape)}"
                )
            table = table.squeeze(-2)
        tables[name] = _common.of_all_batches(table)
    x, pairing = _together(x1, x2)
    out, out_pairing = _together(out1, out2)
    apart = out is None or out_pairing != pairing
    if x is None:
        x, pairing = torch.cat((x1, x2), -1), "neox"
        apart = apart or out_pairing != pairing
    new = torch.empty(x.shape, dtype=x.dtype, device=x.device) if apart else out
    names = {"q": "x1", "q_out": "out1"}
    same = not apart and new.data_ptr() == x.data_ptr() and new.stride() == x.stride()
    _common.rope(function, names, x, None, q_out=None if same else new, pairing=pairing, inverse=bool(conj),
                 **tables)  # fmt: skip
    if apart:
        half = x.shape[-1] // 2
        out1.copy_(new[..., :half] if pairing == "neox" else new[..., ::2])
        out2.copy_(new[..., half:] if pairing == "neox" else new[..., 1::2])


def _together(first: Any, second: Any) -> tuple[Any, str]:
    """The heads of which these are the halves, or the even and the odd elements; None if they are not."""
    if first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() and first.stride() == second.stride():
        half, step = first.shape[-1], first.stride(-1)
        apart = second.storage_offset() - first.storage_offset()
        if (apart, step) in ((half, 1), (1, 2)):
            stride = (*first.stride()[:-1], 1)
            whole = first.as_strided((*first.shape[:-1], 2 * half), stride, first.storage_offset())
            return whole, "neox" if step == 1 else "interleaved"
    return None, "neox"


def apply_rotary_transformers(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ropewalk.compat.transformers.apply_rotary_pos_emb`, under this name."""
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
