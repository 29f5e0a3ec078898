"""`packed_positions`: the positions of the tokens of packed rows, whole or of one rank of a context-parallel group."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from . import _arrays, _call

_NAME = "packed_positions"


def packed_positions(cu_seqlens: Any, total: int | None = None, *, cp_rank: int = 0, cp_size: int = 1) -> Any:
    """The positions of the tokens of a packed row, in which sequences lie one behind the other: each counts from 0.

    With cp_size they are those of one rank in zig-zag order, as ring-flash-attn and TransformerEngine have it: each
    sequence is cut into 2 * cp_size chunks, of which rank r has chunk r and behind it chunk 2 * cp_size - 1 - r.

    Args:
        cu_seqlens: [sequences + 1] int32 or int64, of torch or numpy. Where each sequence of the whole row begins, and
            where the last one ends: 0 first. Equal neighbours are a sequence without tokens.
        total: how many tokens the whole row has. Those behind the last sequence, padding, count from 0 too. None:
            cu_seqlens[-1], for which a GPU is waited for. With it nothing is waited for, and numbers on a GPU are
            not checked.
        cp_rank, cp_size: this rank and how many there are. Each sequence must have a multiple of 2 * cp_size tokens.

    Returns:
        [total / cp_size] positions like cu_seqlens, of its dtype and on its device, for `positions` of `rope_`.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is accepted.
        TypeError: an argument is of the wrong Python type.
    """
    torch, numpy = _arrays.torch, _arrays.numpy
    of_torch = torch is not None and _arrays.is_a(cu_seqlens, torch.Tensor)
    if not of_torch and not (numpy is not None and _arrays.is_a(cu_seqlens, numpy.ndarray)):
        raise TypeError(
            f"{_NAME}: cu_seqlens must be a torch.Tensor or a numpy.ndarray, but is a {_arrays._type_name(cu_seqlens)}"
        )
    dtype = str(cu_seqlens.dtype).removeprefix("torch.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0 or dtype not in ("int32", "int64"):
        raise ValueError(
            f"{_NAME}: cu_seqlens must be [sequences + 1] int32 or int64, but is {list(cu_seqlens.shape)} {dtype}"
        )
    cp_size = _arrays.integer(f"{_NAME}: cp_size", cp_size, 1)
    cp_rank = _arrays.integer(f"{_NAME}: cp_rank", cp_rank, 0, cp_size - 1)
    if not (of_torch and _call.is_watched((cu_seqlens,))):
        total = None if total is None else _arrays.integer(f"{_NAME}: total", total, 0)
        if total is None or not of_torch or cu_seqlens.device.type == "cpu":
            starts = cu_seqlens.tolist()
            total = starts[-1] if total is None else total
            _check(starts, total, 2 * cp_size if cp_size > 1 else 1)
    elif total is None:
        raise ValueError(f"{_NAME}: total must be given where torch traces the call, as cu_seqlens has no numbers then")
    if cp_size > 1 and total % (2 * cp_size):
        raise ValueError(f"{_NAME}: total must be a multiple of 2 * cp_size, {2 * cp_size}, but is {total}")

    # Of what this rank has: where its part of each sequence begins, and of the padding, which is one more.
    own = total // cp_size
    starts = cu_seqlens // cp_size
    if of_torch:
        token = torch.arange(own, dtype=starts.dtype, device=starts.device)
        sequence = torch.searchsorted(starts, token, right=True) - 1
    else:
        token = numpy.arange(own, dtype=starts.dtype)
        sequence = numpy.searchsorted(starts, token, side="right") - 1
    positions = token - starts[sequence]
    if cp_size == 1:
        return positions
    if of_torch:
        ends = torch.cat((starts[1:], starts.new_full((1,), own)))
    else:
        ends = numpy.append(starts[1:], starts.dtype.type(own))
    chunk = (ends - starts)[sequence] // 2
    last = 2 * cp_size - 1 - cp_rank  # the second chunk, which begins one chunk later here
    return positions + chunk * cp_rank + (positions >= chunk) * chunk * (last - 1 - cp_rank)


def _check(starts: list[int], total: int, multiple: int) -> None:
    """Refuses numbers that are no sequences one behind the other."""
    if starts[0] != 0:
        raise ValueError(f"{_NAME}: cu_seqlens must begin with 0, but begins with {starts[0]}")
    ends = [*starts[1:], total]
    for i, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        last = i == len(starts) - 1
        if end < begin and last:
            raise ValueError(f"{_NAME}: cu_seqlens must end at total, {total}, or before it, but ends at {begin}")
        if end < begin:
            raise ValueError(f"{_NAME}: cu_seqlens must not fall, but has {end} behind {begin} at index {i + 1}")
        if (end - begin) % multiple:
            which = "the padding behind the last sequence" if last else f"sequence {i}"
            raise ValueError(
                f"{_NAME}: each sequence must have a multiple of 2 * cp_size, {multiple}, tokens, but {which} has "
                f"{end - begin}"
            )
