"""Ropewalk on CUDA beside its floor and its peers, in one process and one run.

    python bench/gpu_compare.py [--quick] [--json FILE] [--shapes NAME,..] [--no-compile]

Floor: an in-place read-modify-write of the same bytes, the best of a search over the kernels of measure/cuda_floor.cc.
Below 1,024 tokens it also reads what a rotation must read, a position and a weight; for a store it reads the slots and
writes the caches. "Of floor" is time over the floor's. Peers: torch eager and torch.compile (static shapes) of the
chain that transformers models run, and FlashInfer, Liger, flash-attn, sgl_kernel and vLLM if they are installed.

How it is timed: each contender is captured in a CUDA graph of many calls. From 1,024 tokens on the calls go round
buffers of 0.8 GB in all, so that nothing is left in the L2 cache; below, they go round eight buffers, which stay there
if they fit. Contenders take turns; a number is the median of several replays, each queued behind another one. Every
result is compared with float64 before it is timed, with what must not change. torch's cosines and sines are made
beforehand; Ropewalk with frequencies computes its angles in the call.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import datetime
import functools
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

import gpu_floor
import numpy as np
import ropewalk
import torch

DEVICE = "cuda"
THETA, EPS = 1e4, 1e-6
COLD_BYTES = 800_000_000
COLD_FROM = 1024  # tokens
GRAPH_SECONDS = 2e-3  # a graph shall take about so long
PAIRINGS = ("neox", "interleaved")
OPS = ("rope", "norm+rope")
OUR_BOUND = 2.0**-8 * 1.02
# "k only": k goes to its cache and is not written back, where Ropewalk has that option.
HAS_K_STORE_ONLY = any(argument["name"] == "k_store_only" for argument in ropewalk._module.description())
STORES = ["norm+rope+kv bf16", "norm+rope+kv fp8"]
if HAS_K_STORE_ONLY:
    STORES += [f"{op}, k only" for op in STORES]


def cache_dtype(op: str) -> torch.dtype:
    return torch.float8_e4m3fn if "fp8" in op else torch.bfloat16


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

    @property
    def slots(self) -> int:
        """Of the caches: whole pages of 16."""
        return (self.tokens + 15) // 16 * 16


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
# Those of FlashInfer's generated kernels (Cake): decode to 256 tokens, then prefill of four requests.
CAKE = [Shape(f"cake_{q}_{n}", n, q, k, k, 128, 128) for q, k in ((64, 8), (8, 1))
        for n in (1, 8, 32, 128, 256, 1024, 4096)]  # fmt: skip
# SOL-ExecBench L1_018, fused_rope_with_qk_norm_and_kv_cache_update: batch, tokens and tokens in the cache before.
SOL_WORKLOADS = [(1, 1, 0), (1, 256, 128), (4, 1, 2048), (1, 128, 0), (2, 512, 256), (2, 128, 0), (1, 1024, 512),
                 (1, 4096, 2048), (1, 2048, 0), (1, 293, 131), (8, 128, 0), (8, 256, 1024), (1, 541, 0)]  # fmt: skip
SOL_OP, SOL_CACHE, SOL_THETA = "norm+rope+kv bf16, L1_018", 262_144, 1e7
SOL = {f"sol_018_{b}x{n}": Shape(f"sol_018_{b}x{n}", b * n, 96, 8, 8, 128, 128) for b, n, _ in SOL_WORKLOADS}
# Helion's pretuned_kernels/fused_qk_norm_rope.
HELION = [Shape(f"helion_{q}_{n}", n, q, 8, 8, 128, 128) for q in (16, 32, 64)
          for n in (1, 8, 32, 128, 512, 2048, 8192)]  # fmt: skip
GROUPS = {"production": PRODUCTION, "language": LANGUAGE, "heads": HEAD_SIZES, "cake": CAKE, "sol": list(SOL.values()),
          "helion": HELION}  # fmt: skip
DEFAULT = PRODUCTION + LANGUAGE + HEAD_SIZES
SHAPES = {shape.name: shape for shapes in GROUPS.values() for shape in shapes}
QUICK = ["flux_1024", "decode_1", "decode_64", "decode_256", "prefill_1024", "prefill_8192", "head_80", "head_256"]
COMPILED = ["flux_1024", "decode_1", "prefill_1024", "prefill_8192", "decode_64", "qwen_image_partial", "head_256",
            "decode_256", "qwen_image_1024", "zimage_1024"]  # fmt: skip
COMPILED_QUICK = ["flux_1024", "decode_1", "prefill_1024"]
WITH_STORE = [
    "decode_1",
    "decode_64",
    "decode_256",
    "prefill_1024",
    "prefill_8192",
    *(s.name for s in HEAD_SIZES + CAKE + list(SOL.values())),
]


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Problem:
    """One shape: rotating packed rows [tokens, (q + k + v) heads * head_dim] bfloat16, positions, weights, tables."""

    def __init__(self, shape: Shape, exact: torch.dtype = torch.float64, buffers: int | None = None) -> None:
        self.shape, self.exact = shape, exact  # the dtype of the reference
        device = torch.device(DEVICE)
        generator = torch.Generator(device).manual_seed(1)
        self.row_bytes = shape.width * 2
        size = shape.tokens * self.row_bytes
        self.count = buffers or (max(2, math.ceil(COLD_BYTES / size)) if shape.cold else 8)
        self.packed = torch.empty(self.count, shape.tokens, shape.width, dtype=torch.bfloat16, device=device)
        self.first = torch.randn(shape.tokens, shape.width, generator=generator, device=device).to(torch.bfloat16)
        self.fill()
        self.positions = torch.arange(shape.tokens, dtype=torch.int32, device=device)
        self.weights = [
            (1 + torch.randn(shape.head_dim, generator=generator, device=device) / 16).to(torch.bfloat16)
            for _ in range(2)
        ]
        self.frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=shape.rotary_dim)
        self.angles = first_angles(shape.tokens, shape.rotary_dim).to(device)  # float64
        # What the floor flips bits by, as measure/cuda_floor.h says.
        self.floor_positions = torch.full((shape.tokens,), 0x80008000 - 2**32, dtype=torch.int32, device=device)
        self.floor_weight = torch.zeros(shape.head_dim, dtype=torch.bfloat16, device=device)
        self.cos_sin = torch.cat([self.angles.cos(), self.angles.sin()], -1).float()
        self.sol: Any = None  # where the shape is one of those
        self.caches: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        page = torch.randperm(shape.slots // 16, generator=generator, device=device)
        self.slots = page[self.positions.long() // 16] * 16 + self.positions.long() % 16

    def fill(self) -> None:
        self.packed.copy_(self.first[None].expand_as(self.packed))

    def heads(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views [tokens, heads, head_dim] of q, k and v."""
        s = self.shape
        return packed.view(s.tokens, -1, s.head_dim).split([s.q_heads, s.k_heads, s.v_heads], 1)  # type: ignore

    def cache(self, index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if dtype not in self.caches:
            shape = (self.shape.slots, self.shape.k_heads, self.shape.head_dim)
            self.caches[dtype] = [
                (torch.zeros(shape, device=DEVICE).to(dtype), torch.zeros(shape, device=DEVICE).to(dtype))
                for _ in range(self.count)
            ]
        return self.caches[dtype][index]

    def bytes(self, op: str) -> int:
        """What the operation must read and write: q and k, and for a store v and the caches."""
        s = self.shape
        dim = s.head_dim if op != "rope" else s.rotary_dim
        moved = 2 * 2 * s.tokens * (s.q_heads + s.k_heads) * dim
        if "+kv" in op:
            cache_bytes = 1 if "fp8" in op else 2
            moved += s.tokens * s.v_heads * s.head_dim * 2 + 2 * s.tokens * s.k_heads * s.head_dim * cache_bytes
        if "k only" in op:
            moved -= 2 * s.tokens * s.k_heads * dim
        return moved

    def expected(self, op: str, pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [tokens, heads, head_dim] in `self.exact`'s dtype."""
        q, k, _ = self.heads(self.first)
        return tuple(
            reference(x, self.angles, pairing, weight if op.startswith("norm") else None, self.exact)
            for x, weight in zip((q, k), self.weights, strict=True)
        )  # type: ignore


def exact_angles(positions: Sequence[int], rotary_dim: int, theta: float = THETA) -> torch.Tensor:
    """[positions, rotary_dim/2] float64: position * frequency less whole turns, in long double."""
    i = np.arange(rotary_dim // 2, dtype=np.longdouble)
    turns = np.longdouble(theta) ** (-2 * i / rotary_dim) / (2 * np.longdouble("3.14159265358979323846264338327950288"))
    phase = np.asarray(positions, dtype=np.longdouble)[:, None] * turns
    return torch.from_numpy(((phase - np.round(phase)) * 2 * np.longdouble(np.pi)).astype(np.float64))


@functools.cache
def first_angles(tokens: int, rotary_dim: int) -> torch.Tensor:
    return exact_angles(range(tokens), rotary_dim)


def reference(
    x: torch.Tensor, angles: torch.Tensor, pairing: str, weight: torch.Tensor | None, exact: torch.dtype = torch.float64
) -> torch.Tensor:
    x = x.to(exact)
    if weight is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.to(exact)
    cos, sin, pairs = angles.cos().to(exact)[:, None], angles.sin().to(exact)[:, None], angles.shape[-1]
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
    error = (got.to(want.dtype) - want).abs() / want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
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
    shape: str = ""  # of our kernel
    error: float | None = None
    us: float | None = None
    failure: str = ""
    result: Callable[[Any], tuple[torch.Tensor, ...]] | None = None  # q, k and maybe v, of what the call returns
    verify: Callable[[], tuple[float, str]] | None = None  # instead: the error, and what else is wrong
    graph: Any = None
    calls: int = 0
    samples: list[float] = field(default_factory=list)


def our_arguments(
    problem: Problem, op: str, pairing: str, angles: str, index: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """q and k and the options of `ropewalk.rope_`."""
    q, k, v = problem.heads(problem.packed[index])
    options: dict[str, Any] = {"positions": problem.positions, "pairing": pairing}
    if angles == "frequencies":
        options["frequencies"] = problem.frequencies
    else:
        options["cos_sin"] = problem.cos_sin
    if op.startswith("norm"):
        options |= {"q_weight": problem.weights[0], "k_weight": problem.weights[1], "eps": EPS}
    if "+kv" in op:
        k_cache, v_cache = problem.cache(index, cache_dtype(op))
        options |= {"v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": problem.slots}
        if "fp8" in op:
            options |= {"k_scale": 1.0, "v_scale": 1.0}
        if "k only" in op:
            options["k_store_only"] = True
    return (q, k), options


def ours(problem: Problem, op: str, pairing: str, angles: str) -> Contender:
    def make(index: int) -> Callable[[], Any]:
        (q, k), options = our_arguments(problem, op, pairing, angles, index)

        def call() -> None:
            ropewalk.rope_(q, k, **options)

        return call

    told: dict[str, str] = {}
    try:
        tensors, options = our_arguments(problem, op, pairing, angles)
        told = ropewalk.explain(*tensors, **options)
    except (RuntimeError, ValueError) as error:
        told["kernel"] = str(error)
    return Contender("ropewalk", op, pairing, make, angles, OUR_BOUND, bytes=problem.bytes(op),
                     detail=told.get("kernel", ""), shape=told.get("shape", ""))  # fmt: skip


class Sol:
    """The tensors of SOL-ExecBench L1_018 in the memory of a problem: q, k and v [batch, heads, tokens, 128], q and k
    written to tensors of their own, caches [batch, 8, 262144, 128], each buffer's tokens at another place there."""

    def __init__(self, problem: Problem) -> None:
        s = problem.shape
        self.problem = problem
        self.batch, self.tokens, self.past = SOL_WORKLOADS[list(SOL).index(s.name)]
        self.outs = torch.empty_like(problem.packed)
        self.caches = [
            torch.zeros(self.batch, s.k_heads, SOL_CACHE, s.head_dim, dtype=torch.bfloat16, device=DEVICE)
            for _ in range(2)
        ]
        self.frequencies = ropewalk.Frequencies(theta=SOL_THETA, rotary_dim=s.rotary_dim)
        self.floor_slots = torch.arange(s.tokens, device=DEVICE)

    def heads(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v [batch, heads, tokens, head_dim], one behind the other."""
        s = self.problem.shape
        parts = memory.view(-1).split([s.tokens * n * s.head_dim for n in (s.q_heads, s.k_heads, s.v_heads)])
        return [part.view(self.batch, -1, self.tokens, s.head_dim) for part in parts]

    def first_position(self, index: int) -> int:
        return (self.past + index * self.tokens) % (SOL_CACHE - self.tokens)

    def ours(self) -> Contender:
        def make(index: int) -> Callable[[], Any]:
            q, k, v = (x.transpose(1, 2) for x in self.heads(self.problem.packed[index]))
            q_out, k_out, _ = (x.transpose(1, 2) for x in self.heads(self.outs[index]))
            k_cache, v_cache = (cache.transpose(1, 2) for cache in self.caches)
            first = self.first_position(index)
            positions = torch.arange(first, first + self.tokens, device=DEVICE)
            slots = torch.arange(self.batch, device=DEVICE)[:, None] * SOL_CACHE + positions
            options = {
                "positions": positions, "frequencies": self.frequencies, "q_weight": self.problem.weights[0],
                "k_weight": self.problem.weights[1], "eps": EPS, "q_out": q_out, "k_out": k_out, "v": v,
                "k_cache": k_cache, "v_cache": v_cache, "slots": slots,
            }  # fmt: skip

            def call() -> None:
                ropewalk.rope_(q, k, **options)

            return call

        moved = self.problem.bytes("norm+rope+kv bf16")
        return Contender("ropewalk", SOL_OP, "neox", make, "frequencies", OUR_BOUND, bytes=moved, verify=self.verify)

    def verify(self) -> tuple[float, str]:
        """After a call on the first buffer: the largest error, and what else is wrong."""
        first = self.first_position(0)
        angles = exact_angles(range(first, first + self.tokens), self.problem.shape.rotary_dim, SOL_THETA).to(DEVICE)
        original, written, worst = self.heads(self.problem.first), self.heads(self.outs[0]), 0.0
        for b in range(self.batch):
            for x, out, weight in zip(original, written, self.problem.weights, strict=False):
                want = reference(x[b].transpose(0, 1), angles, "neox", weight, self.problem.exact)
                worst = max(worst, relative_error(out[b].transpose(0, 1), want))
        stored = [cache[:, :, first : first + self.tokens] for cache in self.caches]
        if not (torch.equal(stored[0], written[1]) and torch.equal(stored[1], original[2])):
            return worst, "wrong: the caches do not hold k and v"
        if not torch.equal(self.problem.packed[0], self.problem.first):
            return worst, "wrong: q, k or v was changed"
        return worst, ""

    def floor_pointers(self, index: int) -> dict[str, int]:
        """The same memory, a row for each token."""
        s = self.problem.shape
        place = index * s.tokens % (self.batch * SOL_CACHE - s.tokens + 1)
        k_cache, v_cache = (cache.view(-1)[place * s.k_heads * s.head_dim :] for cache in self.caches)
        named = {"slots": self.floor_slots, "cache1": k_cache, "cache2": v_cache}
        for i in range(3):
            named[f"rows{i}"] = self.heads(self.problem.packed[index])[i]
            named[f"out{i}"] = self.heads(self.outs[index])[i]
        return {name: tensor.data_ptr() for name, tensor in named.items()}

    def floor_right(self) -> bool:
        flipped = [x.view(torch.int16) ^ -0x8000 for x in self.heads(self.problem.first)]
        outs = [x.view(torch.int16) for x in self.heads(self.outs[0])]
        caches = [cache.view(-1)[: flipped[1].numel()].view(torch.int16) for cache in self.caches]
        return all(
            torch.equal(got, want.view(got.shape))
            for got, want in zip([*outs[:2], *caches], [*flipped[:2], *flipped[1:]], strict=True)
        )


def floor_rows(s: Shape, op: str) -> gpu_floor.Rows:
    if op == SOL_OP:
        return gpu_floor.Rows(tokens=s.tokens, heads=(s.q_heads, s.k_heads, s.v_heads), head_dim=s.head_dim,
                              few=not s.cold, cache="same", slots=s.tokens, apart=True, out_of_place=True)  # fmt: skip
    store = "+kv" in op
    return gpu_floor.Rows(
        tokens=s.tokens, heads=(s.q_heads, s.k_heads, s.v_heads), head_dim=s.head_dim, few=not s.cold,
        rotary_dim=s.rotary_dim if op == "rope" and s.rotary_dim != s.head_dim else 0,
        cache=("fp8" if "fp8" in op else "same") if store else "", slots=s.slots if store else 0,
        k_store_only="k only" in op)  # fmt: skip


def floors(problem: Problem, op: str, floor: gpu_floor.Floor) -> list[Contender]:
    """The floor's shapes for the bytes of an operation."""
    found = []
    for shape in floor.shapes:

        def make(index: int, shape: dict[str, Any] = shape) -> Callable[[], Any]:
            pointers = {"rows0": problem.packed[index].data_ptr(), "slots": problem.slots.data_ptr(),
                        "positions": problem.floor_positions.data_ptr(),
                        "weight": problem.floor_weight.data_ptr()}  # fmt: skip
            if op == SOL_OP:
                pointers |= problem.sol.floor_pointers(index)
            elif "+kv" in op:
                k_cache, v_cache = problem.cache(index, cache_dtype(op))
                pointers |= {"cache1": k_cache.data_ptr(), "cache2": v_cache.data_ptr()}
            return floor.call(shape, pointers, lambda: torch.cuda.current_stream().cuda_stream)

        found.append(Contender("floor", op, "", make, checked=False, bytes=floor.bytes, detail=shape["name"]))
    return found


def check_floor(problem: Problem, contender: Contender) -> None:
    """Runs the floor once: it must flip the sign of what is written back, and put the same into the caches."""
    s, op = problem.shape, contender.op
    try:
        problem.packed[0].copy_(problem.first)
        caches = problem.cache(0, cache_dtype(op)) if "+kv" in op and op != SOL_OP else ()
        for cache in caches:
            cache.zero_()
        contender.make(0)()
        torch.cuda.synchronize()
        if op == SOL_OP:
            if not problem.sol.floor_right():
                contender.failure = "wrong: it does not move the bytes of the operation"
            return
        flipped = problem.first.view(torch.int16) ^ -0x8000
        want = problem.first.view(torch.int16).clone()
        wanted, parts = problem.heads(want), problem.heads(flipped)
        dim = s.rotary_dim if op == "rope" else s.head_dim
        wanted[0][..., :dim] = parts[0][..., :dim]
        if "k only" not in op:
            wanted[1][..., :dim] = parts[1][..., :dim]
        right = torch.equal(problem.packed[0].view(torch.int16), want)
        for cache, part in zip(caches, parts[1:], strict=False):
            stored = (part >> 8).to(torch.int8) if "fp8" in op else part
            all_rows = torch.zeros(cache.shape, dtype=stored.dtype, device=DEVICE)
            all_rows[problem.slots] = stored
            right = right and torch.equal(cache.view(stored.dtype), all_rows)
        if not right:
            contender.failure = "wrong: it does not move the bytes of the operation"
    except Exception as error:
        contender.failure = f"{type(error).__name__}: {error}"[:300]


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
            found.append(Contender(name, op, pairing, make, "table", cheap=compiled, result=lambda made: made))
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

    return [Contender("Liger", "rope", "neox", make, "table", result=lambda made: made)]


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


def cake(problem: Problem) -> list[Contender]:
    """FlashInfer's generated kernels for norm, rotation with a table and append to a paged cache. q goes to a tensor of
    its own, k to its cache alone; in the fp8 one q leaves as fp8 too, which moves fewer bytes than any call of ours."""
    s = problem.shape
    if (s.q_heads, s.k_heads) not in ((64, 8), (8, 1)) or s.head_dim != 128 or s.rotary_dim != 128:
        return []
    decode = s.tokens <= 256
    if not decode and s.tokens % 64:
        return []
    requests = s.tokens if decode else 4
    lengths = torch.arange(1, requests + 1, dtype=torch.int32, device=DEVICE) * (s.tokens // requests)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32, device=DEVICE), lengths])
    table, slots = problem.cos_sin, problem.slots
    pages = (slots[::16] // 16).to(torch.int32).expand(requests, -1).contiguous()
    if decode:
        # Each request writes the last row of a page of its own, so that nothing is left to clear. Row 16 i + 15 of the
        # table has the angles of position i.
        lengths = lengths * 16
        table = torch.zeros(16 * s.tokens, 128, device=DEVICE)
        table[15::16] = problem.cos_sin
        pages = torch.arange(requests, dtype=torch.int32, device=DEVICE)[:, None].expand(-1, requests).contiguous()
        slots = problem.positions.long() * 16 + 15
    weights = [weight.float() for weight in problem.weights]
    norm: dict[str, Any] = {"qk_norm_policy": 2, "q_norm_weight": weights[0], "k_norm_weight": weights[1], "eps": EPS}
    one, found = torch.ones(1, device=DEVICE), []
    for fp8 in (False, True):
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        name = "cake_fused_qk_rope_fp8_append" if fp8 else "cake_fused_qk_rope_append"
        module = importlib.import_module(f"flashinfer.{name}")
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # caches by the buffer's number

        def make(index: int, fp8: bool = fp8, dtype: Any = dtype, module: Any = module, made: Any = made) -> Any:
            q_out = torch.empty(s.tokens, s.q_heads, 128, dtype=dtype, device=DEVICE)
            if index not in made:
                shape = (max(s.slots // 16, requests), 16, s.k_heads, 128)
                made[index] = tuple(torch.zeros(shape, device=DEVICE).to(dtype) for _ in range(2))
            caches, packed = made[index], problem.packed[index]
            if not fp8:
                return lambda: module.cake_fused_qk_rmsnorm_rope_append_paged_kv_cache(
                    packed, table, lengths, indptr, pages, *caches, num_q_heads=s.q_heads, num_kv_heads=s.k_heads,
                    out_q=q_out, clear_unused_last_page_rows=False, **norm)  # fmt: skip
            scale = torch.empty(0, device=DEVICE)
            flag = torch.empty(requests, s.k_heads, dtype=torch.int32, device=DEVICE)
            options = {key: value for key, value in norm.items() if key != "eps"}
            return lambda: module.cake_fused_qk_rmsnorm_rope_quantize_fp8_append_paged_kv_cache(
                packed, table, lengths, indptr, pages, caches, not decode, one, one, 2, s.tokens // requests,
                q_scale_inv=one, out_q=q_out, q_scale=scale, split_k_flag=flag, **options)[0]  # fmt: skip

        def result(q: torch.Tensor, made: Any = made) -> tuple[torch.Tensor, ...]:
            return q, *(cache.view(-1, s.k_heads, 128)[slots] for cache in made[0])

        op = "norm+rope+kv fp8, q fp8" if fp8 else "norm+rope+kv bf16, k only"
        bound = 2.0**-3 if fp8 else 6 * 2.0**-8
        moved = problem.bytes("norm+rope+kv fp8, k only") - s.tokens * s.q_heads * 128 if fp8 else 0
        found.append(Contender("FlashInfer cake", op, "neox", make, "table", bound, result=result, bytes=moved))
    return found


PEERS: dict[str, tuple[str, Callable[[Problem], list[Contender]]]] = {
    "FlashInfer": ("flashinfer-python", flashinfer),
    "FlashInfer cake": ("flashinfer-python", cake),
    "Liger": ("liger-kernel", liger),
    "flash-attn": ("flash-attn", flash_attn),
    "sgl_kernel": ("sgl-kernel", sgl_kernel),
    "vLLM": ("vllm", vllm),
}
MODULES = {"FlashInfer": "flashinfer.rope", "FlashInfer cake": "flashinfer.cake_fused_qk_rope_append",
           "Liger": "liger_kernel.ops.rope", "vLLM": "vllm._custom_ops",
           "flash-attn": "flash_attn.ops.triton.rotary", "sgl_kernel": "sgl_kernel"}  # fmt: skip


def peers_here() -> dict[str, str]:
    """Name, to its version or why it is absent."""
    found = {"torch": torch.__version__}
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
    """Runs the contender once, and compares with the reference. Leaves `failure` if that went wrong."""
    try:
        problem.packed[:2].copy_(problem.first[None].expand_as(problem.packed[:2]))
        ropewalk_store = "+kv" in contender.op and contender.name == "ropewalk" and not contender.verify
        caches = problem.cache(0, cache_dtype(contender.op)) if ropewalk_store else ()
        for cache in caches:
            cache.zero_()
        call = contender.make(0)
        result = call()
        torch.cuda.synchronize()
        if not contender.checked:
            return
        if contender.verify:
            contender.error, contender.failure = contender.verify()
            if contender.error > contender.bound:
                contender.failure = f"wrong: relative error {contender.error:.3g}, bound {contender.bound:.3g}"
            return
        op = "norm+rope" if contender.op.startswith("norm") else "rope"
        want = wanted.get((op, contender.pairing))
        if want is None:
            want = wanted[op, contender.pairing] = problem.expected(op, contender.pairing)
        q, k, *stored_v = contender.result(result) if contender.result else problem.heads(problem.packed[0])[:2]
        stored = [cache[problem.slots].to(problem.exact) for cache in caches]
        k_only = caches and "k only" in contender.op
        if k_only and "fp8" not in contender.op:
            k = stored[0]
        errors = [relative_error(q, want[0])]
        if not (k_only and "fp8" in contender.op):
            errors.append(relative_error(k, want[1]))
        errors += [relative_error(x, problem.heads(problem.first)[2].to(problem.exact)) for x in stored_v]
        contender.error = max(errors)
        if contender.error > contender.bound:
            contender.failure = f"wrong: relative error {contender.error:.3g}, bound {contender.bound:.3g}"
        elif caches:
            # The very rows in the cache's dtype; k is rounded to bfloat16 and then, in fp8, once more.
            fp8 = "fp8" in contender.op
            other = want[1] if k_only else k.to(problem.exact)
            v = problem.heads(problem.first)[2].to(problem.exact)
            off = [relative_error(x, y) for x, y in zip(stored, (other, v), strict=True)]
            limits = [2.0**-3 if fp8 else contender.bound if k_only else 0.0, 2.0**-3 if fp8 else 0.0]
            if any(x > limit for x, limit in zip(off, limits, strict=True)):
                contender.failure = f"wrong: the caches differ by {max(off):.3g}"
        if contender.name == "ropewalk" and not contender.failure:
            contender.failure = touched(problem, contender.op, caches)
    except Exception as error:  # a peer that does not take this shape
        contender.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def touched(problem: Problem, op: str, caches: Sequence[torch.Tensor]) -> str:
    """Which bytes a call on the first buffer changed though they were not its own; "" if none."""
    s = problem.shape
    first_k, first_v = problem.heads(problem.first)[1:]
    now_k, now_v = problem.heads(problem.packed[0])[1:]
    if not torch.equal(now_v, first_v):
        return "wrong: v was changed"
    if "k only" in op and not torch.equal(now_k, first_k):
        return "wrong: k was written back"
    if op == "rope" and s.rotary_dim < s.head_dim:
        for now, first in zip(problem.heads(problem.packed[0])[:2], problem.heads(problem.first)[:2], strict=True):
            if not torch.equal(now[..., s.rotary_dim :], first[..., s.rotary_dim :]):
                return "wrong: elements outside the rotated part were changed"
    if not torch.equal(problem.packed[1], problem.first):
        return "wrong: bytes behind the rows were written"
    for cache in caches:
        others = cache.view(torch.uint8).clone()
        others[problem.slots] = 0
        if others.any():
            return "wrong: a slot that was not named was written"
    return ""


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


def load(problem: Problem, contender: Contender, stream: torch.cuda.Stream, seconds: float = GRAPH_SECONDS) -> None:
    """Captures the contender's graph, of about so many seconds."""
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
        once_seconds = once(graph) * 1e-6
        if once_seconds < seconds / 2 and contender.cheap:
            passes = min(math.ceil(seconds / once_seconds), 1600 // total)
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


def search(problem: Problem, op: str, floor: gpu_floor.Floor, stream: torch.cuda.Stream) -> list[Contender]:
    """The best three of the floor's shapes, found by short graphs, checked, and captured anew in long ones."""
    candidates = floors(problem, op, floor)
    for candidate in candidates:
        load(problem, candidate, stream, seconds=0)
    for keep in (8, 3):
        measure(candidates, 3)
        timed = [c for c in candidates if c.us is not None]
        candidates = sorted(timed, key=lambda c: c.us)[:keep]  # type: ignore
    for candidate in candidates:
        candidate.graph = candidate.us = None
        candidate.samples.clear()
        check_floor(problem, candidate)
        load(problem, candidate, stream)
    if not any(c.graph for c in candidates):
        why = next((c.failure for c in candidates), "no shape could be timed")
        print(f"{problem.shape.name}: no floor of {op}: {why}", file=sys.stderr)
    return candidates


def floor_ops(shape: Shape, ops: Sequence[str]) -> dict[str, str]:
    """Of each operation, the one whose floor serves it: whole heads are moved by rope and by norm + rope alike."""
    whole = shape.rotary_dim == shape.head_dim
    return {op: "rope" if op == "norm+rope" and whole else op for op in ops}


def lowest(best: Sequence[Contender], served: dict[str, str]) -> dict[str, Contender]:
    """The floor of each operation that has one."""
    found: dict[str, Contender] = {}
    for candidate in sorted((c for c in best if c.us is not None), key=lambda c: c.us):  # type: ignore
        found.setdefault(candidate.op, candidate)
    return {op: found[of] for op, of in served.items() if of in found}


def compare(
    shape: Shape, options: argparse.Namespace, here: dict[str, str], compiled: bool, compiler: gpu_floor.Compiler
) -> list[dict[str, Any]]:
    """All contenders on one shape; a row of the results for each."""
    problem = Problem(shape)
    stream = torch.cuda.Stream()
    wanted: dict[tuple[str, str], Any] = {}
    with_store = shape.name in WITH_STORE
    contenders = [ours(problem, op, pairing, angles)
                  for op in OPS for pairing in PAIRINGS for angles in ("frequencies", "table")]  # fmt: skip
    if with_store:
        contenders += [ours(problem, op, "neox", angles) for op in STORES for angles in ("frequencies", "table")]
    if shape.name in SOL:
        problem.sol = Sol(problem)
        contenders.append(problem.sol.ours())
    served = floor_ops(shape, list(dict.fromkeys(c.op for c in contenders)))
    for op in set(served.values()):
        compiler.want(floor_rows(shape, op))
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
    best = []
    for op in dict.fromkeys(served.values()):
        floor_kernels = gpu_floor.Floor(compiler.want(floor_rows(shape, op)).result())
        best += search(problem, op, floor_kernels, stream)
    problem.fill()
    for contender in contenders:
        load(problem, contender, stream)
    measure(best + contenders, 5 if options.quick else 9)

    floor = lowest(best, served)
    rows = []
    for contender in [*dict.fromkeys(floor.values()), *contenders]:
        moved = contender.bytes or problem.bytes(contender.op)
        under = floor.get(contender.op)
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
            if under is not None:
                row |= {"floor_us": under.us, "of_floor": contender.us / under.us, "floor": under.detail}
        limit = aim(row)
        if limit is not None and contender.name == "ropewalk" and "of_floor" in row:
            row |= {"aim": limit, "met": row["of_floor"] <= limit}
        rows.append(row)
    for contender in [*best, *contenders]:
        contender.graph = None
    return rows


def general_aim(op: str, tokens: int) -> float:
    """The highest time over the floor for a shape that no list holds."""
    if "+kv" in op:
        return 1.15 if "fp8" in op else 1.10
    return 1.05 if tokens >= 4096 else 1.10


def aim(row: dict[str, Any]) -> float | None:
    """The highest time over the floor that the design allows."""
    if row["shape"] not in [shape.name for shape in DEFAULT]:
        return general_aim(row["op"], row["tokens"])
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


def alive() -> bool:
    """Whether the context still works: a kernel that reads or writes beyond memory ends it."""
    try:
        torch.zeros(1, device=DEVICE).item()
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def restart(*more: str) -> None:
    """Begins this script again in the place of this process, whose context is lost."""
    print("the context is lost: going on in a new process", flush=True)
    names = {argument.partition("=")[0] for argument in more}
    kept = [argument for argument in sys.argv[1:] if argument.partition("=")[0] not in names]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *kept, *more])


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


def rows_as_lines(out: dict[str, Any]) -> str:
    """JSON with a result a line, so that two runs can be compared."""
    head = json.dumps({key: value for key, value in out.items() if key != "results"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in out["results"])
    return f'{head[:-2]},\n "results": [\n{rows}\n ]\n}}\n'


def parse_names(text: str) -> list[str]:
    names = []
    for name in text.split(","):
        if name not in SHAPES and name not in GROUPS:
            raise argparse.ArgumentTypeError(f"no shape or group {name}; there are {', '.join([*GROUPS, *SHAPES])}")
        names += [shape.name for shape in GROUPS[name]] if name in GROUPS else [name]
    return list(dict.fromkeys(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes and fewer replays")
    parser.add_argument("--shapes", type=parse_names, metavar="NAME,..", help="these alone: shapes, or groups of them")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="when to leave the rest out: default 300, with --quick 150")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too, after each shape")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has, and go on")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_compare: torch finds no CUDA device here", file=sys.stderr)
        return 2
    began = time.time()
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    limit = options.seconds or (150 if options.quick else 300)
    here = peers_here()
    for name, version in here.items():
        print(f"{name}: {version}")
    names = options.shapes or (QUICK if options.quick else [shape.name for shape in DEFAULT])
    compiled = [] if options.no_compile else names if options.shapes else COMPILED_QUICK if options.quick else COMPILED
    compiler = gpu_floor.Compiler(f"sm_{major}{minor}{'a' if major >= 9 else ''}")
    out: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu_name(), "ropewalk": ropewalk.__version__, "peers": here, "quick": options.quick,
        "seconds": 0.0, "skipped": [], "failed": {}, "results": [],
    }  # fmt: skip

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(rows_as_lines(out))

    if options.resume and options.json and options.json.exists():
        out = json.loads(options.json.read_text())
        began -= out["seconds"]
    with torch.no_grad():
        if "host_us" not in out:
            out["host_us"] = host_times()
            print("host, us: " + ", ".join(f"{name} {value:.2f}" for name, value in out["host_us"].items()))
            out["error_by_position"] = error_by_position(here)
        for name in names:
            if name in out["failed"] or any(row["shape"] == name for row in out["results"]):
                continue  # before this process
            elapsed = time.time() - began
            if elapsed > limit - 5:
                out["skipped"].append(name)
                continue
            try:
                rows = compare(SHAPES[name], options, here, name in compiled and elapsed < 0.75 * limit, compiler)
            except Exception as error:  # that of one shape is not the others'
                out["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                    :300
                ]
                print(f"{name}: {out['failed'][name]}", file=sys.stderr, flush=True)
                rows = []
            out["results"] += rows
            print_table(rows)
            out["seconds"] = time.time() - began
            write()
            if not alive():
                out["failed"].setdefault(name, "the context was lost")
                write()
                if options.json is None:
                    print("gpu_compare: the context was lost; with --json the rest would go on", file=sys.stderr)
                    return 1
                restart("--resume")
            gc.collect()
            torch.cuda.empty_cache()
    compiler.close()
    aims = [row for row in out["results"] if "aim" in row]
    fused = {(r["shape"], r["pairing"], r["angles"]): r["us"] for r in out["results"]
             if r["contender"] == "ropewalk" and r["op"] == "norm+rope"}  # fmt: skip
    for row in out["results"]:
        base = fused.get((row["shape"], row["pairing"], row["angles"]))
        if row["contender"] == "ropewalk" and "+kv" in row["op"] and base and row["us"]:
            row["of_norm_rope"] = row["us"] / base
            if row["tokens"] <= 256:
                row["met_of_norm_rope"] = row["of_norm_rope"] <= 1.15
            share = f"{row['us']:.2f} = {row['of_norm_rope']:.3f} of norm+rope"
            print(f"{row['shape']:18} {row['op']:18} {row['angles']:11} {share}")
    slower = slower_than_peers(out["results"])
    for line in slower:
        print(line)
    out["slower_than"] = slower
    out["kernels"] = ropewalk.counters()
    out["seconds"] = time.time() - began
    wrong = sum(row["contender"] == "ropewalk" and "failure" in row for row in out["results"]) + len(out["failed"])
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
        if key not in best:  # where we cannot leave k out of the rows, what writes it there as well
            key = (row["shape"], row["op"].removesuffix(", k only"), row["pairing"])
        if row["contender"] not in ("ropewalk", "floor") and row["us"] and key in best and row["us"] < best[key]:
            other = f"{row['contender']} {row['angles']} {row['us']:.2f}"
            found.append(f"slower: {' '.join(key)}: {best[key]:.2f}, {other}")
    return found


if __name__ == "__main__":
    sys.exit(main())
