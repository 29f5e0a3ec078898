"""SGLang's rotary kernels that are compiled at run time, by their own names and arguments.

Everything works in place on torch tensors, on the CPU and on CUDA. Every error of an argument is a ValueError (a
TypeError where its type is wrong) that names the argument, its value and what is accepted; nothing was written then.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import Frequencies, prepare, rope_

__all__ = [
    "FusedSetKVBufferArg",
    "apply_rope_inplace",
    "apply_rope_inplace_with_kvcache",
    "apply_rope_with_cos_sin_cache_inplace",
    "can_use_fused_qk_norm_rope",
    "fused_inplace_qknorm_rope",
    "fused_qk_norm_rope",
    "rotary_embedding",
]

_MOST_FREQUENCIES = 64
_frequencies: dict[tuple[Any, ...], Frequencies] = {}


@dataclass
class FusedSetKVBufferArg:
    """The KV buffers that a rotation also fills.

    Args:
        value: [tokens, k_heads * v_dim] or [tokens, k_heads, v_dim], like key.
        k_buffer, v_buffer: [slots, k_heads * head_dim] or [slots, k_heads, head_dim]; key's dtype or fp8.
        cache_loc: [tokens] int32 or int64: the slot of each token; negative: not stored.
        k_scale, v_scale: of fp8 buffers, which hold k / k_scale.
    """

    value: torch.Tensor
    k_buffer: torch.Tensor
    v_buffer: torch.Tensor
    cache_loc: torch.Tensor
    k_scale: Any = None
    v_scale: Any = None


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    base: float,
    is_neox: bool,
    position_ids: torch.Tensor,
    factor: float,
    low: float,
    high: float,
    attention_factor: float,
    rotary_dim: int | None = None,
) -> None:
    """RMSNorm of each head of q and k, then the rotation, in place in packed rows. V is left alone.

    The frequency of pair i is f = base^(-2i/rotary_dim). With a factor other than 1 (YaRN: Peng et al., "YaRN", 2023)
    it is (f / factor) * r + f * (1 - r) with r = (i - low) / (high - low) held to [0, 1]; if |high - low| <= 1e-6, high
    is raised by 0.001. The angles are computed exactly at every position.

    Args:
        qkv: [tokens, (num_heads_q + num_heads_k + num_heads_v) * head_dim] bfloat16, float16 or float32; rows at any
            distance.
        head_dim: even.
        eps: of the norm.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).
        position_ids: [tokens] int32 or int64.
        attention_factor: multiplies the rotated elements.
        rotary_dim: the first elements of a head that are rotated; even. None: head_dim.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_qk_norm_rope"
    q, k = _packed(function, qkv, num_heads_q, num_heads_k, num_heads_v, head_dim)
    if position_ids is None:
        raise TypeError(f"{function}: position_ids must be a torch.Tensor, but is None")
    if rotary_dim is None:
        rotary_dim = head_dim
    frequencies = _frequencies_for(function, base, rotary_dim, head_dim, factor, low, high, attention_factor)
    _rope(function, {"positions": "position_ids", "q": "qkv", "k": "qkv"}, q, k, positions=position_ids,
          frequencies=frequencies, pairing=_pairing(is_neox), norm="rms", q_weight=q_weight,
          k_weight=k_weight if k is not None else None, eps=eps)  # fmt: skip


def can_use_fused_qk_norm_rope(
    head_dim: int,
    is_neox: bool,
    dtype: torch.dtype,
    yarn: bool = False,
    *,
    num_heads_q: int = 32,
    num_heads_k: int = 8,
    num_heads_v: int = 8,
    eps: float = 1e-6,
    rotary_dim: int | None = None,
    num_tokens: int | Iterable[int] = 1,
    position_dtype: torch.dtype = torch.int32,
) -> bool:
    """Whether `fused_qk_norm_rope` serves such calls here. Never raises.

    Where there is a CUDA device it compiles and loads the kernel on the current one, so that the first call need not.
    The kernel is specialised for more than the first four arguments say: give the others as the calls will have them,
    and the numbers of tokens of interest, to have that very one built.

    Args:
        yarn: whether attention_factor will be other than 1.

    Returns:
        True if the call would be served.
    """
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention_factor = 2.0 if yarn else 1.0
        if not isinstance(dtype, torch.dtype):
            return False
        for tokens in [num_tokens] if isinstance(num_tokens, int) else num_tokens:
            width = (num_heads_q + num_heads_k + num_heads_v) * head_dim
            qkv = torch.empty((tokens, width), dtype=dtype, device=device)
            q, k = _packed("fused_qk_norm_rope", qkv, num_heads_q, num_heads_k, num_heads_v, head_dim)
            weight = torch.empty(head_dim, dtype=dtype, device=device)
            frequencies = _frequencies_for("fused_qk_norm_rope", 1e4, rotary_dim or head_dim, head_dim, 1.0, 0.0, 1.0,
                                           attention_factor)  # fmt: skip
            prepare(q, k, positions=torch.empty(tokens, dtype=position_dtype, device=device), frequencies=frequencies,
                    pairing=_pairing(is_neox), norm="rms", q_weight=weight,
                    k_weight=weight if k is not None else None, eps=eps)  # fmt: skip
        return True
    except Exception:  # it promises an answer
        return False


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotates q and k in place by a table.

    Args:
        q, k: [tokens, heads, head_dim] bfloat16, float16 or float32, any token and head strides; their dtypes and head
            sizes may differ.
        cos_sin_cache: [rows, rope_dim] float32: cosines, then sines.
        positions: [tokens] int32 or int64, rows of the table.
        is_neox: True: pairs (i, i + rope_dim/2); False: pairs (2i, 2i + 1).
        rope_dim: the first elements of a head that are rotated. 0: what the table says.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_inplace"
    _float_cache(function, cos_sin_cache)
    _rotate(function, q, k, cos_sin_cache, positions, is_neox, rope_dim)


def apply_rope_inplace_with_kvcache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    out_loc: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """As `apply_rope_inplace`; the rotated k and v as it is are also written to rows `out_loc` of the caches.

    Args:
        q, k: [tokens, heads, head_dim], of one dtype and head size.
        v: [tokens, k_heads, v_dim] or [tokens, k_heads * v_dim], k's dtype.
        k_cache: [slots, k_heads * head_dim] or [slots, k_heads, head_dim], k's dtype or fp8; v_cache likewise with
            v_dim.
        out_loc: [tokens] int32 or int64; negative: not stored.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "apply_rope_inplace_with_kvcache"
    _float_cache(function, cos_sin_cache)
    _rotate(function, q, k, cos_sin_cache, positions, is_neox, rope_dim, {"slots": "out_loc"},
            _store(function, k, v, k_cache, v_cache, out_loc, {}))  # fmt: skip


def apply_rope_with_cos_sin_cache_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
    fused_args: Any = None,
) -> None:
    """`apply_rope_inplace`, or `apply_rope_inplace_with_kvcache` if fused_args (a FusedSetKVBufferArg) is given."""
    function = "apply_rope_with_cos_sin_cache_inplace"
    _float_cache(function, cos_sin_cache)
    names, store = ({}, None) if fused_args is None else (_BUFFERS, _buffers(function, k, fused_args))
    _rotate(function, q, k, cos_sin_cache, positions, is_neox, rope_dim, names, store)


def fused_inplace_qknorm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
    round_norm_before_rope: bool = False,
    cache_has_full_width: bool = False,
) -> None:
    """RMSNorm of each head of q and k, then the rotation by a table, in place.

    Args:
        q, k: [tokens, heads, head_dim] or [batch, tokens, heads, head_dim] bfloat16, float16 or float32.
        q_weight, k_weight: [head_dim] bfloat16, float16 or float32, both the same.
        cos_sin_cache: [rows, rope_dim] float32, float16 or bfloat16: cosines, then sines.
        positions: [tokens], [batch, tokens] or [batch * tokens] int32 or int64.
        is_neox: True: pairs (i, i + rope_dim/2); False: pairs (2i, 2i + 1).
        head_dim, rope_dim: 0: what the tensors say.
        round_norm_before_rope: round to q's dtype after the norm too, and, with a table of that dtype, each product;
            costs a second pass.
        cache_has_full_width: cos_sin_cache is [rows, 2 * rope_dim], each cosine and sine there for both elements of
            its pair, as transformers (halves) and diffusers (neighbours) hold them.

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    function = "fused_inplace_qknorm_rope"
    _tensors(function, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos_sin_cache=cos_sin_cache, positions=positions)
    if head_dim not in (0, q.shape[-1]):
        raise ValueError(f"{function}: head_dim must be 0 or q's last dimension, {q.shape[-1]}, but is {head_dim}")
    if cos_sin_cache.dim() != 2:
        raise ValueError(f"{function}: cos_sin_cache must be [rows, rope_dim], but is {list(cos_sin_cache.shape)}")
    if q.dim() == 4 and positions.dim() == 1 and q.shape[0] > 1 and positions.shape[0] == q.shape[0] * q.shape[1]:
        positions = positions.view(q.shape[0], q.shape[1])
    elif q.dim() == 4 and positions.dim() == 1:
        positions = positions[None]
    table: dict[str, Any] = {"cos_sin": cos_sin_cache}
    if cache_has_full_width:
        width = cos_sin_cache.shape[1] // 2
        if cos_sin_cache.shape[1] % 4:
            raise ValueError(
                f"{function}: cos_sin_cache must be [rows, 2 * rope_dim] with an even rope_dim, "
                f"but is {list(cos_sin_cache.shape)}"
            )
        taken = slice(0, width // 2) if is_neox else slice(0, width, 2)
        table = {"cos": cos_sin_cache[:, :width][:, taken], "sin": cos_sin_cache[:, width:][:, taken]}
    options = {"positions": positions, "pairing": _pairing(is_neox), "rotary_dim": rope_dim or None, **table}
    norm = {"norm": "rms", "q_weight": q_weight, "k_weight": k_weight, "eps": eps}
    names = {"cos": "cos_sin_cache", "sin": "cos_sin_cache"}
    if not round_norm_before_rope:
        _rope(function, names, q, k, **options, **norm)
        return
    _check(function, names, q, k, rounding="reference", **options)
    # The norm alone is a rotation by no angle, which changes nothing.
    still = _still(q.shape[-1])
    _rope(function, names, q, k, frequencies=still, **norm)
    _rope(function, names, q, k, rounding="reference", **options)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates query and key in place by a table, and returns them.

    Args:
        positions: [tokens] or [batch, tokens] int32 or int64, rows of the table.
        query, key: [.., heads * head_size] or [.., heads, head_size] with positions' shape in front; key may be None.
        cos_sin_cache: [rows, rotary_dim] float32, float16 or bfloat16: cosines, then sines.
        is_neox: True: pairs (i, i + rotary_dim/2); False: pairs (2i, 2i + 1).

    Raises:
        ValueError: an argument does not fit. Nothing was written.
    """
    _rotate_flat("rotary_embedding", positions, query, key, head_size, cos_sin_cache, is_neox)
    return query, key


# ---------------------------------------------------------------------------------------------------------------------
# What the functions here and in sgl_kernel share.

_NAMES = {"cos_sin": "cos_sin_cache"}
_BUFFERS = {"v": "value", "k_cache": "k_buffer", "v_cache": "v_buffer", "slots": "cache_loc"}


def _pairing(is_neox: bool) -> str:
    return "neox" if is_neox else "interleaved"


def _renamed(function: str, names: Mapping[str, str], error: Exception) -> Exception:
    """The same error with the names that this function's caller knows."""
    names = {**_NAMES, **names}
    text = re.sub(r"^rope: ", f"{function}: ", str(error))
    return type(error)(re.sub(r"\b[a-z_]+\b", lambda word: names.get(word.group(), word.group()), text))


def _rope(function: str, names: Mapping[str, str], q: Any, k: Any, **options: Any) -> None:
    try:
        rope_(q, k, **options)
    except (ValueError, TypeError) as error:
        raise _renamed(function, names, error) from None


def _check(function: str, names: Mapping[str, str], q: Any, k: Any, **options: Any) -> None:
    """Refuses what `_rope` would refuse; for a call of several passes, before the first of them writes."""
    if torch.compiler.is_compiling():
        return
    try:
        prepare(q, k, **options)
    except (ValueError, TypeError) as error:
        raise _renamed(function, names, error) from None


def _tensors(function: str, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor, but is a {type(value).__name__}")


def _whole(function: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be an int, but is a {type(value).__name__}")
    if value < least:
        raise ValueError(f"{function}: {name} must be at least {least}, but is {value}")


def _packed(function: str, qkv: Any, q_heads: int, k_heads: int, v_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Views [tokens, heads, head_dim] of q and k in packed rows; None for no k."""
    try:
        tokens, width = qkv.shape
        heads = q_heads + k_heads + v_heads
        if width == heads * head_dim and q_heads >= 0 and k_heads >= 0 and v_heads >= 0 and head_dim > 1:
            rows = qkv.view(tokens, heads, head_dim)
            return rows.narrow(1, 0, q_heads), rows.narrow(1, q_heads, k_heads) if k_heads else None
    except (TypeError, ValueError, AttributeError):  # told below
        pass
    _tensors(function, qkv=qkv)
    for name, value in (("num_heads_q", q_heads), ("num_heads_k", k_heads), ("num_heads_v", v_heads)):
        _whole(function, name, value, 0)
    _whole(function, "head_dim", head_dim, 2)
    heads = q_heads + k_heads + v_heads
    raise ValueError(
        f"{function}: qkv must be [tokens, {heads * head_dim}], that is num_heads_q + num_heads_k + num_heads_v = "
        f"{heads} heads of head_dim {head_dim}, but is {list(qkv.shape)}"
    )


def _frequencies_for(
    function: str,
    base: float,
    rotary_dim: int,
    head_dim: int,
    factor: float,
    low: float,
    high: float,
    attention_factor: float,
) -> Frequencies:
    key = (base, rotary_dim, factor, low, high, attention_factor)
    try:
        return _frequencies[key]
    except (KeyError, TypeError):  # not made yet; or no numbers, which is told below
        pass
    return _new_frequencies(function, head_dim, *key)


@torch.compiler.assume_constant_result
def _new_frequencies(
    function: str,
    head_dim: int,
    base: float,
    rotary_dim: int,
    factor: float,
    low: float,
    high: float,
    attention_factor: float,
) -> Frequencies:
    _whole(function, "rotary_dim", rotary_dim, 2)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"{function}: rotary_dim must be even and at most head_dim {head_dim}, but is {rotary_dim}")
    numbers = {"base": base, "factor": factor, "low": low, "high": high, "attention_factor": attention_factor}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{function}: {name} must be a number, but is a {type(value).__name__}")
        positive = name in ("base", "factor")
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{function}: {name} must be a finite number{' > 0' if positive else ''}, but is {value}")
    key = (base, rotary_dim, factor, low, high, attention_factor)
    if factor == 1.0 and attention_factor == 1.0:
        made = Frequencies(theta=base, rotary_dim=rotary_dim)
    else:
        if abs(high - low) <= 1e-6:
            high += 0.001
        inv_freq = []
        for i in range(rotary_dim // 2):
            f = float(base) ** (-2.0 * i / rotary_dim)
            if factor != 1.0:
                ramp = min(max((i - low) / (high - low), 0.0), 1.0)
                f = (f / factor) * ramp + f * (1.0 - ramp)
            inv_freq.append(f)
        made = Frequencies.from_array(inv_freq, attention_scaling=attention_factor)
    while len(_frequencies) >= _MOST_FREQUENCIES:  # of calls with ever new numbers; the oldest go
        _frequencies.pop(next(iter(_frequencies)), None)
    _frequencies[key] = made
    return made


@torch.compiler.assume_constant_result
def _still(head_dim: int) -> Frequencies:
    key = ("still", head_dim)
    if key not in _frequencies:
        _frequencies[key] = Frequencies.from_array([0.0] * (head_dim // 2))
    return _frequencies[key]


def _float_cache(function: str, cos_sin_cache: Any) -> None:
    _tensors(function, cos_sin_cache=cos_sin_cache)
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(
            f"{function}: cos_sin_cache must be float32, but is {str(cos_sin_cache.dtype).removeprefix('torch.')}"
        )


def _store(
    function: str, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, names: Mapping[str, str]
) -> dict[str, Any]:
    """The KV store's arguments, with the heads of flat rows split."""
    tensors = {"v": v, "k_cache": k_cache, "v_cache": v_cache}
    _tensors(function, k=k, **{names.get(name, name): tensor for name, tensor in tensors.items()})
    heads = k.shape[-2]
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            if heads == 0 or tensor.shape[1] % heads:
                raise ValueError(
                    f"{function}: {names.get(name, name)} must have rows of {heads} heads, but is {list(tensor.shape)}"
                )
            tensors[name] = tensor.unflatten(1, (heads, tensor.shape[1] // heads))
    return {**tensors, "slots": slots}


def _buffers(function: str, k: Any, argument: Any) -> dict[str, Any]:
    """The KV store's arguments of a FusedSetKVBufferArg, or of any object with such fields."""
    store = _store(function, k, argument.value, argument.k_buffer, argument.v_buffer, argument.cache_loc, _BUFFERS)
    store.update(k_scale=getattr(argument, "k_scale", None), v_scale=getattr(argument, "v_scale", None))
    return store


def _rotate(
    function: str,
    q: Any,
    k: Any,
    cos_sin_cache: Any,
    positions: Any,
    is_neox: bool,
    rope_dim: int,
    names: Mapping[str, str] | None = None,
    store: Mapping[str, Any] | None = None,
) -> None:
    """q and k by a table. Those of different dtypes or head sizes take a pass each."""
    names = {"rotary_dim": "rope_dim", **(names or {})}
    _tensors(function, **{names.get("q", "q"): q, "cos_sin_cache": cos_sin_cache, "positions": positions})
    if k is not None:
        _tensors(function, **{names.get("k", "k"): k})
    options = {
        "positions": positions,
        "cos_sin": cos_sin_cache,
        "pairing": _pairing(is_neox),
        "rotary_dim": rope_dim or None,
    }
    if k is None or (q.dtype == k.dtype and q.shape[-1] == k.shape[-1]):
        _rope(function, names, q, k, **options, **(store or {}))
        return
    if store:
        raise ValueError(
            f"{function}: k must have q's dtype and head size where it is stored, but is {k.dtype} of {k.shape[-1]}, "
            f"and q {q.dtype} of {q.shape[-1]}"
        )
    if k.dim() > 1 and q.dim() > 1 and k.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"{function}: {names.get('k', 'k')} must have q's tokens, but is {list(k.shape)}, and q is {list(q.shape)}"
        )
    for_k = {**names, "q": names.get("k", "k")}
    _check(function, for_k, k, None, **options)
    _rope(function, names, q, None, **options)
    _rope(function, for_k, k, None, **options)


def _rotate_flat(
    function: str,
    positions: Any,
    query: Any,
    key: Any,
    head_size: int,
    cos_sin_cache: Any,
    is_neox: bool,
    buffers: Any = None,
) -> None:
    """As `_rotate`, for [.., heads * head_size] or [.., heads, head_size] behind positions' shape."""
    _tensors(function, positions=positions, query=query, cos_sin_cache=cos_sin_cache)
    _whole(function, "head_size", head_size, 2)
    names: dict[str, str] = {"q": "query", "k": "key", "head_dim": "head_size"}
    heads = [_split(function, name, x, positions, head_size) for name, x in (("query", query), ("key", key))]
    if buffers is not None and key is None:
        raise ValueError(f"{function}: key must be given where it is stored, but is None")
    store = None if buffers is None else _buffers(function, heads[1], buffers)
    _rotate(function, *heads, cos_sin_cache, positions, is_neox, 0, {**names, **_BUFFERS}, store)


def _split(function: str, name: str, x: Any, positions: Any, head_size: int) -> Any:
    if x is None:
        return None
    _tensors(function, **{name: x})
    lead = positions.dim()
    if lead in (1, 2) and x.shape[:lead] == positions.shape:
        if x.dim() == lead + 2 and x.shape[-1] == head_size:
            return x
        if x.dim() == lead + 1 and x.shape[-1] % head_size == 0:
            return x.unflatten(-1, (x.shape[-1] // head_size, head_size))
    front = ", ".join(str(n) for n in positions.shape)
    raise ValueError(
        f"{function}: {name} must be [{front}, heads * {head_size}] or [{front}, heads, {head_size}], "
        f"positions' shape in front, but is {list(x.shape)}"
    )
