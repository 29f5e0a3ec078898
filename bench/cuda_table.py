"""Makes the table of shapes of the CUDA kernel from searches: python bench/cuda_table.py [SEARCH.jsonl ..]

A search is what `ropewalk tune --all --json` writes: a call, and the shapes tried with their microseconds. A
single call's best shape is often best by noise. So a shape's score for a call is its time over the best, on
average over the calls nearest to it, and the one with the least score is the table's entry. Entries that their
neighbours answer for are left out. Writes backends/cuda/shapes_table.inc.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEARCHES = [ROOT / "docs/results/2026-11-29-h200-tune.jsonl"]
MULTIPROCESSORS, BYTES = 132, 2
WIDTH = 0.25  # of the average, in the units of Distance in backends/cuda/shapes.cc
TOLERANCE = 1.015  # an entry is left out if its neighbours' shape is no slower than this

Shape = tuple[int, ...]


class Call:
    """A call that was searched, with its features as FeaturesOf has them."""

    def __init__(self, line: str) -> None:
        found = json.loads(line)
        q, k, head_dim, tokens = (found[name] for name in ("q_heads", "k_heads", "head_dim", "tokens"))
        rotary, vector = found["rotary_dim"], 8
        while head_dim % vector or rotary // 2 % vector:
            vector //= 2
        units = rotary // (2 * vector)
        lanes = -(-units // -(-units // 32))
        every = q + k + (k if found["cache"] else 0)
        self.norm, self.table, self.store = int(found["norm"]), int(found["table"]), int(found["cache"])
        self.regular = int(lanes & (lanes - 1) == 0)
        self.lanes = math.log2(lanes)
        self.bytes = math.log2(tokens * (q + k) * head_dim * BYTES / MULTIPROCESSORS)
        self.turns = math.log2(every / (32 // lanes))
        self.tokens = math.log2(tokens)
        times: dict[Shape, float] = {}
        for shape, us in found["tried"]:
            shape = tuple(shape)
            if shape[0] == 0 and shape[1] not in (6, 10):
                shape = (0, 0, *shape[2:])  # the widest
            times[shape] = min(us, times.get(shape, us))
        best = min(times.values())
        self.over = {shape: us / best for shape, us in times.items()}
        self.name = f"{q}/{k}x{head_dim} @ {tokens}"

    def distance(self, other: "Call") -> float:
        total = (self.bytes - other.bytes) ** 2 + (0.6 * (self.turns - other.turns)) ** 2
        total += (0.3 * (self.tokens - other.tokens)) ** 2 + (0.8 * (self.lanes - other.lanes)) ** 2
        total += 1.0 if self.norm != other.norm else 0.0
        total += 0.7**2 if self.table != other.table else 0.0
        if self.store != other.store:
            total += (0.5 if self.store and other.store else 2.5) ** 2
        return total + (9.0 if self.regular != other.regular else 0.0)


def smoothed(call: Call, calls: list[Call]) -> Shape:
    """The shape with the least average time over the best near the call; one that few of them tried is worse."""
    weight: dict[Shape, float] = {}
    score: dict[Shape, float] = {}
    total = 0.0
    for other in calls:
        distance = call.distance(other)
        if distance > 16 * WIDTH**2:
            continue
        w = math.exp(-distance / (2 * WIDTH**2))
        total += w
        for shape, over in other.over.items():
            weight[shape] = weight.get(shape, 0.0) + w
            score[shape] = score.get(shape, 0.0) + w * min(over, 2.5)
    tried = [shape for shape in weight if weight[shape] >= 0.2 * total]
    return min(tried, key=lambda s: score[s] / weight[s] + (0.02 if weight[s] < 0.6 * total else 0.0))


def pruned(entries: list[tuple[Call, Shape]]) -> list[tuple[Call, Shape]]:
    """Without those whose nearest neighbours have a shape that serves them as well."""
    kept = list(entries)
    for entry in entries:
        call, shape = entry
        others = [other for other in kept if other is not entry]
        nearest = min(others, key=lambda other: call.distance(other[0]))
        if nearest[1] == shape or call.over.get(nearest[1], 9.0) <= call.over.get(shape, 1.0) * TOLERANCE:
            kept = others
    return kept


def main(paths: list[Path]) -> None:
    calls = [Call(line) for path in paths for line in path.read_text().splitlines()]
    entries = [(call, smoothed(call, calls)) for call in calls]
    table = entries if len(entries) < 2 else pruned(entries)
    lines = [
        "// Shapes that a search on an H200 found, by bench/cuda_table.py from "
        + ", ".join(p.name for p in paths)
        + ":",
        "// norm, table, store, regular; lanes, bytes, turns, tokens; then the shape.",
    ]
    for call, shape in sorted(table, key=lambda e: (e[0].store, e[0].norm, e[0].table, e[0].bytes, e[0].turns)):
        features = f"{call.norm}, {call.table}, {call.store}, {call.regular}, "
        features += ", ".join(f"{x:.2f}f" for x in (call.lanes, call.bytes, call.turns, call.tokens))
        lines.append(f"{{{{{features}}}, {{{', '.join(map(str, shape))}}}}},  // {call.name}")
    (ROOT / "backends/cuda/shapes_table.inc").write_text("\n".join(lines) + "\n")
    over = [call.over.get(min(table, key=lambda e: call.distance(e[0]))[1], math.nan) for call in calls]
    known = sorted(x for x in over if not math.isnan(x))
    print(
        f"{len(calls)} calls, {len(table)} entries; time over the best: median {known[len(known) // 2]:.3f}, "
        f"95 % below {known[int(0.95 * len(known))]:.3f}, {len(over) - len(known)} not tried there"
    )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or SEARCHES)
