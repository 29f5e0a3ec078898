"""Loads the compiled module: Ropewalk's core behind tvm-ffi's calling convention."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tvm_ffi

_library = tvm_ffi.load_module(str(Path(__file__).with_name("_ropewalk.so")))


def function(name: str) -> Any:
    """One function of bindings/python/module.cc."""
    return _library.get_function(name)


@functools.cache
def description() -> list[dict[str, Any]]:
    """The operation's arguments in the order in which the module takes them: name, kind, dtypes, shape, .."""
    return json.loads(function("description")())["args"]
