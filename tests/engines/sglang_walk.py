"""Walks SGLang's rotary layers, functions and Qwen3's attention in a process in which its own loader has put Ropewalk,
on the CPU or a GPU: each against the engine's own forward. Prints what it found as JSON. Run by
tests/python/test_engines.py with the stubs, and by test_wheels.py with the wheels.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shared import CUDA, DEVICE, error, run, stand_in, stands_in, walked

stand_in("IPython", "aiohttp", "einops", "flashinfer", "partial_json_parser", "sgl_kernel")

with contextlib.suppress(ImportError):  # transformers looks into torchvision, which what stands in for it is not up to
    from transformers import AutoProcessor  # noqa: F401
stand_in("torchvision")

from sglang.srt.plugins import load_plugins

load_plugins()

from ropewalk import engines
from sglang.srt.layers.rotary_embedding import base, factory, mrope, rope_variant

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
# What `get_rope` is called with: head_size, rotary_dim, neox, rope_scaling.
LAYERS: dict[str, tuple[int, int, bool, dict[str, Any] | None]] = {
    "default": (128, 128, True, None),
    "head of 80": (80, 80, True, None),
    "partial": (128, 64, True, None),
    "gptj": (64, 64, False, None),
    "llama3": (128, 128, True, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 64}),
    "yarn": (64, 64, True, {"rope_type": "yarn", **YARN}),
    "linear": (64, 64, True, {"rope_type": "linear", "factor": 2.0}),
    "dynamic": (64, 64, True, {"rope_type": "dynamic", "factor": 2.0}),
    "dynamic alpha": (64, 64, True, {"rope_type": "dynamic", "factor": 2.0, "alpha": 100.0}),
    "proportional": (64, 32, True, {"rope_type": "proportional"}),
    "mrope": (128, 128, True, {"rope_type": "default", "mrope_section": [16, 24, 24]}),
    "mrope interleaved": (128, 128, True, {"rope_type": "default", "mrope_section": [24, 20, 20],
                                           "mrope_interleaved": True}),
    "mrope glm": (128, 64, False, {"rope_type": "default", "mrope_section": [8, 12, 12], "mrope_interleaved": False,
                                   "mrope_interleaved_glm": False}),
    "mrope yarn": (128, 128, True, {"rope_type": "yarn", "mrope_section": [16, 24, 24], **YARN}),
    "deepseek": (64, 64, False, {"rope_type": "deepseek_yarn", **YARN}),
    "longrope": (96, 96, True, {"rope_type": "longrope", "short_factor": [1.0 + i / 48 for i in range(48)],
                                "long_factor": [2.0 + i / 24 for i in range(48)],
                                "original_max_position_embeddings": 64}),
}  # fmt: skip
TOKENS, MOST = 33, 256


def inputs(head: int, dtype: torch.dtype, axes: bool, longest: int = MOST) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(7)
    row = torch.randn((TOKENS, 7 * head), generator=g, device="cpu").to(DEVICE, dtype)  # packed: 4, 2 and 1 heads
    positions = torch.randint(0, longest, (3, TOKENS) if axes else (TOKENS,), generator=g, device="cpu")
    return row, positions.to(DEVICE)


def shuffled(slots: int) -> torch.Tensor:
    return torch.randperm(slots, generator=torch.Generator().manual_seed(3), device="cpu").to(DEVICE)


def forward_of(layer: Any) -> Any:
    """On a GPU the layer's forward, which finds the one for it; else the one for GPUs, where there is one."""
    own = CUDA or type(layer).__name__ in ("BailingMRotaryEmbedding", "DualChunkRotaryEmbedding")
    return layer.forward if own else getattr(layer, "forward_cuda", layer.forward)


def only(served: dict[str, int]) -> int:
    return sum(served.values())


def against_native(
    layer: Any, dtype: torch.dtype, axes: bool, longest: int = MOST, apart: bool = False, native: Any = None
) -> dict:
    head = layer.head_size
    row, positions = inputs(head, dtype, axes, longest)
    q, k = row[:, : 4 * head], row[:, 4 * head : 6 * head]
    if apart:
        q, k = q.unflatten(1, (4, head)), k.unflatten(1, (2, head))
    double = torch.cat((q.reshape(TOKENS, -1), k.reshape(TOKENS, -1)), 1)
    native = native or getattr(type(layer), "forward_native", None)
    if native is None or isinstance(layer, rope_variant.DualChunkRotaryEmbedding):
        native = type(layer).forward.__wrapped__
    kept = {name: x.clone() for name, x in layer.named_buffers()}
    want = native(layer, positions, q.float().clone(), k.float().clone())
    stock = native(layer, positions, q.clone(), k.clone())
    for name, x in kept.items():  # some forwards round the table to the dtype of q
        setattr(layer, name, x)
    ran = run("sglang", lambda: forward_of(layer)(positions, q, k), row, positions)
    new_q, new_k = ran.result
    assert new_q.shape == stock[0].reshape(new_q.shape).shape and new_k.shape == k.shape
    return {
        "served": only(ran.served),
        "launches": ran.launches,
        "error": max(error(new_q, want[0]), error(new_k, want[1])),
        "stock": max(error(a, b) for a, b in zip(stock, want, strict=True)),
        "in place": bool(new_q.data_ptr() == q.data_ptr()),
        "changed": float((torch.cat((q.reshape(TOKENS, -1), k.reshape(TOKENS, -1)), 1) - double).abs().max()) > 0,
    }


def store(layer: Any) -> dict:
    """Rotation and KV buffers in one call, against the rotation and an assignment."""
    head = layer.head_size
    row, positions = inputs(head, torch.bfloat16, False)
    q, k, v = row.split([4 * head, 2 * head, head], 1)
    v = torch.cat((v, v), 1)
    want = layer.forward_native(positions, q.clone(), k.clone())
    k_buffer, v_buffer = torch.zeros(64, 2 * head).bfloat16(), torch.zeros(64, 2 * head).bfloat16()
    slots = shuffled(64)[:TOKENS]
    slots[5] = -1
    argument = types.SimpleNamespace(value=v, k_buffer=k_buffer, v_buffer=v_buffer, cache_loc=slots)
    given = row, v, positions, slots, k_buffer, v_buffer
    ran = run("sglang", lambda: forward_of(layer)(positions, q, k, fused_set_kv_buffer_arg=argument), *given)
    held = [i for i in range(64) if i not in slots.tolist()]
    keep = slots >= 0
    return {
        "served": only(ran.served),
        "launches": ran.launches,
        "error": max(error(q, want[0]), error(k_buffer[slots[keep]], want[1][keep])),
        "stored": bool(torch.equal(k_buffer[slots[keep]], k[keep]) and torch.equal(v_buffer[slots[keep]], v[keep])),
        "others": float(k_buffer[held].abs().max() + v_buffer[held].abs().max()),
    }


def bailing(layer: Any, dtype: torch.dtype, axes: bool) -> dict:
    """Its forward with axes is a kernel for GPUs, whose meaning is that of Ernie's."""
    cls = mrope.Ernie4_5_VLRotaryEmbedding if axes else base.RotaryEmbedding

    def native(layer: Any, positions: Any, query: Any, key: Any) -> Any:
        return cls.forward_native(layer, positions - layer.position_start, query, key)

    return against_native(layer, dtype, axes, native=native)


def dual_chunk() -> Any:
    if CUDA:
        return rope_variant.DualChunkRotaryEmbedding(64, 64, MOST, 10000, True, torch.float32, 48, 16)
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch, "device", lambda x: "cpu"),
    ):
        return rope_variant.DualChunkRotaryEmbedding(64, 64, MOST, 10000, True, torch.float32, 48, 16)


class Projection:
    """A projection that gives a ready row, for layers that would need weights and ranks."""

    def __init__(self, row: torch.Tensor) -> None:
        self.row = row

    def __call__(self, hidden: Any) -> Any:
        return self.row.clone(), None


def qwen3(rope: Any, axes: bool, stores: bool, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Qwen3Attention without its linear layers: what it hands to attention, and what lies in the cache then."""
    from sglang.srt.models import qwen3 as module
    from sglang.srt.models import utils

    head = rope.head_size
    row, positions = inputs(head, dtype, axes)
    row = torch.cat((row, row[:, :head]), 1)  # 4, 2 and 2 heads
    layer = module.Qwen3Attention.__new__(module.Qwen3Attention)
    torch.nn.Module.__init__(layer)
    layer.head_dim, layer.q_size, layer.kv_size, layer.alt_stream = head, 4 * head, 2 * head, None
    layer.q_norm, layer.k_norm = module.RMSNorm(head, eps=1e-6), module.RMSNorm(head, eps=1e-6)
    g = torch.Generator().manual_seed(1)
    for norm in (layer.q_norm, layer.k_norm):
        norm.weight.data = (torch.rand(head, generator=g, device="cpu") + 0.5).to(DEVICE, dtype)
    layer.rotary_emb = rope
    layer.use_fused_qk_norm_mrope = False  # of AMD's kernels
    if "self.use_fused_qk_norm_rope = " in inspect.getsource(module):  # from 0.5.23 on
        layer.use_fused_qk_norm_rope = False
    layer.__dict__["qkv_proj"] = Projection(row)
    layer.__dict__["o_proj"] = lambda x: (x, None)
    seen: dict[str, Any] = {}

    class Attention:
        k_scale = v_scale = None
        layer_id = 0

        def __call__(self, q: Any, k: Any, v: Any, batch: Any, save_kv_cache: bool = True) -> Any:
            seen.update(q=q, k=k, v=v, save=save_kv_cache)
            return q

    layer.__dict__["attn"] = Attention()
    slots = shuffled(64)[:TOKENS]
    buffers = torch.zeros(64, 2, head, dtype=dtype), torch.zeros(64, 2, head, dtype=dtype)
    utils.enable_fused_set_kv_buffer = lambda batch: stores
    utils.create_fused_set_kv_buffer_arg = lambda value, layer, forward_batch: types.SimpleNamespace(
        value=value, k_buffer=buffers[0].view(64, -1), v_buffer=buffers[1].view(64, -1), cache_loc=slots
    )

    q, k, v = row.split([4 * head, 2 * head, 2 * head], -1)
    want = rope.forward_native(positions, normed(q, layer.q_norm.weight), normed(k, layer.k_norm.weight))
    hidden = torch.zeros(1).to(dtype)
    with deterministic():
        ran = run("sglang", lambda: layer.forward(positions, hidden_states=hidden, forward_batch=None),
                  row, positions, slots, *buffers)  # fmt: skip
    found = {
        "served": ran.served,
        "launches": ran.launches,
        "error": max(error(seen["q"], want[0]), error(seen["k"], want[1])),
        "v": bool(torch.equal(seen["v"], v)),
        "save": seen["save"],
    }
    if stores:
        found["stored"] = bool(
            torch.equal(buffers[0][slots].flatten(1), seen["k"]) and torch.equal(buffers[1][slots].flatten(1), v)
        )
    return found


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double().unflatten(-1, (-1, weight.shape[0]))
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).flatten(1).float()


def functions(layer: Any, dtype: torch.dtype) -> dict[str, dict]:
    """The functions of `sglang.kernels` that rotate by the table, with a store too, and that norm and rotate."""
    from ropewalk.compat import sglang_jit
    from sglang.kernels.ops.attention import fused_qknorm_rope, rope

    head, found = layer.head_size, {}
    for name in ("apply_rope_with_cos_sin_cache_inplace", "the same stores", "rotary_embedding", "fused_qk_norm_rope"):
        row, positions = inputs(head, dtype, False)
        row = torch.cat((row, row[:, :head]), 1)
        q, k, v = row.split([4 * head, 2 * head, 2 * head], -1)
        weights = [(torch.arange(head) % n / n + 0.5).to(dtype) for n in (5, 7)]
        norms = name == "fused_qk_norm_rope"
        xs = [normed(x, w) for x, w in zip((q, k), weights, strict=True)] if norms else (q.float(), k.float())
        want, old_v = layer.forward_native(positions, *xs), v.clone()
        heads = [x.unflatten(-1, (-1, head)) for x in (q, k)]
        slots = shuffled(64)[:TOKENS]
        buffers = [torch.zeros(64, 2 * head, dtype=dtype) for _ in range(2)]
        argument = sglang_jit.FusedSetKVBufferArg(value=v, k_buffer=buffers[0], v_buffer=buffers[1], cache_loc=slots)
        table = layer.cos_sin_cache
        if norms:
            call = functools.partial(fused_qknorm_rope.fused_qk_norm_rope, row, 4, 2, 2, head, 1e-6, *weights, 10000.0,
                                     True, positions, 1.0, 1.0, 1.0, 1.0)  # fmt: skip
        elif name == "rotary_embedding":
            call = functools.partial(rope.rotary_embedding, positions, *heads, head, table, True)
        else:
            more = {"fused_args": argument} if "stores" in name else {}
            call = functools.partial(rope.apply_rope_with_cos_sin_cache_inplace, *heads, table, positions, is_neox=True,
                                     **more)  # fmt: skip
        ran = run("sglang", call, row, positions, slots, *buffers)
        stored = "stores" not in name or (torch.equal(buffers[0][slots], k) and torch.equal(buffers[1][slots], v))
        found[f"{name} {str(dtype)[6:]}"] = {
            "served": only(ran.served),
            "launches": ran.launches,
            "error": max(error(q, want[0]), error(k, want[1])),
            "v": bool(torch.equal(v, old_v)),
            "stored": bool(stored),
        }
    return found


@contextlib.contextmanager
def deterministic() -> Any:
    """The forward asks for settings that only a server has."""
    from sglang.srt import runtime_context
    from sglang.srt.models import qwen3 as module

    asked = types.SimpleNamespace(deterministic=types.SimpleNamespace(rl_on_policy_target=None))
    old = runtime_context.get_exec, module.get_exec
    runtime_context.get_exec = module.get_exec = lambda: asked
    yield
    runtime_context.get_exec, module.get_exec = old


def walk() -> dict[str, Any]:
    found: dict[str, Any] = {"layers": {}, "stores": {}, "qwen3": {}, "functions": {}}
    made = {}
    for name, (head, width, neox, scaling) in LAYERS.items():
        layer = made[name] = factory.get_rope(head, width, MOST, 10000, neox, scaling, torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name} {str(dtype)[6:]}"
            axes = (False, True) if "mrope" in name else (False,)
            for each in axes:
                found["layers"][key + (" axes" if each else "")] = against_native(layer, dtype, each,
                                                                                  apart=name == "deepseek")  # fmt: skip
    found["layers"]["longrope short float32"] = against_native(made["longrope"], torch.float32, False, 60)
    ernie = mrope.Ernie4_5_VLRotaryEmbedding(128, 128, MOST, 10000, False, torch.float32, [22, 22, 20])
    for dtype in (torch.float32, torch.bfloat16):
        found["layers"][f"ernie {str(dtype)[6:]} axes"] = against_native(ernie, dtype, True)
    video = {"rope_type": "default", "mrope_section": [24, 20, 20], "video_rope": True}
    layer = factory.get_rope(128, 128, MOST, 10000, True, video, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        found["layers"][f"bailing {name}"] = bailing(layer, dtype, False)
        found["layers"][f"bailing {name} axes"] = bailing(layer, dtype, True)
        found["layers"][f"dual chunk {name}"] = against_native(dual_chunk(), dtype, False)
    for name in ("default", "partial", "gptj", "yarn"):
        found["stores"][name] = store(made[name])
    for name in ("default", "llama3", "mrope"):
        axes = name == "mrope"
        found["qwen3"][name] = qwen3(made[name], axes, False)
        found["qwen3"][f"{name} stores"] = qwen3(made[name], axes, True)
    for dtype in (torch.float32, torch.bfloat16):
        found["functions"].update(functions(made["default"], dtype))
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_device(DEVICE)
    found = walked(walk)
    found["stands in"] = sorted(stands_in)
    found["refused"] = refusals(factory.get_rope(128, 128, MOST, 10000, True, None, torch.float32))
    found["counters"] = engines.counters()["sglang"]
    found["stays_stock"] = engines.stays_stock()["sglang"]
    print(json.dumps(found))


def refusals(layer: Any) -> dict:
    """A call that Ropewalk refuses goes the engine's way; after three such it is not tried any more."""
    calls = []
    hook = type(layer).forward_cuda.__wrapped__

    def original(self: Any, positions: Any, query: Any, key: Any, *others: Any) -> Any:
        calls.append(query.dtype)
        return query, key

    from ropewalk.engines import sglang as glue

    q = torch.zeros(3, 128, dtype=torch.float64)
    for _ in range(5):
        glue._rotary(original, layer, torch.arange(3), q, q)
    counts = engines.stays_stock()["sglang"]
    layer.__dict__.pop("_ropewalk")
    return {"calls": len(calls), "counted": sum(counts.values()), "reasons": list(counts), "known": bool(hook)}


if __name__ == "__main__":
    main()
