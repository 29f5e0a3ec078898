"""Liger's and flash-attn's rotary functions, from their wheels, beside those of `ropewalk.compat` on the CPU, forward
and backward: their Triton kernels run in Triton's interpreter. Prints the largest distances as JSON. Run by
test_wheels.py.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
import ropewalk
import torch
from ropewalk.compat import flash_attn, liger

ROTARY, HEAD, TOKENS, ROWS = 16, 24, 6, 12
torch.cuda.device = lambda *_: contextlib.nullcontext()  # which the kernels' callers enter


def random(*shape: int, seed: int = 1) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


COS, SIN = ropewalk.Frequencies(1e4, ROTARY).table(ROWS, torch.float32)
WIDE = [torch.cat((table[:TOKENS], table[:TOKENS]), -1) for table in (COS, SIN)]
found: dict[str, list[float]] = {}


def outputs_and_gradients(call: Callable[..., Any], xs: Any) -> list[Any]:
    xs = [x.clone().requires_grad_() for x in xs]
    new = call(*xs)
    new = [x.contiguous() for x in (new if isinstance(new, tuple) else [new])]
    outputs = [x.detach().clone() for x in new]
    grads = [random(*x.shape, seed=7 + i) for i, x in enumerate(new)]
    return [outputs, list(torch.autograd.grad(new, xs, grads))]


def compare(name: str, theirs: Callable[..., Any], ours: Callable[..., Any], *xs: Any) -> None:
    pairs = zip(outputs_and_gradients(theirs, xs), outputs_and_gradients(ours, xs), strict=True)
    found[name] = [max((a - b).abs().max().item() for a, b in zip(*each, strict=True)) for each in pairs]


def package(name: str) -> None:
    """A package without what its __init__ imports, which wants a GPU."""
    for folder in sys.path:
        if os.path.isdir(path := os.path.join(folder, *name.split("."))):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
            return
    raise ModuleNotFoundError(name)


def walk_flash_attn() -> None:
    # Of its package einops the gradient of packed rows has one call.
    sys.modules["einops"] = types.ModuleType("einops")
    sys.modules["einops"].rearrange = lambda x, pattern: x.flatten(*{"b s t h d -> b s (t h) d": (2, 3)}[pattern])
    sys.modules["einops"].repeat = None
    for name in ("vllm", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.ops", "vllm.vllm_flash_attn.ops.triton",
                 "vllm.vllm_flash_attn.layers"):  # fmt: skip
        package(name)
    original = importlib.import_module("vllm.vllm_flash_attn.layers.rotary")

    def both(name: str, function: str, x: Any, *args: Any, **options: Any) -> None:
        in_place = "in place" in name

        def of(module: Any) -> Callable[..., Any]:
            return lambda x: getattr(module, function)(x * 1 if in_place else x, COS, SIN, *args, **options)

        compare(f"flash_attn {name}", of(original), of(flash_attn), x)

    x = random(2, TOKENS, 3, HEAD)
    for pairs in ("halves", "neighbours"):
        for offsets in (0, 3, torch.tensor([1, 5])):
            both(f"{pairs} from {offsets}", "apply_rotary_emb", x, pairs == "neighbours", seqlen_offsets=offsets)
        both(f"{pairs} in place", "apply_rotary_emb", x, pairs == "neighbours", True)
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    both("behind each other", "apply_rotary_emb", random(9, 3, HEAD), cu_seqlens=bounds, max_seqlen=5)
    both("qkv in place", "apply_rotary_emb_qkv_", random(2, TOKENS, 3, 2, HEAD))
    both("grouped qkv in place", "apply_rotary_emb_qkv_", random(2, TOKENS, 8, HEAD), num_heads_q=4)
    both("kv in place", "apply_rotary_emb_kv_", random(2, TOKENS, 2, 2, HEAD))


def walk_liger() -> None:
    ops = importlib.import_module("liger_kernel.ops")
    q, k = random(2, 4, TOKENS, ROTARY), random(2, 2, TOKENS, ROTARY, seed=2)
    tables = [table[None] for table in WIDE]
    compare("liger", lambda q, k: ops.LigerRopeFunction.apply(q, k, *tables, None, 1),
            lambda q, k: liger.liger_rotary_pos_emb(q, k, *tables), q, k)  # fmt: skip
    axes = [torch.stack([table[a : a + TOKENS] for a in (0, 2, 4)])[:, None].expand(-1, 2, -1, -1)
            for table in (COS, SIN)]  # fmt: skip
    axes = [torch.cat((table, table), -1) for table in axes]
    compare("liger mrope", lambda q, k: ops.LigerQwen2VLMRopeFunction.apply(q, k, *axes, [4, 2, 2], 1),
            lambda q, k: liger.liger_multimodal_rotary_pos_emb(q, k, *axes, [4, 2, 2]), q, k)  # fmt: skip
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    table = torch.complex(COS, SIN)[None, :TOKENS]
    compare("liger llama4", lambda q, k: ops.LigerLlama4RopeFunction.apply(q, k, table),
            lambda q, k: liger.liger_llama4_text_rotary_pos_emb(q, k, table), q, k)  # fmt: skip


walk_flash_attn()
walk_liger()
print(json.dumps(found))
