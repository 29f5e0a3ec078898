"""Ropewalk: rotary position embedding on queries and keys, exact at every position, at the speed of memory.

One operation in three stages: normalise each head (optional), rotate, store (in place, into new tensors, or into a KV
cache). Tensors are anything with DLPack: torch, numpy, cupy; jax arrays on the CPU, which `rope` alone takes.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from . import _arrays, _call, _module
from ._backward import rope_backward
from ._face import rope_
from ._frequencies import Frequencies
from ._packed import packed_positions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._arrays import SupportsDLPack
    from ._face import RopeOptions

__all__ = [
    "Frequencies",
    "backends",
    "can_use",
    "check_faults",
    "counters",
    "explain",
    "force_backend",
    "packed_positions",
    "prepare",
    "rope",
    "rope_",
    "rope_backward",
    "set_threads",
]

__version__: str = _module.function("version")()

_prepare = _module.function("prepare")
_explain = _module.function("explain")
_check_faults = _module.function("check_faults")
_backends = _module.function("backends")
_counters = _module.function("counters")
_force_backend = _module.function("force_backend")
_set_threads = _module.function("set_threads")
_default_threads = _module.function("default_threads")
_use_torch_threads = _module.function("use_torch_threads")
_module.function("set_find_sycl_queue")(_arrays.current_queue)

if _arrays.torch is not None:
    _use_torch_threads()


def rope(q: SupportsDLPack, k: SupportsDLPack | None = None, **options: Unpack[RopeOptions]) -> tuple[Any, Any]:
    """As `rope_`, but into new tensors: q and k are left as they are. KV caches are written as there.

    torch's autograd goes through it, to q, k, q_weight and k_weight, where it stores nothing in a cache:
    docs/training.md.

    Returns:
        The new q and k, like their own (torch, numpy, cupy, or jax on the CPU); None for no k, or with k_store_only.
    """
    if (
        not _call.is_compiling()
        and type(q) is _call.Tensor
        and (k is None or type(k) is _call.Tensor)
        and not _call.grad_enabled()
    ):  # the same in half the time
        k_out = None if k is None or options.get("k_store_only") else _call.new_like(k)
        return rope_(q, k, q_out=_call.new_like(q), k_out=k_out, **options)
    if isinstance(q, _call.Tensor) and _call.wants_gradient((q, k, *options.values())):
        return _call.differentiable({**_DEFAULTS, **_arrays.known("rope", options, _DEFAULTS), "q": q, "k": k})
    q_out = _arrays.empty_like("q", q)
    k_out = None if k is None or options.get("k_store_only") else _arrays.empty_like("k", k)
    new = rope_(q, k, q_out=q_out, k_out=k_out, **options)
    return new if isinstance(q, _call.Tensor) else (_arrays.as_given(q, new[0]), _arrays.as_given(k, new[1]))


def prepare(q: SupportsDLPack, k: SupportsDLPack | None = None, **options: Unpack[RopeOptions]) -> None:
    """Makes all that a later `rope_` with such arguments needs (kernels, device copies), so that it neither compiles
    nor allocates and may be captured in a graph. Takes the arguments of `rope_`; reads and writes no tensor's data.
    """
    _prepare(*_arrays.values({"q": q, "k": k, **_arrays.known("prepare", options, _DEFAULTS)}))


def can_use(q: SupportsDLPack, k: SupportsDLPack | None = None, **options: Unpack[RopeOptions]) -> bool:
    """Whether `rope_` would serve such a call here: True if `prepare` succeeds, which it then has.

    Raises nothing but a TypeError for a keyword that `rope_` does not have."""
    _arrays.known("can_use", options, _DEFAULTS)
    try:
        prepare(q, k, **options)
    except Exception:  # it promises an answer
        return False
    return True


def explain(q: SupportsDLPack, k: SupportsDLPack | None = None, **options: Unpack[RopeOptions]) -> dict[str, str]:
    """Which backend, kernel and source would serve such a call of `rope_`, and why. Writes nothing."""
    return json.loads(_explain(*_arrays.values({"q": q, "k": k, **_arrays.known("explain", options, _DEFAULTS)})))


# What a keyword is that was not given.
_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(rope_).parameters.items()}

# What `help` and completion show: the keywords of rope_.
for _function in (rope, prepare, can_use, explain):
    _function.__signature__ = inspect.signature(rope_).replace(  # type: ignore[attr-defined]
        return_annotation=inspect.signature(_function).return_annotation
    )


def __dir__() -> list[str]:
    """What is meant to be used, without what this file imports."""
    modules = (name for name in ("compat", "diffusers", "torchtitan", "transformers") if name in globals())
    return sorted([*__all__, "__doc__", "__version__", *modules])


def check_faults() -> None:
    """Raises a RuntimeError if a kernel finished since the last call met a position outside its table or a slot outside
    its cache; the message names the first such token. Waits for the devices. The record is cleared."""
    _check_faults()


def force_backend(name: str | None) -> None:
    """Serves calls with this backend only ("cpu", "cuda", ..), or with one CPU target ("cpu:avx2"). None ends that."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"force_backend: name must be a str or None, but is a {type(name).__name__}")
    _force_backend(name)


def backends() -> list[dict[str, Any]]:
    """The backends, available or not: name, available, detail (what serves, or why it cannot), remedy."""
    return json.loads(_backends())


def counters() -> dict[str, int]:
    """How often each kernel was launched since the start, by "backend kernel"."""
    return json.loads(_counters())


def set_threads(threads: int | None) -> None:
    """How many threads the CPU backend uses: a pool of its own, the caller's thread included. None: torch's threads if
    torch is installed (the default then, see `torch.set_num_threads`), else one."""
    _set_threads(1 if threads is None else _arrays.integer("set_threads: threads", threads))
    if threads is not None or _arrays.torch is None or not _use_torch_threads():
        _default_threads()
