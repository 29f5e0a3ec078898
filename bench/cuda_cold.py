"""What the first call of a CUDA kernel costs: compiled by NVRTC, from the cache on disk, and warm.

    python bench/cuda_cold.py [--json FILE]

A process with an empty cache prepares one variant after the other (compiled now); another one finds them on disk. The
medians do not count the first variant of a process, which also starts the driver and loads NVRTC; it is told apart.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, time
import torch, ropewalk
torch.zeros(1, device="cuda")
times, sources = [], []
for head_dim in (128, 64, 96, 80, 112, 160, 192, 256):
    for norm in (False, True):
        q = torch.randn(4, 8, head_dim, device="cuda").bfloat16()
        options = {"frequencies": ropewalk.Frequencies(theta=1e4, rotary_dim=head_dim)}
        if norm:
            options["q_weight"] = torch.ones(head_dim, device="cuda").bfloat16()
        torch.cuda.synchronize()
        start = time.perf_counter()
        ropewalk.prepare(q, **options)
        times.append((time.perf_counter() - start) * 1e3)
        sources.append(ropewalk.explain(q, **options)["source"])
print(json.dumps({"ms": times, "sources": sorted(set(sources))}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("compiled", "disk"):
            done = subprocess.run([sys.executable, "-c", CHILD], env={**os.environ, "ROPEWALK_CACHE_DIR": cache},
                                  capture_output=True, text=True, check=True)  # fmt: skip
            child = json.loads(done.stdout.splitlines()[-1])
            first, *others = child["ms"]
            results[name] = {"first_ms": first, "median_ms": statistics.median(others), "max_ms": max(others),
                             "variants": len(others), "sources": child["sources"]}  # fmt: skip
            print(f"{name:9} median {statistics.median(others):6.2f} ms, largest {max(others):6.2f} ms of "
                  f"{len(others)} variants; the first of the process {first:.1f} ms; "
                  f"{', '.join(child['sources'])}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
