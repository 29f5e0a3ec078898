"""Fails unless the version agrees in the header, the changelog and the package, and the pins in pyproject.toml agree
with requirements/pins.txt, and those with requirements/lock/.

SPDX-License-Identifier: Apache-2.0
"""

import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
problems = []


def find(pattern: str, path: str) -> str:
    """The first group of `pattern` in the file at `path`; a problem if it is not there."""
    match = re.search(pattern, (root / path).read_text(), re.MULTILINE)
    if not match:
        problems.append(f"{path}: nothing matches {pattern}")
        return ""
    return match.group(1)


header = "include/ropewalk/ropewalk.h"
version = ".".join(find(rf"^#define ROPEWALK_VERSION_{part} (\d+)", header) for part in ("MAJOR", "MINOR", "PATCH"))
changelog = find(r"^## \[?v?(\d+\.\d+\.\d+)", "CHANGELOG.md")
if changelog != version:
    problems.append(f"CHANGELOG.md begins with {changelog}, but {header} says {version}")

if (cited := find(r"^version: (\S+)$", "CITATION.cff")) != version:
    problems.append(f"CITATION.cff cites {cited}, but {header} says {version}")

for package in ("apache-tvm-ffi", "scikit-build-core"):
    pinned = find(rf"^\[base\](?:\n[^\[].*)*?\n{package}==(\S+)$", "requirements/pins.txt")
    built = find(rf'requires = \[.*"{package}==([^"]+)"', "pyproject.toml")
    if built != pinned:
        problems.append(f"pyproject.toml builds with {package} {built}, but requirements/pins.txt pins {pinned}")


def sections(path: str) -> dict[str, str]:
    """The text below each heading `[NAME..]` of the file at `path`."""
    parts = re.split(r"^\[([\w-]+).*\]$", (root / path).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# What is installed is what requirements/pins.txt names.
alone = sections("requirements/lock/alone.txt")
named = sections("requirements/pins.txt")
for name, pins in named.items():
    file = root / f"requirements/lock/{name}.txt"
    locked = (alone.get(name, "") if not file.is_file() else file.read_text()).lower().replace("_", "-")
    for package, pinned in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", pins, re.MULTILINE):
        wanted = rf"^{re.escape(package.lower().replace('_', '-'))}=={re.escape(pinned)}(?![0-9A-Za-z.])"
        if not re.search(wanted, locked, re.MULTILINE):
            problems.append(
                f"requirements/pins.txt pins {package} {pinned}, but the lock of {name} does not: scripts/lock.sh"
            )
if len(named) < 10:
    problems.append(f"requirements/pins.txt has {len(named)} sections")

print("\n".join(problems) or f"versions agree: {version}")
sys.exit(bool(problems))
