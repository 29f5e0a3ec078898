"""The operation as `torch.ops.ropewalk.rope_`, made from the core's own schema, for torch.compile and whatever else
watches torch's operators: tracers, dispatch modes, subclasses, torch.func.

In eager mode the module is called directly, which costs less. The operator only changes its arguments, so that its
shape function does nothing but refuse.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import ctypes
import hashlib
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
# torch takes 60 ns for each argument that an operator has, given or not, and graphs give them all. So calls that need
# only the first ones have operators without the rest.
_FEW = _names.index("pairing") + 1
_OUTPUTS = ("q_out", "k_out")


def _short(schema: str, name: str, names: Any) -> str:
    parts = {part.partition("=")[0].split(" ")[1]: part for part in schema[schema.index("(") + 1 : -7].split(", ")}
    return f"{name}({', '.join(parts[each] for each in names)}) -> ()"


_WRITING = {  # by definition, the names of the arguments
    _schema: _names,
    _out_schema: _names,
    _short(_schema, "rope_short_", _names[:_FEW]): _names[:_FEW],
    _short(_out_schema, "rope_short_out", (*_names[:_FEW], *_OUTPUTS)): [*_names[:_FEW], *_OUTPUTS],
}
increment_version = torch._C._increment_version
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def _modes() -> bool:
    """Whether somebody watches torch's operators in this thread: modes, torch.jit.trace."""
    c = torch._C
    traced = c._get_tracing_state() is not None
    return traced or c._len_torch_dispatch_stack() > 0 or c._len_torch_function_stack() > 0


def _asked_here(q_own: int, k_own: int, *values: Any) -> None:
    if _modes() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise TypeError("rope: torch's operators are watched")
    written = [x for x in values[: 2 if q_own else 0] if x is not None]
    if any(x.is_neg() or (x.requires_grad and torch.is_grad_enabled()) for x in written):
        raise TypeError("rope: autograd is to see it")
    _call(*values)
    wrote(*written)


# The module's call, but a TypeError where somebody watches. Before its arguments q's and k's `_cdata`, if they are
# rotated in place, else 0: then it asks whether autograd lets them be overwritten, and tells it that they were.
_KEYS = ("Python", "Tracer", "FuncTorchDynamicLayerFrontMode", "Functionalize")
_asks_torch = _module.function("set_watching_keys")(*(int(torch._C._dispatch_key_parse(key)) for key in _KEYS))
rope_unwatched = _module.function("rope_unwatched") if _asks_torch else _asked_here


def direct(defaults: tuple[Any, ...], choices: tuple[Any, ...]) -> Any:
    """`rope_` of plain tensors without tvm-ffi and Python's questions between (bindings/python/direct.h): all arguments
    by position, of which each may be the very object that is its default. It returns what `rope_` does, or None where
    another way is to serve the call or to say what is wrong; then nothing was written. Or None, where there is no such
    function: no CPython, one without a GIL, or a torch whose operators the module does not serve."""
    if not served_by_module or sys.implementation.name != "cpython" or "t" in sys.abiflags:
        return None
    make = ctypes.PyDLL(_module.PATH).ropewalk_python_rope
    make.restype = ctypes.c_void_p  # as an object, null would end the process before Python 3.12
    types = (torch.Tensor, torch.nn.Parameter, Frequencies)
    trial = None if _modes() or in_func() else torch.Tensor()
    made = make(*map(ctypes.py_object, (*types, vars(forward_ad), -1, defaults, choices, trial)))
    return made and ctypes.cast(made, ctypes.py_object).value  # kept for ever


def direct_backward() -> Any:
    """The same of `rope_backward`, where there is a `direct`: its own arguments with the workspace, then all of a call.
    True; or an int, the elements of a workspace that is to be given, or None, and then nothing was written."""
    make = ctypes.PyDLL(_module.PATH).ropewalk_python_rope_backward
    make.restype = ctypes.c_void_p
    return ctypes.cast(make(), ctypes.py_object).value


class _Handles(dict[str, "int | None"]):
    """Addresses of the core's objects, by what graphs hold. Kept for ever, even where this file is loaded once more:
    graphs are not known to end, and the module keeps the addresses, too."""

    def __init__(self) -> None:
        super().__init__({"": None})

    def __missing__(self, content: str) -> int | None:
        if content.startswith("#"):
            return None
        # In one expression: other threads may be here for other contents.
        return self.setdefault(content, Frequencies._of_content(content.partition(" #")[0])._give_away())


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
        only_stored = len(others) > _STORE_ONLY and others[_STORE_ONLY]
        wrote(q if q_out is None else q_out, None if only_stored else k if k_out is None else k_out, *caches)
        return
    try:
        increment_version((q,) if k is None else (q, k))
    except RuntimeError:
        wrote(q, k)


_FIRST_OUTPUT, _STORE_ONLY = _names.index("q_out") - 5, _names.index("k_store_only") - 5
assert _names[_FIRST_OUTPUT + 5 :][:5] == ["q_out", "k_out", "v", "k_cache", "v_cache"]


def _run_short_out(*values: Any) -> None:
    first = [*values[:_FEW], *(None for _ in range(_FEW - len(values)))]
    _run(*first[:4], first[4] or "", *first[5:], *(None for _ in range(_FIRST_OUTPUT + 5 - _FEW)), *values[_FEW:])


def _shape(*values: Any) -> None:
    _shape_of(_names, values)


def _shape_of(names: list[str], values: Any) -> None:
    """For tensors without data: those that stand for others while a graph is made, and those on "meta", which would
    leave the others as they are."""
    for name, value in zip(names, values, strict=False):
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            raise ValueError(f"rope: {name} must hold data, but is on the meta device")


def _rule_of_vmap(operator: Any, names: list[str], written: list[str]) -> Any:
    """One call for each of vmap's."""

    def rule(info: Any, in_dims: Any, *values: Any) -> tuple[None, None]:
        for name, value, dim in zip(names, values, in_dims, strict=False):
            if name in written and value is not None and dim is None:
                raise ValueError(
                    f"rope: {name} would be written by each of the {info.batch_size} calls of vmap, but is one for "
                    "all: let vmap go over it, too"
                )
        for i in range(info.batch_size):
            operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(values, in_dims, strict=True)))
        return None, None

    return rule


def _past_lazy_views(operator: Any, names: list[str], written: list[str]) -> Any:
    """For lazily negated and conjugated views, instead of torch's own way with them: it looks for what was written
    among the results, and where an operator has none, reads and releases what lies behind the end of its stack."""

    def rule(*values: Any) -> None:
        for name, x in zip(names, values, strict=False):
            if name in written and isinstance(x, torch.Tensor) and (x.is_neg() or x.is_conj()):
                lazily, resolve = ("negated", "resolve_neg") if x.is_neg() else ("conjugated", "resolve_conj")
                raise ValueError(f"rope: {name} is a lazily {lazily} view: call {name}.{resolve}() first")
        operator(*(x.resolve_conj().resolve_neg() if isinstance(x, torch.Tensor) else x for x in values))

    return rule


_library = torch.library.Library("ropewalk", "DEF")
for _definition, _its_names in _WRITING.items():
    _name = _definition.partition("(")[0]
    _library.define(_definition, tags=[torch.Tag.pt2_compliant_tag])
    torch.library.register_fake(
        f"ropewalk::{_name}", lambda *values, names=_its_names: _shape_of(names, values), lib=_library
    )
    _operator = getattr(torch.ops.ropewalk, _name).default
    _its_written = [name for name in _written if _name.endswith("_") or name not in ("q", "k")]
    torch.library.register_vmap(f"ropewalk::{_name}", _rule_of_vmap(_operator, _its_names, _its_written), lib=_library)
    for _key in ("Negative", "Conjugate"):
        _library.impl(_name, _past_lazy_views(_operator, _its_names, _its_written), _key)


def _holds() -> bool:
    """Whether the operators, tried once, read what they are given, refuse as Python does, and have autograd notice what
    they write. Without a token, so that no call is counted."""
    if _modes() or in_func():
        return True  # whoever watches is not to see it
    quarter = (1.0).hex() + " " + base64.b64encode((1 << 62).to_bytes(8, sys.byteorder)).decode()
    with torch.inference_mode(False), torch.no_grad():
        q, k, out = (torch.empty((n, 1, 2), dtype=torch.float32, device="cpu") for n in (0, 3, 0))
        try:
            torch.ops.ropewalk.rope_short_out(q, frequencies=quarter, q_out=out)
            versions = [q._version, out._version]
            torch.ops.ropewalk.rope_(q, frequencies=quarter)
            versions.append(q._version)
            torch.ops.ropewalk.rope_(q, k, frequencies=quarter)
        except ValueError as error:
            return str(error) == "rope: k has 3 tokens, but q has 0" and versions == [0, 1, 1]
        except Exception:  # of torch's, whatever it is: then Python serves
            return False
    return False


def _serve() -> bool:
    """Has the module serve the operators itself, which saves 1.3 us of a call. Whether it can, by the functions that it
    found in torch, from 2.10 on; else they are Python's."""
    _module.function("set_find_frequencies")(lambda content: _handles[str(content)])
    if _module.function("serve_torch")():
        if _holds():
            return True
        _module.function("leave_torch")()
    for definition in _WRITING:
        name = definition.partition("(")[0]
        _library.impl(name, _run_short_out if name == "rope_short_out" else _run, "CompositeExplicitAutograd")
    return False


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
        _arrays.check_kind(name, x)
        if grad_enabled and requires_grad(x):
            raise ValueError(
                f"rope: {name} requires grad, and autograd does not go through this call: use ropewalk.rope, call it "
                f"under torch.no_grad(), or give {name}.detach()"
            )
        if torch.compiler.is_compiling():
            continue
        _refuse_tangent(name, x)
        if type(x) in PLAIN and any(torch._is_functional_tensor(level) for level in levels(x)):
            raise ValueError(
                f"rope: {name} is one of torch.func.functionalize, which operators that write do not go through: use "
                "torch.compile or torch.export, or call it outside"
            )


def in_func() -> bool:
    """Whether a transform of torch.func goes on here."""
    return torch._C._functorch.peek_interpreter_stack() is not None


in_func._dynamo_marked_constant = True  # type: ignore[attr-defined]  # its transforms are entered while it traces, too


served_by_module = _serve()


def levels(x: torch.Tensor) -> list[torch.Tensor]:
    """The tensor and what torch.func's wrappers hold, the innermost last: a tensor of vmap's does not say what is asked
    of the one in it."""
    of = torch._C._functorch
    found = [x]
    while of.is_functorch_wrapped_tensor(found[-1]):
        found.append(of.get_unwrapped(found[-1]))
    return found


def requires_grad(x: torch.Tensor) -> bool:
    """Whether x requires grad, or what a transform of torch.func wrapped in it does."""
    if x.requires_grad or torch.compiler.is_compiling() or not in_func():
        return x.requires_grad
    return any(level.requires_grad for level in levels(x))


def has_tangent(x: Any) -> bool:
    if forward_ad._current_level < 0:
        return False
    batched = torch._C._functorch.is_batchedtensor  # has no rule for a look at its tangent
    return any(not batched(level) and forward_ad.unpack_dual(level).tangent is not None for level in levels(x))


def _refuse_tangent(name: str, x: torch.Tensor) -> None:
    if has_tangent(x):
        raise ValueError(
            f"rope: {name} has a tangent (forward-mode AD, torch.func.jvp), and Ropewalk has no derivative"
        )


def is_watched(values: Any) -> bool:
    """Whether somebody watches torch's operators here, or these are no plain tensors."""
    return _modes() or any(
        type(x) not in PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(x) or has_tangent(x)
        for x in values
        if isinstance(x, torch.Tensor)
    )


# ---------------------------------------------------------------------------------------------------------------------
# With gradients: `torch.ops.ropewalk.rope`, which writes nothing that is given, and its gradient

# Of these autograd calculates gradients; the operator has what comes before the outputs, and these two.
DIFFERENTIABLE = ("q", "k", "q_weight", "k_weight")
_BEHIND = ("sycl_queue", "disable_pdl")
_count = _names.index("q_out")
_PURE = [*_names[:_count], *_BEHIND]
_call_backward = _module.function("rope_backward")
_backward_workspace = _module.function("rope_backward_workspace")
_INVERSE, _NORM = _PURE.index("inverse"), _PURE.index("norm")
_prepare = _module.function("prepare")
_count_tensors = sum(name in _tensors for name in _names[:_count])
_SAVED = [i for i, name in enumerate(_PURE) if name in _tensors]


def _definition_of(name: str, first: str, rest: list[str], returns: str) -> str:
    parts = dict(part.split("=")[0].rsplit(" ", 1)[::-1] for part in _schema[6:-7].split(", "))
    # Written in a call in place, only read here.
    plain = {each: kind.split("(")[0].rstrip("?") + ("?" if "?" in kind else "") for each, kind in parts.items()}
    defaults = {"Tensor?": "None", "str": '""', "int": "0", "float": "1e-6"}
    written = [f"{plain[each]} {each}" + (f"={defaults[plain[each]]}" if plain[each] != "Tensor" else "")
               for each in rest]  # fmt: skip
    return f"{name}({first}{', '.join(written)}) -> {returns}"


def _all_values(values: tuple[Any, ...]) -> list[Any]:
    """Of the operator, in the module's order: with the frequencies' address, and nothing for outputs and stores."""
    whole = [*values, *(None for _ in range(len(_PURE) - len(values)))]
    whole[4] = _handles[whole[4] or ""]
    between = len(_names) - _count - 1  # up to the last one of all
    behind = [None] * between
    behind[_names.index("sycl_queue") - _count] = whole[_count] or None
    behind[_names.index("disable_pdl") - _count] = whole[_count + 1]
    return [*whole[:_count], *behind]


def _none(like: Any) -> Any:
    """Stands for a tensor that there is none of, as an operator returns a fixed number."""
    return like.new_empty((0,))


def _pure(*values: Any) -> tuple[Any, Any]:
    q, k = (*values, None)[:2]
    whole = _all_values(values)
    q_out = torch.empty_like(q)
    k_out = None if k is None else torch.empty_like(k)
    whole[_count], whole[_count + 1] = q_out, k_out
    _call(*whole)
    return q_out, _none(q) if k is None else k_out


def _pure_shape(*values: Any) -> tuple[Any, Any]:
    _shape(*values)
    q, k = (*values, None)[:2]
    return torch.empty_like(q), _none(q) if k is None else torch.empty_like(k)


def _new_gradients(q_grad: Any, k_grad: Any, wants_q: bool, wants_k: bool) -> list[Any]:
    def sums(wanted: bool) -> Any:
        return q_grad.new_empty((q_grad.shape[-1],) if wanted else (0,), dtype=torch.float32)

    dense = [None if x is None else torch.empty_like(x) for x in (q_grad, k_grad)]
    return [dense[0], _none(q_grad) if k_grad is None else dense[1], sums(wants_q), sums(wants_k)]


def _pure_backward(q_grad: Any, k_grad: Any, wants_q: bool, wants_k: bool, *values: Any) -> tuple[Any, ...]:
    new = _new_gradients(q_grad, k_grad, wants_q, wants_k)
    gradients = [q_grad, k_grad, new[0], None if k_grad is None else new[1], new[2] if wants_q else None,
                 new[3] if wants_k else None, None]  # fmt: skip
    whole = _all_values(values)
    size = _backward_workspace(*gradients, *whole) if wants_q or wants_k else 0
    if size:
        gradients[-1] = torch.empty(size, dtype=torch.float32, device=q_grad.device)
    _call_backward(*gradients, *whole)
    return tuple(new)


def _pure_backward_shape(q_grad: Any, k_grad: Any, wants_q: bool, wants_k: bool, *values: Any) -> tuple[Any, ...]:
    return tuple(_new_gradients(q_grad, k_grad, wants_q, wants_k))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    """x, and what the angles and weights come from; without a norm not even x."""
    values = [*inputs, *(None for _ in range(len(_PURE) - len(inputs)))]
    norm = bool(values[_NORM]) or values[_PURE.index("q_weight")] is not None
    ctx.has_k, ctx.has_norm = values[1] is not None, norm
    ctx.save_for_backward(*(None if i < 2 and not norm else values[i] for i in _SAVED))
    ctx.others = [None if i in _SAVED else value for i, value in enumerate(values)]


def _dense(x: Any) -> Any:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _gradient(ctx: Any, q_grad: Any, k_grad: Any) -> tuple[Any, ...]:
    values = list(ctx.others)
    for i, saved in zip(_SAVED, ctx.saved_tensors, strict=True):
        values[i] = saved
    if not torch.compiler.is_compiling():
        for name, x in (("q_grad", q_grad), ("k_grad", k_grad)):
            if x is not None:
                _refuse_tangent(name, x)
    q_grad, k_grad = _dense(q_grad), _dense(k_grad) if ctx.has_k else None
    out: list[Any] = [None] * len(_PURE)
    if not ctx.has_norm:
        values[0], values[1], values[_INVERSE] = q_grad, k_grad, 1 - (values[_INVERSE] or 0)
        new = _apply(_Rope, torch.ops.ropewalk.rope, *_filled(values))
        out[0], out[1] = new[0], new[1] if ctx.has_k else None
        return tuple(out)
    places = [_PURE.index(name) for name in ("q_weight", "k_weight")]
    wants = [values[i] is not None and ctx.needs_input_grad[i] for i in places]
    new = _apply(_RopeBackward, torch.ops.ropewalk.rope_backward, q_grad, k_grad, *wants, *_filled(values))
    out[0], out[1] = new[0], new[1] if ctx.has_k else None
    for i, wanted, grad in zip(places, wants, new[2:], strict=True):
        if wanted:
            out[i] = grad.to(values[i].dtype)
    return tuple(out)


_DEFAULTS = {"int": 0, "bool": 0, "choice": 0, "queue": 0, "float": 1e-6, "handle": "", "tensor": None}


def _filled(values: list[Any]) -> list[Any]:
    kinds = dict(_kinds)
    return [_DEFAULTS[kinds[name]] if x is None else x for name, x in zip(_PURE, values, strict=True)]


def _refuse_twice(ctx: Any, *gradients: Any) -> None:
    raise ValueError(
        "rope: a second derivative was asked for, and Ropewalk has none of the norm: give create_graph=False, or leave "
        "the norm to others, as the rotation alone has every derivative"
    )


def _pure_vmap(operator: Any) -> Any:
    """One call for each of vmap's, whose results lie one behind the other."""

    def rule(info: Any, in_dims: Any, *values: Any) -> Any:
        calls = [operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(values, in_dims, strict=True)))
                 for i in range(info.batch_size)]  # fmt: skip
        new = tuple(torch.stack(each) for each in zip(*calls, strict=True))
        return new, tuple(0 for _ in new)

    return rule


_pure_definition = _definition_of("rope", "", _PURE, "(Tensor, Tensor)")
_backward_definition = _definition_of(
    "rope_backward", "Tensor q_grad, Tensor? k_grad, bool wants_q, bool wants_k, ",
    _PURE, "(Tensor, Tensor, Tensor, Tensor)",
).replace("Tensor q,", "Tensor? q=None,").replace("Tensor q=", "Tensor? q=")  # fmt: skip
for _definition, _body, _fake in (
    (_pure_definition, _pure, _pure_shape), (_backward_definition, _pure_backward, _pure_backward_shape),
):  # fmt: skip
    _name = _definition.partition("(")[0]
    _library.define(_definition, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ropewalk::{_name}", _fake, lib=_library)
    torch.library.register_vmap(
        f"ropewalk::{_name}", _pure_vmap(getattr(torch.ops.ropewalk, _name).default), lib=_library
    )
torch.library.register_autograd("ropewalk::rope", _gradient, setup_context=_save, lib=_library)
torch.library.register_autograd("ropewalk::rope_backward", _refuse_twice, lib=_library)


class _Rope(torch.autograd.Function):
    """What register_autograd makes of the operator, for torch.func, which that does not serve."""

    @staticmethod
    def forward(*values: Any) -> Any:
        return torch.ops.ropewalk.rope(*values)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *values: Any) -> Any:
        return _pure_vmap(_Rope.apply)(info, in_dims, *values)


class _RopeBackward(torch.autograd.Function):
    @staticmethod
    def forward(*values: Any) -> Any:
        return torch.ops.ropewalk.rope_backward(*values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved: there is no second derivative."""

    backward = staticmethod(_refuse_twice)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *values: Any) -> Any:
        return _pure_vmap(_RopeBackward.apply)(info, in_dims, *values)


class _PlainRope(torch.autograd.Function):
    """The same for plain tensors that nobody watches. What register_autograd makes of the operator looks up its schema
    for each argument, which takes 66 of a call's 84 us; with setup_context, Python's signature, 20."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Any:
        new = torch.ops.ropewalk.rope(*values)
        _save(ctx, values, new)
        return new

    backward = staticmethod(_gradient)


def _apply(function: Any, operator: Any, *values: Any) -> Any:
    of_func = not torch.compiler.is_compiling() and in_func()
    return function.apply(*values) if of_func else operator(*values)


def wants_gradient(values: Any) -> bool:
    """Whether autograd would have to go through a call with these."""
    if not torch.is_grad_enabled():
        return False
    compiling = torch.compiler.is_compiling()
    if compiling or in_func():
        # While torch.compile traces a transform, nobody can look into its tensors: any might require grad.
        hidden = compiling and in_func()
        return any(isinstance(x, torch.Tensor) and (hidden or requires_grad(x)) for x in values)
    for x in values:  # 1.7 us less than by `any`
        if isinstance(x, torch.Tensor) and x.requires_grad:
            return True
    return False


def _refuse_tables_and_stores(tensors: dict[str, Any]) -> None:
    """Refuses a gradient of tables, and of what is written elsewhere."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and name in _PURE and name not in DIFFERENTIABLE and requires_grad(x):
            raise ValueError(
                f"rope: {name} requires grad, and Ropewalk calculates no gradient of tables: give {name}.detach(), or "
                "call it under torch.no_grad()"
            )
    given = [name for name in ("k_cache", "q_out", *_tensors[_count_tensors:]) if tensors[name] is not None]
    if not given:
        return
    first = next((name for name, x in tensors.items() if isinstance(x, torch.Tensor) and requires_grad(x)), None)
    if first is None:
        raise ValueError(
            f"rope: {given[0]} is given under torch.func inside torch.compile, where nobody sees what requires grad: "
            "call it under torch.no_grad(), or use ropewalk.rope without it"
        )
    raise ValueError(
        f"rope: {first} requires grad, and {next((name for name in given if name != first), 'it')} is given: a store "
        "and what is written elsewhere have no gradient; call it under torch.no_grad(), or use ropewalk.rope without it"
    )


def rope(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The call into new tensors, through autograd. All arguments of a call without a store, by name."""
    _serves_dtensors()
    if arguments.get("k_store_only") and arguments.get("k_cache") is None:
        raise ValueError("rope: k_store_only is 1, but k_cache is missing: k is stored in k_cache and nowhere else")
    tensors = {name: arguments.get(name) for name in _tensors}
    _refuse_tables_and_stores(tensors)
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"rope: {name} must be a torch.Tensor where autograd goes through the call, but is a "
                f"{_arrays._type_name(x)}"
            )
        if not torch.compiler.is_compiling():
            _refuse_tangent(name, x)
            if type(x) in PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(x):
                _arrays.check_plain(name, x)
    values = [_TORCH_VALUES[kind](name, arguments[name]) for name, kind in _kinds if name in _PURE]
    watched = torch.compiler.is_compiling() or in_func() or is_watched(values)
    new = _apply(_Rope, torch.ops.ropewalk.rope, *values) if watched else _PlainRope.apply(*values)
    return new[0], None if arguments.get("k") is None else new[1]


def why_not_overwritten(x: torch.Tensor) -> str | None:
    """Why autograd would let nobody overwrite it; None: it would."""
    if torch.compiler.is_compiling():
        return "a leaf" if x.requires_grad and x.is_leaf else None
    of = torch._C._autograd
    for level in levels(x):
        is_view = level._is_view()
        if is_view and not in_func() and of._get_creation_meta(level) != of.CreationMeta.DEFAULT:
            return "one of the views that split, chunk or unbind made at once, or a view made under torch.no_grad()"
        if level.requires_grad and (level.is_leaf or (is_view and level._base.is_leaf)):
            return "a leaf or a view of one"
    return None


def _check_written(arguments: dict[str, Any]) -> None:
    """What the core refuses of tensors that it writes, where torch writes them."""
    if any(arguments[name] is not None for name in _tensors[_count_tensors:]):
        return  # which is refused
    given = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    q, k = arguments["q"], arguments["k"]
    compiling = torch.compiler.is_compiling()
    if not compiling and not is_watched(given):
        bare = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        _prepare(*_arrays.values(bare))
        return
    pair = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor)
    same = pair and q is k
    if pair and not same and not compiling:
        first, second = (levels(x)[-1] for x in (q, k))
        same = type(first) in PLAIN and type(second) in PLAIN and first._is_view() and (
            first.untyped_storage()._cdata == second.untyped_storage()._cdata
            and first.storage_offset() == second.storage_offset() and 0 not in (first.numel(), second.numel())
        )  # fmt: skip
    if same:
        raise ValueError("rope: k must not share memory with q, which it overlaps: q is written")
    for name, x in (("q", q), ("k", k)):
        if isinstance(x, torch.Tensor) and any(
            n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)
        ):
            raise ValueError(f"rope: {name} is written, but some of its elements share memory (overlapping strides)")


def _check_for_all(name: str, written: torch.Tensor, new: torch.Tensor) -> None:
    """Refuses one tensor for all calls of vmap, each of which would write it."""
    of = torch._C._functorch
    if torch.compiler.is_compiling():
        return
    if of.is_batchedtensor(new) and of.maybe_get_level(new) not in [of.maybe_get_level(x) for x in levels(written)]:
        raise ValueError(
            f"rope: {name} would be written by each of the calls of vmap, but is one for all: let vmap go over it, too"
        )


def rope_in_place(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The same in place, where what is overwritten is needed no more: without a norm."""
    _check_written(arguments)
    _refuse_tables_and_stores({name: arguments[name] for name in _tensors})
    for name in ("q", "k", "q_weight", "k_weight"):
        x = arguments[name]
        if (arguments["norm"] not in (None, "none") or arguments["q_weight"] is not None) and (
            isinstance(x, torch.Tensor) and requires_grad(x)
        ):
            raise ValueError(
                f"rope: {name} requires grad, and the gradient of a norm needs what would be overwritten here: use "
                f"ropewalk.rope, call it under torch.no_grad(), or give {name}.detach()"
            )
    for name in ("q", "k"):
        x = arguments[name]
        why = why_not_overwritten(x) if isinstance(x, torch.Tensor) else None
        if why is not None:
            requires = "requires grad and " if requires_grad(x) else ""
            raise ValueError(
                f"rope: {name} {requires}is {why}, which autograd lets nobody overwrite: use ropewalk.rope, call it "
                f"under torch.no_grad(), or give {name}.detach()"
            )
    new = rope(arguments)
    for name, rotated in zip(("q", "k"), new, strict=True):
        if rotated is not None:
            _check_for_all(name, arguments[name], rotated)
    for name, rotated in zip(("q", "k"), new, strict=True):
        if rotated is not None:
            arguments[name].copy_(rotated)
    return arguments["q"], arguments["k"]


# What torch knows of us in a graph that it keeps on disk is the names and arguments in the user's own calls: it would
# find the same graph again for other definitions or shapes of ours, those of the gradient above all. So each call in a
# graph says by which ones it was made.
_source = __spec__.loader.get_source(__name__) if hasattr(__spec__.loader, "get_source") else None
_MARK = "#" + hashlib.sha256(
    repr((_module.function("version")(), *_WRITING, _pure_definition, _backward_definition, _source)).encode()
).hexdigest()[:16]  # fmt: skip
_TORCH_VALUES: dict[str, Any] = {
    "tensor": lambda name, value: value,
    "handle": lambda name, value: _MARK if value is None else f"{value._content} {_MARK}",
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
    values = {name: _TORCH_VALUES[kind](name, arguments[name]) for name, kind in _kinds}
    rest = [name for name in _names[_FEW:] if in_place or name not in _OUTPUTS]
    kinds = dict(_kinds)
    if all(
        values[name] is None if kinds[name] == "tensor" else values[name] == _DEFAULTS[kinds[name]] for name in rest
    ):
        operator = torch.ops.ropewalk.rope_short_ if in_place else torch.ops.ropewalk.rope_short_out
        operator(*[values[name] for name in (*_names[:_FEW], *(() if in_place else _OUTPUTS))])
        return
    operator = torch.ops.ropewalk.rope_ if in_place else torch.ops.ropewalk.rope_out
    operator(*values.values())


def _check_output(name: str, written: Any, shape: Any, dtype: Any) -> None:
    if tuple(written.shape) != tuple(shape) or written.dtype != dtype:
        raise ValueError(
            f"rope: {name} must be {list(shape)} {str(dtype).removeprefix('torch.')}, but is {list(written.shape)} "
            f"{str(written.dtype).removeprefix('torch.')}"
        )


def rope_backward(gradients: dict[str, Any], arguments: dict[str, Any]) -> None:
    """`ropewalk.rope_backward` as an operator of torch. All arguments by name."""
    for name, x in {**gradients, **{name: arguments[name] for name in _tensors}}.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"rope: {name} must be a torch.Tensor where torch traces the call, but is a {_arrays._type_name(x)}"
            )
        if name in arguments and name not in _PURE:
            raise ValueError(f"rope: {name} is given, but has no gradient")
        if torch.is_grad_enabled() and requires_grad(x):
            raise ValueError(
                f"rope: {name} requires grad, and autograd does not go through rope_backward: call it under "
                f"torch.no_grad(), or give {name}.detach()"
            )
        if not torch.compiler.is_compiling():
            _refuse_tangent(name, x)
        if x.device.type == "meta":
            raise ValueError(f"rope: {name} must hold data, but is on the meta device")
    q_grad, k_grad = gradients["q_grad"], gradients["k_grad"]
    if arguments["k_store_only"]:
        raise ValueError("rope: k_store_only is given, but has no gradient")
    outputs = [("q_grad", q_grad), ("k_grad", k_grad)]
    for i, (name, grad) in enumerate(outputs):
        out = gradients[f"{name}_out"]
        if out is not None:
            if grad is None:
                raise ValueError(f"rope: {name}_out is given, but {name} is missing")
            _check_output(f"{name}_out", out, grad.shape, grad.dtype)
            outputs[i] = f"{name}_out", out
    for name in ("q_weight_grad", "k_weight_grad"):
        if gradients[name] is not None:
            if arguments[name.removesuffix("_grad")] is None:
                raise ValueError(f"rope: {name} is given, but {name.removesuffix('_grad')} is missing")
            _check_output(name, gradients[name], q_grad.shape[-1:], torch.float32)
        outputs.append((name, gradients[name]))
    new = torch.ops.ropewalk.rope_backward(
        q_grad, k_grad, gradients["q_weight_grad"] is not None, gradients["k_weight_grad"] is not None,
        *[_TORCH_VALUES[kind](name, arguments[name]) for name, kind in _kinds if name in _PURE],
    )  # fmt: skip
    for (name, out), grad in zip(outputs, new, strict=True):
        if out is not None:
            _check_for_all(name, out, grad)
    for (_, out), grad in zip(outputs, new, strict=True):
        if out is not None:
            out.copy_(grad)


# ---------------------------------------------------------------------------------------------------------------------
# Tables in which each pair's entry stands twice


def _copy(table: Any, name: str, neighbours: bool) -> Any:
    half = table.shape[-1] // 2
    first, second = (table[..., 0::2], table[..., 1::2]) if neighbours else (table[..., :half], table[..., half:])
    same = (first == second) | (first != first) & (second != second)
    if table.device.type != "cpu":  # a look would wait for the device
        return torch.where(same, first, float("nan"))
    if not bool(same.all()):
        where = "side by side" if neighbours else "in each half"
        raise ValueError(
            f"{name} must hold the entry of each pair twice, {where}, but the two differ: it belongs to another pairing"
        )
    return first.contiguous() if not first.is_contiguous() else first.clone()


def _copy_shape(table: Any, name: str, neighbours: bool) -> Any:
    return table.new_empty((*table.shape[:-1], table.shape[-1] // 2))


_library.define("one_copy(Tensor table, str name, bool neighbours) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
_library.impl("one_copy", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("ropewalk::one_copy", _copy_shape, lib=_library)
torch.library.register_vmap(
    "ropewalk::one_copy",
    lambda info, in_dims, table, *others: (torch.ops.ropewalk.one_copy(table.movedim(in_dims[0], 0), *others), 0),
    lib=_library,
)
