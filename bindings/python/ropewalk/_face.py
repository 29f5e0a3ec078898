"""`rope_` and its keywords. Made by `ropewalk describe --python` from the description of the operation: do not edit."""

# SPDX-License-Identifier: Apache-2.0
# What `type(q) is Tensor` says of q and of the others, no checker follows.
# mypy: disable-error-code="attr-defined,union-attr"
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from . import _call
from ._arrays import SupportsDLPack
from ._call import (
    NORM,
    NOTHING,
    PAIRING,
    PLAIN,
    ROUNDING,
    NumpyArray,
    Tensor,
    dual,
    grad_enabled,
    handle_of,
    increment_version,
    is_compiling,
    launch,
)
from ._frequencies import Frequencies

if TYPE_CHECKING:
    from typing import TypedDict

    class RopeOptions(TypedDict, total=False):
        """The keywords of `rope_`."""

        positions: SupportsDLPack | None
        offsets: SupportsDLPack | None
        frequencies: Frequencies | None
        cos: SupportsDLPack | None
        sin: SupportsDLPack | None
        cos_sin: SupportsDLPack | None
        axes: SupportsDLPack | None
        pairing: Literal["neox", "interleaved"]
        rotary_dim: int | None
        rotary_offset: int
        inverse: bool
        norm: Literal["none", "rms"] | None
        q_weight: SupportsDLPack | None
        k_weight: SupportsDLPack | None
        zero_centered_weight: bool
        eps: float
        rounding: Literal["fused", "reference"]
        q_out: SupportsDLPack | None
        k_out: SupportsDLPack | None
        v: SupportsDLPack | None
        k_cache: SupportsDLPack | None
        v_cache: SupportsDLPack | None
        slots: SupportsDLPack | None
        k_scale: SupportsDLPack | float | None
        v_scale: SupportsDLPack | float | None
        sycl_queue: Any
        disable_pdl: bool
        k_store_only: bool


def _rope(
    q: Any,
    k: Any = None,
    unnamed: Any = NOTHING,
    positions: Any = None,
    offsets: Any = None,
    frequencies: Any = None,
    cos: Any = None,
    sin: Any = None,
    cos_sin: Any = None,
    axes: Any = None,
    pairing: Any = "neox",
    rotary_dim: Any = None,
    rotary_offset: Any = 0,
    inverse: Any = False,
    norm: Any = None,
    q_weight: Any = None,
    k_weight: Any = None,
    zero_centered_weight: Any = False,
    eps: Any = 1e-6,
    rounding: Any = "fused",
    q_out: Any = None,
    k_out: Any = None,
    v: Any = None,
    k_cache: Any = None,
    v_cache: Any = None,
    slots: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    sycl_queue: Any = None,
    disable_pdl: Any = False,
    k_store_only: Any = False,
) -> tuple[Any, Any]:
    if unnamed is not NOTHING:
        raise TypeError("rope_() takes q and k by position and no more: name the others, as in positions=..")
    failure: Exception | None = None
    if not is_compiling():
        new = direct(q, k, positions, offsets, frequencies, cos, sin, cos_sin, axes, pairing, rotary_dim, rotary_offset,
                     inverse, norm, q_weight, k_weight, zero_centered_weight, eps, rounding, q_out, k_out, v, k_cache,
                     v_cache, slots, k_scale, v_scale, sycl_queue, disable_pdl, k_store_only)  # fmt: skip
        if new is not None:
            return new
        try:
            # What requires grad, is lazily negated, of a subclass or not torch's is looked at in detail by _call.
            # Written out: a loop over a list takes twice the time.
            inplace = (
                q_out is k_out is v is k_cache is v_cache is slots is k_scale is v_scale is sycl_queue is None
                and disable_pdl is k_store_only is False
            )
            plain = offsets is cos is sin is cos_sin is axes is q_weight is k_weight is None
            is_torch, q_own, k_own = type(q) is Tensor, 0, 0
            if not is_torch:
                for array in (q, k, q_out, k_out, k_cache, v_cache):  # what is written must be known to be writeable
                    if array is not None and type(array) is not NumpyArray:
                        raise TypeError
            else:
                if (
                    dual._current_level >= 0
                    or (k is not None and type(k) is not Tensor)
                    or (positions is not None and type(positions) is not Tensor)
                ):
                    raise TypeError
                if inplace:  # then the module asks torch about q and k, in less time
                    q_own, k_own = q._cdata, 0 if k is None else k._cdata
                elif q.is_neg() or (k is not None and k.is_neg()):
                    raise TypeError
                if not plain and (
                    (offsets is not None and type(offsets) is not Tensor)
                    or (cos is not None and (type(cos) not in PLAIN or cos.is_neg()))
                    or (sin is not None and (type(sin) not in PLAIN or sin.is_neg()))
                    or (cos_sin is not None and (type(cos_sin) not in PLAIN or cos_sin.is_neg()))
                    or (axes is not None and type(axes) is not Tensor)
                    or (q_weight is not None and (type(q_weight) not in PLAIN or q_weight.is_neg()))
                    or (k_weight is not None and (type(k_weight) not in PLAIN or k_weight.is_neg()))
                ):
                    raise TypeError
                if not inplace and (
                    (q_out is not None and (type(q_out) not in PLAIN or q_out.is_neg()))
                    or (k_out is not None and (type(k_out) not in PLAIN or k_out.is_neg()))
                    or (v is not None and (type(v) not in PLAIN or v.is_neg()))
                    or (k_cache is not None and (type(k_cache) not in PLAIN or k_cache.is_neg()))
                    or (v_cache is not None and (type(v_cache) not in PLAIN or v_cache.is_neg()))
                    or (slots is not None and type(slots) is not Tensor)
                    or (
                        k_scale is not None
                        and type(k_scale) is not float
                        and (type(k_scale) not in PLAIN or k_scale.is_neg())
                    )
                    or (
                        v_scale is not None
                        and type(v_scale) is not float
                        and (type(v_scale) not in PLAIN or v_scale.is_neg())
                    )
                ):
                    raise TypeError
                if not (plain and inplace) and grad_enabled():
                    if not plain and (
                        (cos is not None and cos.requires_grad)
                        or (sin is not None and sin.requires_grad)
                        or (cos_sin is not None and cos_sin.requires_grad)
                        or (q_weight is not None and q_weight.requires_grad)
                        or (k_weight is not None and k_weight.requires_grad)
                    ):
                        raise TypeError
                    if not inplace and (
                        q.requires_grad
                        or (k is not None and k.requires_grad)
                        or (q_out is not None and q_out.requires_grad)
                        or (k_out is not None and k_out.requires_grad)
                        or (v is not None and v.requires_grad)
                        or (k_cache is not None and k_cache.requires_grad)
                        or (v_cache is not None and v_cache.requires_grad)
                        or (k_scale is not None and type(k_scale) is not float and k_scale.requires_grad)
                        or (v_scale is not None and type(v_scale) is not float and v_scale.requires_grad)
                    ):
                        raise TypeError
            handle = None if frequencies is None else handle_of(frequencies)
            if inplace:
                new_q, new_k = q, k
                # What is left out at the end need not be handed over.
                if (
                    rotary_dim is norm is q_weight is k_weight is None
                    and inverse is zero_centered_weight is False
                    and rotary_offset == 0
                    and eps == 1e-6
                    and rounding == "fused"
                ):
                    launch(q_own, k_own, q, k, positions, offsets, handle, cos, sin, cos_sin, axes, PAIRING[pairing])
                else:
                    launch(q_own, k_own, q, k, positions, offsets, handle, cos, sin, cos_sin, axes, PAIRING[pairing],
                           rotary_dim, rotary_offset, inverse, NORM[norm], q_weight, k_weight, zero_centered_weight,
                           eps, ROUNDING[rounding])  # fmt: skip
            else:
                new_q, new_k = q if q_out is None else q_out, None if k_store_only else k if k_out is None else k_out
                launch(q_own, k_own, q, k, positions, offsets, handle, cos, sin, cos_sin, axes, PAIRING[pairing],
                       rotary_dim, rotary_offset, inverse, NORM[norm], q_weight, k_weight, zero_centered_weight, eps,
                       ROUNDING[rounding], q_out, k_out, v, k_cache, v_cache, slots, k_scale, v_scale, sycl_queue,
                       disable_pdl, k_store_only)  # fmt: skip
        except (TypeError, KeyError, AttributeError, BufferError, OverflowError, RuntimeError, ValueError) as error:
            # Nothing was written: once more, more slowly. All but a RuntimeError and a ValueError come from the types
            # of the arguments, and get messages that name the argument.
            failure = error if isinstance(error, (RuntimeError, ValueError)) else None
        else:
            if is_torch and not inplace:
                try:  # autograd is to notice
                    if k_cache is None and v_cache is None:
                        increment_version((new_q,) if new_k is None else (new_q, new_k))
                    else:
                        _call.wrote(new_q, new_k, k_cache, v_cache)
                except RuntimeError:  # tensors of inference mode, which have no version
                    _call.wrote(new_q, new_k)
            return new_q, new_k
    return _call.slow({
        "q": q, "k": k, "positions": positions, "offsets": offsets, "frequencies": frequencies, "cos": cos, "sin": sin,
        "cos_sin": cos_sin, "axes": axes, "pairing": pairing, "rotary_dim": rotary_dim, "rotary_offset": rotary_offset,
        "inverse": inverse, "norm": norm, "q_weight": q_weight, "k_weight": k_weight,
        "zero_centered_weight": zero_centered_weight, "eps": eps, "rounding": rounding, "q_out": q_out, "k_out": k_out,
        "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, "k_scale": k_scale, "v_scale": v_scale,
        "sycl_queue": sycl_queue, "disable_pdl": disable_pdl, "k_store_only": k_store_only,
    }, failure)  # fmt: skip


@_call.served_by(_rope)
def rope_(
    q: SupportsDLPack | None,
    k: SupportsDLPack | None = None,
    *,
    positions: SupportsDLPack | None = None,
    offsets: SupportsDLPack | None = None,
    frequencies: Frequencies | None = None,
    cos: SupportsDLPack | None = None,
    sin: SupportsDLPack | None = None,
    cos_sin: SupportsDLPack | None = None,
    axes: SupportsDLPack | None = None,
    pairing: Literal["neox", "interleaved"] = "neox",
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    inverse: bool = False,
    norm: Literal["none", "rms"] | None = None,
    q_weight: SupportsDLPack | None = None,
    k_weight: SupportsDLPack | None = None,
    zero_centered_weight: bool = False,
    eps: float = 1e-6,
    rounding: Literal["fused", "reference"] = "fused",
    q_out: SupportsDLPack | None = None,
    k_out: SupportsDLPack | None = None,
    v: SupportsDLPack | None = None,
    k_cache: SupportsDLPack | None = None,
    v_cache: SupportsDLPack | None = None,
    slots: SupportsDLPack | None = None,
    k_scale: SupportsDLPack | float | None = None,
    v_scale: SupportsDLPack | float | None = None,
    sycl_queue: Any = None,
    disable_pdl: bool = False,
    k_store_only: bool = False,
) -> tuple[Any, Any]:
    """Rotates q and k in place, optionally normalising each head before and storing k and v in a KV cache after.

    Shapes are written with `batch?` for a dimension that is there if q has four, `axes?` for one that is there if pairs
    are mapped to axes, and `pages?` for one that a flat cache lacks. Any strides will do, but the last dimension of q,
    k, v, the caches, the weights and the outputs must be contiguous; so slices of a packed QKV row and transposed views
    serve without a copy.

    A pair (x, y) of a head becomes (x cos a - y sin a, x sin a + y cos a), where the angle a is the token's position
    times the pair's frequency (Su et al., "RoFormer", 2021, equation 34).

    Args:
        q: [batch?, tokens, q_heads, head_dim] float32, float16 or bfloat16. Rotated in place, unless q_out is given.
        k: [batch?, tokens, k_heads, head_dim] q's dtype. Rotated in place, unless k_out is given or k_store_only.
        positions: [axes?, batch?, tokens] int32 or int64. Of each token: of any sign and size with frequencies, else a
            row of the table. None: 0, 1, 2 and so on.
        offsets: [batch?, tokens] int32 or int64. Added to positions.
        frequencies: A Frequencies: angles are computed, exact at every position. Or a table is given instead: cos and
            sin, or cos_sin.
        cos: [batch?, rows, rotary_dim/2] float32, float16 or bfloat16. Table of cosines, used as it is.
        sin: [batch?, rows, rotary_dim/2] cos's dtype. Table of sines.
        cos_sin: [batch?, rows, rotary_dim] float32, float16 or bfloat16. A table in one, instead of cos and sin:
            cosines, then sines.
        axes: [rotary_dim/2] int32. The row of positions that each pair takes (mrope, 2-D and 3-D rope).
        pairing: Which elements form a pair: i and i + rotary_dim/2 (neox), or 2i and 2i + 1 (interleaved).
        rotary_dim: How many elements of a head are rotated. None (0 in C): as many as frequencies or the table say.
        rotary_offset: Where the rotated part begins in the head.
        inverse: Turn by the negative angles. An attention scaling s multiplies both ways: there and back is s * s * x.
        norm: "rms": before the rotation each head is divided by the root of its mean square + eps (Zhang and Sennrich,
            "Root Mean Square Layer Normalization", 2019). A weight given means rms.
        q_weight: [head_dim] float32, float16 or bfloat16. Multiplies the normalised heads of q.
        k_weight: [head_dim] q_weight's dtype. Multiplies the normalised heads of k.
        zero_centered_weight: Multiply by 1 + weight (Gemma).
        eps: Added to the mean square of the norm.
        rounding: To q's dtype once at the end (fused), or after each operation that rounds in transformers (reference).
        q_out: [batch?, tokens, q_heads, head_dim] q's dtype. Written instead of q.
        k_out: [batch?, tokens, k_heads, head_dim] q's dtype. Written instead of k.
        v: [batch?, tokens, k_heads, v_dim] q's dtype. Only stored in v_cache.
        k_cache: [pages?, page_size, k_heads, head_dim] q's dtype, or fp8. Takes the rotated k; any strides (NHD, HND,
            flat).
        v_cache: [pages?, page_size, k_heads, v_dim] q's dtype, or fp8. Takes v.
        slots: [batch?, tokens] int32 or int64. Where each token goes in the caches: page * page_size + place. Negative:
            not stored.
        k_scale: [k_heads?] float32. A number, or one for each head: an fp8 k_cache holds k / k_scale.
        v_scale: [k_heads?] float32. A number, or one for each head: an fp8 v_cache holds v / v_scale.
        sycl_queue: For tensors in SYCL's unified shared memory (Intel GPUs), the queue to work on: a dpctl.SyclQueue, a
            torch.xpu.Stream or the address of a sycl::queue. None: torch's current one.
        disable_pdl: On NVIDIA GPUs from sm_90 on, do not let the kernel begin before the one before it in the stream
            has ended (programmatic dependent launch); it reads nothing before that in either case.
        k_store_only: k goes to k_cache alone, and its own memory is only read: for callers that read k from the cache.
            8 % fewer bytes at 32/8 heads with a store of k and v, 14 % at 32/32.

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
    raise NotImplementedError("rope_ is served by _rope")


direct, direct_backward, DEFAULTS = _call.direct(rope_)
