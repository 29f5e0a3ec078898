"""flash-attn's rotary functions (`flash_attn.layers.rotary`), by their own names and arguments."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from .. import _torch
from . import _common

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_"]


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
    positions, inside = _rows(function, x, cos, seqlen_offsets, cu_seqlens)
    options = {"cos": cos, "sin": sin, "pairing": _common.pairing(not interleaved)}
    if inside is None:
        return _common.differentiable(function, {"q": "x"}, x, None, inplace, positions=positions, **options)[0]
    if inplace and _common.wants_gradient(x):
        return _in_place(function, "x", x, (None,), {"cos": cos, "sin": sin}, interleaved, seqlen_offsets, cu_seqlens)
    known = inside.device.type == "cpu" and not torch.compiler.is_compiling() and not _common._in_func()
    turned = _common.differentiable(function, {"q": "x"}, x, None, positions=positions, **options)[0]
    if known:
        turned[~inside] = x[~inside]
    else:
        turned = torch.where(inside[..., None, None], turned, x)
    return x.copy_(turned) if inplace else turned


def _rows(function: str, x: Any, cos: Any, seqlen_offsets: Any, cu_seqlens: Any) -> tuple[Any, Any]:
    """The row of the table for each token, and which tokens have one; None for all of them."""
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
    return positions if inside is None else torch.where(inside, positions, 0), inside


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Rotates q and k of packed rows in place; v is left alone. Autograd goes through what is returned.

    Args:
        qkv: [batch, tokens, 3, heads, head_dim], or, with num_heads_q, [batch, tokens, num_heads_q + 2 * k_heads,
            head_dim]; bfloat16, float16 or float32.
        cos, sin: [rows, rotary_dim/2] float32, float16 or bfloat16.
        cos_k, sin_k: others for k.
        interleaved: False: pairs (i, i + rotary_dim/2); True: pairs (2i, 2i + 1).
        seqlen_offsets: the position of each sequence's first token: a number, or [batch] int32 or int64.

    Returns:
        qkv. Tokens without a row in the table are left as they are.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rotary_emb_qkv_"
    _common.tensors(function, qkv=qkv, cos=cos, sin=sin)
    if (cos_k is None) != (sin_k is None):
        raise ValueError(f"{function}: cos_k and sin_k must both be given, or neither")
    if num_heads_q is None:
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(f"{function}: qkv must be [batch, tokens, 3, heads, head_dim], but is {list(qkv.shape)}")
        places: tuple[Any, Any] = (2, 0), (2, 1)
    else:
        _common.whole(function, "num_heads_q", num_heads_q, 0)
        k_heads, odd = divmod(qkv.shape[2] - num_heads_q, 2) if qkv.dim() == 4 else (-1, 0)
        if odd or k_heads < 0:
            raise ValueError(
                f"{function}: qkv must be [batch, tokens, num_heads_q + 2 * k_heads, head_dim] with num_heads_q = "
                f"{num_heads_q}, but is {list(qkv.shape)}"
            )
        places = (2, 0, num_heads_q), (2, num_heads_q, k_heads)
    tables = {
        "cos": cos,
        "sin": sin,
        "cos_k": cos if cos_k is None else cos_k,
        "sin_k": sin if sin_k is None else sin_k,
    }
    return _in_place(function, "qkv", qkv, places, tables, interleaved, seqlen_offsets)


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
) -> torch.Tensor:
    """`apply_rotary_emb_qkv_` of kv: [batch, tokens, 2, heads, head_dim], whose k is rotated in place."""
    function = "apply_rotary_emb_kv_"
    _common.tensors(function, kv=kv, cos=cos, sin=sin)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"{function}: kv must be [batch, tokens, 2, heads, head_dim], but is {list(kv.shape)}")
    return _in_place(function, "kv", kv, ((2, 0),), {"cos": cos, "sin": sin}, interleaved, seqlen_offsets)


def _in_place(
    function: str, name: str, x: Any, places: Any, tables: Any, interleaved: bool, seqlen_offsets: Any,
    cu_seqlens: Any = None,
) -> torch.Tensor:  # fmt: skip
    options = (function, name, places, interleaved, seqlen_offsets, cu_seqlens)
    flat = tuple(tables.values())
    for called, table in tables.items():
        if torch.is_grad_enabled() and isinstance(table, torch.Tensor) and _torch.requires_grad(table):
            raise ValueError(
                f"{function}: {called} requires grad, and Ropewalk calculates no gradient of tables: give "
                f"{called}.detach(), or call it under torch.no_grad()"
            )
    if _common.wants_gradient(x):
        if _common._in_func():
            return _common.written(function, {"q": name}, x, _turned(options, x, flat))
        return _InPlace.apply(options, x, *flat)
    _turn(options, x, flat, False)
    return x


def _turn(options: Any, x: Any, flat: Any, inverse: bool) -> None:
    """The parts of x at `places` (None: x), each by its two tables. All are checked before the first is written."""
    function, name, places, interleaved, seqlen_offsets, cu_seqlens = options
    calls = []
    for place, cos, sin in zip(places, flat[::2], flat[1::2], strict=True):
        part = x if place is None else x.select(*place) if len(place) == 2 else x.narrow(*place)
        positions, inside = _rows(function, part, cos, seqlen_offsets, cu_seqlens)
        how = {"positions": positions, "cos": cos, "sin": sin, "pairing": _common.pairing(not interleaved),
               "inverse": inverse}  # fmt: skip
        calls.append((part, inside, how))
    for part, _, how in calls[1:]:
        _common.check(function, {"q": name}, part, None, **how)
    for part, inside, how in calls:
        old = None if inside is None else part.clone()
        _common.rope(function, {"q": name}, part, None, **how)
        if inside is not None:
            part.copy_(torch.where(inside[..., None, None], part, old))


def _turned(options: Any, x: Any, flat: Any) -> torch.Tensor:
    """As `_turn`, into a new tensor, through autograd."""
    function, name, places, interleaved, seqlen_offsets, cu_seqlens = options
    new = x.clone()
    for place, cos, sin in zip(places, flat[::2], flat[1::2], strict=True):
        part, to = (y if place is None else y.select(*place) if len(place) == 2 else y.narrow(*place) for y in (x, new))
        positions, inside = _rows(function, part, cos, seqlen_offsets, cu_seqlens)
        turned = _common.differentiable(function, {"q": name}, part, None, positions=positions, cos=cos, sin=sin,
                                        pairing=_common.pairing(not interleaved))[0]  # fmt: skip
        to.copy_(turned if inside is None else torch.where(inside[..., None, None], turned, part))
    return new


class _InPlace(torch.autograd.Function):
    """Writes to what may be a leaf or a view, so that it is not marked: what is returned stands for it."""

    @staticmethod
    def forward(options: Any, x: Any, *flat: Any) -> Any:
        _turn(options, x, flat, False)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, _, *flat = inputs
        ctx.save_for_backward(*flat)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        _turn(ctx.options, gradient, ctx.saved_tensors, True)
        return None, gradient, *(None for _ in ctx.saved_tensors)
