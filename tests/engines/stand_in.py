"""Modules that an engine imports and that these tests do without: each name in them is an empty class."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any


def stand_in(*names: str) -> None:
    """For each that is not installed."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []  # type: ignore[attr-defined]
            module.__getattr__ = _empty  # type: ignore[method-assign]
            sys.modules[name] = module


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
