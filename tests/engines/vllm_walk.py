"""Calls vLLM's rotary layers and operators in a process in which its own loader has put Ropewalk, on the CPU or a
GPU: each against the layer's own forward. Prints what it found as JSON. Run by tests/python/test_engines.py with the
stubs, and by test_wheels.py with the wheels.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import functools
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shared import CUDA, DEVICE, error, run, stand_in, stands_in, walked

stand_in("aiohttp", "cpuinfo", "xgrammar", "partial_json_parser", "llguidance", "einops")
# vLLM's libraries of kernels, which it imports on a GPU.
stand_in("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C")

SCHEMAS = (  # of the operators whose kernels are not here
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    "fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, "
    "Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids, "
    "int forced_token_heads_per_warp=-1) -> ()",
)
stock_calls: list[str] = []


def operators() -> list[torch.library.Library]:
    """The wheel's are in C++, which is not unpacked: theirs are declared here, with kernels that only count."""
    try:
        import vllm._custom_ops as custom

        stock_calls_of = custom.calls
    except AttributeError:
        stock_calls_of = stock_calls
        library = torch.library.Library("_C", "FRAGMENT")
        for schema in SCHEMAS:
            name = schema.partition("(")[0]
            library.define(schema)
            for key in ("CPU", "CUDA"):
                library.impl(name, lambda *args, name=name: stock_calls.append(name), key)
        return [library, stock_calls_of]  # type: ignore[list-item]
    return [stock_calls_of]  # type: ignore[list-item]


kept = operators()
stock_calls = kept[-1]  # type: ignore[assignment]

from vllm.plugins import load_general_plugins

load_general_plugins()

from ropewalk import engines
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

LAYERS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "default": (128, True, {"rope_type": "default"}),
    "head of 80": (80, True, {"rope_type": "default"}),
    "partial": (128, True, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "gptj": (64, False, {"rope_type": "default"}),
    "mrope": (128, True, {"rope_type": "default", "mrope_section": [16, 24, 24]}),
    "mrope interleaved": (128, True, {"rope_type": "default", "mrope_section": [24, 20, 20],
                                      "mrope_interleaved": True}),
}  # fmt: skip
TOKENS, MOST = 33, 256


def inputs(head: int, dtype: torch.dtype, axes: bool) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(7)
    row = torch.randn((TOKENS, 8 * head), generator=g, device="cpu").to(DEVICE, dtype)  # packed: 4, 2 and 2 heads
    return row, torch.randint(0, MOST, (3, TOKENS) if axes else (TOKENS,), generator=g, device="cpu").to(DEVICE)


def layer_of(name: str, dtype: torch.dtype) -> Any:
    head, neox, rule = LAYERS[name]
    return get_rope(head, MOST, neox, {"rope_theta": 10000, **rule}, dtype)


def layer_against_native(name: str, dtype: torch.dtype, axes: bool) -> dict:
    layer = layer_of(name, dtype)
    head = layer.head_size
    row, positions = inputs(head, dtype, axes)
    q, k = row[:, : 4 * head], row[:, 4 * head : 6 * head]
    want = layer.forward_native(positions, q.clone(), k.clone())
    operator = "vllm::mrope" if axes else "_C::rotary_embedding"
    forward = layer.forward if CUDA else layer.forward_cuda
    ran = run("vllm", lambda: forward(positions, q, k), row, positions)
    new_q, new_k = ran.result
    return {
        "served": ran.served.get(operator, 0),
        "launches": ran.launches,
        "error": max(error(new_q, want[0]), error(new_k, want[1])),
    }


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double().unflatten(-1, (-1, weight.shape[0]))
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).flatten(1).float()


def weights(head: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(head, generator=g, device="cpu") + 0.5).to(DEVICE, dtype) for _ in range(2)]


def norm_rope(name: str, dtype: torch.dtype) -> dict:
    layer = layer_of(name, torch.float32)
    head = layer.head_size
    row, positions = inputs(head, dtype, False)
    q_weight, k_weight = weights(head, dtype)
    q, k, v = row.split([4 * head, 2 * head, 2 * head], -1)
    want = layer.forward_native(positions, normed(q, q_weight), normed(k, k_weight))
    kept_v = v.clone()

    def call() -> None:
        torch.ops._C.fused_qk_norm_rope(row, 4, 2, 2, head, 1e-6, q_weight, k_weight, layer.cos_sin_cache,
                                        layer.is_neox_style, positions)  # fmt: skip

    ran = run("vllm", call, row, positions)
    return {
        "served": ran.served.get("_C::fused_qk_norm_rope", 0),
        "launches": ran.launches,
        "error": max(error(q, want[0]), error(k, want[1])),
        "v": bool(torch.equal(v, kept_v)),
    }


def store(kind: str, dtype: torch.dtype, cache_dtype: str = "auto") -> dict:
    """A method of FlashAttention's implementation against the layer, the norm and an assignment."""
    axes = kind == "mrope"
    layer = layer_of("mrope" if axes else "default", torch.float32)
    head = layer.head_size
    row, positions = inputs(head, dtype, axes)
    q_weight, k_weight = weights(head, dtype)
    q, k, v = row.split([4 * head, 2 * head, 2 * head], -1)
    if kind == "rope":
        want = layer.forward_native(positions, q.float(), k.float())
    else:
        want = layer.forward_native(positions, normed(q, q_weight), normed(k, k_weight))
    impl = FlashAttentionImpl.__new__(FlashAttentionImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size = 4, 2, head
    impl.kv_cache_dtype, impl.attn_type, impl.kv_sharing_target_layer_name = cache_dtype, "decoder", None
    fp8 = cache_dtype != "auto"
    scales = types.SimpleNamespace(_k_scale=torch.tensor(0.25), _v_scale=torch.tensor(0.5))
    cache = torch.zeros(8, 2, 16, 2 * head, dtype=torch.uint8 if fp8 else dtype)  # blocks, heads, block_size, k and v
    shuffled = torch.randperm(128, generator=torch.Generator().manual_seed(3), device="cpu").to(DEVICE)
    slots = shuffled[: TOKENS - 2]  # two rows of padding
    q_out, k_out = torch.empty(TOKENS, 4, head, dtype=dtype), torch.empty(TOKENS, 2, head, dtype=dtype)
    table, neox = layer.cos_sin_cache, layer.is_neox_style
    more = cache, slots
    if kind == "norm":
        asked = impl.fused_qk_norm_rope_kvcache_supported()
        call = functools.partial(impl.do_qk_norm_rope_kvcache_update, scales, row, q_out, k_out, positions, q_weight,
                                 k_weight, 1e-6, table, neox, *more)  # fmt: skip
    elif kind == "mrope":
        asked = impl.fused_qk_norm_mrope_kvcache_supported()
        call = functools.partial(impl.do_qk_norm_mrope_kvcache_update, scales, row, q_out, positions, q_weight[None],
                                 k_weight[None], 1e-6, table, neox, tuple(layer.mrope_section), False,
                                 layer.rotary_dim, *more)  # fmt: skip
    else:
        asked = impl.fused_rope_kvcache_supported()
        call = functools.partial(impl.do_rope_and_kv_cache_update, scales, q, k, v, positions, table, neox, *more)
        q_out = q
    ran = run("vllm", call, row, positions, slots, cache)
    held = cache.view(torch.float8_e4m3fn) if fp8 else cache
    rows = held.float().transpose(1, 2).flatten(0, 1)[slots]  # [tokens, heads, 2 * head]
    keys, values = rows.split(head, -1)
    if fp8:
        keys, values = keys * 0.25, values * 0.5
    known = slots.shape[0]
    others = torch.ones(128, dtype=torch.bool).index_fill(0, slots, False)
    return {
        "asked": bool(asked),
        "served": sum(ran.served.values()),
        "launches": ran.launches,
        "error": error(q_out, want[0]),
        "keys": error(keys, want[1][:known]),
        "values": error(values, v[:known]),
        "others": int(cache.transpose(1, 2).flatten(0, 1)[others].view(torch.uint8).max()),
    }


def configured() -> Any:
    """The settings without which a layer of the wheel cannot be made."""
    try:
        from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
    except ImportError:
        return contextlib.nullcontext()
    more = {"compilation_config": CompilationConfig(custom_ops=["+rotary_embedding"])} if CUDA else {}
    return set_current_vllm_config(VllmConfig(device_config=DeviceConfig(DEVICE.type), **more))


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_device(DEVICE)
    with configured():
        found = walked(walk)
    found["stock before"] = len(stock_calls)
    q = torch.zeros(3, 128, dtype=torch.float64)  # which Ropewalk refuses
    torch.ops._C.rotary_embedding(torch.arange(3), q, q, 64, torch.zeros(4, 64, dtype=torch.float64), True)
    found["stock after"] = len(stock_calls)
    found["stands in"] = sorted(stands_in)
    found["counters"] = engines.counters()["vllm"]
    found["stays_stock"] = engines.stays_stock()["vllm"]
    print(json.dumps(found))


def walk() -> dict[str, Any]:
    found: dict[str, Any] = {"layers": {}, "norms": {}, "stores": {}}
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype)[6:]
        for name in LAYERS:
            found["layers"][f"{name} {short}"] = layer_against_native(name, dtype, "mrope" in name)
        for name in ("default", "partial", "gptj"):
            found["norms"][f"{name} {short}"] = norm_rope(name, dtype)
        for kind in ("norm", "mrope", "rope"):
            found["stores"][f"{kind} {short}"] = store(kind, dtype)
    for kind in ("norm", "mrope", "rope"):
        found["stores"][f"{kind} fp8"] = store(kind, torch.bfloat16, "fp8")
    return found


if __name__ == "__main__":
    main()
