"""How bench/gpu_compare.py and bench/gpu_sweep.py check and time contenders: each result is compared with float64
first; graphs of many calls take turns, and of the floor's shapes the best serve."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gpu_floor
import torch
from gpu_contenders import Contender, check_floor, floors
from gpu_problem import Problem, Shape, cache_dtype, relative_error

GRAPH_SECONDS = 2e-3  # a graph shall take about so long


def check(problem: Problem, contender: Contender, wanted: dict[tuple[str, str], Any]) -> None:
    """Runs the contender once, and compares with the reference. Leaves `failure` if that went wrong."""
    try:
        problem.packed[:2].copy_(problem.first[None].expand_as(problem.packed[:2]))
        ropewalk_store = "+kv" in contender.op and contender.name == "ropewalk" and not contender.verify
        caches = problem.cache(0, cache_dtype(contender.op)) if ropewalk_store else ()
        for cache in caches:
            cache.zero_()
        call = contender.make(0)
        result = call()
        torch.cuda.synchronize()
        if not contender.checked:
            return
        if contender.verify:
            contender.error, contender.failure = contender.verify()
            if contender.error > contender.bound:
                contender.failure = f"wrong: relative error {contender.error:.3g}, bound {contender.bound:.3g}"
            return
        op = "norm+rope" if contender.op.startswith("norm") else "rope"
        want = wanted.get((op, contender.pairing))
        if want is None:
            want = wanted[op, contender.pairing] = problem.expected(op, contender.pairing)
        q, k, *stored_v = contender.result(result) if contender.result else problem.heads(problem.packed[0])[:2]
        stored = [cache[problem.slots].to(problem.exact) for cache in caches]
        k_only = caches and "k only" in contender.op
        if k_only and "fp8" not in contender.op:
            k = stored[0]
        errors = [relative_error(q, want[0])]
        if not (k_only and "fp8" in contender.op):
            errors.append(relative_error(k, want[1]))
        errors += [relative_error(x, problem.heads(problem.first)[2].to(problem.exact)) for x in stored_v]
        contender.error = max(errors)
        if contender.error > contender.bound:
            contender.failure = f"wrong: relative error {contender.error:.3g}, bound {contender.bound:.3g}"
        elif caches:
            # The very rows in the cache's dtype; k is rounded to bfloat16 and then, in fp8, once more.
            fp8 = "fp8" in contender.op
            other = want[1] if k_only else k.to(problem.exact)
            v = problem.heads(problem.first)[2].to(problem.exact)
            off = [relative_error(x, y) for x, y in zip(stored, (other, v), strict=True)]
            limits = [2.0**-3 if fp8 else contender.bound if k_only else 0.0, 2.0**-3 if fp8 else 0.0]
            if any(x > limit for x, limit in zip(off, limits, strict=True)):
                contender.failure = f"wrong: the caches differ by {max(off):.3g}"
        if contender.name == "ropewalk" and not contender.failure:
            contender.failure = touched(problem, contender.op, caches)
    except Exception as error:  # a peer that does not take this shape
        contender.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def touched(problem: Problem, op: str, caches: Sequence[torch.Tensor]) -> str:
    """Which bytes a call on the first buffer changed though they were not its own; "" if none."""
    s = problem.shape
    first_k, first_v = problem.heads(problem.first)[1:]
    now_k, now_v = problem.heads(problem.packed[0])[1:]
    if not torch.equal(now_v, first_v):
        return "wrong: v was changed"
    if "k only" in op and not torch.equal(now_k, first_k):
        return "wrong: k was written back"
    if op == "rope" and s.rotary_dim < s.head_dim:
        for now, first in zip(problem.heads(problem.packed[0])[:2], problem.heads(problem.first)[:2], strict=True):
            if not torch.equal(now[..., s.rotary_dim :], first[..., s.rotary_dim :]):
                return "wrong: elements outside the rotated part were changed"
    if not torch.equal(problem.packed[1], problem.first):
        return "wrong: bytes behind the rows were written"
    for cache in caches:
        others = cache.view(torch.uint8).clone()
        others[problem.slots] = 0
        if others.any():
            return "wrong: a slot that was not named was written"
    return ""


def capture(calls: list[Callable[[], Any]], total: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(total):
                calls[i % len(calls)]()
        finally:
            graph.capture_end()
    return graph


def once(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay that is queued behind another one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def load(problem: Problem, contender: Contender, stream: torch.cuda.Stream, seconds: float = GRAPH_SECONDS) -> None:
    """Captures the contender's graph, of about so many seconds."""
    if contender.failure:
        return
    try:
        calls = [contender.make(i) for i in range(problem.count)]
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        total = problem.count if problem.shape.cold else 5 * problem.count
        graph = capture(calls, total, stream)
        graph.replay()
        once_seconds = once(graph) * 1e-6
        if once_seconds < seconds / 2 and contender.cheap:
            passes = min(math.ceil(seconds / once_seconds), 1600 // total)
            if passes > 1:
                total *= passes
                graph = capture(calls, total, stream)
                graph.replay()
        contender.graph, contender.calls = graph, total
    except Exception as error:  # a peer that cannot be captured
        contender.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        torch.cuda.synchronize()


def measure(contenders: list[Contender], rounds: int) -> None:
    """Median microseconds of a call; contenders take turns."""
    ready = [c for c in contenders if c.graph is not None]
    for number in range(rounds):
        for contender in ready if number % 2 else reversed(ready):
            contender.samples.append(once(contender.graph) / contender.calls)
    for contender in ready:
        contender.us = statistics.median(contender.samples)


def search(problem: Problem, op: str, floor: gpu_floor.Floor, stream: torch.cuda.Stream) -> list[Contender]:
    """The best three of the floor's shapes, found by short graphs, checked, and captured anew in long ones."""
    candidates = floors(problem, op, floor)
    for candidate in candidates:
        load(problem, candidate, stream, seconds=0)
    for keep in (8, 3):
        measure(candidates, 3)
        timed = [c for c in candidates if c.us is not None]
        candidates = sorted(timed, key=lambda c: c.us)[:keep]  # type: ignore
    for candidate in candidates:
        candidate.graph = candidate.us = None
        candidate.samples.clear()
        check_floor(problem, candidate)
        load(problem, candidate, stream)
    if not any(c.graph for c in candidates):
        why = next((c.failure for c in candidates), "no shape could be timed")
        print(f"{problem.shape.name}: no floor of {op}: {why}", file=sys.stderr)
    return candidates


def floor_ops(shape: Shape, ops: Sequence[str]) -> dict[str, str]:
    """Of each operation, the one whose floor serves it: whole heads are moved by rope and by norm + rope alike."""
    whole = shape.rotary_dim == shape.head_dim
    return {op: "rope" if op == "norm+rope" and whole else op for op in ops}


def lowest(best: Sequence[Contender], served: dict[str, str]) -> dict[str, Contender]:
    """The floor of each operation that has one."""
    found: dict[str, Contender] = {}
    for candidate in sorted((c for c in best if c.us is not None), key=lambda c: c.us):  # type: ignore
        found.setdefault(candidate.op, candidate)
    return {op: found[of] for op, of in served.items() if of in found}
