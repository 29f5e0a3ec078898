"""What a call from Python costs over the same call from C: 1 token, 1 head of 128, float32, q and k, on the CPU.

    python bench/python_call.py [--json FILE]

The C call is timed through the module's own function with tensors that are already converted, less what that function
itself costs (a call of `version`); so the work of the kernel and the checks cancel out.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import timeit
from pathlib import Path

import numpy as np
import ropewalk
import torch
import tvm_ffi
from ropewalk import _module


def nanoseconds(function, rounds: int = 300, calls: int = 1000) -> float:
    """The best of `rounds` averages, each short enough to fit between the turns of other work on the machine."""
    return min(timeit.repeat(function, number=calls, repeat=rounds)) / calls * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    q, k = torch.randn(1, 1, 128), torch.randn(1, 1, 128)
    positions = torch.tensor([7])
    frequencies = ropewalk.Frequencies(theta=1e4, rotary_dim=128)
    table = ropewalk.Frequencies(theta=1e4, rotary_dim=128).table(16, torch.float32)
    weight = torch.ones(128)
    call, nothing = _module.function("rope"), _module.function("torch_schema")

    tensors = [tvm_ffi.from_dlpack(x) for x in (q, k, positions)]
    converted = tvm_ffi.from_dlpack(weight)
    handle = frequencies._handle
    arrays = [x.numpy() for x in (q, k, positions)]
    operator, short = torch.ops.ropewalk.rope_.default, torch.ops.ropewalk.rope_short_.default
    key = frequencies._content

    ours = {
        "module, tensors converted before (C and the border)": lambda: call(*tensors, None, handle),
        "the same, norm": lambda: call(
            *tensors, None, handle, None, None, None, None, 0, None, 0, False, 1, converted, converted
        ),
        "module, torch tensors": lambda: call(q, k, positions, None, handle),
        "ropewalk.rope_, torch tensors": lambda: ropewalk.rope_(q, k, positions=positions, frequencies=frequencies),
        "ropewalk.rope_, torch tensors, table": lambda: ropewalk.rope_(
            q, k, positions=positions, cos=table[0], sin=table[1]
        ),
        "ropewalk.rope_, torch tensors, norm": lambda: ropewalk.rope_(
            q, k, positions=positions, frequencies=frequencies, q_weight=weight, k_weight=weight
        ),
        "ropewalk.rope, torch tensors (out of place)": lambda: ropewalk.rope(
            q, k, positions=positions, frequencies=frequencies
        ),
        "ropewalk.rope_, numpy arrays": lambda: ropewalk.rope_(
            arrays[0], arrays[1], positions=arrays[2], frequencies=frequencies
        ),
        "torch.ops.ropewalk.rope_": lambda: operator(q, k, positions, None, key),
        "torch.ops.ropewalk.rope_short_": lambda: short(q, k, positions, None, key),
        "an empty call of the module": lambda: nothing(),
        "x.add_(1) of torch": lambda: q.add_(1),
    }
    numbers = {name: nanoseconds(function) for name, function in ours.items()}
    assert np.isfinite(arrays[0]).all()
    plain = numbers["module, tensors converted before (C and the border)"]
    print(f"{'1 token, 1 head of 128, q and k':54} {'ns':>7} {'over C':>8}")
    for name, value in numbers.items():
        base = numbers["the same, norm"] if "norm" in name else plain
        over = f"{value - base:8.0f}" if "ropewalk" in name or "torch tensors" in name else ""
        print(f"{name:54} {value:7.0f} {over}")
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
