"""The functions that SGLang calls with a table, and those of its kernels for Intel GPUs: against a rotation in torch's
float32 on the CPU, as their own tests do it, but with the tolerance of one unit in the last place."""

# SPDX-License-Identifier: Apache-2.0
import inspect
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import ropewalk
import torch
from ropewalk.compat import sgl_kernel, sgl_kernel_xpu, sglang_jit
from test_compat import DEVICES, DTYPES, GOOD, draw, formula, table, turned

fused = sgl_kernel.fused_qk_rope_with_cos_sin_cache_inplace
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def rotated(x, cache, positions, is_neox, rope_dim, products=False):
    """x [tokens, heads, head_dim], rotated in float32 and rounded once; or, with products, in the dtype of x and cache,
    so that torch rounds each product too."""
    x = x.cpu()
    calculated = x.dtype if products else torch.float32
    cos, sin = cache.cpu().to(calculated)[positions.cpu().long().flatten()].unsqueeze(1).chunk(2, -1)
    part = turned(x[..., :rope_dim].to(calculated), cos, sin, is_neox)
    return torch.cat([part.to(x.dtype), x[..., rope_dim:]], -1)


def same(got, want):
    """Within one unit in the last place, or of float32 where the two products cancel."""
    torch.testing.assert_close(got.cpu(), want, rtol=UNIT[want.dtype], atol=2e-6)


class Fenced:
    """A view in the middle of a larger tensor, whose other elements must stay as they are."""

    def __init__(self, *shape, dtype, device, seed=0, head_dim=None):
        tokens, heads, width = shape
        self.whole = draw(tokens + 2, heads + 2, (head_dim or width) + 16, dtype=dtype, device=device, seed=seed)
        self.before = self.whole.clone()
        self.view = self.whole[1:-1, 1:-1, 8 : 8 + width]

    def untouched(self):
        inside = torch.zeros_like(self.whole, dtype=torch.bool)
        inside[1:-1, 1:-1, 8 : 8 + self.view.shape[-1]] = True
        return torch.equal(self.whole[~inside], self.before[~inside])


@pytest.mark.parametrize("cache_like_q", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rope_dim", [64, 128, 256, 512, 2, 6, 72, 80, 96, 192])
@pytest.mark.parametrize("tokens, kv_heads, ratio", [(1, 1, 1), (7, 4, 8), (129, 1, 8), (33, 3, 1)])
def test_fused_qk_rope(device, tokens, kv_heads, ratio, rope_dim, is_neox, dtype, cache_like_q):
    cache = table(512, rope_dim, device, dtype if cache_like_q else torch.float32)
    positions = torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device)
    for position_dtype in (torch.int32, torch.int64):
        q = Fenced(tokens, kv_heads * ratio, rope_dim, dtype=dtype, device=device, head_dim=rope_dim + 32)
        k = Fenced(tokens, kv_heads, rope_dim, dtype=dtype, device=device, seed=1, head_dim=rope_dim + 32)
        want = [rotated(x.view, cache, positions, is_neox, rope_dim) for x in (q, k)]
        assert fused(q.view, k.view, cache, positions.to(position_dtype), rope_dim, is_neox) is None
        for x, value in zip((q, k), want, strict=True):
            same(x.view, value)
            assert x.untouched()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("head_dim, rope_dim", [(128, 64), (256, 64), (576, 64), (96, 32), (80, 20)])
def test_partial_heads_and_their_slices(device, head_dim, rope_dim, is_neox):
    cache, positions = table(64, rope_dim, device), torch.tensor([63, 0, 7], device=device)
    results = []
    for width in (head_dim, rope_dim):
        q = draw(3, 4, head_dim, dtype=torch.bfloat16, device=device)
        k = draw(3, 1, head_dim, dtype=torch.bfloat16, device=device, seed=1)
        want = [rotated(x, cache, positions, is_neox, rope_dim) for x in (q, k)]
        fused(q[..., :width], k[..., :width], cache, positions, rope_dim, is_neox)
        for x, value in zip((q, k), want, strict=True):
            same(x, value)
            assert torch.equal(x[..., rope_dim:].cpu(), value[..., rope_dim:])
        results.append((q, k))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_of_packed_rows(device):
    """q and k as SGLang hands them over: views of one packed row, by keyword; v stays."""
    cache, positions = table(64, 128, device), torch.tensor([63, 0, 7, 7, 9], device=device)
    row = draw(5, (8 + 2 + 2) * 128, dtype=torch.bfloat16, device=device)
    q, k, v = (x.unflatten(-1, (-1, 128)) for x in row.split([8 * 128, 2 * 128, 2 * 128], -1))
    want = [rotated(x, cache, positions, True, 128) for x in (q, k)]
    old_v = v.clone()
    fused(q=q, k=k, cos_sin_cache=cache, positions=positions, rope_dim=128, is_neox=True)
    same(q, want[0])
    same(k, want[1])
    assert torch.equal(v, old_v)


def test_no_tokens_no_key_one_head(device):
    cache = table(8, 64, device)
    none = torch.empty(0, 4, 64, device=device)
    fused(none, none.clone(), cache, torch.empty(0, dtype=torch.int64, device=device), 64, True)
    q, positions = draw(3, 1, 64, device=device), torch.tensor([1, 2, 3], device=device)
    want = rotated(q, cache, positions, False, 64)
    fused(q, None, cache, positions, 64, False)
    same(q, want)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"q": torch.ones(5, 2 * 64)}, r"q must be \[tokens, heads, head_dim\], but is \[5, 128\]"),
        ({"q": torch.ones(1, 5, 2, 64)}, r"q must be \[tokens, heads, head_dim\]"),
        ({"q": [1.0]}, "q must be a torch.Tensor, but is a list"),
        ({"k": torch.ones(4, 2, 64)}, "k has 4 tokens, but q has 5|positions has 5 tokens, but k has 4"),
        ({"k": torch.ones(5, 2, 64, dtype=torch.float64)}, "k must be float32, float16 or bfloat16, but is float64"),
        ({"q": torch.ones(5, 2, 128)[..., ::2]}, "q must be contiguous in its last dimension"),
        ({"positions": torch.arange(4)}, "positions has 4 tokens, but q has 5"),
        ({"positions": torch.arange(5).float()}, "positions must be int32 or int64, but is float32"),
        ({"positions": torch.arange(5, dtype=torch.int16)}, "positions must be int32 or int64, but is int16"),
        ({"positions": torch.zeros(5, 1, dtype=torch.int64)}, r"positions must be .*tokens\]"),
        ({"positions": None}, "positions must be a torch.Tensor, but is a NoneType"),
        ({"cos_sin_cache": None}, "cos_sin_cache must be a torch.Tensor, but is a NoneType"),
        ({"cos_sin_cache": torch.ones(8, 64).double()}, "cos_sin_cache must be float32, float16 or bfloat16"),
        ({"cos_sin_cache": torch.ones(8, 32)}, "cos_sin_cache must be 64 wide for rope_dim 64, but is 32 wide"),
        ({"cos_sin_cache": torch.ones(64)}, "cos_sin_cache must be"),
        ({"rope_dim": 0}, "rope_dim must be at least 2, but is 0"),
        ({"rope_dim": 63}, "rope_dim must be even, but is 63"),
        ({"rope_dim": 32}, "cos_sin_cache must be 32 wide for rope_dim 32, but is 64 wide"),
        ({"rope_dim": 64.0}, "rope_dim must be an int, but is a float"),
        ({"rope_dim": 128, "cos_sin_cache": torch.ones(8, 128)}, "rope_dim must be at most head_dim 64, but is 128"),
    ],
)
def test_fused_qk_rope_refuses(change, match):
    arguments = {"q": torch.ones(5, 2, 64), "k": torch.ones(5, 1, 64), "cos_sin_cache": table(8, 64, "cpu"),
                 "positions": torch.arange(5), "rope_dim": 64, "is_neox": True, **change}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"^fused_qk_rope_with_cos_sin_cache_inplace: ({match})"):
        fused(**arguments)
    assert all((x == 1).all() for x in (arguments["q"], arguments["k"]) if isinstance(x, torch.Tensor))


def layouts(tokens, heads, head_size):
    """The shapes of positions and of query for the same elements."""
    batch = 3
    return {
        "flat": ((tokens,), (tokens, heads * head_size)),
        "heads": ((tokens,), (tokens, heads, head_size)),
        "batch flat": ((batch, tokens // batch), (batch, tokens // batch, heads * head_size)),
        "batch heads": ((batch, tokens // batch), (batch, tokens // batch, heads, head_size)),
        "positions in batches, flat": ((batch, tokens // batch), (tokens, heads * head_size)),
        "positions in batches, heads": ((batch, tokens // batch), (tokens, heads, head_size)),
    }


@pytest.mark.parametrize("layout", layouts(6, 1, 64))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "head_size, rotary_dim, heads",
    [(64, 64, (1, 1)), (256, 128, (4, 2)), (512, 128, (4, 2)), (128, 128, (32, 8)), (80, 80, (3, 3)), (96, 24, (2, 1))],
)
def test_rotary_embedding(device, head_size, rotary_dim, heads, is_neox, dtype, layout):
    tokens = 6
    positions = torch.tensor([311, 0, 5, 5, 17, 100], device=device)
    for cache_dtype, position_dtype in ((torch.float32, torch.int64), (dtype, torch.int32)):
        cache = table(312, rotary_dim, device, cache_dtype)

        def fresh():
            shapes = [layouts(tokens, n, head_size)[layout][1] for n in heads]
            return [draw(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]

        places = positions.to(position_dtype).view(layouts(tokens, 1, head_size)[layout][0])
        query, key = fresh()
        products = cache_dtype == dtype != torch.float32
        want, want_new = (
            [
                rotated(x.view(tokens, n, head_size), cache, positions, is_neox, rotary_dim, each).view(x.shape)
                for x, n in zip((query, key), heads, strict=True)
            ]
            for each in (products, False)
        )
        arguments = head_size, cache, is_neox
        new = sgl_kernel_xpu.rotary_embedding(places, query, key, *arguments)  # leaves its arguments alone
        assert all(torch.equal(x, y) for x, y in zip((query, key), fresh(), strict=True))
        assert sgl_kernel.rotary_embedding(places, query, key, *arguments) is None
        given = fresh()
        back = sglang_jit.rotary_embedding(places, *given, *arguments)
        assert back[0] is given[0] and back[1] is given[1]
        for got, values in (((query, key), want), (back, want), (new, want_new)):
            for x, value in zip(got, values, strict=True):
                assert x.shape == value.shape and x.dtype == dtype
                same(x, value)
                assert not (products and values is want) or torch.equal(x.cpu(), value)
        alone = fresh()[0]
        again = sgl_kernel_xpu.rotary_embedding(places, alone, None, *arguments)
        assert again[1] is None
        assert torch.equal(alone, fresh()[0]) and torch.equal(again[0], new[0])
        assert sgl_kernel.rotary_embedding(places, alone, None, *arguments) is None
        assert torch.equal(alone, query)


def test_default_pairing():
    for module in (sgl_kernel, sglang_jit):
        assert inspect.signature(module.rotary_embedding).parameters["is_neox"].default is True
    assert inspect.signature(sgl_kernel_xpu.rotary_embedding).parameters["is_neox"].default is inspect.Parameter.empty
    for module in (sgl_kernel, sgl_kernel_xpu, sglang_jit):
        names = list(inspect.signature(module.rotary_embedding).parameters)
        assert names == ["positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"]
    names = list(inspect.signature(fused).parameters)
    assert names == ["q", "k", "cos_sin_cache", "positions", "rope_dim", "is_neox"]


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotated_part_of_latent_attention(device, is_neox):
    """DeepSeek: 64 elements behind 128 in q, and behind 512 in the one head of k; scaled cosines, a bfloat16 table."""
    cache = (table(256, 64, device) * 0.7).to(torch.bfloat16)
    positions = torch.randint(0, 256, (37,), generator=torch.Generator().manual_seed(0)).to(device)
    q, k = (draw(37, n, d, dtype=torch.bfloat16, device=device, seed=d) for n, d in ((16, 192), (1, 576)))
    before = q.clone(), k.clone()
    want, products = (
        [rotated(x, cache, positions, is_neox, 64, each) for x in (q[..., 128:], k[..., 512:])]
        for each in (False, True)
    )
    new = sgl_kernel_xpu.rotary_embedding(positions, q[..., 128:], k[..., 512:], 64, cache, is_neox)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    sgl_kernel.rotary_embedding(positions, q[..., 128:], k[..., 512:], 64, cache, is_neox)
    for x, value in zip(new, want, strict=True):
        same(x, value)
    for x, value in zip((q[..., 128:], k[..., 512:]), products, strict=True):
        assert torch.equal(x.cpu(), value)
    assert torch.equal(q[..., :128], before[0][..., :128]) and torch.equal(k[..., :512], before[1][..., :512])


@pytest.mark.parametrize(
    "change, match",
    [
        ({"query": torch.ones(5, 100)}, r"query must be \[5, heads \* 64\] or \[5, heads, 64\].*\[5, 100\]"),
        ({"query": torch.ones(5, 2, 32)}, r"query must be .*\[5, 2, 32\]"),
        ({"query": torch.ones(4, 128)}, r"query must be .*\[4, 128\]"),
        ({"query": None}, "query must be a torch.Tensor, but is a NoneType"),
        ({"key": torch.ones(4, 64)}, r"key must be .*\[4, 64\]"),
        ({"key": torch.ones(5, 64, dtype=torch.int32)}, "key must be float32, float16 or bfloat16, but is int32"),
        ({"key": "key"}, "key must be a torch.Tensor, but is a str"),
        ({"head_size": 0}, "head_size must be at least 2, but is 0"),
        ({"head_size": "64"}, "head_size must be an int, but is a str"),
        ({"positions": torch.arange(5).float()}, "positions must be int32 or int64, but is float32"),
        ({"positions": torch.tensor(3)}, r"query must be"),
        ({"positions": None}, "positions must be a torch.Tensor, but is a NoneType"),
        ({"cos_sin_cache": torch.ones(8, 128)}, "rotary_dim must be at most head_size 64, but is 128"),
        ({"cos_sin_cache": torch.ones(8, 63)}, "cos_sin_cache must be even, but is 63 wide"),
        ({"cos_sin_cache": torch.ones(8, 64).long()}, "cos_sin_cache must be float32, float16 or bfloat16"),
    ],
)
@pytest.mark.parametrize("module", [sgl_kernel, sglang_jit, sgl_kernel_xpu])
def test_rotary_embedding_refuses(module, change, match):
    arguments = {"positions": torch.arange(5), "query": torch.ones(5, 128), "key": torch.ones(5, 64), "head_size": 64,
                 "cos_sin_cache": table(8, 64, "cpu"), "is_neox": True, **change}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"^rotary_embedding: ({match})"):
        module.rotary_embedding(**arguments)
    assert all((x == 1).all() for x in (arguments["query"], arguments["key"]) if isinstance(x, torch.Tensor))


class Layer:
    """As much of SGLang's RotaryEmbedding as its forward looks at."""

    def __init__(self, head_size, rotary_dim, cache, is_neox_style):
        self.head_size, self.rotary_dim = head_size, rotary_dim
        self.cos_sin_cache, self.is_neox_style = cache, is_neox_style

    forward = sgl_kernel_xpu.forward_xpu


@pytest.mark.parametrize("offset_dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("head_size, rotary_dim", [(128, 128), (256, 64), (512, 512), (64, 64), (80, 32)])
@pytest.mark.parametrize("flat", [True, False])
def test_forward(device, head_size, rotary_dim, is_neox, offset_dtype, flat):
    cache = table(64, rotary_dim, device)
    layer = Layer(head_size, rotary_dim, cache, is_neox)
    positions = torch.tensor([5, 0, 7, 31], device=device)
    offsets = torch.tensor([0, 32, 3, 32], device=device)
    together = positions + offsets if offset_dtype else positions
    query, key = (draw(4, n, head_size, dtype=torch.bfloat16, device=device, seed=n) for n in (4, 2))
    want = [rotated(x, cache, together, is_neox, rotary_dim) for x in (query, key)]
    given = [x.flatten(1) if flat else x for x in (query, key)]
    got = layer.forward(positions, *given, offsets.to(offset_dtype) if offset_dtype else None)
    assert got[0] is given[0] and got[1] is given[1]
    for x, value in zip(got, want, strict=True):
        same(x.view(value.shape), value)
    assert torch.equal(positions.cpu(), torch.tensor([5, 0, 7, 31]))


def test_forward_fills_the_buffers(device):
    layer = Layer(64, 64, table(64, 64, device), True)
    positions, offsets = torch.tensor([5, 0, 7], device=device), torch.tensor([1, 0, 2], device=device)
    query, key, value = (draw(3, 128, device=device, seed=seed) for seed in range(3))
    slots = torch.tensor([4, -1, 0], device=device)
    buffers = [torch.zeros(6, 128, device=device) for _ in range(2)]
    stored = sgl_kernel.FusedSetKVBufferArg(value, *buffers, None, None, slots)
    want = rotated(key.view(3, 2, 64), layer.cos_sin_cache, positions + offsets, True, 64)
    layer.forward(positions, query, key, offsets, stored)
    same(key.view(3, 2, 64), want)
    expected = [torch.zeros(6, 128, device=device) for _ in range(2)]
    for row, source in ((4, 0), (0, 2)):
        expected[0][row], expected[1][row] = key[source], value[source]
    assert all(torch.equal(x, y) for x, y in zip(buffers, expected, strict=True))
    with pytest.raises(ValueError, match="forward_xpu: key must be given where it is stored"):
        layer.forward(positions, query, None, None, stored)
    with pytest.raises(ValueError, match="forward_xpu: offsets has 2 tokens, but query has 3"):
        layer.forward(positions, query, key, offsets[:2])
    with pytest.raises(ValueError, match="forward_xpu: cos_sin_cache must be 32 wide for rotary_dim 32"):
        Layer(64, 32, layer.cos_sin_cache, True).forward(positions, query, key)


def test_order_of_the_buffers():
    t = [torch.zeros(1) for _ in range(4)]
    got = sgl_kernel.FusedSetKVBufferArg(t[0], t[1], t[2], 0.5, 0.25, t[3])
    assert (got.k_scale, got.v_scale, got.cache_loc) == (0.5, 0.25, t[3])
    assert sgl_kernel.FusedSetKVBufferArg(value=t[0], k_buffer=t[1], v_buffer=t[2], cache_loc=t[3]).k_scale is None
    assert sglang_jit.FusedSetKVBufferArg(*t).cache_loc is t[3]


def test_position_past_the_table(device):
    q, cache = torch.ones(3, 1, 64, device=device), table(8, 64, device)
    fused(q, None, cache, torch.tensor([1, 8, 2], device=device), 64, True)
    with pytest.raises(RuntimeError, match=r"positions\[1\] is 8"):
        ropewalk.check_faults()
    assert q[1].isnan().all() and not q[[0, 2]].isnan().any()


def intel_frequencies(base, rotary_dim, factor, low, high):
    """The other ramp, once more."""
    f = formula(base, rotary_dim)
    high = high + 0.001 if abs(high - low) <= 1e-6 else high
    r = np.clip((2.0 * np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    return f / factor * (1.0 - r) + f * r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "head_dim, rotary_dim", [(64, None), (128, 32), (128, None), (256, 64), (512, None), (80, None), (10, 4)]
)
@pytest.mark.parametrize("yarn", [(), (2.0, 8.0, 1024.0, 0.707), (4.0, 5.0, 20.0, 1.2), (2.0, 3.0, 3.0), (0.5,)])
def test_norm_rope_of_intel(device, dtype, is_neox, head_dim, rotary_dim, yarn):
    heads, positions = (4, 2, 2), torch.tensor([0, 1, 31, 127, 131_071], dtype=torch.int32)
    qkv = draw(5, sum(heads) * head_dim, dtype=dtype, device=device)
    before = qkv.clone()
    weights = [draw(head_dim, dtype=dtype, device=device, seed=s) for s in (1, 2)]
    factor, low, high, attention_factor = (*yarn, *(1.0, 1.0, 1.0, 1.0)[len(yarn) :])
    rotary = rotary_dim or head_dim
    frequencies = intel_frequencies(1e4, rotary, factor, low, high) if factor != 1.0 else formula(1e4, rotary)
    angles = oracle.exact_angles(frequencies, positions)
    parts = qkv.split([n * head_dim for n in heads], 1)
    want = [
        oracle.rope(x.cpu().unflatten(1, (-1, head_dim)), angles, "neox" if is_neox else "interleaved", norm=True,
                    weight=w.cpu(), eps=1e-6, scaling=attention_factor)
        for x, w in zip(parts[:2], weights, strict=True)
    ]  # fmt: skip
    names = list(inspect.signature(sgl_kernel_xpu.fused_qk_norm_rope).parameters)
    values = (qkv, *heads, head_dim, 1e-6, *weights, 1e4, is_neox, positions.to(device), *yarn)
    if is_neox:
        sgl_kernel_xpu.fused_qk_norm_rope(*values, **({"rotary_dim": rotary_dim} if rotary_dim else {}))
    else:
        sgl_kernel_xpu.fused_qk_norm_rope(**dict(zip(names, values, strict=False)), rotary_dim=rotary_dim)
    for x, (value, length) in zip(parts, want, strict=False):
        oracle.assert_close(x.cpu().unflatten(1, (-1, head_dim)), value, length)
    assert torch.equal(parts[2], before.split([n * head_dim for n in heads], 1)[2])


def test_the_two_ramps_differ():
    results = []
    for module in (sglang_jit, sgl_kernel_xpu):
        made = {n: v() if callable(v) else v for n, v in {**GOOD, "factor": 4.0, "low": 2.0, "high": 9.0}.items()}
        module.fused_qk_norm_rope(**made)
        results.append(made["qkv"])
    assert not torch.equal(*results)
    defaults = [p.default for p in inspect.signature(sgl_kernel_xpu.fused_qk_norm_rope).parameters.values()][-5:]
    assert defaults == [1.0, 1.0, 1.0, 1.0, None]


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batched", [True, False])
def test_inplace_norm_rope_of_intel(device, batched, position_dtype):
    """The same as the one of SGLang, called by place."""
    lead = (2, 3) if batched else (6,)
    cache, weight = table(16, 64, device), 1 + draw(128, device=device) / 4
    positions = torch.tensor([5, 0, 15, 3, 3, 2], dtype=position_dtype, device=device)
    ours, theirs = ([draw(*lead, n, 128, device=device, seed=n) for n in (4, 2)] for _ in range(2))
    sgl_kernel_xpu.fused_inplace_qknorm_rope(*ours, weight, weight, cache, positions, False, 1e-5, 128, 64)
    sglang_jit.fused_inplace_qknorm_rope(*theirs, weight, weight, cache, positions, is_neox=False, eps=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], draw(*lead, 4, 128, device=device, seed=4))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device, backend):
    cache, positions = table(8, 64, device), torch.arange(4, device=device)
    layer = SimpleNamespace(head_size=64, rotary_dim=64, cos_sin_cache=cache, is_neox_style=True)

    def run(q, k):
        fused(q, k, cache, positions, 64, False)
        sgl_kernel_xpu.forward_xpu(layer, positions, q, k, positions)
        new = sgl_kernel_xpu.rotary_embedding(positions, q, k, 64, cache, True)
        return q * 2 + new[0], k + new[1]

    inputs = draw(4, 4, 64, device=device), draw(4, 2, 64, device=device)
    want = run(*(x.clone() for x in inputs))
    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend=backend)(*(x.clone() for x in inputs))
    torch._dynamo.reset()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
