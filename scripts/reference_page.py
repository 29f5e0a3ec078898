"""Writes docs/reference.md: every public function and class of the Python package with its signature and its
docstring, read from the sources without importing them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bindings/python/ropewalk"
PAGE = ROOT / "docs/reference.md"
HEAD = """# Python: functions and classes

Made by `make docs` from the docstrings: do not edit. [Ropewalk from Python](python.md) tells how they go together,
[arguments.md](arguments.md) has every argument of `rope_` in C's words too.
"""
SECTION = re.compile(r"(Args|Returns|Raises|Warns|Yields):$")
ITEM = re.compile(r"([*\w]+(?:, \w+)*): (.*)")


def paragraphs(docstring: str) -> Iterator[str]:
    """The docstring as Markdown: what stands in its sections of names becomes a list."""
    section, block = "", list[str]()

    def text() -> Iterator[str]:
        if block:
            yield "\n".join(block) + "\n"
        block.clear()

    for line in inspect.cleandoc(docstring).splitlines():
        match = ITEM.match(line[4:]) if section in ("Args", "Raises", "Warns") and re.match(r" {4}\S", line) else None
        if SECTION.match(line):
            yield from text()
            section = line[:-1]
            yield f"{section}:\n"
        elif not line.strip():
            yield from text()
        elif match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            block.append(f"- {names}: {match[2]}")
        else:
            if not line.startswith(" "):
                section = ""
            block.append(("  " if block and block[0].startswith("- ") else "") + line.strip())
    yield from text()


def parameters(arguments: ast.arguments, method: bool) -> Iterator[str]:
    """Each with its type and its default, as one writes them."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]

    def shown(argument: ast.arg, default: ast.expr | None) -> str:
        text = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation else "")
        return text + ((" = " if argument.annotation else "=") + ast.unparse(default) if default else "")

    for place, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        if not (method and place == 0):
            yield shown(argument, default)
    if arguments.vararg:
        yield "*" + shown(arguments.vararg, None)
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield shown(argument, default)
    if arguments.kwarg:
        yield "**" + shown(arguments.kwarg, None)


def signature(node: ast.FunctionDef, method: bool, name: str) -> str:
    """On one line, or with a line for each argument."""
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    parts = list(parameters(node.args, method and not is_static))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def described(node: ast.FunctionDef | ast.ClassDef, title: str, level: str, method: bool = False) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring is None:
        return
    yield f"{level} `{title}`\n"
    is_property = any(ast.unparse(d) == "property" for d in node.decorator_list)
    if isinstance(node, ast.FunctionDef) and not is_property:
        yield f"```text\n{signature(node, method, node.name)}\n```\n"
    if isinstance(node, ast.ClassDef):
        start = next((x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"), None)
        if start is not None:
            yield f"```text\n{signature(start, True, node.name)}\n```\n"
    yield from paragraphs(docstring)
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                yield from described(part, f"{node.name}.{part.name}", level + "#", True)


def definitions(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    nodes = ast.parse(path.read_text()).body
    return {node.name: node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def exported(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [name for name in definitions(path) if not name.startswith("_")]


def page() -> str:
    lines = [HEAD]
    core: dict[str, ast.FunctionDef | ast.ClassDef] = {}
    for file in ("_face.py", "_frequencies.py", "_backward.py", "_packed.py", "__init__.py"):
        core.update(definitions(PACKAGE / file))
    lines.append("## `ropewalk`\n")
    for name in sorted(exported(PACKAGE / "__init__.py"), key=lambda n: (n not in ("rope_", "rope", "Frequencies"), n)):
        lines += described(core[name], f"ropewalk.{name}", "###")
    patches = [PACKAGE / f"{name}.py" for name in ("transformers", "diffusers", "torchtitan")]
    for path in [*patches, *sorted((PACKAGE / "compat").glob("[!_]*.py"))]:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        lines.append(f"## `{module}`\n")
        lines += paragraphs(ast.get_docstring(ast.parse(path.read_text())) or "")
        known = definitions(path)
        for name in exported(path):
            if name in known:
                lines += described(known[name], name, "###")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
