"""The documents say what is so: links lead somewhere, commands are understood, committed results are named."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import ropewalk

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("docs/**/*.md")])
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which tells of what was
COMMAND = pathlib.Path(sys.executable).with_name("ropewalk")
RESULTS = ROOT / "docs/results"
README = (ROOT / "README.md").read_text()


def title(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_to_a_file(page: pathlib.Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    relative = [t.partition("#") for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t, _, _ in relative if t and not (page.parent / t).exists()] == []
    assert [
        f"{t}#{part}" for t, _, part in relative if part and part not in parts(page.parent / t if t else page)
    ] == []


def parts(page: pathlib.Path) -> set[str]:
    """What a link may name of a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in NOW if page.parent != RESULTS], ids=title)
def test_files_that_are_named_are_there(page: pathlib.Path) -> None:
    """Of the tree: `folder/file`, and the like with * and with a choice in braces."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("build", "dist")}
    named = re.findall(r"`((?:\.?[\w-]+)/[\w./{},*-]*)`", page.read_text())
    names = [name for name in named if name.partition("/")[0] in folders]
    assert [name for name in names if not any(ROOT.glob(re.sub(r"\{[^}]*\}", "*", name).rstrip("/")))] == []


def test_files_are_named() -> None:
    assert sum(page.read_text().count("`backends/") for page in PAGES) > 20


def test_the_command_line_page_has_every_subcommand() -> None:
    told = subprocess.run([str(COMMAND), "--help"], capture_output=True, text=True, check=True).stdout
    commands = set(re.findall(r"^  ([a-z]+) {2,}\S", told.partition("Subcommands:")[2], re.MULTILINE))
    listed = re.findall(r"^\| (`[a-z]+`(?:, `[a-z]+`)*) \|", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    assert commands == {name.strip("`") for row in listed for name in row.split(", ")}
    assert len(commands) >= 10


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_names_of_the_package_are_there(page: pathlib.Path) -> None:
    for name in set(re.findall(r"`ropewalk\.([a-z_]\w*)[`(]", page.read_text())) - {"h", "hpp", "cc", "so", "pc"}:
        folder = ROOT / "bindings/python/ropewalk"
        assert hasattr(ropewalk, name) or (folder / name).exists() or (folder / f"{name}.py").exists(), name


def test_make_has_the_targets_that_pages_name() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name for page in NOW for name in re.findall(r"`make ([a-z-]+)", page.read_text())} <= targets


def commands() -> list[tuple[str, str]]:
    """Each `ropewalk ...` of a block of code or within a line, up to what is not its own: a comment, a pipe, prose."""
    found = []
    for page in NOW:
        if page.parent == RESULTS:
            continue
        text = page.read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(ropewalk [^`]*)`", text)
        for line in lines:
            match = re.match(r"(?:\$ )?(?:\.venv/bin/|build/dev/bin/)?ropewalk ([a-z]\S*.*)", line.strip())
            if match:
                found.append((title(page), re.split(r"\s#|\s{2,}|[|>&]", match[1])[0]))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_have_the_options_they_are_shown_with(page: str, command: str) -> None:
    words = shlex.split(command)
    told = subprocess.run([str(COMMAND), words[0], "--help"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", told.stdout))
    assert [word for word in words if word.startswith("-") and word.partition("=")[0] not in known] == []


def test_there_are_commands() -> None:
    assert len(commands()) >= 20


def test_the_readme_prints_what_it_shows() -> None:
    code, shown = re.search(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL).groups()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (0, shown), ran.stderr


def test_the_readme_shows_the_example_in_c_plus_plus() -> None:  # which tests/consumer builds and runs
    code = re.search(r"^```cpp\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    assert (ROOT / "examples/rope.cc").read_text().endswith("\n" + code)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def made_by(script: str):
    """The module at this path of the tree."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_leads_to_every_page_once() -> None:
    site = made_by("scripts/site/conf.py")
    entries = [entry for pages in site.sections().values() for entry in pages]
    read = [page for page in PAGES if ".github" not in page.parts]
    pages = [title(page.with_suffix("")) for page in read if title(page) != f"{site.FRONT}.md"]
    assert sorted(entries) == sorted(pages)
    assert [title(page) for page in read if not page.read_text().startswith("# ")] == []  # its name there


def test_the_page_of_functions_is_that_of_the_docstrings() -> None:
    """Else: make docs."""
    made = made_by("scripts/reference_page.py")
    assert made.PAGE.read_text() == made.page()


def test_the_page_of_functions_has_all_of_them() -> None:
    page = (ROOT / "docs/reference.md").read_text()
    assert [name for name in ropewalk.__all__ if f"### `ropewalk.{name}`\n" not in page] == []
    assert page.count("\n- `") > 150  # arguments and errors


def test_every_result_is_named() -> None:
    """By a page, or by the script that reads it or writes it."""
    readers = [*PAGES, *ROOT.glob("bench/*"), *ROOT.glob("scripts/*"), *ROOT.glob("backends/**/*.inc")]
    text = "\n".join(path.read_text() for path in readers if path.is_file())
    assert [file.name for file in RESULTS.iterdir() if file.name not in text] == []
