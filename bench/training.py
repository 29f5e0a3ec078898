"""A training step's forward and backward through layers like Qwen3's: stock, patched, and without norm and rotation.

    python bench/training.py [--device cpu] [--models NAME,..] [--tokens N] [--rounds N] [--json FILE]

Layers are transformers' own (Qwen3-0.6B and Qwen3-8B: four and two layers, random weights; bfloat16 on CUDA, float32 on
a CPU). "stock" is what transformers does, "ropewalk" the same model after `ropewalk.transformers.patch`, "left out" has
no norm of q and k and no rotation: the most that can be won. Contenders share their weights and take turns, eagerly; a
number is the median of the rounds: microseconds a layer of forward and backward, by the clock, and the megabytes that
autograd keeps between them beyond what was there (on a CPU those are not counted). Gradients are compared first.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import engines
import ropewalk
import ropewalk.transformers
import torch
import transformers

SHAPES = {
    "Qwen3-0.6B": (engines.Shape("Qwen3-0.6B", 1024, 3072, 16, 8, 128, True, 1e6, "Qwen3"), 4),
    "Qwen3-8B": (engines.Shape("Qwen3-8B", 4096, 12288, 32, 8, 128, True, 1e6, "Qwen3"), 2),
}


def models_of(shape: engines.Shape, layers: int, like: dict[str, Any]) -> dict[str, Any]:
    config = transformers.Qwen3Config(
        vocab_size=256, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.k_heads, head_dim=shape.head_dim,
        max_position_embeddings=40960, pad_token_id=0, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    stock = engines.made(lambda: transformers.Qwen3Model(config), like)

    def another() -> Any:
        return copy.deepcopy(stock, {id(weight): weight for weight in stock.parameters()})

    ours, without = another(), another()
    served = ropewalk.transformers.patch(ours)
    if served.layers != layers or served.fused_norms != layers:
        raise SystemExit(f"{shape.name}: {served}")
    for layer in without.layers:
        engines.leave_out(layer.self_attn, norm=True)
    stock.requires_grad_(True)  # all share their weights
    return {"stock": stock, "ropewalk": ours, "left out": without}


def run(name: str, options: argparse.Namespace, like: dict[str, Any]) -> dict[str, Any]:
    shape, layers = SHAPES[name]
    cuda = like["device"] == "cuda"
    models = models_of(shape, layers, like)
    x = torch.randn(1, options.tokens, shape.hidden, **like).requires_grad_()
    away = torch.randn_like(x)
    positions = torch.arange(options.tokens, device=like["device"])[None]
    tables = {way: model.rotary_emb(x, positions) for way, model in models.items()}

    def forward(way: str) -> Any:
        y = x
        for layer in models[way].layers:
            y = layer(y, position_embeddings=tables[way], attention_mask=None, position_ids=positions)
            y = y[0] if isinstance(y, tuple) else y
        return y

    def clear() -> None:
        x.grad = None
        for weight in models["stock"].parameters():
            weight.grad = None

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    grads = {}
    for way in ("stock", "ropewalk"):
        clear()
        forward(way).backward(away)
        norms = [
            weight.grad for key, weight in models["stock"].named_parameters() if "q_norm" in key or "k_norm" in key
        ]
        grads[way] = [x.grad, *norms]
    off = [((a - b).float().norm() / a.float().norm()).item() for a, b in zip(*grads.values(), strict=True)]
    if not max(off) <= (5e-2 if like["dtype"] == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{name}: gradients differ by {max(off):.2e} of their length")
    del grads

    times: dict[str, list[float]] = {way: [] for way in models}
    kept: dict[str, float] = {}
    for _ in range(options.rounds):
        for way in models:
            clear()
            begin = clock()
            before = torch.cuda.memory_allocated() if cuda else 0
            y = forward(way)
            if cuda:
                kept[way] = (torch.cuda.memory_allocated() - before) / 1e6 / layers
            y.backward(away)
            times[way].append((clock() - begin) * 1e6 / layers)
            del y
    clear()
    result = {"model": name, "layers": layers, "tokens": options.tokens,
              "us": {way: statistics.median(all_times) for way, all_times in times.items()},
              "kept_mb": kept, "worst_gradient": max(off)}  # fmt: skip
    us = result["us"]
    listed = ", ".join(f"{way} {each:.0f}" for way, each in us.items())
    ratio = us["stock"] / us["ropewalk"]
    print(f"{name:<12} {options.tokens} tokens  us a layer: {listed}; stock / ropewalk {ratio:.3f}", flush=True)
    if cuda:
        print(f"{'':<12} kept by autograd, MB a layer: " + ", ".join(f"{way} {mb:.1f}" for way, mb in kept.items()))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, help="default: 4096, on a CPU 256")
    parser.add_argument("--rounds", type=int, help="default: 40, on a CPU 5")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.tokens = options.tokens or (4096 if cuda else 256)
    options.rounds = options.rounds or (40 if cuda else 5)
    like = {"device": options.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, ropewalk {ropewalk.__version__}"
    )
    results = [run(name, options, like) for name in options.models.split(",")]
    if options.json:
        options.json.write_text(json.dumps({"device": where, "torch": torch.__version__, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
