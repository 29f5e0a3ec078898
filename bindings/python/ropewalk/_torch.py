"""The operation as `torch.ops.ropewalk.rope_`, made from the core's own schema, for torch.compile and whatever else
watches torch's operators: tracers, dispatch modes, subclasses, torch.func.

In eager mode the module is called directly, which costs less. The operator only changes its arguments, so that its
shape function does nothing but refuse.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _arrays, _module
from ._frequencies import Frequencies

_call = _module.function("rope")
_names = [arg["name"] for arg in _module.description()]
_written = [arg["name"] for arg in _module.description() if arg.get("intent", "in") != "in"]
_kinds = [(arg["name"], arg["kind"]) for arg in _module.description()]
_tensors = [arg["name"] for arg in _module.description() if arg["kind"] == "tensor"]
_host_scalars = [arg["name"] for arg in _module.description() if arg.get("host_scalar")]
assert _names[:5] == ["q", "k", "positions", "offsets", "frequencies"]
# A graph holds its frequencies themselves, as text: an address or a number would be another's in another process.
_schema: str = _module.function("torch_schema")().replace("int frequencies=0", 'str frequencies=""', 1)
# With q_out and k_out, q and k are only read: an operator of its own, so that graphs need not copy them.
_out_schema = (
    _schema.replace("rope_(", "rope_out(", 1)
    .replace("Tensor(a!) q", "Tensor q")
    .replace("Tensor(b!)? k=", "Tensor? k=")
)
increment_version = torch._C._increment_version
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def _modes() -> bool:
    """Whether somebody watches torch's operators in this thread: modes, torch.jit.trace."""
    c = torch._C
    traced = c._get_tracing_state() is not None
    return traced or c._len_torch_dispatch_stack() > 0 or c._len_torch_function_stack() > 0


def _asked_here(*values: Any) -> None:
    if _modes() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise TypeError("rope: torch's operators are watched")
    _call(*values)


# The module's call, but a TypeError where somebody watches.
_KEYS = ("Python", "Tracer", "FuncTorchDynamicLayerFrontMode", "Functionalize")
_asks_torch = _module.function("set_watching_keys")(*(int(torch._C._dispatch_key_parse(key)) for key in _KEYS))
rope_unwatched = _module.function("rope_unwatched") if _asks_torch else _asked_here


class _Handles(dict[str, "int | None"]):
    """Addresses of the core's objects, by what graphs hold. Kept for ever, as graphs are not known to end."""

    def __init__(self) -> None:
        super().__init__({"": None})
        self._kept: list[Frequencies] = []

    def __missing__(self, content: str) -> int:
        self._kept.append(Frequencies._of_content(content))
        self[content] = self._kept[-1]._handle
        return self[content]


_handles = _Handles()


def wrote(*tensors: Any) -> None:
    """Has autograd notice that these were written: what it saved of them is no longer what it was."""
    # Inference tensors have no version, and autograd saves none of them.
    increment_version([x for x in tensors if isinstance(x, torch.Tensor) and not x.is_inference()])


def _run(
    q: Any, k: Any = None, positions: Any = None, offsets: Any = None, frequencies: str = "", *others: Any
) -> None:  # torch leaves out what has its default at the end
    _call(q, k, positions, offsets, _handles[frequencies], *others)
    if len(others) > _FIRST_OUTPUT:
        q_out, k_out, _, *caches = (*others[_FIRST_OUTPUT : _FIRST_OUTPUT + 5], None, None, None, None)[:5]
        wrote(q if q_out is None else q_out, k if k_out is None else k_out, *caches)
        return
    try:
        increment_version((q,) if k is None else (q, k))
    except RuntimeError:
        wrote(q, k)


_FIRST_OUTPUT = _names.index("q_out") - 5
assert _names[_FIRST_OUTPUT + 5 :][:5] == ["q_out", "k_out", "v", "k_cache", "v_cache"]


def _shape(*values: Any) -> None:
    """For tensors without data: those that stand for others while a graph is made, and those on "meta", which would
    leave the others as they are."""
    for name, value in zip(_names, values, strict=False):
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            raise ValueError(f"rope: {name} must hold data, but is on the meta device")


def _rule_of_vmap(operator: Any, written: list[str]) -> Any:
    """One call for each of vmap's."""

    def rule(info: Any, in_dims: Any, *values: Any) -> tuple[None, None]:
        for name, value, dim in zip(_names, values, in_dims, strict=False):
            if name in written and value is not None and dim is None:
                raise ValueError(
                    f"rope: {name} would be written by each of the {info.batch_size} calls of vmap, but is one for "
                    "all: let vmap go over it, too"
                )
        for i in range(info.batch_size):
            operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(values, in_dims, strict=True)))
        return None, None

    return rule


_library = torch.library.Library("ropewalk", "DEF")
for _definition in (_schema, _out_schema):
    _name = _definition.partition("(")[0]
    _library.define(_definition, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ropewalk::{_name}", _shape, lib=_library)
    torch.library.register_vmap(
        f"ropewalk::{_name}",
        _rule_of_vmap(getattr(torch.ops.ropewalk, _name).default,
                      [name for name in _written if _name == "rope_" or name not in ("q", "k")]),
        lib=_library,
    )  # fmt: skip


def _serves_dtensors() -> bool:
    """Registers the rules for DTensors once torch has them, which is not imported for that: it takes seconds."""
    global _has_dtensor_rules
    if not _has_dtensor_rules and "torch.distributed.tensor" in sys.modules:
        from . import _dtensor  # noqa: PLC0415

        _has_dtensor_rules = True
        _dtensor.register(_library, wrote)
    return _has_dtensor_rules


_has_dtensor_rules = False
# Called while a graph is made, as by torch.compiler.assume_constant_result, which imports all of Dynamo.
_serves_dtensors._dynamo_marked_constant = True  # type: ignore[attr-defined]
_serves_dtensors()


def _scale(name: str, value: Any) -> Any:
    if not _arrays.is_number(value):
        return value
    return torch.tensor(_arrays.number(f"rope: {name}", value), dtype=torch.float32, device="cpu")


def _check(tensors: dict[str, Any]) -> None:
    """Refuses what would be lost or not be seen."""
    grad_enabled = torch.is_grad_enabled()
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"rope: {name} must be a torch.Tensor where torch traces the call, but is a {_arrays._type_name(x)}"
            )
        if grad_enabled and x.requires_grad:
            raise ValueError(
                f"rope: {name} requires grad, and Ropewalk has no backward: call it under torch.no_grad(), "
                f"or give {name}.detach()"
            )
        if torch.compiler.is_compiling():
            continue
        if has_tangent(x):
            raise ValueError(
                f"rope: {name} has a tangent (forward-mode AD, torch.func.jvp), and Ropewalk has no derivative"
            )
        if type(x) in PLAIN and torch._is_functional_tensor(x):
            raise ValueError(
                f"rope: {name} is one of torch.func.functionalize, which operators that write do not go through: use "
                "torch.compile or torch.export, or call it outside"
            )


def has_tangent(x: Any) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_watched(values: Any) -> bool:
    """Whether somebody watches torch's operators here, or these are no plain tensors."""
    return _modes() or any(
        type(x) not in PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(x) or has_tangent(x)
        for x in values
        if isinstance(x, torch.Tensor)
    )


_TORCH_VALUES: dict[str, Any] = {
    "tensor": lambda name, value: value,
    "handle": lambda name, value: "" if value is None else value._content,
    "queue": lambda name, value: _arrays.queue(value) or 0,
    "choice": _arrays.choice,
    "int": lambda name, value: value or 0,
    "bool": lambda name, value: int(value),
    "float": lambda name, value: value,
}


def rope_(arguments: dict[str, Any]) -> None:
    """The call as an operator of torch. All arguments by name."""
    _serves_dtensors()
    arguments = {**arguments, **{name: _scale(name, arguments[name]) for name in _host_scalars}}
    _check({name: arguments[name] for name in _tensors})
    writes_k = arguments["k"] is not None and arguments["k_out"] is None and not arguments["k_store_only"]
    in_place = arguments["q_out"] is None or writes_k
    operator = torch.ops.ropewalk.rope_ if in_place else torch.ops.ropewalk.rope_out
    operator(*[_TORCH_VALUES[kind](name, arguments[name]) for name, kind in _kinds])
