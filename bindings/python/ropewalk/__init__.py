"""Ropewalk: rotary position embedding on queries and keys, exact at every position, at the speed of memory.

One operation in three stages: normalise each head (optional), rotate, store (in place, into new tensors, or into a KV
cache). Tensors are anything with DLPack: torch, numpy, cupy; jax arrays on the CPU, which `rope` alone takes.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from . import _arrays, _module
from ._frequencies import Frequencies

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    class RopeOptions(TypedDict, total=False):
        """The keywords of `rope_`."""

        positions: Any
        offsets: Any
        frequencies: Frequencies | None
        cos: Any
        sin: Any
        cos_sin: Any
        axes: Any
        pairing: str
        rotary_dim: int | None
        rotary_offset: int
        inverse: bool
        norm: str | None
        q_weight: Any
        k_weight: Any
        zero_centered_weight: bool
        eps: float
        rounding: str
        q_out: Any
        k_out: Any
        v: Any
        k_cache: Any
        v_cache: Any
        slots: Any
        k_scale: Any
        v_scale: Any
        sycl_queue: Any
        disable_pdl: bool
        k_store_only: bool


__all__ = [
    "Frequencies",
    "backends",
    "can_use",
    "check_faults",
    "counters",
    "explain",
    "force_backend",
    "prepare",
    "rope",
    "rope_",
    "set_threads",
]

__version__: str = _module.function("version")()

_rope = _any_rope = _module.function("rope")
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

# Of nothing but a Frequencies; as quick as the attribute itself.
_handle_of: Any = Frequencies._handle.__get__  # type: ignore[attr-defined]
_PAIRING = _arrays.CHOICES["pairing"]
_NORM = _arrays.CHOICES["norm"]
_ROUNDING = _arrays.CHOICES["rounding"]


class _Absent:
    """Stands for the array type of a package that is not installed."""


_NumpyArray: Any = _Absent if _arrays.numpy is None else _arrays.numpy.ndarray

if _arrays.torch is not None:
    from . import _torch

    _Tensor: Any = _arrays.torch.Tensor
    _PLAIN = _torch.PLAIN
    _is_compiling = _arrays.torch.compiler.is_dynamo_compiling
    _grad_enabled = _arrays.torch.is_grad_enabled
    _increment_version = _torch.increment_version
    _dual = _torch.forward_ad
    _rope = _torch.rope_unwatched
    _use_torch_threads()
else:
    _Tensor = _Absent

    def _is_compiling() -> bool:
        return False


def rope_(
    q: Any,
    k: Any = None,
    *,
    positions: Any = None,
    frequencies: Frequencies | None = None,
    cos: Any = None,
    sin: Any = None,
    cos_sin: Any = None,
    offsets: Any = None,
    pairing: str = "neox",
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    inverse: bool = False,
    axes: Any = None,
    norm: str | None = None,
    q_weight: Any = None,
    k_weight: Any = None,
    zero_centered_weight: bool = False,
    eps: float = 1e-6,
    rounding: str = "fused",
    q_out: Any = None,
    k_out: Any = None,
    v: Any = None,
    k_cache: Any = None,
    v_cache: Any = None,
    slots: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    sycl_queue: Any = None,
    disable_pdl: bool = False,
    k_store_only: bool = False,
) -> tuple[Any, Any]:
    """Rotates q and k in place, optionally normalising each head before and storing k and v in a KV cache after.

    Shapes are written with `batch?` for a dimension that is there if q has four. T is q's dtype: float32, float16 or
    bfloat16. Any strides will do, but the last dimension of q, k, v, the caches, the weights and the outputs must be
    contiguous; so slices of a packed QKV row and transposed views serve without a copy.

    A pair (x, y) of a head becomes (x cos a - y sin a, x sin a + y cos a), where the angle a is the token's position
    times the pair's frequency (Su et al., "RoFormer", 2021, equation 34).

    Args:
        q: [batch?, tokens, q_heads, head_dim] T.
        k: [batch?, tokens, k_heads, head_dim] T, or None.
        positions: [batch?, tokens] int32 or int64; [axes, batch?, tokens] if pairs are mapped to axes. None: 0, 1, 2
            and so on. With `frequencies` any sign and size; with a table a row of it.
        frequencies: a Frequencies: angles are computed, exact at every position. Or a table, used as it is:
        cos, sin: [batch?, rows, rotary_dim/2] float32, float16 or bfloat16, any strides.
        cos_sin: [batch?, rows, rotary_dim], cosines then sines, instead of the two.
        offsets: [batch?, tokens] int32 or int64, added to positions.
        pairing: "neox", pairs (i, i + rotary_dim/2), or "interleaved", pairs (2i, 2i + 1).
        rotary_dim: how many elements of a head are rotated. None: what frequencies or the table say.
        rotary_offset: where the rotated part begins in the head.
        inverse: turn by the negative angles. An attention scaling s multiplies both ways: there and back is s * s * x.
        axes: [rotary_dim/2] int32, the row of positions that each pair takes (mrope, 2-D and 3-D rope).
        norm: None, or "rms": each head is divided by the root of its mean square + eps (Zhang and Sennrich, "Root Mean
            Square Layer Normalization", 2019) before the rotation.
        q_weight, k_weight: [head_dim] float32, float16 or bfloat16; multiply the normalised heads. If given, norm is
            "rms".
        zero_centered_weight: multiply by 1 + weight (Gemma).
        eps: of the norm.
        rounding: "fused" rounds to T once, at the end; "reference" after each operation that rounds in transformers.
        q_out, k_out: like q and k: written instead of them.
        v: [batch?, tokens, k_heads, v_dim] T, only stored.
        k_cache, v_cache: [slots, k_heads, head_dim] or [pages, page_size, k_heads, head_dim] (v_cache: v_dim); T,
            float8_e4m3fn or float8_e5m2; any strides.
        slots: [batch?, tokens] int32 or int64, where each token goes: page * page_size + place. Negative: not stored.
        k_scale, v_scale: a number, or [k_heads] float32: an fp8 cache holds k / k_scale.
        sycl_queue: for tensors in SYCL's unified shared memory (Intel GPUs): the queue to work on, a dpctl.SyclQueue, a
            torch.xpu.Stream or the address of a sycl::queue. None: torch's current one.
        disable_pdl: on NVIDIA GPUs from sm_90 on, do not let the kernel begin before the one before it in the stream
            has ended (programmatic dependent launch); it reads nothing before that in either case.
        k_store_only: k goes to k_cache alone; its own memory is only read. For callers that read k from the cache: 8 %
            fewer bytes at 32/8 heads with a store of k and v, 14 % at 32/32.

    Returns:
        q and k, or what was written instead of them. None for k with k_store_only: k itself is not rotated.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is accepted. Nothing was
            written.
        TypeError: an argument is of the wrong Python type.
        RuntimeError: no backend can serve the call, or a driver failed.

    A position past the table gives NaN in that token, a slot past the cache is not stored; check_faults() tells of
    both.
    """
    failure: Exception | None = None
    if not _is_compiling():
        try:
            inplace = (
                q_out is k_out is v is k_cache is v_cache is slots is k_scale is v_scale is sycl_queue is None
                and disable_pdl is False
                and k_store_only is False
            )
            plain = offsets is axes is cos is sin is cos_sin is q_weight is k_weight is None
            is_torch = type(q) is _Tensor
            if not is_torch:
                for array in (q, k, q_out, k_out, k_cache, v_cache):  # what is written must be known to be writeable
                    if array is not None and type(array) is not _NumpyArray:
                        raise TypeError
            else:
                # What requires grad, is lazily negated, of a subclass or not torch's is looked at in detail below.
                # Written out: a loop over a list takes twice the time.
                if (
                    _dual._current_level >= 0
                    or q.is_neg()
                    or (k is not None and (type(k) is not _Tensor or k.is_neg()))
                    or (positions is not None and type(positions) is not _Tensor)
                ):
                    raise TypeError
                if not plain and (
                    (offsets is not None and type(offsets) is not _Tensor)
                    or (axes is not None and type(axes) is not _Tensor)
                    or (cos is not None and (type(cos) not in _PLAIN or cos.is_neg()))
                    or (sin is not None and (type(sin) not in _PLAIN or sin.is_neg()))
                    or (cos_sin is not None and (type(cos_sin) not in _PLAIN or cos_sin.is_neg()))
                    or (q_weight is not None and (type(q_weight) not in _PLAIN or q_weight.is_neg()))
                    or (k_weight is not None and (type(k_weight) not in _PLAIN or k_weight.is_neg()))
                ):
                    raise TypeError
                if not inplace and (
                    (q_out is not None and (type(q_out) is not _Tensor or q_out.is_neg()))
                    or (k_out is not None and (type(k_out) is not _Tensor or k_out.is_neg()))
                    or (v is not None and (type(v) is not _Tensor or v.is_neg()))
                    or (k_cache is not None and (type(k_cache) not in _PLAIN or k_cache.is_neg()))
                    or (v_cache is not None and (type(v_cache) not in _PLAIN or v_cache.is_neg()))
                    or (slots is not None and type(slots) is not _Tensor)
                    or (
                        k_scale is not None
                        and type(k_scale) is not float
                        and (type(k_scale) is not _Tensor or k_scale.is_neg())
                    )
                    or (
                        v_scale is not None
                        and type(v_scale) is not float
                        and (type(v_scale) is not _Tensor or v_scale.is_neg())
                    )
                ):
                    raise TypeError
                if _grad_enabled() and (
                    q.requires_grad
                    or (k is not None and k.requires_grad)
                    or not plain
                    and (
                        (cos is not None and cos.requires_grad)
                        or (sin is not None and sin.requires_grad)
                        or (cos_sin is not None and cos_sin.requires_grad)
                        or (q_weight is not None and q_weight.requires_grad)
                        or (k_weight is not None and k_weight.requires_grad)
                    )
                    or not inplace
                    and (
                        (q_out is not None and q_out.requires_grad)
                        or (k_out is not None and k_out.requires_grad)
                        or (v is not None and v.requires_grad)
                        or (k_cache is not None and k_cache.requires_grad)
                        or (v_cache is not None and v_cache.requires_grad)
                        or (k_scale is not None and type(k_scale) is not float and k_scale.requires_grad)
                        or (v_scale is not None and type(v_scale) is not float and v_scale.requires_grad)
                    )
                ):
                    raise TypeError
            handle = None if frequencies is None else _handle_of(frequencies)
            if inplace:
                new_q, new_k = q, k
                # What is left out at the end need not be handed over.
                if (
                    norm is q_weight is k_weight is rotary_dim is None
                    and inverse is zero_centered_weight is False
                    and rotary_offset == 0
                    and rounding == "fused"
                    and eps == 1e-6
                ):
                    _rope(q, k, positions, offsets, handle, cos, sin, cos_sin, axes, _PAIRING[pairing])
                else:
                    _rope(q, k, positions, offsets, handle, cos, sin, cos_sin, axes, _PAIRING[pairing], rotary_dim,
                          rotary_offset, inverse, _NORM[norm], q_weight, k_weight, zero_centered_weight, eps,
                          _ROUNDING[rounding])  # fmt: skip
            else:
                new_q, new_k = q if q_out is None else q_out, None if k_store_only else k if k_out is None else k_out
                _rope(q, k, positions, offsets, handle, cos, sin, cos_sin, axes, _PAIRING[pairing], rotary_dim,
                      rotary_offset, inverse, _NORM[norm], q_weight, k_weight, zero_centered_weight, eps,
                      _ROUNDING[rounding], q_out, k_out, v, k_cache, v_cache, slots, k_scale, v_scale, sycl_queue,
                      disable_pdl, k_store_only)  # fmt: skip
        except (TypeError, KeyError, AttributeError, BufferError, OverflowError, RuntimeError, ValueError) as error:
            # Nothing was written: once more, more slowly. All but a RuntimeError and a ValueError come from the types
            # of the arguments, and get messages that name the argument.
            failure = error if isinstance(error, (RuntimeError, ValueError)) else None
        else:
            if is_torch:
                try:  # autograd is to notice
                    if inplace or (k_cache is None and v_cache is None):
                        _increment_version((new_q,) if new_k is None else (new_q, new_k))
                    else:
                        _torch.wrote(new_q, new_k, k_cache, v_cache)
                except RuntimeError:  # tensors of inference mode, which have no version
                    _torch.wrote(new_q, new_k)
            return new_q, new_k
    return _slow_rope_({
        "q": q, "k": k, "positions": positions, "offsets": offsets, "frequencies": frequencies, "cos": cos,
        "sin": sin, "cos_sin": cos_sin, "axes": axes, "pairing": pairing, "rotary_dim": rotary_dim,
        "rotary_offset": rotary_offset, "inverse": inverse, "norm": norm, "q_weight": q_weight,
        "k_weight": k_weight, "zero_centered_weight": zero_centered_weight, "eps": eps, "rounding": rounding,
        "q_out": q_out, "k_out": k_out, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots,
        "k_scale": k_scale, "v_scale": v_scale, "sycl_queue": sycl_queue, "disable_pdl": disable_pdl,
        "k_store_only": k_store_only,
    }, failure)  # fmt: skip


def _slow_rope_(arguments: dict[str, Any], failure: Exception | None) -> tuple[Any, Any]:
    """A call that is compiled, that is no quick one, or that failed before anything was written."""
    watched = _is_compiling() or (_arrays.torch is not None and _torch.is_watched(arguments.values()))
    if watched:
        _torch.rope_(arguments)
    else:
        values = _arrays.values(arguments)  # names what numpy only says to be neither true nor false
        if failure is not None:
            raise failure
        _any_rope(*values)
    q, k, q_out, k_out = (arguments[name] for name in ("q", "k", "q_out", "k_out"))
    new = q if q_out is None else q_out, None if arguments["k_store_only"] else k if k_out is None else k_out
    if _arrays.torch is not None and not watched:
        _torch.wrote(*new, arguments["k_cache"], arguments["v_cache"])
    return new


def rope(q: Any, k: Any = None, **options: Unpack[RopeOptions]) -> tuple[Any, Any]:
    """As `rope_`, but into new tensors: q and k are left as they are. KV caches are written as there.

    Returns:
        The new q and k, like their own (torch, numpy, cupy, or jax on the CPU); None for no k, or with k_store_only.
    """
    q_out = _arrays.empty_like("q", q)
    k_out = None if k is None or options.get("k_store_only") else _arrays.empty_like("k", k)
    new = rope_(q, k, q_out=q_out, k_out=k_out, **options)
    return new if isinstance(q, _Tensor) else (_arrays.as_given(q, new[0]), _arrays.as_given(k, new[1]))


def prepare(q: Any, k: Any = None, **options: Unpack[RopeOptions]) -> None:
    """Makes all that a later `rope_` with such arguments needs (kernels, device copies), so that it neither compiles
    nor allocates and may be captured in a graph. Takes the arguments of `rope_`; reads and writes no tensor's data.
    """
    _prepare(*_arrays.values({"q": q, "k": k, **_known("prepare", options)}))


def can_use(q: Any, k: Any = None, **options: Unpack[RopeOptions]) -> bool:
    """Whether `rope_` would serve such a call here: True if `prepare` succeeds, which it then has. Never raises."""
    try:
        prepare(q, k, **options)
    except Exception:  # it promises an answer
        return False
    return True


def explain(q: Any, k: Any = None, **options: Unpack[RopeOptions]) -> dict[str, str]:
    """Which backend, kernel and source would serve such a call of `rope_`, and why. Writes nothing."""
    return json.loads(_explain(*_arrays.values({"q": q, "k": k, **_known("explain", options)})))


def _known(function: str, options: Any) -> dict[str, Any]:
    names = {arg["name"] for arg in _module.description()}
    for name in options:
        if name not in names:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return dict(options)


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
    if threads is None:
        _set_threads(1)
        if _arrays.torch is None or not _use_torch_threads():
            _default_threads()
        return
    count = _arrays.integer("set_threads: threads", threads)
    _set_threads(count)
    _default_threads()
