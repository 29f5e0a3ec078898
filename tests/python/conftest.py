"""What all tests share: `--shard K/N` runs every N-th of them from the K-th on, so that N processes do all."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest


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
