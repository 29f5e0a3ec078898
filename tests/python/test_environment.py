"""docs/environment.md lists the variables that the sources read, all of them and no others."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


LIBRARY = ("api", "backends", "base", "bindings", "frequencies", "models", "rope")


def files(*folders: str) -> list[Path]:
    found = [
        path
        for name in folders
        for path in sorted((ROOT / name).rglob("*"))
        if path.suffix in (".cc", ".h", ".py", ".json")
    ]
    assert {path.relative_to(ROOT).parts[0] for path in found} == set(folders)
    return found


def sources() -> str:
    return "\n".join(path.read_text() for path in files(*LIBRARY, "cli", "conformance", "measure"))


def test_every_variable_is_on_the_page() -> None:
    page = (ROOT / "docs/environment.md").read_text()
    listed = set(re.findall(r"`([A-Z_]+)`", "\n".join(re.findall(r"^\| (.*?) \|", page, flags=re.M))))
    text = sources()
    read = set(re.findall(r'(?:getenv|EnvironmentVariable|EnvironmentText|OpenLibrary)\("([A-Z_]+)"', text))
    read |= set(re.findall(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"", text))
    assert len(read) >= 15
    assert read <= listed
    assert {name for name in listed if f'"{name}"' not in text} == set()


def test_only_one_function_reads_the_environment_of_the_library() -> None:
    """getenv would let a caller of a setuid program say which code is loaded."""
    for path in files(*LIBRARY):
        if path.name != "environment.h":
            assert "getenv(" not in path.read_text(), path
