"""The plugins in SGLang and vLLM, in processes of their own, against stand-ins for the two: tests/engines/*_stub.txt.
`make test-engines` runs the same walks through the engines' own wheels."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import pytest

pytest.importorskip("torch")

from ropewalk import engines
from ropewalk.engines import Engine

ROOT = pathlib.Path(__file__).resolve().parents[2]
WALKS = ROOT / "tests/engines"
UNPACKED = tempfile.TemporaryDirectory()
STUBS = pathlib.Path(UNPACKED.name)
for stub in WALKS.glob("*_stub.txt"):
    _, *parts = re.split(r"^==== (\S+) ====\n", stub.read_text(), flags=re.MULTILINE)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        (STUBS / name).parent.mkdir(parents=True, exist_ok=True)
        (STUBS / name).write_text(text)
VARIABLES = {"sglang": "ROPEWALK_SGLANG", "vllm": "ROPEWALK_VLLM"}
LOAD = {
    "sglang": "from sglang.srt.plugins import load_plugins; load_plugins()",
    "vllm": "from vllm.plugins import load_general_plugins; load_general_plugins()",
}
EXACT = {"float32": 2e-7, "bfloat16": 4e-3}  # of a sum of squares; bfloat16 rounds by up to 2^-9


def environment(path: pathlib.Path = STUBS, **variables: str) -> dict[str, str]:
    names = ("ROPEWALK_SGLANG", "ROPEWALK_VLLM", "SGLANG_PLUGINS", "VLLM_PLUGINS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    inherited = os.environ.get("PYTHONPATH")
    return {**kept, "PYTHONPATH": os.pathsep.join([str(path), *([inherited] if inherited else [])]), **variables}


def python(code: str, path: pathlib.Path = STUBS, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(path, **variables)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def walked() -> Any:
    done: dict[str, Any] = {}

    def walk(engine: str) -> Any:
        if engine not in done:
            program = [sys.executable, str(WALKS / f"{engine}_walk.py")]
            env = environment(**{VARIABLES[engine]: "1"})
            ran = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
            assert ran.returncode == 0, ran.stderr
            done[engine] = json.loads(ran.stdout), ran.stderr
        return done[engine]

    return walk


def tolerance(name: str) -> float:
    return EXACT["float32" if "float32" in name else "bfloat16"]


def test_sglang_layers_are_served(walked: Any) -> None:
    layers = walked("sglang")[0]["layers"]
    assert len(layers) >= 48
    assert {name for name, found in layers.items() if found["served"] != 1} == set()
    assert {name: found for name, found in layers.items() if not found["error"] <= tolerance(name)} == {}
    assert {name for name, found in layers.items() if found["in place"] == ("dual chunk" in name)} == set()


def test_sglang_rotation_stores(walked: Any) -> None:
    stores = walked("sglang")[0]["stores"]
    assert len(stores) == 4
    for name, found in stores.items():
        assert (found["served"], found["stored"], found["others"]) == (1, True, 0), name
        assert found["error"] <= EXACT["bfloat16"], name


def test_sglang_qwen3_is_one_launch(walked: Any) -> None:
    found = walked("sglang")[0]["qwen3"]
    assert set(found) == {f"{name}{store}" for name in ("default", "llama3", "mrope") for store in ("", " stores")}
    for name, one in found.items():
        what = "norm + rope + store" if "stores" in name else "norm + rope"
        assert one["served"] == {f"Qwen3Attention {what}": 1}, name
        assert one["launches"] == 1, name
        assert one["error"] <= EXACT["bfloat16"], name
        assert one["v"], name
        assert one["save"] != ("stores" in name), name  # who writes the cache
        assert one.get("stored", True), name


def test_sglang_functions_are_served(walked: Any) -> None:
    found = walked("sglang")[0]["functions"]
    assert len(found) == 8
    for name, one in found.items():
        assert (one["served"], one["launches"], one["v"], one["stored"]) == (1, 1, True, True), name
        assert one["error"] <= tolerance(name), name


def test_sglang_refused_calls_go_the_engines_way(walked: Any) -> None:
    found, log = walked("sglang")
    assert found["refused"]["calls"] == found["refused"]["counted"] == 5
    assert log.count("a call stays stock") == 1
    assert "q must be float32, float16 or bfloat16, but is float64" in log


def test_vllm_layers_are_served(walked: Any) -> None:
    found = walked("vllm")[0]
    assert len(found["layers"]) == 12
    for part in ("layers", "norms"):
        assert {name for name, one in found[part].items() if one["served"] != 1} == set()
        assert {name: one for name, one in found[part].items() if not one["error"] <= tolerance(name)} == {}
    assert all(one["v"] for one in found["norms"].values())


def test_vllm_backend_stores(walked: Any) -> None:
    stores = walked("vllm")[0]["stores"]
    assert len(stores) == 9
    for name, one in stores.items():
        assert (one["asked"], one["served"], one["others"]) == (True, 1, 0), name
        assert one["error"] <= tolerance(name), name
        rounded = 2**-4 if "fp8" in name else tolerance(name)  # e4m3 has three bits behind the first
        assert one["keys"] <= rounded and one["values"] <= rounded, name
        assert "fp8" in name or one["values"] == 0, name


def test_vllm_refused_calls_go_to_its_kernel(walked: Any) -> None:
    found, _ = walked("vllm")
    assert (found["stock before"], found["stock after"]) == (0, 1)
    assert list(found["stays_stock"].values()) == [1]


@pytest.mark.parametrize("engine", LOAD)
def test_one_line_says_what_is_served(walked: Any, engine: str) -> None:
    lines = [line for line in walked(engine)[1].splitlines() if " serves " in line]
    assert len(lines) == 1
    assert "; stock: " in lines[0]


def test_off_unless_asked() -> None:
    """Neither loader imports a rotary layer then, and nothing is said."""
    code = f"""import sys
{LOAD["sglang"]}
{LOAD["vllm"]}
print([name for name in sys.modules if "rotary" in name and "ropewalk" not in name])"""
    ran = python(code, ROPEWALK_VLLM="0", VLLM_PLUGINS="ropewalk", SGLANG_PLUGINS="other")
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr
    assert "ropewalk" not in ran.stderr


@pytest.mark.parametrize(
    ("value", "plugins", "asked"),
    [("", "", False), ("0", "", False), ("1", "", True), ("", "other, ropewalk", True), ("0", "ropewalk", False),
     ("1", "other", True), ("", "other", False), ("yes", "", False)],
)  # fmt: skip
@pytest.mark.parametrize("engine", VARIABLES)
def test_who_asks(
    engine: str, value: str, plugins: str, asked: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv(VARIABLES[engine], value)
    monkeypatch.setenv(f"{engine.upper()}_PLUGINS", plugins)
    assert Engine(engine, "test").asked() == asked
    said = [f"ropewalk: {VARIABLES[engine]} must be 0 or 1, but is 'yes': {engine} stays stock"]
    assert caplog.messages == (said if value == "yes" else [])


@pytest.mark.parametrize("engine", VARIABLES)
@pytest.mark.parametrize(
    ("version", "said"),
    [("99.0", "but is 99.0: everything stays stock"), ("0.33.0rc1", "but is 0.33.0rc1: everything stays stock"),
     ("0.5.20", "but is 0.5.20: everything stays stock"), (None, "is not installed: nothing is served")],
)  # fmt: skip
def test_an_unknown_version_stays_stock(
    engine: str, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def found(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setenv(VARIABLES[engine], "1")
    monkeypatch.setattr(importlib.metadata, "version", found)
    calls: list[int] = []
    Engine(engine, "test").register(lambda: calls.append(1))
    assert calls == []
    assert len(caplog.messages) == 1 and said in caplog.messages[0]


@pytest.mark.parametrize("version", [1, 0, -1], ids=["between", "oldest", "newest"])
@pytest.mark.parametrize("engine", VARIABLES)
def test_a_known_version_is_served(engine: str, version: int, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    one = engines._known[engine]["versions"][version]
    monkeypatch.setenv(VARIABLES[engine], "1")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: one + "+cu130")
    calls: list[int] = []
    Engine(engine, "test").register(lambda: calls.append(1))
    assert calls == [1]
    assert caplog.messages == [f"ropewalk in {engine} {one}+cu130 serves nothing"]


def test_the_ends_of_what_is_known_are_those_that_are_tested() -> None:
    """`make test-engines` unpacks the wheels of requirements/pins.txt."""
    sections = (ROOT / "requirements/pins.txt").read_text().split("\n[")
    for engine, known in engines._known.items():
        order = [tuple(map(int, version.split("."))) for version in known["versions"]]
        assert order == sorted(order)
        for end, place in (("oldest", 0), ("newest", -1)):
            (pins,) = (section for section in sections if section.startswith(f"engines-{end} "))
            assert f"{engine}=={known['versions'][place]}" in pins.splitlines()


def test_what_has_other_parameters_stays_stock(tmp_path: pathlib.Path) -> None:
    """A layer and an operator with one argument more than the glue knows; the engines' own lists ask."""
    shutil.copytree(STUBS, tmp_path, dirs_exist_ok=True)
    for name, old, new in (
        ("sglang/srt/layers/rotary_embedding/bailing_mrope.py", "def forward(self, positions,",
         "def forward(self, layer_id, positions,"),
        ("vllm/_custom_ops.py", "Tensor! qkv, int", "Tensor! qkv, int layer, int"),
    ):  # fmt: skip
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
    code = f"""{LOAD["sglang"]}
{LOAD["vllm"]}
from sglang.srt.layers.rotary_embedding.bailing_mrope import BailingMRotaryEmbedding as cls
print(hasattr(cls.forward, "__wrapped__"))"""
    ran = python(code, tmp_path, SGLANG_PLUGINS="other,ropewalk", VLLM_PLUGINS="ropewalk")
    assert ran.stdout.strip() == "False", ran.stderr
    assert "BailingMRotaryEmbedding.forward (its parameters are self layer_id positions" in ran.stderr
    assert "_C::fused_qk_norm_rope (its parameters are qkv layer num_heads_q" in ran.stderr
    assert "serves _C::rotary_embedding, vllm::mrope;" in ran.stderr


def doctor(folder: pathlib.Path, installed: dict[str, str], **variables: str) -> dict[str, Any]:
    """What `ropewalk doctor` says where the command lies beside such packages."""
    packages = folder / "lib/python3.11/site-packages"
    (packages / "ropewalk/engines").mkdir(parents=True)
    (folder / "bin").mkdir()
    shutil.copy(pathlib.Path(sys.executable).with_name("ropewalk"), folder / "bin/ropewalk")
    known = pathlib.Path(engines.__file__).with_name("known.json")
    shutil.copy(known, packages / "ropewalk/engines/known.json")
    for name, version in installed.items():
        (packages / f"{name}-{version}.dist-info").mkdir()
    command, env = [str(folder / "bin/ropewalk"), "doctor", "--json"], environment(**variables)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ran.returncode == 0, ran.stderr
    return {engine["name"]: engine for engine in json.loads(ran.stdout)["engines"]}


def test_doctor_tells_of_both(tmp_path: pathlib.Path) -> None:
    told = doctor(tmp_path / "a", {"sglang": "0.5.23", "sglang_router": "0.1"})
    assert told["sglang"] == {
        "name": "sglang", "version": "0.5.23", "serves": False, "why": "not asked: set ROPEWALK_SGLANG=1",
    }  # fmt: skip
    assert told["vllm"] == {"name": "vllm", "version": "", "serves": False, "why": "not installed"}
    told = doctor(tmp_path / "b", {"sglang": "0.5.23+cu13", "vllm": "0.40.0"}, SGLANG_PLUGINS="a, ropewalk",
                  ROPEWALK_VLLM="1")  # fmt: skip
    assert (told["sglang"]["serves"], told["sglang"]["why"]) == (True, "")
    assert told["vllm"]["why"] == "the plugin knows 0.31.0, 0.32.0, 0.33.0"
    told = doctor(tmp_path / "c", {"sglang": "0.5.23"}, SGLANG_PLUGINS="ropewalk", ROPEWALK_SGLANG="0")
    assert not told["sglang"]["serves"]
