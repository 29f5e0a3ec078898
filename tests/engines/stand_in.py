"""Packages that an engine imports and that these tests do without: each name in them, and in their modules, is a class
that takes anything."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


def stand_in(*names: str) -> None:
    """For each that is not installed."""
    sys.meta_path.append(_Finder({name for name in names if importlib.util.find_spec(name) is None}))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _empty  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None: ...


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        return _empty(name)


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Meta(name, (), {"__init__": _takes_anything})


def _takes_anything(self: Any, *args: Any, **kwargs: Any) -> None: ...
