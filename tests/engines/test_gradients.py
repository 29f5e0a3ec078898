"""The gradients of `ropewalk.compat` are those of Liger's and flash-attn's own code, of the wheels that `make
test-engines` unpacks."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ENGINES = pathlib.Path(os.environ["ROPEWALK_TEST_ENGINES"])


def test_gradients_are_those_of_the_originals() -> None:
    path = os.pathsep.join([str(ENGINES / "vllm"), str(ENGINES / "packages"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(pathlib.Path(__file__).with_name("gradients_walk.py"))]
    ran = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 15
    assert {name: errors for name, errors in found.items() if not max(errors) <= 2e-6} == {}
