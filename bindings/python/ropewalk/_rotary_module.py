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
    cos, sin = (table.double().cpu() for table in tables(torch.tensor([[0, 1]])))
    w = torch.as_tensor(frequencies.inv_freq, dtype=torch.float64, device="cpu")
    if cos.shape != (2, w.numel()):
        return False
    scaling = frequencies.attention_scaling
    return torch.allclose(cos[0], torch.full_like(w, scaling), rtol=tolerance, atol=0.0) and torch.allclose(
        sin[1], torch.sin(w) * scaling, rtol=tolerance, atol=1e-30
    )
