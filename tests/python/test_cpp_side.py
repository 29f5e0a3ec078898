"""The C and C++ side of the package: README's program, built against the installed wheel by CMake and by pkg-config."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ropewalk

EXAMPLE = Path(__file__).parents[2] / "examples/rope.cc"
PROJECT = """cmake_minimum_required(VERSION 3.22)
project(user LANGUAGES CXX)
find_package(ropewalk 0.2 REQUIRED)
add_executable(rope {example})
target_link_libraries(rope PRIVATE ropewalk::ropewalk)
"""
PREFIX = Path(
    subprocess.run([sys.executable, "-m", "ropewalk", "--cmake-prefix"], capture_output=True, text=True, check=True)
    .stdout.strip()
)  # fmt: skip
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=PATH)
pytestmark = [
    pytest.mark.skipif(
        not (PREFIX / "lib/libropewalk.so").exists(), reason="no wheel is installed, but a build's tree"
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


def run(*command: object, **options: object) -> str:
    environment = {**os.environ, "PATH": PATH, **options}
    texts = [str(part) for part in command]
    done = subprocess.run(texts, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{texts}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_prefix_is_the_package() -> None:
    assert Path(ropewalk.__file__).parent.samefile(PREFIX)


@pytest.mark.skipif(CMAKE is None, reason="no CMake")
def test_by_cmake(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(example=EXAMPLE))
    build = tmp_path / "build"
    run(CMAKE, "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={PREFIX}", "-DCMAKE_BUILD_TYPE=Release")
    run(CMAKE, "--build", build)
    run(build / "rope")


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="no pkg-config")
def test_by_pkg_config(tmp_path: Path) -> None:
    where = {"PKG_CONFIG_PATH": str(PREFIX / "lib/pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "ropewalk", **where).split()
    assert run("pkg-config", "--modversion", "ropewalk", **where).strip() == ropewalk.__version__
    run("c++", "-std=c++20", EXAMPLE, "-o", tmp_path / "rope", *flags)
    run(tmp_path / "rope", LD_LIBRARY_PATH=str(PREFIX / "lib"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
def test_only_the_c_interface_is_exported() -> None:
    names = run("nm", "-D", "--defined-only", PREFIX / "lib/libropewalk.so").split("\n")
    symbols = [line.split()[-1] for line in names if line]
    assert "ropewalk_rope" in symbols
    assert [name for name in symbols if not name.startswith("ropewalk_")] == []
