"""What importing Ropewalk needs and costs."""

# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ropewalk

HEADER = Path(__file__).parents[2] / "include/ropewalk/ropewalk.h"


def python(code, *, block=()):
    """Runs code in a new Python in which some packages cannot be imported."""
    blocker = f"import sys\nfor name in {list(block)!r}: sys.modules[name] = None\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-c", blocker + code], capture_output=True, text=True, env=environment)


def test_version_agrees_with_the_header():
    numbers = re.findall(r"#define ROPEWALK_VERSION_\w+ (\d+)", HEADER.read_text())
    assert ropewalk.__version__ == ".".join(numbers)
    try:
        assert importlib.metadata.version("ropewalk") == ropewalk.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed as a wheel")


# 3.0 MB held until plans proved themselves, the CUDA kernel's shapes came from a table, configurations were refused by
# a table of all known types, and the library was hardened (stack clash, protectors, _FORTIFY_SOURCE): together 0.25 MB.
# The gradient is a second operation: 0.2 MB, 90 KB of it a kernel for each CPU target, as much its SPIR-V; linking
# rounds to pages. GCC 14 and clang 19, as Debian 13 has them, make 0.07 MB more of the same than 12 and 15 do.
# 0.13 MB went with libstdc++'s text of floats.
def test_the_module_which_holds_the_whole_library_is_small():
    if os.environ.get("ROPEWALK_SANITIZED"):
        pytest.skip("built with sanitizers")
    module = (Path(ropewalk.__file__).parent / "_ropewalk.so").read_bytes()
    compilers = [int(version) for version in re.findall(rb"GCC: \([^)]*\) (\d+)", module)]
    assert len(module) <= (3_600_000 if max(compilers, default=0) > 12 else 3_500_000)


def test_without_torch():
    code = """
import numpy as np, ropewalk
assert sys.modules.get("torch") is None
f = ropewalk.Frequencies(1e4, 64)
q = np.ones((3, 2, 64), dtype=np.float32)
new, _ = ropewalk.rope(q, frequencies=f)
ropewalk.rope_(q, frequencies=f)
assert np.array_equal(q, new) and not (q == 1).all()
ropewalk.set_threads(2); ropewalk.set_threads(None)
try:
    ropewalk.rope_([1], frequencies=f)
except TypeError as error:
    assert "q must be a tensor" in str(error)
else:
    raise SystemExit("a list was taken")
print("done")
"""
    result = python(code, block=["torch"])
    assert result.stdout.strip() == "done", result.stderr


def test_without_torch_and_numpy():
    code = """
import ropewalk
f = ropewalk.Frequencies(1e4, 64)
assert isinstance(f.inv_freq, list) and f.inv_freq[0] == 1.0
try:
    f.table(4)
except ValueError as error:
    assert "numpy" in str(error)
print("done")
"""
    result = python(code, block=["torch", "numpy"])
    assert result.stdout.strip() == "done", result.stderr


def test_import_does_not_pull_in_more():
    code = """
import ropewalk
print([name for name in ("transformers", "diffusers", "scipy", "inspect") if name in sys.modules and name != "inspect"])
"""
    assert python(code, block=["torch"]).stdout.strip() == "[]"


def test_module_runs_the_command():
    result = subprocess.run([sys.executable, "-m", "ropewalk", "--help"], capture_output=True, text=True)
    if "is not installed" in result.stderr:
        pytest.skip("the ropewalk command is not installed")
    assert result.returncode == 0 and "ropewalk" in result.stdout


def test_tvm_ffi_is_the_one_that_the_run_is_for():
    wanted = os.environ.get("ROPEWALK_TEST_TVM_FFI")
    if not wanted:
        pytest.skip("any will do")
    assert importlib.metadata.version("apache-tvm-ffi") == wanted
    assert Path(sys.modules["tvm_ffi"].__file__).is_relative_to(Path(os.environ["PYTHONPATH"]))
