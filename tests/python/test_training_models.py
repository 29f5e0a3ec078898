"""Patched models in the ways in which models are trained: autocast, adapters beside frozen weights, checkpoints,
accumulated gradients, data parallel (DDP) and fully sharded (FSDP2) in two processes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import ropewalk  # noqa: E402
import ropewalk.transformers  # noqa: E402

RANKS = 2
LAYERS = 2
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None}  # fmt: skip


CALLS = {"qwen3": 1, "olmo2": 3}  # of a layer: norms over all heads are calls of their own


def tiny(kind: str = "qwen3") -> Any:
    """A small model, in whose norms the weights are not all 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY)).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight += 0.2 * torch.randn_like(weight)
    return model


def batches(count: int = RANKS) -> Any:
    return torch.randint(2, 64, (count, 2, 12), generator=torch.Generator().manual_seed(1))


def launches() -> int:
    return sum(ropewalk.counters().values())


def gradients(model: Any, *of: Any) -> dict[str, Any]:
    """Those of the sum of the losses of the batches, one behind the other."""
    model.zero_grad()
    for batch in of:
        model(batch, labels=batch).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def distance(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest distance of a parameter's gradient, as a part of it."""
    assert got.keys() == want.keys()
    return max(((got[name].double() - x.double()).norm() / x.double().norm()).item() for name, x in want.items())


def equal(got: dict[str, Any], want: dict[str, Any]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("kind", CALLS)
def test_autocast_of_float32_weights(kind: str) -> None:
    """Activations in bfloat16: no further from float32 than the stock model."""
    model, batch = tiny(kind), batches()[0]
    exact = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        stock = gradients(model, batch)
        with ropewalk.transformers.patch(model):
            before = launches()
            patched = gradients(model, batch)
            assert launches() - before == 2 * CALLS[kind] * LAYERS
    assert all(x.dtype == torch.float32 for x in patched.values())
    ours, theirs = distance(patched, exact), distance(stock, exact)
    print(f"autocast: stock {theirs:.4f}, patched {ours:.4f}")
    assert 0 < ours <= 1.2 * theirs


class Adapted(torch.nn.Module):
    """A frozen layer, and beside it a product of two narrow matrices that are trained."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Parameter(torch.randn(4, layer.in_features) / 8)
        self.up = torch.nn.Parameter(torch.randn(layer.out_features, 4) / 8)

    def forward(self, x: Any) -> Any:
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("patched_first", [True, False])
def test_adapters_beside_frozen_weights(patched_first: bool) -> None:
    def adapted(patched: bool) -> tuple[Any, Any]:
        model = tiny().requires_grad_(False)
        patch = ropewalk.transformers.patch(model) if patched and patched_first else None
        torch.manual_seed(5)
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj"):
                setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
        return model, patch or (ropewalk.transformers.patch(model) if patched else None)

    (stock, _), (model, patch) = adapted(False), adapted(True)
    batch = batches()[0]
    before = launches()
    got, want = gradients(model, batch), gradients(stock, batch)
    assert launches() - before == 2 * LAYERS
    assert len(got) == 2 * 2 * LAYERS  # nothing that is frozen
    assert distance(got, want) <= 1e-5
    patch.unpatch()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_activation_checkpoints(kind: str, reentrant: bool) -> None:
    model, batch = tiny(kind), batches()[0]
    stock = gradients(model, batch)
    with ropewalk.transformers.patch(model):
        want = gradients(model, batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        before = launches()
        got = gradients(model, batch)
        assert launches() - before == 3 * CALLS[kind] * LAYERS  # forward, and again in backward
    assert equal(got, want)
    assert distance(got, stock) <= 1e-5


def test_accumulated_gradients() -> None:
    model, (first, second) = tiny(), batches()
    stock = gradients(model, first, second)
    with ropewalk.transformers.patch(model):
        got = gradients(model, first, second)
        alone = [gradients(model, batch) for batch in (first, second)]
    assert equal(got, {name: x + alone[1][name] for name, x in alone[0].items()})
    assert distance(got, stock) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# What each of two processes does


def mean_of_all() -> dict[str, Any]:
    """What one process makes of the batches of all ranks."""
    model = tiny()
    with ropewalk.transformers.patch(model):
        alone = [gradients(model, batch) for batch in batches()]
    return {name: sum(each[name] for each in alone) / RANKS for name in alone[0]}


def check_ddp(rank: int) -> None:
    model = tiny()
    ropewalk.transformers.patch(model)
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    got = gradients(parallel, batches()[rank])
    assert equal({name.removeprefix("module."): x for name, x in got.items()}, mean_of_all())


def check_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = tiny()
    ropewalk.transformers.patch(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = launches()
    got = {name: x.full_tensor() for name, x in gradients(model, batches()[rank]).items()}
    assert launches() - before == 2 * LAYERS
    assert equal(got, mean_of_all())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(batches()[rank], labels=batches()[rank]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


CHECKS = {"ddp": check_ddp, "fsdp": check_fsdp}


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What both ranks said: one pair of processes for all checks, as importing torch is most of the time."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, __file__], env={**base, "RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        return [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(said: list[str], name: str) -> None:
    for output in said:
        assert f"held: {name}\n" in output, output


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, check in CHECKS.items():
        check(torch.distributed.get_rank())
        print(f"held: {name}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
