"""torch: compiling, views, inference mode, threads."""

# SPDX-License-Identifier: Apache-2.0
import gc

import pytest
import ropewalk
import torch

F = ropewalk.Frequencies(theta=1e4, rotary_dim=64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_in_place(backend):
    def step(q, k, positions):
        q = q * 2
        ropewalk.rope_(q, k, positions=positions, frequencies=F, pairing="interleaved")
        return q + 1

    q, k, positions = draw(5, 4, 64), draw(5, 2, 64, seed=1), torch.arange(5)
    k_eager = k.clone()
    want = step(q.clone(), k_eager, positions)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(q.clone(), k, positions), want)
    assert torch.equal(k, k_eager)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_out_of_place_with_norm_and_store(backend):
    weight, table = torch.linspace(0.5, 1.5, 64), F.table(16, torch.float32)
    slots = torch.tensor([3, 0, -1, 7, 5])

    def step(q, k, v, k_cache, v_cache):
        return ropewalk.rope(q, k, cos=table[0], sin=table[1], q_weight=weight, k_weight=weight, eps=1e-5, v=v,
                             k_cache=k_cache, v_cache=v_cache, slots=slots, k_scale=0.5)  # fmt: skip

    q, k, v = draw(5, 4, 64), draw(5, 2, 64, seed=1), draw(5, 2, 64, seed=2)
    caches = [torch.zeros(8, 2, 64).to(torch.float8_e4m3fn) for _ in range(4)]
    want = step(q, k, v, *caches[:2])
    before = q.clone()
    got = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, *caches[2:])
    assert torch.equal(q, before)
    for x, y in zip((*got, *caches[2:]), (*want, *caches[:2]), strict=True):
        assert torch.equal(x.float(), y.float())


@torch.no_grad()
@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_k_store_only(function, backend):
    slots = torch.tensor([3, 0, -1, 7, 5])

    def step(q, k, k_cache):
        new_q, none = function(q * 2, k, frequencies=F, k_cache=k_cache, slots=slots, k_store_only=True)
        assert none is None
        return new_q

    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    caches = [torch.zeros(8, 2, 64) for _ in range(2)]
    want, k_before = step(q, k, caches[0]), k.clone()
    got = torch.compile(step, fullgraph=True, backend=backend)(q, k, caches[1])
    assert torch.equal(got, want) and torch.equal(k, k_before) and torch.equal(*caches)
    assert caches[0][[3, 0, 7, 5]].abs().sum() > 0


@torch.no_grad()
def test_compile_notices_other_frequencies():
    other = ropewalk.Frequencies(theta=1e6, rotary_dim=64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, f):
        return ropewalk.rope(q, frequencies=f)[0]

    q = draw(5, 4, 64)
    for f in (F, other, F):
        assert torch.equal(step(q, f), ropewalk.rope(q, frequencies=f)[0])


def test_a_graph_outlives_its_frequencies():
    f = ropewalk.Frequencies(theta=3e4, rotary_dim=64)
    content, q = f._content, draw(2, 1, 64)
    want = ropewalk.rope(q, frequencies=f)[0]
    del f
    gc.collect()
    torch.ops.ropewalk.rope_(q, frequencies=content)
    assert torch.equal(q, want)


@torch.no_grad()
def test_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(q):
        return ropewalk.rope(q, frequencies=F)[0]

    for tokens in (3, 4, 9):
        q = draw(tokens, 4, 64)
        assert torch.equal(step(q), ropewalk.rope(q, frequencies=F)[0])


def test_operator_is_registered_well():
    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    torch.library.opcheck(torch.ops.ropewalk.rope_.default, (q, k), {"frequencies": F._content})
    out = torch.empty_like(q)
    torch.library.opcheck(torch.ops.ropewalk.rope_out.default, (q,), {"frequencies": F._content, "q_out": out})


def test_errors_cross_the_operator():
    with pytest.raises(ValueError, match="k has 4 tokens, but q has 5"):
        torch.ops.ropewalk.rope_(draw(5, 4, 64), draw(4, 2, 64), frequencies=F._content)


def test_inference_mode_and_parameters():
    weight = torch.nn.Parameter(torch.ones(64))
    with torch.inference_mode():
        q = draw(5, 4, 64)
        ropewalk.rope_(q, frequencies=F, q_weight=weight)
    with torch.no_grad():
        other = draw(5, 4, 64)
        ropewalk.rope_(other, frequencies=F, q_weight=weight)
        assert torch.equal(q, other)
        leaf = torch.nn.Parameter(draw(5, 4, 64))
        ropewalk.rope_(leaf, frequencies=F)
    with pytest.raises(ValueError, match="q requires grad"):
        ropewalk.rope_(leaf, frequencies=F)


def test_views():
    base = draw(3, 8, 7, 130)
    view = base[::2, 1::3, :, 1:65].permute(0, 2, 1, 3)  # [2, 7, 3, 64], every stride odd
    want = ropewalk.rope(view.contiguous(), frequencies=F)[0]
    before = base.clone()
    ropewalk.rope_(view, frequencies=F)
    assert torch.equal(view, want)
    mask = torch.zeros_like(base, dtype=torch.bool)
    mask[::2, 1::3, :, 1:65] = True
    assert torch.equal(base[~mask], before[~mask])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_torch(threads):
    q = draw(3000, 8, 64)
    want = torch.cat([ropewalk.rope(q[i : i + 1], positions=torch.tensor([i]), frequencies=F)[0] for i in range(3000)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ropewalk.rope(q, frequencies=F)[0], want)
    finally:
        torch.set_num_threads(before)


def test_own_pool():
    q = draw(3000, 8, 64)
    want = ropewalk.rope(q, frequencies=F)[0]
    try:
        for threads in (1, 2, 3):
            ropewalk.set_threads(threads)
            assert torch.equal(ropewalk.rope(q, frequencies=F)[0], want)
    finally:
        ropewalk.set_threads(None)
