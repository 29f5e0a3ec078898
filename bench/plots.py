"""Pictures of what bench/gpu_compare.py has measured: time against the floor, speed-up over peers, error by position.

python bench/plots.py RESULTS.json [--out docs/results] [--stem NAME]     (needs matplotlib)
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Row = dict[str, Any]
MODES = [("rope", "neox"), ("rope", "interleaved"), ("norm+rope", "neox"), ("norm+rope", "interleaved")]


def timed(results: list[Row]) -> list[Row]:
    return [row for row in results if row["us"] is not None and "failure" not in row]


def title(data: Row) -> str:
    return f"{data['gpu']['name']}, {data['date'][:10]}, bfloat16"


def against_floor(data: Row) -> Any:
    """Time over the floor's by tokens; heads of 128 of all shapes, a point for each."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, constrained_layout=True)
    colours: dict[str, str] = {}  # a contender has the same one in every panel
    for axis, (op, pairing) in zip(axes.flat, MODES, strict=True):
        rows = [
            r for r in timed(data["results"])
            if (r["op"], r["pairing"]) == (op, pairing) and r["head_dim"] == 128 and "of_floor" in r
            and r["rotary_dim"] == 128
        ]  # fmt: skip
        series: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            name = row["contender"]
            if name in ("ropewalk", "FlashInfer"):
                name += f", {row['angles']}"
            series.setdefault(name, {}).setdefault(row["tokens"], []).append(row["of_floor"])
        for name, points in series.items():
            tokens = sorted(points)
            ours = name.startswith("ropewalk")
            colour = colours.setdefault(name, f"C{len(colours) % 10}")
            axis.plot(tokens, [statistics.median(points[n]) for n in tokens], marker="o", label=name, color=colour,
                      linewidth=2.2 if ours else 1.0, markersize=5 if ours else 3, zorder=3 if ours else 2)  # fmt: skip
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", title=f"{op}, {pairing}", ylabel="time / floor")
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.25)
        if rows:
            axis.legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("tokens")
    figure.suptitle(f"Time against the floor of the same run. {title(data)}")
    return figure


def speed_up(data: Row) -> Any:
    """Each peer's time over our best, shape by shape."""
    rows = timed(data["results"])
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row["contender"] == "ropewalk":
            key = (row["shape"], row["op"], row["pairing"])
            best[key] = min(best.get(key, float("inf")), row["us"])
    peers: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        key = (row["shape"], row["op"], row["pairing"])
        if row["contender"] not in ("ropewalk", "floor") and key in best:
            ratios = peers.setdefault(key, {})
            ratios[row["contender"]] = min(ratios.get(row["contender"], float("inf")), row["us"] / best[key])
    names = list(dict.fromkeys(name for ratios in peers.values() for name in ratios))
    shapes = list(dict.fromkeys(key[0] for key in peers))
    size = (max(8.0, 0.6 * len(shapes) + 3), 13)
    figure, axes = plt.subplots(4, 1, figsize=size, sharex=True, constrained_layout=True)
    width = 0.8 / max(len(names), 1)
    for axis, (op, pairing) in zip(axes, MODES, strict=True):
        for number, name in enumerate(names):
            of_shapes = [peers.get((shape, op, pairing), {}).get(name) for shape in shapes]
            points = [(i, ratio) for i, ratio in enumerate(of_shapes) if ratio is not None]
            axis.bar([i + (number - (len(names) - 1) / 2) * width for i, _ in points], [y for _, y in points], width,
                     label=name, color=f"C{number % 10}")  # fmt: skip
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(yscale="log", title=f"{op}, {pairing}", ylabel="peer's time / ours")
        axis.grid(True, axis="y", alpha=0.3)
    if names:
        axes[0].legend(fontsize=8, ncols=min(len(names), 4))
    axes[-1].set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=8)
    figure.suptitle(f"Speed-up over peers (above 1: Ropewalk is faster). {title(data)}")
    return figure


def errors(data: Row) -> Any:
    """Largest error by position."""
    rows = data["error_by_position"]
    positions = [max(row["position"], 1) for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True, sharey=True)
    lines = (
        ("bf16 rounding", "ropewalk", "float32 sincos", "FlashInfer"),
        ("ropewalk, float32", "float32 sincos, float32"),
    )
    for axis, names, text in zip(axes, lines, ("bfloat16 result", "float32 result"), strict=True):
        for name in names:
            points = [(p, row[name]) for p, row in zip(positions, rows, strict=True) if name in row]
            if points:
                label = name.removesuffix(", float32")
                if label == "float32 sincos":
                    label += " of position * inv_freq"
                style: Row = {"marker": "o", "markersize": 4}
                if name == "bf16 rounding":
                    style = {"linestyle": "--", "color": "black"}
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set(xscale="log", yscale="log", title=text, xlabel="first position")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("largest error against float64")
    figure.suptitle(f"Error by position, heads of 128, theta 1e4. {data['gpu']['name']}, {data['date'][:10]}")
    return figure


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file of bench/gpu_compare.py")
    parser.add_argument("--out", type=Path, default=root / "docs" / "results", help="the folder; docs/results")
    parser.add_argument("--stem", help="of the files' names; that of the JSON file")
    options = parser.parse_args()
    data = json.loads(options.results.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.stem or options.results.stem
    for name, draw in (("floor", against_floor), ("peers", speed_up), ("error", errors)):
        figure = draw(data)
        path = options.out / f"{stem}-{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
