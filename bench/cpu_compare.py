"""Ropewalk beside torch on the CPU: eager and torch.compile of transformers' own chain, every shape in one run.

Each contender's result is checked against float64 first. Contenders take turns, batch by batch, on the same data; the
numbers are medians. What favours torch: its cosines and sines are made beforehand and are not timed, torch.compile
gets static shapes. Ropewalk computes the angles in the call.

    .venv/bin/python bench/cpu_compare.py --tokens 1,64 --heads 32,8,128
    .venv/bin/python bench/cpu_compare.py --tokens 64 --heads 32,32,96,24     # of which 24 are rotated
    .venv/bin/python bench/cpu_compare.py --record          # all shapes, into docs/results/
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import ropewalk
import torch
import transformers
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
HEADS = [(32, 8, 128, 128), (24, 24, 128, 128), (16, 4, 256, 256), (8, 8, 64, 64)]
THETA, EPS = 1e6, 1e-6
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Norms in place drift from call to call: weights near 1 and fresh data after so many calls keep values normal.
CALLS_BEFORE_RESTORE = 32


class Problem:
    """One shape: q and k [1, tokens, heads, head_dim], positions, weights, and the tables that transformers takes."""

    def __init__(self, tokens: int, heads: tuple[int, int, int, int], norm: bool, dtype: torch.dtype) -> None:
        q_heads, k_heads, head_dim, self.rotary_dim = heads
        generator = torch.Generator().manual_seed(1)
        self.norm = norm
        self.first_q = torch.randn(1, tokens, q_heads, head_dim, generator=generator).to(dtype)
        self.first_k = torch.randn(1, tokens, k_heads, head_dim, generator=generator).to(dtype)
        self.q, self.k = self.first_q.clone(), self.first_k.clone()
        start = torch.randint(0, 4096, (1,), generator=generator)
        self.positions = (torch.arange(tokens) + start)[None]
        self.frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=self.rotary_dim)
        self.q_norm, self.k_norm = Qwen3RMSNorm(head_dim, eps=EPS), Qwen3RMSNorm(head_dim, eps=EPS)
        for module in (self.q_norm, self.k_norm):
            module.weight.data = (1 + torch.randn(head_dim, generator=generator) / 64).to(dtype)
            module.weight.requires_grad_(False)
        inv_freq = 1.0 / THETA ** (torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim)
        self.angles = self.positions[0, :, None].double() * inv_freq
        wide = torch.cat([self.angles, self.angles], dim=-1)[None]
        self.cos, self.sin = wide.cos().to(dtype), wide.sin().to(dtype)

    def restore(self) -> None:
        self.q.copy_(self.first_q)
        self.k.copy_(self.first_k)

    def bytes(self) -> int:
        return 2 * (self.q.nbytes + self.k.nbytes)

    def expected(self, first: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        x = first.double()
        if self.norm:
            x = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * module.weight.double()
        half = self.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : self.rotary_dim], x[..., self.rotary_dim :]
        cos, sin = self.angles.cos()[None, :, None], self.angles.sin()[None, :, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def ours(problem: Problem) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    p = problem
    weights = {"q_weight": p.q_norm.weight, "k_weight": p.k_norm.weight, "eps": EPS} if p.norm else {}

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return ropewalk.rope_(p.q, p.k, positions=p.positions, frequencies=p.frequencies, **weights)

    return call


def chain(problem: Problem) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What a transformers model does between its projections and attention."""
    p = problem

    def call(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if p.norm:
            q, k = p.q_norm(q), p.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if p.rotary_dim == q.shape[-1]:
            return apply_rotary_pos_emb(q, k, cos, sin)
        # As GPT-NeoX, StableLM and Phi do.
        (q, q_rest), (k, k_rest) = (x.split([p.rotary_dim, x.shape[-1] - p.rotary_dim], dim=-1) for x in (q, k))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return torch.cat([q, q_rest], dim=-1), torch.cat([k, k_rest], dim=-1)

    return call


def worst_error(problem: Problem, result: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The largest error, as a part of the largest expected value of its head."""
    worst = 0.0
    pairs = ((result[0], problem.first_q, problem.q_norm), (result[1], problem.first_k, problem.k_norm))
    for got, first, module in pairs:
        want = problem.expected(first, module)
        error = (got.double() - want).abs() / want.abs().amax(-1, keepdim=True)
        worst = max(worst, error.max().item())
    return worst


def batch_seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(problem: Problem, contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of a call for each contender."""
    calls = {}
    for name, call in contenders.items():
        problem.restore()
        for _ in range(3):
            call()
        once = max(batch_seconds(call, 3), 1e-7)
        calls[name] = max(1, min(CALLS_BEFORE_RESTORE, int(200e-6 / once)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    rounds = 0
    gc.disable()
    while rounds < 7 or (rounds < 300 and time.perf_counter() < end):
        names = list(contenders) if rounds % 2 else list(reversed(contenders))
        for name in names:
            problem.restore()
            contenders[name]()  # brings data and code back
            samples[name].append(batch_seconds(contenders[name], calls[name]))
        rounds += 1
    gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


def compare(tokens: int, heads: tuple[int, int, int, int], norm: bool, options: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[options.dtype]
    problem = Problem(tokens, heads, norm, dtype)
    p = problem
    eager = chain(p)
    contenders: dict[str, Callable[[], Any]] = {"ropewalk": ours(p), "eager": lambda: eager(p.q, p.k, p.cos, p.sin)}
    if not options.no_compile:
        torch.compiler.reset()
        compiled = torch.compile(chain(p), dynamic=False, fullgraph=True)
        contenders["compile"] = lambda: compiled(p.q, p.k, p.cos, p.sin)

    # torch's tables, products and sums are each rounded to the dtype, ours only the result.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}[dtype]
    errors = {}
    for name, call in contenders.items():
        p.restore()
        result = call()
        if name != "ropewalk":
            result = tuple(x.transpose(1, 2) for x in result)
        errors[name] = worst_error(p, result)
        bound = rounding * (1.01 if name == "ropewalk" else 6)
        if not errors[name] <= bound:
            raise SystemExit(f"{name} is wrong for {tokens} tokens of {heads}: error {errors[name]}, bound {bound}")

    medians = measure(p, contenders, options.seconds)
    return {
        "op": "norm+rope" if norm else "rope",
        "tokens": tokens,
        "q_heads": heads[0],
        "k_heads": heads[1],
        "head_dim": heads[2],
        "rotary_dim": heads[3],
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "bytes": p.bytes(),
        "us": {name: value * 1e6 for name, value in medians.items()},
        "gb_per_s": p.bytes() / medians["ropewalk"] * 1e-9,
        "faster_than": {name: value / medians["ropewalk"] for name, value in medians.items() if name != "ropewalk"},
        "errors": errors,
    }


def cpu_name() -> str:
    text = pathlib.Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    return found.group(1) if found else "unknown CPU"


def parse_heads(text: str) -> tuple[int, int, int, int]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) not in (3, 4):
        raise argparse.ArgumentTypeError(f"must be q_heads,k_heads,head_dim[,rotary_dim], but is {text}")
    return (*numbers, numbers[2])[:4]  # type: ignore[return-value]


def parse_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_numbers, default=TOKENS, help="as in 1,64,4096")
    heads_help = "q_heads,k_heads,head_dim[,rotary_dim]; may be repeated"
    parser.add_argument("--heads", type=parse_heads, action="append", help=heads_help)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=parse_numbers, help="torch's, which serve Ropewalk too; as in 1,2")
    parser.add_argument("--op", choices=["rope", "norm+rope"], action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=0.15, help="of timing for each contender and shape")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: seconds a shape")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--record", action="store_true", help="write docs/results/DATE-CPU-torch.json")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    threads = options.threads or sorted({1, min(2, len(os.sched_getaffinity(0)))})
    ops = options.op or ["rope", "norm+rope"]
    results = []
    print(
        "op         threads  tokens  heads     dim  rotated  ropewalk us   eager us  compile us    GB/s  of eager"
        "  of compile"
    )
    with torch.inference_mode():
        for count in threads:
            torch.set_num_threads(count)
            for heads in options.heads or HEADS:
                for op in ops:
                    for tokens in options.tokens:
                        if sys.stderr.isatty():
                            print(f"\r{op}, {tokens} tokens of {heads} ..\033[K", end="", file=sys.stderr, flush=True)
                        row = compare(tokens, heads, op == "norm+rope", options)
                        if sys.stderr.isatty():
                            print("\r\033[K", end="", file=sys.stderr, flush=True)
                        results.append(row)
                        us, faster = row["us"], row["faster_than"]
                        print(
                            f"{op:9}  {count:7}  {tokens:6}  {f'{heads[0]}/{heads[1]}':8}  {heads[2]:3}"
                            f"  {heads[3]:7}  {us['ropewalk']:11.2f}  {us['eager']:9.2f}"
                            f"  {us.get('compile', float('nan')):10.2f}"
                            f"  {row['gb_per_s']:6.1f}  {faster['eager']:7.1f}x"
                            f"  {faster.get('compile', float('nan')):9.1f}x",
                            flush=True,
                        )
    slower = [row for row in results if min(row["faster_than"].values()) <= 1]
    print(f"{len(results)} shapes; ropewalk is the fastest in {len(results) - len(slower)}")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    out = {
        "date": date,
        "cpu": cpu_name(),
        "ropewalk": ropewalk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": ropewalk.counters(),
        "results": results,
    }
    paths = [options.json] if options.json else []
    if options.record:
        name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        paths.append(str(ROOT / "docs" / "results" / f"{date}-{name}-torch.json"))
    for path in paths:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(json.dumps(out, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
