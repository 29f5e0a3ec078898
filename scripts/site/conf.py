"""Sphinx's configuration of the documentation's site (`make docs`). The Markdown of the tree is the source, as it lies
there, so that its links lead to the same pages as on a forge; the site fetches nothing from a network.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# The navigation: the pages of docs/ by who reads them, each once. The pages of docs/results/ follow by themselves.
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


header = (ROOT / "include/ropewalk/ropewalk.h").read_text()
project = "Ropewalk"
version = release = ".".join(re.findall(r"#define ROPEWALK_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
project_copyright = "the Ropewalk developers, Apache-2.0"
extensions = ["myst_parser"]
root_doc = FRONT
include_patterns = ["*.md", "docs/**"]
# Not looked into at all: most of what lies here is not ours to read.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"Ropewalk {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_baseurl = ""
pygments_style = "tango"


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """To the front page, which a forge shows without."""
    if docname != FRONT:
        return
    for caption, pages in sections().items():
        entries = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:titlesonly:\n\n{entries}\n```\n"


def add_index(app: Sphinx, exception: Exception | None) -> None:
    """What a browser opens first."""
    if exception is None:
        page = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={FRONT}.html">'
        link = f'<title>Ropewalk</title><a href="{FRONT}.html">Ropewalk</a>\n'
        (Path(app.outdir) / "index.html").write_text(page + link)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True}
