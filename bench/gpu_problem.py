"""What bench/gpu_compare.py and bench/gpu_sweep.py time calls on: shapes, rows and tables on the device, and what a
call must give, in float64."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ropewalk
import torch

DEVICE = "cuda"
THETA, EPS = 1e4, 1e-6
COLD_BYTES = 800_000_000
COLD_FROM = 1024  # tokens
PAIRINGS = ("neox", "interleaved")
OPS = ("rope", "norm+rope")
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
WITH_STORE = [
    "decode_1",
    "decode_64",
    "decode_256",
    "prefill_1024",
    "prefill_8192",
    *(s.name for s in HEAD_SIZES + CAKE + list(SOL.values())),
]


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
        self.wide_positions = self.positions.long()
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
        self.slots = page[self.wide_positions // 16] * 16 + self.wide_positions % 16

    def positions_of(self, dtype: torch.dtype) -> torch.Tensor:
        return self.wide_positions if dtype == torch.int64 else self.positions

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
