"""What `ropewalk.transformers.patch` makes of a model's modules: modules of a class of their own, derived from theirs.

What such a module needs to know lies in itself, so that copies and pickles of it are patched, too, and go by their own
weights. Without that it does what its stock class does.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import Frequencies, rope_

APPLY = "apply_rotary_pos_emb"
TABLES = "position_embeddings"  # the argument that hands the cosines and sines to a layer
STATE = "_ropewalk"  # the attribute of a patched module


class Angles:
    """Stands where the cosines and where the sines were: says by which frequencies to rotate, and the positions."""

    def __init__(self, positions: Any, frequencies: Frequencies, rotary: torch.nn.Module, layer_type: str | None):
        self.positions = positions
        self.frequencies = frequencies
        self.rotary = rotary
        self.layer_type = layer_type

    def to(self, *args: Any, **kwargs: Any) -> Angles:
        """On another device: accelerate moves a layer's arguments so."""
        return Angles(self.positions.to(*args, **kwargs), self.frequencies, self.rotary, self.layer_type)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "the cosines and sines of a model under ropewalk.transformers.patch are no tensors, as its layers compute "
            f"the angles, and have no {name!r}: use patch(model, angles='table'), or call the rotary module with "
            "gradients enabled"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.__getattr__(cls, getattr(function, "__name__", str(function)))  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("__getitem__")

    def __neg__(self) -> Any:
        return self.__getattr__("__neg__")

    def __mul__(self, other: Any) -> Any:
        return self.__getattr__("__mul__")


class _OfLayer:
    """The sines, on their way through a layer's code, and the layer whose norms are to be done with the rotation."""

    def __init__(self, sin: Any, layer: Any) -> None:
        self.sin = sin
        self.layer = layer


@dataclass(frozen=True)
class Norm:
    """A per-head RMSNorm that Ropewalk does together with the rotation."""

    eps: float
    zero_centered: bool


def halves(table: Any) -> Any:
    return table[..., : table.shape[-1] // 2]


def evens(table: Any) -> Any:
    return table[..., ::2]


def whole(table: Any) -> Any:
    return table


def _make_apply(
    take: Callable[[Any], Any], pairing: str, rounding: str, norm: Norm | None
) -> Callable[..., tuple[Any, Any]]:
    """The function that a layer finds under the name of transformers' own."""
    options: dict[str, Any] = {"pairing": pairing, "rounding": rounding}
    if norm:
        options.update(norm="rms", eps=norm.eps, zero_centered_weight=norm.zero_centered)

    def apply(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
        more = {}
        if norm:
            more["q_weight"], more["k_weight"] = (
                getattr(module, "weight", None) for module in (sin.layer.q_norm, sin.layer.k_norm)
            )
            sin = sin.sin
        tokens_first = (q, k) if unsqueeze_dim == 2 else (q.transpose(1, 2), k.transpose(1, 2))
        if isinstance(sin, Angles):
            rope_(*tokens_first, positions=sin.positions, frequencies=sin.frequencies, **options, **more)
        else:
            rope_(*tokens_first, cos=take(cos), sin=take(sin), **options, **more)
        return q, k

    return apply


class Plan:
    """How the layers of a class are served; the same object for all of a model, so that they compile to one graph."""

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from
        base, take, pairing, rounding, norm = made_from
        stock = inspect.unwrap(base.forward)
        self.fuses_norm = norm is not None
        self.function = types.FunctionType(
            stock.__code__,
            {**stock.__globals__, APPLY: _make_apply(take, pairing, rounding, norm)},
            stock.__name__,
            stock.__defaults__,
            stock.__closure__,
        )
        self.function.__kwdefaults__ = stock.__kwdefaults__

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> Any:
        return Plan, self.made_from


def _attention_forward(base: Any) -> Any:
    place = list(inspect.signature(base.forward).parameters).index(TABLES) - 1

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = getattr(self, STATE, None)
        tables = kwargs.get(TABLES, args[place] if place < len(args) else None)
        serves = plan is not None and not torch.is_grad_enabled()
        if tables is not None:
            cos, sin = tables
            if serves and plan.fuses_norm:
                tables = cos, _OfLayer(sin, self)
            elif not serves and isinstance(sin, Angles):
                x = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
                cls = type(sin.rotary)
                tables = call_rotary(getattr(cls, "_ropewalk_base", cls), sin.rotary, x, sin.positions, sin.layer_type)
            if TABLES in kwargs:
                kwargs = {**kwargs, TABLES: tables}
            else:
                args = (*args[:place], tables, *args[place + 1 :])
        return plan.function(self, *args, **kwargs) if serves else base.forward(self, *args, **kwargs)

    return forward


def call_rotary(base: Any, module: Any, x: Any, position_ids: Any, layer_type: str | None) -> tuple[Any, Any]:
    if "layer_type" in inspect.signature(base.forward).parameters:
        return base.forward(module, x, position_ids, layer_type)
    return base.forward(module, x, position_ids)


def _rotary_forward(base: Any) -> Any:
    takes_layer_type = "layer_type" in inspect.signature(base.forward).parameters

    @functools.wraps(base.forward)
    def forward(self: Any, x: Any, position_ids: Any = None, layer_type: str | None = None) -> tuple[Any, Any]:
        rotary = getattr(self, STATE, None)
        if rotary is None or torch.is_grad_enabled():
            more = (layer_type,) if takes_layer_type else ()
            return base.forward(self, x, position_ids, *more)
        angles = Angles(position_ids, rotary.frequencies(layer_type, position_ids), self, layer_type)
        return angles, angles

    return forward


def _norm_forward(base: Any) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, x: Any) -> Any:
        if getattr(self, STATE, None) is None or torch.is_grad_enabled():
            return base.forward(self, x)
        return x

    return forward


_FORWARDS = {"attention": _attention_forward, "rotary": _rotary_forward, "norm": _norm_forward}


@functools.cache
def _class(base: Any, kind: str) -> Any:
    """`base` with the forward of that kind. It has the same name: what goes by names goes on."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        if type(self) is not made:
            return base.__reduce_ex__(self, protocol)
        _, _, *state = base.__reduce_ex__(self, max(int(protocol), 2))
        return _new, (base, kind), *state

    attributes = {"forward": _FORWARDS[kind](base), "__reduce_ex__": reduce_ex, "_ropewalk_base": base}
    made = type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, **attributes})
    made.__qualname__ = base.__qualname__
    return made


def _new(base: Any, kind: str) -> Any:
    """An empty module of that class, for pickle and copy."""
    cls = _class(base, kind)
    return cls.__new__(cls)


def _rebind(module: Any, old: Any, new: Any) -> None:
    """Hooks such as accelerate's keep the bound forward that they found, and call that."""
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old:
            module.__dict__[name] = types.MethodType(new, module)


def put(module: Any, kind: str, state: Any) -> None:
    """Makes a module one of its class with the forward of that kind: "attention", "rotary" or "norm"."""
    base = type(module)
    module.__class__ = _class(base, kind)
    module.__dict__[STATE] = state
    _rebind(module, base.forward, type(module).forward)


def take_off(module: Any) -> None:
    """Undoes `put`, and nothing else: wrappers that others put round it since go on, and get the stock forward."""
    if module.__dict__.pop(STATE, None) is None:
        return
    ours = next(cls for cls in type(module).__mro__ if "_ropewalk_base" in cls.__dict__)
    _rebind(module, ours.forward, ours._ropewalk_base.forward)
    if type(module) is ours:  # else another has been made from it, which without the state does as the stock one
        module.__class__ = ours._ropewalk_base
