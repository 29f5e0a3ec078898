"""What a call of `rope_` needs besides its arguments: names for the quick way (ropewalk._face), and the slow way."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from . import _arrays, _module
from ._frequencies import Frequencies

_launch = _module.function("rope")
_names = [arg["name"] for arg in _module.description()]
launch = _module.function("rope_unwatched")
# Of nothing but a Frequencies; as quick as the attribute itself.
handle_of: Any = Frequencies._handle.__get__  # type: ignore[attr-defined]
PAIRING = _arrays.CHOICES["pairing"]
NORM = _arrays.CHOICES["norm"]
ROUNDING = _arrays.CHOICES["rounding"]


NOTHING: Any = object()  # that nobody gives
Documented = TypeVar("Documented", bound=Callable[..., Any])


class _Absent:
    """Stands for the array type of a package that is not installed."""


NumpyArray: Any = _Absent if _arrays.numpy is None else _arrays.numpy.ndarray

if _arrays.torch is not None:
    from . import _torch

    Tensor: Any = _arrays.torch.Tensor
    PLAIN = _torch.PLAIN
    is_compiling = _arrays.torch.compiler.is_dynamo_compiling
    grad_enabled = _arrays.torch.is_grad_enabled
    new_like = _arrays.torch.empty_like
    increment_version = _torch.increment_version
    dual: Any = _torch.forward_ad
    launch = _torch.rope_unwatched
    wrote = _torch.wrote
    wants_gradient = _torch.wants_gradient
    differentiable = _torch.rope
    backward_watched = _torch.rope_backward
else:
    Tensor = _Absent
    PLAIN = frozenset()
    grad_enabled = new_like = increment_version = dual = differentiable = backward_watched = None

    def is_compiling() -> bool:
        return False

    def wants_gradient(values: Any) -> bool:
        return False

    def wrote(*arrays: Any) -> None:
        """Nobody but torch's autograd wants to know."""


def served_by(function: Any) -> Callable[[Documented], Documented]:
    """Has the documented function's calls go to `function`. That one has the keywords as parameters by position, behind
    one that nobody gives: Python looks up each keyword-only one that is not given, 136 of a call's 610 ns."""

    def serve(documented: Documented) -> Documented:
        functools.update_wrapper(function, documented)
        function.__annotations__ = documented.__annotations__  # Python 3.14's update_wrapper leaves them
        return function  # type: ignore[no-any-return]

    return serve


def direct(function: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """What serves plain tensors of torch, for `rope_`, whose defaults are these, and for `rope_backward`, or else what
    serves nothing; and the defaults of all arguments, in the module's order."""

    def nothing(*values: Any) -> None:
        """Another way serves."""

    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    of = dict(zip(reversed(names), reversed(function.__defaults__), strict=False))
    values = tuple(of.get(name) for name in _names)
    choices = tuple(_arrays.CHOICES.get(name) for name in _names)
    found = _arrays.torch and _torch.direct(values, choices)
    return (found, _torch.direct_backward(), values) if found else (nothing, nothing, values)


def defaults() -> dict[str, Any]:
    """What each keyword of `rope_` is that was not given."""
    from . import _DEFAULTS  # noqa: PLC0415

    return _DEFAULTS


def is_watched(values: Any) -> bool:
    """Whether torch compiles, traces or watches the call, or has wrapped what it is given."""
    return _arrays.torch is not None and (is_compiling() or _torch.is_watched(values))


def slow(arguments: dict[str, Any], failure: Exception | None) -> tuple[Any, Any]:
    """A call that is compiled, that is no quick one, that autograd goes through, or that failed before anything was
    written."""
    if _arrays.torch is not None and _torch.wants_gradient(arguments.values()):
        return _torch.rope_in_place(arguments)
    watched = is_watched(arguments.values())
    if watched:
        _torch.rope_(arguments)
    else:
        values = _arrays.values(arguments)  # names what numpy only says to be neither true nor false
        if failure is not None:
            raise failure
        _launch(*values)
    q, k, q_out, k_out = (arguments[name] for name in ("q", "k", "q_out", "k_out"))
    new = q if q_out is None else q_out, None if arguments["k_store_only"] else k if k_out is None else k_out
    if not watched:
        wrote(*new, arguments["k_cache"], arguments["v_cache"])
    return new
