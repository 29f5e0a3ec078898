"""The plugins in the engines' own code: the Python of their wheels, of the newest and the oldest versions that they
serve, as `make test-engines` unpacks it. What the walks stand in for is named there; the operators of vLLM, in C++, are
declared anew. And the gradients of `ropewalk.compat` beside those of Liger's and flash-attn's own code."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

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
from ropewalk import engines

WALKS = pathlib.Path(__file__).parent
ENGINES = pathlib.Path(os.environ["ROPEWALK_TEST_ENGINES"])  # newest/ENGINE, oldest/ENGINE, and what they import
ENDS = ("newest", "oldest")
VARIABLES = {
    "sglang": {"ROPEWALK_SGLANG": "1", "SGLANG_USE_CPU_ENGINE": "1"},
    "vllm": {"ROPEWALK_VLLM": "1"},
}
EXACT = {"float32": 3e-7, "bfloat16": 5e-3}


@pytest.fixture(scope="module")
def walked() -> Any:
    done: dict[str, Any] = {}

    def walk(engine: str, end: str) -> Any:
        if (engine, end) not in done:
            folders = [str(ENGINES / end / engine), str(ENGINES / "packages")]
            path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
            program = [sys.executable, str(WALKS / f"{engine}_walk.py")]
            ran = subprocess.run(program, capture_output=True, text=True, check=False,
                                 env={**os.environ, "PYTHONPATH": path, **VARIABLES[engine]})  # fmt: skip
            done[engine, end] = ran
        ran = done[engine, end]
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1]), ran.stderr

    return walk


def within(name: str, found: dict) -> bool:
    """Exact in float32; with 16 bits no further from the formula than the stock layer, by a tenth."""
    if "float32" in name:
        return found["error"] <= EXACT["float32"]
    return found["error"] <= max(1.1 * found.get("stock", 0.0), EXACT["bfloat16"])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("engine", VARIABLES)
def test_layers_are_served(walked: Any, engine: str, end: str) -> None:
    layers = walked(engine, end)[0]["layers"]
    assert len(layers) >= {"sglang": 46, "vllm": 12}[engine]
    assert {name for name, found in layers.items() if found["served"] != 1} == set()
    assert {name: found for name, found in layers.items() if not within(name, found)} == {}


@pytest.mark.parametrize("end", ENDS)
def test_sglang_rotation_stores(walked: Any, end: str) -> None:
    stores = walked("sglang", end)[0]["stores"]
    assert len(stores) == 4
    for name, found in stores.items():
        assert (found["served"], found["stored"], found["others"]) == (1, True, 0), name


@pytest.mark.parametrize("end", ENDS)
def test_sglang_qwen3_is_one_launch(walked: Any, end: str) -> None:
    found = walked("sglang", end)[0]["qwen3"]
    assert len(found) == 6
    for name, one in found.items():
        what = "norm + rope + store" if "stores" in name else "norm + rope"
        assert one["served"] == {f"Qwen3Attention {what}": 1}, name
        assert (one["launches"], one["v"], one["save"]) == (1, True, "stores" not in name), name
        assert one["error"] <= EXACT["bfloat16"] and one.get("stored", True), name


@pytest.mark.parametrize("end", ENDS)
def test_vllm_norms_and_stores(walked: Any, end: str) -> None:
    found = walked("vllm", end)[0]
    assert all(one["served"] == 1 and one["v"] and within(name, one) for name, one in found["norms"].items())
    assert all(one["asked"] and one["served"] == 1 and not one["others"] for one in found["stores"].values())
    assert found["stock before"] == 0


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("engine", VARIABLES)
def test_the_loader_says_it(walked: Any, engine: str, end: str) -> None:
    """One line, of this version, in which nothing stays stock that the glue knows."""
    said = [line for line in walked(engine, end)[1].splitlines() if f"ropewalk in {engine} " in line]
    versions = engines._known[engine]["versions"]
    assert len(said) == 1
    assert f"ropewalk in {engine} {versions[0 if end == 'oldest' else -1]} serves " in said[0]
    assert "its parameters are" not in said[0] and "No module named" not in said[0]


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
    path = os.pathsep.join([str(ENGINES / "vllm"), str(ENGINES / "packages"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(WALKS / "gradients_walk.py")]
    ran = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 15
    assert {name: errors for name, errors in found.items() if not max(errors) <= 2e-6} == {}
