"""Ropewalk inside engines that load plugins: SGLang and vLLM.

Off unless asked for: ROPEWALK_SGLANG=1, ROPEWALK_VLLM=1, or `ropewalk` in the engine's own list of plugins. Until then
no engine is imported and nothing is changed. `counters()` says what was served, in this process. docs/engines.md has
more.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Engine", "counters", "stays_stock"]

_known: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known.json").read_text())
_served: dict[str, dict[str, int]] = {name: {} for name in _known}
_stock: dict[str, dict[str, int]] = {name: {} for name in _known}

# What a call of ours raises before it writes. The stock way is taken then.
_REFUSALS = (ValueError, TypeError, AttributeError, RuntimeError)
_MOST_REFUSALS = 3
_NOTES = "_ropewalk"  # the attribute of a layer that remembers refusals


class _Refused:
    """Calls of one kind and layer that Ropewalk refused, one after the other."""

    count = 0
    reason = ""


def counters() -> dict[str, dict[str, int]]:
    """How many calls of each layer or operator Ropewalk has served in this process, by engine. Calls inside a graph are
    counted when it is recorded, not when it is replayed, and those inside torch.compile not at all."""
    return {engine: dict(counts) for engine, counts in _served.items()}


def stays_stock() -> dict[str, dict[str, int]]:
    """What was asked for and left to the engine, with the reason, and how many calls of it there were, by engine."""
    return {engine: dict(counts) for engine, counts in _stock.items()}


def _one_of(versions: list[str]) -> str:
    *others, newest = versions
    return " or ".join([", ".join(others)] * bool(others) + [newest])


class UnknownError(Exception):
    """Of a layer or an operator that is not as the glue knows it. It stays stock."""


class Engine:
    """What the glue of one engine shares: whether it is asked for, what it says, and what it counts."""

    def __init__(self, name: str, logger: str) -> None:
        self.name = name
        self.served: list[str] = []
        self.left: dict[str, str] = {}  # not served, with the reason
        self._known = _known[name]
        self._logger = logging.getLogger(logger)
        self._done = False

    def asked(self) -> bool:
        """By the variable, or by the engine's own list of plugins."""
        variable = self._known["variable"]
        value = os.environ.get(variable, "")
        if value in ("", "0"):
            plugins = os.environ.get(self._known["plugins"], "")
            return value == "" and "ropewalk" in (name.strip() for name in plugins.split(","))
        if value != "1":
            self._logger.warning(
                "ropewalk: %s must be 0 or 1, but is %.40r: %s stays stock", variable, value, self.name
            )
        return value == "1"

    def register(self, put: Callable[[], None]) -> None:
        """Switches on what `put` knows to serve, once, if it is asked for and the engine is of a known version. `put`
        fills in `served` and `left`."""
        if self._done or not self.asked():
            return
        self._done = True
        try:
            version = importlib.metadata.version(self._known["package"])
        except importlib.metadata.PackageNotFoundError:
            self._logger.warning("ropewalk: %s is not installed: nothing is served", self._known["package"])
            return
        if version.partition("+")[0] not in self._known["versions"]:
            self._logger.warning(
                "ropewalk: %s must be %s, but is %s: everything stays stock",
                self._known["package"],
                _one_of(self._known["versions"]),
                version,
            )
            return
        if torch.version.hip is not None:
            self._logger.warning("ropewalk: this torch is for AMD GPUs, which Ropewalk does not serve: all stays stock")
            return
        put()
        text = "ropewalk in %s %s serves %s" + ("; stock: %s" if self.left else "%s")
        left = ", ".join(f"{what} ({why})" for what, why in self.left.items())
        self._logger.warning(text, self.name, version, ", ".join(self.served) or "nothing", left)

    def check(self, function: Any, parameters: str) -> None:
        """Refuses a function of the engine whose parameters are not those that the glue knows."""
        found = " ".join(inspect.signature(function).parameters)
        if found != parameters:
            raise UnknownError(f"its parameters are {found}, not {parameters}")

    def gave_up(self, what: str, owner: Any) -> bool:
        """Whether calls of this kind and owner are no longer tried: three, one after the other, were refused, and a
        refusal costs a tenth of a millisecond."""
        refused = owner.__dict__.get(_NOTES, {}).get(what)
        return refused is not None and refused.count >= _MOST_REFUSALS

    def serve(self, what: str, owner: Any, call: Callable[[], Any], stock: Callable[[], Any]) -> Any:
        """The result of `call`, or of `stock` where that is refused or was too often."""
        if torch.compiler.is_compiling():
            return call()
        refused = owner.__dict__.get(_NOTES, {}).get(what)
        if refused is None or refused.count < _MOST_REFUSALS:
            try:
                result = call()
            except _REFUSALS as error:
                if refused is None:
                    refused = owner.__dict__.setdefault(_NOTES, {})[what] = _Refused()
                refused.count += 1
                refused.reason = f"{what}: {str(error).splitlines()[0][:300]}"
                if refused.reason not in _stock[self.name]:
                    self._logger.warning("ropewalk: a call stays stock: %s", refused.reason)
            else:
                if refused is not None:
                    refused.count = 0
                self.count(what)
                return result
        counts = _stock[self.name]
        counts[refused.reason] = counts.get(refused.reason, 0) + 1
        return stock()

    def count(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            counts = _served[self.name]
            counts[what] = counts.get(what, 0) + 1
