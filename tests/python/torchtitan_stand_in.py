"""Stands in for what `ropewalk.torchtitan` takes of torchtitan 0.3.0 and spmd_types 0.2.3: the names, signatures and
fields are theirs; the rotations are their formulas, written again."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

VERSION = "0.3.0"
REGISTRY: dict[str, Any] = {}  # of overrides, by "module.function"


class RoPE(torch.nn.Module):
    @dataclass(kw_only=True, slots=True)
    class Config:
        dim: int
        max_seq_len: int
        theta: float = 10000.0
        sharding_config: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cache", self._precompute_cache(), persistent=False)

    def _angles(self) -> torch.Tensor:
        c = self.config
        frequencies = 1.0 / c.theta ** (torch.arange(0, c.dim, 2).float() / c.dim)
        return torch.outer(torch.arange(c.max_seq_len).float(), frequencies)

    def _rows(self, query: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """[1 or batch, tokens, 1, width]"""
        rows = self.cache[: query.shape[1]][None] if positions is None else self.cache[positions]
        return rows.unsqueeze(2)


class CosSinRoPE(RoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(RoPE.Config):
        pass

    def _precompute_cache(self) -> torch.Tensor:
        angles = self._angles()
        return torch.cat([angles.cos(), angles.cos(), angles.sin(), angles.sin()], dim=-1)

    def forward(self, query: Any, key: Any, positions: Any = None) -> tuple[Any, Any]:
        cos, sin = self._rows(query, positions).chunk(2, dim=-1)

        def turned(x: torch.Tensor) -> torch.Tensor:
            exact = x.float()
            first, second = exact.chunk(2, dim=-1)
            return (exact * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)

        return turned(query), turned(key)


class ComplexRoPE(RoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(RoPE.Config):
        pass

    def _precompute_cache(self) -> torch.Tensor:
        angles = self._angles()
        return torch.polar(torch.ones_like(angles), angles)

    def forward(self, query: Any, key: Any, positions: Any = None) -> tuple[Any, Any]:
        rows = self._rows(query, positions)

        def turned(x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * rows).flatten(3).type_as(x)

        return turned(query), turned(key)


def override(*, target: type, fqns: Any = None, description: str = "", exact: bool = False) -> Callable[..., Any]:
    def decorator(function: Any) -> Any:
        REGISTRY[f"{function.__module__}.{function.__name__}"] = types.SimpleNamespace(
            target_cls=target, factory=function, fqns=fqns, description=description, exact=exact
        )
        return function

    return decorator


def derive(source: Any, target_cls: type, **deltas: object) -> Any:
    taken = {field.name: getattr(source, field.name) for field in fields(source)}
    return target_cls(**{**taken, **deltas})


def local_map(*, in_types: Any = None, out_types: Any) -> Callable[..., Any]:
    return lambda function: function


def modules() -> dict[str, Any]:
    """What to put into sys.modules."""

    def module(name: str, **contents: Any) -> Any:
        made = types.ModuleType(name)
        vars(made).update(contents)
        return made

    titan = "torchtitan"
    rope = module(f"{titan}.models.common.rope", RoPE=RoPE, CosSinRoPE=CosSinRoPE, ComplexRoPE=ComplexRoPE)
    made = [
        *(
            module(name, __path__=[])
            for name in (titan, f"{titan}.config", f"{titan}.models", f"{titan}.models.common")
        ),
        module(f"{titan}.config.override", override=override, derive=derive),
        module("spmd_types", local_map=local_map, S=lambda dim: ("S", dim)),
        rope,
    ]
    return {each.__name__: each for each in made}
