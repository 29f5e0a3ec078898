"""Folders are rooms, and includes go one way: what CONTRIBUTING.md says of the tree is so."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each room, with those that it may include. A GPU's kernel is text for another compiler, and knows but its params; the
# CPU's is compiled with its backend (dispatch.cc), and says what it takes from it.
ROOMS: dict[str, set[str]] = {
    "base": set(),
    "frequencies": {"base"},
    "models": {"base", "frequencies"},
    "rope": {"base", "frequencies"},
    "backends/cpu/kernel": {"backends/cpu", "rope"},
    "backends/cuda/kernel": {"rope"},
    "backends/spirv/kernel": {"rope"},
    "backends/cpu": {"backends/cpu/kernel", "backends", "base", "rope"},
    "backends/cuda": {"backends/cuda/kernel", "backends", "base", "rope"},
    "backends/spirv": {"backends/spirv/kernel", "backends", "base", "rope"},
    "backends/opencl": {"backends/spirv", "backends", "base"},
    # A queue of SYCL may be one of OpenCL: then its kernels are built as OpenCL's are.
    "backends/intel": {"backends/spirv", "backends/opencl", "backends", "base"},
    "backends": {"base", "frequencies", "rope"},  # but for registry.cc
    "api": {"backends", "base", "frequencies", "models", "rope"},
    "bindings": {"base", "frequencies", "rope"},
    "conformance": {"backends", "base", "frequencies", "models", "rope"},
    "measure": {"conformance", "backends", "base", "frequencies", "models", "rope"},
    "cli": {"measure", "conformance", "backends", "base", "models", "rope"},
    "bench": {"measure", "conformance", "backends", "base", "rope", "tests"},  # tests: a device of SYCL
}
WHOLE_BACKENDS = ("conformance", "measure", "cli", "bench")
SOURCES = {".cc", ".h", ".cuh", ".cl", ".clh"}
# Tracked: who looks for something reads this many names. 595 before what is read together was put together.
MOST_FILES = 480
INCLUDE = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)


def room_of(path: str) -> str:
    return max((room for room in ROOMS if path.startswith(f"{room}/")), key=len, default=path.partition("/")[0])


def sources() -> list[Path]:
    tops = sorted({room.partition("/")[0] for room in ROOMS})
    return [path for top in tops for path in sorted((ROOT / top).rglob("*")) if path.suffix in SOURCES]


def test_includes_go_one_way() -> None:
    assert len(sources()) > 150
    wrong = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        own = room_of(name)
        if name == "backends/registry.cc":
            continue
        for included in INCLUDE.findall(path.read_text()):
            room = room_of(included)
            fine = room == own or room in ROOMS[own] or (own in WHOLE_BACKENDS and room.startswith("backends/"))
            if not fine:
                wrong.append(f"{name} includes {included}")
    assert wrong == []


def test_every_include_is_there() -> None:
    """Whatever the compiler's search would also find: from the root of the tree."""
    missing = [
        f"{path.relative_to(ROOT)} includes {included}"
        for path in sources()
        for included in INCLUDE.findall(path.read_text())
        if not (ROOT / included).is_file()
    ]
    assert missing == []


def test_every_file_says_what_it_is_for() -> None:
    """The first line is a sentence, or, where a header says it, the licence."""
    silent = []
    for path in sources():
        first = path.read_text().partition("\n")[0]
        said = first.startswith("// SPDX") and path.suffix == ".cc" and path.with_suffix(".h").is_file()
        if not said and (not first.startswith("// ") or first.startswith("// SPDX")):
            silent.append(path.relative_to(ROOT).as_posix())
    assert silent == []


def test_lint_runs_the_hooks() -> None:
    """`make lint` checks the whole tree with what a commit's hooks check, in the same order."""
    hooks = re.findall(r"\{id: ([\w-]+),", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == re.findall(r"^check ([\w-]+) ", (ROOT / "scripts/lint.sh").read_text(), re.MULTILINE)
    assert len(hooks) >= 7


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no clone")
def test_there_are_not_too_many_files() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    there = [name for name in listed.splitlines() if (ROOT / name).exists()]
    assert 300 < len(there) <= MOST_FILES
