"""The table of docs/performance.md of what bench/gpu_compare.py has measured.

    python bench/gpu_table.py RESULTS.json [--recorded SEED_FORM.json] [--also OTHER.json]

--recorded: AOT and JIT, as bench/seed_form.py has them. --also: another run, for peers that this one lacks.
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


def best(rows: list[dict[str, Any]], shape: str, op: str, contender: str) -> float | None:
    """Microseconds, of angles computed or from a table."""
    times = [r["us"] for r in rows if (r["shape"], r["op"], r["contender"]) == (shape, op, contender) and r["us"]
             and r["pairing"] in ("neox", "") and "failure" not in r]  # fmt: skip
    return min(times, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--recorded", type=Path)
    parser.add_argument("--also", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["results"]
    here = {row["contender"] for row in rows}
    if options.also:
        rows += [r for r in json.loads(options.also.read_text())["results"] if r["contender"] not in here]
    recorded = json.loads(options.recorded.read_text())["results"] if options.recorded else []

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
            others = next((r["peers_us"] for r in recorded if (r["name"], r["pairing"]) == (shape, "neox")), {})
            cells = [words if op == ops[0] else "", WORDS[op], text(ours.get("floor_us")), text(ours.get("us")),
                     text(ours.get("of_floor")), *(text(best(rows, shape, op, peer)) for peer in PEERS)]  # fmt: skip
            cells += [text(others.get(name), 1) if op == "norm+rope" else "" for name in ("AOT", "JIT")]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
