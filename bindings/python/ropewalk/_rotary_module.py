"""The frequencies of a transformers rotary module: those of its configuration, exact, if the module goes by them; else
the module's own numbers, which is said. Used by `ropewalk.transformers.patch`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import Frequencies

# Of the sines at position 1. A module in float32 rounds its frequencies; `model.to(bfloat16)` does so to 8 bits.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class WrongFrequenciesError(ValueError):
    """A module turns neither by its configuration nor by the numbers that it holds, so that one of them is wrong."""


def frequencies_of(
    module: Any, layer_type: str | None, tables: Callable[[Any], tuple[Any, Any]], changes: bool
) -> Frequencies | None:
    """The frequencies by which `module` turns, or None for those of its configuration.

    Args:
        module: a rotary module with a `config`.
        layer_type: the key of nested rope_parameters, if the module has such.
        tables: gives the module's cosines and sines, one column a pair, [tokens, pairs], for positions [1, tokens].
        changes: whether the rule goes by the length (dynamic, longrope): the numbers are then of one moment.

    Raises:
        WrongFrequenciesError: the module holds numbers that are not the configuration's, and does not turn by them.
        ValueError: neither the configuration's frequencies nor the module's numbers give its cosines and sines.
    """
    name = type(module).__name__
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    buffer = getattr(module, f"{prefix}original_inv_freq", getattr(module, f"{prefix}inv_freq", None))
    wide = buffer is None or buffer.dtype == torch.float32
    tolerance = _TOLERANCE.get(torch.float32 if wide else buffer.dtype, 1e-2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a field that transformers ignores has been told by it
            ours = Frequencies.from_config(module.config, layer_type)
        if _agrees(ours, tables, tolerance):
            return None
        reason = "they differ"
    except ValueError as error:
        ours, reason = None, str(error)
    error_class = ValueError if ours is None else WrongFrequenciesError
    failure = f"patch: the frequencies of {name} are not those of its configuration"
    if buffer is None or changes or (ours is not None and ours.axes is not None):
        raise error_class(f"{failure} ({reason}): give angles='table'")
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    try:
        own = Frequencies.from_array(buffer.double().cpu(), scaling)
    except ValueError as error:
        raise error_class(f"{failure} ({reason}), and its own cannot be used: {error}") from None
    if not buffer.any() or not _agrees(own, tables, tolerance):
        raise error_class(f"{failure} ({reason}), and it does not turn by its own: give angles='table'")
    warnings.warn(f"{failure} ({reason}): its own are taken", stacklevel=2)
    return own


def _agrees(frequencies: Frequencies, tables: Callable[[Any], tuple[Any, Any]], tolerance: float) -> bool:
    """Whether these are the module's angles: cosines at position 0 and sines at 1, where each frequency shows whole."""
    cos, sin = (table.double().cpu() for table in tables(torch.tensor([[0, 1]], device="cpu")))
    w = torch.as_tensor(frequencies.inv_freq, dtype=torch.float64, device="cpu")
    if cos.shape != (2, w.numel()):
        return False
    scaling = frequencies.attention_scaling
    return torch.allclose(cos[0], torch.full_like(w, scaling), rtol=tolerance, atol=0.0) and torch.allclose(
        sin[1], torch.sin(w) * scaling, rtol=tolerance, atol=1e-30
    )


class Numbers:
    """The frequencies and the scaling that a rotary module holds, as they were found; and whether it holds them still.
    A look costs no more than that at a counter, until one of them is written or another tensor takes its place."""

    def __init__(self, module: Any) -> None:
        self.same = True
        self._scaling = _scaling_of(module)
        self._found = {name: x.detach().cpu().clone() for name, x in module._buffers.items() if _is_of_it(name, x)}
        self._seen: dict[str, tuple[Any, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}  # the counters of a copy's tensors begin anew

    def are_those_of(self, module: Any) -> bool:
        buffers, scaling = module._buffers, _scaling_of(module)
        now = {name: (buffers.get(name), _version(buffers.get(name))) for name in self._found}
        if scaling == self._scaling and all(
            name in self._seen and x is self._seen[name][0] and version == self._seen[name][1]
            for name, (x, version) in now.items()
        ):
            return self.same
        self._seen = now
        same = scaling == self._scaling and all(_equal(self._found[name], x) for name, (x, _) in now.items())
        if self.same and not same:
            warnings.warn(
                f"patch: the frequencies of {type(module).__name__} were changed after "
                "ropewalk.transformers.patch(model, angles='exact'): its layers turn by its cosines and sines now",
                stacklevel=2,
            )
        self.same = same
        return same


def _is_of_it(name: str, buffer: Any) -> bool:
    return name.endswith("inv_freq") and not name.endswith("original_inv_freq") and buffer is not None


def _scaling_of(module: Any) -> dict[str, Any]:
    return {name: x for name, x in module.__dict__.items() if name.endswith("attention_scaling")}


def _version(buffer: Any) -> int:
    return -1 if buffer is None or buffer.is_inference() else buffer._version


def _equal(found: Any, now: Any) -> bool:
    """Whether these are the same numbers, or what a change of the model's dtype, there or there and back, left of
    them. Where they are offloaded there is nothing to look at, and nothing to turn by."""
    if now is None or now.shape != found.shape:
        return False
    if now.device.type == "meta":
        return True
    by = (now.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(found.to(dtype).to(now.dtype), now.cpu()) for dtype in by)
