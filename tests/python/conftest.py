"""What all tests share: `--shard K/N` runs every N-th of them from the K-th on, so that N processes do all;
a process that loads a saved model; and a folder of their own for the graphs that torch keeps, which must not be those
of another day."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_graphs = tempfile.TemporaryDirectory(prefix="ropewalk-graphs-")  # removed when the process ends
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _graphs.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="K/N", help="every N-th test from the K-th on, K < N")
    parser.addoption("--all-models", action="store_true", help="all model classes of transformers, not a sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.getoption("--shard")
    if not shard:
        return
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    first, count = map(int, match.groups()) if match else (0, 0)
    if first >= count:
        raise pytest.UsageError(f'--shard must be K/N with K < N, but is "{shard}"')
    others = [item for i, item in enumerate(items) if i % count != first]
    items[:] = items[first::count]
    if others:
        config.hook.pytest_deselected(items=others)


@pytest.fixture
def loads_elsewhere(tmp_path: Path) -> Callable[..., None]:
    """`check(model, given, want, call, launches, most)`: the model, saved and loaded by a process that knows nothing of
    Ropewalk before, gives `want` by `call` (an expression of `model` and `given`), up to `most` of its largest element,
    with so many launches."""

    def check(model: Any, given: Any, want: Any, call: str, launches: int, most: float) -> None:
        import torch  # noqa: PLC0415

        torch.save(model, tmp_path / "model.pt")
        torch.save((given, want), tmp_path / "want.pt")
        code = f"""
import torch
model = torch.load("model.pt", weights_only=False)
import ropewalk
given, want = torch.load("want.pt")
with torch.no_grad():
    got = {call}
assert sum(ropewalk.counters().values()) == {launches}
assert (got - want).abs().max() <= {most} * want.abs().max()
"""
        path = os.pathsep.join(part for part in sys.path if part)
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr

    return check
