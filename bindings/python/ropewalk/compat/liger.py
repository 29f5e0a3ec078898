"""Liger's `liger_rotary_pos_emb`, by its own name and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from . import _common

__all__ = [
    "liger_llama4_text_rotary_pos_emb",
    "liger_llama4_vision_rotary_pos_emb",
    "liger_multimodal_rotary_pos_emb",
    "liger_rotary_pos_emb",
    "liger_rotary_pos_emb_gpt_oss",
    "liger_rotary_pos_emb_vision",
]


def liger_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: Any = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates halves of the heads of q and k by a table, into new tensors; autograd goes through it.

    Args:
        q, k: [batch, heads, tokens, head_dim] bfloat16, float16 or float32.
        cos, sin: [1 or batch, tokens, head_dim] or [tokens, head_dim]: each half holds a pair's entry.
        position_ids, unsqueeze_dim: taken and ignored, as there.
        rotary_dim: the first elements of a head that are rotated. Tables may then be half as wide, one entry a pair.

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
    _common.tensors(function, cos=cos, sin=sin)
    if rotary_dim is not None:
        _common.whole(function, "rotary_dim", rotary_dim, 2)
        if 2 * cos.shape[-1] == rotary_dim:
            tables = {"cos": _common.of_all_batches(cos), "sin": _common.of_all_batches(sin)}
            return _common.differentiable(function, {}, q, k, heads_first=True, **tables)
        if cos.shape[-1] != rotary_dim:
            raise ValueError(
                f"{function}: cos and sin must be rotary_dim, {rotary_dim}, or half of it wide, but are "
                f"{cos.shape[-1]} wide"
            )
    return _common.differentiable(function, {}, q, k, heads_first=True, **_common.half_tables(function, cos, sin))


def liger_rotary_pos_emb_gpt_oss(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`liger_rotary_pos_emb` of whole heads by tables of one entry a pair, [1 or batch, tokens, head_dim/2]."""
    _common.tensors("liger_rotary_pos_emb_gpt_oss", q=q)
    return liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=q.shape[-1])


def liger_rotary_pos_emb_vision(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`liger_rotary_pos_emb` of vision towers, which have no batch.

    Args:
        q, k: [tokens, heads, head_dim] bfloat16, float16 or float32.
        cos, sin: [tokens, head_dim]: each half holds a pair's entry.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "liger_rotary_pos_emb_vision"
    _common.tensors(function, q=q, k=k)
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"{function}: q and k must be [tokens, heads, head_dim], but are {list(q.shape)} and {list(k.shape)}"
        )
    return _common.differentiable(function, {}, q, k, **_common.half_tables(function, cos, sin))


def liger_multimodal_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mrope_section: Any, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`liger_rotary_pos_emb` with a table for each of three axes, of which each pair takes one.

    Args:
        q, k: [batch, heads, tokens, head_dim] bfloat16, float16 or float32.
        cos, sin: [3, batch, tokens, head_dim]: of time, height and width.
        mrope_section: [time, height, width]: how many pairs each axis has, one behind the other.
        unsqueeze_dim: taken and ignored, as there.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "liger_multimodal_rotary_pos_emb"
    _common.tensors(function, q=q, k=k, cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 4 or table.shape[0] != 3:
            raise ValueError(f"{function}: {name} must be [3, batch, tokens, head_dim], but is {list(table.shape)}")
    half = cos.shape[-1] // 2
    _common.axes_of(function, mrope_section, half, False, "cpu")
    sections = list(mrope_section)
    tables = {}
    for name, table in (("cos", cos), ("sin", sin)):
        parts = _common.one_copy(function, name, table).split(sections, -1)
        tables[name] = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
    return _common.differentiable(function, {}, q, k, heads_first=True, **tables)


def liger_llama4_text_rotary_pos_emb(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation of Llama 4: pairs of neighbours, times complex numbers.

    Args:
        xq, xk: [batch, tokens, heads, head_dim] bfloat16, float16 or float32.
        freqs_cis: [1 or batch, tokens, head_dim/2] or [tokens, head_dim/2] complex.

    Returns:
        The new xq and xk.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    return _llama4("liger_llama4_text_rotary_pos_emb", {"q": "xq", "k": "xk"}, xq, xk, freqs_cis, "freqs_cis")


def liger_llama4_vision_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, freqs_ci: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `liger_llama4_text_rotary_pos_emb`; freqs_ci may have a dimension of one for the heads, and may be real, as a
    model that was cast has it: then nothing turns, and each pair is multiplied by it."""
    function = "liger_llama4_vision_rotary_pos_emb"
    _common.tensors(function, freqs_ci=freqs_ci)
    table = freqs_ci.squeeze(-2) if freqs_ci.dim() > 2 and freqs_ci.shape[-2] == 1 else freqs_ci
    return _llama4(function, {"q": "query", "k": "key"}, query, key, table, "freqs_ci", real=True)


def _llama4(
    function: str, names: dict[str, str], q: Any, k: Any, table: Any, called: str, real: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    _common.tensors(function, **{names["q"]: q, names["k"]: k, called: table})
    tables = _common.complex_tables(function, called, table, real)
    return _common.differentiable(function, {**names, "cos": called, "sin": called}, q, k, pairing="interleaved",
                                  **tables)  # fmt: skip
