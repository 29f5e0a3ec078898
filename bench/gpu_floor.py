"""The floor of measure/cuda_floor.cc for Python: `ropewalk floor` gives the kernels and their shapes, compiled by
NVRTC; here they are loaded and launched on torch's stream, so that they can be captured beside Ropewalk and its
peers."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ropewalk


@dataclass(frozen=True)
class Rows:
    """What a call moves: rows of q, k and v heads, packed unless `apart`, and for a store the caches."""

    tokens: int
    heads: tuple[int, int, int]
    head_dim: int
    rotary_dim: int = 0  # only so much of each head; 0: all
    dtype: str = "bf16"
    few: bool = False
    cache: str = ""  # "same": of the rows' dtype; "fp8"
    slots: int = 0
    k_store_only: bool = False
    apart: bool = False
    out_of_place: bool = False

    def options(self) -> list[str]:
        out = ["--tokens", str(self.tokens), "--heads", ",".join(map(str, self.heads)), "--head-dim",
               str(self.head_dim), "--dtype", self.dtype, "--few" if self.few else "--many"]  # fmt: skip
        if self.rotary_dim and self.rotary_dim != self.head_dim:
            out += ["--rotary-dim", str(self.rotary_dim)]
        if self.cache:
            out += ["--cache", self.cache, "--slots", str(self.slots)]
        for flag in ("k_store_only", "apart", "out_of_place"):
            if getattr(self, flag):
                out.append("--" + flag.replace("_", "-"))
        return out


@functools.cache
def command() -> str:
    """The `ropewalk` command that came with the package; $ROPEWALK_COMMAND names another."""
    beside = Path(ropewalk.__file__).resolve().parent.parent / "bin" / "ropewalk"  # pip install --target
    script = Path(sysconfig.get_path("scripts")) / "ropewalk"
    for place in (os.environ.get("ROPEWALK_COMMAND"), str(beside), str(script), shutil.which("ropewalk")):
        if not place or not os.path.isfile(place):
            continue
        if os.access(place, os.X_OK):
            return place
        copied = Path(tempfile.mkdtemp(prefix="ropewalk-")) / "ropewalk"  # a copy that lost its mode on the way
        shutil.copy(place, copied)
        copied.chmod(copied.stat().st_mode | stat.S_IXUSR)
        return str(copied)
    raise RuntimeError("the ropewalk command is not beside the package, nor on the PATH: name it in ROPEWALK_COMMAND")


@functools.cache
def environment() -> dict[str, str]:
    """Where the command finds NVRTC: a package installed elsewhere does not lie beside it."""
    out = dict(os.environ)
    if "ROPEWALK_LIBNVRTC" in out:
        return out
    for folder in sys.path:
        found = sorted(Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.1[23]"), reverse=True)
        if found:
            out["ROPEWALK_LIBNVRTC"] = str(found[0])
            break
    return out


def describe(rows: Rows, arch: str = "") -> dict[str, Any]:
    """What `ropewalk floor` says of such rows; with `arch` ("sm_90a") also the compiled kernels, "cubin". No GPU."""
    with tempfile.TemporaryDirectory(prefix="ropewalk-floor-") as folder:
        file = Path(folder) / "floor.cubin"
        compile_to = ["--arch", arch, "-o", str(file)] if arch else []
        ran = subprocess.run([command(), "floor", *rows.options(), *compile_to], capture_output=True, text=True,
                             env=environment(), check=False)  # fmt: skip
        if ran.returncode:
            raise RuntimeError(f"ropewalk floor {' '.join(rows.options())}: {ran.stderr.strip() or ran.returncode}")
        out = json.loads(ran.stdout)
        if arch:
            out["cubin"] = file.read_bytes()
        return out


class Compiler:
    """Descriptions of rows, each made once, several at a time in processes of their own."""

    def __init__(self, arch: str, workers: int | None = None) -> None:
        self.arch = arch
        self.pool = concurrent.futures.ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 2) - 2))
        self.made: dict[Rows, concurrent.futures.Future[dict[str, Any]]] = {}

    def want(self, rows: Rows) -> concurrent.futures.Future[dict[str, Any]]:
        if rows not in self.made:
            self.made[rows] = self.pool.submit(describe, rows, self.arch)
        return self.made[rows]

    def forget(self, rows: Rows) -> None:
        self.made.pop(rows, None)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    driver.cuModuleLoadData.argtypes = [ctypes.POINTER(pointer), ctypes.c_char_p]
    driver.cuModuleGetFunction.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_char_p]
    driver.cuModuleUnload.argtypes = [pointer]
    return driver


def _check(result: int, call: str) -> None:
    if result:
        raise RuntimeError(f"the floor: {call} failed with {result}")


class Floor:
    """The kernels of a description, loaded in the current context."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self.shapes: list[dict[str, Any]] = description["shapes"]
        self.bytes: int = description["read_bytes"] + description["written_bytes"]
        self._module = ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), description["cubin"]), "cuModuleLoadData")
        self._functions: dict[str, ctypes.c_void_p] = {}
        for shape in self.shapes:
            function = ctypes.c_void_p()
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), self._module, shape["kernel"].encode()),
                   "cuModuleGetFunction")  # fmt: skip
            self._functions[shape["kernel"]] = function

    def call(self, shape: dict[str, Any], pointers: dict[str, int], stream: Callable[[], int]) -> Callable[[], None]:
        """A call that launches one shape. `pointers`: addresses by the names of the description's "arguments"."""
        names: Sequence[str] = self.description["arguments"]
        argument = (ctypes.c_void_p * len(names))(*[pointers[name] for name in names])
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        launch, function, at = _driver().cuLaunchKernel, self._functions[shape["kernel"]], ctypes.addressof(parameters)
        blocks, threads = shape["blocks"], shape["threads"]

        def call(kept: Any = (argument, parameters)) -> None:
            result = launch(function, blocks, 1, 1, threads, 1, 1, 0, stream(), at, None)
            if result:
                _check(result, f"cuLaunchKernel ({shape['name']})")

        return call

    def unload(self) -> None:
        _driver().cuModuleUnload(self._module)
