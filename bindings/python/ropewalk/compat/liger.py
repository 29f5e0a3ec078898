"""Liger's `liger_rotary_pos_emb`, by its own name and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from . import _common

__all__ = ["liger_rotary_pos_emb"]


def liger_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: Any = None,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates halves of the heads of q and k by a table, into new tensors; autograd goes through it.

    Args:
        q, k: [batch, heads, tokens, head_dim] bfloat16, float16 or float32.
        cos, sin: [1 or batch, tokens, head_dim] or [tokens, head_dim]: each half holds a pair's entry.
        position_ids, unsqueeze_dim: taken and ignored, as there.

    Returns:
        The new q and k.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "liger_rotary_pos_emb"
    _common.tensors(function, q=q, k=k)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"{function}: q and k must be [batch, heads, tokens, head_dim], but are {list(q.shape)} and {list(k.shape)}"
        )
    return _common.differentiable(function, {}, q, k, heads_first=True, **_common.half_tables(function, cos, sin))
