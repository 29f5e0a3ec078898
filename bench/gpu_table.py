"""The table of docs/performance.md of what bench/gpu_compare.py has measured.

    python bench/gpu_table.py RESULTS.json [--gpu H200] [--also OTHER.json]

--gpu: the one that AOT and JIT were recorded on. --also: another run, for peers that this one lacks.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Shapes, the words for them, and the operations shown.
SHOWN = [
    ("decode_1", "1, 32/8x128", ("rope", "norm+rope", "norm+rope+kv bf16")),
    ("decode_64", "64, 32/8x128", ("rope", "norm+rope", "norm+rope+kv bf16")),
    ("decode_256", "256, 32/8x128", ("rope", "norm+rope")),
    ("prefill_1024", "1024, 32/8x128", ("rope", "norm+rope", "norm+rope+kv bf16")),
    ("flux_1024", "4096, 24/24x128 (Flux)", ("rope", "norm+rope")),
    ("head_80", "4096, 32/8x80", ("rope", "norm+rope")),
    ("prefill_8192", "8192, 32/4x128", ("rope", "norm+rope")),
]
WORDS = {"rope": "rope neox", "norm+rope": "norm + rope neox", "norm+rope+kv bf16": "norm + rope + KV store"}
PEERS = ("FlashInfer", "Liger", "torch.compile")

# SGLang's kernels for the norm and the rotation, AOT and JIT, interleaved and then neox: microseconds, medians of graph
# replays measured on 2026-11-22.
RECORDED: dict[str, dict[str, tuple[tuple[float, float], tuple[float, float]]]] = {
    "H200": {
        "flux_1024": ((112.5, 39.7), (134.8, 62.9)),
        "qwen_image_1024": ((149.3, 52.3), (178.9, 83.1)),
        "decode_1": ((2.5, 1.6), (2.8, 1.8)),
        "decode_64": ((3.7, 2.4), (4.2, 2.6)),
        "decode_256": ((8.0, 4.0), (9.3, 5.3)),
        "prefill_1024": ((25.1, 9.6), (29.9, 14.6)),
        "prefill_8192": ((167.4, 58.2), (200.8, 93.1)),
        "head_64": ((67.5, 26.7), (74.6, 38.4)),
        "head_256": ((78.3, 25.3), (100.7, 44.7)),
    },
    "H100": {
        "flux_1024": ((112.6, 45.1), (135.2, 67.1)),
        "qwen_image_1024": ((149.3, 59.0), (179.1, 87.4)),
        "decode_1": ((2.6, 1.6), (2.8, 1.9)),
        "decode_64": ((3.8, 2.6), (4.3, 2.9)),
        "decode_256": ((8.2, 4.3), (9.4, 5.6)),
        "prefill_8192": ((167.6, 66.7), (200.9, 98.7)),
    },
}
# batch2_medium is flux_1024 as two sequences: the same rows for these kernels.
for _times in RECORDED.values():
    _times["batch2_medium"] = _times["flux_1024"]


def best(rows: list[dict[str, Any]], shape: str, op: str, contender: str) -> float | None:
    """Microseconds, of angles computed or from a table."""
    times = [r["us"] for r in rows if (r["shape"], r["op"], r["contender"]) == (shape, op, contender) and r["us"]
             and r["pairing"] in ("neox", "") and "failure" not in r]  # fmt: skip
    return min(times, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--gpu", choices=RECORDED, default="H200")
    parser.add_argument("--also", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["results"]
    here = {row["contender"] for row in rows}
    if options.also:
        rows += [r for r in json.loads(options.also.read_text())["results"] if r["contender"] not in here]

    def text(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    titles = ["tokens, q/k heads x head size", "op", "floor", "Ropewalk", "of floor", "FlashInfer (best)", *PEERS[1:]]
    print("| " + " | ".join([*titles, "AOT", "JIT"]) + " |")
    print("|---" * 10 + "|")
    for shape, words, ops in SHOWN:
        for op in ops:
            # Ours with its angles computed in the call.
            ours = next((r for r in rows if r["contender"] == "ropewalk" and r["us"] and r["angles"] == "frequencies"
                         and (r["shape"], r["op"], r["pairing"]) == (shape, op, "neox")), {})  # fmt: skip
            recorded = RECORDED[options.gpu].get(shape, (None, (None, None)))[1] if op == "norm+rope" else (None, None)
            cells = [words if op == ops[0] else "", WORDS[op], text(ours.get("floor_us")), text(ours.get("us")),
                     text(ours.get("of_floor")), *(text(best(rows, shape, op, peer)) for peer in PEERS)]  # fmt: skip
            cells += [text(us, 1) for us in recorded]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
