"""Scripts that a newcomer runs first: what they say before they begin, and while something takes long."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def bash(text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def fresh_tree(folder: Path) -> Path:
    """As much of a fresh clone as says what is to be done."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    return folder


def test_run_says_first_what_it_will_take(tmp_path: Path) -> None:
    ran = bash("scripts/run.sh --plan", fresh_tree(tmp_path))
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r"(\d+) MB to fetch, +(\d+) MB on disk", ran.stdout)
    assert len(rows) >= 5
    for column in (0, 1):  # the last one is the sum
        numbers = [int(row[column]) for row in rows]
        assert numbers[-1] == sum(numbers[:-1]) > 0


def test_run_ends_where_the_disk_is_too_small(tmp_path: Path) -> None:
    df = "df() { printf 'Filesystem 1M-blocks Used Available\\n/dev/x 9 8 17 9%% /\\n'; }; export -f df; "
    ran = bash(df + "scripts/run.sh --plan", fresh_tree(tmp_path))
    assert ran.returncode == 1
    assert "only 17 MB are free" in ran.stderr


def test_a_long_step_says_how_long_it_has_taken(tmp_path: Path) -> None:
    quick = "source scripts/common.sh; tell_progress step build/log 0.2 & "
    fresh_tree(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/log").write_text("Downloading torch (912 MB)\n")
    ran = bash(quick + "sleep 1; kill $!", tmp_path)
    assert re.search(r"^    step \d:\d\d  Downloading torch \(912 MB\)$", ran.stdout, re.MULTILINE)


def test_a_step_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    ran = bash(
        "source scripts/common.sh; quietly step build/log bash -c 'seq 100; exit 3' || echo ended $?",
        fresh_tree(tmp_path),
    )
    assert ran.stdout.endswith("ended 3\n")
    assert ran.stderr.split() == [str(number) for number in range(76, 101)]
    assert (tmp_path / "build/log").read_text().startswith("1\n2\n")


def test_the_lines_of_a_build(tmp_path: Path) -> None:
    said = "source scripts/common.sh; printf '%s\\n' '  [1/3] one' 'quiet' '[2/3] two' 'x.cc: warning: y' '[3/3] three'"
    ran = bash(said + " | build_progress", fresh_tree(tmp_path))
    lines = [re.sub(r"\d:\d\d", "T", line) for line in ran.stdout.splitlines()]
    assert lines == ["    T  [1/3] one", "x.cc: warning: y", "    T  [3/3] three"]
    assert "quiet" in (tmp_path / "build/wheel.log").read_text()
