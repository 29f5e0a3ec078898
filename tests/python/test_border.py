"""What Python hands to the core: every number in range or refused by name, no object taken for another."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ropewalk

BIG = [2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**63 + 5, 2**64, 2**64 + 64, 2**100, 10**6000]
HUGE = [sign * n for n in BIG for sign in (1, -1)]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 2048}


def plain() -> ropewalk.Frequencies:
    return ropewalk.Frequencies(1e4, 64)


def call(**options: Any) -> None:
    ropewalk.rope_(np.ones((1, 1, 64), "f4"), frequencies=plain(), **options)


# Every int that Python hands over, by a function of that int, and what messages call it.
INTS = {
    "rotary_dim": lambda n: call(rotary_dim=n),
    "rotary_offset": lambda n: call(rotary_offset=n),
    "inverse": lambda n: call(inverse=n),
    "zero_centered_weight": lambda n: call(zero_centered_weight=n),
    "disable_pdl": lambda n: call(disable_pdl=n),
    "frequencies: rotary_dim": lambda n: ropewalk.Frequencies(1e4, n),
    "sequence_length": lambda n: ropewalk.Frequencies(1e4, 64, DYNAMIC, sequence_length=n),
    "axes": lambda n: ropewalk.Frequencies.from_array([1.0, 0.1], axes=[0, n]),
    "threads": ropewalk.set_threads,
}


@pytest.mark.parametrize("name", INTS)
def test_ints_out_of_range_are_refused_by_name(name: str) -> None:
    for n in HUGE:
        if name == "sequence_length" and 0 < n <= 2**40:
            continue
        with pytest.raises(ValueError, match=name.rpartition(": ")[2]) as raised:
            INTS[name](n)
        if abs(n) < 2**63:
            assert str(n) in str(raised.value)


@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope, ropewalk.prepare, ropewalk.explain])
def test_queues_out_of_range_are_refused_by_name(function: Any) -> None:
    for n in HUGE:
        for queue in (n, SimpleNamespace(sycl_queue=n), SimpleNamespace(addressof_ref=lambda n=n: n)):
            with pytest.raises(ValueError, match="rope: sycl_queue "):
                function(np.ones((1, 1, 64), "f4"), frequencies=plain(), sycl_queue=queue)


@pytest.mark.parametrize("name", INTS)
def test_other_types_are_no_ints(name: str) -> None:
    for value in (8192.0, np.float64(64), np.float32(64), "64", b"64", [64], {}, 1j, object(), ctypes.CDLL(None)):
        with pytest.raises(TypeError, match=name.rpartition(": ")[2]):
            INTS[name](value)


def test_ints_of_numpy_serve() -> None:
    assert ropewalk.Frequencies(1e4, np.int32(64)).rotary_dim == 64
    assert (
        ropewalk.Frequencies(1e4, 64, DYNAMIC, sequence_length=np.int64(8192)).inv_freq[5]
        == (ropewalk.Frequencies(1e4, 64, DYNAMIC, sequence_length=8192).inv_freq[5])
    )
    call(rotary_dim=np.int64(64), rotary_offset=np.uint8(0))
    ropewalk.set_threads(np.int64(2))
    ropewalk.set_threads(None)


# Every float.
FLOATS = {
    "theta": lambda x: ropewalk.Frequencies(x, 64),
    "attention_scaling": lambda x: ropewalk.Frequencies.from_array([1.0], attention_scaling=x),
    "inv_freq": lambda x: ropewalk.Frequencies.from_array([x]),
    "eps": lambda x: call(norm="rms", eps=x),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_numbers_in_range(name: str) -> None:
    for value in ("1.0", b"1", [1.0], {}, 1j, object()):
        with pytest.raises(TypeError, match=name):
            FLOATS[name](value)
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, 1e300):
        with pytest.raises(ValueError, match=name):
            FLOATS[name](value)
    for value in (np.float32(1.5), np.float64(1.5), 2):
        FLOATS[name](value)
    with pytest.raises(TypeError, match=name.rpartition(": ")[2]):
        FLOATS[name](np.complex64(1.5))


def test_eps_that_float32_cannot_hold_is_refused() -> None:
    for eps in (1e-300, 1e-46, 1e-39, 5e-324, 1e39):
        with pytest.raises(ValueError, match="eps must be 0 or from"):
            call(norm="rms", eps=eps)
    call(norm="rms", eps=0.0)
    call(norm="rms", eps=1.2e-38)


def test_scales_whose_inverse_is_infinite_are_refused() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    cache = np.zeros((4, 1, 64), ml_dtypes.float8_e4m3fn)
    for scale in (1e-39, 1e-45, 1e-300, 0.0, -1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ValueError, match="k_scale must be"):
            call(k=np.ones((1, 1, 64), "f4"), k_cache=cache, slots=np.zeros(1, "i8"), k_scale=scale)
    call(k=np.ones((1, 1, 64), "f4"), k_cache=cache, slots=np.zeros(1, "i8"), k_scale=1.2e-38)


@pytest.mark.parametrize("traced", [False, True])
def test_scales_are_numbers_of_any_type_and_size(traced: bool) -> None:
    """tvm_ffi before 0.1.13 knows no int beyond 64 bits."""
    torch = pytest.importorskip("torch")
    watch = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode(display=False)

    def store(scale: Any) -> Any:
        q, k, k_cache = torch.ones(1, 1, 64), torch.ones(1, 1, 64), torch.zeros(4, 1, 64, dtype=torch.float8_e4m3fn)
        with watch if traced else contextlib.nullcontext():
            ropewalk.rope_(q, k, frequencies=plain(), k_cache=k_cache, slots=torch.zeros(1, dtype=torch.int64),
                           k_scale=scale)  # fmt: skip
        return k_cache.view(torch.uint8)

    want = store(2.0)
    assert want.any()
    for scale in (2, np.float32(2), np.float64(2), np.float16(2), np.int64(2), np.uint8(2)):
        assert torch.equal(store(scale), want), repr(scale)
    store(2**64)
    for scale in (10**400, 2**1000, -(2**64), np.float32("nan"), np.int32(0)):
        with pytest.raises(ValueError, match="k_scale must be a"):
            store(scale)
    for scale in (np.complex64(2), 2 + 0j, np.timedelta64(2), np.datetime64("1970"), np.bool_(True), np.str_("2"), "2"):
        with pytest.raises(TypeError, match="k_scale must be a"):
            store(scale)


@pytest.mark.parametrize("handle", [0x1234, 0, 1, -1, 2**63, None, "x"])
def test_only_frequencies_are_frequencies(handle: Any) -> None:
    class Duck:
        _handle = handle
        __class__ = ropewalk.Frequencies  # type: ignore[assignment]

    for fake in (ctypes.CDLL(None), type("Frequencies", (), {"_handle": handle})(), Duck()):
        for function in (ropewalk.rope_, ropewalk.explain, ropewalk.prepare):
            with pytest.raises(TypeError, match=r"frequencies must be a ropewalk\.Frequencies"):
                function(np.ones((4, 2, 8), "f4"), frequencies=fake)


def test_axes_beyond_the_rows_that_positions_may_have() -> None:
    for axis in (2**20, 2**31 - 1, -1):
        with pytest.raises(ValueError, match=r"axes\[1\] must be from 0 to 1048575"):
            ropewalk.Frequencies.from_array([1.0, 0.1], axes=[0, axis])
    frequencies = ropewalk.Frequencies.from_array([1.0, 0.1], axes=[0, 2**20 - 1])
    with pytest.raises(ValueError, match="must have 1048576 rows"):
        ropewalk.rope_(np.ones((3, 1, 4), "f4"), positions=np.zeros((3, 3), "i8"), frequencies=frequencies)


@pytest.mark.parametrize("shape", [(0, 8, 64), (8, 0, 64), (0, 0, 64), (0, 3, 2, 64), (2, 0, 2, 64), (2, 3, 0, 64)])
@pytest.mark.parametrize("dtype", ["f2", "f4", "bfloat16"])
def test_empty_arrays_are_served(shape: tuple[int, ...], dtype: str) -> None:
    """numpy and DLPack give an array without elements any strides."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q = np.zeros(shape, dtype)
    ropewalk.rope_(q, frequencies=plain())
    ropewalk.rope_(q, q.copy(), frequencies=plain(), norm="rms")
    out, _ = ropewalk.rope(q, frequencies=plain())
    assert out.shape == shape
    strided = np.lib.stride_tricks.as_strided(q, shape, (0,) * len(shape))
    ropewalk.rope_(strided, frequencies=plain())


def test_paths_may_hold_any_bytes(tmp_path: Any) -> None:
    path = b"/nowhere/\xff\xfe.so"
    code = "import ropewalk; print(len(ropewalk.backends()))"
    environment = {b"ROPEWALK_LIBCUDA": path, b"ROPEWALK_LIBOPENCL": path, b"PATH": b"/usr/bin"}
    environment = {**os.environb, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()


def test_layer_types_are_texts() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "rope_theta": 1e4}
    for value in (7, 1.5, True, b"full_attention", ["full_attention"], np.zeros(2), object()):
        with pytest.raises(TypeError, match="layer_type must be a str or None"):
            ropewalk.Frequencies.from_config(config, layer_type=value)


def test_texts_are_read_to_their_end(tmp_path: Any) -> None:
    """Behind a zero byte C would see nothing more."""
    text = '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "rope_theta": 1e4}'
    path = tmp_path / "config.json"
    path.write_text(text + "\0 and more")
    with pytest.raises(ValueError, match=f"config must not hold a zero byte, but has one at {len(text)}"):
        ropewalk.Frequencies.from_config(path)
    path.write_text(text)
    with pytest.raises(ValueError, match="layer_type must not hold a zero byte"):
        ropewalk.Frequencies.from_config(path, layer_type="full_attention\0")
    with pytest.raises(ValueError, match="name must not hold a zero byte"):
        ropewalk.force_backend("cpu\0x")


class SaysItIs:
    """As unittest.mock's objects with a spec do."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return self.kind


def test_objects_are_what_their_type_is() -> None:
    q = np.ones((2, 1, 64), "f4")
    for name in ("q", "k", "positions", "cos", "k_scale"):
        for kind in (np.ndarray, int, float):
            with pytest.raises(TypeError, match=f"{name} must be a tensor"):
                ropewalk.rope_(**{"q": q, "frequencies": plain(), name: SaysItIs(kind)})
    with pytest.raises(TypeError, match="q must be a"):
        ropewalk.rope(SaysItIs(np.ndarray), frequencies=plain())


def test_messages_are_short_whatever_is_given() -> None:
    for name in ("pairing", "norm"):
        with pytest.raises(TypeError, match=f"rope: {name} must be .*, but is a numpy.ndarray$"):
            call(**{name: np.zeros((40, 40))})
        with pytest.raises(ValueError, match=f"rope: {name} must be .*, but is 'x+'$") as raised:
            call(**{name: "x" * 10000})
        assert len(str(raised.value)) < 200


def test_messages_are_short_whatever_a_dtype_or_a_keyword_is() -> None:
    long = np.zeros((40, 40), "M8[s]")
    many = np.dtype([(f"field{i}", "f4") for i in range(1000)])
    for dtype in (long, object(), [long], many, "x" * 10000):
        with pytest.raises((TypeError, ValueError)) as raised:
            plain().table(4, dtype)
        assert len(str(raised.value)) < 200, str(raised.value)[:200]
    for function in (ropewalk.rope, ropewalk.explain, ropewalk.prepare, ropewalk.can_use):
        with pytest.raises(TypeError, match="unexpected keyword argument") as raised:
            function(np.ones((1, 1, 64), "f4"), **{"x" * 10000: 1})
        assert len(str(raised.value)) < 200 or function is ropewalk.rope  # whose message is Python's own


def test_a_configuration_is_not_read_for_ever() -> None:
    with pytest.raises(ValueError, match="/dev/zero: is (not JSON|larger than 8 MiB)"):
        ropewalk.Frequencies.from_config("/dev/zero")


def test_random_objects_are_served_or_refused() -> None:
    """Some calls of `make fuzz`, always the same ones."""
    script = Path(__file__).parents[2] / "fuzz/python_fuzz.py"
    command = [sys.executable, str(script), "--seed", "17", "--calls", "4000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "python_fuzz: 4000 calls held\n"), done.stderr
