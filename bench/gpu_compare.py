"""Ropewalk on CUDA beside its floor and its peers, in one process and one run.

    python bench/gpu_compare.py [--quick] [--json FILE] [--shapes NAME,..] [--no-compile]

Floor: an in-place read-modify-write of the same bytes, the best of a search over its shapes. Below 1,024 tokens it also
reads what a rotation must read, a position and a weight. Peers: torch eager and torch.compile (static shapes) of the
chain that transformers models run, and FlashInfer, Liger, flash-attn, sgl_kernel and vLLM if they are installed.

How it is timed: each contender is captured in a CUDA graph of many calls. From 1,024 tokens on the calls go round
buffers of 0.8 GB in all, so that nothing is left in the L2 cache; below, everything stays there. Contenders take turns;
a number is the median of several replays, each queued behind another one. Every result is compared with float64 before
it is timed. torch's cosines and sines are made beforehand; Ropewalk with frequencies computes its angles in the call.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ropewalk
import torch
import triton
import triton.language as tl

DEVICE = "cuda"
THETA, EPS = 1e4, 1e-6
COLD_BYTES = 800_000_000
COLD_FROM = 1024  # tokens
GRAPH_SECONDS = 2e-3  # a graph shall take about so long
PAIRINGS = ("neox", "interleaved")
OPS = ("rope", "norm+rope")


class Shape(NamedTuple):
    name: str
    tokens: int
    q_heads: int
    k_heads: int
    v_heads: int
    head_dim: int
    rotary_dim: int

    @property
    def width(self) -> int:
        return (self.q_heads + self.k_heads + self.v_heads) * self.head_dim

    @property
    def cold(self) -> bool:
        return self.tokens >= COLD_FROM


# SGLang's production shapes, and what transformers' language models have.
PRODUCTION = [
    Shape("flux_1024", 4096, 24, 24, 24, 128, 128),
    Shape("qwen_image_1024", 4096, 32, 32, 32, 128, 128),
    Shape("qwen_image_partial", 4096, 32, 32, 32, 128, 64),
    Shape("zimage_1024", 4096, 30, 30, 30, 128, 128),
    Shape("batch2_medium", 4096, 24, 24, 24, 128, 128),
]
LANGUAGE = [Shape(f"decode_{n}", n, 32, 8, 8, 128, 128) for n in (1, 4, 16, 64, 256)] + [
    Shape("prefill_1024", 1024, 32, 8, 8, 128, 128),
    Shape("prefill_2048", 2048, 32, 8, 8, 128, 128),
    Shape("prefill_8192", 8192, 32, 4, 4, 128, 128),
    Shape("prefill_16384", 16384, 32, 8, 8, 128, 128),
]
HEAD_SIZES = [Shape(f"head_{d}", 4096, *((32, 8, 8) if d <= 128 else (16, 4, 4) if d <= 256 else (8, 2, 2)), d, d)
              for d in (64, 72, 80, 96, 112, 128, 160, 192, 256, 512)]  # fmt: skip
SHAPES = {shape.name: shape for shape in PRODUCTION + LANGUAGE + HEAD_SIZES}
QUICK = ["flux_1024", "decode_1", "decode_64", "decode_256", "prefill_1024", "prefill_8192", "head_80", "head_256"]
COMPILED = ["flux_1024", "decode_1", "prefill_1024", "prefill_8192", "decode_64", "qwen_image_partial", "head_256",
            "decode_256", "qwen_image_1024", "zimage_1024"]  # fmt: skip
COMPILED_QUICK = ["flux_1024", "decode_1", "prefill_1024"]
STORED = ["decode_1", "decode_64", "decode_256", "prefill_1024", "prefill_8192", *(s.name for s in HEAD_SIZES)]


# ---------------------------------------------------------------------------------------------------------------------
# The floor. Elements are int32: two of bfloat16.


@triton.jit
def _floor_kernel(data, positions, weight, width, stride, chunks, head: tl.constexpr, part: tl.constexpr,
                  extras: tl.constexpr, block: tl.constexpr, evict: tl.constexpr):  # fmt: skip
    """Flips the lowest bits of `width` elements of each row of `stride`; of each head only the first `part`."""
    program = tl.program_id(0)
    row = program // chunks
    column = (program % chunks) * block + tl.arange(0, block)
    place = column if part == head else (column // part) * head + column % part
    pointer = data + row.to(tl.int64) * stride + place
    inside = column < width
    if extras:
        flip = tl.load(positions + row)
        factor = tl.load(weight + column % head, mask=inside, other=0)
    if evict:
        value = tl.load(pointer, mask=inside, eviction_policy="evict_first")
    else:
        value = tl.load(pointer, mask=inside)
    if extras:
        value = value ^ ((flip + factor) & 1)
    else:
        value = value ^ 65537
    if evict:
        tl.store(pointer, value, mask=inside, eviction_policy="evict_first")
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def _store_floor_kernel(data, positions, weight, slots, k_cache, v_cache, q_width, k_width, stride, chunks,
                        head: tl.constexpr, narrow: tl.constexpr, extras: tl.constexpr,
                        block: tl.constexpr):  # fmt: skip
    """As above for q and k, and copies k and v to their caches; `narrow`: a byte for each element, as fp8."""
    program = tl.program_id(0)
    row = program // chunks
    column = (program % chunks) * block + tl.arange(0, block)
    inside = column < q_width + 2 * k_width
    pointer = data + row.to(tl.int64) * stride + column
    slot = tl.load(slots + row).to(tl.int64)
    if extras:
        flip = tl.load(positions + row)
        factor = tl.load(weight + column % head, mask=inside, other=0)
    value = tl.load(pointer, mask=inside)
    if extras:
        value = value ^ ((flip + factor) & 1)
    else:
        value = value ^ 65537
    stored = value.to(tl.int16) if narrow else value
    in_k = (column >= q_width) & (column < q_width + k_width)
    in_v = (column >= q_width + k_width) & inside
    tl.store(pointer, value, mask=column < q_width + k_width)
    tl.store(k_cache + slot * k_width + (column - q_width), stored, mask=in_k)
    tl.store(v_cache + slot * k_width + (column - q_width - k_width), stored, mask=in_v)


def floor_configs(shape: Shape, elements: int) -> list[tuple[int, int, bool]]:
    """Block, warps and eviction policy of the kernels that are tried."""
    each = (2, 4) if shape.tokens < 256 else (2, 4, 8) if not shape.cold else (4, 8, 16)
    warps = (1, 2, 4) if not shape.cold else (2, 4, 8, 16)
    found = []
    for per_thread in each:
        for count in warps:
            block = per_thread * 32 * count
            if block <= 2 * triton.next_power_of_2(elements):
                found.append((block, count, False))
                if shape.cold and per_thread <= 8:
                    found.append((block, count, True))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Problem:
    """One shape: rotating packed rows [tokens, (q + k + v) heads * head_dim] bfloat16, positions, weights, tables."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        device = torch.device(DEVICE)
        generator = torch.Generator(device).manual_seed(1)
        self.row_bytes = shape.width * 2
        size = shape.tokens * self.row_bytes
        self.count = max(2, math.ceil(COLD_BYTES / size)) if shape.cold else 8
        self.packed = torch.empty(self.count, shape.tokens, shape.width, dtype=torch.bfloat16, device=device)
        self.first = torch.randn(shape.tokens, shape.width, generator=generator, device=device).to(torch.bfloat16)
        self.fill()
        self.positions = torch.arange(shape.tokens, dtype=torch.int32, device=device)
        self.weights = [
            (1 + torch.randn(shape.head_dim, generator=generator, device=device) / 16).to(torch.bfloat16)
            for _ in range(2)
        ]
        self.frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=shape.rotary_dim)
        self.angles = exact_angles(range(shape.tokens), shape.rotary_dim).to(device)  # float64
        self.cos_sin = torch.cat([self.angles.cos(), self.angles.sin()], -1).float()
        self.caches: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        pages = (shape.tokens + 15) // 16
        page = torch.randperm(pages, generator=generator, device=device)
        self.slots = page[self.positions.long() // 16] * 16 + self.positions.long() % 16
        self.slot_count = pages * 16

    def fill(self) -> None:
        self.packed.copy_(self.first[None].expand_as(self.packed))

    def heads(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views [tokens, heads, head_dim] of q, k and v."""
        s = self.shape
        return packed.view(s.tokens, -1, s.head_dim).split([s.q_heads, s.k_heads, s.v_heads], 1)  # type: ignore

    def cache(self, index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if dtype not in self.caches:
            shape = (self.slot_count, self.shape.k_heads, self.shape.head_dim)
            self.caches[dtype] = [
                (torch.zeros(shape, device=DEVICE).to(dtype), torch.zeros(shape, device=DEVICE).to(dtype))
                for _ in range(self.count)
            ]
        return self.caches[dtype][index]

    def bytes(self, op: str, cache_bytes: int = 0) -> int:
        """What the operation must read and write: q and k, and for a store v and the caches."""
        s = self.shape
        dim = s.head_dim if op != "rope" else s.rotary_dim
        moved = 2 * 2 * s.tokens * (s.q_heads + s.k_heads) * dim
        if cache_bytes:
            moved += s.tokens * s.v_heads * s.head_dim * 2 + 2 * s.tokens * s.k_heads * s.head_dim * cache_bytes
        return moved

    def expected(self, op: str, pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [tokens, heads, head_dim] float64."""
        q, k, _ = self.heads(self.first)
        return tuple(
            reference(x, self.angles, pairing, weight if op == "norm+rope" else None)
            for x, weight in zip((q, k), self.weights, strict=True)
        )  # type: ignore


def exact_angles(positions: Sequence[int], rotary_dim: int, theta: float = THETA) -> torch.Tensor:
    """[positions, rotary_dim/2] float64: position * frequency less whole turns, in long double."""
    i = np.arange(rotary_dim // 2, dtype=np.longdouble)
    turns = np.longdouble(theta) ** (-2 * i / rotary_dim) / (2 * np.longdouble("3.14159265358979323846264338327950288"))
    phase = np.asarray(positions, dtype=np.longdouble)[:, None] * turns
    return torch.from_numpy(((phase - np.round(phase)) * 2 * np.longdouble(np.pi)).astype(np.float64))


def reference(x: torch.Tensor, angles: torch.Tensor, pairing: str, weight: torch.Tensor | None) -> torch.Tensor:
    x = x.double()
    if weight is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    cos, sin, pairs = angles.cos()[:, None], angles.sin()[:, None], angles.shape[-1]
    out = x.clone()
    first, second = _pairs(pairing, pairs)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def _pairs(pairing: str, pairs: int) -> tuple[slice, slice]:
    if pairing == "neox":
        return slice(0, pairs), slice(pairs, 2 * pairs)
    return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, as a part of the largest expected value of its head."""
    if not got.numel():
        return 0.0
    error = (got.double() - want).abs() / want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return torch.nan_to_num(error, nan=math.inf).max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


@dataclass(eq=False)
class Contender:
    name: str
    op: str
    pairing: str  # "" for floors
    make: Callable[[int], Callable[[], Any]]  # of a buffer's number
    angles: str = ""
    bound: float = 6 * 2.0**-8  # of the error; peers round tables and products to bfloat16
    checked: bool = True
    cheap: bool = True  # one kernel, that is: may be captured often
    bytes: int = 0
    detail: str = ""
    error: float | None = None
    us: float | None = None
    failure: str = ""
    graph: Any = None
    calls: int = 0
    samples: list[float] = field(default_factory=list)


def ours(problem: Problem) -> list[Contender]:
    found = []
    for op in OPS:
        for pairing in PAIRINGS:
            for angles in ("frequencies", "table"):
                options: dict[str, Any] = {"positions": problem.positions, "pairing": pairing}
                if angles == "frequencies":
                    options["frequencies"] = problem.frequencies
                else:
                    options["cos_sin"] = problem.cos_sin
                if op == "norm+rope":
                    options |= {"q_weight": problem.weights[0], "k_weight": problem.weights[1], "eps": EPS}

                def make(index: int, options: dict[str, Any] = options) -> Callable[[], Any]:
                    q, k, _ = problem.heads(problem.packed[index])

                    def call() -> None:
                        ropewalk.rope_(q, k, **options)

                    return call

                q, k, _ = problem.heads(problem.packed[0])
                try:
                    detail = ropewalk.explain(q, k, **options).get("kernel", "")
                except RuntimeError as error:
                    detail = str(error)
                found.append(Contender("ropewalk", op, pairing, make, angles, 2.0**-8 * 1.02, detail=detail))
    return found


def stores(problem: Problem) -> list[Contender]:
    """Norm, rotation and KV store in one launch, and the floors of that."""
    s, found = problem.shape, []
    for label, dtype, size in (("kv bf16", torch.bfloat16, 2), ("kv fp8", torch.float8_e4m3fn, 1)):
        moved = problem.bytes("norm+rope", size)

        def make(index: int, dtype: torch.dtype = dtype, size: int = size) -> Callable[[], Any]:
            q, k, v = problem.heads(problem.packed[index])
            k_cache, v_cache = problem.cache(index, dtype)
            scale = 1.0 if size == 1 else None

            def call() -> None:
                ropewalk.rope_(q, k, positions=problem.positions, frequencies=problem.frequencies, eps=EPS,
                               q_weight=problem.weights[0], k_weight=problem.weights[1], v=v, k_cache=k_cache,
                               v_cache=v_cache, slots=problem.slots, k_scale=scale, v_scale=scale)  # fmt: skip

            return call

        op = f"norm+rope+{label}"
        found.append(Contender("ropewalk", op, "neox", make, "frequencies", 2.0**-8 * 1.02, bytes=moved))
        elements = s.width // 2
        for block, warps, evict in floor_configs(s, elements):
            if evict:
                continue

            def make_floor(
                index: int, block: int = block, warps: int = warps, dtype: torch.dtype = dtype, size: int = size,
                elements: int = elements,
            ) -> Callable[[], Any]:  # fmt: skip
                data = problem.packed[index].view(torch.int32)
                as_type = torch.int32 if size == 2 else torch.int16
                caches = [c.view(problem.slot_count, -1).view(as_type) for c in problem.cache(index, dtype)]
                weight = problem.weights[0].view(torch.int32)
                chunks = math.ceil(elements / block)

                def call() -> None:
                    _store_floor_kernel[(s.tokens * chunks,)](
                        data, problem.positions, weight, problem.slots, *caches, s.q_heads * s.head_dim // 2,
                        s.k_heads * s.head_dim // 2, data.stride(0), chunks, s.head_dim // 2, size == 1, not s.cold,
                        block, num_warps=warps)  # fmt: skip

                return call

            found.append(Contender("floor", op, "", make_floor, checked=False, bytes=moved,
                                   detail=f"row, {block * 4} bytes a block, {warps} warps"))  # fmt: skip
    return found


def floors(problem: Problem) -> list[Contender]:
    s, found = problem.shape, []
    parts = [("rope", s.rotary_dim)]
    if s.rotary_dim != s.head_dim:
        parts.append(("norm+rope", s.head_dim))
    for op, part in parts:
        elements = (s.q_heads + s.k_heads) * part // 2
        for block, warps, evict in floor_configs(s, elements):

            def make(
                index: int, block: int = block, warps: int = warps, evict: bool = evict, part: int = part,
                elements: int = elements,
            ) -> Callable[[], Any]:  # fmt: skip
                data = problem.packed[index].view(torch.int32)
                weight = problem.weights[0].view(torch.int32)
                chunks = math.ceil(elements / block)
                # Head sizes are compiled in only where they matter.
                head = s.head_dim // 2 if part != s.head_dim or not s.cold else 1
                inside = part // 2 if part != s.head_dim else head

                def call() -> None:
                    _floor_kernel[(s.tokens * chunks,)](
                        data, problem.positions, weight, elements, data.stride(0), chunks, head, inside, not s.cold,
                        block, evict, num_warps=warps)  # fmt: skip

                return call

            detail = f"row, {block * 4} bytes a block, {warps} warps{', evict first' if evict else ''}"
            found.append(Contender("floor", op, "", make, checked=False, detail=detail))
    return found


def chain(op: str, pairing: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What a transformers model does between its projections and attention. q and k [tokens, heads, head_dim]; cos and
    sin [tokens, 1, rotary_dim], each there for both elements of its pair."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * wide.to(x.dtype)

    def other(x: torch.Tensor) -> torch.Tensor:
        if pairing == "neox":
            half = x.shape[-1] // 2
            return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = cos.shape[-1]
        if width == x.shape[-1]:
            return x * cos + other(x) * sin
        part = x[..., :width]
        return torch.cat((part * cos + other(part) * sin, x[..., width:]), dim=-1)

    def call(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if op == "norm+rope":
            q, k = norm(q, weights[0]), norm(k, weights[1])
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return call


def torchs(problem: Problem, compiled: bool) -> list[Contender]:
    found = []
    for op in OPS:
        for pairing in PAIRINGS:
            tables = [problem.angles.cos(), problem.angles.sin()]
            wide = [
                (torch.cat([t, t], -1) if pairing == "neox" else t.repeat_interleave(2, -1)).to(torch.bfloat16)[:, None]
                for t in tables
            ]
            body = chain(op, pairing)
            if compiled:
                body = torch.compile(body, dynamic=False, fullgraph=True)

            def make(index: int, body: Any = body, wide: Any = wide) -> Callable[[], Any]:
                q, k, _ = problem.heads(problem.packed[index])
                return lambda: body(q, k, *wide, *problem.weights)

            name = "torch.compile" if compiled else "torch eager"
            found.append(Contender(name, op, pairing, make, "table", cheap=compiled))
    return found


def flashinfer(problem: Problem) -> list[Contender]:
    rope, found, s = importlib.import_module("flashinfer.rope"), [], problem.shape
    if s.rotary_dim // 2 % 8:  # it loads 16 bytes from each half, aligned or not, and the device faults
        print(f"FlashInfer: left out for {s.name}: halves of {s.rotary_dim // 2} elements", file=sys.stderr)
        return []
    for pairing in PAIRINGS:

        def with_positions(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = problem.heads(problem.packed[index])
            return lambda: rope.apply_rope_pos_ids_inplace(
                q, k, problem.positions, rotary_dim=s.rotary_dim, interleave=pairing == "interleaved", rope_theta=THETA
            )

        def with_table(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = (x.flatten(1) for x in problem.heads(problem.packed[index]))
            assert q.data_ptr() == problem.packed[index].data_ptr()
            return lambda: rope.apply_rope_with_cos_sin_cache_inplace(
                problem.positions, q, k, s.head_dim, problem.cos_sin, is_neox=pairing == "neox"
            )

        found.append(Contender("FlashInfer", "rope", pairing, with_positions, "frequencies"))
        found.append(Contender("FlashInfer", "rope", pairing, with_table, "table"))
    return found


def liger(problem: Problem) -> list[Contender]:
    """On q and k of their own, [1, tokens, heads, head_dim], as it would copy slices of packed rows."""
    function = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
    s = problem.shape
    if s.rotary_dim != s.head_dim:
        return []
    cos, sin = (torch.cat([t, t], -1).to(torch.bfloat16)[None] for t in (problem.angles.cos(), problem.angles.sin()))

    def make(index: int) -> Callable[[], Any]:
        flat, sizes = problem.packed[index].view(-1), [s.tokens * n * s.head_dim for n in (s.q_heads, s.k_heads)]
        first = [x.contiguous().view(1, s.tokens, -1, s.head_dim) for x in problem.heads(problem.first)[:2]]
        q, k = (x.view(1, s.tokens, -1, s.head_dim) for x in flat[: sum(sizes)].split(sizes))
        q.copy_(first[0])
        k.copy_(first[1])

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            new_q, new_k = function.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return new_q[0].transpose(0, 1), new_k[0].transpose(0, 1)

        return call

    return [Contender("Liger", "rope", "neox", make, "table")]


def flash_attn(problem: Problem) -> list[Contender]:
    apply, found = importlib.import_module("flash_attn.ops.triton.rotary").apply_rotary, []
    cos, sin = problem.cos_sin.to(torch.bfloat16).chunk(2, -1)
    cos, sin = cos.contiguous(), sin.contiguous()
    for pairing in PAIRINGS:

        def make(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = (x[None] for x in problem.heads(problem.packed[index]))

            def call() -> None:
                apply(q, cos, sin, interleaved=pairing == "interleaved", inplace=True)
                apply(k, cos, sin, interleaved=pairing == "interleaved", inplace=True)

            return call

        found.append(Contender("flash-attn", "rope", pairing, make, "table"))
    return found


def sgl_kernel(problem: Problem) -> list[Contender]:
    module, found, s = importlib.import_module("sgl_kernel"), [], problem.shape
    for pairing in PAIRINGS:
        neox = pairing == "neox"

        def norm_rope(index: int, neox: bool = neox) -> Callable[[], Any]:
            packed = problem.packed[index]
            return lambda: module.fused_qk_norm_rope(
                packed, s.q_heads, s.k_heads, s.v_heads, s.head_dim, EPS, *problem.weights, THETA, neox,
                problem.positions, 1.0, 0.0, 0.0, 1.0, s.rotary_dim)  # fmt: skip

        def rope(index: int, neox: bool = neox) -> Callable[[], Any]:
            q, k, _ = (x.flatten(1) for x in problem.heads(problem.packed[index]))
            positions = problem.positions.long()
            return lambda: module.apply_rope_with_cos_sin_cache_inplace(
                positions, q, k, s.head_dim, problem.cos_sin, is_neox=neox)  # fmt: skip

        found.append(Contender("sgl_kernel", "norm+rope", pairing, norm_rope, "frequencies"))
        found.append(Contender("sgl_kernel", "rope", pairing, rope, "table"))
    return found


def vllm(problem: Problem) -> list[Contender]:
    operators, found, s = importlib.import_module("vllm._custom_ops"), [], problem.shape
    cache, positions = problem.cos_sin.to(torch.bfloat16), problem.positions.long()
    for pairing in PAIRINGS:

        def make(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = problem.heads(problem.packed[index])
            return lambda: operators.rotary_embedding(positions, q, k, s.head_dim, cache, pairing == "neox")

        found.append(Contender("vLLM", "rope", pairing, make, "table"))
    return found


PEERS: dict[str, tuple[str, Callable[[Problem], list[Contender]]]] = {
    "FlashInfer": ("flashinfer-python", flashinfer),
    "Liger": ("liger-kernel", liger),
    "flash-attn": ("flash-attn", flash_attn),
    "sgl_kernel": ("sgl-kernel", sgl_kernel),
    "vLLM": ("vllm", vllm),
}
MODULES = {"FlashInfer": "flashinfer.rope", "Liger": "liger_kernel.ops.rope", "vLLM": "vllm._custom_ops",
           "flash-attn": "flash_attn.ops.triton.rotary", "sgl_kernel": "sgl_kernel"}  # fmt: skip


def peers_here() -> dict[str, str]:
    """Name, to its version or why it is absent."""
    found = {"torch": torch.__version__, "triton": triton.__version__}
    for name, (package, _) in PEERS.items():
        try:
            importlib.import_module(MODULES[name])
            found[name] = importlib.metadata.version(package)
        except Exception as error:  # whatever a foreign package does
            found[name] = f"absent: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def check(problem: Problem, contender: Contender, wanted: dict[tuple[str, str], Any]) -> None:
    """Runs the contender once, and compares with float64. Leaves `failure` if that went wrong."""
    try:
        problem.packed[0].copy_(problem.first)
        call = contender.make(0)
        result = call()
        torch.cuda.synchronize()
        if not contender.checked:
            return
        op = "norm+rope" if contender.op.startswith("norm") else "rope"
        want = wanted.get((op, contender.pairing))
        if want is None:
            want = wanted[op, contender.pairing] = problem.expected(op, contender.pairing)
        got = result if result is not None and contender.name in ("torch eager", "torch.compile", "Liger") else None
        q, k = got or problem.heads(problem.packed[0])[:2]
        contender.error = max(relative_error(q, want[0]), relative_error(k, want[1]))
        if contender.error > contender.bound:
            contender.failure = f"wrong: relative error {contender.error:.3g}, bound {contender.bound:.3g}"
        elif "kv" in contender.op:
            dtype = torch.float8_e4m3fn if "fp8" in contender.op else torch.bfloat16
            k_cache, v_cache = problem.cache(0, dtype)
            v = problem.heads(problem.first)[2]
            stored = (k_cache[problem.slots].float(), v_cache[problem.slots].float())
            errors = [relative_error(x, y.double()) for x, y in zip(stored, (k.float(), v.float()), strict=True)]
            if max(errors) > (2.0**-3 if "fp8" in contender.op else 0.0):
                contender.failure = f"wrong: the caches differ by {max(errors):.3g}"
    except Exception as error:  # a peer that does not take this shape
        contender.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def capture(calls: list[Callable[[], Any]], total: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(total):
                calls[i % len(calls)]()
        finally:
            graph.capture_end()
    return graph


def once(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay that is queued behind another one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def load(problem: Problem, contender: Contender, stream: torch.cuda.Stream) -> None:
    """Captures the contender's graph, of about GRAPH_SECONDS."""
    if contender.failure:
        return
    try:
        calls = [contender.make(i) for i in range(problem.count)]
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        total = problem.count if problem.shape.cold else 5 * problem.count
        graph = capture(calls, total, stream)
        graph.replay()
        seconds = once(graph) * 1e-6
        if seconds < GRAPH_SECONDS / 2 and contender.cheap:
            passes = min(math.ceil(GRAPH_SECONDS / seconds), 1600 // total)
            if passes > 1:
                total *= passes
                graph = capture(calls, total, stream)
                graph.replay()
        contender.graph, contender.calls = graph, total
    except Exception as error:  # a peer that cannot be captured
        contender.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        torch.cuda.synchronize()


def measure(contenders: list[Contender], rounds: int) -> None:
    """Median microseconds of a call; contenders take turns."""
    ready = [c for c in contenders if c.graph is not None]
    for number in range(rounds):
        for contender in ready if number % 2 else reversed(ready):
            contender.samples.append(once(contender.graph) / contender.calls)
    for contender in ready:
        contender.us = statistics.median(contender.samples)


def search(problem: Problem, candidates: list[Contender], stream: torch.cuda.Stream, keep: int = 3) -> list[Contender]:
    """The best few floors of each operation."""
    for candidate in candidates:
        check(problem, candidate, {})
        load(problem, candidate, stream)
    measure(candidates, 3)
    best = []
    for op in dict.fromkeys(c.op for c in candidates):
        timed = sorted((c for c in candidates if c.op == op and c.us is not None), key=lambda c: c.us)
        best += timed[:keep]
        for candidate in timed[keep:]:
            candidate.graph = None
    for candidate in best:
        candidate.samples.clear()
    return best


def compare(shape: Shape, options: argparse.Namespace, here: dict[str, str], compiled: bool) -> list[dict[str, Any]]:
    """All contenders on one shape; a row of the results for each."""
    problem = Problem(shape)
    stream = torch.cuda.Stream()
    wanted: dict[tuple[str, str], Any] = {}
    with_store = shape.name in STORED
    store = stores(problem) if with_store else []
    contenders = ours(problem) + [c for c in store if c.name != "floor"]
    contenders += torchs(problem, compiled=False)
    for name, (_, maker) in PEERS.items():
        if not here[name].startswith("absent"):
            try:
                contenders += maker(problem)
            except Exception as error:  # a peer of another version
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    if compiled:
        torch.compiler.reset()
        contenders += torchs(problem, compiled=True)
    for contender in contenders:
        check(problem, contender, wanted)
    wanted.clear()
    problem.fill()
    best = search(problem, floors(problem) + [c for c in store if c.name == "floor"], stream)
    problem.fill()
    for contender in contenders:
        load(problem, contender, stream)
    measure(best + contenders, 5 if options.quick else 9)

    floor: dict[str, Contender] = {}
    for candidate in best:
        if candidate.op not in floor or candidate.us < floor[candidate.op].us:  # type: ignore
            floor[candidate.op] = candidate
    if "rope" in floor:
        floor.setdefault("norm+rope", floor["rope"])
    rows = []
    for contender in [*dict.fromkeys(floor.values()), *contenders]:
        moved = contender.bytes or problem.bytes(contender.op)
        lowest = floor.get(contender.op)
        row: dict[str, Any] = {
            "shape": shape.name, "tokens": shape.tokens, "q_heads": shape.q_heads, "k_heads": shape.k_heads,
            "v_heads": shape.v_heads, "head_dim": shape.head_dim, "rotary_dim": shape.rotary_dim, "dtype": "bf16",
            "cold": shape.cold, "op": contender.op, "pairing": contender.pairing, "angles": contender.angles,
            "contender": contender.name, "us": contender.us, "bytes": moved, "error": contender.error,
            "detail": contender.detail,
        }  # fmt: skip
        if contender.failure:
            row["failure"] = contender.failure
        if contender.us is not None:
            row["gb_per_s"] = moved / contender.us * 1e-3
            if lowest is not None:
                row |= {"floor_us": lowest.us, "of_floor": contender.us / lowest.us, "floor": lowest.detail}
        limit = aim(row)
        if limit is not None and contender.name == "ropewalk" and "of_floor" in row:
            row |= {"aim": limit, "met": row["of_floor"] <= limit}
        rows.append(row)
    for contender in [*best, *contenders]:
        contender.graph = None
    return rows


def aim(row: dict[str, Any]) -> float | None:
    """The highest ratio to the floor that the design allows."""
    if "+kv" in row["op"]:
        return 1.10
    dim, norm = row["head_dim"], row["op"] == "norm+rope"
    if dim & (dim - 1):
        return 1.08
    if row["tokens"] >= 4096:
        return 1.06 if norm else 1.03
    if row["tokens"] >= 1024:
        return 1.10 if norm else 1.05
    if row["tokens"] >= 256:
        return 1.08 if norm else 1.05
    return 1.12 if norm else 1.05


# ---------------------------------------------------------------------------------------------------------------------
# Host time, accuracy


def host_times() -> dict[str, float]:
    """Microseconds that a call costs the caller, the device idle or nearly: the median of averages, in turns."""
    x = torch.zeros(1, device=DEVICE)
    q, k = torch.randn(1, 32, 128, device=DEVICE).bfloat16(), torch.randn(1, 8, 128, device=DEVICE).bfloat16()
    positions = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=128)
    weight = torch.ones(128, dtype=torch.bfloat16, device=DEVICE)
    calls: dict[str, Callable[[], Any]] = {
        "x.add_(1)": lambda: x.add_(1),
        "ropewalk.rope_": lambda: ropewalk.rope_(q, k, positions=positions, frequencies=frequencies),
        "ropewalk.rope_, norm": lambda: ropewalk.rope_(
            q, k, positions=positions, frequencies=frequencies, q_weight=weight, k_weight=weight
        ),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for number in range(21):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            if number:
                samples[name].append((time.perf_counter() - start) / 200 * 1e6)
    gc.enable()
    torch.cuda.synchronize()
    out = {name: statistics.median(values) for name, values in samples.items()}
    out["ropewalk.rope_ / x.add_(1)"] = out["ropewalk.rope_"] / out["x.add_(1)"]
    return out


def error_by_position(here: dict[str, str]) -> list[dict[str, Any]]:
    """Largest absolute error of a rotation of 128 positions from each on, heads of 128 with theta 1e4, against float64:
    bfloat16 results, and float32 ones."""
    starts = [0, 1024, 8192, 32_768, 131_072, 524_288, 1_000_000, 2**22, 10_000_000, 2**26, 2**28, 2**30, 2**31 - 128]
    generator = torch.Generator(DEVICE).manual_seed(3)
    frequencies, rows = ropewalk.Frequencies(theta=THETA, rotary_dim=128), []
    inv_freq = 1.0 / THETA ** (torch.arange(0, 128, 2, device=DEVICE, dtype=torch.float32) / 128)
    for start in starts:
        positions = torch.arange(start, start + 128, dtype=torch.int64, device=DEVICE)
        angles = exact_angles(range(start, start + 128), 128).to(DEVICE)
        q = torch.randn(128, 8, 128, generator=generator, device=DEVICE).bfloat16()
        want = reference(q, angles, "neox", None)
        row: dict[str, Any] = {"position": start, "bf16 rounding": (want.bfloat16().double() - want).abs().max().item()}

        def largest(x: torch.Tensor, want: torch.Tensor = want) -> float:
            return (x.double() - want).abs().max().item()

        def ours_in(dtype: torch.dtype, q: torch.Tensor = q, positions: torch.Tensor = positions) -> torch.Tensor:
            return ropewalk.rope(q.to(dtype), positions=positions, frequencies=frequencies)[0]

        row["ropewalk"], row["ropewalk, float32"] = largest(ours_in(torch.bfloat16)), largest(ours_in(torch.float32))
        phase = positions.float()[:, None] * inv_freq
        cos, sin = phase.cos()[:, None], phase.sin()[:, None]
        a, b = q.float().chunk(2, -1)
        plain = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        row["float32 sincos"], row["float32 sincos, float32"] = largest(plain.bfloat16()), largest(plain)
        if not here.get("FlashInfer", "absent").startswith("absent"):
            try:
                other, k = q.clone(), q[:, :1].clone()
                importlib.import_module("flashinfer.rope").apply_rope_pos_ids_inplace(
                    other, k, positions, rope_theta=THETA
                )
                row["FlashInfer"] = largest(other)
            except Exception as error:  # whatever a foreign package does
                print(f"FlashInfer at {start}: {error}", file=sys.stderr)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def gpu_name() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    details = {"name": properties.name, "capability": f"{properties.major}.{properties.minor}",
               "multiprocessors": str(properties.multi_processor_count),
               "cuda of torch": str(torch.version.cuda)}  # fmt: skip
    for backend in ropewalk.backends():
        if backend["name"] == "cuda":
            details["ropewalk"] = backend["detail"]
    return details


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each operation and pairing of one shape: microseconds, and ours as a multiple of the floor."""
    for op, pairing in dict.fromkeys((r["op"], r["pairing"]) for r in rows if r["contender"] == "ropewalk"):
        cells = []
        for row in rows:
            if (row["op"], row["pairing"]) != (op, pairing):
                continue
            name = row["contender"] + {"table": " table", "frequencies": ""}.get(row["angles"], "")
            if row["contender"] in ("torch eager", "torch.compile", "Liger", "flash-attn", "vLLM"):
                name = row["contender"]
            if row["us"] is None:
                cells.append(f"{name} {row.get('failure', '')[:60]}")
            elif row["contender"] == "ropewalk":
                missed = "" if row.get("met", True) else f" (aim {row['aim']:.2f})"
                cells.append(f"{name} {row['us']:.2f} = {row.get('of_floor', math.nan):.3f}{missed}")
            else:
                cells.append(f"{name} {row['us']:.2f}")
        floor = next((r["floor_us"] for r in rows if r["op"] == op and "floor_us" in r), math.nan)
        first = rows[0]
        heads = f"{first['q_heads']}/{first['k_heads']}/{first['v_heads']}x{first['head_dim']}"
        print(f"{first['shape']:18} {first['tokens']:5} {heads:13} {op:18} {pairing:11} floor {floor:7.2f}  ", end="")
        print("  ".join(cells), flush=True)


def parse_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"no shape {name}; there are {', '.join(SHAPES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes and fewer replays")
    parser.add_argument("--shapes", type=parse_names, metavar="NAME,..", help="these alone")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="when to leave the rest out: default 300, with --quick 150")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_compare: torch finds no CUDA device here", file=sys.stderr)
        return 2
    began = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    limit = options.seconds or (150 if options.quick else 300)
    here = peers_here()
    for name, version in here.items():
        print(f"{name}: {version}")
    names = options.shapes or (QUICK if options.quick else list(SHAPES))
    compiled = [] if options.no_compile else names if options.shapes else COMPILED_QUICK if options.quick else COMPILED
    out: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu_name(), "ropewalk": ropewalk.__version__, "peers": here, "quick": options.quick,
        "results": [], "skipped": [],
    }  # fmt: skip

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(out, indent=1) + "\n")

    wrong = 0
    with torch.no_grad():
        out["host_us"] = host_times()
        print("host, us: " + ", ".join(f"{name} {value:.2f}" for name, value in out["host_us"].items()))
        out["error_by_position"] = error_by_position(here)
        for name in names:
            elapsed = time.perf_counter() - began
            if elapsed > limit - 5:
                out["skipped"].append(name)
                continue
            rows = compare(SHAPES[name], options, here, name in compiled and elapsed < 0.75 * limit)
            out["results"] += rows
            print_table(rows)
            wrong += sum(row["contender"] == "ropewalk" and "failure" in row for row in rows)
            write()
            torch.cuda.empty_cache()
    aims = [row for row in out["results"] if "aim" in row]
    fused = {(r["shape"], r["pairing"]): r["us"] for r in out["results"]
             if r["contender"] == "ropewalk" and r["op"] == "norm+rope" and r["angles"] == "frequencies"}  # fmt: skip
    for row in out["results"]:
        base = fused.get((row["shape"], row["pairing"]))
        if row["contender"] == "ropewalk" and "+kv" in row["op"] and base and row["us"]:
            row["of_norm_rope"] = row["us"] / base
            if row["tokens"] <= 256:
                row["met_of_norm_rope"] = row["of_norm_rope"] <= 1.15
            print(f"{row['shape']:18} {row['op']:18} {row['us']:.2f} = {row['of_norm_rope']:.3f} of norm+rope")
    slower = slower_than_peers(out["results"])
    for line in slower:
        print(line)
    out["slower_than"] = slower
    out["kernels"] = ropewalk.counters()
    out["seconds"] = time.perf_counter() - began
    print(f"aims met: {sum(r['met'] for r in aims)} of {len(aims)}; slower than a peer: {len(slower)}; wrong: {wrong}; "
          f"skipped: {', '.join(out['skipped']) or 'none'}; {out['seconds']:.0f} s")  # fmt: skip
    write()
    return 1 if wrong else 0


def slower_than_peers(rows: list[dict[str, Any]]) -> list[str]:
    """Where a peer beats us at what it does (angles computed or from a table alike)."""
    found = []
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row["contender"] == "ropewalk" and row["us"]:
            key = (row["shape"], row["op"], row["pairing"])
            best[key] = min(best.get(key, math.inf), row["us"])
    for row in rows:
        key = (row["shape"], row["op"], row["pairing"])
        if row["contender"] not in ("ropewalk", "floor") and row["us"] and key in best and row["us"] < best[key]:
            other = f"{row['contender']} {row['angles']} {row['us']:.2f}"
            found.append(f"slower: {' '.join(key)}: {best[key]:.2f}, {other}")
    return found


if __name__ == "__main__":
    sys.exit(main())
