"""The plugins in the engines' own code: the Python of their wheels, of the newest and the oldest versions that they
serve, as `make test-engines` unpacks it. On the CPU; with a GPU on its tensors too, as they are and in graphs. What the
walks stand in for is named there; the operators of vLLM, in C++, are declared anew. And the gradients of
`ropewalk.compat` beside those of Liger's and flash-attn's own code."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

import pytest
import signatures
import torch
from ropewalk import engines

WALKS = pathlib.Path(__file__).parent
ENGINES = pathlib.Path(os.environ["ROPEWALK_TEST_ENGINES"])  # newest/ENGINE, oldest/ENGINE, and what they import
ENDS = ("newest", "oldest")
RUNS = ("cpu", "cuda", "cuda in graphs") if torch.cuda.is_available() else ("cpu",)
VARIABLES = {
    "sglang": {"ROPEWALK_SGLANG": "1"},
    "vllm": {"ROPEWALK_VLLM": "1"},
}
EXACT = {"float32": 3e-7, "bfloat16": 5e-3}
ROUNDED_ANGLES = 3e-6
PARTS = {
    "layers": "rotary layers", "norms": "norm + rotation", "stores": "with a store", "qwen3": "of Qwen3's attention",
    "functions": "functions",
}  # fmt: skip


def process(engine: str, end: str, device: str) -> subprocess.CompletedProcess[str]:
    folders = [str(ENGINES / end / engine), str(ENGINES / "packages")]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **VARIABLES[engine]}
    if device == "cuda":
        env |= {"TORCH_COMPILE_DISABLE": "1"}  # of parts of SGLang's native forwards
    elif engine == "sglang":
        env |= {"SGLANG_USE_CPU_ENGINE": "1"}
    program = [sys.executable, str(WALKS / f"{engine}_walk.py"), device]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def walked(request: pytest.FixtureRequest) -> Any:
    """`walk(engine, end, run)`: what a process found, and said. Those that will be asked for run side by side, one for
    four cores."""
    pool = concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4))
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {(each["engine"], each["end"], each["run"].split()[0]) for each in params if "run" in each}
    done = {one: pool.submit(process, *one) for one in sorted(asked)}

    def walk(engine: str, end: str, run: str) -> Any:
        ran = done[engine, end, run.split()[0]].result()
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout.splitlines()[-1])
        return found["graph"] if "graphs" in run else found, ran.stderr

    return walk


def within(name: str, found: dict) -> bool:
    """Exact in float32; with 16 bits no further from the formula than the stock layer, by a tenth."""
    if "float32" in name:
        return found["error"] <= EXACT["float32"]
    return found["error"] <= max(1.1 * found.get("stock", 0.0), EXACT["bfloat16"])


def of(*names: str) -> Any:
    """For each of these engines, both ends and all devices."""
    runs = [(engine, end, run) for run in RUNS for end in ENDS for engine in names]
    return pytest.mark.parametrize(("engine", "end", "run"), runs)


@of("sglang", "vllm")
def test_layers_are_served(walked: Any, engine: str, end: str, run: str) -> None:
    layers = walked(engine, end, run)[0]["layers"]
    assert len(layers) >= {"sglang": 46, "vllm": 12}[engine]
    assert {name for name, found in layers.items() if found["served"] != 1} == set()
    assert {name: found for name, found in layers.items() if not within(name, found)} == {}


@of("sglang")
def test_sglang_rotation_stores(walked: Any, engine: str, end: str, run: str) -> None:
    stores = walked(engine, end, run)[0]["stores"]
    assert len(stores) == 4
    for name, found in stores.items():
        assert (found["served"], found["stored"], found["others"]) == (1, True, 0), name
        assert found["launches"] == 1 and within(name, found), name


@of("sglang")
def test_sglang_qwen3_is_one_launch(walked: Any, engine: str, end: str, run: str) -> None:
    found = walked(engine, end, run)[0]["qwen3"]
    assert len(found) == 6
    for name, one in found.items():
        what = "norm + rope + store" if "stores" in name else "norm + rope"
        assert one["served"] == {f"Qwen3Attention {what}": 1}, name
        assert (one["launches"], one["v"], one["save"]) == (1, True, "stores" not in name), name
        assert one["error"] <= EXACT["bfloat16"] and one.get("stored", True), name


@of("sglang")
def test_sglang_functions_are_served(walked: Any, engine: str, end: str, run: str) -> None:
    found = walked(engine, end, run)[0]["functions"]
    assert len(found) == 8
    for name, one in found.items():
        assert (one["served"], one["launches"], one["v"], one["stored"]) == (1, 1, True, True), name
        # Without a table the angles are exact; those of the native forward's table are products in float32.
        assert within(name, one) or ("fused_qk_norm_rope float32" in name and one["error"] <= ROUNDED_ANGLES), name


@of("vllm")
def test_vllm_norms_and_stores(walked: Any, engine: str, end: str, run: str) -> None:
    found = walked(engine, end, run)[0]
    assert (len(found["norms"]), len(found["stores"])) == (6, 9)
    for name, one in found["norms"].items():
        assert (one["served"], one["launches"], one["v"]) == (1, 1, True) and within(name, one), name
    for name, one in found["stores"].items():
        assert (one["asked"], one["served"], one["launches"], one["others"]) == (True, 1, 1, 0), name
        assert within(name, one), name
        # e4m3 has three bits behind the first
        assert max(one["keys"], one["values"]) <= (2**-4 if "fp8" in name else EXACT[name.split()[-1]]), name


@of("vllm")
def test_vllm_calls_its_own_kernel_where_one_is_refused(walked: Any, engine: str, end: str, run: str) -> None:
    found = walked(engine, end, run.split()[0])[0]
    assert (found["stock before"], found["stock after"]) == (0, 1)


@of("sglang", "vllm")
def test_the_loader_says_it(walked: Any, engine: str, end: str, run: str) -> None:
    """One line, of this version, in which nothing stays stock that the glue knows."""
    found, log = walked(engine, end, run)
    said = [line for line in log.splitlines() if f"ropewalk in {engine} " in line]
    versions = engines._known[engine]["versions"]
    version = versions[0 if end == "oldest" else -1]
    assert len(said) == 1
    assert f"ropewalk in {engine} {version} serves " in said[0]
    assert "its parameters are" not in said[0] and "No module named" not in said[0]
    if counts := os.environ.get("ROPEWALK_TEST_COUNTS"):
        parts = [f"{len(found[part])} {what}" for part, what in PARTS.items() if part in found]
        whole = walked(engine, end, run.split()[0])[0]
        with pathlib.Path(counts).open("a") as file:
            file.write(f"{engine} {version} on {run}: {', '.join(parts)}; stood in: {', '.join(whole['stands in'])}\n")


def test_the_slot_of_transformers(tmp_path: pathlib.Path) -> None:
    """transformers takes versions of `kernels` that PyPI does not have: the newest there is given such a number."""
    shutil.copytree(ENGINES / "packages/kernels", tmp_path / "kernels")
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(WALKS / "kernels_walk.py")]
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    for name, one in found["patched"].items():
        assert one["layers"] == 2 and one["apart"] < 1e-5, name
    for name, one in found["slot"].items():
        assert one["logits"] < 1e-5 and one["gradients"] < 1e-5, name
        stock = name == "nanochat"  # which turns otherwise
        assert one["launches"] == (0 if stock else 4), name  # two layers, there and back


def test_signatures_are_those_that_are_recorded() -> None:
    """`make test` holds `ropewalk.compat` to the record."""
    folders = [
        *(ENGINES / name for name in ("newest/sglang", "newest/vllm", "packages")),
        pathlib.Path(sysconfig.get_path("purelib")),
    ]
    found, recorded = signatures.read(folders), signatures.recorded()
    assert {each["package"] for each in found.values()} >= {
        "sglang",
        "vllm",
        "liger-kernel",
        "diffusers",
        "transformers",
    }
    assert len(found) >= 25
    for name, each in found.items():
        assert each["parameters"] == recorded[name]["parameters"], (name, each["version"])


def test_gradients_are_those_of_the_originals() -> None:
    path = os.pathsep.join([str(ENGINES / "newest/vllm"), str(ENGINES / "packages"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(WALKS / "gradients_walk.py")]
    ran = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 15
    assert {name: errors for name, errors in found.items() if not max(errors) <= 2e-6} == {}
