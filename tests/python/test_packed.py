"""`packed_positions`: packed rows rotate as each of their sequences alone, forward and backward, whole and cut for the
ranks of a context-parallel group."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy
import pytest
import ropewalk
import torch

HEAD = 16
F = ropewalk.Frequencies(1e4, HEAD)
LENGTHS = [[8, 4, 16], [4, 0, 12, 0], [12], [0, 8]]


def bounds(lengths: list[int], dtype: Any = torch.int32) -> Any:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def of_rank(length: int, rank: int, size: int) -> list[int]:
    """The tokens of a sequence that a rank has: of twice as many chunks as ranks one from each end."""
    if size == 1:
        return list(range(length))
    chunks = [range(i * length // (2 * size), (i + 1) * length // (2 * size)) for i in range(2 * size)]
    return [*chunks[rank], *chunks[2 * size - 1 - rank]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions(lengths: list[int], size: int, padding: int, dtype: Any) -> None:
    cu, total = bounds(lengths, dtype), sum(lengths) + padding
    for rank in range(size):
        want = [p for length in (*lengths, padding) for p in of_rank(length, rank, size)]
        options = {"cp_rank": rank, "cp_size": size}
        got = ropewalk.packed_positions(cu, total, **options)
        assert got.dtype == dtype
        assert got.tolist() == want
        strided = torch.stack((cu, cu - 5), -1)[:, 0]
        assert torch.equal(ropewalk.packed_positions(strided, total, **options), got)
        of_numpy = ropewalk.packed_positions(cu.numpy(), total, **options)
        assert of_numpy.dtype == cu.numpy().dtype
        assert of_numpy.tolist() == want
        if not padding:
            assert torch.equal(ropewalk.packed_positions(cu, **options), got)
            assert ropewalk.packed_positions(cu.numpy(), **options).tolist() == want


def rotated(x: Any, weight: Any, grad: Any, positions: Any) -> tuple[Any, Any, Any]:
    """The result and the gradients of x and the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = ropewalk.rope(x, frequencies=F, positions=positions, q_weight=weight)[0]
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("size", [1, 2])
def test_packed_rows_rotate_as_their_sequences(size: int) -> None:
    lengths = [8, 4, 16]
    generator = torch.Generator().manual_seed(0)
    rows, grads = (torch.randn(sum(lengths), 3, HEAD, generator=generator) for _ in range(2))
    weight = torch.rand(HEAD, generator=generator) + 0.5
    alone = [rotated(x, weight, g, None) for x, g in zip(rows.split(lengths), grads.split(lengths), strict=True)]
    sums = torch.zeros(HEAD)
    for rank in range(size):
        positions = ropewalk.packed_positions(bounds(lengths), cp_rank=rank, cp_size=size)
        own = [torch.tensor(of_rank(length, rank, size)) for length in lengths]

        def cut(parts: Any, own: Any = own) -> Any:
            return torch.cat([part[tokens] for part, tokens in zip(parts, own, strict=True)])

        y, x_grad, weight_grad = rotated(cut(rows.split(lengths)), weight, cut(grads.split(lengths)), positions)
        assert torch.equal(y, cut([each[0] for each in alone]))
        assert torch.equal(x_grad, cut([each[1] for each in alone]))
        sums += weight_grad
    torch.testing.assert_close(sums, sum(each[2] for each in alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    def rotate(x: Any, cu: Any, rank: int) -> Any:
        positions = ropewalk.packed_positions(cu, 2 * x.shape[0], cp_rank=rank, cp_size=2)
        return ropewalk.rope(x, frequencies=F, positions=positions)[0]

    torch._dynamo.reset()
    compiled = torch.compile(rotate, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([8, 4, 16], [4, 12, 4]):
        x = torch.randn(sum(lengths) // 2, 2, HEAD, requires_grad=True)
        got, want = (call(x, bounds(lengths), 1) for call in (compiled, rotate))
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (got, want)))
    torch._dynamo.reset()


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a list": ([0, 4], {}, TypeError, "cu_seqlens must be a torch.Tensor or a numpy.ndarray, but is a list"),
    "no numbers": (torch.empty(0, dtype=torch.int32), {}, ValueError,
                   r"cu_seqlens must be \[sequences \+ 1\] int32 or int64, but is \[0\] int32"),
    "two rows": (bounds([4])[None], {}, ValueError, r"but is \[1, 2\] int32"),
    "floats": (numpy.array([0.0, 4.0]), {}, ValueError, r"but is \[2\] float64"),
    "first": (torch.tensor([1, 4]), {}, ValueError, "cu_seqlens must begin with 0, but begins with 1"),
    "falls": (torch.tensor([0, 5, 3, 8]), {}, ValueError, "must not fall, but has 3 behind 5 at index 2"),
    "past the row": (bounds([4, 8]), {"total": 11}, ValueError, "must end at total, 11, or before it, but ends at 12"),
    "negative total": (bounds([4]), {"total": -1}, ValueError, "total must be from 0 to .*, but is -1"),
    "total of a wrong type": (bounds([4]), {"total": 4.0}, TypeError, "total must be an int, but is a float"),
    "no ranks": (bounds([4]), {"cp_size": 0}, ValueError, "cp_size must be from 1 to .*, but is 0"),
    "rank": (bounds([4]), {"cp_size": 2, "cp_rank": 2}, ValueError, "cp_rank must be from 0 to 1, but is 2"),
    "cut": (bounds([8, 6, 2]), {"cp_size": 2}, ValueError,
            r"each sequence must have a multiple of 2 \* cp_size, 4, tokens, but sequence 1 has 6"),
    "padding": (bounds([8, 4]).numpy(), {"cp_size": 2, "total": 14}, ValueError,
                "but the padding behind the last sequence has 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    cu, options, kind, words = BAD[name]
    with pytest.raises(kind, match=f"^packed_positions: .*{words}"):
        ropewalk.packed_positions(cu, **options)


def test_where_numbers_cannot_be_seen_the_total_must_be_given() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cu = torch.empty(4, dtype=torch.int32)
        assert ropewalk.packed_positions(cu, 16, cp_size=2).shape == (8,)
        with pytest.raises(ValueError, match="packed_positions: total must be given where torch traces the call"):
            ropewalk.packed_positions(cu)
        with pytest.raises(ValueError, match=r"total must be a multiple of 2 \* cp_size, 4, but is 18"):
            ropewalk.packed_positions(cu, 18, cp_size=2)
