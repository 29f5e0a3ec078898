"""The operation as `torch.ops.ropewalk.rope_`, made from the core's own schema, for torch.compile.

In eager mode the module is called directly, which costs less. The operator only changes its arguments, so that its
shape function does nothing.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch

from . import _arrays, _module

_call = _module.function("rope")
_schema: str = _module.function("torch_schema")()
# With q_out and k_out, q and k are only read: an operator of its own, so that graphs need not copy them.
_out_schema = (
    _schema.replace("rope_(", "rope_out(", 1)
    .replace("Tensor(a!) q", "Tensor q")
    .replace("Tensor(b!)? k=", "Tensor? k=")
)
assert [arg["name"] for arg in _module.description()][:5] == ["q", "k", "positions", "offsets", "frequencies"]
_handles = _arrays.handles


def _run(
    q: Any, k: Any = None, positions: Any = None, offsets: Any = None, frequencies: int = 0, *others: Any
) -> None:  # torch leaves out what has its default at the end
    _call(q, k, positions, offsets, _handles[frequencies], *others)


def _shape(*values: Any) -> None:
    return None


_library = torch.library.Library("ropewalk", "DEF")
for _definition in (_schema, _out_schema):
    _name = _definition.partition("(")[0]
    _library.define(_definition, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ropewalk::{_name}", _shape, lib=_library)


def _scale(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float32) if isinstance(value, (int, float)) else value


def rope_(
    q: Any, k: Any, positions: Any, offsets: Any, frequencies: Any, cos: Any, sin: Any, cos_sin: Any, axes: Any,
    pairing: str, rotary_dim: int | None, rotary_offset: int, inverse: bool, norm: str | None, q_weight: Any,
    k_weight: Any, zero_centered_weight: bool, eps: float, rounding: str, q_out: Any, k_out: Any, v: Any, k_cache: Any,
    v_cache: Any, slots: Any, k_scale: Any, v_scale: Any, sycl_queue: Any, disable_pdl: bool,
    k_store_only: bool,
) -> None:  # fmt: skip
    """The call as torch.compile traces it."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("q_weight", q_weight), ("k_weight", k_weight)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rope: {name} requires grad, and Ropewalk has no backward: compile under torch.no_grad()")
    operator = torch.ops.ropewalk.rope_ if q_out is None and k_out is None else torch.ops.ropewalk.rope_out
    operator(q, k, positions, offsets, 0 if frequencies is None else frequencies._key, cos, sin, cos_sin, axes,
             _arrays.choice("pairing", pairing), rotary_dim or 0, rotary_offset, int(inverse),
             _arrays.choice("norm", norm), q_weight, k_weight, int(zero_centered_weight), eps,
             _arrays.choice("rounding", rounding), q_out, k_out, v, k_cache, v_cache, slots, _scale(k_scale),
             _scale(v_scale), _arrays.queue(sycl_queue) or 0, int(disable_pdl), int(k_store_only))  # fmt: skip
