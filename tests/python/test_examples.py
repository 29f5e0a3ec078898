"""The examples in Python run as they are, and find their own results right."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, str(EXAMPLES / name), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_mrope():
    said = run("mrope.py")
    assert "32 tokens, positions of the last: [13, 13, 13]" in said
    difference = re.search(r"largest difference to the formula: (\S+)", said)
    assert difference and float(difference[1]) < 1e-6


@pytest.mark.parametrize("options", [(), ("--steps", "17", "--requests", "1")])
def test_decode(options):
    torch = pytest.importorskip("torch")
    said = run("decode.py", *options)
    assert ("by a CUDA graph" if torch.cuda.is_available() else "by calls on the CPU") in said
    difference = re.search(r"largest difference of the stored keys: ([^;]+);", said)
    assert difference and float(difference[1]) > 0
