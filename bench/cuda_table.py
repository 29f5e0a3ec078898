"""Makes what `backends/cuda/shapes.cc` chooses shapes of the CUDA kernel by, from searches on an H200.

    python bench/cuda_table.py [--check] [--add SEARCH.jsonl] [--swept SWEEP.json] [SEARCHES.jsonl.xz]

A search is what `ropewalk tune --all --json` writes: a call, and the shapes tried with their microseconds. `trust` is
how much it counts: 1; less where rows had no v or positions were random, which is not how they are compared with the
floor; 0 for a call that only a sweep timed, with the faster of its shapes. Times are those of the slower dtype of
positions, as both share a shape; what was timed before 2026-11-30, 21:00, had one dtype only. `swept` has shapes that
sweeps timed (bench/gpu_sweep.py): of a search's time and a sweep's the longer one counts. --add takes new searches in
first, --swept the times of a sweep. Written are

- `shapes_candidates.inc`: so many shapes that some of them serves each call well, the most useful first;
- `cost_model.inc`: small networks whose mean gives the logarithm of a shape's time, up to a summand of the call. Each
  is trained so that the shape which it holds to be the fastest is a fast one. Their inputs are those of
  `backends/cuda/cost.h`, by `build/dev/bench/cuda_inputs`;
- `shapes_table.inc`: calls of full trust where the model's choice is worse than the best by more than `TOLERANCE`, or
  rules would choose, with their best shape, and calls that a sweep found fast with another one than the model's: of
  shapes within `TOLERANCE` the one that a sweep timed.

--check leaves each fifth of the calls out in turn and tells how a model of the others serves it; it writes nothing.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SEARCHES = ROOT / "docs/results/2026-11-30-h200-searches.jsonl.xz"
INPUTS = ROOT / "build/dev/bench/cuda_inputs"
INTO = ROOT / "backends/cuda"
TOLERANCE = 1.03
CANDIDATES, SHARED = 64, 12
HIDDEN, NETWORKS = (48, 24), 2  # as in backends/cuda/cost.cc
EPOCHS = 160
RARER, OTHER_START, FAR = 0.003, 0.01, 0.1  # as in backends/cuda/shapes.cc
LEAST_TOKENS = 3  # likewise: below, rules choose and not the model
# What a call is known by. cache: StoreKind in backends/cuda/shapes.h.
KEY = ("tokens", "q_heads", "k_heads", "head_dim", "rotary_dim", "norm", "table", "cache")
ENOUGH = 4  # shapes of a search, to choose from them alone
FAR_OFF = 1.08  # times the best: more than a start's share
WORST = 2.2  # times the best: a shape that is worse is as bad

Shape = tuple[int, ...]


class Call:
    """A call that was searched."""

    def __init__(self, line: str) -> None:
        found = json.loads(line)
        self.tokens = int(found["tokens"])
        stages = int(found["norm"]) + 2 * int(found["table"]) + 4 * int(found["cache"])
        head, rotary = int(found["head_dim"]), int(found["rotary_dim"])
        self.listable = head % 4 == 0 and rotary % 4 == 0
        self.key = (self.tokens, head // 4, rotary // 4, int(found["q_heads"]), int(found["k_heads"]), stages)
        self.table = bool(found["table"])
        # A call with k in its cache alone has the entry of the one with both places, where it has none of its own.
        self.stands_in = (*self.key[:-1], stages - 8) if int(found["cache"]) > 2 else None
        tried = [(plain(shape), us) for shape, us in found["tried"]]
        # Searches of before a shape had a start: the compiler chose one, and it is not known which. They count where a
        # later search, close to a bad shape, did not come near to what they found.
        chosen = [(shape, us) for shape, us in tried if shape[-1]]
        if len(chosen) >= ENOUGH and min(us for _, us in chosen) < FAR_OFF * min(us for _, us in tried):
            tried = chosen
        self.shapes = [self.started(shape) for shape, _ in tried]
        times: dict[Shape, float] = {}
        for shape, (_, us) in zip(self.shapes, tried, strict=True):
            times[shape] = min(us, times.get(shape, us))
        # A search and a sweep go round the same buffers. Where they disagree, the next kernel's blocks come to other
        # places in one of them, and that may happen to anyone.
        for shape, us in found.get("swept", ()):
            started = self.started(plain(shape))
            if started not in times:
                self.shapes.append(started)
            times[started] = max(us, times.get(started, us))
        self.best = min(times, key=lambda shape: times[shape])
        # The fastest shape that a sweep timed, where it is as good as the best.
        swept = min((self.started(plain(shape)) for shape, _ in found.get("swept", ())), key=times.get, default=None)
        self.swept = swept if swept and times[swept] <= TOLERANCE * times[self.best] else None
        self.over = {shape: us / times[self.best] for shape, us in times.items()}
        self.trust = float(found["trust"])
        self.over_base: dict[Shape, float] = {}  # of shapes without their start: with the best one
        for shape, over in self.over.items():
            self.over_base[shape[:-1]] = min(over, self.over_base.get(shape[:-1], over))

    def started(self, shape: Shape) -> Shape:
        """With the start that 0 stands for, as RopeCudaStart in backends/cuda/plan.h."""
        return (*shape[:-1], start_of(shape, self.tokens, self.table))


def start_of(shape: Shape, tokens: int, table: bool) -> int:
    if shape[-1] == 0:
        return 1 if not shape[0] and tokens < 3072 else 3 if table else 2
    return shape[-1]


def plain(shape: list[int]) -> Shape:
    """With 0 for the vector where it is the widest; ten numbers, as older searches have no start."""
    shape = [*shape, 0][:10]
    return (0, 0, *shape[2:]) if shape[0] == 0 and shape[1] not in (6, 10) else tuple(shape)


def useful(calls: list[Call], count: int, before: list[Shape], of: Callable[[Shape], bool]) -> list[Shape]:
    """So many shapes which together serve the calls best, each chosen for what it adds to those before it."""
    tried: dict[Shape, int] = {}
    for call in calls:
        for shape in filter(of, call.over_base):
            tried[shape] = tried.get(shape, 0) + 1
    shapes = [shape for shape, times in tried.items() if times >= len(calls) // 50]
    over = torch.tensor([[min(call.over_base.get(shape, WORST), WORST) for shape in shapes] for call in calls])
    served = torch.tensor([min([WORST, *(call.over_base[s] for s in before if s in call.over_base)]) for call in calls])
    chosen: list[int] = []
    while len(chosen) < min(count, len(shapes)):
        each = torch.minimum(served[:, None], over).mean(0)
        chosen.append(int(each.argmin()))
        served = torch.minimum(served, over[:, chosen[-1]])
    print(
        f"{len(chosen)} candidates: the best is on average {served.mean():.3f} of the best of all, {len(calls)} calls"
    )
    return [shapes[i] for i in chosen]


def candidates_of(calls: list[Call]) -> list[Shape]:
    """Most are chosen from all calls; those of several units a thread from the calls that tried such."""
    shared = [call for call in calls if any(shape[8] > 1 for shape in call.over_base)]
    most = useful(calls, CANDIDATES - SHARED, [], lambda shape: shape[8] == 1)
    return most + useful(shared, SHARED, most, lambda shape: shape[8] > 1)


class Network:
    """Trained on the calls by how much each is to be trusted."""

    def __init__(self, inputs: torch.Tensor, over: torch.Tensor, trust: torch.Tensor, seed: int) -> None:
        of = trust > 0
        there = over > 0
        known = inputs[of][there[of]]
        self.mean, self.spread = known.mean(0), known.std(0) + 1e-6
        torch.manual_seed(seed)
        self.layers = [torch.nn.Linear(a, b) for a, b in zip((inputs.shape[2], *HIDDEN), (*HIDDEN, 1), strict=True)]
        parameters = [p for layer in self.layers for p in layer.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        cost = over.clamp(min=1, max=WORST).log()
        weight = torch.exp(-3 * cost) * there
        scaled = (inputs - self.mean) / self.spread
        for _ in range(EPOCHS):
            for part in torch.where(of)[0][torch.randperm(int(of.sum()))].split(64):
                out, w = self.of_scaled(scaled[part]), weight[part]
                # How far off the costs are, but for a summand of the call.
                off = out - cost[part]
                off = off - (off * w).sum(1, keepdim=True) / w.sum(1, keepdim=True)
                # What the choice loses, where a shape is chosen the likelier the less the model gives it.
                likely = torch.softmax((-out / 0.03).masked_fill(~there[part], -1e9), 1)
                lost = (likely * (over[part].clamp(1, WORST) - 1) * there[part]).sum(1)
                loss = (trust[part] * (5 * (off**2 * w).sum(1) / w.sum(1) + lost)).sum() / trust[part].sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()

    def of_scaled(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.of_scaled((inputs - self.mean) / self.spread)

    @torch.no_grad()
    def numbers(self) -> torch.Tensor:
        """As Network in backends/cuda/cost.cc has them; the scaling of the inputs is part of the first layer."""
        first, *others = self.layers
        weight = first.weight / self.spread
        numbers = [weight.T.flatten(), first.bias - weight @ self.mean]
        for layer in others:
            numbers += [layer.weight.T.flatten(), layer.bias]
        numbers[-2] = numbers[-2] / NETWORKS
        return torch.cat(numbers[:-1])  # the last one is a summand of all


class Model:
    """The mean of networks that differ in what they began with: each is wrong somewhere else."""

    def __init__(self, inputs: torch.Tensor, over: torch.Tensor, trust: torch.Tensor) -> None:
        self.networks = [Network(inputs, over, trust, seed) for seed in range(NETWORKS)]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(inputs) for network in self.networks]).mean(0)

    def text(self) -> list[str]:
        values = [f"{value:.5e}f," for network in self.networks for value in network.numbers().tolist()]
        return [" ".join(values[i : i + 8]) for i in range(0, len(values), 8)]


def write(name: str, lines: list[str]) -> None:
    (INTO / name).write_text("\n".join(lines) + "\n")


def inputs_of(lines: list[str]) -> torch.Tensor:
    """Of each shape tried, one after the other: 1 if it suits its call, and the model's inputs."""
    said = subprocess.run([INPUTS], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True).stdout
    return torch.tensor([[float(number) for number in row.split()] for row in said.splitlines()])


def with_shapes(line: str, shapes: list[Shape]) -> str:
    """The call of a search with these shapes, for `inputs_of`."""
    return line[: line.index('"tried"')] + f'"tried":{json.dumps([[shape, 1] for shape in shapes])}}}'


def read(lines: list[str]) -> tuple[list[Call], torch.Tensor, torch.Tensor]:
    """The calls; inputs of each shape tried, and its time over the best, 0 where there is none."""
    calls = [Call(line) for line in lines]
    values = inputs_of([with_shapes(line, call.shapes) for line, call in zip(lines, calls, strict=True)])[:, 1:]
    assert len(values) == sum(len(call.shapes) for call in calls), len(values)
    most = max(len(call.shapes) for call in calls)
    inputs, over = torch.zeros(len(calls), most, values.shape[1]), torch.zeros(len(calls), most)
    for i, (call, part) in enumerate(zip(calls, values.split([len(call.shapes) for call in calls]), strict=True)):
        inputs[i, : len(part)] = part
        over[i, : len(part)] = torch.tensor([call.over[shape] for shape in call.shapes])
    return calls, inputs, over


def choice(costs: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """The time over the best of the shape with the least cost, for each call."""
    return over.gather(1, costs.masked_fill(over == 0, 1e9).argmin(1, keepdim=True)).squeeze(1)


def added(lines: list[str], searches: list[str]) -> list[str]:
    """With these searches, each in place of an earlier one of the call."""

    def key(found: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(found[name] for name in KEY)

    new = {}
    for line in searches:
        found = json.loads(line)
        best = min(us for _, us in found["tried"])
        found["tried"].append([found["before"], found["before_us"]])
        tried = [[plain(shape), round(us, 3)] for shape, us in found["tried"] if us <= WORST * best]
        new[key(found)] = {name: found[name] for name in (*KEY, "before_us")} | {"trust": 1, "tried": tried}
    old = []
    for line in lines:
        before = json.loads(line)
        found = new.get(key(before))
        if found is None:
            old.append(line)
        elif before["trust"] == 1:  # what else was tried, in the time of the new search, which counts more than a sweep
            now = {plain(shape): us for shape, us in found["tried"]}
            then = {plain(shape): us for shape, us in before["tried"]}
            both = [now[shape] / us for shape, us in then.items() if shape in now]
            if both:
                found["tried"] += [
                    [shape, round(us * statistics.median(both), 3)] for shape, us in then.items() if shape not in now
                ]
    return [json.dumps(found, separators=(",", ":")) for found in new.values()] + old


def of_sweep(path: Path) -> dict[tuple[Any, ...], dict[Shape, float]]:
    """Microseconds of each shape that a sweep timed, by call; the mean of both pairings, which share a shape."""
    times: dict[tuple[Any, ...], dict[Shape, list[float]]] = {}
    for row in json.loads(path.read_text())["results"]:
        if "failure" in row or not row.get("shape"):
            continue
        heads, dim = row["heads"].split("x")
        q, k = heads.split("/")
        cache = (2 if "fp8" in row["op"] else 1 if "+kv" in row["op"] else 0) + 2 * ("k only" in row["op"])
        key = (row["tokens"], int(q), int(k), int(dim), int(dim), row["op"].startswith("norm"),
               row["angles"] == "table", cache)  # fmt: skip
        shape = plain([int(number) for number in row["shape"].split()])
        times.setdefault(key, {}).setdefault(shape, []).append(row["us"])
    return {key: {shape: statistics.fmean(us) for shape, us in of.items()} for key, of in times.items()}


def with_sweep(lines: list[str], path: Path) -> list[str]:
    """With what a sweep timed; of a shape timed twice the lesser, as noise only adds."""
    sweep = of_sweep(path)
    found = [json.loads(line) for line in lines]
    known = {tuple(one[name] for name in KEY) for one in found if one["trust"] in (0, 1)}
    found += [dict(zip(KEY, key, strict=True)) | {"before_us": min(of.values()), "trust": 0, "tried": []}
              for key, of in sweep.items() if key not in known]  # fmt: skip
    for one in found:
        times = sweep.get(tuple(one[name] for name in KEY))
        if times is None or one["trust"] not in (0, 1):
            continue
        name = "swept" if one["trust"] else "tried"
        before = {plain(shape): us for shape, us in one.get(name, ())}
        merged = before | {shape: round(min(us, before.get(shape, us)), 3) for shape, us in times.items()}
        tried = one.pop("tried")  # stays the last
        one[name] = [[list(shape), us] for shape, us in merged.items()]
        if name != "tried":
            one["tried"] = tried
    return [json.dumps(one, separators=(",", ":")) for one in found]


def report(name: str, over: torch.Tensor) -> None:
    print(f"{name}: {len(over)} calls, time over the best: median {over.median():.3f}, mean {over.mean():.3f}, "
          + ", ".join(f"{int((over > limit).sum())} above {limit}" for limit in (1.05, 1.1, 1.2))
          + f", at most {over.max():.2f}")  # fmt: skip


def chosen(model: Model, lines: list[str], candidates: list[Shape]) -> list[Shape]:
    """The candidate and start that the model takes for each call, as ModelledShape in backends/cuda/shapes.cc does."""
    starts = (0, 1, 2, 3)  # 0: the usual one
    shapes = [(*shape, start) for shape in candidates for start in starts]
    values = inputs_of([with_shapes(line, shapes) for line in lines])
    costs = model(values[:, 1:]).masked_fill(values[:, 0] == 0, 1e9).view(len(lines), len(candidates), len(starts))
    found = []
    for row, line in zip(costs.tolist(), lines, strict=True):
        call = json.loads(line)
        best, least = candidates[0], math.inf
        for shape, of_shape in zip(candidates, row, strict=True):
            for start, cost in zip(starts, of_shape, strict=True):
                if start and of_shape[0] > least + FAR:
                    break
                if cost < least - (OTHER_START if start else RARER):
                    best, least = (*shape, start_of((*shape, start), call["tokens"], call["table"])), cost
        found.append(best)
    return found


def check(calls: list[Call], inputs: torch.Tensor, over: torch.Tensor, trust: torch.Tensor) -> None:
    names = sorted({call.key[:-1] for call in calls})
    random.Random(0).shuffle(names)
    fold = {name: i % 5 for i, name in enumerate(names)}
    left_out = torch.tensor([fold[call.key[:-1]] for call in calls])
    costs = torch.zeros_like(over)
    for i in range(5):
        costs[left_out == i] = Model(inputs, over, trust * (left_out != i))(inputs[left_out == i])
    chosen = choice(costs, over)
    report("left out", chosen[trust == 1])
    for low, high in ((0, 12), (12, 64), (64, 512), (512, 2048), (2048, 99999)):
        part = torch.tensor([low <= call.tokens < high for call in calls]) & (trust == 1)
        if part.any():
            report(f"  from {low} tokens", chosen[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="?", type=Path, default=SEARCHES, metavar="SEARCHES.jsonl.xz")
    parser.add_argument("--add", type=Path, metavar="SEARCH.jsonl", help="of `ropewalk tune`, taken in first")
    parser.add_argument("--swept", type=Path, nargs="+", default=[], metavar="SWEEP.json", help="of bench/gpu_sweep.py")
    parser.add_argument("--check", action="store_true", help="of models of four fifths of the calls each")
    options = parser.parse_args()
    lines = lzma.decompress(options.searches.read_bytes()).decode().splitlines()
    if options.add:
        lines = added(lines, options.add.read_text().splitlines())
    for sweep in options.swept:
        lines = with_sweep(lines, sweep)
    if options.add or options.swept:
        options.searches.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9))
    calls, inputs, over = read(lines)
    trust = torch.tensor([call.trust for call in calls])
    if options.check:
        return check(calls, inputs, over, trust)
    candidates = candidates_of([call for call in calls if call.trust > 0])
    model = Model(inputs, over, trust)
    listed: dict[Shape, Shape] = {}  # by a call's key

    def add(call: Call, shape: Shape) -> None:
        if call.listable:
            listed[call.key] = shape

    older = {call.key: call.over for call in calls if 0 < call.trust < 1}
    losses = torch.zeros_like(trust)
    served = list(zip(range(len(calls)), calls, chosen(model, lines, candidates), strict=True))
    for i, call, of_model in sorted(served, key=lambda one: one[1].stands_in is not None):
        losses[i] = call.over.get(of_model, WORST)
        by_rules = call.tokens < LEAST_TOKENS and call.stands_in not in listed
        shape = listed.get(call.stands_in, of_model)
        if call.trust == 1 and call.swept is not None:  # ships as it was timed
            if shape != call.swept:
                add(call, call.swept)
        elif call.trust == 1 and (call.over.get(shape, WORST) > TOLERANCE or by_rules):
            add(call, call.best)
        # A sweep found it fast with another shape: kept, unless an older search found the model's as good.
        # Of fewer tokens a sweep timed one start of the next kernel alone, and the rules have it right.
        elif (
            call.trust == 0 and call.tokens >= LEAST_TOKENS and shape != call.best
            and older.get(call.key, {}).get(shape, WORST) > TOLERANCE
        ):  # fmt: skip
            add(call, call.best)
    report("the model's choice, where it was timed", losses[(trust == 1) & (losses < WORST)])
    head = f"// By bench/cuda_table.py from {options.searches.name}"
    write("shapes_table.inc", [
        f"{head}: calls that may have another shape than the model's.",
        "// Tokens, a fourth of a head and of its rotated part, heads of q and k; 1 norm + 2 table + 4 to 16 of a"
        " store; the shape.",
        *(f"{{{', '.join(map(str, key))}, {{{', '.join(map(str, shape))}}}}},"
          for key, shape in sorted(listed.items())),
    ])  # fmt: skip
    write("shapes_candidates.inc", [f"{head}.", *(f"{{{', '.join(map(str, shape))}}}," for shape in candidates)])
    write("cost_model.inc", [f"{head}: weights, layer by layer.", *model.text()])
    print(f"a table of {len(listed)}")


if __name__ == "__main__":
    main()
