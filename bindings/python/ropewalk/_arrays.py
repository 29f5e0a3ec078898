"""From the user's arrays to what the module takes, with messages that name the argument.

The quick way of a call (ropewalk.rope_) hands torch tensors straight to the module. Everything else comes through here.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import operator
import sys
from collections.abc import Container, Mapping
from typing import Any, Protocol, runtime_checkable

import tvm_ffi

from . import _module

torch: Any = sys.modules.get("torch")  # tvm_ffi has imported it if it is installed
numpy: Any = sys.modules.get("numpy")

_set_dtype = _module.function("set_dtype")
# DLPack's code and bits of the dtypes that numpy itself lacks (package ml_dtypes).
_FOREIGN_DTYPES = {"bfloat16": (4, 16), "float8_e4m3fn": (10, 8), "float8_e5m2": (12, 8)}
# Names of choices, to the constants of ropewalk.h; None for the first where that is Python's default.
CHOICES: dict[str, dict[Any, int]] = {
    arg["name"]: ({None: 0} if arg["default"] == "None" else {}) | {name: i for i, name in enumerate(arg["choices"])}
    for arg in _module.description()
    if arg["kind"] == "choice"
}


@runtime_checkable
class SupportsDLPack(Protocol):
    """A tensor: torch's, numpy's, cupy's, jax's, or of another package with DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


# What other projects call the pairings.
_ELSEWHERE = {
    "half": "neox", "split_half": "neox", "rotate_half": "neox", "gpt-neox": "neox", "gpt_neox": "neox",
    "gptj": "interleaved", "gpt-j": "interleaved", "gpt_j": "interleaved", "rotate_every_two": "interleaved",
    "interleave": "interleaved",
}  # fmt: skip


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """As isinstance, which believes an object's __class__."""
    return issubclass(type(value), kind)


def handle_of(frequencies: Any) -> int:
    """The address of the core's object. Of nothing but a Frequencies: any int would be taken for one there."""
    from ._frequencies import Frequencies  # noqa: PLC0415  # which imports this module

    if not issubclass(type(frequencies), Frequencies):  # is_a, without the call
        raise TypeError(f"rope: frequencies must be a ropewalk.Frequencies, but is a {_type_name(frequencies)}")
    return frequencies._handle


def _type_name(value: Any) -> str:
    cls = type(value)
    return cls.__name__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__name__}"


def _shown(value: Any) -> str:
    """A text, a number or a dtype as it is, if it is short; of anything else the type."""
    if is_a(value, str):
        return repr(value[:60])
    if is_a(value, float) or (is_a(value, int) and value.bit_length() <= 128):
        return repr(value)
    if (torch is not None and is_a(value, torch.dtype)) or (numpy is not None and is_a(value, numpy.dtype)):
        return str(value)[:60]
    return f"a {_type_name(value)}"


def known(function: str, options: Any, names: Container[str]) -> dict[str, Any]:
    """The keywords that the function was given, which are all among `names`."""
    for name in options:
        if name not in names:
            raise TypeError(f"{function}() got an unexpected keyword argument {_shown(name)}")
    return options


def integer(name: str, value: Any, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    """An int argument, called `name` in messages: of any integer type."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{name} must be an int, but is a {_type_name(value)}")
    if not low <= whole <= high:
        shown = whole if whole.bit_length() <= 128 else f"one of {whole.bit_length()} bits"
        accepted = "an int of at most 64 bits" if (low, high) == (-(2**63), 2**63 - 1) else f"from {low} to {high}"
        raise ValueError(f"{name} must be {accepted}, but is {shown}")
    return whole


def number(name: str, value: Any) -> float:
    """A float argument, called `name` in messages: of any type of numbers."""
    try:
        if isinstance(value, (str, bytes)) or (numpy is not None and is_a(value, numpy.complexfloating)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, but is a {_type_name(value)}") from None
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, but is larger") from None


def is_number(value: Any) -> bool:
    """Whether it is one of Python's or numpy's own numbers: for arguments that may be a tensor as well."""
    if is_a(value, (int, float)):
        return True
    # numpy counts spans of time among its integers.
    return numpy is not None and is_a(value, (numpy.integer, numpy.floating)) and not is_a(value, numpy.timedelta64)


def _convert_numpy(name: str, value: Any, written: bool) -> Any:
    if written and not value.flags.writeable:
        raise ValueError(f"rope: {name} must be writeable, but is a read-only numpy array")
    dtype = value.dtype
    if not dtype.isnative:
        raise ValueError(f"rope: {name} must be in the machine's byte order, but is {dtype.str[:60]}")
    foreign = _FOREIGN_DTYPES.get(dtype.name)
    if foreign is not None:
        value = value.view("u1" if foreign[1] == 8 else "u2")
    elif dtype.kind not in "biufc":
        raise ValueError(f"rope: {name} must be an array of numbers, but its dtype is {_shown(dtype)}")
    try:
        if value.flags.writeable:
            tensor = tvm_ffi.from_dlpack(value)
        else:  # the old protocol cannot say that it is read-only; numpy >= 2.1 speaks the new one
            try:
                tensor = tvm_ffi.from_dlpack(value.__dlpack__(max_version=(1, 0)))
            except TypeError:
                tensor = tvm_ffi.from_dlpack(value.copy())
    except BufferError as error:
        raise ValueError(f"rope: {name} cannot be taken over, its dtype is {_shown(dtype)}: {error}") from None
    if foreign is not None:
        _set_dtype(tensor, *foreign)
    return tensor


def check_torch(name: str, value: Any) -> None:
    """Refuses tensors whose bytes do not say what their elements are, or whose gradient would be lost."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"rope: {name} requires grad, and autograd does not go through this call: use ropewalk.rope, call it under "
            f"torch.no_grad(), or give {name}.detach()"
        )
    check_plain(name, value)


def check_kind(name: str, value: Any) -> None:
    """Refuses tensors that are no array of numbers."""
    if value.is_nested:
        raise ValueError(
            f"rope: {name} must be one array, but is a nested tensor: give its values, of all sequences one after the "
            "other, and their positions (ropewalk.packed_positions)"
        )
    if value.is_quantized:
        raise ValueError(
            f"rope: {name} must hold numbers, but is quantized ({value.dtype}): give the result of {name}.dequantize()"
        )


def check_plain(name: str, value: Any) -> None:
    """Refuses tensors whose bytes do not say what their elements are."""
    check_kind(name, value)
    if value.layout is not torch.strided:
        raise ValueError(f"rope: {name} must be a strided tensor, but its layout is {value.layout}")
    if value.device.type == "meta":
        raise ValueError(f"rope: {name} must hold data, but is on the meta device")
    if type(value).__name__ == "DTensor":
        raise ValueError(f"rope: {name} must not be a DTensor but in rope and rope_: give {name}.to_local()")
    if value.is_neg():
        raise ValueError(f"rope: {name} is a lazily negated view: call {name}.resolve_neg() first")


def _is_jax(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("jax", "jaxlib")


def _check_jax(name: str, value: Any) -> None:
    """Refuses arrays that have no data yet, and those whose memory is not in one place that a call can write."""
    jax = sys.modules["jax"]
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"rope: {name} is traced by jax (jit, grad, vmap), and has no data: call it outside, on arrays"
        )
    places = sorted({device.platform for device in value.devices()})
    if len(value.devices()) != 1 or places != ["cpu"]:
        raise ValueError(
            f"rope: {name} must be on one CPU device if it is a jax array, but is on {len(value.devices())} of "
            f"{', '.join(places)}: give a torch or cupy array of the same memory (torch.from_dlpack)"
        )


def convert(name: str, value: Any, written: bool) -> Any:
    """A tensor argument, ready for the module. Raises a ValueError or TypeError that names it."""
    if torch is not None and is_a(value, torch.Tensor):
        check_torch(name, value)
        return value
    if numpy is not None and is_a(value, numpy.ndarray):
        return _convert_numpy(name, value, written)
    if not (hasattr(value, "__dlpack__") or isinstance(value, tvm_ffi.Tensor)):
        raise TypeError(
            f"rope: {name} must be a tensor with DLPack (torch, numpy, jax, cupy, ..), but is a {_type_name(value)}"
        )
    if _is_jax(value):
        _check_jax(name, value)
        if written:
            raise ValueError(f"rope: {name} would be written, but jax arrays are immutable: use torch, numpy or cupy")
    try:
        return tvm_ffi.from_dlpack(value)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"rope: {name} cannot be taken over by DLPack: {error}") from None


def values(arguments: Mapping[str, Any], reads: tuple[str, ...] = ()) -> list[Any]:
    """All arguments of the operation by name, checked and in the module's order. Missing ones are None. reads: those
    that this call does not write, though the operation does."""
    out: list[Any] = []
    for arg in _module.description():
        name, kind = arg["name"], arg["kind"]
        value = arguments.get(name)
        if kind == "choice":
            value = choice(name, value) if name in arguments else None
        elif value is None:
            pass
        elif kind == "tensor":
            if arg["host_scalar"] and is_number(value):
                value = number(f"rope: {name}", value)
            else:
                replaced = name in ("q", "k") and arguments.get(f"{name}_out") is not None
                replaced |= name in reads or (name == "k" and bool(arguments.get("k_store_only")))
                value = convert(name, value, written=arg["intent"] != "in" and not replaced)
        elif kind == "handle":
            value = handle_of(value)
        elif kind == "queue":
            value = queue(value)
        elif kind == "float":
            value = number(f"rope: {name}", value)
        elif kind == "int":
            value = integer(f"rope: {name}", value, -(2**31), 2**31 - 1)
        elif numpy is not None and is_a(value, numpy.bool_):
            value = bool(value)
        elif not is_a(value, bool):
            if not is_a(value, int):
                raise TypeError(f"rope: {name} must be a bool, but is a {_type_name(value)}")
            value = integer(f"rope: {name}", value, -(2**31), 2**31 - 1)
        out.append(value)
    return out


def queue(value: Any) -> int | None:
    """The address of the sycl::queue that a queue of dpctl, a stream of torch or an address stands for."""
    if value is None:
        return None
    if is_a(value, int) and not is_a(value, bool):
        return integer("rope: sycl_queue", value)
    if hasattr(value, "addressof_ref"):  # dpctl.SyclQueue
        return integer("rope: sycl_queue", value.addressof_ref())
    address = getattr(value, "sycl_queue", None)  # torch.xpu.Stream; dpctl's arrays and memory
    if address is not None:
        return queue(address)
    raise TypeError(
        "rope: sycl_queue must be a dpctl.SyclQueue, a torch.xpu.Stream or the address of a sycl::queue, "
        f"but is a {_type_name(value)}"
    )


def current_queue(device: int) -> int | None:
    """The address of torch's current queue on that Intel GPU; None if torch uses none here."""
    xpu = getattr(torch, "xpu", None)
    if xpu is None or not xpu.is_initialized():
        return None
    return xpu.current_stream(device).sycl_queue


def choice(name: str, value: Any) -> int:
    """The constant of ropewalk.h for the name of a choice."""
    accepted = CHOICES[name]
    if (value is None or is_a(value, str)) and value in accepted:
        return accepted[value]
    names = " or ".join(repr(key) for key in accepted if key != "none")
    known = _ELSEWHERE.get(value.lower()) if name == "pairing" and is_a(value, str) else None
    hint = f": that is {known!r} here" if known else ""
    kind = ValueError if is_a(value, str) else TypeError
    raise kind(f"rope: {name} must be {names}, but is {_shown(value)}{hint}")


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """A new array of a torch dtype, a numpy dtype or a dtype's name."""
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's default device is
    if numpy is None:
        raise ValueError(f"frequencies: a table of dtype {_shown(dtype)} needs numpy, which is not installed")
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            from ml_dtypes import bfloat16 as dtype  # type: ignore[import-not-found]  # noqa: PLC0415
        except ImportError:
            raise ValueError("frequencies: numpy has no bfloat16: give torch.bfloat16, or install ml_dtypes") from None
    try:
        return numpy.empty(shape, dtype=dtype)
    except TypeError:
        raise TypeError(f"frequencies: dtype must be float32, float16 or bfloat16, but is {_shown(dtype)}") from None


def empty_like(name: str, value: Any) -> Any:
    """A new array like a given one, of its own kind; of numpy's where that is jax's: `as_given` makes it jax's."""
    if torch is not None and is_a(value, torch.Tensor):
        return torch.empty_like(value)
    if numpy is not None and is_a(value, numpy.ndarray):
        return numpy.empty_like(value, subok=False)
    module = sys.modules.get(type(value).__module__.partition(".")[0])
    if module is not None and _is_jax(value) and hasattr(value, "devices"):  # else it only tells of an array
        _check_jax(name, value)
        return sys.modules["numpy"].empty(value.shape, value.dtype)
    if module is not None and hasattr(module, "empty_like"):
        return module.empty_like(value)  # cupy
    raise TypeError(
        f"rope: {name} must be a torch, numpy, jax or cupy array to get a new one like it, but is a {_type_name(value)}"
    )


def as_given(value: Any, array: Any) -> Any:
    """What was written for `value` by way of `empty_like`, as an array of its kind."""
    if array is None or value is array or not _is_jax(value):
        return array
    return sys.modules["jax"].device_put(array, value.sharding)
