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

from . import Frequencies, rope, rope_
from .compat import _common

APPLY = "apply_rotary_pos_emb"
TABLES = "position_embeddings"  # the argument that hands the cosines and sines to a layer
STATE = "_ropewalk"  # the attribute of a patched module
FUSING = "_ropewalk_fusing"  # of a layer whose norms are done with the rotation


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
            f"the angles, and have no {name!r}: use patch(model, angles='table')"
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


@dataclass(frozen=True)
class Wide:
    """An RMSNorm over all heads, which Ropewalk does as that of one wide head. In a call of its own: pairs lie within
    heads, of which the norm knows nothing. Where the layer calls its norm, not with the rotation: a layer may clamp in
    between (OLMoE), or not rotate at all (OLMo Hybrid)."""

    zero_centered: bool
    rounding: str


def eps_of(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def halves(table: Any) -> Any:
    return table[..., : table.shape[-1] // 2]


def evens(table: Any) -> Any:
    return table[..., ::2]


def whole(table: Any) -> Any:
    return table


@dataclass(frozen=True)
class Form:
    """How a function of a modeling file rotates, found out by trying it."""

    parameters: tuple[str, ...]  # its own: q and k, or one tensor, then cos and sin or complex frequencies
    take: Callable[[Any], Any]  # of its tables: one column a pair
    pairing: str  # as in rope_; "split": neighbours are read, halves are written
    inverse: bool
    tokens_first: bool  # where it has no unsqueeze_dim: [.., tokens, heads, head_dim] or [.., heads, tokens, head_dim]
    heads_axis: int | None  # of a table with a dimension for the heads: where that is
    last_tokens: bool  # the tables are of the last tokens alone: those before (classes, registers) are not rotated
    trailing: bool  # where a head has more elements than are rotated, these are its last, not its first

    @property
    def pair(self) -> bool:
        return self.parameters[1] not in ("cos", "sin") and not self.parameters[1].startswith("freqs_ci")

    def make(self, rounding: str, norm: Norm | None = None, in_place: bool = True) -> Callable[..., Any]:
        """The function that a layer finds under the name of its own."""
        options: dict[str, Any] = {"rounding": rounding, "inverse": self.inverse}
        options["pairing"] = "neox" if self.pairing == "split" else self.pairing
        if norm:
            options.update(norm="rms", eps=norm.eps, zero_centered_weight=norm.zero_centered)
        names, take, heads_axis, pair = self.parameters, self.take, self.heads_axis, self.pair
        split, last_tokens, trailing = self.pairing == "split", self.last_tokens, self.trailing
        tokens_first_by_default = self.tokens_first
        is_complex = "cos" not in names

        def own(x: Any) -> Any:
            """The memory to rotate in."""
            if x is None:
                return None
            if split:  # neighbours become halves, in a copy
                return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            if torch.is_grad_enabled():  # into new memory: autograd may need this
                return x if x.stride(-1) == 1 else x.contiguous()
            return x if in_place and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)

        def table(x: Any) -> Any:
            x = take(x)
            return x if heads_axis is None else x.squeeze(heads_axis)

        def apply(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False))
            given.update(kwargs)
            q, k = own(given[names[0]]), own(given[names[1]]) if pair else None
            if is_complex:
                both = torch.view_as_real(given[names[2 if pair else 1]])
                cos, sin = both[..., 0], both[..., 1]
            else:
                cos, sin = given["cos"], given["sin"]
            more = {}
            if norm:
                more["q_weight"], more["k_weight"] = (_slow_weight(sin.layer, name) for name in ("q_norm", "k_norm"))
                sin = sin.sin
            exact = isinstance(sin, Angles)
            if trailing:
                pairs = len(sin.frequencies.inv_freq) if exact else take(cos).shape[-1]
                more["rotary_offset"] = q.shape[-1] - 2 * pairs
            place = given.get("unsqueeze_dim")  # of the heads, in tables of [batch, tokens, ..] or [tokens, ..]
            tokens_first = tokens_first_by_default if place is None else place == (2 if exact else cos.dim() - 1)
            views = [x if x is None or tokens_first else x.transpose(-3, -2) for x in (q, k)]
            first = [None, None]  # tokens that are not rotated
            if exact:
                more.update(positions=sin.positions, frequencies=sin.frequencies)
            else:
                cos, sin = table(cos), table(sin)
                if last_tokens:
                    first = [x if x is None else x[..., : -cos.shape[-2], :, :] for x in views]
                    views = [x if x is None else x[..., -cos.shape[-2] :, :, :] for x in views]
                more.update(cos=cos, sin=sin)
            if torch.is_grad_enabled():
                new = rope(*views, **options, **more)
                new = [y if x is None else torch.cat((x, y), -3) for x, y in zip(first, new, strict=True)]
                q, k = (x if x is None or tokens_first else x.transpose(-3, -2) for x in new)
            else:
                rope_(*views, **options, **more)
            return (q, k) if pair else q

        if not pair or split or last_tokens or trailing or not in_place or names[2:4] != ("cos", "sin"):
            return apply

        def quick(*args: Any, **kwargs: Any) -> Any:
            """What eager layers call without a gradient: 3 us less than all of the above, of 17 that a layer takes."""
            if len(args) != 4 or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return apply(*args, **kwargs)
            q, k, _, sin = args
            weights = {}
            if norm:
                layer, sin = sin.layer, sin.sin
                weights = {"q_weight": _weight(layer, "q_norm"), "k_weight": _weight(layer, "k_norm")}
            if type(sin) is not Angles or q.stride(-1) != 1 or k.stride(-1) != 1:
                return apply(*args)
            rope_(
                q if tokens_first_by_default else q.transpose(-3, -2),
                k if tokens_first_by_default else k.transpose(-3, -2),
                positions=sin.positions, frequencies=sin.frequencies, **options, **weights,
            )  # fmt: skip
            return q, k

        return quick


def _weight(layer: Any, name: str) -> Any:
    """That of a norm of a layer, past two look-ups of nn.Module where it is a parameter."""
    norm = layer._modules.get(name)
    return (
        norm._parameters["weight"] if norm is not None and "weight" in norm._parameters else _slow_weight(layer, name)
    )


def _slow_weight(layer: Any, name: str) -> Any:
    return getattr(getattr(layer, name), "weight", None)


def with_functions(base: Any, functions: dict[str, Any]) -> Any:
    """The forward of a class, whose code finds these functions under the names of its own."""
    stock = inspect.unwrap(base.forward)
    names = {**stock.__globals__, **functions}
    # By it Dynamo of torch 2.11 goes to the module of that name, and finds the stock functions.
    names.pop("__name__", None)
    made = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    made.__kwdefaults__, made.__module__ = stock.__kwdefaults__, stock.__module__
    return made


class Plan:
    """How the layers of a class are served; the same object for all of a model, so that they compile to one graph."""

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from
        base, forms, rounding, norm, in_place = made_from
        self.fuses_norm = norm is not None
        self.function = with_functions(base, {name: form.make(rounding, norm, in_place) for name, form in forms})
        self.rotates = self.function  # with the norms' own code
        if norm:
            self.rotates = with_functions(base, {name: form.make(rounding, None, in_place) for name, form in forms})

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> Any:
        return Plan, self.made_from


class Fusing:
    """The norms of a layer that are done with the rotation, as long as they are as `patch` found them."""

    def __init__(self, layer: Any, norm: Norm) -> None:
        self.layer = layer
        self.eps = norm.eps
        self.active = True  # what the norms go by: set by the layer's call

    def holds(self) -> bool:
        """Nobody has put a hook on one of them, something round it or another epsilon into it."""
        modules = self.layer._modules
        for name in ("q_norm", "k_norm"):
            state = vars(modules[name]) if modules.get(name) is not None else {}
            if state.get(STATE) is not self or state.get("variance_epsilon", state.get("eps")) != self.eps:
                return False
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return False
            if state["_backward_hooks"] or state["_backward_pre_hooks"]:
                return False
        return True


def _fuses(layer: Any, plan: Plan) -> bool:
    fusing = getattr(layer, FUSING, None) if plan.fuses_norm else None
    if fusing is None:
        return plan.fuses_norm
    if not torch.compiler.is_compiling():
        fusing.active = fusing.holds()
    return fusing.active


def _attention_forward(base: Any) -> Any:
    parameters = list(inspect.signature(base.forward).parameters)
    place = parameters.index(TABLES) - 1 if TABLES in parameters else len(parameters)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = getattr(self, STATE, None)
        tables = kwargs.get(TABLES, args[place] if place < len(args) else None)
        serves = plan is not None
        fuses = serves and _fuses(self, plan)
        if isinstance(tables, tuple):
            cos, sin = tables
            if fuses:
                tables = cos, _OfLayer(sin, self)
            elif not serves and isinstance(sin, Angles):
                x = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
                cls = type(sin.rotary)
                tables = call_rotary(getattr(cls, "_ropewalk_base", cls), sin.rotary, x, sin.positions, sin.layer_type)
            if TABLES in kwargs:
                kwargs = {**kwargs, TABLES: tables}
            else:
                args = (*args[:place], tables, *args[place + 1 :])
        if not serves:
            return base.forward(self, *args, **kwargs)
        return (plan.function if fuses else plan.rotates)(self, *args, **kwargs)

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
        # In a graph longrope's choice is made on the device, which the tables have behind them.
        in_graph = rotary is not None and torch.compiler.is_compiling() and rotary.chooses(layer_type)
        if rotary is None or in_graph or not rotary.holds(self):
            more = (layer_type,) if takes_layer_type else ()
            return base.forward(self, x, position_ids, *more)
        angles = Angles(position_ids, rotary.frequencies(layer_type, position_ids), self, layer_type)
        return angles, angles

    return forward


def _norm_forward(base: Any) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, x: Any) -> Any:
        fusing = getattr(self, STATE, None)
        return x if fusing is not None and fusing.active else base.forward(self, x)

    return forward


# What turns by no angle where a call is to turn nothing. As few elements as fill GPUs' accesses of 16 bytes, since each
# pair has its angle calculated: 4,096 take 4 times as long on the CPU if all of them turn so.
_STILL = 16


def _wide_norm_forward(base: Any) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, x: Any) -> Any:
        wide = getattr(self, STATE, None)
        if wide is None or x.dim() not in (2, 3, 4):
            return base.forward(self, x)
        # A width that is spread over ranks has no norm on one of them.
        if any(placement.is_shard(x.dim() - 1) for placement in getattr(x, "placements", ())):
            return base.forward(self, x)
        x = x if x.stride(-1) == 1 else x.contiguous()
        heads = x if x.dim() == 4 else x.unsqueeze(-2)
        still = _common.still(min(self.weight.shape[-1], _STILL))
        options: dict[str, Any] = {
            "norm": "rms", "eps": eps_of(self), "q_weight": self.weight, "rounding": wide.rounding,
            "zero_centered_weight": wide.zero_centered, "frequencies": still,
        }  # fmt: skip
        return rope(heads, **options)[0].reshape(x.shape)  # hooks and others may look at x

    return forward


def _recorded_forward(base: Any) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[STATE].call(base, self, args, kwargs)

    return forward


_FORWARDS = {
    "attention": _attention_forward,
    "rotary": _rotary_forward,
    "norm": _norm_forward,
    "wide norm": _wide_norm_forward,
    "recorded": _recorded_forward,
}


def _watches_all() -> bool:
    """Whether there are hooks of all modules."""
    of_all = torch.nn.modules.module
    return bool(
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )


def derived(base: Any, attributes: dict[str, Any], new: Any, *key: Any) -> Any:
    """`base` with these attributes, under the same name: what goes by names goes on. `new(*key)` makes an empty one,
    for pickle and copy."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        if type(self) is not made:
            return base.__reduce_ex__(self, protocol)
        _, _, *state = base.__reduce_ex__(self, max(int(protocol), 2))
        return new, key, *state

    own = {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce_ex__": reduce_ex, "_ropewalk_base": base}
    made = type(base.__name__, (base,), {**own, **attributes})
    made.__qualname__ = base.__qualname__
    return made


def _norm_call(base: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A call of nn.Module takes 1 us to find that nobody watches it, which the layer has just looked for.
        fusing = self.__dict__.get(STATE)
        if fusing is None or not fusing.active or len(args) != 1 or torch.compiler.is_compiling() or _watches_all():
            return base.__call__(self, *args, **kwargs)
        return args[0]

    return call


@functools.cache
def _class(base: Any, kind: str) -> Any:
    """`base` with the forward of that kind."""
    attributes = {"forward": _FORWARDS[kind](base)}
    if kind == "norm":
        attributes["__call__"] = _norm_call(base)
    return derived(base, attributes, _new, base, kind)


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
    """Makes a module one of its class with the forward of that kind, one of _FORWARDS."""
    base = type(module)
    module.__class__ = _class(base, kind)
    module.__dict__[STATE] = state
    _rebind(module, base.forward, type(module).forward)


def take_off(module: Any) -> None:
    """Undoes `put`, and nothing else: wrappers that others put round it since go on, and get the stock forward."""
    module.__dict__.pop(FUSING, None)
    if module.__dict__.pop(STATE, None) is None:
        return
    ours = next(cls for cls in type(module).__mro__ if "_ropewalk_base" in cls.__dict__)
    _rebind(module, ours.forward, ours._ropewalk_base.forward)
    if type(module) is ours:  # else another has been made from it, which without the state does as the stock one
        module.__class__ = ours._ropewalk_base
