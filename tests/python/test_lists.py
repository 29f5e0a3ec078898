"""What must be written out twice agrees: the arguments, one table in rope/rope.cc, in C and OpenCL; the variables that
the sources read, on docs/environment.md."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("ropewalk")
HEADER = (ROOT / "include/ropewalk/ropewalk.h").read_text()
ARGUMENTS: dict[str, dict[str, Any]] = {
    arg["name"]: arg
    for arg in json.loads(
        subprocess.run([str(COMMAND), "describe", "--json"], capture_output=True, text=True, check=True).stdout
    )["args"]
}
STRUCT = HEADER[HEADER.index("typedef struct ropewalk_rope_args {") : HEADER.index("} ropewalk_rope_args;")]
# Of C alone: the struct's size and room, and what an enum, a flag or a pointer is there.
ROOM = {"struct_size", "reserved", "reserved_2"}
OF_C = {
    "ropewalk_pairing",
    "ropewalk_norm",
    "ropewalk_rounding",
    "optional",
    "1",
    "or a table",
    "no programmatic dependent launch (CUDA",
    "sm_90 and later)",
}


def fields() -> dict[str, str]:
    """Each field of the struct, with the comment of its line."""
    return dict(re.findall(r"\b(\w+)\s+ROPEWALK_DEFAULT\(.*?\);(?: *// (.*))?$", STRUCT, re.MULTILINE))


def tensors() -> list[str]:
    """The tensors that kernels see: cos_sin has become cos and sin."""
    return [name for name, arg in ARGUMENTS.items() if arg["kind"] == "tensor" and name != "cos_sin"]


def test_the_struct_has_the_arguments_and_no_others() -> None:
    assert set(fields()) == set(ARGUMENTS) | ROOM


def test_designated_initialisers_stand_where_the_pages_say() -> None:
    """docs/cpp.md and ropewalk.hpp name what stands elsewhere in the struct than in arguments.md."""
    names = [name for name in fields() if name not in ROOM]
    for early, late in (("pairing", "q"), ("rounding", "eps")):
        assert names.index(early) + 1 == names.index(late)
    rest = [name for name in ARGUMENTS if name not in ("pairing", "rounding")]
    assert [name for name in names if name not in ("pairing", "rounding")] == rest


@pytest.mark.parametrize("name", [name for name, arg in ARGUMENTS.items() if arg["kind"] == "tensor"])
def test_the_header_gives_each_tensor_its_shape_and_dtypes(name: str) -> None:
    """T is q's dtype, `as cos` that of cos."""
    shape, told = re.match(r"(\[.*?\]) ([^:;,]*)", fields()[name]).groups()
    assert shape == ARGUMENTS[name]["shape"]
    wanted = ARGUMENTS[name]["dtypes"]
    if name == "q":
        assert (told, f"T is q's dtype: {wanted}." in HEADER) == ("T", True)
    elif told.startswith("as "):
        assert wanted in (f"that of {told[3:]}", ARGUMENTS[told[3:]]["dtypes"])
    else:
        assert told.replace("T", "that of q").split(" | ") == re.split(r", or |, | or ", wanted)


def clauses(text: str) -> list[str]:
    text = text.replace("None (0 in C)", "0").replace("None", "NULL").removesuffix(", ..")
    return [part for part in re.split(r"[.:;,](?:\s+and\b)?(?:\s+|$)", text) if part]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_header_says_of_an_argument_what_the_table_says(name: str) -> None:
    """The words of the table, or the first ones of a clause of it, or what is of C alone."""
    arg = ARGUMENTS[name]
    told = re.sub(r"^\[[^]]*\] [^:;,]*", "", fields()[name]) if arg["kind"] == "tensor" else fields()[name]
    said = [clause.lower() for clause in clauses(arg["doc"])]
    strange = [
        clause
        for clause in clauses(told)
        if clause not in OF_C and not any(f"{words} ".startswith(f"{clause.lower()} ") for words in said)
    ]
    assert strange == []


def test_the_list_of_tensors_is_that_of_the_table() -> None:
    listed = re.findall(r"^ +X\((\w+), ", (ROOT / "rope/call.h").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(tensors())


def test_the_opencl_kernel_takes_the_tensors_in_the_order_of_the_list() -> None:
    listed = re.findall(r"^ +X\((\w+), ([^)]*)\)", (ROOT / "rope/call.h").read_text(), re.MULTILINE)
    kernel = (ROOT / "backends/spirv/kernel/rope.cl").read_text()
    parameters = re.search(r"ROPE_KERNEL void rope_kernel\((.*?)\) \{", kernel, re.DOTALL)[1]
    taken = [re.match(r"(const )?__global (\w+)\* (\w+)$", " ".join(text.split())) for text in parameters.split(",")]
    pointers = [(name.removesuffix("_tensor").removesuffix("_table"), f"{const or ''}{kind}") for const, kind, name in
                (match.groups() for match in taken if match)]  # fmt: skip
    own = [("turns", "const rw_u64"), ("fault", "rope_fault")]
    assert pointers == [(name, kind.replace("int32_t", "int")) for name, kind in listed] + own
    assert parameters.split(",")[-1].split() == ["rope_spirv_params", "params"]
    args = (ROOT / "backends/spirv/kernel/args.h").read_text()
    assert f"kRopeSpirvTurns = {len(listed)}, kRopeSpirvFault = {len(listed) + 1}" in args


def test_the_opencl_kernels_of_the_gradient_take_what_the_host_hands_over() -> None:
    folder = ROOT / "backends/spirv"
    host = (folder / "backward.cc").read_text()
    listed = [re.findall(r'"(\w+)"', names) for names in re.findall(r"kNames\[\] = \{(.*?)\};", host, re.DOTALL)]
    own = {"x_of_q": "q", "x_of_k": "k", "q": "q_grad", "k_tensor": "k_grad", "q_out": "q_grad_out",
           "k_out": "k_grad_out", "sums": "workspace", "cos_table": "cos", "sin_table": "sin"}  # fmt: skip
    for kernel, names, more in (("backward", listed[0], ["turns", "fault"]), ("sums", listed[1], [])):
        text = (folder / f"kernel/{kernel}.cl").read_text()
        parameters = re.search(rf"void rope_{kernel}_kernel\((.*?)\) \{{", text, re.DOTALL)[1].split(",")
        taken = [text.split()[-1] for text in parameters]
        assert [own.get(name, name) for name in taken] == [*names, *more, "params"]
        assert parameters[-1].split()[0] == f"rope_{kernel}_params"


def test_the_opencl_kernel_has_each_specialisation_constant_by_its_number() -> None:
    """By number, as a build from source has macros for them."""
    args = (ROOT / "backends/spirv/kernel/args.h").read_text()
    numbers = {re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower(): int(number)
               for name, number in re.findall(r"kRopeSpec(\w+) = (\d+),", args)}  # fmt: skip
    kernel = (ROOT / "backends/spirv/kernel/rope.cl").read_text()
    used = {name: int(number) for name, number in re.findall(r"\.(\w+) = ROPE_(?:CHOICE|CONSTANT)\((\d+)\)", kernel)}
    assert len(used) == 12
    assert used == {name: number for name, number in numbers.items() if name != "argument"}


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
    """And no others."""
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
