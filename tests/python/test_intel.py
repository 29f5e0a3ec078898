"""The operation on SYCL queues: dpctl's CPU queue and unified shared memory stand in for an Intel GPU and torch. With
libsycl.so.9, and once more in a process of its own with libsycl.so.8: a process can hold but one."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import ropewalk
import torch

# Intel's CPU device alone, for both loaders of OpenCL: before anything opens one.
_runtime = Path(sys.prefix) / "lib" / "libintelocl.so"
if _runtime.exists():
    os.environ.setdefault("OCL_ICD_VENDORS", str(_runtime))
    os.environ.setdefault("OCL_ICD_FILENAMES", str(_runtime))
# The older libsycl and its dpctl (scripts/setup.sh full), in the process that test_the_same_with_libsycl_8 starts.
_older = Path(os.environ.get("ROPEWALK_SYCL8_RUNTIME") or Path(sys.prefix) / "sycl" / "8-runtime")
LIBSYCL = os.environ.get("ROPEWALK_TEST_LIBSYCL", "libsycl.so.9")
if LIBSYCL == "libsycl.so.8":
    ctypes.CDLL(str(_older / "lib" / LIBSYCL), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(_older / "python"))
dpctl = pytest.importorskip("dpctl")
usm = pytest.importorskip("dpctl.memory")

try:
    QUEUE = dpctl.SyclQueue("opencl:cpu", property="in_order")
except dpctl.SyclQueueCreationError as error:
    pytest.skip(f"SYCL has no CPU device: {error}", allow_module_level=True)
_intel = next(b for b in ropewalk.backends() if b["name"] == "intel")
if "were found when this Ropewalk was built" in _intel["detail"]:
    pytest.skip(_intel["detail"], allow_module_level=True)
if "SYCL queues of" not in _intel["detail"] and "ROPEWALK_LIBSYCL_SHIM" not in _intel["detail"] and _runtime.exists():
    pytest.fail(f"SYCL's headers are installed, but Ropewalk has no shim: {_intel['detail']}", pytrace=False)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POSITIONS = [0, 1, 2047, 131_071, 2**31 - 1, -5, -(2**24) - 1]
FREQUENCIES = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
ONE_API = 14


class Usm:
    """Shared memory of a SYCL queue: `torch` reads and writes it on the host, DLPack says that it is oneAPI's."""

    def __init__(self, values, queue=QUEUE):
        self.memory = usm.MemoryUSMShared(max(values.numel() * values.element_size(), 1), queue=queue)
        flat = torch.from_numpy(np.frombuffer(self.memory, dtype=np.uint8))
        self.torch = flat[: values.numel() * values.element_size()].view(values.dtype).view(values.shape)
        self.torch.copy_(values)
        self.queue = queue

    def __dlpack_device__(self):
        return ONE_API, 0

    def __dlpack__(self, **_):
        capsule = self.torch.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # A DLManagedTensor begins with the data's address, then the device.
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = ONE_API
        return capsule


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(positions):
    return oracle.exact_angles(FREQUENCIES.inv_freq, positions)


def run(q, k=None, queue=QUEUE, **options):
    ropewalk.rope_(q, k, sycl_queue=queue, frequencies=FREQUENCIES, **options)
    QUEUE.wait()
    if isinstance(queue, dpctl.SyclQueue):
        queue.wait()


def launches():
    return sum(count for kernel, count in ropewalk.counters().items() if kernel.startswith("intel "))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
def test_plain(dtype, pairing):
    q, k = draw(7, 4, 64, dtype=dtype), draw(7, 2, 64, dtype=dtype, seed=1)
    on_q, on_k, positions = Usm(q), Usm(k), Usm(torch.tensor(POSITIONS))
    before = launches()
    run(on_q, on_k, positions=positions, pairing=pairing)
    assert launches() == before + 1
    for x, got in ((q, on_q), (k, on_k)):
        oracle.assert_close(got.torch, *oracle.rope(x, angles(POSITIONS), pairing))


def test_norm_and_store():
    q, k, v = (draw(5, 2, 64, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    weight = 1 + draw(64, dtype=torch.bfloat16, seed=3) / 10
    slots = torch.tensor([3, -1, 0, 7, 5])
    on = {name: Usm(x) for name, x in (("q", q), ("k", k), ("v", v), ("w", weight), ("slots", slots))}
    k_cache, v_cache = (
        Usm(torch.zeros(8, 2, 64, dtype=torch.bfloat16)),
        Usm(torch.zeros(8, 2, 64, dtype=torch.bfloat16)),
    )
    run(on["q"], on["k"], q_weight=on["w"], k_weight=on["w"], v=on["v"], k_cache=k_cache, v_cache=v_cache,
        slots=on["slots"])  # fmt: skip
    oracle.assert_close(on["k"].torch, *oracle.rope(k, angles(range(5)), weight=weight))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_cache.torch[slot], on["k"].torch[token])
            assert torch.equal(v_cache.torch[slot], v[token])
    assert not k_cache.torch[[1, 2, 4, 6]].any() and not v_cache.torch[[1, 2, 4, 6]].any()


def test_queues_by_address_and_by_object():
    q = draw(3, 2, 64)
    want = oracle.rope(q, angles(range(3)))
    stream = SimpleNamespace(sycl_queue=QUEUE.addressof_ref())  # as torch.xpu.Stream has it
    for queue in (QUEUE, QUEUE.addressof_ref(), stream):
        on = Usm(q)
        run(on, queue=queue)
        oracle.assert_close(on.torch, *want)


def test_a_queue_without_order():
    queue = dpctl.SyclQueue(QUEUE.sycl_context, QUEUE.sycl_device)
    assert not queue.is_in_order
    q = draw(3, 2, 64)
    on = Usm(q, queue)
    for _ in range(4):  # there and back
        run(on, queue=queue)
        run(on, queue=queue, inverse=True)
    assert torch.allclose(on.torch, q, atol=1e-5)


def test_torchs_current_queue_serves_where_none_is_named(monkeypatch):
    asked = []

    def current_stream(device):
        asked.append(device)
        return SimpleNamespace(sycl_queue=QUEUE.addressof_ref())

    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "current_stream", current_stream)
    q = draw(3, 2, 64)
    on = Usm(q)
    ropewalk.rope_(on, frequencies=FREQUENCIES)
    QUEUE.wait()
    oracle.assert_close(on.torch, *oracle.rope(q, angles(range(3))))
    assert asked == [0]
    explanation = ropewalk.explain(on, frequencies=FREQUENCIES)
    assert explanation["backend"] == "intel" and explanation["queue"] == f"SYCL ({LIBSYCL})"


def test_prepared_calls_build_nothing():
    on = Usm(draw(3, 2, 64))
    ropewalk.prepare(on, frequencies=FREQUENCIES, sycl_queue=QUEUE)
    assert ropewalk.explain(on, frequencies=FREQUENCIES, sycl_queue=QUEUE)["source"].startswith("memory")


def test_threads():
    q = draw(33, 4, 64, dtype=torch.bfloat16)
    want = oracle.rope(q, angles(range(33)))
    failures = []

    def work():
        queue = dpctl.SyclQueue(QUEUE.sycl_context, QUEUE.sycl_device, property="in_order")
        for _ in range(20):
            on = Usm(q, queue)
            ropewalk.rope_(on, frequencies=FREQUENCIES, sycl_queue=queue)
            queue.wait()
            try:
                oracle.assert_close(on.torch, *want)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_faults():
    cos, sin = (Usm(table) for table in FREQUENCIES.table(10, torch.float32))
    on, positions = Usm(draw(3, 2, 64)), Usm(torch.tensor([1, 99, 3]))
    ropewalk.check_faults()
    ropewalk.rope_(on, positions=positions, cos=cos, sin=sin, sycl_queue=QUEUE)
    with pytest.raises(RuntimeError, match=r"rope: positions\[1\] is 99, but the table has 10 rows"):
        ropewalk.check_faults()
    assert on.torch[1].isnan().all() and not on.torch[[0, 2]].isnan().any()
    ropewalk.check_faults()


class HostAsOneApi(Usm):
    """Memory of the host that says it is oneAPI's. In pages of its own: shared memory of a CPU device comes from the
    same heap as the host's, and Ropewalk keeps what it was told about a page."""

    def __init__(self, values):
        pages = np.frombuffer(mmap.mmap(-1, values.numel() * values.element_size()), dtype=np.uint8)
        self.torch = torch.from_numpy(pages).view(values.dtype).view(values.shape).copy_(values)


@pytest.mark.parametrize(
    ("q", "queue", "error", "words"),
    [
        (draw(3, 2, 64), QUEUE, ValueError, ["sycl_queue is given, but q is on cpu"]),
        (HostAsOneApi(draw(3, 2, 64)), QUEUE, ValueError, ["q must be unified shared memory of", "sycl_queue"]),
        (Usm(draw(3, 2, 64)), "queue", TypeError, ["sycl_queue must be a dpctl.SyclQueue", "str"]),
        (Usm(draw(3, 2, 64)), None, RuntimeError, ["q is on xpu:0"]),
    ],
    ids=["cpu", "host memory", "type", "no queue"],
)  # fmt: skip
def test_refusals(q, queue, error, words):
    with pytest.raises(error) as raised:
        ropewalk.rope_(q, frequencies=FREQUENCIES, sycl_queue=queue)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.skipif(LIBSYCL == "libsycl.so.8", reason="this is that process")
def test_the_same_with_libsycl_8():
    if not (_older / "python" / "dpctl").exists():
        pytest.skip(f"there is no dpctl of libsycl.so.8 in {_older} (scripts/setup.sh full installs it)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    # Under AddressSanitizer: that library's loader frees what the operator new of another libstdc++ gave.
    sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":alloc_dealloc_mismatch=0"
    environment = {**os.environ, "ROPEWALK_TEST_LIBSYCL": "libsycl.so.8", "ASAN_OPTIONS": sanitizer}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 1 skipped" in done.stdout, done.stdout  # this test, and no other
