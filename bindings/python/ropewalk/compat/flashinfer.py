"""FlashInfer's rotary functions (`flashinfer.rope`), by their own names and arguments.

Those with `_inplace` change q and k and return nothing; the others return new ones, and autograd goes through them. q
and k are [tokens, heads, head_dim] bfloat16, float16 or float32 with any token and head strides. Angles are computed
exactly at every position. Errors of an argument are ValueErrors (TypeErrors where its type is wrong); nothing was
written then.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from .. import Frequencies
from . import _common

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]


@torch.compiler.assume_constant_result
def _frequencies(function: str, rotary_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> Frequencies:
    key = ("flashinfer", rotary_dim, theta, scaling)
    made = _common._frequencies.get(key)
    if made is None:
        names = {"theta": "rope_theta", "factor": "rope_scale", "original_max_position_embeddings": "old_context_len"}
        try:
            made = Frequencies(theta=theta, rotary_dim=rotary_dim, scaling=dict(scaling) if scaling else None)
        except (ValueError, TypeError) as error:
            raise _common.renamed(function, names, error) from None
        _common._keep(key, made)
    return made


def _rotate(
    function: str, q: Any, k: Any, positions: Any, rotary_dim: int | None, interleave: bool, theta: float,
    scaling: tuple[tuple[str, Any], ...], inplace: bool,
) -> Any:  # fmt: skip
    _common.heads_apart(function, q)
    _common.tensors(function, k=k)
    width = q.shape[-1] if rotary_dim is None else rotary_dim
    _common.whole(function, "rotary_dim", width, 2)
    options = {"positions": positions, "pairing": _common.pairing(not interleave),
               "frequencies": _frequencies(function, width, theta, scaling)}  # fmt: skip
    if inplace:
        return _common.rope(function, {"positions": "pos_ids"}, q, k, **options)
    return _common.differentiable(function, {"positions": "pos_ids"}, q, k, **options)


def _ragged(function: str, q: Any, indptr: Any, offsets: Any) -> Any:
    _common.tensors(function, q=q, indptr=indptr, offsets=offsets)
    if indptr.dim() != 1 or offsets.shape != (indptr.shape[0] - 1,):
        raise ValueError(
            f"{function}: indptr must be [requests + 1] and offsets [requests], but are {list(indptr.shape)} and "
            f"{list(offsets.shape)}"
        )
    return _common.ragged(indptr, offsets, q.shape[0])


def _linear(rope_scale: float) -> tuple[tuple[str, Any], ...]:
    return () if rope_scale == 1 else (("rope_type", "linear"), ("factor", rope_scale))


def _llama31(rope_scale: float, low: float, high: float, old_context_len: int) -> tuple[tuple[str, Any], ...]:
    return (("rope_type", "llama3"), ("factor", rope_scale), ("low_freq_factor", low), ("high_freq_factor", high),
            ("original_max_position_embeddings", old_context_len))  # fmt: skip


def apply_rope_inplace(
    q: torch.Tensor, k: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor, rotary_dim: int | None = None,
    interleave: bool = False, rope_scale: float = 1, rope_theta: float = 1e4,
) -> None:  # fmt: skip
    """Rotates requests that lie one behind the other.

    Args:
        q, k: [tokens, heads, head_dim].
        indptr: [requests + 1] int32 or int64: where each request's tokens begin, and the end.
        offsets: [requests] int32 or int64: the position of each request's first token.
        rotary_dim: the first elements of a head that are rotated; even. None: all.
        interleave: False: pairs (i, i + rotary_dim/2); True: pairs (2i, 2i + 1).
        rope_scale: what positions are divided by.
        rope_theta: the frequency of pair i is rope_theta^(-2i/rotary_dim).

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_inplace"
    positions = _ragged(function, q, indptr, offsets)
    _rotate(function, q, k, positions, rotary_dim, interleave, rope_theta, _linear(rope_scale), True)


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor, rotary_dim: int | None = None,
    interleave: bool = False, rope_scale: float = 1, rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `apply_rope_inplace`, into new tensors. Returns: the new q and k."""
    function = "apply_rope"
    positions = _ragged(function, q, indptr, offsets)
    return _rotate(function, q, k, positions, rotary_dim, interleave, rope_theta, _linear(rope_scale), False)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor, k: torch.Tensor, pos_ids: torch.Tensor, rotary_dim: int | None = None, interleave: bool = False,
    rope_scale: float = 1, rope_theta: float = 1e4,
) -> None:  # fmt: skip
    """As `apply_rope_inplace`, with pos_ids [tokens] int32 or int64: the position of each token."""
    _rotate("apply_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, rope_theta, _linear(rope_scale), True)


def apply_rope_pos_ids(
    q: torch.Tensor, k: torch.Tensor, pos_ids: torch.Tensor, rotary_dim: int | None = None, interleave: bool = False,
    rope_scale: float = 1, rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `apply_rope_pos_ids_inplace`, into new tensors. Returns: the new q and k."""
    return _rotate("apply_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, rope_theta, _linear(rope_scale), False)


def apply_llama31_rope_inplace(
    q: torch.Tensor, k: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor, rotary_dim: int | None = None,
    interleave: bool = False, rope_scale: float = 8, rope_theta: float = 5e5, low_freq_factor: float = 1,
    high_freq_factor: float = 4, old_context_len: int = 8192,
) -> None:  # fmt: skip
    """As `apply_rope_inplace`, with the frequencies of Llama 3.1.

    A frequency f becomes (1 - s) * f / rope_scale + s * f, where s is (old_context_len * f / (2 pi) -
    low_freq_factor) / (high_freq_factor - low_freq_factor), held to [0, 1].
    """
    function = "apply_llama31_rope_inplace"
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    positions = _ragged(function, q, indptr, offsets)
    _rotate(function, q, k, positions, rotary_dim, interleave, rope_theta, scaling, True)


def apply_llama31_rope(
    q: torch.Tensor, k: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor, rotary_dim: int | None = None,
    interleave: bool = False, rope_scale: float = 8, rope_theta: float = 5e5, low_freq_factor: float = 1,
    high_freq_factor: float = 4, old_context_len: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `apply_llama31_rope_inplace`, into new tensors. Returns: the new q and k."""
    function = "apply_llama31_rope"
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    positions = _ragged(function, q, indptr, offsets)
    return _rotate(function, q, k, positions, rotary_dim, interleave, rope_theta, scaling, False)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor, k: torch.Tensor, pos_ids: torch.Tensor, rotary_dim: int | None = None, interleave: bool = False,
    rope_scale: float = 8, rope_theta: float = 5e5, low_freq_factor: float = 1, high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:  # fmt: skip
    """As `apply_llama31_rope_inplace`, with pos_ids [tokens] int32 or int64: the position of each token."""
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    _rotate("apply_llama31_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, rope_theta, scaling, True)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor, k: torch.Tensor, pos_ids: torch.Tensor, rotary_dim: int | None = None, interleave: bool = False,
    rope_scale: float = 8, rope_theta: float = 5e5, low_freq_factor: float = 1, high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `apply_llama31_rope_pos_ids_inplace`, into new tensors. Returns: the new q and k."""
    scaling = _llama31(rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate("apply_llama31_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, rope_theta, scaling, False)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head_size: int, cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:  # fmt: skip
    """Rotates query and key by a table.

    Args:
        positions: [tokens] int32 or int64, rows of the table.
        query, key: [tokens, heads * head_size].
        cos_sin_cache: [rows, rotary_dim] float32: cosines, then sines.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_with_cos_sin_cache_inplace"
    _common.float_cache(function, cos_sin_cache)
    _common.rotate_flat(function, positions, query, key, head_size, cos_sin_cache, is_neox)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head_size: int, cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `apply_rope_with_cos_sin_cache_inplace`, into new tensors. Returns: the new query and key."""
    function = "apply_rope_with_cos_sin_cache"
    _common.float_cache(function, cos_sin_cache)
    _common.tensors(function, key=key)
    return _common.rotate_flat_new(function, positions, query, key, head_size, cos_sin_cache, is_neox)
