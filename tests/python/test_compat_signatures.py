"""`ropewalk.compat` is called as its originals are: their signatures, as tests/engines/signatures.py read them from the
originals' own packages. `make test-engines` holds that record to the engines' wheels."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import importlib.util
import inspect
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
FILE = Path(__file__).parents[1] / "engines/signatures.py"
_spec = importlib.util.spec_from_file_location("signatures", FILE)
signatures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(signatures)
RECORDED = signatures.recorded()
MODULES = [
    "diffusers", "flash_attn", "flashinfer", "liger", "rotary", "sgl_kernel", "sgl_kernel_xpu", "sglang_jit",
    "transformer_engine", "transformers", "vllm",
]  # fmt: skip
# Those whose original's Python source none of the packages has that are read.
UNREAD = {
    "operators in C++, or of packages with a wheel for each GPU": [
        "sgl_kernel_xpu.apply_rope_inplace_with_kvcache", "sgl_kernel_xpu.apply_rope_with_cos_sin_cache_inplace",
        "sgl_kernel_xpu.fused_inplace_qknorm_rope", "sgl_kernel_xpu.fused_q_norm_rope",
        "sgl_kernel_xpu.fused_qk_norm_rope", "sgl_kernel_xpu.fused_qk_rope_with_cos_sin_cache_inplace",
        "sgl_kernel_xpu.multimodal_rotary_embedding", "sgl_kernel_xpu.rotary_embedding",
        "vllm.apply_rotary_emb", "vllm.deepseek_scaling_rope", "vllm.fused_qk_norm_mrope",
        "vllm.fused_qk_norm_rope_kvcache", "vllm.multimodal_rotary_embedding",
    ],
    "not in the wheel of SGLang 0.5.23": ["sglang_jit.fused_qk_norm_mrope"],
    "not in sgl_kernel's wheels for CUDA": [
        "sgl_kernel.can_use_fused_qk_norm_rope",  # that of sglang_jit
        "sgl_kernel.fused_qk_rope_with_cos_sin_cache_inplace",  # of those for Intel's GPUs
    ],
    "published as source alone": [
        "rotary.apply_rotary", "rotary.apply_rotary_transformers", "transformer_engine.apply_rotary_pos_emb",
    ],
}  # fmt: skip

# What has to be given there and need not be given here.
OPTIONAL = {"sgl_kernel.FusedSetKVBufferArg": ("k_scale", "v_scale", "cache_loc")}


def ours(name: str) -> list[list[Any]]:
    module, _, function = name.partition(".")
    found = inspect.signature(getattr(importlib.import_module(f"ropewalk.compat.{module}"), function)).parameters
    return [
        [each.name, "keyword" if each.kind is each.KEYWORD_ONLY else "positional",
         None if each.default is each.empty else repr(each.default)]
        for each in found.values()
        if each.name != "self"
    ]  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_every_call_of_the_original_is_one_of_ours(name: str) -> None:
    """The same names in the same order, with the same defaults. Of our own may follow what need not be given."""
    theirs, mine = RECORDED[name]["parameters"], ours(name)
    for at, (parameter, _, default) in enumerate(theirs):
        if parameter in OPTIONAL.get(name, ()):
            assert default is None
            assert mine[at][2] == "None"
            mine[at][2] = None
    assert mine[: len(theirs)] == theirs
    assert all(default is not None for *_, default in mine[len(theirs) :])


def test_no_function_is_forgotten() -> None:
    names = [
        f"{module}.{name}"
        for module in MODULES
        for name in importlib.import_module(f"ropewalk.compat.{module}").__all__
    ]  # fmt: skip
    files = {path.stem for path in Path(importlib.import_module("ropewalk.compat").__file__).parent.glob("[a-z]*.py")}
    assert files == set(MODULES)
    assert sorted(names) == sorted([*RECORDED, *(name for each in UNREAD.values() for name in each)])


def test_the_record_is_that_of_what_is_installed() -> None:
    """transformers and diffusers, as `make test` has them."""
    found = signatures.read([Path(sysconfig.get_path("purelib"))])
    if not found:
        pytest.skip("none of the packages is installed")
    for name, each in found.items():
        assert each["parameters"] == RECORDED[name]["parameters"], (name, each["version"], RECORDED[name]["version"])


def test_what_is_read_of_a_source() -> None:
    source = """
def turn(a): ...
class Layer:
    def turn(self, x, y=1, /, z: int = -1, *, w=None, v): ...
class Fields:
    a: int
    b: float = 0.5
def turn(q, k=1e-06): ...
"""
    assert signatures.parameters(source, "turn") == [["q", "positional", None], ["k", "positional", "1e-06"]]
    assert signatures.parameters(source, "Layer.turn") == [
        ["x", "positional", None], ["y", "positional", "1"], ["z", "positional", "-1"],
        ["w", "keyword", "None"], ["v", "keyword", None],
    ]  # fmt: skip
    assert signatures.parameters(source, "Fields") == [["a", "positional", None], ["b", "positional", "0.5"]]
