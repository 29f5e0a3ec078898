"""What the functions of the other modules share: views of the heads, and the one call of `ropewalk.rope_`.

Checked here is only what the description of `rope_` cannot know: the layouts that these functions alone have, and
arguments that they need where `rope_` does not. The rest is refused by `rope_` itself, with the names of the caller.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from .. import Frequencies, _torch, prepare, rope_
from .. import rope as new_rope

_NAMES = {"cos_sin": "cos_sin_cache"}
PARTIAL = {"rotary_dim": "rope_dim"}  # of functions with a rope_dim
FLAT = {"q": "query", "k": "key", "head_dim": "head_size"}  # of those with a head_size
_STORE = ("v", "k_cache", "v_cache", "slots", "k_scale", "v_scale")
BUFFERS = {"v": "value", "k_cache": "k_buffer", "v_cache": "v_buffer", "slots": "cache_loc"}

_MOST_FREQUENCIES = 64
_frequencies: dict[tuple[Any, ...], Frequencies] = {}


def pairing(is_neox: bool) -> str:
    return "neox" if is_neox else "interleaved"


def renamed(function: str, names: Mapping[str, str], error: Exception) -> Exception:
    """The same error with the names that this function's caller knows."""
    names = {**_NAMES, **names}
    text = re.sub(r"^(rope|frequencies): ", "", str(error))
    text = re.sub(r"\b[a-z_]+\b", lambda word: names.get(word.group(), word.group()), text)
    return type(error)(f"{function}: {text}")


def rope(function: str, names: Mapping[str, str], q: Any, k: Any, **options: Any) -> None:
    try:
        rope_(q, k, **options)
    except (ValueError, TypeError) as error:
        raise renamed(function, names, error) from None


def check(function: str, names: Mapping[str, str], q: Any, k: Any, **options: Any) -> None:
    """Refuses what `rope` would refuse; for a call of several passes, before the first of them writes."""
    if torch.compiler.is_compiling():
        return
    try:
        prepare(q, k, **options)
    except (ValueError, TypeError) as error:
        raise renamed(function, names, error) from None


def tensors(function: str, **values: Any) -> None:
    """For what is looked into here, and for what `rope_` could do without."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor, but is a {type(value).__name__}")


def whole(function: str, name: str, value: Any, least: int | None = None) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be an int, but is a {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{function}: {name} must be at least {least}, but is {value}")


def float_cache(function: str, cos_sin_cache: Any) -> None:
    tensors(function, cos_sin_cache=cos_sin_cache)
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(
            f"{function}: cos_sin_cache must be float32, but is {str(cos_sin_cache.dtype).removeprefix('torch.')}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# By a table


def by_table(function: str, cos_sin_cache: Any, positions: Any, is_neox: bool, rope_dim: int = 0) -> dict[str, Any]:
    """The options of `ropewalk.rope_` for a rotation by a table."""
    tensors(function, cos_sin_cache=cos_sin_cache, positions=positions)
    return {"positions": positions, "cos_sin": cos_sin_cache, "pairing": pairing(is_neox),
            "rotary_dim": rope_dim or None}  # fmt: skip


def rotate(function: str, names: Mapping[str, str], q: Any, k: Any, **options: Any) -> None:
    """q and k in place, by the options of `by_table` and others. Those of different dtypes or head sizes take a pass
    each."""
    if one_pass(q, k):
        rope(function, names, q, k, **options)
        return
    store = {name: options.pop(name) for name in _STORE if name in options}
    if store:  # with no heads of q
        for_k, of_k = names, (k.narrow(-2, 0, 0), k)
    else:
        for_k, of_k = {**names, "q": names.get("k", "k")}, (k, None)
    check(function, for_k, *of_k, **options, **store)
    rope(function, names, q, None, **options)
    rope(function, for_k, *of_k, **options, **store)


def heads_apart(function: str, q: Any) -> None:
    tensors(function, q=q)
    if q.dim() != 3:
        raise ValueError(f"{function}: q must be [tokens, heads, head_dim], but is {list(q.shape)}")


def rotate_new(function: str, names: Mapping[str, str], q: Any, k: Any, **options: Any) -> tuple[Any, Any]:
    """As `rotate`, into new tensors; autograd goes through it."""
    tensors(function, **{names.get("q", "q"): q}, **({} if k is None else {names.get("k", "k"): k}))
    if one_pass(q, k):
        return differentiable(function, names, q, k, **options)
    for_k = {**names, "q": names.get("k", "k")}
    return tuple(differentiable(function, called, x, None, **options)[0] for called, x in ((names, q), (for_k, k)))


def one_pass(q: Any, k: Any) -> bool:
    """Whether one call takes both."""
    both = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and k.dim() > 1
    return not both or (q.dtype == k.dtype and q.shape[-1:] == k.shape[-1:])


def rotate_3d(
    function: str,
    q: Any,
    k: Any,
    cos_sin_cache: Any,
    positions: Any,
    is_neox: bool,
    rope_dim: int,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    """As `rotate`, for functions that know no batch."""
    heads_apart(function, q)
    names = {**PARTIAL, **(names or {})}
    rotate(function, names, q, k, **by_table(function, cos_sin_cache, positions, is_neox, rope_dim), **options)


def rotate_flat(
    function: str,
    positions: Any,
    query: Any,
    key: Any,
    head_size: int,
    cos_sin_cache: Any,
    is_neox: bool,
    rope_dim: int = 0,
    buffers: Any = None,
    offsets: Any = None,
    **options: Any,
) -> None:
    """As `rotate`, for query and key as `heads` takes them. `options` go to `ropewalk.rope_` as they are."""
    q, k = heads(function, positions, head_size, query=query, key=key)
    store = {} if buffers is None else stored(function, k, buffers)
    table = by_table(function, cos_sin_cache, positions, is_neox, rope_dim)
    rotate(function, {**FLAT, **BUFFERS}, q, k, offsets=offsets, **table, **store, **options)


def rotate_flat_new(
    function: str, positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool
) -> tuple[Any, Any]:
    """As `rotate_flat`, into new tensors; autograd goes through it."""
    q, k = heads(function, positions, head_size, query=query, key=key)
    new = rotate_new(function, FLAT, q, k, **by_table(function, cos_sin_cache, positions, is_neox))
    return new[0].reshape(query.shape), None if key is None else new[1].reshape(key.shape)


def axes_of(function: str, section: Any, pairs: int, interleaved: bool, device: Any) -> torch.Tensor:
    """[pairs] int32: the axis of each pair. section: pairs of time, height and width. interleaved: they take turns, and
    time has what is left."""
    if not isinstance(section, (list, tuple)) or len(section) != 3:
        raise ValueError(f"{function}: mrope_section must be [time, height, width], but is {section!r:.60}")
    for count in section:
        whole(function, "mrope_section", count, 0)
    if sum(section) != pairs:
        raise ValueError(f"{function}: mrope_section must be {pairs} pairs in all, but is {list(section)}")
    return known_axes(tuple(section), bool(interleaved), str(device))


@functools.cache
def known_axes(section: tuple[int, ...], interleaved: bool, device: str) -> torch.Tensor:
    """As `axes_of`, of a section that is known to fit."""
    axes = [axis for axis, count in enumerate(section) for _ in range(count)]
    if interleaved:
        axes = [i % 3 if i < 3 * section[i % 3] else 0 for i in range(len(axes))]
    return torch.tensor(axes, dtype=torch.int32, device=device)


def slot_of_each(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """slots with -1, not stored, for the tokens behind its last."""
    missing = tokens - slots.shape[0]
    return torch.nn.functional.pad(slots, (0, missing), value=-1) if missing > 0 else slots


def mrope(
    function: str,
    names: Mapping[str, str],
    positions: Any,
    query: Any,
    key: Any,
    head_size: int,
    cos_sin_cache: Any,
    is_neox: bool,
    rotary_dim: int,
    section: Any,
    interleaved: bool = False,
    axis_map: Any = None,
) -> None:
    """Heads in a row, in place, by positions [3, tokens]; axis_map says what section and interleaved say else."""
    tensors(function, positions=positions, cos_sin_cache=cos_sin_cache)
    if positions.dim() != 2 or positions.shape[0] != 3:
        raise ValueError(f"{function}: positions must be [3, tokens], but is {list(positions.shape)}")
    names = {**FLAT, **names}
    q, k = heads(function, positions[0], head_size, **{names["q"]: query, names["k"]: key})
    if axis_map is None:
        axes = axes_of(function, section, cos_sin_cache.shape[-1] // 2, interleaved, cos_sin_cache.device)
    else:
        tensors(function, axis_map=axis_map)
        axes = axis_map.int()
    rope(function, names, q, k, positions=positions, cos_sin=cos_sin_cache, axes=axes,
         pairing=pairing(is_neox), rotary_dim=rotary_dim or None)  # fmt: skip


def rounding_as(query: Any, cos_sin_cache: Any) -> str:
    """The rounding of a kernel that calculates in the dtype of query and table: of each product, not of the sum alone.
    float32 is what is calculated in anyway."""
    both = isinstance(query, torch.Tensor) and isinstance(cos_sin_cache, torch.Tensor)
    return "reference" if both and query.dtype == cos_sin_cache.dtype != torch.float32 else "fused"


def heads(function: str, positions: Any, head_size: int, **tensors_by_name: Any) -> list[Any]:
    """Views [.., heads, head_size] of tensors that have the heads in a row or apart, behind positions' shape or the
    number of positions. None stays None."""
    tensors(function, positions=positions)
    whole(function, "head_size", head_size, 2)
    lead, views = positions.dim(), []
    for name, x in tensors_by_name.items():
        if x is None and name in ("k", "key"):
            views.append(None)
            continue
        tensors(function, **{name: x})
        view = x
        if lead == 2 and x.dim() > 1 and x.shape[:2] != positions.shape and x.shape[0] == positions.numel():
            view = view.unflatten(0, positions.shape)
        if lead in (1, 2) and view.shape[:lead] == positions.shape:
            if view.dim() == lead + 1 and view.shape[-1] % head_size == 0:
                view = view.unflatten(-1, (view.shape[-1] // head_size, head_size))
            if view.dim() == lead + 2 and view.shape[-1] == head_size:
                views.append(view)
                continue
        front = ", ".join(str(n) for n in positions.shape)
        raise ValueError(
            f"{function}: {name} must be [{front}, heads * {head_size}] or [{front}, heads, {head_size}], "
            f"positions' shape in front, but is {list(x.shape)}"
        )
    return views


def stored(function: str, k: Any, argument: Any) -> dict[str, Any]:
    """The KV store's arguments of a FusedSetKVBufferArg, or of any object with such fields."""
    if k is None:
        raise ValueError(f"{function}: key must be given where it is stored, but is None")
    store = flat_store(function, k, argument.value, argument.k_buffer, argument.v_buffer, argument.cache_loc, BUFFERS)
    scales = {name: getattr(argument, name, None) for name in ("k_scale", "v_scale")}
    return {**store, **scales}


def flat_store(
    function: str, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, names: Mapping[str, str]
) -> dict[str, Any]:
    """The KV store's arguments, with the heads of flat rows split."""
    parts = {"v": v, "k_cache": k_cache, "v_cache": v_cache}
    tensors(function, **{names.get(name, name): tensor for name, tensor in {"k": k, **parts}.items()})
    k_heads = k.shape[-2]
    for name, tensor in parts.items():
        if tensor.dim() == 2:
            if k_heads == 0 or tensor.shape[1] % k_heads:
                raise ValueError(
                    f"{function}: {names.get(name, name)} must have rows of {k_heads} heads, "
                    f"but is {list(tensor.shape)}"
                )
            parts[name] = tensor.unflatten(1, (k_heads, tensor.shape[1] // k_heads))
    return {**parts, "slots": slots}


def ragged(indptr: Any, offsets: Any, total: int) -> Any:
    """[total] positions of requests that lie one behind the other: request b has the tokens indptr[b] to
    indptr[b + 1] - 1, and its first one is at offsets[b] (or offsets, if that is a number)."""
    token = torch.arange(total, device=indptr.device, dtype=indptr.dtype)
    request = torch.searchsorted(indptr[1:].contiguous(), token, right=True).clamp_(max=indptr.shape[0] - 2)
    first = offsets[request] if isinstance(offsets, torch.Tensor) else offsets
    return token - indptr[request] + first


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation by the negative angles. The tensors that it goes by are given by themselves, so that
    autograd keeps them, and notices if they have been written before the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Any, inplace: bool, q: Any, k: Any, *others: Any) -> Any:
        function, names, options, of_tensors = call
        options = {**options, **dict(zip(of_tensors, others, strict=True))}
        new = rotated(function, names, options, inplace, q, k)
        return new[0] if k is None else new

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, inplace, q, k, *others = inputs
        # A leaf, or a view that others may see, cannot be marked: what is returned then stands for it from here on.
        if inplace and not any(x is not None and (x._is_view() or x.is_leaf) for x in (q, k)):
            ctx.mark_dirty(*(x for x in (q, k) if x is not None))
        ctx.save_for_backward(*others)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        function, names, options, of_tensors = ctx.call
        dense = [g if g is None or g.stride(-1) == 1 else g.contiguous() for g in gradients]
        options = {**options, "inverse": not options.get("inverse", False)}
        q, k = dense if len(dense) == 2 else (*dense, None)
        new = _Rotation.apply((function, names, options, of_tensors), False, q, k, *ctx.saved_tensors)
        return None, None, *(new if k is not None else (new, None)), *(None for _ in of_tensors)


def rotated(function: str, names: Any, options: dict[str, Any], inplace: bool, q: Any, k: Any) -> tuple[Any, Any]:
    """`rope` into new tensors, or in place; returns what was written."""
    out = (q, k)
    if not inplace:
        out = torch.empty_like(q), None if k is None else torch.empty_like(k)
        options = {**options, "q_out": out[0], "k_out": out[1]}
    rope(function, names, q, k, **options)
    return out


def _in_func() -> bool:
    return not torch.compiler.is_compiling() and _torch.in_func()


def wants_gradient(*values: Any) -> bool:
    return _torch.wants_gradient(values)


def without_gradient(function: str, **tensors_by_name: Any) -> None:
    """Refuses what requires grad, for what autograd would not go through."""
    for name, x in tensors_by_name.items():
        if torch.is_grad_enabled() and _torch.requires_grad(x):
            raise ValueError(
                f"{function}: {name} requires grad, and this function has no gradient: call it under torch.no_grad(), "
                f"or give {name}.detach()"
            )


def _under_func(function: str, names: Any, options: dict[str, Any], q: Any, k: Any) -> tuple[Any, Any]:
    """Into new tensors under a transform of torch.func, which may go over q and not over k."""
    try:
        return new_rope(q, k, **options)
    except (ValueError, TypeError) as error:
        raise renamed(function, names, error) from None


def written(function: str, names: Mapping[str, str], x: Any, new: Any) -> Any:
    """x with what new holds, for autograd, too; what is returned stands for a leaf or a view."""
    if torch.compiler.is_compiling():
        return x.copy_(new)
    try:
        _torch._check_for_all("q", x, new)
    except ValueError as error:
        raise renamed(function, names, error) from None
    if not wants_gradient(x) or not any(level._is_view() or level.is_leaf for level in _torch.levels(x)):
        return x.copy_(new)
    with torch.no_grad():
        x.copy_(new)
    return new


def differentiable(
    function: str,
    names: Mapping[str, str],
    q: Any,
    k: Any,
    inplace: bool = False,
    heads_first: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """As `rope`, without a norm and a store, into new tensors or in place; autograd goes through it. heads_first: q, k
    and what is returned are [batch, heads, tokens, head_dim]."""

    def turned(x: Any) -> Any:
        return x.transpose(1, 2) if heads_first and x is not None else x

    q, k = turned(q), turned(k)
    if _torch.in_func():
        new = _under_func(function, names, options, q, k)
        if inplace:
            new = written(function, names, q, new[0]), new[1]
    elif torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        of_tensors = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
        for name, value in of_tensors.items():
            if value.requires_grad:
                name = names.get(name, name)  # noqa: PLW2901
                raise ValueError(
                    f"{function}: {name} requires grad, and Ropewalk calculates no gradient of tables: give "
                    f"{name}.detach()"
                )
        options = {name: value for name, value in options.items() if name not in of_tensors}
        new = _Rotation.apply((function, names, options, tuple(of_tensors)), inplace, q, k, *of_tensors.values())
        new = (new, None) if k is None else new
    else:
        new = rotated(function, names, options, inplace, q, k)
    return turned(new[0]), turned(new[1])


def of_all_batches(table: Any) -> Any:
    """A table of one batch serves all."""
    return table[0] if table.dim() == 3 and table.shape[0] == 1 else table


_looked_at: set[tuple[Any, ...]] = set()  # kinds of tables on devices


def _check_copies(function: str, name: str, table: Any, first: Any, second: Any, neighbours: bool) -> None:
    """Refuses a table whose two entries of a pair differ, as one of them would be passed over. On a device only the
    first table of each kind is looked at, as that waits for the device; none while a graph is recorded."""
    if table.is_meta:
        return
    if table.device.type != "cpu":
        kind = (function, neighbours, table.device.type, table.dtype, table.shape[-1])
        if kind in _looked_at or (table.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        _looked_at.add(kind)
    first, second = (_torch.levels(x)[-1] for x in (first, second))
    same = torch.equal(first, second) or bool(((first == second) | (first != first) & (second != second)).all())
    if not same:
        where = "side by side" if neighbours else "in each half"
        raise ValueError(
            f"{function}: {name} must hold the entry of each pair twice, {where}, but the two differ: "
            "it belongs to another pairing"
        )


def one_copy(function: str, name: str, table: Any, neighbours: bool = False) -> Any:
    """Each pair's entry, once. Where a graph is made the graph looks, each time that it runs."""
    half = table.shape[-1] // 2
    first, second = (table[..., 0::2], table[..., 1::2]) if neighbours else (table[..., :half], table[..., half:])
    if torch.compiler.is_compiling() or _torch._modes() or type(table) not in _torch.PLAIN:
        if wants_gradient(table) and table.requires_grad:
            return first  # which is refused
        if type(table).__name__ == "DTensor":
            # NaN by ==: torch 2.11 has no sharding rule for !=.
            both_nan = torch.logical_not((first == first) | (second == second))  # noqa: PLR0124
            return torch.where((first == second) | both_nan, first, float("nan"))
        return torch.ops.ropewalk.one_copy(table, f"{function}: {name}", neighbours)
    _check_copies(function, name, table, first, second, neighbours)
    return first


def half_tables(function: str, cos: Any, sin: Any, neighbours: bool = False) -> dict[str, Any]:
    """Of tables as wide as what is rotated, in which each pair's entry stands twice: the first half, or, of pairs of
    neighbours, every second one."""
    tensors(function, cos=cos, sin=sin)
    made = {}
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() not in (2, 3) or table.shape[-1] % 2:
            raise ValueError(
                f"{function}: {name} must be [batch?, tokens, rotary_dim] with an even rotary_dim, "
                f"but is {list(table.shape)}"
            )
        table = of_all_batches(table)
        made[name] = one_copy(function, name, table, neighbours)
    return made


def complex_tables(function: str, name: str, table: Any, real: bool = False) -> dict[str, Any]:
    """cos and sin of complex numbers; of real ones, if those are taken too, what multiplies and nothing."""
    table = of_all_batches(table)
    if not table.is_complex():
        if not real:
            raise ValueError(f"{function}: {name} must be complex, but is {table.dtype}")
        return {"cos": table, "sin": torch.zeros_like(table)}
    if table.dtype == torch.complex128:
        table = table.to(torch.complex64)
    return dict(zip(("cos", "sin"), torch.view_as_real(table.resolve_conj()).unbind(-1), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# With the norm, angles computed


def norm_rope(
    function: str,
    qkv: Any,
    heads_of: tuple[int, int, int],
    head_dim: int,
    eps: float,
    weights: tuple[Any, Any],
    is_neox: bool,
    position_ids: Any,
    rotary_dim: int | None,
    numbers: tuple[float, ...],
    intel: bool = False,
    call: Any = rope,
) -> None:
    """`fused_qk_norm_rope`; numbers: base, factor, low, high, attention_factor. intel: the ramp of the package for
    Intel GPUs."""
    q, k = packed(function, qkv, *heads_of, head_dim)
    tensors(function, position_ids=position_ids)
    frequencies = frequencies_of(function, (head_dim if rotary_dim is None else rotary_dim, *numbers, intel))
    norm_rope_heads(function, {"positions": "position_ids"}, q, k, weights, eps, is_neox, call,
                    positions=position_ids, frequencies=frequencies)  # fmt: skip


def norm_rope_heads(
    function: str,
    names: Mapping[str, str],
    q: Any,
    k: Any,
    weights: tuple[Any, Any],
    eps: float,
    is_neox: bool,
    call: Any = rope,
    **options: Any,
) -> None:
    """The norm and the rotation of heads that `packed` made. names: others than qkv."""
    q_weight, k_weight = weights
    call(function, {"q": "qkv", "k": "qkv", **names}, q, k, norm="rms", q_weight=q_weight,
         k_weight=k_weight if k is not None else None, eps=eps, pairing=pairing(is_neox), **options)  # fmt: skip


def inplace_norm_rope(
    q: Any,
    k: Any,
    q_weight: Any,
    k_weight: Any,
    cos_sin_cache: Any,
    positions: Any,
    is_neox: bool,
    eps: float,
    head_dim: int,
    rope_dim: int,
    round_norm_before_rope: bool = False,
    cache_has_full_width: bool = False,
    *,
    function: str = "fused_inplace_qknorm_rope",
    outputs: tuple[Any, Any] | None = None,
    output_names: Mapping[str, str] | None = None,
    only_check: bool = False,
) -> None:
    """`fused_inplace_qknorm_rope`. outputs: written instead of q and k. only_check: nothing is written, but what would
    serve the call is made ready."""
    tensors(function, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos_sin_cache=cos_sin_cache, positions=positions)
    if head_dim not in (0, q.shape[-1]):
        raise ValueError(f"{function}: head_dim must be 0 or q's last dimension, {q.shape[-1]}, but is {head_dim}")
    if q.dim() == 4 and positions.dim() == 1:
        flat = positions.shape[0] == q.shape[0] * q.shape[1]
        positions = positions.unflatten(0, q.shape[:2]) if flat else positions[None]
    options: dict[str, Any] = {"positions": positions, "pairing": pairing(is_neox), "rotary_dim": rope_dim or None}
    tables: list[dict[str, Any]] = [{"cos_sin": cos_sin_cache}]
    seconds = slice(0)
    if cache_has_full_width:
        width = cos_sin_cache.shape[-1] // 2
        if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] % 4:
            raise ValueError(
                f"{function}: cos_sin_cache must be [rows, 2 * rope_dim] with an even rope_dim, "
                f"but is {list(cos_sin_cache.shape)}"
            )
        cos, sin = cos_sin_cache[:, :width], cos_sin_cache[:, width:]
        firsts = slice(0, width // 2) if is_neox else slice(0, width, 2)
        seconds = slice(width // 2, width) if is_neox else slice(1, width, 2)
        tables = [{"cos": cos[:, part], "sin": sin[:, part]} for part in (firsts, seconds)]
    norm = {"norm": "rms", "q_weight": q_weight, "k_weight": k_weight, "eps": eps}
    names = {**PARTIAL, "cos": "cos_sin_cache", "sin": "cos_sin_cache", **(output_names or {})}
    out = {} if outputs is None else {"q_out": outputs[0], "k_out": outputs[1]}
    steps: list[dict[str, Any]] = []
    if round_norm_before_rope:
        options["rounding"] = "reference"
        steps.append({"q": q, "k": k, "frequencies": still(q.shape[-1]), **norm, **out})
        q, k, out = *(outputs or (q, k)), {}
    else:
        options.update(norm)
    others = None
    if cache_has_full_width:
        # The second elements of the pairs have cosines and sines of their own: they come from a rotation by those.
        others = torch.empty_like(q), torch.empty_like(k)
        steps.append({"q": q, "k": k, "q_out": others[0], "k_out": others[1], **options, **tables[1]})
    steps.append({"q": q, "k": k, **options, **tables[0], **out})
    first = 0 if only_check or outputs else 1  # rope refuses what is wrong with the first itself
    for step in steps[first:] if only_check or round_norm_before_rope else []:
        check(function, names, **step)
    if only_check:
        return
    for step in steps:
        rope(function, names, **step)
    if others:
        for x, other in zip(outputs or (q, k), others, strict=True):
            x[..., seconds] = other[..., seconds]


def packed(function: str, qkv: Any, q_heads: int, k_heads: int, v_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Views [tokens, heads, head_dim] of q and k in packed rows; None for no k."""
    try:
        tokens, width = qkv.shape
        all_heads = q_heads + k_heads + v_heads
        if width == all_heads * head_dim and q_heads >= 0 and k_heads >= 0 and v_heads >= 0 and head_dim > 1:
            rows = qkv.view(tokens, all_heads, head_dim)
            return rows.narrow(1, 0, q_heads), rows.narrow(1, q_heads, k_heads) if k_heads else None
    except (TypeError, ValueError, AttributeError):  # told below
        pass
    tensors(function, qkv=qkv)
    for name, value in (("num_heads_q", q_heads), ("num_heads_k", k_heads), ("num_heads_v", v_heads)):
        whole(function, name, value, 0)
    whole(function, "head_dim", head_dim, 2)
    all_heads = q_heads + k_heads + v_heads
    raise ValueError(
        f"{function}: qkv must be [tokens, {all_heads * head_dim}], that is num_heads_q + num_heads_k + num_heads_v = "
        f"{all_heads} heads of head_dim {head_dim}, but is {list(qkv.shape)}"
    )


def frequencies_of(function: str, key: tuple[Any, ...]) -> Frequencies:
    """The frequencies of `fused_qk_norm_rope`, of the last 64 keys: rotary_dim, its numbers, intel."""
    try:
        return _frequencies[key]
    except (KeyError, TypeError):  # not made yet; or no numbers, which is told below
        return _new_frequencies(function, key)


@torch.compiler.assume_constant_result
def _new_frequencies(function: str, key: tuple[Any, ...]) -> Frequencies:
    rotary_dim, base, factor, low, high, attention_factor, intel = key
    whole(function, "rotary_dim", rotary_dim)
    numbers = {"base": base, "factor": factor, "low": low, "high": high, "attention_factor": attention_factor}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{function}: {name} must be a number, but is a {type(value).__name__}")
        positive = name in ("base", "factor")
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{function}: {name} must be a finite number{' > 0' if positive else ''}, but is {value}")
    try:
        made = Frequencies(theta=base, rotary_dim=rotary_dim)
        if factor != 1.0 or attention_factor != 1.0:
            plain = [float(f) for f in made.inv_freq]
            yarn = plain if factor == 1.0 else _yarn(plain, factor, low, high, intel)
            made = Frequencies.from_array(yarn, attention_scaling=attention_factor)
    except ValueError as error:
        raise renamed(function, {"rope_theta": "base"}, error) from None
    _keep(key, made)
    return made


def _yarn(plain: list[float], factor: float, low: float, high: float, intel: bool) -> list[float]:
    if abs(high - low) <= 1e-6:
        high += 0.001
    out = []
    for i, f in enumerate(plain):
        ramp = min(max(((2 * i if intel else i) - low) / (high - low), 0.0), 1.0)
        interpolated = 1.0 - ramp if intel else ramp
        out.append(f / factor * interpolated + f * (1.0 - interpolated))
    return out


def _keep(key: tuple[Any, ...], made: Frequencies) -> None:
    while len(_frequencies) >= _MOST_FREQUENCIES:  # of calls with ever new numbers; the oldest go
        _frequencies.pop(next(iter(_frequencies)), None)
    _frequencies[key] = made


@torch.compiler.assume_constant_result
def still(head_dim: int) -> Frequencies:
    """The rotation by no angle, which changes nothing."""
    key = ("still", head_dim)
    if key not in _frequencies:
        _keep(key, Frequencies.from_array([0.0] * (head_dim // 2)))
    return _frequencies[key]
