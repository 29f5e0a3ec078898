"""Ropewalk's overrides of torchtitan's rotary embeddings, against torchtitan's own: of torchtitan itself where it is
installed, else of what stands in for it."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import importlib.metadata
import importlib.util
import logging
import sys

import pytest
import ropewalk
import torch
import torchtitan_stand_in as stand_in

CLOSE = {torch.float32: 1e-6, torch.bfloat16: 0.0}  # to the largest element; bfloat16 rounds once there, too
OURS = "ropewalk.torchtitan"


@pytest.fixture
def titan(monkeypatch):
    """`ropewalk.torchtitan`, with torchtitan or what stands in for it."""
    if importlib.util.find_spec("torchtitan") is None:
        # torch looks once whether spmd_types is there: what stands in for it is not for torch.
        getattr(torch.distributed, "_is_spmd_types_available", bool)()
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        of_others = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version",
                            lambda name: stand_in.VERSION if name == "torchtitan" else of_others(name))  # fmt: skip
        monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield importlib.import_module(OURS)
    if "torchtitan" in sys.modules and not hasattr(sys.modules["torchtitan"], "__file__"):
        sys.modules.pop(OURS, None)
        vars(ropewalk).pop("torchtitan", None)


def build(config):
    owner = getattr(config, "build", None)
    if owner:
        return owner()
    return next(cls for cls in subclasses(stand_in.RoPE) if cls.__dict__.get("Config") is type(config))(config)


def subclasses(cls):
    return [cls, *(x for each in cls.__subclasses__() for x in subclasses(each))]


def both(titan, name):
    """Theirs, and ours by the override."""
    theirs = {"cos_sin": titan.CosSinRoPE, "complex": titan.ComplexRoPE}[name]
    config = theirs.Config(dim=16, max_seq_len=32, theta=1000.0)
    derived = getattr(titan, name)(config)
    assert type(derived).__qualname__.startswith("Ropewalk") and derived.dim == 16 and derived.theta == 1000.0
    return build(config), build(derived)


def drawn(dtype, heads=(4, 2)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((2, 6, n, 16), generator=generator).to(dtype).requires_grad_() for n in heads]


POSITIONS = {
    "none": None,
    "one row": torch.tensor([[5, 0, 31, 2, 2, 7]]),
    "a row each": torch.tensor([[5, 0, 31, 2, 2, 7], [0, 1, 2, 0, 1, 2]]),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cos_sin", "complex"])
def test_as_torchtitan_forward_and_backward(titan, name, dtype, positions):
    theirs, ours = both(titan, name)
    q, k = drawn(dtype)
    gradients = [x.detach() for x in drawn(dtype)]
    want = theirs(q, k, POSITIONS[positions])
    want += torch.autograd.grad(want, (q, k), gradients)
    before = sum(ropewalk.counters().values())
    got = ours(q, k, POSITIONS[positions])
    got += torch.autograd.grad(got, (q, k), gradients)
    assert sum(ropewalk.counters().values()) == before + 2
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and (x - y).abs().max() <= CLOSE[dtype] * y.abs().max()


@pytest.mark.parametrize("name", ["cos_sin", "complex"])
def test_compiles_to_one_graph(titan, name):
    theirs, ours = both(titan, name)
    q, k = drawn(torch.float32)
    want = theirs(q, k)
    want += torch.autograd.grad(want[0].sum() + want[1].square().sum(), (q, k))
    torch._dynamo.reset()
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(q, k)
    got += torch.autograd.grad(got[0].sum() + got[1].square().sum(), (q, k))
    torch._dynamo.reset()
    assert all((x - y).abs().max() <= 2e-6 * y.abs().max() for x, y in zip(got, want, strict=True))


def test_shards_by_heads_and_batch_are_rotated_where_they_lie(titan, tmp_path, caplog):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    theirs, ours = both(titan, "cos_sin")
    q, k = drawn(torch.float32)
    positions = POSITIONS["a row each"]
    want = theirs(q, k, positions)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            shards = [DTensor.from_local(x.detach(), mesh, [placement]).requires_grad_() for x in (q, k)]
            before = sum(ropewalk.counters().values())
            got = ours(*shards, positions)
            assert sum(ropewalk.counters().values()) == before + 1
            for x, y in zip(got, want, strict=True):
                assert x.placements == (placement,) and (x.full_tensor() - y).abs().max() <= 1e-6 * y.abs().max()
            gradients = torch.autograd.grad(got[0].sum() + got[1].sum(), shards)
            assert all(x.placements == (placement,) for x in gradients)
        # Which tokens a shard has, its positions say; without them it is torchtitan's to say.
        shards = [DTensor.from_local(x.detach(), mesh, [Shard(1)]) for x in (q, k)]
        with caplog.at_level(logging.WARNING, "ropewalk"):
            assert titan._rotate(*shards, None, ours.cache[:, :8], ours.cache[:, 16:24], "neox") is None
        assert "ropewalk in torchtitan: a query with the placements (Shard(dim=1),) stays stock" in caplog.text
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_not_served_goes_the_stock_way_and_is_said_once(titan, caplog):
    theirs, ours = both(titan, "cos_sin")
    q, k = drawn(torch.float64)
    titan._said.clear()
    with caplog.at_level(logging.WARNING, "ropewalk"):
        for _ in range(2):
            assert all(torch.equal(x, y) for x, y in zip(ours(q, k), theirs(q, k), strict=True))
    said = [record.message for record in caplog.records if record.name == "ropewalk"]
    assert said == [
        "ropewalk in torchtitan: rope: q must be float32, float16 or bfloat16, but is float64; it stays stock"
    ]


def test_another_version_stays_stock(titan, monkeypatch, caplog):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.0")
    titan._said.clear()
    config = titan.CosSinRoPE.Config(dim=16, max_seq_len=32)
    with caplog.at_level(logging.WARNING, "ropewalk"):
        assert titan.cos_sin(config) is config
    words = "torchtitan must be 0.3.0, but is 0.4.0: everything stays stock"
    assert [r.message for r in caplog.records] == [f"ropewalk in torchtitan: {words}"]


def test_the_overrides_are_those_that_the_documents_name(titan):
    registry = (
        sys.modules["torchtitan.config.override"]._REGISTRY
        if hasattr(sys.modules["torchtitan.config.override"], "_REGISTRY")
        else stand_in.REGISTRY
    )
    of_cos_sin, of_complex = registry[f"{OURS}.cos_sin"], registry[f"{OURS}.complex"]
    assert of_cos_sin.target_cls is titan.CosSinRoPE.Config and of_complex.target_cls is titan.ComplexRoPE.Config
    assert of_cos_sin.exact and of_complex.exact  # those derived from them have other tables
