"""Ropewalk in place of the rotary embedding of a transformers model.

    with ropewalk.transformers.patch(model):
        model.generate(..)

Each attention layer that calls `apply_rotary_pos_emb` gets a forward of its own, made from the code of its class, in
which that name is Ropewalk's. Nothing that other models share is changed. What the stock function does is found out by
trying it, and every layer is compared with its stock self before the patch is kept, so that an unknown variant is
refused.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import Frequencies, rope, rope_
from ._rotary_module import frequencies_of

_APPLY = "apply_rotary_pos_emb"
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Angles:
    """Stands where the sines were, beside the positions: says with which frequencies to rotate."""

    def __init__(self, frequencies: Frequencies) -> None:
        self.frequencies = frequencies


@dataclass
class _Norm:
    """A per-head RMSNorm that Ropewalk does together with the rotation."""

    module: torch.nn.Module
    eps: float
    zero_centered: bool

    @property
    def weight(self) -> Any:
        return getattr(self.module, "weight", None)


def _halves(table: Any) -> Any:
    return table[..., : table.shape[-1] // 2]


def _evens(table: Any) -> Any:
    return table[..., ::2]


def _whole(table: Any) -> Any:
    return table


def _layout(cos: Any) -> Callable[[Any], Any]:
    """How to take one column a pair from the model's table."""
    half = cos.shape[-1] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):
        return _halves
    return _evens if torch.equal(cos[..., ::2], cos[..., 1::2]) else _whole


class Patch:
    """A patched model. `unpatch()`, or the end of a `with` block, restores it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers = 0  # attention layers that Ropewalk serves
        self.fused_norms = 0  # of these, with the norm of q and k fused in
        self._patched: list[torch.nn.Module] = []

    def unpatch(self) -> None:
        """Restores the model."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._patched.clear()

    def _set(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        module.__dict__["forward"] = forward
        self._patched.append(module)

    def _unset(self, *modules: torch.nn.Module) -> None:
        for module in modules:
            module.__dict__.pop("forward", None)
            self._patched = [m for m in self._patched if m is not module]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.unpatch()


def patch(model: torch.nn.Module, *, angles: str = "exact", rounding: str = "fused", fuse_norm: bool = True) -> Patch:
    """Puts Ropewalk in place of a model's rotary embedding.

    It serves calls without gradients (`torch.no_grad`, `torch.inference_mode`, `generate`); others go the stock way, as
    Ropewalk has no backward. q and k are rotated in place, in the outputs of their projections. Undo the patch before
    copying the model.

    Args:
        model: a transformers model whose attention calls `apply_rotary_pos_emb` (Llama, Mistral, Qwen3, Gemma 3, ..).
        angles: "exact" computes the angles from the frequencies of the model's configuration, exact at every position;
            where the model turns by others, from the model's own, and a warning says so. "table" uses the model's own
            cosines and sines, for parity.
        rounding: as in `ropewalk.rope_`.
        fuse_norm: do the per-head RMSNorm of q and k in the same pass where the model has one.

    Returns:
        A Patch, also a context manager.

    Raises:
        ValueError: the model has no such attention, is patched already, or does something with the rotary embedding
            that Ropewalk does not know. The model is then as it was.
    """
    if angles not in ("exact", "table"):
        raise ValueError(f"patch: angles must be 'exact' or 'table', but is {angles!r}")
    result = Patch(model)
    attentions = [m for m in model.modules() if _APPLY in _names(m)]
    if not attentions:
        raise ValueError(f"patch: no layer of {type(model).__name__} calls {_APPLY}")
    for module in model.modules():
        if "forward" in module.__dict__ and (module in attentions or _is_rotary(module)):
            raise ValueError(f"patch: {type(module).__name__} is patched already, by Ropewalk or by others")
    try:
        with torch.no_grad():
            for rotary in [m for m in model.modules() if _is_rotary(m)]:
                served = [m for m in attentions if getattr(m, "config", None) is rotary.config]
                if served:
                    _patch_rotary(result, rotary, served, angles, rounding, fuse_norm)
        unserved = [m for m in attentions if m not in result._patched]
        if unserved:
            raise ValueError(f"patch: no rotary embedding found for {type(unserved[0]).__name__}")
    except BaseException:
        result.unpatch()
        raise
    return result


def _names(module: torch.nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code else ()


def _is_rotary(module: torch.nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RotaryEmbedding")
        and hasattr(module, "config")
        and "position_ids" in inspect.signature(type(module).forward).parameters
    )


def _layer_type(rotary: Any, attention: Any) -> str | None:
    """The key of nested rope_parameters that a layer takes; None if there is one rule for all."""
    parameters = getattr(rotary.config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in parameters.values()):
        return None
    kind = getattr(attention, "layer_type", None)
    return kind if kind is not None else rotary.config.layer_types[attention.layer_idx]


class _Rotary:
    """The frequencies of one rotary module, by layer type and, where the rule depends on it, by length."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.config = module.config
        self.stock = module.forward  # bound to the module, of its class
        self.takes_layer_type = "layer_type" in inspect.signature(type(module).forward).parameters
        self.cache: dict[Any, _Angles] = {}
        self.own: dict[str | None, Frequencies | None] = {}  # by layer type, where they are not the configuration's

    def _rule(self, layer_type: str | None) -> dict[str, Any]:
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return (parameters.get(layer_type) or {}) if layer_type else parameters

    def _key(self, layer_type: str | None, position_ids: Any) -> tuple[Any, ...]:
        """Layer type, and the length to ask for: 0 where it does not matter."""
        rule = self._rule(layer_type)
        kind = rule.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            return layer_type, 0
        length = int(position_ids.max()) + 1
        longest = self.config.max_position_embeddings
        original = rule.get("original_max_position_embeddings") or longest
        if kind == "longrope":
            return layer_type, max(longest, original + 1) if length > original else 0
        return layer_type, length if length > longest else 0

    def angles(self, layer_type: str | None, position_ids: Any) -> _Angles:
        key = self._key(layer_type, position_ids)
        found = self.cache.get(key)
        if found is None:
            if len(self.cache) > 64:
                self.cache.clear()
            own = self.own.get(layer_type)
            found = _Angles(own or Frequencies.from_config(self.config, layer_type, key[1] or None))
            self.cache[key] = found
        return found

    def check(self, layer_type: str | None) -> None:
        """Compares our angles with the module's, and takes its own frequencies where they differ."""
        if layer_type in self.own:
            return
        device = next((buffer.device for buffer in self.module.buffers()), None)

        def tables(positions: Any) -> tuple[Any, Any]:
            positions = positions.to(device)
            tables = self.call_stock(torch.zeros(1, dtype=torch.float32, device=device), positions, layer_type)
            cos, sin = (table.reshape(-1, *table.shape[-2:])[0] for table in tables)
            take = _layout(cos)
            return take(cos), take(sin)

        changes = self._rule(layer_type).get("rope_type", "default") in ("dynamic", "longrope")
        self.own[layer_type] = frequencies_of(self.module, layer_type, tables, changes)

    def forward(self, x: Any, position_ids: Any = None, layer_type: str | None = None) -> tuple[Any, Any]:
        if torch.is_grad_enabled():
            return self.call_stock(x, position_ids, layer_type)
        return position_ids, self.angles(layer_type, position_ids)

    def call_stock(self, x: Any, position_ids: Any, layer_type: str | None) -> tuple[Any, Any]:
        if self.takes_layer_type:
            return self.stock(x, position_ids, layer_type)
        return self.stock(x, position_ids)


def _patch_rotary(
    result: Patch, module: Any, attentions: list[Any], angles: str, rounding: str, fuse_norm: bool
) -> None:
    rotary = _Rotary(module)
    if angles == "exact":
        for other in result.model.modules():
            code = getattr(inspect.unwrap(type(other).forward), "__code__", None)
            if code and "position_embeddings" in code.co_varnames and "cos" in code.co_varnames:
                if getattr(other, "config", None) is rotary.config and other not in attentions:
                    raise ValueError(f"patch: {type(other).__name__} uses the cosines and sines in an unknown way")
    for attention in attentions:
        _patch_attention(result, rotary, attention, angles, rounding, fuse_norm)
    if angles == "exact":
        result._set(module, rotary.forward)


def _patch_attention(
    result: Patch, rotary: _Rotary, attention: Any, angles: str, rounding: str, fuse_norm: bool
) -> None:
    name = type(attention).__name__
    weight = next(attention.parameters())
    positions = torch.arange(3, 9, device=weight.device)[None]
    hidden = torch.randn(
        (1, 6, rotary.config.hidden_size), generator=torch.Generator().manual_seed(7), dtype=torch.float32
    ).to(weight)
    layer_type = _layer_type(rotary, attention)
    stock_tables = rotary.call_stock(hidden, positions, layer_type)
    if angles == "exact":
        rotary.check(layer_type)
    ours = (positions, rotary.angles(layer_type, positions)) if angles == "exact" else stock_tables

    stock_function = inspect.unwrap(type(attention).forward)
    stock_apply = stock_function.__globals__[_APPLY]
    take, pairing = _find_pairing(name, attention, stock_apply, stock_tables)
    want = _try(name, attention, hidden, stock_tables)
    tolerance = _TOLERANCE.get(weight.dtype, 1e-4)

    norms = _find_norms(attention) if fuse_norm else None
    for fused in (norms, None) if norms else (None,):
        apply = _make_apply(stock_apply, take, pairing, rounding, fused)
        function = types.FunctionType(
            stock_function.__code__,
            {**stock_function.__globals__, _APPLY: apply},
            stock_function.__name__,
            stock_function.__defaults__,
            stock_function.__closure__,
        )
        function.__kwdefaults__ = stock_function.__kwdefaults__
        result._set(attention, types.MethodType(function, attention))
        for norm in fused or ():
            result._set(norm.module, _identity)
        got = _try(name, attention, hidden, ours)
        if (got - want).abs().max() <= tolerance * want.abs().max():
            result.layers += 1
            result.fused_norms += fused is not None
            return
        result._unset(attention, *(norm.module for norm in fused or ()))
    raise ValueError(f"patch: with Ropewalk {name} gives another result than with its own {_APPLY}")


def _identity(x: Any) -> Any:
    return x


def _try(name: str, attention: Any, hidden: Any, position_embeddings: tuple[Any, Any]) -> Any:
    """The output of one layer for a given input."""
    arguments = {"hidden_states": hidden, "position_embeddings": position_embeddings, "attention_mask": None}
    for parameter in inspect.signature(type(attention).forward).parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and parameter.name not in (*arguments, "self"):
            raise ValueError(f"patch: {name}.forward needs {parameter.name}, which Ropewalk does not know")
    training = attention.training
    attention.eval()
    try:
        output = attention(**arguments)
    finally:
        attention.train(training)
    return (output[0] if isinstance(output, tuple) else output).float()


def _find_pairing(name: str, attention: Any, stock_apply: Any, tables: tuple[Any, Any]) -> tuple[Any, str]:
    """What the model's function does, found out by trying it."""
    known = list(inspect.signature(stock_apply).parameters)[:4] == ["q", "k", "cos", "sin"]
    cos, sin = (table.float() for table in tables)
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if known and head_dim and cos.dim() == 3:
        take = _layout(cos)
        width = 2 * take(cos).shape[-1]
        # Some layers hand over whole heads, others only the rotated part.
        for dim in (head_dim, width) if width < head_dim else (head_dim,):
            generator = torch.Generator().manual_seed(7)
            q, k = (torch.randn((1, 2, cos.shape[1], dim), generator=generator).to(cos) for _ in range(2))
            try:
                want = stock_apply(q, k, cos, sin)
            except RuntimeError:  # the sizes do not go together
                continue
            for pairing in ("neox", "interleaved") if width <= dim else ():
                got = rope(q.transpose(1, 2), k.transpose(1, 2), cos=take(cos), sin=take(sin), pairing=pairing)
                if all(torch.allclose(x.transpose(1, 2), y, atol=1e-5) for x, y in zip(got, want, strict=True)):
                    return take, pairing
    raise ValueError(f"patch: the {_APPLY} of {name} does something that Ropewalk does not know")


def _find_norms(attention: Any) -> tuple[_Norm, _Norm] | None:
    """The norms of q and k, if they are RMSNorms of one head each that come before the rotation."""
    names = _names(attention)
    if not all(name in names and names.index(name) < names.index(_APPLY) for name in ("q_norm", "k_norm")):
        return None
    head_dim = getattr(attention, "head_dim", None)
    q_norm, k_norm = (_find_norm(getattr(attention, name, None), head_dim) for name in ("q_norm", "k_norm"))
    if q_norm is None or k_norm is None or q_norm.zero_centered != k_norm.zero_centered or q_norm.eps != k_norm.eps:
        return None
    if (q_norm.weight is None) != (k_norm.weight is None) or q_norm.module is k_norm.module:
        return None
    return q_norm, k_norm


def _find_norm(module: Any, head_dim: int | None) -> _Norm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if head_dim is None or not isinstance(eps, float) or "forward" in module.__dict__:
        return None
    if getattr(module, "bias", None) is not None or (weight is not None and weight.shape != (head_dim,)):
        return None
    like = weight if weight is not None else torch.empty(0)
    x = torch.randn((2, 3, head_dim), generator=torch.Generator().manual_seed(7)).to(like)
    try:
        want = module(x).float()
    except Exception:  # an unknown norm: left as it is
        return None
    plain = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    for zero_centered in (False, True):
        factor = 1.0 if weight is None else weight.float() + zero_centered
        if torch.allclose(plain * factor, want, atol=0.0, rtol=_TOLERANCE.get(x.dtype, 1e-4)):
            return _Norm(module, eps, zero_centered and weight is not None)
    return None


def _make_apply(
    stock_apply: Any, take: Callable[[Any], Any], pairing: str, rounding: str, norms: tuple[_Norm, _Norm] | None
) -> Callable[..., tuple[Any, Any]]:
    """The function that a layer finds under the name of transformers' own."""
    options: dict[str, Any] = {"pairing": pairing, "rounding": rounding}
    if norms:
        options.update(norm="rms", eps=norms[0].eps, zero_centered_weight=norms[0].zero_centered)

    def apply(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
        if torch.is_grad_enabled():
            if norms:  # of their classes: the instances' are passed by
                q, k = (type(norm.module).forward(norm.module, x) for norm, x in zip(norms, (q, k), strict=True))
            return stock_apply(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        more = {"q_weight": norms[0].weight, "k_weight": norms[1].weight} if norms else {}
        tokens_first = (q, k) if unsqueeze_dim == 2 else (q.transpose(1, 2), k.transpose(1, 2))
        if isinstance(sin, _Angles):
            rope_(*tokens_first, positions=cos, frequencies=sin.frequencies, **options, **more)
        else:
            rope_(*tokens_first, cos=take(cos), sin=take(sin), **options, **more)
        return q, k

    return apply
