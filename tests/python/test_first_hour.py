"""What newcomers do wrong gets the sentence that mends it; what they look at says what it is; the scripts and examples
that they run first say what they do and find their own results right."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import traceback
import typing
from pathlib import Path

import pytest
import ropewalk
from ropewalk import _module
from ropewalk._arrays import SupportsDLPack

numpy = pytest.importorskip("numpy")
ROOT = Path(__file__).parents[2]
F = ropewalk.Frequencies(theta=1e6, rotary_dim=128)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def heads(*shape: int):
    return numpy.ones(shape, "f")


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: ropewalk.Frequencies(1e4, 128, scaling={"factor": 2.0}), ValueError, "scaling has no rope_type"),
        (lambda: ropewalk.Frequencies(1e4, 128, scaling="yarn"), TypeError, "scaling must be a dict"),
        (lambda: ropewalk.Frequencies.from_array(numpy.ones((2, 3))), ValueError, "1 dimension, but has 2: [2, 3]"),
        (lambda: F.table(4, "float64"), ValueError, "float32, float16 or bfloat16, but is float64"),
        (lambda: ropewalk.rope_(heads(2, 2, 128), frequencies=F, pairing="gptj"), ValueError, "'interleaved' here"),
        (lambda: ropewalk.rope_(heads(2, 2, 128), frequencies=F, pairing="what"), ValueError, "but is 'what'"),
        (lambda: ropewalk.rope_(heads(1, 32, 7, 128), heads(1, 8, 7, 128), frequencies=F), ValueError, "transposed"),
    ],
)
def test_the_sentence_that_mends_it(call, kind, words) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)


def test_a_model_is_not_a_name() -> None:
    pytest.importorskip("torch")
    from ropewalk.transformers import patch  # noqa: PLC0415

    with pytest.raises(TypeError, match="model must be a transformers model"):
        patch("meta-llama/Llama-3.1-8B")


def test_numpys_bools_are_bools() -> None:
    want = ropewalk.rope(heads(2, 2, 128), frequencies=F, inverse=True)[0]
    assert (ropewalk.rope(heads(2, 2, 128), frequencies=F, inverse=numpy.bool_(True))[0] == want).all()


def test_frequencies_say_what_they_are() -> None:
    assert repr(F) == "<ropewalk.Frequencies of rotary_dim 128, theta 1e+06>"
    assert "theta 10000, yarn, attention_scaling=1.13" in repr(ropewalk.Frequencies(1e4, 128, YARN))
    assert repr(ropewalk.Frequencies.from_array([1.0, 0.5], axes=[0, 2])).endswith("rotary_dim 4, 3 axes>")
    config = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4}
    assert "rotary_dim 64, from " in repr(ropewalk.Frequencies.from_config(config))


def test_equal_frequencies_are_equal() -> None:
    again = pickle.loads(pickle.dumps(F))
    assert again == F
    assert hash(again) == hash(F)
    assert F != ropewalk.Frequencies(1e4, 128)
    assert F != ropewalk.Frequencies(1e6, 128, YARN)
    assert F != 128


def test_completion_offers_what_is_meant_to_be_used() -> None:
    assert set(ropewalk.__all__) <= set(dir(ropewalk))
    assert not {"Any", "TYPE_CHECKING", "annotations", "json", "inspect"} & set(dir(ropewalk))


@pytest.mark.parametrize("name", ["rope", "prepare", "can_use", "explain"])
def test_help_shows_the_keywords(name: str) -> None:
    shown = inspect.signature(getattr(ropewalk, name))
    assert list(shown.parameters) == list(inspect.signature(ropewalk.rope_).parameters)


def test_tensors_have_a_type_and_choices_are_named() -> None:
    hints = typing.get_type_hints(ropewalk.rope_)
    for arg in _module.description():
        hint = hints[arg["name"]]
        parts = set(typing.get_args(hint)) or {hint}
        if arg["kind"] == "tensor":
            optional = {type(None)} if arg["default"] == "None" else set()
            assert parts == {SupportsDLPack} | optional | ({float} if arg["host_scalar"] else set()), arg["name"]
        elif arg["kind"] == "choice":
            literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
            assert set(typing.get_args(literals[0]) if literals else parts) == set(arg["choices"])
    for name in ("rope", "prepare", "can_use", "explain"):
        assert getattr(ropewalk, name).__annotations__["q"] == "SupportsDLPack"


def test_what_has_dlpack_is_a_tensor() -> None:
    assert isinstance(heads(2, 2), SupportsDLPack)
    assert not isinstance([1.0], SupportsDLPack)


def test_refusals_read_no_symbols() -> None:
    # For its first backtrace tvm-ffi reads the symbols of every library of the process.
    with pytest.raises(ValueError, match="abacus") as caught:
        ropewalk.force_backend("abacus")
    assert not [frame for frame in traceback.extract_tb(caught.tb) if frame.name.startswith("__tvm_ffi_")]


# ---- the scripts: what they say before they begin, and while something takes long ------------------------------------

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def bash(text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def fresh_tree(folder: Path) -> Path:
    """As much of a fresh clone as says what is to be done."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    return folder


@needs_bash
def test_run_says_first_what_it_will_take(tmp_path: Path) -> None:
    ran = bash("scripts/run.sh --plan", fresh_tree(tmp_path))
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r"(\d+) MB to fetch, +(\d+) MB on disk", ran.stdout)
    assert len(rows) >= 5
    for column in (0, 1):  # the last one is the sum
        numbers = [int(row[column]) for row in rows]
        assert numbers[-1] == sum(numbers[:-1]) > 0


@needs_bash
def test_run_ends_where_the_disk_is_too_small(tmp_path: Path) -> None:
    df = "df() { printf 'Filesystem 1M-blocks Used Available\\n/dev/x 9 8 17 9%% /\\n'; }; export -f df; "
    ran = bash(df + "scripts/run.sh --plan", fresh_tree(tmp_path))
    assert ran.returncode == 1
    assert "only 17 MB are free" in ran.stderr


@needs_bash
def test_a_long_step_says_how_long_it_has_taken(tmp_path: Path) -> None:
    quick = "source scripts/common.sh; tell_progress step build/log 0.2 & "
    fresh_tree(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/log").write_text("Downloading torch (912 MB)\n")
    ran = bash(quick + "sleep 1; kill $!", tmp_path)
    assert re.search(r"^    step \d:\d\d  Downloading torch \(912 MB\)$", ran.stdout, re.MULTILINE)


@needs_bash
def test_a_step_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    ran = bash(
        "source scripts/common.sh; quietly step build/log bash -c 'seq 100; exit 3' || echo ended $?",
        fresh_tree(tmp_path),
    )
    assert ran.stdout.endswith("ended 3\n")
    assert ran.stderr.split() == [str(number) for number in range(76, 101)]
    assert (tmp_path / "build/log").read_text().startswith("1\n2\n")


@needs_bash
def test_the_lines_of_a_build(tmp_path: Path) -> None:
    said = "source scripts/common.sh; printf '%s\\n' '  [1/3] one' 'quiet' '[2/3] two' 'x.cc: warning: y' '[3/3] three'"
    ran = bash(said + " | build_progress", fresh_tree(tmp_path))
    lines = [re.sub(r"\d:\d\d", "T", line) for line in ran.stdout.splitlines()]
    assert lines == ["    T  [1/3] one", "x.cc: warning: y", "    T  [3/3] three"]
    assert "quiet" in (tmp_path / "build/wheel.log").read_text()


# ---- the examples ----------------------------------------------------------------------------------------------------


def example(name: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_mrope():
    said = example("mrope.py")
    assert "32 tokens, positions of the last: [13, 13, 13]" in said
    difference = re.search(r"largest difference to the formula: (\S+)", said)
    assert difference and float(difference[1]) < 1e-6


@pytest.mark.parametrize("options", [(), ("--steps", "17", "--requests", "1")])
def test_decode(options):
    torch = pytest.importorskip("torch")
    said = example("decode.py", *options)
    assert ("by a CUDA graph" if torch.cuda.is_available() else "by calls on the CPU") in said
    difference = re.search(r"largest difference of the stored keys: ([^;]+);", said)
    assert difference and float(difference[1]) > 0
