"""Ropewalk in place of the rotary embedding of a transformers model.

    with ropewalk.transformers.patch(model):
        model.generate(..)

Each attention layer that calls `apply_rotary_pos_emb` becomes one of a class of its own, whose forward is made from the
code of the layer's class, with Ropewalk's function under that name. What it needs to know lies in the layer itself, so
that copies and pickles are patched, too, and go by their own weights. Nothing that other models share is changed. What
the stock function does is found out by trying it, and every layer is compared with its stock self before the patch is
kept, so that an unknown variant is refused.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import Frequencies, rope
from ._arrays import _shown
from ._patched_module import (
    APPLY,
    STATE,
    TABLES,
    Angles,
    Norm,
    Plan,
    call_rotary,
    evens,
    halves,
    put,
    take_off,
    whole,
)
from ._rotary_module import frequencies_of

__all__ = ["Patch", "patch", "use_kernels"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _layout(cos: Any) -> Callable[[Any], Any]:
    """How to take one column a pair from the model's table."""
    half = cos.shape[-1] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):
        return halves
    return evens if torch.equal(cos[..., ::2], cos[..., 1::2]) else whole


class Patch:
    """A patched model. `unpatch()`, or the end of a `with` block, restores it. A copy of a patched model is patched,
    too: `Patch(copy).unpatch()` restores that."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers = 0  # attention layers that Ropewalk serves
        self.fused_norms = 0  # of these, with the norm of q and k fused in
        self.skipped: dict[str, str] = {}  # classes of layers that rotate and were left alone, with the reason
        self._patched = [module for module in model.modules() if STATE in module.__dict__]

    def __repr__(self) -> str:
        norms = f", {self.fused_norms} with the norm" if self.fused_norms else ""
        state = f"{self.layers} layers of it by Ropewalk{norms}" if self._patched else "as it was"
        return f"<ropewalk.transformers.Patch of {type(self.model).__name__}: {state}>"

    def unpatch(self) -> None:
        """Restores the model. What others have wrapped round its layers since stays, and calls what it was."""
        self._unset(*self._patched)

    def _set(self, module: torch.nn.Module, kind: str, state: Any) -> None:
        put(module, kind, state)
        self._patched.append(module)

    def _unset(self, *modules: torch.nn.Module) -> None:
        for module in modules:
            take_off(module)
        self._patched = [m for m in self._patched if STATE in m.__dict__]

    def _count(self, model: torch.nn.Module, refusals: dict[str, ValueError]) -> None:
        attentions = [m for m in model.modules() if APPLY in _names(m) and STATE in m.__dict__]
        self.layers = len(attentions)
        self.fused_norms = sum(m.__dict__[STATE].fuses_norm for m in attentions)
        self.skipped = {name: str(error).removeprefix("patch: ") for name, error in refusals.items()}
        for module in model.modules():
            other = None if STATE in module.__dict__ else _other_rotation(module)
            if other:
                self.skipped.setdefault(type(module).__name__, f"calls {other}, which Ropewalk does not serve here")

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.unpatch()


def patch(model: torch.nn.Module, *, angles: str = "exact", rounding: str = "fused", fuse_norm: bool = True) -> Patch:
    """Puts Ropewalk in place of a model's rotary embedding.

    It serves calls without gradients (`torch.no_grad`, `torch.inference_mode`, `generate`); others go the stock way, as
    Ropewalk has no backward. q and k are rotated in place, in the outputs of their projections. A copy of the model, by
    `copy.deepcopy`, `pickle` or `torch.save`, is patched, too.

    Args:
        model: a transformers model whose attention calls `apply_rotary_pos_emb` (Llama, Mistral, Qwen3, Gemma 3, ..).
        angles: "exact" computes the angles from the frequencies of the model's configuration, exact at every position;
            where the model turns by others, from the model's own, and a warning says so. "table" uses the model's own
            cosines and sines, for parity.
        rounding: as in `ropewalk.rope_`.
        fuse_norm: do the per-head RMSNorm of q and k in the same pass where the model has one.

    Returns:
        A Patch, also a context manager. Its `skipped` names the layers that rotate and were left as they are, with the
        reason: a vision tower beside a text model that is served, for example.

    Raises:
        ValueError: the model has no such attention, is patched already, is spread over devices, or all that rotates in
            it does something that Ropewalk does not know. The model is then as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"patch: model must be a transformers model (a torch.nn.Module), but is a {type(model).__name__}"
        )
    if angles not in ("exact", "table"):
        raise ValueError(f"patch: angles must be 'exact' or 'table', but is {_shown(angles)}")
    result = Patch(model)
    attentions = [m for m in model.modules() if APPLY in _names(m)]
    if not attentions:
        raise ValueError(f"patch: no layer of {type(model).__name__} calls {APPLY}")
    rotaries = [m for m in model.modules() if _is_rotary(m)]
    for module in (*attentions, *rotaries):
        _check_forward(module)
    _check_devices(model, (*attentions, *rotaries))
    refusals: dict[str, ValueError] = {}
    try:
        with torch.no_grad():
            for rotary in rotaries:
                served = [m for m in attentions if getattr(m, "config", None) is rotary.config]
                try:
                    if served:
                        _patch_rotary(result, rotary, served, angles, rounding, fuse_norm)
                except ValueError as error:
                    # All layers of a configuration or none: they hand the same tables round.
                    alike = [m for m in rotaries if m.config is rotary.config]
                    result._unset(*(each for m in (*served, *alike) for each in m.modules()))
                    refusals.update({type(m).__name__: error for m in served})
        for name in {type(m).__name__ for m in attentions if STATE not in m.__dict__} - refusals.keys():
            refusals[name] = ValueError(f"patch: no rotary embedding found for {name}")
        if not any(STATE in m.__dict__ for m in attentions):
            raise next(iter(refusals.values()))
    except BaseException:
        result.unpatch()
        raise
    result._count(model, refusals)
    return result


def _other_rotation(module: Any) -> str | None:
    """The name of a rotation that the module calls and that is not the one that is served."""
    names = (name for name in _names(module) if name.startswith(("apply_rotary", "apply_multimodal_rotary")))
    return next((name for name in names if name != APPLY), None)


def _check_forward(module: Any) -> None:
    """Refuses a module whose forward Ropewalk's could not take the place of."""
    name, cls = type(module).__name__, type(module)
    if STATE in module.__dict__:
        raise ValueError(f"patch: {name} is patched already, by Ropewalk")
    inner = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if inner is not None and getattr(inner, "__func__", None) is not cls.forward:
        theirs = getattr(inner, "__qualname__", type(inner).__name__)
        raise ValueError(
            f"patch: {name} is patched already, by others: its forward is {theirs}. Call ropewalk.transformers.patch "
            "before what put that there"
        )


def _check_devices(model: Any, modules: Any) -> None:
    devices = {str(x.device): None for m in modules for x in (*m.parameters(), *m.buffers())}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"patch: {type(model).__name__} is spread over devices or offloaded, {', '.join(devices)}: each layer is "
            "tried where it lies, so call ropewalk.transformers.patch before dispatching the model"
        )


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

    def __init__(self, config: Any) -> None:
        self.config = config
        self.cache: dict[Any, Frequencies] = {}
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

    def frequencies(self, layer_type: str | None, position_ids: Any) -> Frequencies:
        key = self._key(layer_type, position_ids)
        found = self.cache.get(key)
        if found is None:
            if len(self.cache) > 64:
                self.cache.clear()
            own = self.own.get(layer_type)
            found = own or Frequencies.from_config(self.config, layer_type, key[1] or None)
            self.cache[key] = found
        return found

    def check(self, module: Any, layer_type: str | None) -> None:
        """Compares our angles with the module's, and takes its own frequencies where they differ."""
        if layer_type in self.own:
            return
        device = next((buffer.device for buffer in module.buffers()), None)

        def tables(positions: Any) -> tuple[Any, Any]:
            x = torch.zeros(1, dtype=torch.float32, device=device)
            tables = call_rotary(type(module), module, x, positions.to(device), layer_type)
            cos, sin = (table.reshape(-1, *table.shape[-2:])[0] for table in tables)
            take = _layout(cos)
            return take(cos), take(sin)

        changes = self._rule(layer_type).get("rope_type", "default") in ("dynamic", "longrope")
        self.own[layer_type] = frequencies_of(module, layer_type, tables, changes)


def _patch_rotary(
    result: Patch, module: Any, attentions: list[Any], angles: str, rounding: str, fuse_norm: bool
) -> None:
    rotary = _Rotary(module.config)
    if angles == "exact":
        for other in result.model.modules():
            code = getattr(inspect.unwrap(type(other).forward), "__code__", None)
            if code and TABLES in code.co_varnames and "cos" in code.co_varnames:
                if getattr(other, "config", None) is rotary.config and other not in attentions:
                    raise ValueError(f"patch: {type(other).__name__} uses the cosines and sines in an unknown way")
    plans: dict[Any, Plan] = {}
    for attention in attentions:
        _patch_attention(result, plans, module, rotary, attention, angles, rounding, fuse_norm)
    if angles == "exact":
        result._set(module, "rotary", rotary)


def _patch_attention(
    result: Patch, plans: dict[Any, Plan], module: Any, rotary: _Rotary, attention: Any, angles: str, rounding: str,
    fuse_norm: bool,
) -> None:  # fmt: skip
    base = type(attention)
    name = base.__name__
    if TABLES not in inspect.signature(base.forward).parameters:
        raise ValueError(f"patch: {name} is not handed cosines and sines ({TABLES}), which Ropewalk does not know")
    weight = _plain_weight(result.model, attention)
    positions = torch.arange(3, 9, device=weight.device)[None]
    hidden = torch.randn(
        (1, 6, rotary.config.hidden_size), generator=torch.Generator().manual_seed(7), dtype=torch.float32
    ).to(weight)
    layer_type = _layer_type(rotary, attention)
    stock_tables = call_rotary(type(module), module, hidden, positions, layer_type)
    ours = stock_tables
    if angles == "exact":
        rotary.check(module, layer_type)
        ours = (Angles(positions, rotary.frequencies(layer_type, positions), module, layer_type),) * 2

    stock_apply = inspect.unwrap(base.forward).__globals__[APPLY]
    take, pairing = _find_pairing(name, attention, stock_apply, stock_tables)
    want = _try(name, attention, hidden, stock_tables)
    tolerance = _TOLERANCE.get(weight.dtype, 1e-4)

    norm = _find_norms(attention) if fuse_norm else None
    for fused in (norm, None) if norm else (None,):
        key = base, take, pairing, rounding, fused
        plan = plans.setdefault(key, Plan(*key))
        norms = (attention.q_norm, attention.k_norm) if fused else ()
        result._set(attention, "attention", plan)
        for each in norms:
            result._set(each, "norm", True)
        try:
            got = _try(name, attention, hidden, ours)
        except (AttributeError, TypeError):  # its code does more with the tables than to hand them on
            got = torch.full_like(want, float("nan"))
        if (got - want).abs().max() <= tolerance * want.abs().max():
            return
        result._unset(attention, *norms)
    raise ValueError(f"patch: with Ropewalk {name} gives another result than with its own {APPLY}")


def _plain_weight(model: Any, attention: Any) -> Any:
    """A weight of the dtype that the layer computes in: not a quantised one."""
    for module in (attention, model):
        for weight in module.parameters():
            if weight.dtype in _TOLERANCE:
                return weight
    raise ValueError(f"patch: {type(model).__name__} has no weights of float32, float16 or bfloat16")


# What some layers' forwards need besides: nothing of it, as it is in a first pass without a cache.
_NOTHING = {"alibi": None, "past_key_values": None, "layer_past": None, "merged_attention_mask": None}


def _try(name: str, attention: Any, hidden: Any, position_embeddings: tuple[Any, Any]) -> Any:
    """The output of one layer for a given input."""
    parameters = inspect.signature(type(attention).forward).parameters
    arguments = {"hidden_states": hidden, TABLES: position_embeddings, "attention_mask": None}
    arguments.update({known: value for known, value in _NOTHING.items() if known in parameters})
    if "position_ids" in parameters:
        arguments["position_ids"] = torch.arange(3, 3 + hidden.shape[1], device=hidden.device)[None]
    for parameter in parameters.values():
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
    except (KeyError, IndexError, RuntimeError, AssertionError) as error:
        raise ValueError(f"patch: {name} alone ends in {type(error).__name__}: {str(error)[:200]}") from None
    finally:
        attention.train(training)
    return (output[0] if isinstance(output, tuple) else output).float()


def _find_pairing(name: str, attention: Any, stock_apply: Any, tables: tuple[Any, Any]) -> tuple[Any, str]:
    """What the model's function does, found out by trying it."""
    # A module of the package `kernels`, if that is installed: its forward is the function.
    plain = stock_apply.forward if isinstance(stock_apply, torch.nn.Module) else stock_apply
    known = list(inspect.signature(plain).parameters)[:4] == ["q", "k", "cos", "sin"]
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
    raise ValueError(f"patch: the {APPLY} of {name} does something that Ropewalk does not know")


def _find_norms(attention: Any) -> Norm | None:
    """The norm of q and k, if they have RMSNorms of one head each, both alike, that come before the rotation."""
    names = _names(attention)
    if not all(name in names and names.index(name) < names.index(APPLY) for name in ("q_norm", "k_norm")):
        return None
    head_dim = getattr(attention, "head_dim", None)
    modules = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    norm, other = (_find_norm(module, head_dim) for module in modules)
    if norm is None or norm != other or modules[0] is modules[1]:
        return None
    weights = [getattr(module, "weight", None) is None for module in modules]
    return norm if weights[0] == weights[1] else None


def _find_norm(module: Any, head_dim: int | None) -> Norm | None:
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
            return Norm(eps, zero_centered and weight is not None)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# transformers' own slot, by the package `kernels`

_serves: dict[tuple[Any, ...], bool] = {}


@torch.compiler.assume_constant_result
def _slot_serves(cls: Any, head_dim: int, width: int, unsqueeze_dim: int) -> bool:
    """Whether the function of a modeling file is the common one: some that have the slot rotate otherwise. Found out by
    trying it, once."""
    from .compat.transformers import apply_rotary_pos_emb  # noqa: PLC0415

    key = cls, head_dim, width, unsqueeze_dim
    if key not in _serves:
        generator = torch.Generator().manual_seed(7)
        shape = (1, 2, 3, head_dim) if unsqueeze_dim == 1 else (1, 3, 2, head_dim)
        half = torch.randn((2, 1, 3, max(width // 2, 1)), generator=generator)
        args = (*torch.randn((2, *shape), generator=generator), *torch.cat((half, half), -1), unsqueeze_dim)
        try:
            with torch.no_grad():
                pairs = zip(apply_rotary_pos_emb(*args), cls.forward(None, *args), strict=True)
                _serves[key] = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)
        except Exception:  # the stock function's, whatever it is: that is called then
            _serves[key] = False
    return _serves[key]


class _RotaryPosEmb(torch.nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        from .compat.transformers import apply_rotary_pos_emb  # noqa: PLC0415

        if _slot_serves(type(self), q.shape[-1], cos.shape[-1], unsqueeze_dim):
            return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return type(self).forward(self, q, k, cos, sin, unsqueeze_dim)


class _Repository:
    """What `kernels` takes a layer from: nothing is downloaded."""

    layer_name = "rotary_pos_emb"

    def load(self) -> type[torch.nn.Module]:
        return _RotaryPosEmb


def use_kernels(devices: Iterable[str] = ("cpu", "cuda", "xpu")) -> None:
    """Puts Ropewalk's rotation into transformers' own slot `rotary_pos_emb`, for models that are loaded with
    `use_kernels=True`, as TRL and axolotl do it, too. Training as well: its gradients are those of the stock function.

    A model whose function is not the common one goes on with its own.

    Args:
        devices: the kinds of devices that it is registered for.

    Raises:
        ImportError: the package `kernels` is not installed, or not in a version that transformers takes.
    """
    from transformers.integrations import hub_kernels  # noqa: PLC0415

    if not hub_kernels.is_kernels_available():
        raise ImportError("use_kernels: the package kernels is not installed in a version that transformers takes")
    mode = hub_kernels.Mode
    modes = (mode.INFERENCE, mode.TRAINING, mode.INFERENCE | mode.TORCH_COMPILE, mode.TRAINING | mode.TORCH_COMPILE)
    mapping = hub_kernels.get_kernel_mapping_transformers()
    ours = {device: {each: _Repository() for each in modes} for device in devices}
    mapping["rotary_pos_emb"] = {**mapping.get("rotary_pos_emb", {}), **ours}
