"""Packs of FlashInfer's wheel what bench/gpu_compare.py calls, for a GPU machine without a network: 35 MB for 98.

    python -m pip download --no-deps flashinfer-python==0.7.4
    python bench/flashinfer_subset.py flashinfer_python-0.7.4-*.whl flashinfer.zip
    # there, with torch, nvcc, ninja, apache-tvm-ffi, nvidia-ml-py, einops, tabulate, tqdm, requests and click:
    python3 -m zipfile -e flashinfer.zip peers && PYTHONPATH=peers:.. python3 bench/gpu_compare.py ..

FlashInfer compiles its kernels at the first call, ten seconds each, into ~/.cache/flashinfer. Liger is small and goes
there as it is: python -m pip install --no-deps --target peers liger-kernel==0.8.5.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

CAKE = ("cake_fused_qk_rope_append_backend", "cake_fused_qk_rope_fp8_append_backend")
SOURCES = ("rope.cu", "flashinfer_rope_binding.cu", "tvm_ffi_utils.h")  # of data/csrc


def wanted(name: str) -> bool:
    """Python modules, the kernels' sources, and the headers that they may include."""
    parts = name.split("/")
    if parts[0] != "flashinfer" or name.endswith(".py"):
        return True
    if parts[1:3] == ["data", "csrc"]:
        return len(parts) == 4 and parts[3] in SOURCES
    if parts[1] == "data":
        return True
    return parts[1] in CAKE or parts[1] == "jit" or len(parts) == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="a zip file")
    options = parser.parse_args()
    with (
        zipfile.ZipFile(options.wheel) as wheel,
        zipfile.ZipFile(options.out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out,
    ):
        for entry in wheel.infolist():
            if wanted(entry.filename):
                out.writestr(entry, wheel.read(entry), zipfile.ZIP_DEFLATED, 9)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
