"""`fused_qk_norm_rope` in the form in which SGLang reports its own: name, tokens, heads, microseconds, speed-ups.

    python bench/seed_form.py [--json FILE] [--markdown FILE] [--no-compile]

Ropewalk is called as `ropewalk.compat.sglang_jit.fused_qk_norm_rope` on packed bfloat16 rows, frequencies computed, in
CUDA graphs, cold L2 cache from 1,024 tokens on, as bench/gpu_compare.py does; each result is checked against float64
first. Beside it, from the same run, torch eager and torch.compile (static shapes); and the ahead-of-time kernel of
sgl_kernel (AOT) and SGLang's kernel compiled at run time (JIT, with fast-math) as recorded on such a GPU.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_compare
import gpu_timing
import torch
from gpu_contenders import Contender, torchs
from gpu_problem import EPS, PAIRINGS, SHAPES, THETA, Problem
from gpu_table import RECORDED
from ropewalk.compat import sglang_jit

NAMES = ["flux_1024", "qwen_image_1024", "qwen_image_partial", "zimage_1024", "batch2_medium", "decode_1", "decode_64",
         "decode_256", "prefill_1024", "prefill_8192", "head_64", "head_256"]  # fmt: skip

COLUMNS = ["name", "tokens", "heads q/k/v x dim", "pairing", "ours us", "eager us", "compile us", "AOT us", "JIT us",
           "x eager", "x compile", "x AOT", "x JIT"]  # fmt: skip


def recorded(gpu: str, name: str, pairing: str) -> tuple[float | None, float | None]:
    """AOT and JIT on this kind of GPU; None where nothing was recorded."""
    for kind, times in RECORDED.items():
        if kind in gpu and name in times:
            return times[name][PAIRINGS[::-1].index(pairing)]
    return None, None


def ours(problem: Problem) -> list[Contender]:
    s, found = problem.shape, []
    for pairing in PAIRINGS:

        def make(index: int, pairing: str = pairing) -> Callable[[], Any]:
            packed = problem.packed[index]
            return lambda: sglang_jit.fused_qk_norm_rope(
                packed, s.q_heads, s.k_heads, s.v_heads, s.head_dim, EPS, *problem.weights, THETA, pairing == "neox",
                problem.positions, 1.0, 0.0, 0.0, 1.0, s.rotary_dim)  # fmt: skip

        found.append(Contender("ropewalk", "norm+rope", pairing, make, "frequencies", 2.0**-8 * 1.02))
    return found


def measure(name: str, compiled: bool, rounds: int, gpu: str) -> list[dict[str, Any]]:
    """A row for each pairing."""
    shape = SHAPES[name]
    problem, stream = Problem(shape), torch.cuda.Stream()
    contenders = ours(problem) + [c for c in torchs(problem, compiled=False) if c.op == "norm+rope"]
    if compiled:
        torch.compiler.reset()
        contenders += [c for c in torchs(problem, compiled=True) if c.op == "norm+rope"]
    wanted: dict[tuple[str, str], Any] = {}
    for contender in contenders:
        gpu_timing.check(problem, contender, wanted)
        if contender.failure:
            print(f"{name}: {contender.name} {contender.pairing}: {contender.failure}", file=sys.stderr)
    problem.fill()
    for contender in contenders:
        gpu_timing.load(problem, contender, stream)
    gpu_timing.measure(contenders, rounds)
    rows = []
    for pairing in PAIRINGS[::-1]:
        us = {c.name: c.us for c in contenders if c.pairing == pairing}
        aot, jit = recorded(gpu, name, pairing)
        times = {"eager": us.get("torch eager"), "compile": us.get("torch.compile"), "AOT": aot, "JIT": jit}
        mine = us["ropewalk"]
        rows.append({
            "name": name, "tokens": shape.tokens, "q_heads": shape.q_heads, "k_heads": shape.k_heads,
            "v_heads": shape.v_heads, "head_dim": shape.head_dim, "rotary_dim": shape.rotary_dim, "pairing": pairing,
            "us": mine, "peers_us": times,
            "speed_up": {peer: t / mine if t and mine else None for peer, t in times.items()},
            "wrong": any(c.failure for c in contenders if c.name == "ropewalk" and c.pairing == pairing),
        })  # fmt: skip
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    heads = f"{row['q_heads']}/{row['k_heads']}/{row['v_heads']} x {row['head_dim']}"
    if row["rotary_dim"] != row["head_dim"]:
        heads += f" ({row['rotary_dim']})"

    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:.2f}{sign}"

    times = [number(t) for t in row["peers_us"].values()] + [number(t, "x") for t in row["speed_up"].values()]
    return [row["name"], str(row["tokens"]), heads, row["pairing"], number(row["us"]), *times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=gpu_compare.parse_names, default=NAMES, metavar="NAME,..")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: seconds a shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("seed_form: torch finds no CUDA device here", file=sys.stderr)
        return 2
    gpu = gpu_compare.gpu_name()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    print(f"{gpu['name']}, torch {torch.__version__}, {date}")
    if not any(kind in gpu["name"] for kind in RECORDED):
        print(f"AOT and JIT were recorded on {' and '.join(RECORDED)} only")
    widths, rows = [18, 6, 20, 11, *[9] * 9], []

    def line(texts: list[str]) -> None:
        print("  ".join(t.ljust(w) if i in (0, 2, 3) else t.rjust(w)
                        for i, (t, w) in enumerate(zip(texts, widths, strict=True))), flush=True)  # fmt: skip

    line(COLUMNS)
    with torch.no_grad():
        for name in options.shapes:
            new = measure(name, not options.no_compile, 9, gpu["name"])
            rows += new
            for row in new:
                line(cells(row))
            torch.cuda.empty_cache()
    out = {"date": date, "gpu": gpu, "torch": torch.__version__, "results": rows}
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    if options.markdown:
        rule = ["---" if i in (0, 2, 3) else "---:" for i in range(len(COLUMNS))]
        lines = [COLUMNS, rule, *(cells(row) for row in rows)]
        options.markdown.write_text("".join("| " + " | ".join(texts) + " |\n" for texts in lines))
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
