"""Ropewalk in place of torchtitan's rotary embeddings, forward and backward.

    torchtitan_train .. --override.imports ropewalk.torchtitan.cos_sin     # Qwen3 and others of CosSinRoPE
    torchtitan_train .. --override.imports ropewalk.torchtitan.complex     # Llama 3, DeepSeek V3: ComplexRoPE

The tables are torchtitan's own. Tensors that are shards of a DTensor by batch or heads are rotated where they lie.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

from .compat import _common

__all__ = ["complex", "cos_sin"]

VERSIONS = ("0.3.0",)  # of torchtitan, whose modules these were written after
_log = logging.getLogger("ropewalk")
_said: set[str] = set()


def _say(what: str) -> None:
    """Once."""
    if what not in _said and not torch.compiler.is_compiling():
        _said.add(what)
        _log.warning("ropewalk in torchtitan: %s", what)


def _local(x: Any) -> Any:
    return x.to_local() if isinstance(x, DTensor) else x


_TYPES = {"dp": spmd.S(0), "cp": spmd.S(1), "tp": spmd.S(2)}  # of q and k, where torchtitan checks such


@spmd.local_map(out_types=(_TYPES, _TYPES))
def _rotated(query: Any, key: Any, positions: Any, cos: Any, sin: Any, pairing: str) -> tuple[Any, Any]:
    return _common.differentiable(
        "rope", {}, query, key, positions=positions, cos=cos, sin=sin, pairing=pairing
    )  # fmt: skip


def _rotate(query: Any, key: Any, positions: Any, cos: Any, sin: Any, pairing: str) -> tuple[Any, Any] | None:
    """q and k [batch, tokens, heads, head_dim] by tables [rows, head_dim/2]; None for what stays stock."""
    if query.dim() != 4 or query.shape[-1] != 2 * cos.shape[-1]:
        _say(f"a query of {list(query.shape)} with tables of {cos.shape[-1]} pairs stays stock")
        return None
    mesh, placements = getattr(query, "device_mesh", None), getattr(query, "placements", ())
    fits = all(p.is_replicate() or p.is_shard(0) or p.is_shard(2) or (p.is_shard(1) and positions is not None)
               for p in placements)  # fmt: skip
    if not fits or tuple(getattr(key, "placements", ())) != tuple(placements):
        _say(f"a query with the placements {placements} stays stock")
        return None
    shapes = [(x.shape, x.stride()) for x in (query, key)]
    query, key, positions, cos, sin = (_local(x) for x in (query, key, positions, cos, sin))
    if positions is not None:
        positions = positions.expand(query.shape[0], -1)
        if not torch.compiler.is_compiling():  # as torchtitan does it: told later, without waiting
            torch._assert_async((positions < cos.shape[0]).all(), f"positions exceed the table, {cos.shape[0]}")
    if torch.compiler.is_compiling():
        new = _rotated(query, key, positions, cos, sin, pairing)
    else:
        try:
            new = _rotated(query, key, positions, cos, sin, pairing)
        except (ValueError, TypeError) as error:  # nothing was written
            _say(f"{error}; it stays stock")
            return None
    if mesh is None:
        return new
    return tuple(DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)
                 for x, (shape, stride) in zip(new, shapes, strict=True))  # type: ignore[return-value]  # fmt: skip


class RopewalkCosSinRoPE(CosSinRoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass

    def forward(self, query: Any, key: Any, positions: Any = None) -> tuple[Any, Any]:
        pairs = self.config.dim // 2  # the cache is [cos, cos, sin, sin]
        cos, sin = self.cache[:, :pairs], self.cache[:, 2 * pairs : 3 * pairs]
        new = _rotate(query, key, positions, cos, sin, "neox")
        return super().forward(query, key, positions) if new is None else new


class RopewalkComplexRoPE(ComplexRoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass

    def forward(self, query: Any, key: Any, positions: Any = None) -> tuple[Any, Any]:
        parts = torch.view_as_real(self.cache)
        new = _rotate(query, key, positions, parts[..., 0], parts[..., 1], "interleaved")
        return super().forward(query, key, positions) if new is None else new


def _derived(config: Any, ours: type[Any]) -> Any:
    version = importlib.metadata.version("torchtitan")
    if version in VERSIONS:
        return derive(config, ours)
    _say(f"torchtitan must be {' or '.join(VERSIONS)}, but is {version}: everything stays stock")
    return config


@override(target=CosSinRoPE.Config, exact=True, description="rotation by Ropewalk")
def cos_sin(config: CosSinRoPE.Config) -> CosSinRoPE.Config:
    """The override of torchtitan 0.3.0's `CosSinRoPE`: `--override.imports ropewalk.torchtitan.cos_sin`.

    Rotates q and k [batch, tokens, heads, head_dim], float32, bfloat16 or float16, with positions [1 or batch, tokens]
    or without, into new tensors, with a gradient. Calls that cannot be served go torchtitan's way, and a line of the
    log `ropewalk` says so once; with another version of torchtitan all do.
    """
    return _derived(config, RopewalkCosSinRoPE.Config)


@override(target=ComplexRoPE.Config, exact=True, description="rotation by Ropewalk")
def complex(config: ComplexRoPE.Config) -> ComplexRoPE.Config:  # noqa: A001
    """The override of `ComplexRoPE`, pairs of neighbours: `--override.imports ropewalk.torchtitan.complex`. As
    `cos_sin` else."""
    return _derived(config, RopewalkComplexRoPE.Config)
