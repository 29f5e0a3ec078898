"""transformers' `apply_rotary_pos_emb`, as its models of halves have it, by its own name and arguments.
`ropewalk.transformers.patch(model)` puts the whole operation into a model."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from . import _common

__all__ = ["apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates halves of the heads of q and k by a table, into new tensors; autograd goes through it. The bits are those
    of the chain `x * cos + rotate_half(x) * sin` in q's dtype.

    Args:
        q, k: [batch, heads, tokens, head_dim] bfloat16, float16 or float32; with unsqueeze_dim=2 [batch, tokens, heads,
            head_dim].
        cos, sin: [1 or batch, tokens, rotary_dim] or [tokens, rotary_dim]: each half holds a pair's entry.
        unsqueeze_dim: 1 or 2.

    Returns:
        The new q and k.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rotary_pos_emb"
    _common.tensors(function, q=q, k=k)
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"{function}: unsqueeze_dim must be 1 or 2, but is {unsqueeze_dim}")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"{function}: q and k must have 4 dimensions, but are {list(q.shape)} and {list(k.shape)}")
    return _common.differentiable(function, {}, q, k, heads_first=unsqueeze_dim == 1, rounding="reference",
                                  **_common.half_tables(function, cos, sin))  # fmt: skip
