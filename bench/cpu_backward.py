"""The gradient of norm + rope on the CPU, checked and timed: beside its floor, beside torch.compile and torch eager.

    .venv/bin/python bench/cpu_backward.py                                   # head sizes 64 to 256, bf16 and f32
    .venv/bin/python bench/cpu_backward.py --head-dims 128 --dtypes bf16 --threads 1 --seconds 0.3

Timed is the backward alone, which gives dX of q and k and dW of both weights. Floor: an addition of torch's that reads
x and dY and writes dX. Peers: the gradient of transformers' own chain, Qwen3RMSNorm and apply_rotary_pos_emb, by
autograd: its forward has run, and its graph is kept. What favours torch: its tables are made beforehand, compilation
has static shapes. Ropewalk computes the angles in the call. Each result is compared with float64 first, ours with its
bounds (docs/training.md). Contenders take turns, batch by batch; the numbers are medians. --aim: ends with 1 if ours is
not so many times faster than torch.compile everywhere.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import ropewalk
import torch
from cpu_compare import DTYPES, EPS, THETA, batch_seconds, cpu_name, parse_numbers
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb


class Problem:
    """One shape: x and dY of q and k, [1, tokens, heads, head_dim], and where ours writes."""

    def __init__(self, tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)

        def new() -> list[torch.Tensor]:
            return [torch.randn(1, tokens, n, head_dim, generator=generator).to(dtype) for n in heads]

        self.x, self.dy = new(), new()
        self.dx = [torch.empty_like(x) for x in self.x]
        self.dw = [torch.empty(head_dim) for _ in heads]
        self.norms = [Qwen3RMSNorm(head_dim, eps=EPS) for _ in heads]
        for norm in self.norms:
            norm.weight.data = (1 + torch.randn(head_dim, generator=generator) / 4).to(dtype)
        self.weights = [norm.weight.detach() for norm in self.norms]
        self.frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=head_dim)
        self.positions = torch.arange(tokens)[None]
        angle = self.positions[0, :, None].double() * torch.from_numpy(self.frequencies.inv_freq)
        self.wide = [table[None].repeat(1, 1, 2) for table in (angle.cos(), angle.sin())]
        self.tables = [table.to(dtype) for table in self.wide]

    def bytes(self) -> int:
        return 3 * sum(x.nbytes for x in self.x)

    def ours(self) -> list[torch.Tensor]:
        ropewalk.rope_backward(
            *self.dy, q=self.x[0], k=self.x[1], q_grad_out=self.dx[0], k_grad_out=self.dx[1], q_weight_grad=self.dw[0],
            k_weight_grad=self.dw[1], q_weight=self.weights[0], k_weight=self.weights[1], eps=EPS,
            positions=self.positions, frequencies=self.frequencies,
        )  # fmt: skip
        return [*self.dx, *self.dw]

    def floor(self) -> None:
        for x, dy, dx in zip(self.x, self.dy, self.dx, strict=True):
            torch.add(x, dy, out=dx)

    def peer(self, compiled: bool) -> Callable[[], Any]:
        """The gradient of the chain whose forward has run."""

        def chain(q: Any, k: Any, cos: Any, sin: Any) -> Any:
            q, k = (norm(x).transpose(1, 2) for norm, x in zip(self.norms, (q, k), strict=True))
            return apply_rotary_pos_emb(q, k, cos, sin)

        leaves = [x.detach().requires_grad_() for x in self.x]
        body = torch.compile(chain, dynamic=False, fullgraph=True) if compiled else chain
        new = body(*leaves, *self.tables)
        grads = [dy.transpose(1, 2) for dy in self.dy]
        weights = [norm.weight for norm in self.norms]
        return lambda: torch.autograd.grad(new, [*leaves, *weights], grads, retain_graph=True)

    def exact(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dX and dW in float64 from the formula, with what their errors are fractions of."""
        of_x, of_w, x_scale, w_scale = [], [], [], []
        half = self.x[0].shape[-1] // 2
        cos, sin = (table[0, :, None, :half] for table in self.wide)
        for x, dy, weight in zip(self.x, self.dy, self.weights, strict=True):
            a, b = dy.double().split(half, -1)
            length = torch.hypot(a, b).repeat(1, 1, 1, 2)
            g = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
            rstd = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
            n, w = x.double() * rstd, weight.double()
            along = (g * w * n).mean(-1, keepdim=True)
            of_x.append(rstd * (g * w - n * along))
            x_scale.append((rstd * (length * w.abs() + (n * along).abs())).amax(-1, keepdim=True))
            of_w.append((g * n).sum((0, 1, 2)))
            w_scale.append((length * n.abs()).sum((0, 1, 2)))
        return [*of_x, *of_w], [*x_scale, *w_scale]

    def check(self, name: str, got: Any) -> None:
        """Ends the run where a result is wrong: ours beyond its bounds, another's beyond what rounding explains."""
        want, scale = self.exact()
        unit = torch.finfo(self.x[0].dtype).eps / 2
        for i, (value, exact, largest) in enumerate(zip(got, want, scale, strict=True)):
            error = (value.double() - exact).abs()
            if name == "ropewalk":
                bound = unit * 1.01 * exact.abs() + 2.0**-18 * largest if i < 2 else 2.0**-20 * largest
            else:
                bound = 16 * unit * largest if i < 2 else 4 * unit * largest
            if not (error <= bound).all():
                which = ("dX of q", "dX of k", "dW of q", "dW of k")[i]
                raise SystemExit(f"{name} is wrong: {which} is {(error / bound).max().item():.2f} times its bound off")


def measure(contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of a call for each contender."""
    calls = {}
    for name, call in contenders.items():
        for _ in range(3):
            call()
        calls[name] = max(1, int(200e-6 / max(batch_seconds(call, 3), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    spent = rounds = 0
    gc.disable()
    while rounds < 7 or (rounds < 300 and spent < seconds * len(contenders)):
        for name in list(contenders) if rounds % 2 else list(reversed(contenders)):
            samples[name].append(batch_seconds(contenders[name], calls[name]))
            spent += samples[name][-1] * calls[name]
        rounds += 1
    gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=parse_numbers, default=[64, 80, 96, 128, 256])
    parser.add_argument("--heads", type=parse_numbers, default=[32, 8], help="of q and of k; default: 32,8")
    parser.add_argument("--tokens", type=parse_numbers, default=[512])
    parser.add_argument("--dtypes", default="bf16,f32", help="of bf16, f16, f32")
    parser.add_argument("--threads", type=parse_numbers, default=sorted({1, min(2, len(os.sched_getaffinity(0)))}))
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each contender and shape")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: seconds a shape")
    parser.add_argument("--aim", type=float, default=0.0, help="times faster than torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    # A backward that gives its buffers away can run once alone.
    torch._functorch.config.donated_buffer = False
    results = []
    print(
        "dtype  threads  tokens  heads  dim  floor us  ropewalk us  eager us  compile us    GB/s  of eager  of compile"
    )
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes.split(","):
            for head_dim in options.head_dims:
                for tokens in options.tokens:
                    p = Problem(tokens, tuple(options.heads), head_dim, DTYPES[dtype])
                    contenders: dict[str, Callable[[], Any]] = {"ropewalk": p.ours, "eager": p.peer(compiled=False)}
                    if not options.no_compile:
                        torch.compiler.reset()
                        contenders["compile"] = p.peer(compiled=True)
                    for name, call in contenders.items():
                        p.check(name, call())
                    seconds = measure({"floor": p.floor, **contenders}, options.seconds)
                    us = {name: value * 1e6 for name, value in seconds.items()}
                    faster = {name: us[name] / us["ropewalk"] for name in us if name in ("eager", "compile")}
                    rate = p.bytes() / seconds["ropewalk"] * 1e-9
                    peer, factor = us.get("compile", float("nan")), faster.get("compile", float("nan"))
                    print(
                        f"{dtype:5}  {threads:7}  {tokens:6}  {'/'.join(map(str, options.heads)):5}  {head_dim:3}"
                        f"  {us['floor']:8.1f}  {us['ropewalk']:11.1f}  {us['eager']:8.1f}  {peer:10.1f}"
                        f"  {rate:6.1f}  {faster['eager']:7.1f}x  {factor:9.1f}x",
                        flush=True,
                    )
                    row = {"dtype": dtype, "threads": threads, "tokens": tokens, "heads": options.heads}
                    results.append({**row, "head_dim": head_dim, "bytes": p.bytes(), "us": us, "faster_than": faster})
    of_compile = [row["faster_than"]["compile"] for row in results if "compile" in row["faster_than"]]
    least = f"; at least {min(of_compile):.1f} times as fast as torch.compile" if of_compile else ""
    print(f"{len(results)} shapes on {cpu_name()}{least}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"cpu": cpu_name(), "ropewalk": ropewalk.__version__, "torch": torch.__version__,
                       "kernels": ropewalk.counters(), "results": results}, file, indent=1)  # fmt: skip
    return 0 if min(of_compile, default=options.aim) >= options.aim else 1


if __name__ == "__main__":
    sys.exit(main())
