"""Fuzzes the Python package: random objects for every argument of its functions, next to good ones.

A call ends well, or with a ValueError, a TypeError or a RuntimeError of one sentence, or with what an object itself
raised; one that is refused has written nothing. The calls are drawn one by one, so that each can be made again alone.

    python fuzz/python_fuzz.py --seconds 600        # for so long
    python fuzz/python_fuzz.py --seed 7 --first 12 --calls 1
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import mmap
import os
import random
import signal
import struct
import sys
import time
import warnings
from typing import Any

import numpy as np
import ropewalk

ACCEPTED = (ValueError, TypeError, RuntimeError)
INTS = [0, 1, 2, -1, 3, 8, 64, 8192, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e4, 1e-6, 1e300, 1e-300, 5e-324, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    "neox",
    "interleaved",
    "rms",
    "none",
    "cpu",
    "reference",
    "x" * 1000,
    "\0",
    "\ud800",
    "ünï",
    "/nowhere",
    "{}",
]
DTYPES = ["f4", "f2", "f8", "i4", "i8", "u1", "?", "c8", ">f4", "O", "U3", "M8[s]", [("a", "f4")]]
JSON_KEYS = [
    "model_type", "rope_theta", "rope_scaling", "rope_parameters", "rope_type", "type", "factor", "hidden_size",
    "num_attention_heads", "head_dim", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "short_factor", "long_factor", "mrope_section", "layer_types", "text_config", "rope_thetta",
]  # fmt: skip
JSON_WORDS = ["llama", "yarn", "llama3", "longrope", "dynamic", "linear", "default", "gemma3", "falcon", "mrope"]


class OwnError(Exception):
    """What an object of ours raises: it may pass."""


class Odd:
    """Objects that are not what they seem, by the names of what they have."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self._handle = draw.choice(INTS)
        self.shape, self.dtype, self.device = (1, 1, 8), "float32", "cpu"
        self.requires_grad, self.flags = False, None

    def _odd(self) -> Any:
        if self.draw.random() < 0.5:
            raise OwnError
        return self.draw.choice([None, 7, "x", (1, 0), 1.5, b"", (99, 0), object()])


def _method(self: Odd, *arguments: Any, **options: Any) -> Any:
    return self._odd()


SPECIAL = ["__index__", "__int__", "__float__", "__dlpack__", "__dlpack_device__", "__array__", "__len__", "__iter__",
           "__getitem__", "__bool__", "__hash__", "__fspath__", "to_dict", "item", "tolist", "is_neg",
           "addressof_ref"]  # fmt: skip


def odd(draw: random.Random) -> Any:
    names = draw.sample(SPECIAL, draw.randrange(1, 5))
    body: dict[str, Any] = dict.fromkeys(names, _method)
    if draw.random() < 0.2:
        body["__class__"] = draw.choice([ropewalk.Frequencies, np.ndarray, int, float, dict])
    return type("Odd", (Odd,), body)(draw)


def array(draw: random.Random) -> Any:
    shape = tuple(draw.choice([0, 1, 1, 2, 3, 4, 8]) for _ in range(draw.randrange(5)))
    dtype: Any = draw.choice(DTYPES)
    made = np.zeros(shape, dtype)
    if made.dtype.kind in "fiu":
        made[...] = draw.choice([0, 1, 3, 100])
    if draw.random() < 0.2 and made.ndim:
        made = made[tuple(slice(None, None, draw.choice([1, 2, -1])) for _ in shape)]
    if draw.random() < 0.1:
        made = made.T
    if draw.random() < 0.1:
        made.flags.writeable = False
    if draw.random() < 0.05:
        made = np.broadcast_to(made, (2, *made.shape))
    return made


def anything(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(16)
    if kind == 0:
        return None
    if kind == 1:
        return draw.choice([True, False])
    if kind in (2, 3):
        return draw.choice(INTS) * draw.choice([1, 1, -1])
    if kind == 4:
        return draw.choice(FLOATS)
    if kind == 5:
        return draw.choice(TEXTS)
    if kind == 6:
        return draw.choice([b"", b"abc", bytearray(3), memoryview(b"1234"), 1j, range(3), ..., object(), int, len])
    if kind == 7 and depth < 3:
        made = [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
        return draw.choice([list, tuple])(made)
    if kind == 8 and depth < 3:
        keys = JSON_KEYS if draw.random() < 0.8 else TEXTS
        return {draw.choice(keys): anything(draw, depth + 1) for _ in range(draw.randrange(5))}
    if kind == 9:
        return draw.choice(
            [np.float64(2.5), np.int64(8), np.float32("nan"), np.bool_(True), np.str_("yarn"), np.uint8(3)]
        )
    if kind == 10:
        return odd(draw)
    if kind == 11:
        return draw.choice([ctypes.CDLL(None), ropewalk, ropewalk.rope_, sys.stdout])
    if kind == 12:
        return draw.choice(JSON_WORDS)
    return array(draw)


GOOD_FREQUENCIES = [ropewalk.Frequencies(1e4, 8), ropewalk.Frequencies(1e4, 4, {"rope_type": "linear", "factor": 2.0})]


def good_call(draw: random.Random) -> dict[str, Any]:
    """Arguments of the operation that are accepted, a few of them or all."""
    tokens, heads = draw.randrange(4), draw.randrange(1, 3)
    dtype = draw.choice(["f4", "f2"])
    call: dict[str, Any] = {"q": np.ones((tokens, heads, 8), dtype), "frequencies": draw.choice(GOOD_FREQUENCIES)}
    if draw.random() < 0.3:
        call.update(frequencies=None, cos=np.ones((4, 4), "f4"), sin=np.zeros((4, 4), "f4"))
    if draw.random() < 0.7:
        call["k"] = np.ones((tokens, heads, 8), dtype)
        if draw.random() < 0.5:
            call.update(v=np.ones((tokens, heads, 4), dtype), k_cache=np.zeros((6, heads, 8), dtype),
                        v_cache=np.zeros((6, heads, 4), dtype), slots=np.arange(tokens))  # fmt: skip
    if draw.random() < 0.5:
        call["positions"] = np.arange(tokens, dtype=draw.choice(["i4", "i8"]))
    if draw.random() < 0.3:
        call.update(q_out=np.zeros_like(call["q"]))
    if draw.random() < 0.3:
        call.update(norm="rms", eps=1e-5)
    return call


NAMES = [argument["name"] for argument in ropewalk._module.description()]


def spoiled(draw: random.Random) -> dict[str, Any]:
    call = good_call(draw)
    for _ in range(draw.randrange(1, 4)):
        call[draw.choice(NAMES)] = anything(draw)
    return call


def bytes_of(call: dict[str, Any]) -> dict[str, bytes]:
    arrays = {name: value for name, value in call.items() if type(value) is np.ndarray}  # Odd ones may say they are
    return {name: value.tobytes() for name, value in arrays.items() if not value.dtype.hasobject}


def config(draw: random.Random) -> Any:
    if draw.random() < 0.2:
        return anything(draw)
    made: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4}
    for _ in range(draw.randrange(4)):
        made[draw.choice(JSON_KEYS)] = anything(draw)
    return made


def call_operation(draw: random.Random) -> str:
    """Returns what was written by a call that was refused."""
    call = spoiled(draw)
    before = bytes_of(call)
    functions = [ropewalk.rope_, ropewalk.rope_, ropewalk.rope, ropewalk.prepare, ropewalk.explain, ropewalk.can_use]
    try:
        draw.choice(functions)(**call)
    except (ValueError, TypeError) as error:
        written = [name for name, data in before.items() if call[name].tobytes() != data]
        if written:
            return f"{written} written by a call that was refused: {error}"
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            ropewalk.check_faults()
    return ""


def make_frequencies(draw: random.Random) -> str:
    def some(*good: Any) -> list[Any]:
        return [anything(draw) if draw.random() < 0.4 else x for x in good]

    kind = draw.randrange(4)
    if kind == 0:
        made = ropewalk.Frequencies(*some(1e4, 8, None, None))
    elif kind == 1:
        made = ropewalk.Frequencies.from_array(*some([1.0, 0.5], 1.0, [0, 1]))
    else:
        try:
            made = ropewalk.Frequencies.from_config(config(draw), *some(None, None))
        except OSError:  # a path
            return ""
    right = made.rotary_dim >= 2 and np.isfinite(made.inv_freq).all() and np.isfinite(made.attention_scaling)
    return "" if right else f"{made!r} of {made.inv_freq}"


def make_table(draw: random.Random) -> str:
    rows = anything(draw)
    if isinstance(rows, int) and 10000 < rows < 2**40:  # gigabytes are another question
        rows = 3
    GOOD_FREQUENCIES[0].table(rows, *[draw.choice([anything(draw), "float32"]) for _ in range(draw.randrange(2))])
    return ""


def set_something(draw: random.Random) -> str:
    value = anything(draw)
    try:
        if draw.random() < 0.5:
            ropewalk.force_backend(value)
        else:
            ropewalk.set_threads(3 if isinstance(value, int) and 8 < value <= 1024 else value)
    finally:
        ropewalk.set_threads(1)
        ropewalk.force_backend(None)
    return ""


def one(draw: random.Random) -> str:
    """Makes one call. What is wrong with how it ended, or ""."""
    kinds = [call_operation] * 6 + [make_frequencies] * 4 + [make_table, set_something]
    try:
        return draw.choice(kinds)(draw)
    except ACCEPTED as error:
        text = str(error)
        odd_text = not text or len(text) > 4000 or text.endswith("bug in Ropewalk")
        return f"an odd text: {text[:300]!r}" if odd_text else ""
    except OwnError:
        return ""
    except BaseException as error:
        return f"a {type(error).__name__}: {error}"


def run(seed: int, first: int, calls: int, until: float, place: mmap.mmap) -> int:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    index = first
    while index < first + calls and time.monotonic() < until:
        place[:8] = struct.pack("q", index)
        wrong = one(random.Random(f"{seed} {index}"))
        index += 1
        if wrong:
            print(f"call {index - 1}: {wrong}", file=sys.stderr)
            return 1
    print(f"python_fuzz: {index - first} calls held")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calls", type=int, default=2**60)
    arguments = parser.parse_args()
    place = mmap.mmap(-1, 8)  # where the child says which call it makes
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(arguments.seed, arguments.first, arguments.calls, time.monotonic() + arguments.seconds, place)
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return 0
    if os.WIFSIGNALED(status):
        print(f"python_fuzz: ended by {signal.Signals(os.WTERMSIG(status)).name}", file=sys.stderr)
    index = struct.unpack("q", place[:8])[0]
    print(f"again: python fuzz/python_fuzz.py --seed {arguments.seed} --first {index} --calls 1", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
