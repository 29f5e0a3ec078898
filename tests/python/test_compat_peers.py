"""The functions of FlashInfer, vLLM, flash-attn, Liger, diffusers and transformers: against their formulas in torch,
and against the functions themselves where they are installed; gradients against autograd's."""

# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import ropewalk
import torch
from ropewalk.compat import diffusers, flash_attn, flashinfer, liger, transformers, vllm
from test_compat import DEVICES, DTYPES, draw, table, turned

UNIT = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def rotated(x, cos, sin, halves, offset=0, sign=1):
    """x [.., tokens, heads, head_dim] in float32, cos and sin [.., tokens, rotary_dim/2]; autograd goes through it."""
    width = 2 * cos.shape[-1]
    cos, sin = cos.float().unsqueeze(-2), sign * sin.float().unsqueeze(-2)
    part = turned(x[..., offset : offset + width].float(), cos, sin, halves)
    return torch.cat([x[..., :offset], part.to(x.dtype), x[..., offset + width :]], -1)


def angles(positions, rotary_dim, theta=1e4, change=lambda f: f):
    f = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = positions.cpu().double()[..., None] * torch.tensor([change(v) for v in f.tolist()], dtype=torch.float64)
    return angle.cos(), angle.sin()


def same(got, want):
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=UNIT[want.dtype], atol=4e-6)


def normalised(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


# ---------------------------------------------------------------------------------------------------------------------
# FlashInfer

REQUESTS = [(5, 0), (1, 700), (0, 3), (9, 131_071)]  # tokens, position of the first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 48])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_flashinfer_by_numbers(device, dtype, interleave, rotary_dim, index_dtype):
    counts, firsts = zip(*REQUESTS, strict=True)
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=index_dtype, device=device)
    offsets = torch.tensor(firsts, dtype=index_dtype, device=device)
    positions = torch.cat([torch.arange(n) + first for n, first in REQUESTS]).to(index_dtype)
    whole = draw(len(positions), 6, 80, dtype=dtype, device=device)
    q, k, width = whole[:, :4], whole[:, 4:], rotary_dim or 80

    def llama31(f):
        s = min(max((8192 * f / (2 * math.pi) - 1) / (4 - 1), 0.0), 1.0)
        return (1 - s) * f / 8 + s * f

    for name, options, theta, change in (
        ("rope", {}, 1e4, lambda f: f),
        ("rope", {"rope_scale": 4, "rope_theta": 5e5}, 5e5, lambda f: f / 4),
        ("llama31_rope", {}, 5e5, llama31),
    ):
        cos, sin = angles(positions, width, theta, change)
        want = [rotated(x.cpu(), cos, sin, not interleave) for x in (q, k)]
        shared = {"rotary_dim": rotary_dim, "interleave": interleave, **options}
        before = whole.clone()
        for ids, place in (("", (indptr, offsets)), ("_pos_ids", (positions.to(device),))):
            got = getattr(flashinfer, f"apply_{name}{ids}")(q, k, *place, **shared)
            for x, value in zip(got, want, strict=True):
                same(x, value)
            assert torch.equal(whole, before)
            mine = whole.clone()
            inplace = getattr(flashinfer, f"apply_{name}{ids}_inplace")
            assert inplace(mine[:, :4], mine[:, 4:], *place, **shared) is None
            same(mine, torch.cat(want, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [False, True])
def test_flashinfer_by_a_table(device, dtype, is_neox):
    cache, positions = table(64, 48, device), torch.tensor([63, 0, 7], device=device)
    q, k = (draw(3, heads * 64, dtype=dtype, device=device, seed=heads) for heads in (4, 2))
    cos, sin = cache.cpu()[positions.cpu()].chunk(2, -1)
    want = [rotated(x.cpu().unflatten(1, (-1, 64)), cos, sin, is_neox).flatten(1) for x in (q, k)]
    before = q.clone()
    for x, value in zip(
        flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, 64, cache, is_neox), want, strict=True
    ):
        same(x, value)
    assert torch.equal(q, before)
    assert flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 64, cache, is_neox) is None
    for x, value in zip((q, k), want, strict=True):
        same(x, value)
    with pytest.raises(ValueError, match="cos_sin_cache must be float32, but is bfloat16"):
        flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, 64, cache.bfloat16(), is_neox)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(3, 64)}, r"apply_rope: q must be \[tokens, heads, head_dim\], but is \[3, 64\]"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, r"offsets \[requests\], but are \[2\] and \[2\]"),
        ({"rotary_dim": 7}, "apply_rope: rotary_dim must be an even number"),
        ({"rope_scale": 0.0}, "apply_rope: .*rope_scale"),
        ({"rope_theta": -1.0}, "apply_rope: rope_theta"),
        ({"k": torch.zeros(2, 1, 64)}, "apply_rope: k has 2 tokens"),
    ],
)
def test_flashinfer_refuses(change, message):
    good = {"q": torch.zeros(3, 2, 64), "k": torch.zeros(3, 1, 64), "indptr": torch.tensor([0, 3], dtype=torch.int32),
            "offsets": torch.zeros(1, dtype=torch.int32)}  # fmt: skip
    flashinfer.apply_rope(**good)
    with pytest.raises(ValueError, match=message):
        flashinfer.apply_rope(**{**good, **change})


# ---------------------------------------------------------------------------------------------------------------------
# vLLM


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("offset, inverse", [(0, False), (16, False), (16, True)])
@pytest.mark.parametrize("flat", [False, True])
def test_vllm_rotary_embedding(device, dtype, is_neox, offset, inverse, flat):
    cache, positions = table(64, 32, device), torch.tensor([[63, 0], [7, 7]], device=device)
    shape = (2, 2, 3 * 64) if flat else (2, 2, 3, 64)
    query, key = (draw(*shape, dtype=dtype, device=device, seed=i) for i in range(2))
    cos, sin = cache.cpu()[positions.cpu()].chunk(2, -1)
    want = [rotated(x.cpu().view(2, 2, 3, 64), cos, sin, is_neox, offset, -1 if inverse else 1) for x in (query, key)]
    alone = query.clone()
    assert vllm.rotary_embedding(positions, query, key, 64, cache, is_neox, offset, inverse) is None
    for x, value in zip((query, key), want, strict=True):
        same(x.view(2, 2, 3, 64), value)
    vllm.rotary_embedding(positions, alone, None, 64, cache, is_neox, offset, inverse)
    assert torch.equal(alone, query)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("cache_like_qkv", [False, True])
def test_vllm_norm_and_cache(device, dtype, is_neox, cache_like_qkv):
    tokens, heads, eps = 9, (6, 2, 2), 1e-6
    cache = table(64, 64, device, dtype if cache_like_qkv else torch.float32)
    positions = torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(3)).to(device)
    qkv = draw(tokens, sum(heads) * 96, dtype=dtype, device=device)
    weights = [draw(96, dtype=dtype, device=device, seed=i) for i in (5, 6)]
    rows = qkv.cpu().view(tokens, -1, 96).split(heads, 1)
    cos, sin = cache.cpu()[positions.cpu()].chunk(2, -1)
    want = [
        rotated(normalised(x, w.cpu(), eps), cos, sin, is_neox).to(dtype) for x, w in zip(rows, weights, strict=False)
    ]
    mine = qkv.clone()
    arguments = *heads, 96, eps, *weights, cache, is_neox, positions
    assert vllm.fused_qk_norm_rope(mine, *arguments) is None
    got = mine.view(tokens, -1, 96).split(heads, 1)
    for x, value in zip(got, want, strict=False):
        same(x, value)
    assert torch.equal(got[2].cpu(), rows[2])

    # Slots for all but the last two tokens, one of them -1; pages within a wider buffer.
    slots = torch.tensor([5, 0, -1, 7, 11, 2, 1], device=device)
    buffer = draw(2, 3, 4, 2, 96, dtype=dtype, device=device, seed=8)
    before = buffer.clone()
    out = [torch.empty(tokens, n * 96, dtype=dtype, device=device) for n in heads[:2]]
    original = qkv.clone()
    vllm.fused_qk_norm_rope_kvcache(qkv, *out, *arguments, buffer[0], buffer[1], slots, 4)
    assert torch.equal(qkv, original)
    new = [x.view(tokens, -1, 96) for x in out]
    for x, value in zip(new, want, strict=True):
        same(x, value)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before[0, slot // 4, slot % 4], before[1, slot // 4, slot % 4] = new[1][token], got[2][token]
    assert torch.equal(buffer, before)
    with pytest.raises(ValueError, match="num_heads_v must be num_heads_k, 3, but is 1"):
        vllm.fused_qk_norm_rope_kvcache(qkv, *out, 6, 3, 1, *arguments[3:], buffer[0], buffer[1], slots, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Those with a gradient


def with_gradient(call, x, want):
    """What `call` makes of x, and its gradient, are those of `want`, which autograd goes through in float32."""
    ours, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
    got, value = call(ours), want(theirs.cpu())
    same(got, value.to(x.dtype))
    weight = draw(*value.shape, dtype=torch.float32, device="cpu", seed=9)
    (got.cpu().float() * weight).sum().backward()
    (value.float() * weight).sum().backward()
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad.cpu(), rtol=2 * UNIT[x.dtype], atol=4 * UNIT[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, "tensor"])
def test_flash_attn(device, dtype, interleaved, offsets):
    cos, sin = (draw(40, 24, dtype=dtype, device=device, seed=i).sin() for i in (1, 2))
    x = draw(2, 7, 3, 64, dtype=dtype, device=device)
    given = torch.tensor([4, 30], dtype=torch.int32, device=device) if offsets == "tensor" else offsets
    positions = (given.cpu()[:, None] if offsets == "tensor" else torch.full((2, 1), offsets)) + torch.arange(7)

    def want(x):
        return rotated(x, cos.cpu()[positions], sin.cpu()[positions], not interleaved)

    with_gradient(lambda x: flash_attn.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=given), x, want)
    before = x.clone()
    assert flash_attn.apply_rotary_emb(x, cos, sin, interleaved, True, given) is x
    same(x, want(before.cpu()))

    # In place in a graph: of what is no leaf.
    leaf = before.clone().requires_grad_()
    flash_attn.apply_rotary_emb(leaf * 2, cos, sin, interleaved, True, given).sum().backward()
    other = before.cpu().clone().requires_grad_()
    want(other * 2).sum().backward()
    torch.testing.assert_close(leaf.grad.cpu(), other.grad, rtol=4 * UNIT[dtype], atol=8 * UNIT[dtype])


@pytest.mark.parametrize("offsets", [0, 2, "tensor"])
def test_flash_attn_of_sequences_behind_each_other(device, offsets):
    cos, sin = (draw(40, 32, dtype=torch.float32, device=device, seed=i).sin() for i in (1, 2))
    lengths = [4, 0, 9]
    x = draw(sum(lengths), 3, 64, dtype=torch.float32, device=device)
    begins = torch.tensor([0, 4, 4, 13], dtype=torch.int32, device=device)
    given = torch.tensor([1, 5, 30], dtype=torch.int32, device=device) if offsets == "tensor" else offsets
    firsts = given.tolist() if offsets == "tensor" else [offsets] * 3
    positions = torch.cat([torch.arange(n) + first for n, first in zip(lengths, firsts, strict=True)])
    with_gradient(
        lambda x: flash_attn.apply_rotary_emb(x, cos, sin, seqlen_offsets=given, cu_seqlens=begins, max_seqlen=9),
        x, lambda x: rotated(x, cos.cpu()[positions], sin.cpu()[positions], True),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, None])
def test_liger(device, dtype, batch):
    lead = () if batch is None else (batch,)
    cos, sin = (
        draw(*lead, 5, 32, dtype=dtype, device=device, seed=i).sin().repeat(*[1] * len(lead), 1, 2) for i in (1, 2)
    )
    k = draw(2, 2, 5, 64, dtype=dtype, device=device, seed=3)

    def want(x):
        parts = [t.cpu()[..., :32].expand(2, 5, 32) for t in (cos, sin)]
        return rotated(x.transpose(1, 2), *parts, True).transpose(1, 2)

    x = draw(2, 4, 5, 64, dtype=dtype, device=device)
    with_gradient(lambda x: liger.liger_rotary_pos_emb(x, k, cos, sin)[0], x, want)
    with_gradient(lambda k: liger.liger_rotary_pos_emb(x, k, cos, sin)[1], k, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["pairs", "halves", "complex"])
@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_diffusers(device, dtype, kind, sequence_dim):
    theirs = pytest.importorskip("diffusers.models.embeddings", exc_type=ImportError)
    cos, sin = (x.float() for x in angles(torch.arange(5), 64))
    if kind == "complex":
        freqs, options = torch.complex(cos, sin)[None], {"use_real": False}
    elif kind == "pairs":
        freqs, options = tuple(x.repeat_interleave(2, -1) for x in (cos, sin)), {"use_real_unbind_dim": -1}
    else:
        freqs, options = tuple(x.repeat(1, 2) for x in (cos, sin)), {"use_real_unbind_dim": -2}
    x = draw(2, *((5, 3) if sequence_dim == 1 or kind == "complex" else (3, 5)), 64, dtype=dtype, device=device)
    options["sequence_dim"] = sequence_dim
    here = freqs.to(device) if kind == "complex" else tuple(t.to(device) for t in freqs)
    with_gradient(lambda x: diffusers.apply_rotary_emb(x, here, **options), x,
                  lambda x: theirs.apply_rotary_emb(x, freqs, **options))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_transformers(device, dtype, unsqueeze_dim):
    theirs = pytest.importorskip("transformers.models.llama.modeling_llama")
    cos, sin = (x.to(dtype).repeat(1, 2)[None].to(device) for x in angles(torch.arange(5) + 1000, 64))
    q, k = (
        draw(2, *((n, 5) if unsqueeze_dim == 1 else (5, n)), 64, dtype=dtype, device=device, seed=n) for n in (4, 2)
    )
    want = theirs.apply_rotary_pos_emb(q.cpu(), k.cpu(), cos.cpu(), sin.cpu(), unsqueeze_dim=unsqueeze_dim)
    got = transformers.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    for x, value in zip(got, want, strict=True):
        assert x.shape == value.shape
        assert torch.equal(x.cpu(), value)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    sum(x.float().sum() for x in transformers.apply_rotary_pos_emb(*leaves, cos, sin, unsqueeze_dim)).backward()
    others = [x.cpu().clone().requires_grad_() for x in (q, k)]
    sum(
        x.float().sum() for x in theirs.apply_rotary_pos_emb(*others, cos.cpu(), sin.cpu(), unsqueeze_dim=unsqueeze_dim)
    ).backward()
    for x, value in zip(leaves, others, strict=True):
        torch.testing.assert_close(x.grad.cpu(), value.grad, rtol=2 * UNIT[dtype], atol=2 * UNIT[dtype])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, t: flash_attn.apply_rotary_emb(x[0], t, t), r"apply_rotary_emb: x must be \[batch, tokens, heads"),
        (lambda x, t: flash_attn.apply_rotary_emb(x, t, t, seqlen_offsets=t[:3, 0]), r"seqlen_offsets must be \[2\]"),
        (lambda x, t: flash_attn.apply_rotary_emb(x, t[:4], t[:4]), "apply_rotary_emb: "),
        (lambda x, t: flash_attn.apply_rotary_emb(x, t, t[:, :8]), "apply_rotary_emb: sin"),
        (lambda x, t: liger.liger_rotary_pos_emb(x[0], x, t, t), "liger_rotary_pos_emb: q and k must be"),
        (lambda x, t: liger.liger_rotary_pos_emb(x, x, t[:, :7], t), "liger_rotary_pos_emb: cos must be"),
        (lambda x, t: diffusers.apply_rotary_emb(x, (t, t), sequence_dim=3), "sequence_dim must be 1 or 2, but is 3"),
        (lambda x, t: diffusers.apply_rotary_emb(x, t, use_real=False), "freqs_cis must be complex"),
        (lambda x, t: transformers.apply_rotary_pos_emb(x, x, t, t, 0), "unsqueeze_dim must be 1 or 2, but is 0"),
        (lambda x, t: transformers.apply_rotary_pos_emb(x, x[0], t, t), "q and k must have 4 dimensions"),
    ],
)
def test_refused(call, message):
    x, before = torch.ones(2, 5, 3, 64), torch.ones(2, 5, 3, 64)
    with pytest.raises(ValueError, match=message):
        call(x, torch.ones(40, 32))
    assert torch.equal(x, before)


def test_compiles(device):
    cos, sin = (draw(40, 32, dtype=torch.float32, device=device, seed=i).sin() for i in (1, 2))
    x = draw(2, 7, 3, 64, dtype=torch.float32, device=device)
    positions = torch.arange(14, device=device)

    def both(x):
        y = flash_attn.apply_rotary_emb(x, cos, sin)
        return flashinfer.apply_rope_pos_ids(y.flatten(0, 1), y.flatten(0, 1), positions)[0]

    want = both(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(both, backend="aot_eager", fullgraph=True)(x), want)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens without a row in the table, and tables of another pairing


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "offsets", [-2, torch.tensor([-2, 0]), torch.tensor([-9, 3], dtype=torch.int32), torch.tensor([30, 0])]
)
def test_flash_attn_leaves_tokens_without_a_row(offsets, inplace):
    """Left padding by negative offsets, and past the last row: x as it is. flash-attn's kernel loads 1 and 0 there."""
    cos, sin = ropewalk.Frequencies(1e4, 16).table(32, torch.float32)
    x = torch.randn(2, 6, 2, 24, generator=torch.Generator().manual_seed(3))
    positions = (
        torch.arange(6) + (offsets[:, None] if isinstance(offsets, torch.Tensor) else offsets) + torch.zeros(2, 1)
    )
    inside = (positions >= 0) & (positions < 32)
    assert not inside.all() and inside.any()
    clean = positions.clamp(0, 31).long()
    c, s = cos[clean][:, :, None], sin[clean][:, :, None]
    a, b = x[..., :8], x[..., 8:16]
    want = torch.where(inside[..., None, None], torch.cat([a * c - b * s, b * c + a * s, x[..., 16:]], -1), x)
    leaf = x.clone().requires_grad_()
    got = flash_attn.apply_rotary_emb(leaf * 1 if inplace else leaf, cos, sin, inplace=inplace, seqlen_offsets=offsets)
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-6)
    assert torch.equal(got.detach()[~inside], x[~inside])  # to the bit
    (got * want).sum().backward()  # the gradient is the rotation back, and 1 where nothing was turned
    torch.testing.assert_close(leaf.grad, x, rtol=0, atol=1e-5)
    if inplace:
        with torch.no_grad():
            there = x.clone()
            assert flash_attn.apply_rotary_emb(there, cos, sin, inplace=True, seqlen_offsets=offsets) is there
            torch.testing.assert_close(there, want, rtol=0, atol=1e-6)
    ropewalk.check_faults()  # none is recorded


def test_flash_attn_leaves_rows_behind_the_last_sequence():
    cos, sin = ropewalk.Frequencies(1e4, 16).table(4, torch.float32)
    x = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(3))
    begins = torch.tensor([0, 2, 5], dtype=torch.int32)
    got = flash_attn.apply_rotary_emb(x, cos, sin, cu_seqlens=begins, max_seqlen=4)
    assert torch.equal(got[5:], x[5:])
    whole = flash_attn.apply_rotary_emb(x[None, 2:5], cos, sin)[0]
    assert torch.equal(got[2:5], whole)
    padded = flash_attn.apply_rotary_emb(x, cos, sin, cu_seqlens=begins, seqlen_offsets=torch.tensor([-1, 2]))
    assert torch.equal(padded[0], x[0]) and torch.equal(padded[4:], x[4:]) and padded.isfinite().all()


def test_padding_stays_out_of_the_real_tokens():
    """NaN in padding rows would go through the softmax's zero weights into every real token."""
    cos, sin = ropewalk.Frequencies(1e4, 16).table(32, torch.float32)
    generator = torch.Generator().manual_seed(4)
    offsets = torch.tensor([-2, 0])
    q, k, v = (torch.randn(2, 6, 2, 16, generator=generator) for _ in range(3))
    q, k = (flash_attn.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets) for x in (q, k))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, :, :, :2] = False
    mask[0, :, :2, 0] = True
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    assert out.isfinite().all()


def angles_of(pairing, dim=16, tokens=6):
    angle = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angle, angle], -1) if pairing == "neox" else angle.repeat_interleave(2, -1)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_of_another_pairing_are_refused(dtype, batched):
    """A table a a b b .. with halves, or a b .. a b .. with neighbours: half of its entries would be passed over."""
    x = torch.randn(1, 4, 6, 16)
    right = {
        "apply_rotary_pos_emb": ("neox", lambda c, s: transformers.apply_rotary_pos_emb(x, x, c, s)),
        "liger_rotary_pos_emb": ("neox", lambda c, s: liger.liger_rotary_pos_emb(x, x, c, s)),
        "apply_rotary_emb": ("interleaved", lambda c, s: diffusers.apply_rotary_emb(x, (c, s))),
        "apply_rotary_emb ": (
            "neox",
            lambda c, s: diffusers.apply_rotary_emb(x, (c, s), use_real_unbind_dim=-2),
        ),
    }
    for name, (pairing, call) in right.items():
        for given in ("neox", "interleaved"):
            angle = angles_of(given)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            if batched and "apply_rotary_emb" != name.strip():
                cos, sin = cos[None], sin[None]
            if given == pairing:
                call(cos, sin)
                continue
            match = rf"{name.strip()}: (cos|sin) must hold the entry of each pair twice, .* but the two differ"
            with pytest.raises(ValueError, match=match):
                call(cos, sin)
            with pytest.raises(ValueError, match=match):  # also if the first rows alone are the same
                call(torch.cat([cos[..., :1, :] * 0 + 1] * 5 + [cos[..., -1:, :]], -2), sin * 0)
    nan = torch.full((6, 16), float("nan"))
    assert transformers.apply_rotary_pos_emb(x, x, nan, nan)[0].isnan().all()  # equal, if no numbers
