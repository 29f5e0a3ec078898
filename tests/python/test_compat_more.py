"""Functions of `ropewalk.compat` that the other test files do not have, each against its formula in float64, written
out here."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from ropewalk.compat import flash_attn, liger, rotary, sgl_kernel_xpu, sglang_jit, transformer_engine, vllm

TOKENS, ROWS, HEAD = 9, 40, 64
DTYPES = [torch.float32, torch.bfloat16]


def near(got: Any, want: Any) -> None:
    """Within one rounding of the dtype, and float32's own arithmetic."""
    rtol = 2e-6 if got.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), want.double().reshape(got.shape), rtol=rtol, atol=2e-6 + rtol / 8)


def tables(rows: int = ROWS, width: int = HEAD) -> tuple[Any, Any]:
    angles = torch.arange(rows)[:, None].double() * 1e4 ** (-torch.arange(0, width, 2).double() / width)
    return angles.cos(), angles.sin()


def turned(x: Any, cos: Any, sin: Any, neox: bool = True) -> Any:
    """x: [.., tokens, heads, head_dim]; cos, sin: [.., tokens, pairs]."""
    x, cos, sin = x.double(), cos.double().unsqueeze(-2), sin.double().unsqueeze(-2)
    pairs = cos.shape[-1]
    part, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (part[..., :pairs], part[..., pairs:]) if neox else (part[..., ::2], part[..., 1::2])
    new = a * cos - b * sin, a * sin + b * cos
    part = torch.cat(new, -1) if neox else torch.stack(new, -1).flatten(-2)
    return torch.cat((part, rest), -1)


def normed(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight.double()


def random(*shape: int, dtype: Any = torch.float32, seed: int = 1) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache() -> Any:
    return torch.cat(tables(), -1).float()


def by_axes(positions: Any, axes: list[int]) -> tuple[Any, Any]:
    cos, sin = tables()
    return tuple(torch.stack([t[positions[axis], i] for i, axis in enumerate(axes)], -1) for t in (cos, sin))


POSITIONS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [35, 8, 9, 7, 9, 3, 2, 3, 8], [4, 6, 2, 6, 4, 33, 8, 3, 2]])
BLOCKS = [0] * 8 + [1] * 12 + [2] * 12
TURNS = [i % 3 if i < 3 * (12, 10, 10)[i % 3] else 0 for i in range(32)]
GLM = [0, 1, 2] * 8 + [1, 2] * 4
SECTIONS = {"blocks": ([8, 12, 12], BLOCKS), "turns": ([12, 10, 10], TURNS), "glm": ([8, 12, 12], GLM)}


@pytest.mark.parametrize("form", SECTIONS)
@pytest.mark.parametrize("function", [sglang_jit.triton_mrope_fused, sgl_kernel_xpu.multimodal_rotary_embedding])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
def test_mrope_of_sglang(function: Any, form: str, dtype: Any, neox: bool) -> None:
    section, axes = SECTIONS[form]
    q, k = random(TOKENS, 4 * HEAD, dtype=dtype), random(TOKENS, 2 * HEAD, dtype=dtype, seed=2)
    cos, sin = by_axes(POSITIONS, axes)
    want = [turned(x.unflatten(1, (-1, HEAD)), cos, sin, neox) for x in (q, k)]
    axis_map = torch.tensor(axes) if form == "glm" else None
    assert (
        function(q, k, cache(), POSITIONS, section, HEAD, HEAD, form != "blocks", form == "glm", neox, axis_map) is None
    )
    near(q, want[0])
    near(k, want[1])


def test_mrope_names_what_does_not_fit() -> None:
    q = random(TOKENS, 4 * HEAD)
    before = q.clone()
    args = (HEAD, HEAD, False, False, True, None)
    with pytest.raises(
        ValueError, match=r"triton_mrope_fused: mrope_section must be 32 pairs in all, but is \[8, 12, 1\]"
    ):
        sglang_jit.triton_mrope_fused(q, q, cache(), POSITIONS, [8, 12, 1], *args)
    with pytest.raises(ValueError, match=r"positions must be \[3, tokens\], but is \[9\]"):
        sglang_jit.triton_mrope_fused(q, q, cache(), POSITIONS[0], [8, 12, 12], *args)
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mrope_of_vllm(dtype: Any) -> None:
    row = random(TOKENS, 8 * HEAD, dtype=dtype)
    q_weight, k_weight = random(HEAD, dtype=dtype, seed=3), random(HEAD, dtype=dtype, seed=4)
    heads = row.unflatten(1, (8, HEAD)).clone()
    cos, sin = by_axes(POSITIONS, BLOCKS)
    vllm.fused_qk_norm_mrope(row, 4, 2, 2, HEAD, 1e-6, q_weight, k_weight, cache(), True, POSITIONS, 8, 12)
    new = row.unflatten(1, (8, HEAD))
    near(new[:, :4], turned(normed(heads[:, :4], q_weight), cos, sin))
    near(new[:, 4:6], turned(normed(heads[:, 4:6], k_weight), cos, sin))
    assert torch.equal(new[:, 6:], heads[:, 6:])
    q = random(TOKENS, 4, HEAD, dtype=dtype)
    want = turned(q, cos, sin, False)
    vllm.multimodal_rotary_embedding(POSITIONS, q, None, HEAD, cache(), False, [8, 12, 12])
    near(q, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stores", [False, True])
def test_norm_and_mrope_of_sglang(dtype: Any, stores: bool) -> None:
    q, k, v = (random(TOKENS, n, HEAD, dtype=dtype, seed=n) for n in (4, 2, 3))
    v = v[:, :2].contiguous()
    q_weight, k_weight = random(HEAD, dtype=dtype, seed=5), random(HEAD, dtype=dtype, seed=6)
    cos, sin = by_axes(POSITIONS, GLM)
    want = turned(normed(q, q_weight), cos, sin), turned(normed(k, k_weight), cos, sin)
    caches = torch.zeros(20, 2 * HEAD, dtype=dtype), torch.zeros(20, 2 * HEAD, dtype=dtype)
    slots = torch.randperm(20)[:TOKENS]
    more = dict(value=v, key_cache=caches[0], value_cache=caches[1], slots=slots) if stores else {}
    sglang_jit.fused_qk_norm_mrope(q, k, q_weight, k_weight, cache(), POSITIONS, torch.tensor(GLM), 1e-6, **more)
    near(q, want[0])
    near(k, want[1])
    if stores:
        assert torch.equal(caches[0][slots], k.flatten(1)) and torch.equal(caches[1][slots], v.flatten(1))
        assert int((caches[0].abs().sum(1) > 0).sum()) == TOKENS


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_qk_norm_rope(dtype: Any) -> None:
    row = random(TOKENS, 8 * HEAD, dtype=dtype)
    heads = row.unflatten(1, (8, HEAD)).clone()
    q_weight, k_weight = random(HEAD, dtype=dtype, seed=3), random(HEAD, dtype=dtype, seed=4)
    cos, sin = (t[POSITIONS[0]] for t in tables())
    sglang_jit.table_qk_norm_rope_(row, POSITIONS[0], q_weight, k_weight, cache(), 4, 2, HEAD, 1e-6)
    new = row.unflatten(1, (8, HEAD))
    near(new[:, :4], turned(normed(heads[:, :4], q_weight), cos, sin))
    near(new[:, 4:6], turned(normed(heads[:, 4:6], k_weight), cos, sin))
    assert torch.equal(new[:, 6:], heads[:, 6:])
    with pytest.raises(ValueError, match="with at least num_q_heads \\+ num_k_heads = 9 heads"):
        sglang_jit.table_qk_norm_rope_(row, POSITIONS[0], q_weight, k_weight, cache(), 7, 2, HEAD, 1e-6)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_rope_reshape_and_cache(in_place: bool, fp8: bool) -> None:
    q, k, v = (random(TOKENS, n, HEAD, dtype=torch.bfloat16, seed=n) for n in (4, 2, 2))
    cos, sin = (t[POSITIONS[0] + 2] for t in tables())
    want = turned(q, cos, sin), turned(k, cos, sin)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    caches = torch.zeros(4, 8, 2, HEAD, dtype=dtype), torch.zeros(4, 8, 2, HEAD, dtype=dtype)
    slots = torch.randperm(32)[: TOKENS - 1]
    scales = (torch.tensor(0.5), torch.tensor(0.25)) if fp8 else (None, None)
    outs = {"q_out": q, "k_out": k} if in_place else {}
    got = sglang_jit.fused_qk_rope_reshape_and_cache(
        q, k, v, *caches, slots, POSITIONS[0], cache(), *scales, True, True, offs=torch.full((TOKENS,), 2), **outs
    )
    assert len(got) == 5 and got[2] is caches[0] and (got[0] is q) == in_place and not got[4].any()
    near(got[0], want[0])
    near(got[1], want[1])
    rows = caches[0].float().flatten(0, 1)[slots] * (0.5 if fp8 else 1.0)
    torch.testing.assert_close(rows.double(), want[1][:-1], rtol=2**-4 if fp8 else 2**-8, atol=1e-2)
    with pytest.raises(ValueError, match="flash_layout must be True, but is False"):
        sglang_jit.fused_qk_rope_reshape_and_cache(q, k, v, *caches, slots, POSITIONS[0], cache(), *scales, True, False)


@pytest.mark.parametrize("as_complex", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_q_and_rotation_of_its_end(dtype: Any, as_complex: bool) -> None:
    q, out = random(TOKENS, 4, 192, dtype=dtype), torch.empty(TOKENS, 4, 192, dtype=dtype)
    cos, sin = tables()
    table = torch.complex(cos.float(), sin.float()) if as_complex else torch.stack((cos, sin), -1).flatten(1).float()
    want = normed(q, None)
    want[..., 128:] = turned(want[..., 128:], cos[POSITIONS[0]], sin[POSITIONS[0]], False)
    before = q.clone()
    sgl_kernel_xpu.fused_q_norm_rope(q, out, table, POSITIONS[0], 1e-6)
    near(out, want)
    assert torch.equal(q, before)


def test_q_of_another_dtype_than_what_is_stored() -> None:
    q, k = random(TOKENS, 4, HEAD, dtype=torch.float16), random(TOKENS, 2, HEAD, dtype=torch.bfloat16)
    v = random(TOKENS, 2, HEAD, dtype=torch.bfloat16, seed=3)
    caches = torch.zeros(20, 2 * HEAD).bfloat16(), torch.zeros(20, 2 * HEAD).bfloat16()
    slots = torch.randperm(20)[:TOKENS]
    cos, sin = (t[POSITIONS[0]] for t in tables())
    want = turned(q, cos, sin), turned(k, cos, sin)
    sglang_jit.apply_rope_inplace_with_kvcache(q, k, v, *caches, cache(), POSITIONS[0], slots, is_neox=True)
    near(q, want[0])
    near(k, want[1])
    assert torch.equal(caches[0][slots], k.flatten(1)) and torch.equal(caches[1][slots], v.flatten(1))
    before = q.clone()
    with pytest.raises(ValueError, match="out_loc"):
        sglang_jit.apply_rope_inplace_with_kvcache(q, k, v, *caches, cache(), POSITIONS[0], slots[1:], is_neox=True)
    assert torch.equal(q, before)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_errors_of_positions_are_of_both_kinds(error: Any) -> None:
    q, k, v = (random(TOKENS, 2, HEAD) for _ in range(3))
    caches = torch.zeros(20, 2 * HEAD), torch.zeros(20, 2 * HEAD)
    slots = torch.arange(TOKENS)
    call = sgl_kernel_xpu.apply_rope_inplace_with_kvcache
    with pytest.raises(error, match=r"positions has 8 tokens, but q has 9: positions.size\(0\) must be q's"):
        call(q, k, v, *caches, cache(), POSITIONS[0][1:], slots, True)
    with pytest.raises(error, match="out_loc must be 1-D"):
        call(q, k, v, *caches, cache(), POSITIONS[0], slots[None], True)


# ---------------------------------------------------------------------------------------------------------------------
# flash-attn


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tables_of_k", [False, True])
@pytest.mark.parametrize("offsets", ["none", "number", "tensor", "past the table"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_rows_in_place(grouped: bool, tables_of_k: bool, offsets: str, interleaved: bool) -> None:
    qkv = random(2, TOKENS, *((8,) if grouped else (3, 4)), HEAD)
    first = {"none": 0, "number": 3, "tensor": torch.tensor([2, 7]), "past the table": torch.tensor([34, -4])}[offsets]
    cos, sin = tables()
    k_cos, k_sin = (cos.flip(0), sin.flip(0)) if tables_of_k else (cos, sin)
    rows = torch.arange(TOKENS) + (first[:, None] if isinstance(first, torch.Tensor) else first)
    inside = (rows >= 0) & (rows < ROWS)
    rows = rows.clamp(0, ROWS - 1).expand(2, -1)
    heads = (qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]) if grouped else qkv.unbind(2)
    want_q, want_k = (
        turned(heads[0], cos[rows], sin[rows], not interleaved),
        turned(heads[1], k_cos[rows], k_sin[rows], not interleaved),
    )
    keep = ~inside.expand(2, -1)
    want_q[keep], want_k[keep] = heads[0][keep].double(), heads[1][keep].double()
    v = heads[2].clone()
    k_tables = (k_cos.float(), k_sin.float()) if tables_of_k else (None, None)
    got = flash_attn.apply_rotary_emb_qkv_(
        qkv, cos.float(), sin.float(), *k_tables, interleaved, first, 4 if grouped else None
    )
    assert got is qkv
    near(heads[0], want_q)
    near(heads[1], want_k)
    assert torch.equal(heads[2], v)


def test_k_of_packed_kv_in_place() -> None:
    kv = random(2, TOKENS, 2, 3, HEAD)
    cos, sin = (t[:TOKENS] for t in tables())
    want, v = turned(kv[:, :, 0], cos, sin), kv[:, :, 1].clone()
    assert flash_attn.apply_rotary_emb_kv_(kv, cos.float(), sin.float()) is kv
    near(kv[:, :, 0], want)
    assert torch.equal(kv[:, :, 1], v)


@pytest.mark.parametrize("leaf", [True, False])
def test_gradient_of_packed_rows(leaf: bool) -> None:
    """The gradient of a rotation is the rotation by the negative angles; v's goes through."""
    x = random(2, TOKENS, 3, 4, HEAD).requires_grad_()
    cos, sin = (t[:TOKENS].float() for t in tables())
    new = flash_attn.apply_rotary_emb_qkv_(x if leaf else x * 1.0, cos, sin)
    factor = random(2, TOKENS, 3, 4, HEAD, seed=2)
    (new * factor).sum().backward()
    want = factor.double().clone()
    for i in range(2):
        want[:, :, i] = turned(factor[:, :, i], cos, -sin)
    near(x.grad, want)


@pytest.mark.parametrize("kind", ["leaf", "view", "copy", "view of a leaf"])
@pytest.mark.parametrize("varlen", [False, True])
def test_in_place_with_a_gradient(kind: str, varlen: bool) -> None:
    start = random(2, TOKENS, 3, 4, HEAD) if "view" in kind else random(2, TOKENS, 4, HEAD)
    start = start.requires_grad_()
    whole = start * 1.0 if kind in ("view", "copy") else start
    x = whole[:, :, 0] if "view" in kind else whole
    cos, sin = (t.float() for t in tables())
    old = x.detach().clone()
    if varlen:
        x = x.flatten(0, 1) if kind != "leaf" else x
        if kind == "leaf":
            start = x = start.detach().flatten(0, 1).requires_grad_()
        bounds = torch.tensor([0, 5, 2 * TOKENS - 3], dtype=torch.int32)
        rows = torch.cat((torch.arange(5), torch.arange(2 * TOKENS - 8), torch.zeros(3).long()))
        new = flash_attn.apply_rotary_emb(x, cos, sin, inplace=True, cu_seqlens=bounds)
        want = turned(old.flatten(0, 1), cos[rows], sin[rows])
        want[-3:] = old.flatten(0, 1)[-3:].double()
    else:
        rows = torch.arange(TOKENS)
        new = flash_attn.apply_rotary_emb(x, cos, sin, inplace=True)
        want = turned(old, cos[rows], sin[rows])
    near(new.detach(), want)
    near(x.detach(), want)  # in place
    factor = random(*new.shape, seed=2)
    (new * factor).sum().backward()
    back = turned(factor, cos[rows], -sin[rows])
    if varlen:
        back[-3:] = factor[-3:].double()
    near(start.grad[:, :, 0] if "view" in kind else start.grad, back)


def test_full_graph_with_a_gradient() -> None:
    from ropewalk.compat.diffusers import apply_rotary_emb as of_diffusers

    cos, sin = (t[:TOKENS].float() for t in tables())
    wide = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    for call, shape in ((lambda x: flash_attn.apply_rotary_emb(x, cos, sin), (2, TOKENS, 4, HEAD)),
                        (lambda x: of_diffusers(x, wide), (2, 4, TOKENS, HEAD))):  # fmt: skip
        torch._dynamo.reset()
        x = random(*shape).requires_grad_()
        plain = x.detach().clone().requires_grad_()
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
        want = call(plain)
        near(got.detach(), want.detach())
        (got * got.detach()).sum().backward()
        (want * want.detach()).sum().backward()
        near(x.grad, plain.grad)


# ---------------------------------------------------------------------------------------------------------------------
# The others


@pytest.mark.parametrize("lie", ["halves", "neighbours", "apart"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("conj", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_given_apart(lie: str, in_place: bool, conj: bool, dtype: Any) -> None:
    x = random(2, TOKENS, 4, HEAD, dtype=dtype)
    cos, sin = (t[:TOKENS, None].float() for t in tables())

    def split(x: Any) -> tuple[Any, Any]:
        a, b = (x[..., ::2], x[..., 1::2]) if lie == "neighbours" else (x[..., : HEAD // 2], x[..., HEAD // 2 :])
        return (a.clone(), b.clone()) if lie == "apart" else (a, b)

    x1, x2 = split(x)
    want = turned(torch.cat((x1, x2), -1), cos[:, 0], sin[:, 0] * (-1 if conj else 1))
    out1, out2 = (x1, x2) if in_place else split(torch.empty_like(x))
    before = x.clone()
    rotary.apply_rotary(x1, x2, cos, sin, out1, out2, conj)
    near(torch.cat((out1, out2), -1), want)
    assert in_place or torch.equal(x, before)


def test_transformers_form_of_rotary() -> None:
    q, k = random(2, 4, TOKENS, HEAD), random(2, 2, TOKENS, HEAD, seed=2)
    cos, sin = (t[:TOKENS].float() for t in tables())
    got = rotary.apply_rotary_transformers(q, k, *(torch.cat((t, t), -1)[None] for t in (cos, sin)))
    for new, old in zip(got, (q, k), strict=True):
        near(new, turned(old.transpose(1, 2), cos, sin).transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
def test_new_tensors_of_vllm(dtype: Any, neox: bool) -> None:
    q, k = random(TOKENS, 4, HEAD, dtype=dtype), random(TOKENS, 1, HEAD, dtype=dtype, seed=2)
    before = q.clone()
    cos, sin = (t[POSITIONS[0]] for t in tables())
    near(vllm.apply_rotary_emb(q, cos.float(), sin.float(), neox), turned(q, cos, sin, neox))
    cos, sin = (t[POSITIONS[0] + 1] for t in tables())
    got = vllm.deepseek_scaling_rope(POSITIONS[0], q, k, torch.ones(TOKENS).long(), cache(), HEAD, neox)
    near(got[0], turned(q, cos, sin, neox))
    near(got[1], turned(k, cos, sin, neox))
    assert torch.equal(q, before)


def with_gradient(call: Any, *xs: Any) -> tuple[Any, Any]:
    xs = tuple(x.detach().clone().requires_grad_() for x in xs)
    out = call(*xs)
    sum((y * y.detach()).sum() for y in out).backward()
    return out, [x.grad for x in xs]


@pytest.mark.parametrize("dtype", DTYPES)
def test_liger(dtype: Any) -> None:
    q, k = random(2, 4, TOKENS, HEAD, dtype=dtype), random(2, 2, TOKENS, HEAD, dtype=dtype, seed=2)
    cos, sin = (t[:TOKENS].float() for t in tables())
    twice = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    got, gradients = with_gradient(lambda q, k: liger.liger_rotary_pos_emb_gpt_oss(q, k, cos[None], sin[None]), q, k)
    for new, old, gradient in zip(got, (q, k), gradients, strict=True):
        near(new.detach(), turned(old.transpose(1, 2), cos, sin).transpose(1, 2))
        near(gradient, turned(new.detach().transpose(1, 2), cos, -sin).transpose(1, 2))
    for a, b in zip(liger.liger_rotary_pos_emb(q, k, *twice, rotary_dim=HEAD), got, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="cos and sin must be rotary_dim, 32, or half of it wide, but are 64 wide"):
        liger.liger_rotary_pos_emb(q, k, *twice, rotary_dim=32)
    flat = q[0].transpose(0, 1), k[0].transpose(0, 1)
    got, _ = with_gradient(lambda q, k: liger.liger_rotary_pos_emb_vision(q, k, *(t[0] for t in twice)), *flat)
    near(got[0].detach(), turned(flat[0], cos, sin))
    three = [torch.stack([t[POSITIONS[a]] for a in range(3)])[:, None].float() for t in tables()]
    three = [torch.cat((t, t), -1) for t in three]
    got, gradients = with_gradient(lambda q, k: liger.liger_multimodal_rotary_pos_emb(q, k, *three, [8, 12, 12]), q, k)
    cos, sin = by_axes(POSITIONS, BLOCKS)
    near(got[1].detach(), turned(k.transpose(1, 2), cos, sin).transpose(1, 2))
    near(gradients[1], turned(got[1].detach().transpose(1, 2), cos, -sin).transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("conjugated", [False, True])
def test_llama4_of_liger(dtype: Any, dims: int, conjugated: bool) -> None:
    q, k = random(2, TOKENS, 4, HEAD, dtype=dtype), random(2, TOKENS, 2, HEAD, dtype=dtype, seed=2)
    cos, sin = (t[:TOKENS] for t in tables())
    table = torch.complex(cos, sin)
    table = table.conj() if conjugated else table
    sign = -1 if conjugated else 1
    shaped = {2: table, 3: table[None], 4: table[None, :, None]}[dims]
    call = liger.liger_llama4_vision_rotary_pos_emb if dims == 4 else liger.liger_llama4_text_rotary_pos_emb
    got, gradients = with_gradient(lambda q, k: call(q, k, shaped), q, k)
    near(got[0].detach(), turned(q, cos, sign * sin, False))
    near(gradients[1], turned(got[1].detach(), cos, -sign * sin, False))
    if dims == 4:
        near(call(q, k, cos.float())[0], turned(q, cos, 0 * sin, False))
    else:
        with pytest.raises(ValueError, match="freqs_cis must be complex, but is torch.float32"):
            call(q, k, cos.float())


@pytest.mark.parametrize("layout", ["sbhd", "bshd", "thd"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_transformer_engine(layout: str, interleaved: bool, starts: bool) -> None:
    x = random(2, TOKENS, 4, HEAD + 16)
    angles = (torch.arange(ROWS)[:, None] * 1e4 ** (-torch.arange(0, HEAD, 2) / HEAD)).float()
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    first = torch.tensor([3, 11])
    rows = torch.arange(TOKENS) + (first[:, None] if starts else torch.zeros(2, 1).long())
    cos, sin = angles.double().cos()[rows], angles.double().sin()[rows]
    want, back = turned(x, cos, sin, not interleaved), lambda g: turned(g, cos, -sin, not interleaved)
    given = {"sbhd": x.transpose(0, 1), "bshd": x, "thd": x.flatten(0, 1)}[layout]
    bounds = torch.tensor([0, TOKENS, 2 * TOKENS], dtype=torch.int32) if layout == "thd" else None
    got, gradients = with_gradient(
        lambda t: (transformer_engine.apply_rotary_pos_emb(
            t, wide[:, None, None], layout, first if starts else None, interleaved, cu_seqlens=bounds),),
        given,
    )  # fmt: skip

    def plain(y: Any) -> Any:
        return y.transpose(0, 1) if layout == "sbhd" else y.unflatten(0, (2, -1)) if layout == "thd" else y

    near(plain(got[0].detach()), want)
    near(plain(gradients[0]), back(plain(got[0].detach())))
    with pytest.raises(ValueError, match="cp_size must be 1"):
        transformer_engine.apply_rotary_pos_emb(given, wide[:, None, None], layout, cu_seqlens=bounds, cp_size=2)
