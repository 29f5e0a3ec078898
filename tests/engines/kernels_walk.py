"""Small models through transformers' slot for rotations, by the package `kernels`, and patched beside it. Prints what
it found as JSON. Run by test_wheels.py."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import ropewalk
import ropewalk.transformers
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "head_dim": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "mistral": {}, "gemma": {},
    "nanochat": {},  # turns backwards
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **MODELS[name]})).eval()


def launches() -> int:
    return sum(ropewalk.counters().values())


def step(model: Any, ids: Any) -> tuple[Any, Any]:
    model.zero_grad()
    logits = model(ids).logits
    (logits * logits.detach()).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(got: Any, want: Any) -> float:
    return float((got - want).norm() / want.norm())


def main() -> None:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {"patched": {}, "slot": {}}
    for name in ("llama", "qwen3"):  # functions are modules of `kernels` now
        model = model_of(name)
        with torch.no_grad():
            want = model(ids).logits
            with ropewalk.transformers.patch(model) as patch:
                found["patched"][name] = {"layers": patch.layers, "apart": apart(model(ids).logits, want)}
    ropewalk.transformers.use_kernels()
    for name in MODELS:
        model = model_of(name)
        want = step(model, ids)
        model.set_use_kernels(True)
        model(ids)  # which tries what the stock function does
        before = launches()
        got = step(model, ids)
        found["slot"][name] = {
            "launches": launches() - before, "logits": apart(got[0], want[0]), "gradients": apart(got[1], want[1]),
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
