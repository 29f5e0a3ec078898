"""diffusers' `apply_rotary_emb` (`diffusers.models.embeddings`), by its own name and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from . import _common

__all__ = ["apply_rotary_emb"]


def apply_rotary_emb(
    x: torch.Tensor,
    freqs_cis: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    sequence_dim: int = 2,
) -> torch.Tensor:
    """Rotates the heads of x by a table, into a new tensor; autograd goes through it.

    Args:
        x: [batch, heads, tokens, head_dim] bfloat16, float16 or float32; with sequence_dim=1, and without use_real,
            [batch, tokens, heads, head_dim].
        freqs_cis: with use_real cosines and sines, [tokens, head_dim] each; else [1 or batch, tokens, head_dim/2] or
            [tokens, head_dim/2] complex64, or complex128, which is rounded to that; the conjugate rotates back.
        use_real_unbind_dim: -1: pairs (2i, 2i + 1), whose entries stand side by side in the table; -2: pairs
            (i, i + head_dim/2), each half of the table holds them. Without use_real pairs (2i, 2i + 1).
        sequence_dim: 1 or 2.

    Returns:
        A tensor like x. Rounded once, from float32, as there.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rotary_emb"
    _common.tensors(function, x=x)
    if use_real_unbind_dim not in (-1, -2):
        raise ValueError(f"{function}: use_real_unbind_dim must be -1 or -2, but is {use_real_unbind_dim}")
    if sequence_dim not in (1, 2):
        raise ValueError(f"{function}: sequence_dim must be 1 or 2, but is {sequence_dim}")
    if x.dim() != 4:
        raise ValueError(f"{function}: x must have 4 dimensions, but is {list(x.shape)}")
    names = {"q": "x"}
    neighbours = not use_real or use_real_unbind_dim == -1
    if use_real:
        cos, sin = freqs_cis
        tables = _common.half_tables(function, cos, sin, neighbours)
    else:
        _common.tensors(function, freqs_cis=freqs_cis)
        if not freqs_cis.is_complex():
            raise ValueError(f"{function}: freqs_cis must be complex without use_real, but is {freqs_cis.dtype}")
        tables = _common.complex_tables(function, "freqs_cis", freqs_cis)
        names.update(cos="freqs_cis", sin="freqs_cis")
    return _common.differentiable(function, names, x, None, heads_first=use_real and sequence_dim == 2,
                                  pairing=_common.pairing(not neighbours), **tables)[0]  # fmt: skip
