"""The functions of other projects (ropewalk.compat) against float64, on the CPU, and on CUDA where there is one."""

# SPDX-License-Identifier: Apache-2.0
import inspect

import numpy as np
import oracle
import pytest
import ropewalk
import torch
from ropewalk.compat import _common, sgl_kernel, sgl_kernel_xpu, sglang_jit

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
YARN = (4.0, 5.0, 20.0, 1.2)  # factor, low, high, attention_factor


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def formula(base, rotary_dim, factor=1.0, low=0.0, high=1.0):
    """The frequencies, once more."""
    i = np.arange(rotary_dim // 2, dtype=np.float64)
    f = np.float64(base) ** (-2.0 * i / rotary_dim)
    if factor == 1.0:
        return f
    if abs(high - low) <= 1e-6:
        high = high + 0.001
    r = np.clip((i - low) / (high - low), 0.0, 1.0)
    return f / factor * r + f * (1.0 - r)


def expected(x, angles, pairing, **options):
    """As the oracle, on CPU copies."""
    options = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return oracle.rope(x.cpu(), angles, pairing, **options)


def close(got, want):
    oracle.assert_close(got.cpu(), *want)


def table(rows, rotary_dim, device, dtype=torch.float32, base=1e4):
    angles = np.arange(rows)[:, None] * formula(base, rotary_dim)
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], -1)).to(dtype).to(device)


def turned(part, cos, sin, halves):
    """The rotation of all of `part`, in the dtype of its arguments."""
    a, b = part.chunk(2, -1) if halves else (part[..., 0::2], part[..., 1::2])
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)


def rows_of(cache, positions):
    return [t.cpu().float() for t in cache[positions.long()].chunk(2, -1)]


@pytest.mark.parametrize("module", [sglang_jit, sgl_kernel])
def test_signature(module):
    parameters = inspect.signature(module.fused_qk_norm_rope).parameters
    assert list(parameters) == [
        "qkv", "num_heads_q", "num_heads_k", "num_heads_v", "head_dim", "eps", "q_weight", "k_weight", "base",
        "is_neox", "position_ids", "factor", "low", "high", "attention_factor", "rotary_dim",
    ]  # fmt: skip
    assert [p.default for p in parameters.values() if p.default is not p.empty] == [None]
    assert list(inspect.signature(module.can_use_fused_qk_norm_rope).parameters)[:4] == [
        "head_dim", "is_neox", "dtype", "yarn",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    "head_dim, rotary_dim", [(64, None), (128, None), (128, 64), (256, None), (80, None), (96, 32), (6, 2)]
)
@pytest.mark.parametrize("yarn", [None, YARN, (2.0, 3.0, 3.0, 1.0), (0.5, -1.0, 4.5, 0.7)])
def test_fused_qk_norm_rope(device, dtype, is_neox, head_dim, rotary_dim, yarn):
    tokens, q_heads, k_heads, v_heads = 7, 4, 2, 3
    width = (q_heads + k_heads + v_heads) * head_dim
    row = draw(tokens, width + 8, dtype=dtype, device=device)  # rows further apart than they are wide
    qkv = row[:, :width]
    before = row.clone()
    weights = [1 + draw(head_dim, dtype=dtype, device=device, seed=s) / 4 for s in (1, 2)]
    positions = torch.tensor([0, 1, 2047, 131_071, 2**31 - 1, 5, 5], dtype=torch.int32)
    factor, low, high, attention_factor = yarn or (1.0, 0.0, 0.0, 1.0)
    rotary = rotary_dim or head_dim
    angles = oracle.exact_angles(formula(1e6, rotary, factor, low, high), positions)
    q, k = qkv[:, : q_heads * head_dim], qkv[:, q_heads * head_dim : (q_heads + k_heads) * head_dim]
    want = [
        expected(x.unflatten(1, (-1, head_dim)), angles, "neox" if is_neox else "interleaved", norm=True, weight=w,
                 eps=1e-5, scaling=attention_factor)
        for x, w in zip((q, k), weights, strict=True)
    ]  # fmt: skip
    result = sglang_jit.fused_qk_norm_rope(qkv, q_heads, k_heads, v_heads, head_dim, 1e-5, *weights, 1e6, is_neox,
                                           positions.to(device), factor, low, high, attention_factor,
                                           rotary_dim)  # fmt: skip
    assert result is None
    for x, (value, length) in zip((q, k), want, strict=True):
        # At 2^31 the double formula of the frequencies is itself off by 2^-21 of a radian.
        length = np.where((positions.numpy() > 2**30)[:, None, None], 4 * length, length)
        close(x.unflatten(1, (-1, head_dim)), (value, length))
    assert torch.equal(row[:, (q_heads + k_heads) * head_dim :], before[:, (q_heads + k_heads) * head_dim :])


def test_position_dtypes_and_few_heads(device):
    weight = torch.ones(64, device=device)
    results = []
    for dtype in (torch.int32, torch.int64):
        qkv = draw(3, 64 * 3, device=device)
        positions = torch.arange(3, dtype=dtype, device=device)
        sglang_jit.fused_qk_norm_rope(qkv, 1, 1, 1, 64, 1e-6, weight, weight, 1e4, True, positions, 1.0, 0, 0, 1)
        results.append(qkv)
    assert torch.equal(*results)
    for heads in ((2, 0, 1), (0, 2, 1), (0, 0, 3)):
        qkv = draw(3, 64 * 3, device=device)
        sglang_jit.fused_qk_norm_rope(qkv, *heads, 64, 1e-6, weight, weight, 1e4, True, positions, 1.0, 0, 0, 1)
        v = draw(3, 64 * 3, device=device)[:, -64 * heads[2] :]
        assert torch.equal(qkv[:, -64 * heads[2] :], v)
    empty = torch.empty(0, 64 * 3, device=device)
    sglang_jit.fused_qk_norm_rope(empty, 1, 1, 1, 64, 1e-6, weight, weight, 1e4, True, positions[:0], 1.0, 0, 0, 1)


GOOD = {
    "qkv": lambda: torch.ones(4, 5 * 64), "num_heads_q": 2, "num_heads_k": 1, "num_heads_v": 2, "head_dim": 64,
    "eps": 1e-6, "q_weight": lambda: torch.ones(64), "k_weight": lambda: torch.ones(64), "base": 1e4, "is_neox": True,
    "position_ids": lambda: torch.arange(4, dtype=torch.int32), "factor": 1.0, "low": 1.0, "high": 2.0,
    "attention_factor": 1.0, "rotary_dim": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value, parts",
    [
        ("qkv", lambda: torch.ones(4, 4 * 64), ["qkv must be [tokens, 320]", "[4, 256]"]),
        ("qkv", lambda: torch.ones(4, 5, 64), ["qkv must be [tokens, 320]", "[4, 5, 64]"]),
        (
            "qkv",
            lambda: torch.ones(4, 5 * 64, dtype=torch.float64),
            ["qkv must be float32, float16 or bfloat16", "float64"],
        ),
        ("qkv", lambda: torch.ones(4, 10 * 64)[:, ::2], ["qkv must be contiguous in its last dimension", "2"]),
        ("qkv", lambda: [1.0], ["qkv must be a torch.Tensor", "list"]),
        ("num_heads_q", -1, ["num_heads_q must be at least 0", "-1"]),
        ("num_heads_v", 3, ["qkv must be", "6 heads"]),
        ("head_dim", 0, ["head_dim must be at least 2", "0"]),
        ("head_dim", 64.0, ["head_dim must be an int", "float"]),
        ("eps", -1.0, ["eps must be a finite number >= 0", "-1"]),
        ("q_weight", lambda: torch.ones(32), ["q_weight", "32", "64"]),
        ("k_weight", lambda: torch.ones(64, dtype=torch.float16), ["k_weight must be float32", "float16"]),
        ("base", 0.0, ["base must be a finite number > 0", "0.0"]),
        ("position_ids", lambda: torch.arange(5), ["position_ids has 5 tokens", "qkv has 4"]),
        ("position_ids", lambda: torch.ones(4), ["position_ids must be int32 or int64", "float32"]),
        ("position_ids", None, ["position_ids must be a torch.Tensor", "None"]),
        ("factor", float("nan"), ["factor must be a finite number > 0", "nan"]),
        ("high", float("inf"), ["high must be a finite number", "inf"]),
        ("attention_factor", "1", ["attention_factor must be a number", "str"]),
        ("rotary_dim", 63, ["rotary_dim must be an even number from 2", "63"]),
        ("rotary_dim", 128, ["rotary_dim must be at most head_dim 64", "128"]),
        ("rotary_dim", 0, ["rotary_dim must be an even number from 2", "0"]),
    ],
)
def test_bad_input(name, value, parts):
    made = {n: v() if callable(v) else v for n, v in {**GOOD, name: value}.items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        sglang_jit.fused_qk_norm_rope(*made.values())
    message = str(caught.value)
    assert message.startswith("fused_qk_norm_rope: ") and all(part in message for part in parts), message
    if isinstance(made["qkv"], torch.Tensor):
        assert (made["qkv"] == 1).all()


def test_frequencies_are_kept_and_forgotten():
    _common._frequencies.clear()
    arguments = {n: v() if callable(v) else v for n, v in GOOD.items()}
    for _ in range(3):
        sglang_jit.fused_qk_norm_rope(**arguments)
    assert len(_common._frequencies) == 1
    for base in range(100):
        sglang_jit.fused_qk_norm_rope(**{**arguments, "base": 100.0 + base})
    assert len(_common._frequencies) == _common._MOST_FREQUENCIES


@pytest.mark.parametrize("module", [sglang_jit, sgl_kernel])
def test_can_use(module):
    can_use = module.can_use_fused_qk_norm_rope
    for dtype in DTYPES:
        assert can_use(128, True, dtype) is True and can_use(80, False, dtype, yarn=True) is True
    assert (
        can_use(128, True, torch.bfloat16, num_heads_q=24, num_heads_k=24, num_heads_v=24, num_tokens=(1, 64)) is True
    )
    bf16 = torch.bfloat16
    for wrong in ((127, True, bf16), (0, True, bf16), (128, True, torch.float64), (128, True, "bfloat16"),
                  (None, None, None), (-2, True, bf16), (2**40, True, bf16)):  # fmt: skip
        assert can_use(*wrong) is False


@pytest.mark.parametrize(
    ("cuda", "xpu", "asked"),
    [(False, False, {"cpu"}), (True, False, {"cuda"}), (False, True, {"xpu"}), (True, True, {"cuda", "xpu"})],
)
def test_can_use_asks_every_kind_of_gpu_that_is_there(monkeypatch, cuda, xpu, asked):
    devices, empty = set(), torch.empty

    def stand_in(*shape, device, **options):
        devices.add(device)
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
    monkeypatch.setattr(torch, "empty", stand_in)
    assert sglang_jit.can_use_fused_qk_norm_rope(64, True, torch.float32) is True
    assert devices == asked
    devices.clear()
    assert sglang_jit.can_use_fused_qk_norm_rope(64, True, torch.float32, device="cpu") is True
    assert devices == {"cpu"}


def test_can_use_is_false_where_one_of_them_is_not_served(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)  # but it has no memory, as there is no such GPU
    if not torch.xpu.device_count():
        assert sglang_jit.can_use_fused_qk_norm_rope(64, True, torch.float32) is False


def test_can_use_of_the_operation(device):
    q = draw(3, 2, 64, device=device)
    before = q.clone()
    assert ropewalk.can_use(q, frequencies=ropewalk.Frequencies(1e4, 64)) is True
    assert ropewalk.can_use(q, frequencies=ropewalk.Frequencies(1e4, 128)) is False
    assert ropewalk.can_use(None) is False
    with pytest.raises(TypeError, match=r"can_use\(\) got an unexpected keyword argument 'postions'"):
        ropewalk.can_use(q, postions=None)
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("head_dim, rope_dim", [(128, 128), (128, 64), (576, 64), (80, 80)])
def test_tables_3d(device, dtype, is_neox, head_dim, rope_dim):
    cache = table(64, rope_dim, device)
    positions = torch.tensor([5, 0, 63, 63, 2], dtype=torch.int32, device=device)

    def fresh():
        wide = draw(5, 6, head_dim + 16, dtype=dtype, device=device)
        return wide[:, :4, :head_dim], wide[:, 4:, :head_dim]

    pairing = "neox" if is_neox else "interleaved"
    want = [expected(x, None, pairing, tables=rows_of(cache, positions)) for x in fresh()]

    def check(call):
        q, k = fresh()
        assert call(q, k) is None
        for x, value in zip((q, k), want, strict=True):
            close(x, value)

    check(lambda q, k: sglang_jit.apply_rope_inplace(q, k, cache, positions, is_neox=is_neox))
    check(lambda q, k: sglang_jit.apply_rope_inplace(q, k, cache, positions.long(), is_neox=is_neox, rope_dim=rope_dim))
    check(lambda q, k: sglang_jit.apply_rope_with_cos_sin_cache_inplace(q, k, cache, positions, is_neox=is_neox))
    fused = sgl_kernel.fused_qk_rope_with_cos_sin_cache_inplace
    check(lambda q, k: fused(q, k, cache, positions, rope_dim, is_neox))
    check(lambda q, k: fused(q[..., :rope_dim], k[..., :rope_dim], cache, positions, rope_dim, is_neox))


def test_other_dtype_of_k(device):
    cache = table(8, 64, device)
    positions = torch.arange(5, device=device)
    q, k = draw(5, 4, 64, dtype=torch.bfloat16, device=device), draw(5, 1, 96, device=device, seed=1)
    want = [expected(x, None, "neox", tables=rows_of(cache, positions)) for x in (q, k)]
    before = q.clone()
    sglang_jit.apply_rope_inplace(q, k, cache, positions, is_neox=True)
    for x, value in zip((q, k), want, strict=True):
        close(x, value)
    q.copy_(before)
    with pytest.raises(ValueError, match="k must be float32, float16 or bfloat16"):
        sglang_jit.apply_rope_inplace(q, k.double(), cache, positions, is_neox=True)
    with pytest.raises(ValueError, match="positions has 5 tokens, but k has 4"):
        sglang_jit.apply_rope_inplace(q, k[:4], cache, positions, is_neox=True)
    assert torch.equal(q, before)


def test_names_in_messages():
    q, cache, positions = torch.ones(5, 2, 64), table(8, 64, "cpu"), torch.arange(5)
    with pytest.raises(ValueError, match="apply_rope_inplace: cos_sin_cache must be float32, but is float16"):
        sglang_jit.apply_rope_inplace(q, q.clone(), cache.half(), positions, is_neox=True)
    with pytest.raises(ValueError, match="rotary_embedding: key must be .*64.*, but is"):
        sgl_kernel.rotary_embedding(positions, q, q[:4].clone(), 64, cache)
    with pytest.raises(ValueError, match="rotary_embedding: positions must be int32 or int64"):
        sgl_kernel.rotary_embedding(positions.float(), q, None, 64, cache)
    with pytest.raises(ValueError, match="rotary_embedding: cos_sin_cache must be float32, float16 or bfloat16"):
        sgl_kernel.rotary_embedding(positions, q, None, 64, cache.double())
    with pytest.raises(ValueError, match="rope_dim"):
        sgl_kernel.fused_qk_rope_with_cos_sin_cache_inplace(q, q.clone(), cache, positions, 32, True)
    with pytest.raises(TypeError, match="k must be a torch.Tensor|k must be a tensor"):
        sglang_jit.apply_rope_inplace(q, "k", cache, positions, is_neox=True)
    assert (q == 1).all()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
def test_rotary_embedding(device, flat, batched, is_neox):
    cache = table(16, 32, device)
    lead = (2, 3) if batched else (6,)
    positions = torch.tensor([5, 0, 15, 3, 3, 2], device=device).view(lead)

    def fresh(heads, seed):
        return draw(*lead, *((heads * 64,) if flat else (heads, 64)), dtype=torch.bfloat16, device=device, seed=seed)

    query, key = fresh(4, 0), fresh(2, 1)
    pairing = "neox" if is_neox else "interleaved"
    want = [expected(x.reshape(*lead, -1, 64), None, pairing, tables=rows_of(cache, positions)) for x in (query, key)]
    got = sglang_jit.rotary_embedding(positions, query, key, 64, cache, is_neox)
    assert got[0] is query and got[1] is key
    again = fresh(4, 0), fresh(2, 1)
    assert sgl_kernel.rotary_embedding(positions, *again, 64, cache, is_neox) is None
    for x, y, value in zip(got, again, want, strict=True):
        close(x.reshape(*lead, -1, 64), value)
        assert torch.equal(x, y)
    alone = fresh(4, 0)
    assert sglang_jit.rotary_embedding(positions, alone, None, 64, cache, is_neox)[1] is None
    assert torch.equal(alone, query)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_store(device, flat, cache_dtype):
    cache = table(16, 64, device)
    positions = torch.tensor([5, 0, 15, 3], device=device)
    slots = torch.tensor([7, 0, -1, 2], device=device)
    scale = 0.5 if cache_dtype else None
    v = draw(4, 2, 64, dtype=torch.bfloat16, device=device, seed=2)

    def buffers():
        raw = torch.full((9, 128), 3.0, device=device).to(cache_dtype or torch.bfloat16)
        return [raw.clone() if flat else raw.clone().view(9, 2, 64) for _ in range(2)]

    def fresh():
        return [draw(4, h, 64, dtype=torch.bfloat16, device=device, seed=h) for h in (4, 2)]

    q, k = fresh()
    k_want, v_want = buffers()
    as_heads = [x.view(9, 2, 64) for x in (k_want, v_want)]
    ropewalk.rope_(q, k, positions=positions, cos_sin=cache, v=v, k_cache=as_heads[0], v_cache=as_heads[1], slots=slots,
                   k_scale=scale, v_scale=scale)  # fmt: skip

    def check(call):
        got, stored = fresh(), buffers()
        call(*got, *stored)
        for x, y in zip((*got, *stored), (q, k, k_want, v_want), strict=True):
            assert torch.equal(x.float(), y.float())

    value = v.flatten(1) if flat else v

    def argument(k_buffer, v_buffer):
        return sglang_jit.FusedSetKVBufferArg(value, k_buffer, v_buffer, slots, scale, scale)

    check(lambda q, k, a, b: sglang_jit.apply_rope_with_cos_sin_cache_inplace(
        q, k, cache, positions, is_neox=True, fused_args=argument(a, b)))  # fmt: skip
    check(lambda q, k, a, b: sgl_kernel.apply_rope_with_cos_sin_cache_inplace(
        positions, q.view(4, -1), k.view(4, -1), 64, cache, True, argument(a, b), enable_pdl=True))  # fmt: skip
    if cache_dtype is None:
        check(lambda q, k, a, b: sglang_jit.apply_rope_inplace_with_kvcache(
            q, k, value, a, b, cache, positions, slots, is_neox=True))  # fmt: skip
    with pytest.raises(ValueError, match="cache_loc must be int32 or int64"):
        bad = argument(*buffers())
        bad.cache_loc = slots.to(torch.int16)
        sglang_jit.apply_rope_with_cos_sin_cache_inplace(*fresh(), cache, positions, is_neox=True, fused_args=bad)
    with pytest.raises(ValueError, match="k_cache must have rows of 2 heads"):
        sglang_jit.apply_rope_inplace_with_kvcache(
            *fresh(), v, torch.zeros(9, 127, device=device), v, cache, positions, slots, is_neox=True)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("full_width", [True, False])
def test_fused_inplace_qknorm_rope(device, dtype, is_neox, batched, full_width):
    half = table(16, 96, device)
    cos, sin = half.chunk(2, -1)
    if full_width:

        def repeat(t):
            return torch.cat([t, t], -1) if is_neox else t.repeat_interleave(2, -1)

        cache = torch.cat([repeat(cos), repeat(sin)], -1)
    else:
        cache = half
    lead = (2, 3) if batched else (6,)
    positions = torch.tensor([5, 0, 15, 3, 3, 2], dtype=torch.int32, device=device)
    weights = [1 + draw(128, dtype=dtype, device=device, seed=s) / 4 for s in (1, 2)]
    q, k = draw(*lead, 4, 128, dtype=dtype, device=device), draw(*lead, 2, 128, dtype=dtype, device=device, seed=1)
    rows = rows_of(half, positions.view(lead))
    want = [
        expected(x, None, "neox" if is_neox else "interleaved", tables=rows, norm=True, weight=w, eps=1e-5)
        for x, w in zip((q, k), weights, strict=True)
    ]
    again = q.clone(), k.clone()
    options = {"is_neox": is_neox, "eps": 1e-5, "cache_has_full_width": full_width}
    sglang_jit.fused_inplace_qknorm_rope(q, k, *weights, cache, positions, **options)
    for x, value in zip((q, k), want, strict=True):
        close(x, value)
    # Rounded between: the norm, rounded to the dtype, then the rotation of that.
    normed = [x.clone() for x in again]
    for x, w in zip(normed, weights, strict=True):
        y = x.float()
        x.copy_(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float())
    want = [expected(x, None, "neox" if is_neox else "interleaved", tables=rows) for x in normed]
    sglang_jit.fused_inplace_qknorm_rope(*again, *weights, cache, positions, head_dim=128, rope_dim=96,
                                         round_norm_before_rope=True, **options)  # fmt: skip
    for x, (value, length) in zip(again, want, strict=True):
        # torch's float32 mean may round the norm to the other neighbour.
        unit = oracle.UNITS[dtype][0]
        assert np.abs(oracle.float64(x.cpu()) - value).max() <= 8 * unit * max(length.max(), 1.0)
        close(x[..., 96:], (oracle.float64(x[..., 96:].cpu()), 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("round_norm", [True, False])
@pytest.mark.parametrize("rope_dim", [128, 96])
def test_full_width_table_of_unequal_pairs(device, dtype, is_neox, round_norm, rope_dim):
    """ERNIE-Image repeats each cosine for neighbours, but rotates halves: a pair's elements have different ones."""
    half = table(16, rope_dim, device)
    full = [t.repeat_interleave(2, -1) if is_neox else torch.cat([t, t], -1) for t in half.chunk(2, -1)]
    positions = torch.tensor([5, 0, 15, 3, 3, 2], device=device)
    weights = [1 + draw(128, dtype=dtype, device=device, seed=s) / 4 for s in (1, 2)]
    row = draw(6, 7, 128, dtype=dtype, device=device)  # four heads of q, two of k, one of v
    before, q, k = row.clone(), row[:, :4], row[:, 4:6]
    want = []
    for x, w in zip((q, k), weights, strict=True):
        y = x.double()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * w.double()
        y = y.to(dtype).double() if round_norm else y
        part, rest = y[..., :rope_dim], y[..., rope_dim:]
        a, b = part.chunk(2, -1) if is_neox else (part[..., 0::2], part[..., 1::2])
        turned = torch.cat([-b, a], -1) if is_neox else torch.stack([-b, a], -1).flatten(-2)
        cos, sin = (t.double()[positions].unsqueeze(1) for t in full)
        want.append(torch.cat([part * cos + turned * sin, rest], -1))
    sglang_jit.fused_inplace_qknorm_rope(
        q, k, *weights, torch.cat(full, -1), positions, is_neox=is_neox, eps=1e-5, rope_dim=rope_dim,
        round_norm_before_rope=round_norm, cache_has_full_width=True,
    )  # fmt: skip
    unit = oracle.UNITS[dtype][0]
    for x, value in zip((q, k), want, strict=True):
        assert (x.double() - value).abs().max() <= 8 * unit * value.abs().max()
    assert torch.equal(row[:, 6:], before[:, 6:])
    empty = torch.empty(0, 4, 128, dtype=dtype, device=device)
    sglang_jit.fused_inplace_qknorm_rope(empty, empty.clone(), *weights, torch.cat(full, -1), positions[:0],
                                         is_neox=is_neox, cache_has_full_width=True)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("round_norm", [True, False])
@pytest.mark.parametrize("full_width", [True, False])
def test_out_of_place_has_the_bits_of_in_place(device, dtype, is_neox, round_norm, full_width):
    """Strided views in, tensors of other strides out; what is read stays as it is."""
    cache = table(16, 96, device, dtype=dtype)
    if full_width:
        (cos, sin), (other_cos, other_sin) = cache.chunk(2, -1), cache.flip(0).chunk(2, -1)
        cache = torch.cat([cos, other_cos, sin, other_sin], -1)
    row = draw(6, 7, 128, dtype=dtype, device=device)
    weights = [1 + draw(128, dtype=dtype, device=device, seed=s) / 4 for s in (1, 2)]
    positions = torch.tensor([5, 0, 15, 3, 3, 2], device=device)
    options = {"is_neox": is_neox, "eps": 1e-5, "head_dim": 128, "rope_dim": 96,
               "round_norm_before_rope": round_norm, "cache_has_full_width": full_width}  # fmt: skip
    want = row[:, :4].clone(), row[:, 4:6].clone()
    sglang_jit.fused_inplace_qknorm_rope(*want, *weights, cache, positions, **options)
    before, out = row.clone(), torch.full((6, 8, 128), 7.0, dtype=dtype, device=device)
    sglang_jit.fused_qknorm_rope_out_of_place(row[:, :4], row[:, 4:6], out[:, 1:5], out[:, 5:7], *weights, cache,
                                              positions, **options)  # fmt: skip
    assert torch.equal(row, before)
    assert torch.equal(out[:, 1:5], want[0]) and torch.equal(out[:, 5:7], want[1])
    assert (out[:, 0] == 7).all() and (out[:, 7] == 7).all()


def test_out_of_place_refuses():
    q, k, weight, positions = torch.ones(3, 2, 64), torch.ones(3, 1, 64), torch.ones(64) * 2, torch.arange(3)
    for change, error, match in (
        ({"q_out": torch.ones(3, 2, 32)}, ValueError, "q_out"),
        ({"k_out": torch.ones(2, 1, 64)}, ValueError, "k_out"),
        ({"k_out": None}, TypeError, "k_out must be a torch.Tensor"),
        ({"cos_sin_cache": table(8, 64, "cpu").double()}, ValueError, "cos_sin_cache must be"),
    ):
        for round_norm in (False, True):
            arguments = {"q": q, "k": k, "q_out": torch.zeros_like(q), "k_out": torch.zeros_like(k), "q_weight": weight,
                         "k_weight": weight, "cos_sin_cache": table(8, 64, "cpu"), "positions": positions,
                         "is_neox": True, "round_norm_before_rope": round_norm, **change}  # fmt: skip
            with pytest.raises(error, match=f"^fused_qknorm_rope_out_of_place: .*{match}"):
                sglang_jit.fused_qknorm_rope_out_of_place(**arguments)
            for name in ("q_out", "k_out"):
                assert name in change or (arguments[name] == 0).all()
    assert (q == 1).all() and (k == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("round_norm", [True, False])
@pytest.mark.parametrize("prefix", [3, 0])
def test_pack_kv_has_the_bits_of_its_parts(device, dtype, is_neox, round_norm, prefix):
    """Views of packed rows in; of those only q is written."""
    batch, tokens, cache = 2, 3, table(16, 96, device)
    rows = draw(batch, tokens, 8, 128, dtype=dtype, device=device)  # four heads of q, two of k, two of v
    prefix_rows = draw(batch, prefix, 8, 128, dtype=dtype, device=device, seed=1)
    weights = [1 + draw(128, dtype=dtype, device=device, seed=s) / 4 for s in (2, 3)]
    positions = torch.tensor([5, 0, 15, 3, 3, 2], dtype=torch.int32, device=device)
    options = {"is_neox": is_neox, "eps": 1e-5, "rope_dim": 96, "round_norm_before_rope": round_norm}
    parts = slice(0, 4), slice(4, 6), slice(6, 8)
    want = rows.clone()
    sglang_jit.fused_inplace_qknorm_rope(want[:, :, parts[0]], want[:, :, parts[1]], *weights, cache, positions,
                                         **options)  # fmt: skip
    before = rows.clone(), prefix_rows.clone()
    packed_kv = torch.full((2, batch, prefix + tokens, 2, 128), 7.0, dtype=dtype, device=device)
    sglang_jit.fused_qknorm_rope_pack_kv(*(rows[:, :, part] for part in parts),
                                         *(prefix_rows[:, :, part] for part in parts[1:]), packed_kv, *weights, cache,
                                         positions, **options)  # fmt: skip
    assert torch.equal(rows[:, :, :4], want[:, :, :4])
    assert torch.equal(rows[:, :, 4:], before[0][:, :, 4:]) and torch.equal(prefix_rows, before[1])
    for one, part in zip(packed_kv, parts[1:], strict=True):
        assert torch.equal(one, torch.cat([prefix_rows[:, :, part], want[:, :, part]], 1))


def test_pack_kv_refuses():
    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype)

    for change, error, match in (
        ({"k": ones(3, 1, 64)}, ValueError, r"k must be \[batch, tokens, heads, head_dim\], but is \[3, 1, 64\]"),
        ({"v": ones(1, 2, 1, 64)}, ValueError, r"v must be \[1, 3, 1, 64\], but is \[1, 2, 1, 64\]"),
        ({"k_prefix": ones(2, 1, 64)}, ValueError, r"k_prefix must be \[batch, prefix_tokens, k_heads, head_dim\]"),
        ({"v_prefix": ones(1, 4, 1, 64)}, ValueError, r"v_prefix must be \[1, 2, 1, 64\], but is"),
        ({"packed_kv": ones(2, 1, 4, 1, 64)}, ValueError, r"packed_kv must be \[2, 1, 5, 1, 64\], but is"),
        ({"packed_kv": ones(2, 1, 5, 1, 128)[..., ::2]}, ValueError, "packed_kv must be contiguous in its last"),
        ({"v": ones(1, 3, 1, 64, dtype=torch.float16)}, ValueError, "v must be torch.float32 on cpu, but is"),
        ({"packed_kv": None}, TypeError, "packed_kv must be a torch.Tensor"),
        ({"cos_sin_cache": table(8, 64, "cpu").double()}, ValueError, "cos_sin_cache must be"),
    ):
        for round_norm in (False, True):
            arguments = {"q": ones(1, 3, 2, 64), "k": ones(1, 3, 1, 64), "v": ones(1, 3, 1, 64),
                         "k_prefix": ones(1, 2, 1, 64), "v_prefix": ones(1, 2, 1, 64),
                         "packed_kv": ones(2, 1, 5, 1, 64), "q_weight": ones(64) * 2, "k_weight": ones(64) * 2,
                         "cos_sin_cache": table(8, 64, "cpu"), "positions": torch.arange(3), "is_neox": True,
                         "round_norm_before_rope": round_norm, **change}  # fmt: skip
            with pytest.raises(error, match=f"^fused_qknorm_rope_pack_kv: {match}"):
                sglang_jit.fused_qknorm_rope_pack_kv(**arguments)
            for name in ("q", "k", "packed_kv"):
                assert arguments[name] is None or (arguments[name] == 1).all()


def test_can_use_fused_inplace_qknorm_rope(device):
    can = sglang_jit.can_use_fused_inplace_qknorm_rope
    for dtype in DTYPES:
        for is_neox in (True, False):
            assert can(128, 96, is_neox, dtype, torch.float32, device=device)
            assert can(64, 64, is_neox, dtype, dtype, True, False, True, device=device)
    assert can(80, 80, False, torch.bfloat16, device=device)
    assert can(128, 96, True, torch.bfloat16, pack_kv=True, device=device)
    assert can(80, 80, False, torch.float32, torch.float32, True, True, device=device)
    assert not can(128, 96, True, torch.bfloat16, pack_kv=True, cache_has_full_width=True, device=device)
    for bad in ((128, 130, True, torch.bfloat16), (128, 0, True, torch.bfloat16), (128, 63, True, torch.bfloat16),
                (128, 64, True, torch.int32), (128, 64, True, "bfloat16"), (0, 0, True, torch.bfloat16),
                (128, 64, True, torch.bfloat16, torch.float64)):  # fmt: skip
        assert not can(*bad, device=device), bad
    assert not can(128, 64, True, torch.bfloat16, device="nowhere")


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_token_of_intel_that_is_not_stored_is_not_rotated(device, is_neox, index):
    cache, dtype = table(16, 64, device), torch.bfloat16
    q, k = draw(5, 4, 128, dtype=dtype, device=device), draw(5, 2, 128, dtype=dtype, device=device, seed=1)
    v = draw(5, 2, 128, dtype=dtype, device=device, seed=2)
    positions = torch.tensor([3, 0, 15, 7, 7], dtype=index, device=device)
    out_loc = torch.tensor([4, -1, 0, -1, 9], dtype=index, device=device)
    q_want, k_want = q.clone(), k.clone()
    sglang_jit.apply_rope_inplace(q_want, k_want, cache, positions, is_neox=is_neox)
    skipped = out_loc < 0
    q_want[skipped], k_want[skipped] = q[skipped], k[skipped]
    k_cache, v_cache = (torch.full((10, 256), 7.0, dtype=dtype, device=device) for _ in range(2))
    sgl_kernel_xpu.apply_rope_inplace_with_kvcache(q, k, v, k_cache, v_cache, cache, positions, out_loc, is_neox)
    assert torch.equal(q, q_want) and torch.equal(k, k_want)
    stored = out_loc[~skipped].long()
    assert torch.equal(k_cache[stored], k[~skipped].flatten(1)) and torch.equal(v_cache[stored], v[~skipped].flatten(1))
    others = [i for i in range(10) if i not in stored.tolist()]
    assert (k_cache[others] == 7).all() and (v_cache[others] == 7).all()
    ropewalk.check_faults()
    before = q.clone()
    for change, match in (
        ({"cos_sin_cache": cache.to(dtype)}, "cos_sin_cache must be"),
        ({"out_loc": out_loc[:3]}, "out_loc has 3 tokens"),
        ({"cos_sin_cache": cache[:, :17]}, "rot_dim must be even and at most head_dim 128, but is 17"),
        ({"cos_sin_cache": torch.cat([cache] * 4, -1)}, "rot_dim must be even and at most head_dim 128, but is 256"),
        ({"v_cache": v_cache[:, :255]}, "v_cache must have rows of 2 heads"),
    ):
        arguments = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "cos_sin_cache": cache,
                     "positions": positions, "out_loc": out_loc, "is_neox": is_neox, **change}  # fmt: skip
        with pytest.raises(ValueError, match=f"^apply_rope_inplace_with_kvcache: .*{match}"):
            sgl_kernel_xpu.apply_rope_inplace_with_kvcache(**arguments)
    with pytest.raises(RuntimeError, match="rot_dim"):  # as in the original
        sgl_kernel_xpu.apply_rope_inplace_with_kvcache(
            q, k, v, k_cache, v_cache, cache[:, :17], positions, out_loc, True
        )
    assert torch.equal(q, before)


def test_weights_may_be_parameters(device):
    """A norm's, without gradients; in grad mode what requires grad is refused, as its gradient would be lost."""
    cache, positions = table(8, 64, device), torch.arange(4, device=device)
    weight = torch.nn.Parameter(1 + draw(64, device=device) / 4)

    def run(w, qkv):
        function = sglang_jit.fused_inplace_qknorm_rope
        function(qkv[:, :2], qkv[:, 2:3], w, w, cache, positions, is_neox=True)
        sglang_jit.fused_qk_norm_rope(qkv.view(4, -1), 2, 1, 1, 64, 1e-6, w, w, 1e4, True, positions, *YARN)
        full = torch.cat([cache[:, :32]] * 2 + [cache[:, 32:]] * 2, -1)
        function(qkv[:, :2], qkv[:, 2:3], w, w, full, positions, is_neox=True, cache_has_full_width=True)
        return qkv

    with torch.no_grad():
        got = run(weight, draw(4, 4, 64, device=device))
    assert torch.equal(got, run(weight.data, draw(4, 4, 64, device=device)))
    with pytest.raises(ValueError, match="q_weight requires grad"):
        run(weight, draw(4, 4, 64, device=device))
    with pytest.raises(ValueError, match="q requires grad"):
        run(weight.data, draw(4, 4, 64, device=device).requires_grad_().clone())


def test_bad_input_of_two_passes_writes_nothing():
    q, k, weight, positions = torch.ones(3, 2, 64), torch.ones(3, 1, 64), torch.ones(64) * 2, torch.arange(3)
    function = sglang_jit.fused_inplace_qknorm_rope
    for change, match in (
        ({"cos_sin_cache": table(8, 64, "cpu").double()}, "cos_sin_cache must be"),
        ({"head_dim": 32}, "head_dim must be 0 or q's last dimension, 64, but is 32"),
        ({"rope_dim": 32}, "32"),
        ({"positions": positions[:2]}, "positions has 2 tokens"),
        ({"q_weight": weight[:32]}, "q_weight"),
        ({"cos_sin_cache": table(8, 64, "cpu")[:, :62], "cache_has_full_width": True}, "cos_sin_cache must be"),
    ):
        arguments = {"q": q, "k": k, "q_weight": weight, "k_weight": weight, "cos_sin_cache": table(8, 64, "cpu"),
                     "positions": positions, "is_neox": True, "round_norm_before_rope": True, **change}  # fmt: skip
        with pytest.raises(ValueError, match=match):
            function(**arguments)
        assert (q == 1).all() and (k == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device, backend):
    weight = torch.ones(64, device=device)
    positions = torch.arange(4, dtype=torch.int32, device=device)
    cache = table(8, 64, device)

    inputs = draw(4, 4 * 64, device=device), draw(4, 4, 64, device=device)

    def run(function, qkv, q):
        return function(qkv, q), qkv, q

    def flat(qkv, q):
        sglang_jit.fused_qk_norm_rope(qkv, 2, 1, 1, 64, 1e-6, weight, weight, 1e4, True, positions, *YARN)
        sglang_jit.apply_rope_inplace(q, None, cache, positions, is_neox=True)
        k, v, both = q[None, :, :2] + 1, q[None, :, 2:] + 2, torch.zeros(2, 1, 7, 2, 64, device=q.device)
        sglang_jit.fused_qknorm_rope_pack_kv(q[None], k, v, k[:, :3], v[:, :3], both, weight, weight, cache, positions,
                                             is_neox=True)  # fmt: skip
        return qkv * 2 + q.flatten(1) + both[:, 0, 3:].transpose(0, 1).flatten(1)

    want = run(flat, *(x.clone() for x in inputs))
    torch._dynamo.reset()
    got = run(torch.compile(flat, fullgraph=True, backend=backend), *(x.clone() for x in inputs))
    torch._dynamo.reset()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
