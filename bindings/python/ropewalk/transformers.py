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

import collections
import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch

from . import Frequencies
from ._arrays import _shown
from ._patched_module import (
    APPLY,
    FUSING,
    STATE,
    TABLES,
    Angles,
    Form,
    Fusing,
    Norm,
    Plan,
    Wide,
    call_rotary,
    eps_of,
    put,
    take_off,
    whole,
)
from ._rotary_module import Numbers, WrongFrequenciesError, frequencies_of
from ._trial import (
    TOLERANCE,
    AnglesDoNotTellError,
    Call,
    Recording,
    form_of,
    in_eval,
    layout_of,
    names_of,
    rotations_of,
    same,
)

__all__ = ["Patch", "patch", "use_kernels"]


class Patch:
    """A patched model. `unpatch()`, or the end of a `with` block, restores it. A copy of a patched model is patched,
    too: `Patch(copy).unpatch()` restores that."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers = 0  # attention layers that Ropewalk serves
        self.fused_norms = 0  # of these, with the norm of q and k by Ropewalk, too
        # Classes of layers that rotate and were left alone, with the reason; and "q_norm and k_norm of" a class that is
        # served, where that norm stays the model's own.
        self.skipped: dict[str, str] = {}
        # Classes of layers that turn by the model's own cosines and sines though angles="exact", with the reason.
        self.by_table: dict[str, str] = {}
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

    def _count(self, model: torch.nn.Module, refusals: dict[str, ValueError], norms: dict[str, str]) -> None:
        attentions = [m for m in model.modules() if rotations_of(m) and STATE in m.__dict__]
        self.layers = len(attentions)
        self.fused_norms = sum(any(STATE in norm.__dict__ for norm in _norms_of(m)) for m in attentions)
        self.skipped = {name: str(error).removeprefix("patch: ") for name, error in refusals.items()}
        self.skipped.update({f"q_norm and k_norm of {name}": why for name, why in norms.items()})
        for module in model.modules():
            own = _own_rotation(module)
            if own:
                self.skipped.setdefault(type(module).__name__, f"has its own {own}, which Ropewalk does not serve")

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.unpatch()


def patch(model: torch.nn.Module, *, angles: str = "exact", rounding: str = "fused", fuse_norm: bool = True) -> Patch:
    """Puts Ropewalk in place of a model's rotary embedding.

    Training goes through it, too: with gradients enabled q and k are rotated into new tensors, and autograd keeps what
    the projections gave, but no normalised copy of it. Without (`torch.no_grad`, `torch.inference_mode`, `generate`)
    they are rotated in place, in the outputs of their projections. A copy of the model, by `copy.deepcopy`, `pickle` or
    `torch.save`, is patched, too.

    Args:
        model: a transformers model whose attention calls `apply_rotary_pos_emb` (Llama, Mistral, Qwen3, Gemma 3, ..).
        angles: "exact" computes the angles from the frequencies of the model's configuration, exact at every position;
            where the model turns by others, from the model's own, and a warning says so. "table" uses the model's own
            cosines and sines, for parity.
        rounding: as in `ropewalk.rope_`.
        fuse_norm: do the RMSNorm of q and k where the model has one: that of each head in the same pass, one over all
            heads (OLMo 2, MiniMax M2) in a pass of its own.

    Returns:
        A Patch, also a context manager. Its `skipped` names the layers that rotate and were left as they are, with the
        reason: a vision tower beside a text model that is served, for example. It also names the norms of q and k that
        stay the model's own where only the rotation is served, such as those of a model that rotates one tensor a call
        (Gemma 4).

    Raises:
        ValueError: the model has no such attention, is patched already, is offloaded, or all that rotates in it
            does something that Ropewalk does not know. The model is then as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"patch: model must be a transformers model (a torch.nn.Module), but is a {type(model).__name__}"
        )
    if angles not in ("exact", "table"):
        raise ValueError(f"patch: angles must be 'exact' or 'table', but is {_shown(angles)}")
    result = Patch(model)
    attentions = [m for m in model.modules() if rotations_of(m)]
    if not attentions:
        methods = {type(m).__name__: _own_rotation(m) for m in model.modules()}
        own = next((f"; {name} has its own {method}" for name, method in methods.items() if method), "")
        raise ValueError(f"patch: no layer of {type(model).__name__} calls {APPLY} or another function like it{own}")
    rotaries = [m for m in model.modules() if _is_rotary(m)]
    for module in (*attentions, *rotaries):
        _check_forward(module)
    _check_devices(model, (*attentions, *rotaries))
    trial = _Trial(result, attentions, rotaries, rounding, fuse_norm)
    try:
        with torch.no_grad():
            trial.record(angles == "exact")
            trial.serve()
            failure = trial.recording.failure()
            if failure and angles == "exact":
                result.unpatch()
                trial.why_table = dict.fromkeys(trial.exact, f"with angles='exact' {failure}")
                trial.exact.clear()
                trial.serve()
                failure = trial.recording.failure()
            if failure:
                raise ValueError(f"patch: {failure}")
    except BaseException:
        result.unpatch()
        raise
    result._count(model, trial.refusals, trial.norms_left)
    return result


class _Trial:
    """Finds out what the layers of a model do, and puts Ropewalk in where that is equal."""

    def __init__(
        self, result: Patch, attentions: list[Any], rotaries: list[Any], rounding: str, fuse_norm: bool
    ) -> None:
        self.result = result
        self.attentions = attentions
        self.rotaries = rotaries
        self.rounding = rounding
        self.fuse_norm = fuse_norm
        self.recording = Recording()
        self.plans: dict[Any, Plan] = {}
        self.forms: dict[Any, dict[str, Form]] = {}  # by class of layers
        self.unserved: dict[str, ValueError] = {}  # classes of layers that cannot be served in any way
        self.refusals: dict[str, ValueError] = {}
        self.exact: dict[Any, _Rotary] = {}  # by rotary module
        self.why_table: dict[Any, str] = {}  # likewise, if it cannot be exact
        self.norms_left: dict[str, str] = {}  # classes of layers whose norms stay their own, with the reason
        self.uses = collections.Counter(norm for each in attentions for norm in _norms_of(each))

    def record(self, exact: bool) -> None:
        """Runs the model, and what of it was not reached alone."""
        self.recording.run(self.result.model, [*self.attentions, *self.rotaries])
        ran = {module for module, _ in self.recording.rotary_calls}
        for attention in self.attentions:
            if attention not in self.recording.calls and type(attention).__name__ not in self.unserved:
                try:
                    self._call_alone(attention)
                except ValueError as error:
                    self.unserved[type(attention).__name__] = error
        if exact:
            self._check_rotaries(ran)
        known: dict[Any, Form | None] = {}
        for attention, call in self.recording.calls.items():
            cls, functions = type(attention), rotations_of(attention)
            if cls.__name__ in self.unserved:
                continue
            for name, args, kwargs in call.rotations:
                shapes = tuple(getattr(x, "shape", x) for x in (*args, *kwargs.values()))
                key = cls, name, shapes, tuple(kwargs)
                if key not in known:
                    try:
                        known[key] = form_of(functions[name], args, kwargs)
                    except AnglesDoNotTellError:  # another call does
                        continue
                form = known[key]
                if form is None or self.forms.setdefault(cls, {}).setdefault(name, form) != form:
                    self.unserved[cls.__name__] = ValueError(
                        f"patch: the {name} of {cls.__name__} does something that Ropewalk does not know"
                    )

    def _check_rotaries(self, ran: set[Any]) -> None:
        """Compares the angles of each rotary module with those of its configuration. One that did not run in its model
        keeps its tables: who else takes them is not known."""
        for module, call in self.recording.rotary_calls:
            rotary = self.exact.setdefault(module, _Rotary(module.config))
            try:
                _, layer_type = _asked(module, call)
                rotary.check(module, layer_type)
            except WrongFrequenciesError as error:
                for attention, of_layer in self.recording.calls.items():
                    source = self.recording.source(of_layer.tables(attention))
                    if source and source[0] is module:
                        self.unserved[type(attention).__name__] = error
            except ValueError as error:
                self.why_table[module] = str(error).removeprefix("patch: ").removesuffix(": give angles='table'")
        for module in self.exact.keys() - ran:
            model = type(self.result.model).__name__
            self.why_table[module] = f"its model was not run: what {model} takes is not known"
        for module in self.why_table:
            self.exact.pop(module, None)

    def _call_alone(self, attention: Any) -> None:
        """The call of a layer that no run reached, with an input and tables made for it."""
        name = type(attention).__name__
        rotary = next((m for m in self.rotaries if getattr(attention, "config", None) is m.config), None)
        if rotary is None:
            raise ValueError(f"patch: no rotary embedding found for {name}")
        if TABLES not in inspect.signature(type(attention).forward).parameters:
            raise ValueError(f"patch: {name} is not handed cosines and sines ({TABLES}), which Ropewalk does not know")
        weight = _plain_weight(self.result.model, attention)
        positions = torch.arange(3, 9, device=weight.device)[None]
        hidden = torch.randn(
            (1, 6, rotary.config.hidden_size),
            generator=torch.Generator().manual_seed(7),
            dtype=torch.float32,
            device="cpu",
        ).to(weight)
        layer_type = _layer_type(rotary, attention)
        takes_type = "layer_type" in inspect.signature(type(rotary).forward).parameters
        call = Call((hidden, positions, layer_type) if takes_type else (hidden, positions), {})
        call.result = call_rotary(type(rotary), rotary, hidden, positions, layer_type)
        self.recording.rotary_calls.append((rotary, call))
        with self.recording.of(self.result.model, [attention]):
            _run_alone(name, attention, hidden, call.result)

    def serve(self) -> None:
        """Puts Ropewalk in: by frequencies where those are exact, else by the model's own tables."""
        self.refusals = dict(self.unserved)
        self.norms_left = {}
        groups: dict[Any, list[Any]] = {}
        for attention in reversed(self.attentions):  # what is inside of another comes first
            if type(attention).__name__ not in self.refusals:
                source = self.recording.source(self.recording.calls[attention].tables(attention))
                groups.setdefault(source and source[0], []).append(attention)
        for rotary, served in groups.items():
            if rotary in self.exact:
                try:
                    self._serve_exact(rotary, served)
                    continue
                except ValueError as error:
                    self.result._unset(*(each for m in (*served, rotary) for each in m.modules()))
                    self.why_table[rotary] = str(error).removeprefix("patch: ")
            for attention in served:
                name = type(attention).__name__
                try:
                    self._serve_layer(attention, None)
                except ValueError as error:
                    self.refusals[name] = error
                else:
                    if (self.exact or self.why_table) and self.recording.calls[attention].rotations:
                        reason = self.why_table.get(rotary, "its angles come from no rotary module that is known")
                        self.result.by_table[name] = reason
        if not any(STATE in m.__dict__ for m in self.attentions):
            raise next(iter(self.refusals.values()))

    def _serve_exact(self, module: Any, served: list[Any]) -> None:
        """The layers that are handed the tables of a rotary module, all of them or none, and that module."""
        rotary = self.exact[module]
        for other in self.result.model.modules():
            code = getattr(inspect.unwrap(type(other).forward), "__code__", None)
            if code and TABLES in code.co_varnames and "cos" in code.co_varnames:
                if getattr(other, "config", None) is rotary.config and other not in self.attentions:
                    raise ValueError(f"patch: {type(other).__name__} uses the cosines and sines in an unknown way")
        for attention, call in self.recording.calls.items():
            source = self.recording.source(call.tables(attention))
            if attention not in served and source and source[0] is module:
                raise ValueError(f"patch: {type(attention).__name__}, which stays stock, takes its cosines and sines")
        for attention in served:
            tables = self.recording.calls[attention].tables(attention)
            _, call = self.recording.source(tables)
            positions, layer_type = _asked(module, call)
            positions = positions.to(tables[0].device)  # the layer's, where a model is spread over several
            angles = Angles(positions, rotary.frequencies(layer_type, positions), module, layer_type)
            self._serve_layer(attention, (angles, angles))
        rotary.watch(module)
        self.result._set(module, "rotary", rotary)

    def _wide(self, norm: Any, of_it: Any) -> Wide:
        once = self.rounding == "reference" and _rounds_once(norm)
        return Wide(of_it.zero_centered, "fused" if once else self.rounding)

    def _serve_layer(self, attention: Any, tables: Any) -> None:
        """One layer, where it then gives what it gave, handed these tables or else those that it had."""
        base = type(attention)
        call = self.recording.calls[attention]
        forms = tuple(self.forms.get(base, {}).items())
        if not forms:
            raise ValueError(f"patch: {base.__name__} rotates nothing in a first pass")
        dtype = next((x.dtype for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)), None)
        handed = isinstance(tables or call.tables(attention), tuple)
        found, why = _find_norms(attention, forms) if self.fuse_norm else (None, "")
        if found and any(self.uses[norm] > 1 for norm in _norms_of(attention)):
            found, why = None, "one of them is used elsewhere, too"
        if isinstance(found, Norm) and not handed:
            found, why = None, "the layer is not handed cosines and sines"
        for norm in (found, None) if found else (None,):
            for in_place in (True, False):
                fused = norm if isinstance(norm, Norm) else None
                key = base, forms, self.rounding, fused, in_place
                plan = self.plans.setdefault(key, Plan(*key))
                norms = (attention.q_norm, attention.k_norm) if norm else ()
                try:
                    states: tuple[Any, ...] = ()
                    if fused:
                        states = (Fusing(attention, fused),) * 2
                        attention.__dict__[FUSING] = states[0]
                    elif norm:
                        states = tuple(self._wide(each, of_it) for each, of_it in zip(norms, norm, strict=True))
                    self.result._set(attention, "attention", plan)
                    for each, state in zip(norms, states, strict=True):
                        self.result._set(each, "norm" if fused else "wide norm", state)
                    with in_eval(attention):
                        if same(call.again(attention, tables), call.result, dtype):
                            if why and not norm:
                                self.norms_left[base.__name__] = f"{why}: they stay the model's own"
                            return
                    reason = f"gives another result than with its own {forms[0][0]}"
                except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # e.g. it does more with tables
                    reason = f"ends in {type(error).__name__}: {error}{_if_sharded(attention)}"
                self.result._unset(attention, *norms)
            why = f"with them by Ropewalk the layer {reason}" if norm else why
        raise ValueError(f"patch: with Ropewalk {base.__name__} {reason}")


def _own_rotation(module: Any) -> str | None:
    """The method of a module that rotates: not a function, and so not served."""
    names = (name for name in names_of(module) if re.match("_?apply_rotary", name))
    return next((name for name in names if hasattr(type(module), name)), None)


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
    if any(x.device.type == "meta" for m in modules for x in (*m.parameters(), *m.buffers())):
        raise ValueError(
            f"patch: layers of {type(model).__name__} are offloaded (on the meta device), and each is tried where it "
            "lies: load the model without offloading, and call ropewalk.transformers.patch before dispatching it "
            "(accelerate.dispatch_model)"
        )


def _if_sharded(attention: Any) -> str:
    """The remedy where a layer cannot be tried alone, as its parameters are spread over ranks."""
    if any(type(weight).__name__ == "DTensor" for weight in attention.parameters()):
        return "; its parameters are sharded: call ropewalk.transformers.patch before fully_shard"
    return ""


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
        self.numbers: Numbers | None = None  # that the module had; None: those of it go by the length

    def _rule(self, layer_type: str | None) -> dict[str, Any]:
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return (parameters.get(layer_type) or {}) if layer_type else parameters

    def _key(self, layer_type: str | None, position_ids: Any) -> tuple[Any, ...]:
        """Layer type, and the length to ask for: 0 where it does not matter."""
        rule = self._rule(layer_type)
        kind = rule.get("rope_type", "default")
        if not self.changes(layer_type):
            return layer_type, 0
        length = int(position_ids.max()) + 1
        longest = self.config.max_position_embeddings
        original = rule.get("original_max_position_embeddings") or longest
        if kind == "longrope":
            return layer_type, max(longest, original + 1) if length > original else 0
        return layer_type, length if length > longest else 0

    def changes(self, layer_type: str | None) -> bool:
        """Whether the rule goes by the length."""
        return self._rule(layer_type).get("rope_type", "default") in ("dynamic", "longrope")

    def chooses(self, layer_type: str | None) -> bool:
        """Whether the rule chooses between two sets of frequencies, by the length."""
        return self._rule(layer_type).get("rope_type", "default") == "longrope"

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

    def watch(self, module: Any) -> None:
        """From now on a change of the module's numbers is noticed."""
        self.numbers = None if any(self.changes(layer_type) for layer_type in self.own) else Numbers(module)

    def holds(self, module: Any) -> bool:
        """Whether the module's numbers are still those that `patch` found. A graph has what was so when it was made."""
        return self.numbers is None or (
            self.numbers.same if torch.compiler.is_compiling() else self.numbers.are_those_of(module)
        )

    def check(self, module: Any, layer_type: str | None) -> None:
        """Compares our angles with the module's, and takes its own frequencies where they differ."""
        if layer_type in self.own:
            return
        device = next((buffer.device for buffer in module.buffers()), None)

        def tables(positions: Any) -> tuple[Any, Any]:
            x = torch.zeros(1, dtype=torch.float32, device=device)
            tables = call_rotary(type(module), module, x, positions.to(device), layer_type)
            cos, sin = (table.reshape(-1, *table.shape[-2:])[0] for table in tables)
            take = layout_of(cos, sin) or whole
            return take(cos), take(sin)

        self.own[layer_type] = frequencies_of(module, layer_type, tables, self.changes(layer_type))


def _asked(module: Any, call: Call) -> tuple[Any, Any]:
    """The positions and the layer type of a call of a rotary module."""
    given = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs).arguments
    return given.get("position_ids"), given.get("layer_type")


def _plain_weight(model: Any, attention: Any) -> Any:
    """A weight of the dtype that the layer computes in: not a quantised one."""
    for module in (attention, model):
        for weight in module.parameters():
            if weight.dtype in TOLERANCE:
                return weight
    raise ValueError(f"patch: {type(model).__name__} has no weights of float32, float16 or bfloat16")


# What some layers' forwards need besides: nothing of it, as it is in a first pass without a cache.
_NOTHING = {"alibi": None, "past_key_values": None, "layer_past": None, "merged_attention_mask": None}


def _run_alone(name: str, attention: Any, hidden: Any, position_embeddings: tuple[Any, Any]) -> None:
    """Runs one layer for a given input."""
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
    try:
        attention(**arguments)
    except Exception as error:
        raise ValueError(f"patch: {name} alone ends in {type(error).__name__}: {str(error)[:200]}") from None


def _norms_of(attention: Any) -> list[Any]:
    """Those that the code of a layer names."""
    names = names_of(attention)
    found = [getattr(attention, name, None) if name in names else None for name in ("q_norm", "k_norm")]
    return [each for each in found if isinstance(each, torch.nn.Module) and not isinstance(each, torch.nn.Identity)]


def _find_norms(attention: Any, forms: tuple[tuple[str, Form], ...]) -> tuple[Norm | tuple[Norm, Norm] | None, str]:
    """The norm of q and k, if they have RMSNorms of one head each, both alike, that come before the rotation; RMSNorms
    over another width, such as that of all heads. If none, why not, and "" where the layer has no norms."""
    names, modules = names_of(attention), _norms_of(attention)
    if len(modules) != 2:
        return None, ""
    if any("forward" in module.__dict__ for module in modules):
        return None, "others have put something round them"
    head_dim = getattr(attention, "head_dim", None)
    widths = [module.weight.numel() for module in modules if getattr(module, "weight", None) is not None]
    if head_dim is not None and any(width != head_dim for width in widths):
        found = [_find_norm(module, width) for module, width in zip(modules, widths, strict=False)]
        if len(found) == 2 and found[0] and found[1]:
            return (found[0], found[1]), ""
        text = " and ".join(map(str, dict.fromkeys(widths)))
        return None, f"they are norms over {text} elements, but no RMSNorms ({type(modules[0]).__name__})"
    if len(forms) != 1 or not forms[0][1].pair:
        return None, "the layer rotates q and k one by one"
    if forms[0][1].pairing == "split":
        return None, "the rotation reads neighbours and writes halves"
    if not all(names.index(name) < names.index(forms[0][0]) for name in ("q_norm", "k_norm")):
        return None, "they come after the rotation"
    norm, other = (_find_norm(module, head_dim) for module in modules)
    if norm is None or norm != other:
        return None, f"they are no two RMSNorms of a head that are alike ({type(modules[0]).__name__})"
    weights = [getattr(module, "weight", None) is None for module in modules]
    return (norm, "") if weights[0] == weights[1] else (None, "only one of them has a weight")


def _find_norm(module: Any, width: int | None) -> Norm | None:
    eps = eps_of(module)
    weight = getattr(module, "weight", None)
    if width is None or not isinstance(eps, float):
        return None
    if getattr(module, "bias", None) is not None or (weight is not None and weight.shape != (width,)):
        return None
    like = weight if weight is not None else torch.empty(0, device="cpu")
    x = torch.randn((2, 3, width), generator=torch.Generator().manual_seed(7), device="cpu").to(like)
    try:
        want = module(x).float()
    except Exception:  # an unknown norm: left as it is
        return None
    plain = _normalised(x, eps)
    for zero_centered in (False, True):
        factor = 1.0 if weight is None else weight.float() + zero_centered
        if torch.allclose(plain * factor, want, atol=0.0, rtol=TOLERANCE.get(x.dtype, 1e-4)):
            return Norm(eps, zero_centered and weight is not None)
    return None


def _normalised(x: Any, eps: float) -> Any:
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


def _rounds_once(module: Any) -> bool:
    """Whether an RMSNorm rounds behind its weight alone (OLMo 2), and not before it, too (Llama, OLMoE): tried in
    bfloat16, whatever the model is in now."""
    shape = (5, *module.weight.shape)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(7), device="cpu")
    drawn = drawn.to(module.weight.device, torch.bfloat16)
    x, weight = drawn[:4], drawn[4]
    got = torch.func.functional_call(module, {"weight": weight}, (x,))
    plain = _normalised(x, eps_of(module))
    once, twice = (plain * weight.float()).bfloat16(), plain.bfloat16() * weight
    return bool((got == once).sum() > (got == twice).sum())


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
        half = torch.randn((2, 1, 3, max(width // 2, 1)), generator=generator, device="cpu")
        args = (
            *torch.randn((2, *shape), generator=generator, device="cpu"),
            *torch.cat((half, half), -1),
            unsqueeze_dim,
        )
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
