"""Writes docs/results/cpu.md from the numbers of bench/results.sh, one JSON file with a part for each program.

python bench/summary.py docs/results/2026-01-31-some-cpu.json [--join FOLDER] [--markdown docs/results/cpu.md]
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any


def aim(row: dict[str, Any]) -> float | None:
    """The highest time over the floor that the design allows (bfloat16, 32/8 heads of 128); None: reported only."""
    if row["dtype"] != "bf16" or (row["q_heads"], row["k_heads"], row["head_dim"]) != (32, 8, 128):
        return None
    if row["memory"] == "DRAM":
        return 1 / 0.95 if row["op"] == "rope" else 1 / 0.85
    if row["memory"] == "L3" and row["op"] == "rope":
        return 1 / 0.80 if row["pairing"] == "neox" else 1 / 0.70
    return None


def table(headings: list[str], rows: list[list[str]]) -> str:
    rule = ["---:" if heading.startswith(">") else "---" for heading in headings]
    lines = [[heading.removeprefix(">") for heading in headings], rule, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def floor_part(bench: dict[str, Any]) -> str:
    machine, results = bench["machine"], bench["results"]
    rows, met, asked = [], 0, 0
    for row in results:
        most = aim(row)
        verdict = ""
        if most is not None:
            asked += 1
            met += row["of_floor"] <= most
            verdict = f"{most:.2f} {'met' if row['of_floor'] <= most else 'missed'}"
        rows.append([
            row["memory"], str(row["tokens"]), row["dtype"], str(row["threads"]), f"{row['op']} {row['pairing']}",
            f"{row['floor_us']:.2f}", f"{row['us']:.2f}", f"{row['gb_per_s']:.1f}", f"{row['of_floor']:.3f}", verdict,
        ])  # fmt: skip
    kernels = sorted({row["kernel"] for row in results})
    headings = ["data in", ">tokens", "dtype", ">threads", "op", ">floor us", ">us", ">GB/s", ">of floor", "aim"]
    return (
        "## Against the floor\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, L2 {machine['l2_bytes'] >> 10} KB, "
        f"L3 {machine['l3_bytes'] >> 20} MB; "
        f"{machine['date']}, load {machine['load_before']:.2f} before. Heads and dimensions "
        f"{', '.join(sorted({row['label'] for row in results}))}; in place; angles computed. The floor is an in-place "
        "read-modify-write of the same bytes, the best of several kernels, on the same threads, in turns with ours; "
        "`of floor` is our time over its, the median of pairs. Each result was checked first.\n\n"
        + table(headings, rows)
        + f"\nAims met: {met} of {asked}. Kernels: {', '.join(f'`{name}`' for name in kernels)}.\n"
    )


def sweep_part(sweep: dict[str, Any]) -> str:
    machine, results, aim = sweep["machine"], sweep["results"], sweep["aim"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["dtype"], row["op"], row["pairing"]), []).append(row)

    def of(rows: list[dict[str, Any]], name: str) -> list[str]:
        ratios = [row[name] for row in rows]
        return [str(sum(ratio > aim for ratio in ratios)), f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}"]

    summary = [[*group, str(len(rows)), *of(rows, "ratio"), *of(rows, "line_ratio")] for group, rows in groups.items()]

    def line(row: dict[str, Any]) -> list[str]:
        part = f"{row['rotary_dim']} of {row['head_dim']}"
        part += f" at {row['rotary_offset']}" if row["rotary_offset"] else ""
        return [part, row["dtype"], f"{row['op']} {row['pairing']}", row["angles"], str(row["tokens"]),
                *(f"{row[name]:.2f}" for name in ("us", "us_128_of_128", "ratio", "line_ratio"))]  # fmt: skip

    headings = ["part", "dtype", "op", "angles", ">tokens", ">us", ">128 of 128 us", ">ratio", ">line"]
    models = [(24, 96), (32, 80), (20, 80), (80, 80), (32, 128), (16, 64), (64, 192), (64, 256), (96, 96)]
    real = [
        line(row)
        for row in sorted(results, key=lambda row: (row["rotary_dim"], row["head_dim"], row["op"], row["pairing"]))
        if (row["rotary_dim"], row["head_dim"]) in models and row["dtype"] == "bf16" and row["angles"] == "frequencies"
    ]
    return (
        "## Other head sizes and rotated parts\n\n"
        f"{machine['cpu']}, {machine['date']}, load {machine['load_before']:.2f} before; one thread, "
        f"{results[0]['q_heads']}/{results[0]['k_heads']} heads, in place, in the caches: `ropewalk bench --sweep`. "
        "`ratio` is the time of a byte that must be read and written (the rotated part; with the norm whole heads) "
        f"over that of 128 of 128 in the same run, in turns; the aim is {aim}. {sweep['above']} of {len(results)} "
        "lines are above it. `line` is the same of a cache line of 64 bytes that holds such bytes, as a small part of "
        f"a head costs its whole line: {sweep['lines_above']} are above. Each result was checked first.\n\n"
        + table(
            ["dtype", "op", "pairing", ">timed", ">above", ">median", ">worst", ">line: above", ">median", ">worst"],
            summary,
        )  # fmt: skip
        + "\nThe ten worst:\n\n"
        + table(headings, [line(row) for row in results[:10]])
        + "\nParts of real models, bfloat16:\n\n"
        + table(headings, real)
    )


def call_part(google: dict[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['real_time']:.0f}"]
        for row in google["benchmarks"]
        if row["name"].partition("/")[0] in ("call", "checks") and "error_occurred" not in row
    ]
    if not rows:
        return ""
    return (
        "## The cost of a call from C\n\n"
        "1 token, 1 head of 128, bfloat16, by Google Benchmark. `call`: all in; `checks`: of the arguments alone.\n\n"
        + table(["call", ">ns"], rows)
    )


def python_part(numbers: dict[str, float]) -> str:
    return (
        "## The cost of a call from Python\n\n"
        "1 token, 1 head of 128, float32, q and k, by `bench/python_call.py`.\n\n"
        + table(["call", ">ns"], [[name, f"{value:.0f}"] for name, value in numbers.items()])
    )


def heads(row: dict[str, Any]) -> str:
    text = f"{row['q_heads']}/{row['k_heads']}x{row['head_dim']}"
    rotary_dim = row.get("rotary_dim", row["head_dim"])  # older results rotate all
    return text if rotary_dim == row["head_dim"] else f"{text}, {rotary_dim} rotated"


def torch_part(compared: dict[str, Any], of: str = "") -> str:
    rows = []
    for row in compared["results"]:
        us, faster = row["us"], row["faster_than"]
        rows.append([
            row["op"], str(row["threads"]), str(row["tokens"]), heads(row),
            f"{us['ropewalk']:.2f}", f"{us['eager']:.2f}", f"{us['compile']:.2f}" if "compile" in us else "",
            f"{faster['eager']:.1f}", f"{faster['compile']:.1f}" if "compile" in faster else "",
        ])  # fmt: skip
    fastest = sum(min(row["faster_than"].values()) > 1 for row in compared["results"])
    headings = ["op", ">threads", ">tokens", "heads", ">ropewalk us", ">eager us", ">compile us"]
    headings += [">times faster than eager", ">than compile"]
    return (
        f"## Beside torch{of}\n\n"
        f"torch {compared['torch']}, transformers {compared['transformers']}, {compared['cpu']}, "
        f"{compared['date']}; "
        f"{compared['results'][0]['dtype']}, neox, from Python, medians. Eager and torch.compile (static shapes) "
        "run transformers' own chain, cosines and sines made beforehand; Ropewalk computes its angles in the call.\n\n"
        + table(headings, rows)
        + f"\nRopewalk is the fastest in {fastest} of {len(rows)} shapes.\n"
    )


KINDS: dict[str, Callable[[Any], str]] = {
    "bench": floor_part,
    "sweep": sweep_part,
    "google": call_part,
    "python": python_part,
    "torch": torch_part,
    "torch-parts": lambda compared: torch_part(compared, ": parts of heads"),
}


def join(folder: pathlib.Path, results: pathlib.Path) -> dict[str, Any]:
    """The numbers of each kind with the day of their run; those that the folder lacks stay."""
    numbers = json.loads(results.read_text()) if results.exists() else {"made": {}}
    for kind in KINDS:
        if (folder / f"{kind}.json").exists():
            numbers[kind] = json.loads((folder / f"{kind}.json").read_text())
            numbers["made"][kind] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results.write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--join", type=pathlib.Path, metavar="FOLDER", help="put its KIND.json there first")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="write the page here, not to stdout")
    arguments = parser.parse_args()
    if not arguments.join and not arguments.results.exists():
        print(f"error: there is no {arguments.results}", file=sys.stderr)
        return 1
    numbers = join(arguments.join, arguments.results) if arguments.join else json.loads(arguments.results.read_text())
    parts = [part(numbers[kind]) for kind, part in KINDS.items() if kind in numbers]
    if not parts:
        print(f"error: {arguments.results} has none of {', '.join(KINDS)}", file=sys.stderr)
        return 1
    page = f"# Speed on the CPU\n\nMade by `bench/results.sh` from `{arguments.results.name}`; do not edit.\n\n"
    page += "\n".join(part for part in parts if part)
    if arguments.markdown:
        arguments.markdown.write_text(page)
        print(f"wrote {arguments.markdown}")
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
