"""The gradient of norm + rope on CUDA, checked and timed: beside its floor and beside its peers.

    python bench/gpu_backward.py [--json FILE] [--shapes NAME,..] [--no-compile] [--seconds S]

Floor: a kernel of torch's (an addition into a third tensor) that reads x and dY and writes dX, contiguous, and nothing
else. torch.compile: the gradient of the chain that transformers models run (float32 norm and rotation by tables of q's
dtype), by autograd, without its forward. Axolotl (norm + rope: q, then k) and Liger (rope: both in place) where their
packages are installed: the backward alone, likewise. Each contender is captured in a CUDA graph of several calls that
go round buffers of 0.8 GB in all, so that nothing is left in the L2 cache; contenders take turns; a number is the
median of several replays. Ours is compared with float64 first: dX within half a unit in the last place and 2^-18 of its
head's largest term, dW within 2^-20 of the magnitudes, and the same bits twice. Runs in under 90 seconds.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ropewalk
import torch

COLD_BYTES = 800_000_000
THETA, EPS = 1e6, 1e-6
REPLAYS = 7


class Shape(NamedTuple):
    name: str
    tokens: int
    q_heads: int
    k_heads: int
    head_dim: int
    pairing: str = "neox"
    dtype: torch.dtype = torch.bfloat16


SHAPES = [
    Shape("qwen3-8b 4k", 4096, 32, 8, 128),
    Shape("qwen3-8b 16k", 16384, 32, 8, 128),
    Shape("qwen3-0.6b 8k", 8192, 16, 8, 128),
    Shape("d64 8k", 8192, 32, 8, 64),
    Shape("d80 8k", 8192, 32, 32, 80),
    Shape("d96 8k", 8192, 32, 8, 96),
    Shape("d256 4k", 4096, 16, 8, 256),
    Shape("interleaved 8k", 8192, 32, 8, 128, "interleaved"),
]
# SOL-ExecBench L1_068, fused_rope_application_backward: heads of q and k, batch x tokens, in float32. Its gradients of
# cos and sin are not ours. L1_014 is the gradient of such tables alone.
SOL = [
    Shape(f"sol_068 {q}/{k} {batch}x{tokens}", batch * tokens, q, k, 128, dtype=torch.float32)
    for q, k, batch, tokens in (
        (32, 8, 1, 256), (32, 8, 1, 293), (32, 8, 1, 997), (32, 8, 1, 2053), (32, 8, 2, 128), (32, 8, 2, 541),
        (32, 8, 2, 1024), (32, 8, 2, 2048), (32, 8, 4, 1571), (32, 8, 16, 128), (32, 8, 32, 128), (32, 32, 1, 1024),
        (64, 8, 1, 512), (64, 8, 1, 1024), (64, 8, 1, 2048), (64, 8, 2, 512),
    )
]  # fmt: skip


class Buffers:
    """One call's tensors."""

    def __init__(self, shape: Shape, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def new(heads: int) -> torch.Tensor:
            return torch.randn((shape.tokens, heads, shape.head_dim), generator=generator, device="cuda").to(
                shape.dtype
            )

        self.q, self.k = new(shape.q_heads), new(shape.k_heads)
        self.dq, self.dk = new(shape.q_heads), new(shape.k_heads)
        self.q_out, self.k_out = torch.empty_like(self.q), torch.empty_like(self.k)
        self.sums = torch.empty((2, shape.head_dim), device="cuda")

    def bytes(self) -> int:
        return 3 * self.q.element_size() * (self.q.numel() + self.k.numel())


class Case:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.frequencies = ropewalk.Frequencies(theta=THETA, rotary_dim=shape.head_dim)
        self.positions = torch.arange(shape.tokens, device="cuda")
        self.weights = torch.linspace(0.5, 1.5, 2 * shape.head_dim, device="cuda").view(2, -1).to(shape.dtype)
        first = Buffers(shape, 0)
        self.buffers = [first, *(Buffers(shape, i) for i in range(1, max(2, COLD_BYTES // first.bytes())))]
        angle = self.positions.double()[:, None] * torch.from_numpy(self.frequencies.inv_freq).cuda()
        self.cos, self.sin = angle.cos()[:, None], angle.sin()[:, None]

    def options(self, norm: bool) -> dict[str, Any]:
        weights = {"q_weight": self.weights[0], "k_weight": self.weights[1], "eps": EPS} if norm else {}
        return {"positions": self.positions, "frequencies": self.frequencies, "pairing": self.shape.pairing, **weights}

    def ours(self, b: Buffers, norm: bool) -> None:
        more = {"q": b.q, "k": b.k, "q_weight_grad": b.sums[0], "k_weight_grad": b.sums[1]} if norm else {}
        ropewalk.rope_backward(b.dq, b.dk, q_grad_out=b.q_out, k_grad_out=b.k_out, **more, **self.options(norm))

    def in_place(self, b: Buffers) -> None:
        """As Liger's, which takes less of the L2 than dX in tensors of its own."""
        ropewalk.rope_backward(b.dq, b.dk, **self.options(False))

    def floor(self, b: Buffers) -> None:
        torch.add(b.q, b.dq, out=b.q_out)
        torch.add(b.k, b.dk, out=b.k_out)

    def chain(self, x: Any, weight: Any, cos: Any, sin: Any, norm: bool) -> Any:
        if norm:
            wide = x.float()
            x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        half = x.shape[-1] // 2
        a, b = (x[..., :half], x[..., half:]) if self.shape.pairing == "neox" else (x[..., 0::2], x[..., 1::2])
        a, b = a * cos - b * sin, b * cos + a * sin
        return torch.cat((a, b), -1) if self.shape.pairing == "neox" else torch.stack((a, b), -1).flatten(-2)

    def exact(self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
        """dX and dW in float64 with what their errors are fractions of, from the formula."""
        wide, dy, w = x.double(), grad.double(), weight.double()
        half = x.shape[-1] // 2
        neox = self.shape.pairing == "neox"
        a, b = (dy[..., :half], dy[..., half:]) if neox else (dy[..., 0::2], dy[..., 1::2])
        length = torch.hypot(a, b)
        a, b = a * self.cos + b * self.sin, b * self.cos - a * self.sin
        g = torch.cat((a, b), -1) if neox else torch.stack((a, b), -1).flatten(-2)
        length = torch.cat((length, length), -1) if neox else torch.stack((length, length), -1).flatten(-2)
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        n = wide * rstd
        along = (g * w * n).mean(-1, keepdim=True)
        largest = (rstd * (length * w.abs() + (n * along).abs())).amax(-1, keepdim=True)
        return rstd * (g * w - n * along), largest, (g * n).sum((0, 1)), (length * n.abs()).sum((0, 1))

    def check(self) -> str:
        """What is wrong; "" if nothing."""
        b = self.buffers[0]
        self.ours(b, norm=True)
        first = [x.clone() for x in (b.q_out, b.k_out, b.sums)]
        self.ours(b, norm=True)
        if not all(torch.equal(x, y) for x, y in zip(first, (b.q_out, b.k_out, b.sums), strict=True)):
            return "two calls differ"
        for name, x, grad, out, weight, got in (("q", b.q, b.dq, b.q_out, self.weights[0], b.sums[0]),
                                                ("k", b.k, b.dk, b.k_out, self.weights[1], b.sums[1])):  # fmt: skip
            want, largest, dw, magnitude = self.exact(x, grad, weight)
            half_unit = torch.finfo(out.dtype).eps / 2 * 1.001
            error = (out.double() - want).abs() - half_unit * want.abs() - 2.0**-18 * largest
            if not (error <= 0).all():
                return f"dX of {name} is off by {error.max().item():.2e} more than it may be"
            worst = ((got.double() - dw).abs() / magnitude).max().item()
            if not worst <= 2.0**-20:
                return f"dW of {name} is off by {worst:.2e} of the magnitudes"
        return ""


def capture(call: Callable[[Buffers], None], buffers: list[Buffers]) -> torch.cuda.CUDAGraph:
    call(buffers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for b in buffers:
            call(b)
    return graph


def timed(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Microseconds of a call, in a replay queued behind another."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / calls


def compiled(case: Case, norm: bool) -> Callable[[Buffers], None]:
    """The gradient alone of the compiled chain: its forward runs once, and its graph is kept."""
    tables = case.cos.to(case.shape.dtype), case.sin.to(case.shape.dtype)
    torch._dynamo.reset()  # else it compiles for eight shapes and then no more
    body = torch.compile(lambda q, k, w, v: (case.chain(q, w, *tables, norm), case.chain(k, v, *tables, norm)),
                         dynamic=False, fullgraph=True)  # fmt: skip
    kept: dict[int, Any] = {}
    for b in case.buffers:
        leaves = [x.detach().requires_grad_() for x in (b.q, b.k, *case.weights)]
        kept[id(b)] = body(*leaves), [x for i, x in enumerate(leaves) if norm or i < 2]

    def call(b: Buffers) -> None:
        new, leaves = kept[id(b)]
        torch.autograd.grad(new, leaves, (b.dq, b.dk), retain_graph=True)

    return call


def axolotl(case: Case) -> Callable[[Buffers], None]:
    """The gradient alone of Axolotl's norm and rotation: its forward runs once, and its graph is kept."""
    found = importlib.util.find_spec("axolotl")
    path = Path(found.submodule_search_locations[0]) / "kernels/gemma4_fused_rope.py"
    spec = importlib.util.spec_from_file_location("axolotl_rope", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cos, sin = (torch.cat((x[:, 0], x[:, 0]), -1).to(case.shape.dtype)[None] for x in (case.cos, case.sin))
    kept: dict[int, Any] = {}
    for b in case.buffers:
        leaves = [x.detach().requires_grad_() for x in (b.q, b.k, *case.weights)]
        new = [
            module.fused_rms_norm_rope(x[None], w, cos, sin, EPS) for x, w in zip(leaves[:2], leaves[2:], strict=True)
        ]
        kept[id(b)] = new, leaves

    def call(b: Buffers) -> None:
        new, leaves = kept[id(b)]
        torch.autograd.grad(new, leaves, (b.dq[None], b.dk[None]), retain_graph=True)

    return call


def liger(case: Case) -> Callable[[Buffers], None]:
    from liger_kernel.ops.rope import rope_backward  # noqa: PLC0415

    cos, sin = (torch.cat((x[:, 0], x[:, 0]), -1).to(case.shape.dtype)[None] for x in (case.cos, case.sin))

    def call(b: Buffers) -> None:
        rope_backward(b.dq[None].transpose(1, 2), b.dk[None].transpose(1, 2), cos, sin)

    return call


def peers(case: Case, norm: bool, compile_too: bool) -> dict[str, Callable[[Buffers], None]]:
    """Those that can be called; of the others it is told why not."""
    makers: dict[str, Callable[[], Callable[[Buffers], None]]] = {}
    if case.shape.pairing == "neox":
        makers["axolotl" if norm else "liger"] = functools.partial(axolotl if norm else liger, case)
    if compile_too:  # a compilation takes seconds
        makers["compile"] = functools.partial(compiled, case, norm)
    made: dict[str, Callable[[Buffers], None]] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:  # a peer's
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compile-all", action="store_true", help="torch.compile beside every shape, not two")
    parser.add_argument("--sol", action="store_true", help="the shapes of SOL-ExecBench L1_068 instead, in float32")
    parser.add_argument("--seconds", type=float, default=80.0, help="begin no shape after so long")
    options = parser.parse_args()
    began, results, failed = time.monotonic(), [], 0
    wanted = [name for name in options.shapes.split(",") if name]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ropewalk {ropewalk.__version__}")
    print(f"{'shape':<16} {'':<9} {'floor':>8} {'ours':>8} {'of floor':>8} {'GB/s':>6}  peers")
    for shape in SOL if options.sol else SHAPES:
        if wanted and shape.name not in wanted:
            continue
        if time.monotonic() - began > options.seconds:
            print(f"{shape.name:<22} left out: {options.seconds:.0f} seconds are over")
            continue
        case = Case(shape)
        wrong = case.check()
        if wrong:
            failed += 1
            print(f"{shape.name:<22} WRONG: {wrong}")
            continue
        for norm in (True, False):
            contenders: dict[str, Callable[[Buffers], None]] = {
                "floor": case.floor, "ours": functools.partial(case.ours, norm=norm)
            }  # fmt: skip
            if not norm:
                contenders["in place"] = case.in_place
            compile_too = not options.no_compile and (options.compile_all or shape in SHAPES[:2])
            contenders |= peers(case, norm, compile_too)
            graphs = {}
            for name, call in contenders.items():
                try:
                    graphs[name] = capture(call, case.buffers)
                except Exception as error:  # what cannot be captured is told and left out
                    print(f"{name}: {error}", file=sys.stderr)
            samples: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(REPLAYS):
                for name, graph in graphs.items():
                    samples[name].append(timed(graph, len(case.buffers)))
            us = {name: statistics.median(values) for name, values in samples.items()}
            ours, floor = us.get("ours", float("nan")), us.get("floor", float("nan"))
            others = ", ".join(f"{name} {us[name]:.2f}" for name in us if name not in ("ours", "floor"))
            rate = case.buffers[0].bytes() / ours / 1e3
            print(f"{shape.name:<22} {'norm+rope' if norm else 'rope':<9} {floor:8.2f} {ours:8.2f} {ours / floor:8.3f} "
                  f"{rate:6.0f}  {others}", flush=True)  # fmt: skip
            results.append({**shape._asdict(), "dtype": str(shape.dtype), "norm": norm, "us": us,
                            "of_floor": ours / floor, "bytes": case.buffers[0].bytes()})  # fmt: skip
        del case
        torch.cuda.empty_cache()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)
    print(f"{len(results)} figures in {time.monotonic() - began:.0f} s, {failed} shapes wrong")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
