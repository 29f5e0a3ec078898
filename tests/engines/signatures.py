"""The signatures of the functions that `ropewalk.compat` stands in for, read from the source of their own packages.

    python tests/engines/signatures.py FOLDER.. >tests/engines/signatures.json

A folder is a site-packages, or a wheel unpacked. Nothing is imported: the engines' files want GPUs and each other. What
is found is written, and the rest kept as it was recorded. `make test` holds `ropewalk.compat` to the record, and
`make test-engines` the record to the wheels that it has: not to those of sgl_kernel, of 370 and 540 MB.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("signatures.json")
_ATTENTION = "sglang/kernels/ops/attention"
_DIFFUSION = "sglang/kernels/ops/diffusion/rope/qknorm_rope_jit.py"
_FLASH = "vllm/vllm_flash_attn/layers/rotary.py"  # flash-attn's own file
# Where each function of compat has its original: its package, the file and, if it has another one there, its name.
ORIGINALS: dict[str, tuple[str, ...]] = {
    **{
        f"sglang_jit.{name}": ("sglang", f"{_ATTENTION}/{file}.py")
        for file, names in {
            "fused_qknorm_rope": ["fused_qk_norm_rope", "can_use_fused_qk_norm_rope"],
            "rope": ["apply_rope_inplace", "apply_rope_inplace_with_kvcache", "apply_rope_with_cos_sin_cache_inplace",
                     "rotary_embedding", "FusedSetKVBufferArg"],
            "rotary_triton": ["triton_mrope_fused"],
            "table_qk_norm_rope": ["table_qk_norm_rope_"],
            "fused_qk_rope_reshape_and_cache": ["fused_qk_rope_reshape_and_cache"],
        }.items()
        for name in names
    },
    **{
        f"sglang_jit.{name}": ("sglang", _DIFFUSION)
        for name in ("fused_inplace_qknorm_rope", "can_use_fused_inplace_qknorm_rope", "fused_qknorm_rope_out_of_place",
                     "fused_qknorm_rope_pack_kv")
    },
    "sgl_kernel_xpu.forward_xpu": (
        "sglang", "sglang/srt/layers/rotary_embedding/base.py", "RotaryEmbedding.forward_xpu",
    ),
    "sgl_kernel.rotary_embedding": ("sglang-kernel", "sgl_kernel/elementwise.py"),
    "sgl_kernel.fused_qk_norm_rope": ("sglang-kernel", "sgl_kernel/moe.py"),
    # Its older name, by which it has what was left out since.
    "sgl_kernel.apply_rope_with_cos_sin_cache_inplace": ("sgl-kernel", "sgl_kernel/elementwise.py"),
    "sgl_kernel.FusedSetKVBufferArg": ("sgl-kernel", "sgl_kernel/elementwise.py"),
    "vllm.rotary_embedding": ("vllm", "vllm/_custom_ops.py"),
    "vllm.fused_qk_norm_rope": ("vllm", "vllm/_custom_ops.py"),
    "flash_attn.apply_rotary_emb": ("vllm", _FLASH),
    "flash_attn.apply_rotary_emb_func": ("vllm", _FLASH, "apply_rotary_emb"),
    "flash_attn.apply_rotary_emb_qkv_": ("vllm", _FLASH),
    "flash_attn.apply_rotary_emb_kv_": ("vllm", _FLASH),
    **{
        f"flashinfer.{name}{suffix}": ("flashinfer-python", "flashinfer/rope.py")
        for name in ("apply_rope", "apply_rope_pos_ids", "apply_llama31_rope", "apply_llama31_rope_pos_ids",
                     "apply_rope_with_cos_sin_cache")
        for suffix in ("", "_inplace")
    },
    **{
        f"liger.{name}": ("liger-kernel", f"liger_kernel/transformers/{file}.py")
        for name, file in {
            "liger_rotary_pos_emb": "rope", "liger_rotary_pos_emb_gpt_oss": "rope",
            "liger_rotary_pos_emb_vision": "rope", "liger_multimodal_rotary_pos_emb": "qwen2vl_mrope",
            "liger_llama4_text_rotary_pos_emb": "llama4_rope", "liger_llama4_vision_rotary_pos_emb": "llama4_rope",
        }.items()
    },
    "diffusers.apply_rotary_emb": ("diffusers", "diffusers/models/embeddings.py"),
    "transformers.apply_rotary_pos_emb": ("transformers", "transformers/models/llama/modeling_llama.py"),
}  # fmt: skip


def parameters(source: str, name: str) -> list[list[Any]]:
    """Of a function, a `Class.method` or a dataclass: name, kind and default of each (its text, or None), but self."""
    found: Any = ast.parse(source)
    for part in name.split("."):
        named = [each for each in found.body if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and each.name == part]
        found = named[-1]  # the one that holds
    if isinstance(found, ast.ClassDef):
        fields = [each for each in found.body if isinstance(each, ast.AnnAssign)]
        return [[each.target.id, "positional", each.value and ast.unparse(each.value)] for each in fields]
    args = found.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    all_of_them = [(arg, "positional", default) for arg, default in zip(plain, defaults, strict=True)]
    all_of_them += [(arg, "keyword", value) for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [
        [arg.arg, kind, default if default is None else ast.unparse(default)]
        for arg, kind, default in all_of_them
        if arg.arg != "self"
    ]


def version_of(package: str, folder: Path) -> str | None:
    """That of the package in a folder."""
    for metadata in folder.glob(f"{package.replace('-', '_')}-*.dist-info/METADATA"):
        for line in metadata.read_text().splitlines():
            if line.startswith("Version: "):
                return line.removeprefix("Version: ")
    return None


def read(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """What is there in these folders."""
    found: dict[str, dict[str, Any]] = {}
    for ours, (package, file, *name) in ORIGINALS.items():
        theirs = name[0] if name else ours.partition(".")[2]
        for folder in folders:
            if (folder / file).is_file() and version_of(package, folder):
                found[ours] = {
                    "package": package,
                    "version": version_of(package, folder),
                    "file": file,
                    "function": theirs,
                    "parameters": parameters((folder / file).read_text(), theirs),
                }
                break
    return found


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text())


def main() -> None:
    known = recorded() if RECORD.exists() and RECORD.stat().st_size else {}
    found = {**known, **read([Path(folder) for folder in sys.argv[1:]])}
    for ours in ORIGINALS:
        if ours not in found:
            print(f"not found: {ours}", file=sys.stderr)
    lines = [f"{json.dumps(ours)}: {json.dumps(found[ours])}" for ours in ORIGINALS if ours in found]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
