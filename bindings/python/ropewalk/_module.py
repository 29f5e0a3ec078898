"""Loads the compiled module: Ropewalk's core behind tvm-ffi's calling convention."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import atexit
import functools
import json
import threading
import time
from pathlib import Path
from typing import Any

import tvm_ffi

PATH = str(Path(__file__).with_name("_ropewalk.so"))
_library = tvm_ffi.load_module(PATH)


_functions: list[Any] = []


def function(name: str) -> Any:
    """One function of bindings/python/module.cc."""
    _functions.append(_library.get_function(name))
    return _functions[-1]


@atexit.register
def _keep_gil() -> None:
    """Python ends a daemon thread that waits for the GIL, and with it the process if the thread waits inside tvm-ffi,
    where it comes back from a call of ours. So from here on calls do not give the GIL away, and those that did are
    waited for."""
    own = threading.current_thread()
    others = sum(thread.daemon for thread in threading.enumerate() if thread is not own)
    if not others:
        return
    function("keep_lock")()
    for each in _functions:
        each.release_gil = False
    in_flight, until = function("calls_in_flight"), time.monotonic() + 10
    in_flight.release_gil = False
    pause = 0.005  # the interval in which Python's threads take turns
    while in_flight() > 1 and time.monotonic() < until:  # itself
        time.sleep(pause)
    time.sleep(4 * pause * (others + 1))  # each comes back and has the GIL once more, for one interval at a time


@functools.cache
def description() -> list[dict[str, Any]]:
    """The operation's arguments in the order in which the module takes them: name, kind, dtypes, shape, .."""
    return json.loads(function("description")())["args"]
