"""Time over the floor on CUDA for head counts and token counts that no list of ours holds; bfloat16, packed rows.

    python bench/gpu_sweep.py --out sweep [--seconds 560] [--random 20 --seed 1] [--heads 8/1x128,..] [--tokens 1,8,..]

Timing, checks and floor are those of bench/gpu_compare.py; all modes of a shape and their floors take turns in one run.
Each mode is called with positions of 32 and of 64 bits, and its figure is that of the slower one.
`sweep.json` grows with every shape, `sweep.md` has the tables: figures above the aim are bold, `-` is a wrong result or
a failure, an empty place was not reached in time. --random draws shapes besides. Needs torch and Ropewalk, no network:
with the package in a folder of its own (pip install --no-deps --target FOLDER ropewalk-*.whl apache-tvm-ffi),
PYTHONPATH=FOLDER. Exit code 1 if a result was wrong; a missed aim is reported only.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import itertools
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import gpu_compare as compare
import gpu_floor
import gpu_problem
import gpu_timing as timing
import ropewalk
import torch
from gpu_contenders import Contender, floor_rows, our_arguments, ours
from gpu_problem import OPS, PAIRINGS, Problem, Shape

HEADS = ["8/1x128", "64/8x128", "28/4x128", "40/8x128", "16/16x64", "64/8x64", "96/8x128", "14/2x64", "16/8x256",
         "12/12x80"]  # fmt: skip
TOKENS = [1, 8, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6000]
# Operation, angles, pairing.
PLAIN = [(op, angles, pairing)
         for op in OPS for angles in ("frequencies", "table") for pairing in PAIRINGS]  # fmt: skip
STORES = [(op, "frequencies", "neox") for op in gpu_problem.STORES]
GROUPS = {"rope": [m for m in PLAIN if m[0] == "rope"], "norm+rope": [m for m in PLAIN if m[0] == "norm+rope"],
          "store": [m for m in STORES if "k only" not in m[0]],
          "k-only": [m for m in STORES if "k only" in m[0]]}  # fmt: skip
POSITIONS = (torch.int32, torch.int64)
ROUNDS = 7
RESERVE = 15.0  # seconds to leave for the summary


def parse_heads(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    if not match or not all(int(n) for n in match.groups()) or int(match[3]) % 2:
        raise argparse.ArgumentTypeError(f"heads must be Q/KxHEAD_DIM, such as 28/4x128, but are {text}")
    return int(match[1]), int(match[2]), int(match[3])


def shape_of(heads: str, tokens: int) -> Shape:
    q, k, dim = parse_heads(heads)
    return Shape(heads, tokens, q, k, k, dim, dim)


def drawn(count: int, seed: int) -> list[Shape]:
    """Head counts and token counts besides those above: 1 to 8,192 tokens, the logarithm even."""
    generator, found = random.Random(seed), []
    while len(found) < count:
        k = generator.choice([1, 1, 2, 2, 3, 4, 4, 5, 6, 8, 8, 10, 12, 16])
        q = k * generator.choice([1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
        dim = generator.choice([64, 64, 80, 96, 112, 128, 128, 128, 160, 192, 256])
        tokens = round(math.exp(generator.uniform(0, math.log(8192))))
        if q <= 128 and (q + 2 * k) * dim <= 36_000:
            found.append(Shape(f"{q}/{k}x{dim}", tokens, q, k, k, dim, dim))
    return found


def prepare(shapes: list[Shape], modes: list[tuple[str, str, str]], workers: int) -> str:
    """Compiles all kernels of ours beforehand, in threads."""
    began = time.perf_counter()

    def one(shape: Shape) -> list[str]:
        failures, what = [], "its tensors"
        try:
            problem = Problem(shape, torch.float32, buffers=1)
            for (what, angles, pairing), dtype in itertools.product(modes, POSITIONS):
                tensors, options = our_arguments(problem, what, pairing, angles, positions=dtype)
                ropewalk.prepare(*tensors, **options)
        except Exception as error:  # told again when the shape is timed
            failures.append(f"{shape.name} @ {shape.tokens}, {what}: {error}")
        return failures

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        failures = [line for lines in pool.map(one, shapes) for line in lines]
    for line in failures[:20]:
        print(f"prepare: {line}", file=sys.stderr)
    torch.cuda.empty_cache()
    return f"kernels prepared in {time.perf_counter() - began:.0f} s, {len(failures)} failures"


def time_shape(
    shape: Shape, modes: list[tuple[str, str, str]], compiler: gpu_floor.Compiler, stream: torch.cuda.Stream
) -> list[dict[str, Any]]:
    """A row for each mode of one shape."""
    problem = Problem(shape, torch.float32)
    contenders = [ours(problem, op, pairing, angles, dtype)
                  for (op, angles, pairing), dtype in itertools.product(modes, POSITIONS)]  # fmt: skip
    wanted: dict[tuple[str, str], Any] = {}
    for contender in contenders:
        timing.check(problem, contender, wanted)
    wanted.clear()
    served = timing.floor_ops(shape, list(dict.fromkeys(c.op for c in contenders)))
    best: list[Contender] = []
    loaded = []
    for op in dict.fromkeys(served.values()):
        rows = floor_rows(shape, op)
        loaded.append(gpu_floor.Floor(compiler.want(rows).result()))
        compiler.forget(rows)
        problem.fill()
        best += timing.search(problem, op, loaded[-1], stream)
    problem.fill()
    for contender in contenders:
        timing.load(problem, contender, stream)
    timing.measure(best + contenders, ROUNDS)
    floor = timing.lowest(best, served)
    rows = []
    for i in range(0, len(contenders), len(POSITIONS)):
        both = contenders[i : i + len(POSITIONS)]
        # A failure of one is the row's; else the slower one is.
        contender = max(both, key=lambda c: (bool(c.failure), c.us or 0.0))
        row: dict[str, Any] = {
            "heads": shape.name, "tokens": shape.tokens, "op": contender.op, "angles": contender.angles,
            "pairing": contender.pairing, "us": contender.us, "aim": compare.general_aim(contender.op, shape.tokens),
            "us_by_positions": [c.us for c in both], "kernel": contender.detail, "shape": contender.shape,
        }  # fmt: skip
        lowest = floor.get(contender.op)
        if contender.failure:
            row["failure"] = contender.failure
        elif lowest is None:
            row["failure"] = "no floor"
        elif contender.us is not None:
            row |= {"floor_us": lowest.us, "of_floor": contender.us / lowest.us, "floor": lowest.detail}  # type: ignore
        rows.append(row)
    for contender in [*best, *contenders]:
        contender.graph = None
    for one in loaded:
        one.unload()
    return rows


def mark(row: dict[str, Any] | None) -> str:
    """A figure for a table: bold above the aim."""
    if row is None:
        return ""
    if "of_floor" not in row:
        return "-"
    text = f"{row['of_floor']:.2f}"
    return f"**{text}**" if row["of_floor"] > row["aim"] else text


def summary(out: dict[str, Any]) -> str:
    rows = out["results"]
    by = {(r["heads"], r["tokens"], r["op"], r["angles"], r["pairing"]): r for r in rows}
    timed = [r for r in rows if "of_floor" in r]
    above = sorted((r for r in timed if r["of_floor"] > r["aim"]), key=lambda r: r["aim"] - r["of_floor"])
    failed = [r for r in rows if "failure" in r]
    lines = [
        f"# Time over the floor: {out['gpu'].get('name', '?')}, {out['date'][:10]}",
        "",
        f"Ropewalk {out['ropewalk']}; bfloat16, packed rows, graph replay, cold L2 from {gpu_problem.COLD_FROM} tokens "
        "on; each result checked first; of positions of 32 and 64 bits the slower ones. `bench/gpu_sweep.py`.",
        "",
        f"{len(timed)} figures, {len(above)} above their aim (bold), {len(failed)} wrong or failed (-), "
        f"{out['left']} of {out['shapes']} shapes not reached. Aims: rope and norm + rope 1.10, from 4,096 tokens on "
        "1.05; stores 1.10, in fp8 1.15.",
    ]  # fmt: skip
    modes = list(dict.fromkeys((r["op"], r["angles"], r["pairing"]) for r in rows))
    for op, angles, pairing in modes:
        table = [r for r in rows if (r["op"], r["angles"], r["pairing"]) == (op, angles, pairing) and not r["drawn"]]
        if not table:
            continue
        tokens = sorted({r["tokens"] for r in table})
        lines += ["", f"## {op}, {angles}, {pairing}", "| heads | " + " | ".join(map(str, tokens)) + " |",
                  "|---" * (len(tokens) + 1) + "|"]  # fmt: skip
        for heads in dict.fromkeys(r["heads"] for r in table):
            cells = [mark(by.get((heads, n, op, angles, pairing))) for n in tokens]
            lines.append(f"| {heads} | " + " | ".join(cells) + " |")
    random_rows = [r for r in rows if r["drawn"]]
    if random_rows:
        heads_of = {"frequencies": "freq", "table": "table", "neox": "neox", "interleaved": "inter"}
        titles = [f"{op} {heads_of[angles]} {heads_of[pairing]}" for op, angles, pairing in modes]
        lines += ["", f"## Drawn by seed {out['seed']}", "| shape | " + " | ".join(titles) + " |",
                  "|---" * (len(modes) + 1) + "|"]  # fmt: skip
        for heads, tokens in dict.fromkeys((r["heads"], r["tokens"]) for r in random_rows):
            cells = [mark(by.get((heads, tokens, *mode))) for mode in modes]
            lines.append(f"| {heads} @ {tokens} | " + " | ".join(cells) + " |")
    if above:
        lines += ["", "## Above the aim, the furthest first",
                  "| shape | mode | us | floor us | of floor | aim | kernel |", "|---" * 7 + "|"]  # fmt: skip
        for r in above[:60]:
            lines.append(f"| {r['heads']} @ {r['tokens']} | {r['op']}, {r['angles']}, {r['pairing']} | {r['us']:.2f} | "
                         f"{r['floor_us']:.2f} | {r['of_floor']:.3f} | {r['aim']:.2f} | {r['kernel']} |")  # fmt: skip
        if len(above) > 60:
            lines.append(f"\n{len(above) - 60} more are in the JSON file.")
    for r in failed[:40]:
        lines.append(f"\n- {r['heads']} @ {r['tokens']}, {r['op']}, {r['angles']}, {r['pairing']}: {r['failure']}")
    return "\n".join(lines) + "\n"


def write(out: dict[str, Any], path: Path) -> None:
    """In one step, so that a run that ends early leaves whole files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", compare.rows_as_lines(out)), (".md", summary(out))):
        temporary = path.with_name(path.name + suffix + ".new")
        temporary.write_text(content)
        temporary.replace(path.with_name(path.name + suffix))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("sweep"), metavar="PATH", help="PATH.json and PATH.md")
    made.add_argument("--heads", default=",".join(HEADS), metavar="Q/KxDIM,..", help="'' for drawn shapes alone")
    made.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="N,..")
    made.add_argument("--modes", default="rope,norm+rope,store", metavar="NAME,..",
                      help=f"of {', '.join(GROUPS)}; k-only: k goes to its cache and is not written back")  # fmt: skip
    made.add_argument("--random", type=int, default=0, metavar="N", help="so many drawn shapes besides")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--seconds", type=float, default=560, help="stop after so many (default 560)")
    made.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compilers at a time")
    made.add_argument("--resume", action="store_true", help="keep what PATH.json has, and go on")
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the clock: for a process that was replaced
    return made


def main() -> int:
    options = parser().parse_args()
    until = options.until or time.time() + options.seconds
    try:
        listed = [shape_of(h, int(n)) for n in options.tokens.split(",") for h in options.heads.split(",") if h]
        modes = [mode for name in options.modes.split(",") for mode in GROUPS[name]]
    except (argparse.ArgumentTypeError, ValueError, KeyError) as error:
        print(f"gpu_sweep: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu_sweep: torch finds no CUDA device here", file=sys.stderr)
        return 2
    random_shapes = [s for s in drawn(options.random, options.seed) if s not in listed]
    shapes = random_shapes + listed
    major, minor = torch.cuda.get_device_capability()
    out: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": compare.gpu_name(), "ropewalk": ropewalk.__version__, "torch": torch.__version__, "seed": options.seed,
        "shapes": len(shapes), "left": len(shapes), "seconds": 0.0, "lost": [], "results": [],
    }  # fmt: skip
    path = options.out.with_suffix("") if options.out.suffix in (".json", ".md") else options.out
    so_far = path.with_name(path.name + ".json")
    if options.resume and so_far.exists():
        before = json.loads(so_far.read_text())
        out |= {key: before[key] for key in ("date", "lost", "results", "seconds")}
    began = time.time() - out["seconds"]
    done = {(row["heads"], row["tokens"]) for row in out["results"]}
    todo = [s for s in shapes if (s.name, s.tokens) not in done]

    compiler = gpu_floor.Compiler(f"sm_{major}{minor}{'a' if major >= 9 else ''}", options.workers)
    with torch.no_grad():
        print(prepare(todo, modes, options.workers), flush=True)
        stream, slowest = torch.cuda.Stream(), 0.0
        ahead = iter(todo)
        for number, shape in enumerate(todo):
            if time.time() + slowest + RESERVE > until:
                print(f"time is up: {len(todo) - number} shapes left out", flush=True)
                break
            # The floors of the next shapes are compiled while this one is timed.
            for soon in ahead:
                for op in set(timing.floor_ops(soon, [op for op, _, _ in modes]).values()):
                    compiler.want(floor_rows(soon, op))
                if len(compiler.made) >= 3 * options.workers:
                    break
            start = time.time()
            try:
                rows = time_shape(shape, modes, compiler, stream)
            except Exception as error:  # that of one shape is not the others'
                text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
                rows = [{"heads": shape.name, "tokens": shape.tokens, "op": op, "angles": angles, "pairing": pairing,
                         "us": None, "aim": compare.general_aim(op, shape.tokens), "kernel": "", "failure": text}
                        for op, angles, pairing in modes]  # fmt: skip
            slowest = max(slowest, time.time() - start)
            for row in rows:
                row["drawn"] = shape in random_shapes
            out["results"] += rows
            out |= {"left": len(todo) - number - 1, "seconds": round(time.time() - began, 1)}
            write(out, path)
            worst = max((r for r in rows if "of_floor" in r), key=lambda r: r["of_floor"] - r["aim"], default=None)
            text = (
                f"worst {worst['of_floor']:.2f} ({worst['op']}, {worst['angles']}, {worst['pairing']})" if worst else ""
            )
            failures = sum("failure" in r for r in rows)
            print(f"{number + 1:4}/{len(todo)} {shape.name:9} @ {shape.tokens:5}  {time.time() - start:5.2f} s  {text}"
                  f"{f'  {failures} FAILED' if failures else ''}", flush=True)  # fmt: skip
            if not compare.alive():
                out["lost"].append(f"{shape.name} @ {shape.tokens}")
                write(out, path)
                compare.restart("--resume", f"--until={until}")
    compiler.close()
    write(out, path)
    print(summary(out).split("##")[0])
    return 1 if any("failure" in row for row in out["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
