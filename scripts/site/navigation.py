"""The navigation of the documentation's site: the pages of docs/ by who reads them, each once. The pages of
docs/results/ follow by themselves.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FRONT = "README"
NAVIGATION = {
    "Python": ["docs/python", "docs/training", "docs/reference", "docs/arguments"],
    "C and C++": ["docs/cpp"],
    "Engines": ["docs/engines", "docs/compat", "docs/models", "docs/environment", "docs/performance"],
    "Command line": ["docs/cli"],
    "Kernel authors": ["docs/design", "docs/cuda", "docs/intel", "docs/opencl", "CONTRIBUTING"],
    "The project": ["CHANGELOG", "SECURITY", "CODE_OF_CONDUCT"],
}


def results() -> list[str]:
    """Newest first."""
    pages = (ROOT / "docs/results").glob("*.md")
    return sorted((page.relative_to(ROOT).with_suffix("").as_posix() for page in pages), reverse=True)


def sections() -> dict[str, list[str]]:
    return {**NAVIGATION, "Measurements": results()}
