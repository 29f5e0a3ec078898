"""bench/engines.py in small, on the CPU: it runs, its contenders agree, and what it writes can be read."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
FILE = Path(__file__).resolve().parents[2] / "bench/engines.py"


@pytest.fixture()
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_engines", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_engines", module)
    spec.loader.exec_module(module)
    return module


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> Any:
    program = ["engines.py", "--device", "cpu", "--tiny", "--cell-seconds", "0.01",
               "--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md"), *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", program)
    bench.main()
    return json.loads((tmp_path / "found.json").read_text()), (tmp_path / "found.md").read_text()


@pytest.mark.parametrize("plain", [True, False])
def test_every_model_runs_and_agrees_with_stock(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: bool
) -> None:
    if not plain and bench.transformers is None:
        pytest.skip("transformers is not installed")
    found, table = run(bench, monkeypatch, tmp_path, "--modes", "eager", *(["--plain"] if plain else []))
    assert found["left"] == []
    steps = {(row["model"], row["step"]) for row in found["rows"]}
    assert len(steps) == len(found["rows"]) == (3 if plain else 4) * 3 + 2
    for row in found["rows"]:
        assert row["apart"] < 1e-4 and row["mode"] == "eager"
        ways = {"stock", "ropewalk", "left out"} | ({"store"} if plain and row["step"].startswith("decode") else set())
        assert set(row["us"]) == ways and all(us > 0 for us in row["us"].values())
        assert set(row["share"]) == ways - {"left out"}
        is_plain = plain or row["model"] in ("Flux", "Wan")
        assert row["source"] == ("plain torch" if is_plain else f"transformers {bench.transformers.__version__}")
    assert table.count("\n| ") == len(found["rows"]) + 1


def test_compiled_layers_and_the_end_of_the_time(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--plain", "--models", "Qwen3-8B,Flux", "--modes", "compile", "--backend", "aot_eager"]
    found, _ = run(bench, monkeypatch, tmp_path, *options)
    assert [row["mode"] for row in found["rows"]] == ["compile"] * 4 and found["left"] == []
    with pytest.raises(SystemExit, match="nothing was measured"):
        run(bench, monkeypatch, tmp_path, *options, "--seconds", "0")
    table = (tmp_path / "found.md").read_text()
    assert table.count("Not measured: ") == 4 and "Flux, 5 + 8 tokens, compile" in table


def test_a_wrong_result_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.ropewalk, "rope_", lambda q, k, **options: (q, k))
    with pytest.raises(SystemExit, match="Qwen3-8B, decode, 1 sequence: (ropewalk|store) differs from stock"):
        run(bench, monkeypatch, tmp_path, "--plain", "--models", "Qwen3-8B", "--modes", "eager")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == [] and len(found["wrong"]) == 3


@pytest.mark.parametrize("wrong", [["--models", "GPT-2"], ["--modes", "graph"], ["--modes", "jit"]])
def test_wrong_arguments(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(bench, monkeypatch, tmp_path, *wrong)
    assert ended.value.code == 2
