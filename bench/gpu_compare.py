"""Ropewalk on CUDA beside its floor and its peers, in one process and one run.

    python bench/gpu_compare.py [--quick] [--json FILE] [--shapes NAME,..] [--no-compile]

Floor: an in-place read-modify-write of the same bytes, the best of a search over the kernels of measure/cuda_floor.cc.
Below 1,024 tokens it also reads what a rotation must read, a position and a weight; for a store it reads the slots and
writes the caches. "Of floor" is time over the floor's. Peers: torch eager and torch.compile (static shapes) of the
chain that transformers models run, and FlashInfer, Liger, flash-attn, sgl_kernel and vLLM if they are installed.

How it is timed: each contender is captured in a CUDA graph of many calls. From 1,024 tokens on the calls go round
buffers of 0.8 GB in all, so that nothing is left in the L2 cache; below, they go round eight buffers, which stay there
if they fit. Contenders take turns; a number is the median of several replays, each queued behind another one. Every
result is compared with float64 before it is timed, with what must not change. torch's cosines and sines are made
beforehand; Ropewalk with frequencies computes its angles in the call.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_contenders
import gpu_floor
import gpu_problem
import ropewalk
import torch
from gpu_contenders import Sol, floor_rows, ours, peers_here, torchs
from gpu_problem import (
    DEFAULT,
    GROUPS,
    OPS,
    PAIRINGS,
    SHAPES,
    STORES,
    THETA,
    Problem,
    Shape,
    exact_angles,
    reference,
)
from gpu_timing import check, floor_ops, load, lowest, measure, search

QUICK = ["flux_1024", "decode_1", "decode_64", "decode_256", "prefill_1024", "prefill_8192", "head_80", "head_256"]
COMPILED = ["flux_1024", "decode_1", "prefill_1024", "prefill_8192", "decode_64", "qwen_image_partial", "head_256",
            "decode_256", "qwen_image_1024", "zimage_1024"]  # fmt: skip
COMPILED_QUICK = ["flux_1024", "decode_1", "prefill_1024"]


def compare(
    shape: Shape, options: argparse.Namespace, here: dict[str, str], compiled: bool, compiler: gpu_floor.Compiler
) -> list[dict[str, Any]]:
    """All contenders on one shape; a row of the results for each."""
    problem = Problem(shape)
    stream = torch.cuda.Stream()
    wanted: dict[tuple[str, str], Any] = {}
    with_store = shape.name in gpu_problem.WITH_STORE
    contenders = [ours(problem, op, pairing, angles)
                  for op in OPS for pairing in PAIRINGS for angles in ("frequencies", "table")]  # fmt: skip
    if with_store:
        contenders += [ours(problem, op, "neox", angles) for op in STORES for angles in ("frequencies", "table")]
    if shape.name in gpu_problem.SOL:
        problem.sol = Sol(problem)
        contenders.append(problem.sol.ours())
    served = floor_ops(shape, list(dict.fromkeys(c.op for c in contenders)))
    for op in set(served.values()):
        compiler.want(floor_rows(shape, op))
    contenders += torchs(problem, compiled=False)
    for name, (_, maker) in gpu_contenders.PEERS.items():
        if not here[name].startswith("absent"):
            try:
                contenders += maker(problem)
            except Exception as error:  # a peer of another version
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    if compiled:
        torch.compiler.reset()
        contenders += torchs(problem, compiled=True)
    for contender in contenders:
        check(problem, contender, wanted)
    wanted.clear()
    problem.fill()
    best = []
    for op in dict.fromkeys(served.values()):
        floor_kernels = gpu_floor.Floor(compiler.want(floor_rows(shape, op)).result())
        best += search(problem, op, floor_kernels, stream)
    problem.fill()
    for contender in contenders:
        load(problem, contender, stream)
    measure(best + contenders, 5 if options.quick else 9)

    floor = lowest(best, served)
    rows = []
    for contender in [*dict.fromkeys(floor.values()), *contenders]:
        moved = contender.bytes or problem.bytes(contender.op)
        under = floor.get(contender.op)
        row: dict[str, Any] = {
            "shape": shape.name, "tokens": shape.tokens, "q_heads": shape.q_heads, "k_heads": shape.k_heads,
            "v_heads": shape.v_heads, "head_dim": shape.head_dim, "rotary_dim": shape.rotary_dim, "dtype": "bf16",
            "cold": shape.cold, "op": contender.op, "pairing": contender.pairing, "angles": contender.angles,
            "contender": contender.name, "us": contender.us, "bytes": moved, "error": contender.error,
            "detail": contender.detail,
        }  # fmt: skip
        if contender.failure:
            row["failure"] = contender.failure
        if contender.us is not None:
            row["gb_per_s"] = moved / contender.us * 1e-3
            if under is not None:
                row |= {"floor_us": under.us, "of_floor": contender.us / under.us, "floor": under.detail}
        limit = aim(row)
        if limit is not None and contender.name == "ropewalk" and "of_floor" in row:
            row |= {"aim": limit, "met": row["of_floor"] <= limit}
        rows.append(row)
    for contender in [*best, *contenders]:
        contender.graph = None
    return rows


def general_aim(op: str, tokens: int) -> float:
    """The highest time over the floor for a shape that no list holds."""
    if "+kv" in op:
        return 1.15 if "fp8" in op else 1.10
    return 1.05 if tokens >= 4096 else 1.10


def aim(row: dict[str, Any]) -> float | None:
    """The highest time over the floor that the design allows."""
    if row["shape"] not in [shape.name for shape in DEFAULT]:
        return general_aim(row["op"], row["tokens"])
    if "+kv" in row["op"]:
        return 1.10
    dim, norm = row["head_dim"], row["op"] == "norm+rope"
    if dim & (dim - 1):
        return 1.08
    if row["tokens"] >= 4096:
        return 1.06 if norm else 1.03
    if row["tokens"] >= 1024:
        return 1.10 if norm else 1.05
    if row["tokens"] >= 256:
        return 1.08 if norm else 1.05
    return 1.12 if norm else 1.05


# ---------------------------------------------------------------------------------------------------------------------
# Host time, accuracy


def host_times() -> dict[str, float]:
    """Microseconds that a call costs the caller, the device idle or nearly: the median of averages, in turns."""
    x = torch.zeros(1, device=gpu_problem.DEVICE)
    q, k = (
        torch.randn(1, 32, 128, device=gpu_problem.DEVICE).bfloat16(),
        torch.randn(1, 8, 128, device=gpu_problem.DEVICE).bfloat16(),
    )
    positions = torch.zeros(1, dtype=torch.int32, device=gpu_problem.DEVICE)
    frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=128)
    weight = torch.ones(128, dtype=torch.bfloat16, device=gpu_problem.DEVICE)
    calls: dict[str, Callable[[], Any]] = {
        "x.add_(1)": lambda: x.add_(1),
        "ropewalk.rope_": lambda: ropewalk.rope_(q, k, positions=positions, frequencies=frequencies),
        "ropewalk.rope_, norm": lambda: ropewalk.rope_(
            q, k, positions=positions, frequencies=frequencies, q_weight=weight, k_weight=weight
        ),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for number in range(21):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            if number:
                samples[name].append((time.perf_counter() - start) / 200 * 1e6)
    gc.enable()
    torch.cuda.synchronize()
    out = {name: statistics.median(values) for name, values in samples.items()}
    out["ropewalk.rope_ / x.add_(1)"] = out["ropewalk.rope_"] / out["x.add_(1)"]
    return out


def error_by_position(here: dict[str, str]) -> list[dict[str, Any]]:
    """Largest absolute error of a rotation of 128 positions from each on, heads of 128 with theta 1e4, against float64:
    bfloat16 results, and float32 ones."""
    starts = [0, 1024, 8192, 32_768, 131_072, 524_288, 1_000_000, 2**22, 10_000_000, 2**26, 2**28, 2**30, 2**31 - 128]
    generator = torch.Generator(gpu_problem.DEVICE).manual_seed(3)
    frequencies, rows = ropewalk.Frequencies(theta=THETA, rotary_dim=128), []
    inv_freq = 1.0 / THETA ** (torch.arange(0, 128, 2, device=gpu_problem.DEVICE, dtype=torch.float32) / 128)
    for start in starts:
        positions = torch.arange(start, start + 128, dtype=torch.int64, device=gpu_problem.DEVICE)
        angles = exact_angles(range(start, start + 128), 128).to(gpu_problem.DEVICE)
        q = torch.randn(128, 8, 128, generator=generator, device=gpu_problem.DEVICE).bfloat16()
        want = reference(q, angles, "neox", None)
        row: dict[str, Any] = {"position": start, "bf16 rounding": (want.bfloat16().double() - want).abs().max().item()}

        def largest(x: torch.Tensor, want: torch.Tensor = want) -> float:
            return (x.double() - want).abs().max().item()

        def ours_in(dtype: torch.dtype, q: torch.Tensor = q, positions: torch.Tensor = positions) -> torch.Tensor:
            return ropewalk.rope(q.to(dtype), positions=positions, frequencies=frequencies)[0]

        row["ropewalk"], row["ropewalk, float32"] = largest(ours_in(torch.bfloat16)), largest(ours_in(torch.float32))
        phase = positions.float()[:, None] * inv_freq
        cos, sin = phase.cos()[:, None], phase.sin()[:, None]
        a, b = q.float().chunk(2, -1)
        plain = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        row["float32 sincos"], row["float32 sincos, float32"] = largest(plain.bfloat16()), largest(plain)
        if not here.get("FlashInfer", "absent").startswith("absent"):
            try:
                other, k = q.clone(), q[:, :1].clone()
                importlib.import_module("flashinfer.rope").apply_rope_pos_ids_inplace(
                    other, k, positions, rope_theta=THETA
                )
                row["FlashInfer"] = largest(other)
            except Exception as error:  # whatever a foreign package does
                print(f"FlashInfer at {start}: {error}", file=sys.stderr)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def alive() -> bool:
    """Whether the context still works: a kernel that reads or writes beyond memory ends it."""
    try:
        torch.zeros(1, device=gpu_problem.DEVICE).item()
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def restart(*more: str) -> None:
    """Begins this script again in the place of this process, whose context is lost."""
    print("the context is lost: going on in a new process", flush=True)
    names = {argument.partition("=")[0] for argument in more}
    kept = [argument for argument in sys.argv[1:] if argument.partition("=")[0] not in names]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *kept, *more])


def gpu_name() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    details = {"name": properties.name, "capability": f"{properties.major}.{properties.minor}",
               "multiprocessors": str(properties.multi_processor_count),
               "cuda of torch": str(torch.version.cuda)}  # fmt: skip
    for backend in ropewalk.backends():
        if backend["name"] == "cuda":
            details["ropewalk"] = backend["detail"]
    return details


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each operation and pairing of one shape: microseconds, and ours as a multiple of the floor."""
    for op, pairing in dict.fromkeys((r["op"], r["pairing"]) for r in rows if r["contender"] == "ropewalk"):
        cells = []
        for row in rows:
            if (row["op"], row["pairing"]) != (op, pairing):
                continue
            name = row["contender"] + {"table": " table", "frequencies": ""}.get(row["angles"], "")
            if row["contender"] in ("torch eager", "torch.compile", "Liger", "flash-attn", "vLLM"):
                name = row["contender"]
            if row["us"] is None:
                cells.append(f"{name} {row.get('failure', '')[:60]}")
            elif row["contender"] == "ropewalk":
                missed = "" if row.get("met", True) else f" (aim {row['aim']:.2f})"
                cells.append(f"{name} {row['us']:.2f} = {row.get('of_floor', math.nan):.3f}{missed}")
            else:
                cells.append(f"{name} {row['us']:.2f}")
        floor = next((r["floor_us"] for r in rows if r["op"] == op and "floor_us" in r), math.nan)
        first = rows[0]
        heads = f"{first['q_heads']}/{first['k_heads']}/{first['v_heads']}x{first['head_dim']}"
        print(f"{first['shape']:18} {first['tokens']:5} {heads:13} {op:18} {pairing:11} floor {floor:7.2f}  ", end="")
        print("  ".join(cells), flush=True)


def rows_as_lines(out: dict[str, Any]) -> str:
    """JSON with a result a line, so that two runs can be compared."""
    head = json.dumps({key: value for key, value in out.items() if key != "results"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in out["results"])
    return f'{head[:-2]},\n "results": [\n{rows}\n ]\n}}\n'


def parse_names(text: str) -> list[str]:
    names = []
    for name in text.split(","):
        if name not in SHAPES and name not in GROUPS:
            raise argparse.ArgumentTypeError(f"no shape or group {name}; there are {', '.join([*GROUPS, *SHAPES])}")
        names += [shape.name for shape in GROUPS[name]] if name in GROUPS else [name]
    return list(dict.fromkeys(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes and fewer replays")
    parser.add_argument("--shapes", type=parse_names, metavar="NAME,..", help="these alone: shapes, or groups of them")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="when to leave the rest out: default 300, with --quick 150")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too, after each shape")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has, and go on")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_compare: torch finds no CUDA device here", file=sys.stderr)
        return 2
    began = time.time()
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    limit = options.seconds or (150 if options.quick else 300)
    here = peers_here()
    for name, version in here.items():
        print(f"{name}: {version}")
    names = options.shapes or (QUICK if options.quick else [shape.name for shape in DEFAULT])
    compiled = [] if options.no_compile else names if options.shapes else COMPILED_QUICK if options.quick else COMPILED
    compiler = gpu_floor.Compiler(f"sm_{major}{minor}{'a' if major >= 9 else ''}")
    out: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu_name(), "ropewalk": ropewalk.__version__, "peers": here, "quick": options.quick,
        "seconds": 0.0, "skipped": [], "failed": {}, "results": [],
    }  # fmt: skip

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(rows_as_lines(out))

    if options.resume and options.json and options.json.exists():
        out = json.loads(options.json.read_text())
        began -= out["seconds"]
    with torch.no_grad():
        if "host_us" not in out:
            out["host_us"] = host_times()
            print("host, us: " + ", ".join(f"{name} {value:.2f}" for name, value in out["host_us"].items()))
            out["error_by_position"] = error_by_position(here)
        for name in names:
            if name in out["failed"] or any(row["shape"] == name for row in out["results"]):
                continue  # before this process
            elapsed = time.time() - began
            if elapsed > limit - 5:
                out["skipped"].append(name)
                continue
            try:
                rows = compare(SHAPES[name], options, here, name in compiled and elapsed < 0.75 * limit, compiler)
            except Exception as error:  # that of one shape is not the others'
                out["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                    :300
                ]
                print(f"{name}: {out['failed'][name]}", file=sys.stderr, flush=True)
                rows = []
            out["results"] += rows
            print_table(rows)
            out["seconds"] = time.time() - began
            write()
            if not alive():
                out["failed"].setdefault(name, "the context was lost")
                write()
                if options.json is None:
                    print("gpu_compare: the context was lost; with --json the rest would go on", file=sys.stderr)
                    return 1
                restart("--resume")
            gc.collect()
            torch.cuda.empty_cache()
    compiler.close()
    aims = [row for row in out["results"] if "aim" in row]
    fused = {(r["shape"], r["pairing"], r["angles"]): r["us"] for r in out["results"]
             if r["contender"] == "ropewalk" and r["op"] == "norm+rope"}  # fmt: skip
    for row in out["results"]:
        base = fused.get((row["shape"], row["pairing"], row["angles"]))
        if row["contender"] == "ropewalk" and "+kv" in row["op"] and base and row["us"]:
            row["of_norm_rope"] = row["us"] / base
            if row["tokens"] <= 256:
                row["met_of_norm_rope"] = row["of_norm_rope"] <= 1.15
            share = f"{row['us']:.2f} = {row['of_norm_rope']:.3f} of norm+rope"
            print(f"{row['shape']:18} {row['op']:18} {row['angles']:11} {share}")
    slower = slower_than_peers(out["results"])
    for line in slower:
        print(line)
    out["slower_than"] = slower
    out["kernels"] = ropewalk.counters()
    out["seconds"] = time.time() - began
    wrong = sum(row["contender"] == "ropewalk" and "failure" in row for row in out["results"]) + len(out["failed"])
    print(f"aims met: {sum(r['met'] for r in aims)} of {len(aims)}; slower than a peer: {len(slower)}; wrong: {wrong}; "
          f"skipped: {', '.join(out['skipped']) or 'none'}; {out['seconds']:.0f} s")  # fmt: skip
    write()
    return 1 if wrong else 0


def slower_than_peers(rows: list[dict[str, Any]]) -> list[str]:
    """Where a peer beats us at what it does (angles computed or from a table alike)."""
    found = []
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row["contender"] == "ropewalk" and row["us"]:
            key = (row["shape"], row["op"], row["pairing"])
            best[key] = min(best.get(key, math.inf), row["us"])
    for row in rows:
        key = (row["shape"], row["op"], row["pairing"])
        if key not in best:  # where we cannot leave k out of the rows, what writes it there as well
            key = (row["shape"], row["op"].removesuffix(", k only"), row["pairing"])
        if row["contender"] not in ("ropewalk", "floor") and row["us"] and key in best and row["us"] < best[key]:
            other = f"{row['contender']} {row['angles']} {row['us']:.2f}"
            found.append(f"slower: {' '.join(key)}: {best[key]:.2f}, {other}")
    return found


if __name__ == "__main__":
    sys.exit(main())
