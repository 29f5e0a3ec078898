"""The backend `opencl` from Python: tensors on the CPU where it is forced, and tensors that say they are OpenCL's."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import ropewalk
import torch
from ropewalk.compat import sgl_kernel, sgl_kernel_xpu, sglang_jit

# Intel's CPU device alone, for both loaders of OpenCL: before anything opens one.
_runtime = Path(sys.prefix) / "lib" / "libintelocl.so"
if _runtime.exists():
    os.environ.setdefault("OCL_ICD_VENDORS", str(_runtime))
    os.environ.setdefault("OCL_ICD_FILENAMES", str(_runtime))
_opencl = next(b for b in ropewalk.backends() if b["name"] == "opencl")
if not _opencl["available"]:
    if os.environ.get("ROPEWALK_TEST_OPENCL") == "required":
        pytest.fail(f"there is no OpenCL device: {_opencl['detail']}; {_opencl['remedy']}", pytrace=False)
    pytest.skip(f"there is no OpenCL device: {_opencl['detail']}", allow_module_level=True)

FREQUENCIES = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
POSITIONS = [0, 1, 2047, -5, 2**31 - 1]
DL_OPENCL = 4


@pytest.fixture
def forced():
    ropewalk.force_backend("opencl")
    yield
    ropewalk.force_backend(None)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def launches(backend):
    return sum(count for kernel, count in ropewalk.counters().items() if kernel.startswith(backend))


def want(x, positions=range(5), **options):
    return oracle.rope(x, oracle.exact_angles(FREQUENCIES.inv_freq, positions), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_tensors_on_the_cpu(forced, dtype):
    q, k = draw(5, 4, 64, dtype=dtype), draw(5, 2, 64, dtype=dtype, seed=1)
    got_q, got_k = q.clone(), k.clone()
    before, on_cpu = launches("opencl "), launches("cpu:")
    ropewalk.rope_(got_q, got_k, positions=torch.tensor(POSITIONS), frequencies=FREQUENCIES, norm="rms")
    assert launches("opencl ") == before + 1 and launches("cpu:") == on_cpu
    for x, got in ((q, got_q), (k, got_k)):
        oracle.assert_close(got, *want(x, POSITIONS, norm=True))
    new_q, new_k = ropewalk.rope(q, k, positions=torch.tensor(POSITIONS), frequencies=FREQUENCIES, norm="rms")
    assert torch.equal(new_q, got_q) and torch.equal(new_k, got_k)


def test_numpy_arrays(forced):
    q = draw(5, 4, 64)
    got = q.numpy().copy()
    ropewalk.rope_(got, positions=np.array(POSITIONS), frequencies=FREQUENCIES)
    oracle.assert_close(torch.from_numpy(got), *want(q, POSITIONS))
    new = ropewalk.rope(q.numpy(), positions=np.array(POSITIONS), frequencies=FREQUENCIES)[0]
    assert isinstance(new, np.ndarray) and np.array_equal(new, got)


def test_explain_names_the_backend_once(forced):
    explanation = ropewalk.explain(draw(5, 4, 64), frequencies=FREQUENCIES)
    assert explanation["backend"] == "opencl"
    assert explanation["kernel"].startswith("opencl float32") and explanation["kernel"].count("opencl") == 1
    assert explanation["device"].startswith("opencl:0 ")


def test_faults(forced):
    cos, sin = FREQUENCIES.table(10, torch.float32)
    q = draw(3, 2, 64)
    ropewalk.check_faults()
    ropewalk.rope_(q, positions=torch.tensor([1, 99, 3]), cos=cos, sin=sin)
    with pytest.raises(RuntimeError, match=r"rope: positions\[1\] is 99, but the table has 10 rows"):
        ropewalk.check_faults()
    assert q[1].isnan().all() and not q[[0, 2]].isnan().any()


def test_the_forced_backend_is_the_one_that_is_asked(forced, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert sglang_jit.can_use_fused_qk_norm_rope(64, True, torch.float32, num_heads_q=2, num_heads_k=1, num_heads_v=1)
    qkv, weight = draw(1, 4 * 64), torch.ones(64)
    q, k = qkv.view(1, 4, 64)[:, :2], qkv.view(1, 4, 64)[:, 2:3]
    explanation = ropewalk.explain(q, k, positions=torch.zeros(1, dtype=torch.int32), frequencies=FREQUENCIES,
                                   q_weight=weight, k_weight=weight)  # fmt: skip
    assert explanation["backend"] == "opencl" and explanation["source"].startswith("memory")  # it was built then


@pytest.mark.parametrize("is_neox", [True, False])
def test_the_functions_of_other_libraries(forced, is_neox):
    q, k = draw(5, 4, 96), draw(5, 2, 96, seed=1)
    cache = torch.cat(FREQUENCIES.table(8, torch.float32), dim=-1)
    positions = torch.tensor([7, 0, 3, 3, 1])
    expected = [ropewalk.rope(x, positions=positions, cos_sin=cache, pairing="neox" if is_neox else "interleaved")[0]
                for x in (q, k)]  # fmt: skip
    for x, got in zip((q, k), expected, strict=True):
        oracle.assert_close(got, *want(x, positions.tolist(), pairing="neox" if is_neox else "interleaved"))
    before = launches("opencl ")
    got = q.clone(), k.clone()
    sgl_kernel_xpu.fused_qk_rope_with_cos_sin_cache_inplace(*got, cache, positions, 64, is_neox)
    assert all(map(torch.equal, got, expected))
    for module in (sgl_kernel, sglang_jit):
        got = q.clone(), k.clone()
        module.rotary_embedding(positions, got[0].view(5, -1), got[1].view(5, -1), 96, cache, is_neox)
        assert all(map(torch.equal, got, expected))
    new = sgl_kernel_xpu.rotary_embedding(positions, q, k, 96, cache, is_neox)
    assert all(map(torch.equal, new, expected))
    assert launches("opencl ") == before + 4


def test_the_others_serve_again_afterwards():
    ropewalk.force_backend("opencl")
    ropewalk.force_backend(None)
    q = draw(5, 4, 64)
    before = launches("cpu:")
    ropewalk.rope_(q, frequencies=FREQUENCIES)
    assert launches("cpu:") == before + 1


# ---- tensors that say they are OpenCL's: pointers to memory that the device shares


class OnOpenCl:
    """Memory of the host, which a CPU device shares, as a DLPack producer for OpenCL would hand it over."""

    def __init__(self, tensor, device=0):
        self.torch, self.device = tensor, device

    def __dlpack_device__(self):
        return DL_OPENCL, self.device

    def __dlpack__(self, **_):
        capsule = self.torch.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # A DLManagedTensor begins with the data's address, then the device.
        address = pointer(capsule, b"dltensor") + 8
        ctypes.c_int32.from_address(address).value = DL_OPENCL
        ctypes.c_int32.from_address(address + 4).value = self.device
        return capsule


def test_tensors_of_opencl():
    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    on_q, on_k = OnOpenCl(q.clone()), OnOpenCl(k.clone())
    before = launches("opencl ")
    assert ropewalk.can_use(on_q, on_k, frequencies=FREQUENCIES)
    ropewalk.rope_(on_q, on_k, frequencies=FREQUENCIES)  # no queue: waits
    assert launches("opencl ") == before + 1
    for x, on in ((q, on_q), (k, on_k)):
        oracle.assert_close(on.torch, *want(x))


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"rope: k must be on the device of q \(opencl:0\), but is on cpu"):
        ropewalk.rope_(OnOpenCl(draw(5, 4, 64)), draw(5, 2, 64), frequencies=FREQUENCIES)


def test_a_device_that_is_not_there():
    on = OnOpenCl(draw(5, 4, 64), device=9)
    with pytest.raises(ValueError, match=r"rope: q is on opencl:9, but there (is|are) \d+ OpenCL device"):
        ropewalk.rope_(on, frequencies=FREQUENCIES)


def test_without_opencl_the_reason_and_the_remedy_are_told():
    code = "import ropewalk; ropewalk.force_backend('opencl')"
    environment = {**os.environ, "ROPEWALK_LIBOPENCL": "/nowhere/libOpenCL.so"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: force_backend: ROPEWALK_LIBOPENCL names /nowhere/libOpenCL.so" in done.stderr
    assert "install an OpenCL loader" in done.stderr
