"""What a call from Python on CUDA tensors costs the host: 1 token, 32/8 heads of 128, bfloat16, beside x.add_(1).

    python bench/cuda_host.py [--json FILE]

Medians of averages over 200 calls, contenders in turns, the device idle at the start of each. The driver's own launch
is that of an empty kernel with an argument as large as ours, on torch's stream; it is called through ctypes, whose own
cost (a C function that does nothing, with as many arguments) is taken off. A call without tokens is all but the launch.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ropewalk
import torch
import tvm_ffi
from ropewalk import _module

ROUNDS, CALLS = 16, 200  # a stream takes about 1,000 launches before it lets the caller wait
ARGUMENT_BYTES = 544  # of rope_kernel
# An empty kernel as PTX, which the driver itself compiles: neither a compiler nor headers are needed.
PTX = f"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry empty(.param .align 8 .b8 argument[{ARGUMENT_BYTES}]) {{ ret; }}
"""


class LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(LaunchAttribute)),
                ("attribute_count", ctypes.c_uint)]  # fmt: skip


assert ctypes.sizeof(LaunchAttribute) == 72 and ctypes.sizeof(LaunchConfig) == 56


def driver_launches() -> dict[str, Callable[[], Any]]:
    """The driver's launch of an empty kernel, and a C function that does nothing: calls through ctypes."""
    libcuda = ctypes.CDLL("libcuda.so.1")
    names: dict[str, Callable[[], Any]] = {}

    def check(result: int, call: str) -> None:
        if result:
            text = ctypes.c_char_p()
            libcuda.cuGetErrorName(result, ctypes.byref(text))
            raise RuntimeError(f"{call} failed: {(text.value or b'?').decode()}")

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(libcuda.cuModuleLoadData(ctypes.byref(module), PTX.encode()), "cuModuleLoadData")
    check(libcuda.cuModuleGetFunction(ctypes.byref(function), module, b"empty"), "cuModuleGetFunction")
    argument = ctypes.create_string_buffer(ARGUMENT_BYTES)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    attribute = LaunchAttribute(id=6, value=1)  # programmatic stream serialization
    stream, launch = torch.cuda.current_stream().cuda_stream, libcuda.cuLaunchKernelEx
    for name, count in (("launch by the driver", 0), ("launch by the driver, PDL", 1)):
        if count and torch.cuda.get_device_capability() < (9, 0):
            continue
        config = LaunchConfig((1, 3, 1), (128, 1, 1), 0, stream, ctypes.pointer(attribute), count)
        arguments = (ctypes.byref(config), function, parameters, None)
        check(launch(*arguments), "cuLaunchKernelEx")
        names[name] = lambda arguments=arguments, kept=argument: launch(*arguments)
    nothing = ctypes.CDLL(None).abs  # the C convention lets a function ignore arguments
    names["ctypes alone"] = lambda arguments=arguments: nothing(*arguments)
    return names


def contenders() -> dict[str, Callable[[], Any]]:
    x = torch.zeros(1, device="cuda")
    q, k = torch.randn(1, 32, 128, device="cuda").bfloat16(), torch.randn(1, 8, 128, device="cuda").bfloat16()
    positions = torch.zeros(1, dtype=torch.int32, device="cuda")
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    none = [tensor[:0] for tensor in (q, k, positions)]  # no tokens
    converted = [tvm_ffi.from_dlpack(tensor) for tensor in none]
    frequencies = ropewalk.Frequencies(theta=1e4, rotary_dim=128)
    handle = frequencies._handle
    call, nothing = _module.function("rope"), _module.function("version")
    # Every argument, as rope_ passes them when some tensor of the store is given.
    given = {"q": none[0], "k": none[1], "positions": none[2], "frequencies": handle, "eps": 1e-6}
    absent = {"tensor": None, "handle": None, "queue": None}
    every = [given.get(arg["name"], absent.get(arg["kind"], 0)) for arg in _module.description()]
    return {
        "x.add_(1)": lambda: x.add_(1),
        "rope_": lambda: ropewalk.rope_(q, k, positions=positions, frequencies=frequencies),
        "rope_, norm": lambda: ropewalk.rope_(
            q, k, positions=positions, frequencies=frequencies, q_weight=weight, k_weight=weight
        ),
        "rope_, no tokens": lambda: ropewalk.rope_(none[0], none[1], positions=none[2], frequencies=frequencies),
        "module, all arguments, no tokens": lambda: call(*every),
        "module, 5 arguments, no tokens": lambda: call(*none, None, handle),
        "module, 5 arguments converted before, no tokens": lambda: call(*converted, None, handle),
        "module, an empty call": lambda: nothing(),
        "requires_grad and is_neg of 3 tensors": lambda: [(t.requires_grad, t.is_neg()) for t in (q, k, positions)],
        **driver_launches(),
    }


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of a call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for number in range(ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if number:  # the first warms up
                samples[name].append((time.perf_counter() - start) / CALLS * 1e6)
    gc.enable()
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("cuda_host: torch finds no CUDA device here", file=sys.stderr)
        return 2
    with torch.no_grad():
        us = medians(contenders())
    ctypes_us = us.pop("ctypes alone")
    for name in us:
        if name.startswith("launch"):
            us[name] -= ctypes_us
    core = us["module, 5 arguments converted before, no tokens"] - us["module, an empty call"]
    parts = {
        "rope_ / x.add_(1)": us["rope_"] / us["x.add_(1)"],
        "rope_ less the call without tokens: its launch, us": us["rope_"] - us["rope_, no tokens"],
        "tvm-ffi, all arguments, us": us["module, all arguments, no tokens"] - core,
        "the core, no tokens, us": core,
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Ropewalk {ropewalk.__version__}")
    for name, value in us.items():
        print(f"{name:52} {value:7.2f} us")
    print()
    for name, value in parts.items():
        print(f"{name:52} {value:7.2f}")
    if options.json:
        out = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ropewalk": ropewalk.__version__,
               "us": us, "parts": parts}  # fmt: skip
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
