"""What the layers of a transformers model do, found out by running them: the calls that are kept here are what
`ropewalk.transformers.patch` compares with."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._patched_module import TABLES, Form, evens, halves, put, take_off, whole, with_functions

_ROTATES = re.compile(r"_?(vision_)?apply_(rotary|multimodal_rotary)\w*")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def names_of(module: torch.nn.Module) -> tuple[str, ...]:
    """The names that the code of its forward has."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code else ()


def rotations_of(module: torch.nn.Module) -> dict[str, Any]:
    """The functions of its file that rotate and that its forward calls, by name."""
    functions = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    found = {name: functions.get(name) for name in names_of(module) if _ROTATES.fullmatch(name)}
    return {name: function for name, function in found.items() if callable(function)}


def _copied(value: Any) -> Any:
    """As it is now: tensors, and what a layer writes to, such as caches."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, dict) or hasattr(value, "update") else value


class Call:
    """One call of a layer, with the calls of its rotations; or one call of a rotary module."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = tuple(map(_copied, args))
        self.kwargs = {name: _copied(value) for name, value in kwargs.items()}
        self.result: Any = None
        self.rotations: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def again(self, module: Any, tables: Any = None) -> Any:
        """What the module gives now, as `first` has it; with other tables, if they are given.

        Raises:
            ValueError: it has overwritten a tensor that it was given, which its caller may need.
        """
        place = list(inspect.signature(type(module).forward).parameters).index(TABLES) - 1 if tables else 0
        args, kwargs = tuple(map(_copied, self.args)), {name: _copied(value) for name, value in self.kwargs.items()}
        if tables and place < len(args):
            args = (*args[:place], tables, *args[place + 1 :])
        elif tables:
            kwargs[TABLES] = tables
        result = first(module(*args, **kwargs))
        for now, before in zip((*args, *kwargs.values()), (*self.args, *self.kwargs.values()), strict=False):
            if isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor) and not torch.equal(now, before):
                raise ValueError("a tensor that the layer is given is overwritten")
        return result

    def tables(self, module: Any) -> Any:
        """The cosines and sines that the layer was handed, or None."""
        parameters = list(inspect.signature(type(module).forward).parameters)
        if TABLES not in parameters:
            return None
        place = parameters.index(TABLES) - 1
        return self.kwargs.get(TABLES, self.args[place] if place < len(self.args) else None)


def first(result: Any) -> Any:
    """The output of a layer, in float32."""
    while isinstance(result, (tuple, list)):
        result = result[0]
    return result.float()


@contextlib.contextmanager
def in_eval(module: torch.nn.Module) -> Iterator[None]:
    """A module in eval mode; afterwards each part of it is in its own mode again."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Recording:
    """The first call of each layer and all calls of the rotary modules, while `of` holds."""

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}
        self.rotary_calls: list[tuple[Any, Call]] = []
        self.runs: list[tuple[Any, dict[str, Any], Any]] = []  # what ran whole, what it took and gave

    def call(self, base: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of a module's forward."""
        call = Call(args, kwargs)
        rotations = rotations_of(module)

        def kept(name: str) -> Callable[..., Any]:
            def function(*args: Any, **kwargs: Any) -> Any:
                call.rotations.append((name, tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items()}))
                return rotations[name](*args, **kwargs)

            return function

        if not rotations:
            call.result = base.forward(module, *args, **kwargs)
            self.rotary_calls.append((module, call))
            return call.result
        result = with_functions(base, {name: kept(name) for name in rotations})(module, *args, **kwargs)
        if module not in self.calls:
            self.calls[module] = call
            call.result = first(result).clone()
        return result

    @contextlib.contextmanager
    def of(self, model: torch.nn.Module, modules: list[Any]) -> Iterator[None]:
        """Keeps what these modules of the model are called with, in eval mode."""
        for module in modules:
            put(module, "recorded", self)
        try:
            with in_eval(model):
                yield
        finally:
            for module in modules:
                take_off(module)

    def run(self, model: torch.nn.Module, modules: list[Any]) -> None:
        """Runs what of the model its own class can run alone, until all modules have been called."""
        wanted = [module for module in modules if rotations_of(module)]
        with self.of(model, modules):
            for part in model.modules():
                inside = set(part.modules())
                if all(module in self.calls for module in wanted if module in inside):
                    continue
                for given in inputs(part):
                    before = len(self.calls), len(self.rotary_calls)
                    try:
                        self.runs.append((part, given, _whole(part(**given))))
                        break
                    except Exception:  # noqa: BLE001  # what it takes was guessed
                        self.calls = dict(list(self.calls.items())[: before[0]])
                        del self.rotary_calls[before[1] :]

    def failure(self) -> str | None:
        """What is wrong with what ran whole, now that its layers are patched; None if nothing is."""
        for part, given, want in self.runs:
            try:
                with in_eval(part):
                    got = _whole(part(**given))
            except Exception as error:  # noqa: BLE001
                return f"{type(part).__name__} then ends in {type(error).__name__}: {str(error)[:300]}"
            # Below float32 a router of experts may choose others; each layer alone has been compared.
            exact = all(x.dtype == torch.float32 for x in part.parameters() if x.is_floating_point())
            if got.shape != want.shape or (exact and not same(got, want, torch.float32)):
                return f"{type(part).__name__} then gives another result"
        return None

    def source(self, tables: Any) -> tuple[Any, Call] | None:
        """The rotary module, and its call, that made these tables."""
        if not isinstance(tables, tuple) or len(tables) != 2:
            return None
        for module, call in self.rotary_calls:
            if isinstance(call.result, tuple) and all(map(_is_or_was, tables, call.result)):
                return module, call
        return None


def _is_or_was(table: Any, made: Any) -> bool:
    """Whether it is that tensor, or a copy of it on the device of another part of the model."""
    if table is made or not (isinstance(table, torch.Tensor) and isinstance(made, torch.Tensor)):
        return table is made
    return table.device != made.device and table.shape == made.shape and torch.equal(table.cpu(), made.cpu())


def _whole(result: Any) -> Any:
    values = result.values() if hasattr(result, "values") else result if isinstance(result, tuple) else [result]
    found = next(
        (x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()), torch.zeros(1, device="cpu")
    )
    return found.clone()


def inputs(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """What a transformers model may take, small: texts, images, or patches of images."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(module, "main_input_name"):
        return
    parameters = inspect.signature(module.forward).parameters
    like = next((x for x in module.parameters() if x.dtype in TOLERANCE and x.device.type != "meta"), None)
    if like is None:
        return
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    if "input_ids" in parameters:
        text = config.get_text_config()
        size = getattr(text, "vocab_size", None) or 32
        more = {"use_cache": False} if "use_cache" in parameters else {}
        for begin in (size // 2, 3):  # one of them has no token with a meaning of its own
            ids = torch.arange(begin, begin + 10, device=like.device).reshape(2, 5) % size
            names = [name for name in ("input_ids", "decoder_input_ids") if name in parameters]
            yield {**dict.fromkeys(names, ids), **more}
    elif "grid_thw" in parameters:
        merge = getattr(config, "spatial_merge_size", None) or 2
        side = 2 * (merge if isinstance(merge, int) else 2)
        more = {"grid_thw": torch.tensor([[1, side, side]], device=like.device)}
        if "merge_sizes" in parameters:
            more["merge_sizes"] = torch.tensor([side // 2], device=like.device)
        first_layers = (
            next((m for m in module.modules() if isinstance(m, kind)), None)
            for kind in (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
        )
        for shape in [layer.weight.shape[1:] for layer in first_layers if layer]:  # of a patch
            for lead in ((side * side, shape.numel()), (side * side, *shape), (1, side * side, *shape)):
                yield {next(iter(parameters)): drawn(*lead), **more}
    elif "input_features" in parameters and isinstance(getattr(config, "num_mel_bins", None), int):
        yield {"input_features": drawn(2, 64, config.num_mel_bins)}
    elif "pixel_values" in parameters and isinstance(getattr(config, "image_size", None), int):
        yield {"pixel_values": drawn(2, getattr(config, "num_channels", 3), config.image_size, config.image_size)}


class AnglesDoNotTellError(ValueError):
    """All angles of a call are 0, so that it does not show how its function rotates."""


def layout_of(*tables: Any) -> Callable[[Any], Any] | None:
    """How to take one column a pair from a model's tables; None where they do not tell, as all angles are 0."""
    half = tables[0].shape[-1] // 2
    found = [
        take
        for take, equal in (
            (halves, all(torch.equal(x[..., :half], x[..., half:]) for x in tables)),
            (evens, all(torch.equal(x[..., ::2], x[..., 1::2]) for x in tables)),
        )
        if equal
    ]
    return found[0] if len(found) == 1 else None if found else whole


def _drawn_table(like: Any, take: Any, generator: Any) -> Any:
    pairs = torch.randn(take(like).shape, generator=generator, device="cpu").to(like.device)
    if take is halves:
        return torch.cat((pairs, pairs), -1)
    return pairs.repeat_interleave(2, -1) if take is evens else pairs


def _parameters(function: Any) -> tuple[str, ...]:
    # A module of the package `kernels`, if that is installed: its forward is the function.
    plain = function.forward if isinstance(function, torch.nn.Module) else function
    return tuple(inspect.signature(plain).parameters)


def _drawn(value: Any, generator: Any) -> Any:
    return torch.randn(value.shape, generator=generator, device="cpu").to(value.device)


def form_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form | None:
    """How a function rotates, or None if in no way that is known: what it gives for the tables of this call, and for
    vectors of these shapes drawn at random, decides.

    Raises:
        AnglesDoNotTellError: all angles of the call are 0.
    """
    names = _parameters(function)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    vectors = [name for name in names[:2] if isinstance(given.get(name), torch.Tensor) and name not in ("cos", "sin")]
    vectors = [name for name in vectors if not name.startswith("freqs_ci")]
    tables = [name for name in names if name in ("cos", "sin") or name.startswith("freqs_ci")]
    if not vectors or vectors[0] != names[0] or sorted(tables) != ["cos", "sin"] and len(tables) != 1:
        return None
    if any(not isinstance(given.get(name), torch.Tensor) for name in tables):
        return None
    others = given.keys() - {*vectors, *tables, "position_ids"}
    if any(not isinstance(given[name], (int, type(None))) for name in others):
        return None
    is_complex = len(tables) == 1
    if is_complex != given[tables[0]].is_complex():
        return None
    generator = torch.Generator().manual_seed(7)
    given.update({name: _drawn(given[name], generator) for name in vectors})
    cos = torch.view_as_real(given[tables[0]])[..., 0] if is_complex else given["cos"]
    take = whole if is_complex else layout_of(*(given[name] for name in tables))
    if take is None or (is_complex and not given[tables[0]].imag.any()):
        raise AnglesDoNotTellError
    if is_complex:
        given[tables[0]] = torch.complex(*(_drawn(cos, generator) for _ in "ri"))
    else:
        given.update({name: _drawn_table(given[name], take, generator) for name in tables})

    def result(function: Any) -> list[Any]:
        made = function(**{name: _copied(value) for name, value in given.items()})
        return [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]

    try:
        want = result(function)
    except Exception:  # noqa: BLE001  # not made for float32
        return None
    vector = given[names[0]]
    axes = [None] if cos.dim() < vector.dim() else [i for i in (-2, -3) if cos.shape[i] == 1]
    width = 2 * take(cos).shape[-1]
    pairings = ["neox", "interleaved"] + ["split"] * (width == vector.shape[-1])
    trailing = (False, True) if width < vector.shape[-1] else (False,)
    tokens_first = (False, True) if given.get("unsqueeze_dim") is None else (False,)
    for choice in itertools.product(pairings, (False, True), tokens_first, axes, (False, True), trailing):
        form = Form(names, take, *choice)
        try:
            got = result(form.make("fused"))
        except (ValueError, RuntimeError, IndexError):
            continue
        if len(got) == len(want) and all(
            x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, atol=1e-5)
            for x, y in zip(got, want, strict=True)
        ):
            return form
    return None


def same(got: Any, want: Any, dtype: torch.dtype) -> bool:
    """Whether a layer's output is that of its stock self."""
    return got.shape == want.shape and bool((got - want).abs().max() <= TOLERANCE.get(dtype, 1e-4) * want.abs().max())
