"""The functions with a gradient: what autograd keeps of a call, and what has no gradient."""

# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import pytest
import ropewalk
import ropewalk.compat
import torch
from ropewalk.compat import diffusers, flash_attn, liger, sgl_kernel, sglang_jit, transformers, vllm

COS, SIN = ropewalk.Frequencies(theta=1e4, rotary_dim=16).table(8, torch.float32)
WIDE = torch.cat([COS, COS], -1)[:6], torch.cat([SIN, SIN], -1)[:6]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged(x, cos, sin):
    return flash_attn.apply_rotary_emb(x[0], cos, sin, cu_seqlens=torch.tensor([0, 2, 6]), seqlen_offsets=1)


def inplace(x, cos, sin):
    return flash_attn.apply_rotary_emb(x * 1, cos, sin, inplace=True)


# The function, x and the tables as it takes them, and what its caller calls the tables.
CASES = {
    "flash_attn": (flash_attn.apply_rotary_emb, (1, 6, 2, 16), (COS, SIN), ("cos", "sin")),
    "flash_attn in place": (inplace, (1, 6, 2, 16), (COS, SIN), ("cos", "sin")),
    "flash_attn ragged": (ragged, (1, 6, 2, 16), (COS, SIN), ("cos", "sin")),
    "liger": (lambda x, c, s: liger.liger_rotary_pos_emb(x, x, c, s)[0], (1, 2, 6, 16), WIDE, ("cos", "sin")),
    "transformers": (lambda x, c, s: transformers.apply_rotary_pos_emb(x, x, c, s)[1], (1, 2, 6, 16), WIDE,
                     ("cos", "sin")),
    "diffusers": (lambda x, c, s: diffusers.apply_rotary_emb(x, (c, s), use_real_unbind_dim=-2), (1, 2, 6, 16), WIDE,
                  ("cos", "sin")),
    "diffusers complex": (lambda x, c: diffusers.apply_rotary_emb(x, c, use_real=False), (1, 6, 2, 16),
                          (torch.complex(COS[:6], SIN[:6]),), ("freqs_cis",)),
}  # fmt: skip


def case(name):
    function, shape, tables, names = CASES[name]
    return function, draw(*shape).requires_grad_(), [t.clone() for t in tables], names


@pytest.mark.parametrize("name", CASES)
def test_tables_rewritten_before_the_gradient(name):
    function, x, tables, _ = case(name)
    want = torch.autograd.grad(function(x, *tables).sum(), x)[0]
    out = function(x, *tables)
    assert torch.equal(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], want)
    for table in tables:
        out = function(x, *tables)
        table.copy_(table.flip(0).clone())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_positions_rewritten_before_the_gradient():
    x, positions = draw(1, 6, 2, 16).requires_grad_(), torch.arange(6)
    from ropewalk.compat import _common

    out = _common.differentiable("f", {}, x, None, positions=positions[None], cos=COS, sin=SIN)[0]
    positions += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_tables_that_require_grad_are_refused(name, recorded):
    function, x, tables, names = case(name)
    for i, table in enumerate(tables):
        given = [t.clone().requires_grad_() if j == i else t for j, t in enumerate(tables)]
        with pytest.raises(ValueError, match=f"{names[i]} requires grad, .*{names[i]}.detach()"):
            function(x if recorded else x.detach(), *given)
        with torch.no_grad():
            function(x, *given)
        function(x, *(t.detach() for t in given))
        assert table.grad is None


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_the_gradient(name):
    """It is linear: the gradient of y^2's gradient is by the chain rule that of torch's own operations."""
    function, x, tables, _ = case(name)

    def penalty(rotate, x):
        gradient = torch.autograd.grad((rotate(x) ** 3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad((gradient**2).sum(), x)[0]

    got = penalty(lambda x: function(x, *tables), x)
    wide = x.detach().double().requires_grad_()
    # The matrix of the rotation, by its columns.
    flat = torch.stack([function(e.view_as(x), *tables).flatten() for e in torch.eye(x.numel())], 1).double()
    want = penalty(lambda x: flat @ x.flatten(), wide)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", [name for name in CASES if "place" not in name])
def test_functional_transforms(name):
    function, x, tables, _ = case(name)
    x = x.detach()
    got = torch.func.grad(lambda x: (function(x, *tables) ** 3).sum())(x)
    y = x.clone().requires_grad_()
    assert torch.equal(got, torch.autograd.grad((function(y, *tables) ** 3).sum(), y)[0])
    if "ragged" not in name:  # which looks at its numbers
        both = torch.stack([x, x + 1])
        got = torch.vmap(lambda x: function(x, *tables))(both)
        assert torch.equal(got, torch.stack([function(x, *tables) for x in both]))


def test_complex_tables_of_two_sizes_and_conjugated():
    x, table = draw(1, 6, 2, 16), torch.polar(torch.ones(6, 8), draw(6, 8, seed=1))

    def rotate(x, table):
        return diffusers.apply_rotary_emb(x, table, use_real=False)

    want = rotate(x, table)
    assert torch.equal(rotate(x, table.to(torch.complex128)), want)
    assert torch.equal(rotate(x, table[None].to(torch.complex128)), want)
    pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)))
    for given in (table.conj(), table.to(torch.complex128).conj(), table.conj().resolve_conj()):
        back = torch.view_as_real(pairs * table.conj()[None, :, None]).flatten(-2)
        assert torch.allclose(rotate(x, given), back, atol=1e-6)
        assert torch.allclose(rotate(want, given), x, atol=1e-6)
    for wrong, match in ((table[:5], "freqs_cis"), (table.real, "freqs_cis must be complex")):
        with pytest.raises(ValueError, match=match) as error:
            rotate(x, wrong)
        assert "sin" not in str(error.value).split() and "cos" not in str(error.value).split()


def test_weights_that_require_grad_are_refused():
    """They would get no gradient, and nobody would notice."""
    weight, positions = torch.nn.Parameter(torch.ones(64)), torch.arange(4)
    cache = torch.cat(ropewalk.Frequencies(1e4, 64).table(8, torch.float32), -1)
    q, k, qkv = draw(4, 2, 64), draw(4, 1, 64), draw(4, 4 * 64)
    calls = [
        lambda w: sglang_jit.fused_inplace_qknorm_rope(q, k, w, w.detach(), cache, positions, is_neox=True),
        lambda w: sgl_kernel.fused_qk_norm_rope(qkv, 2, 1, 1, 64, 1e-6, w, w.detach(), 1e4, True, positions, 1.0, 1.0,
                                                1.0, 1.0),
        lambda w: vllm.fused_qk_norm_rope(qkv, 2, 1, 1, 64, 1e-6, w, w.detach(), cache, True, positions),
    ]  # fmt: skip
    for call in calls:
        before = q.clone(), qkv.clone()
        with pytest.raises(ValueError, match="q_weight requires grad, .* torch.no_grad"):
            call(weight)
        assert torch.equal(q, before[0]) and torch.equal(qkv, before[1])
        with torch.no_grad():
            call(weight)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_table_under_a_default_device(device):
    f = ropewalk.Frequencies(1e4, 16)
    with torch.device(device):
        cos, sin = f.table(8, torch.float32)
    assert torch.equal(cos, COS) and torch.equal(sin, SIN) and cos.device.type == "cpu"


def unlike_halves():
    generator = torch.Generator().manual_seed(3)
    cos, sin = torch.randn(2, 2, 5, 16, generator=generator)
    return torch.randn(2, 3, 5, 16, generator=generator), cos, sin


def test_tables_of_two_unlike_halves_are_refused_everywhere():
    from ropewalk.compat import liger, transformer_engine, transformers
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(q, cos, sin):
        return transformers.apply_rotary_pos_emb(q, q, cos, sin)[0]

    def over_batch(q, cos, sin):
        return torch.vmap(lambda q, c, s: call(q[None], c[None], s[None])[0])(q, cos, sin)

    q, cos, sin = unlike_halves()
    fit = torch.cat([cos[..., :8]] * 2, -1)
    calls = [call, over_batch]
    calls += [torch.compile(each, backend="aot_eager") for each in (call, over_batch)]
    calls += [torch.jit.trace(call, (q, fit, fit), check_trace=False)]
    calls += [make_fx(call, tracing_mode=mode)(q, fit, fit) for mode in ("real", "fake")]
    for each in calls:
        assert torch.equal(each(q, fit, fit), call(q, fit, fit))
        with pytest.raises(Exception, match="apply_rotary_pos_emb: cos must hold the entry of each pair twice"):
            each(q, cos, sin)
    with pytest.raises(ValueError, match="freqs must hold the entry of each pair twice"):
        transformer_engine.apply_rotary_pos_emb(torch.randn(5, 2, 3, 16), torch.randn(5, 1, 1, 16))
    table = torch.randn(3, 2, 5, 16)
    with pytest.raises(ValueError, match="cos must hold the entry of each pair twice"):
        liger.liger_multimodal_rotary_pos_emb(q, q, table, table, [3, 3, 2])


@pytest.mark.parametrize("inplace", [False, True])
def test_flash_attn_under_grad_and_vmap(inplace):
    from ropewalk.compat import flash_attn

    cos, sin = torch.randn(2, 6, 8)
    q = torch.randn(2, 6, 2, 16)

    def of(call):
        f = lambda x: call(x * 1)  # noqa: E731
        return (torch.func.grad(lambda z: torch.vmap(f)(z).pow(3).sum())(q),
                torch.vmap(torch.func.grad(lambda z: f(z).pow(3).sum()))(q))  # fmt: skip

    def chain(x):
        c, s = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
        return x * c + torch.cat([-x[..., 8:], x[..., :8]], -1) * s

    def packed(x):
        return flash_attn.apply_rotary_emb_kv_(torch.stack([x, x], 1)[None] * 1, cos, sin)[0, :, 0]

    for call in (lambda x: flash_attn.apply_rotary_emb(x[None], cos, sin, inplace=inplace)[0], packed):
        for new, want in zip(of(call), of(chain), strict=True):
            torch.testing.assert_close(new, want, rtol=1e-4, atol=1e-4)


def test_transformers_under_vmap_of_grad_with_one_result():
    from ropewalk.compat import transformers

    q, cos, _ = unlike_halves()
    fit = torch.cat([cos[0, :, :8]] * 2, -1)

    def loss(x):
        return transformers.apply_rotary_pos_emb(x[None], x[None], fit, fit)[0].pow(2).sum()

    assert torch.equal(torch.vmap(torch.func.grad(loss))(q)[1], torch.func.grad(loss)(q[1]))


def test_gradient_of_a_compiled_vmap():
    from ropewalk.compat import transformers

    q, cos, _ = unlike_halves()
    fit = torch.cat([cos[0, :, :8]] * 2, -1)

    def loss(x):
        turned = torch.vmap(lambda x: transformers.apply_rotary_pos_emb(x[None], x[None], fit, fit)[0])(x)
        return turned.pow(3).sum()

    first, second = (q.clone().requires_grad_() for _ in range(2))
    loss(first).backward()
    torch.compile(loss, backend="aot_eager")(second).backward()
    assert first.grad.abs().max() > 0
    assert torch.equal(first.grad, second.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Every function of every module: the gradient of each tensor is given, or refused by the tensor's name.

TOKENS, HEADS, DIM = 6, (2, 1), 16
CACHE = torch.cat((COS, SIN), -1)  # [8, 16]
PLACES = torch.arange(TOKENS)
THREE = torch.stack((PLACES, PLACES // 2, PLACES % 3))


def heads_of(batch=(), flat=False):
    """q and k."""
    made = [draw(*batch, TOKENS, n, DIM, seed=i) for i, n in enumerate(HEADS)]
    return dict(zip("qk", (x.flatten(-2) if flat else x for x in made), strict=True))


def named(q, k, **others):
    return {"query": q, "key": k, **others}


def weights():
    return {"q_weight": 1 + draw(DIM, seed=5) / 4, "k_weight": 1 + draw(DIM, seed=6) / 4}


def packed_qkv():
    return {"qkv": draw(TOKENS, 4 * DIM)}


def numbers(**others):
    return {"num_heads_q": 2, "num_heads_k": 1, "num_heads_v": 1, "head_dim": DIM, "eps": 1e-6, **others}


def store(k="k_cache", v="v_cache", slots="out_loc", paged=False):
    shape = (2, 4, 1, DIM) if paged else (8, 1, DIM)
    return {k: torch.zeros(shape), v: torch.zeros(shape), slots: torch.arange(TOKENS)}


def wide(heads_first=True):
    made = heads_of((2,))
    return {name: x.transpose(1, 2).contiguous() if heads_first else x for name, x in made.items()}


def outputs(q="q_out", k="k_out"):
    return {q: torch.zeros(TOKENS, 2, DIM), k: torch.zeros(TOKENS, 1, DIM)}


class Layer:
    """What `forward_xpu` is a method of."""

    head_size = rotary_dim = DIM
    is_neox_style = True
    cos_sin_cache = CACHE


V = {"v": draw(TOKENS, 1, DIM, seed=8)}
BY_TABLE = {"cos_sin_cache": CACHE, "positions": PLACES}
SECTION = {"mrope_section": [4, 2, 2]}
MROPE = {"positions": THREE, "head_size": DIM, "cos_sin_cache": CACHE}
AXES = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
YARN = {"base": 1e4, "is_neox": True, "position_ids": PLACES, "factor": 1.0, "low": 0.0, "high": 1.0,
        "attention_factor": 1.0}  # fmt: skip
RAGGED = {"indptr": torch.tensor([0, 2, TOKENS]), "offsets": torch.tensor([1, 0])}
BUFFERS = {"value": V["v"], "k_buffer": torch.zeros(8, 1, DIM), "v_buffer": torch.zeros(8, 1, DIM),
           "cache_loc": torch.arange(TOKENS)}  # fmt: skip


# By module and function: its arguments. Of several ways to call one, the keys have a word more.
EVERY = {
    "flash_attn.apply_rotary_emb": lambda: {"x": draw(1, 6, 2, DIM), "cos": COS, "sin": SIN},
    "flash_attn.apply_rotary_emb in place": lambda: {"x": draw(1, 6, 2, DIM), "cos": COS, "sin": SIN, "inplace": True},
    "flash_attn.apply_rotary_emb_qkv_": lambda: {"qkv": draw(1, 6, 3, 2, DIM), "cos": COS, "sin": SIN},
    "flash_attn.apply_rotary_emb_qkv_ grouped": lambda: {
        "qkv": draw(2, 6, 8, DIM), "cos": COS, "sin": SIN, "cos_k": SIN, "sin_k": COS, "num_heads_q": 4,
        "seqlen_offsets": torch.tensor([0, 5])},
    "flash_attn.apply_rotary_emb_kv_": lambda: {"kv": draw(1, 6, 2, 2, DIM), "cos": COS, "sin": SIN},
    "liger.liger_rotary_pos_emb": lambda: {**wide(), "cos": WIDE[0], "sin": WIDE[1]},
    "liger.liger_rotary_pos_emb part": lambda: {**wide(), "cos": COS[:6, :4], "sin": SIN[:6, :4], "rotary_dim": 8},
    "liger.liger_rotary_pos_emb_gpt_oss": lambda: {**wide(), "cos": COS[None, :6], "sin": SIN[None, :6]},
    "liger.liger_rotary_pos_emb_vision": lambda: {**heads_of(), "cos": WIDE[0], "sin": WIDE[1]},
    "liger.liger_multimodal_rotary_pos_emb": lambda: {
        **wide(), "cos": WIDE[0].expand(3, 2, 6, 16).clone(), "sin": WIDE[1].expand(3, 2, 6, 16).clone(), **SECTION},
    "liger.liger_llama4_text_rotary_pos_emb": lambda: {
        **{f"x{n}": x for n, x in wide(False).items()}, "freqs_cis": torch.complex(COS[:6], SIN[:6])},
    "liger.liger_llama4_vision_rotary_pos_emb": lambda: named(
        **wide(False), freqs_ci=torch.complex(COS[:6], SIN[:6])[None, :, None]),
    "diffusers.apply_rotary_emb": lambda: {"x": draw(2, 2, 6, DIM), "freqs_cis": WIDE, "use_real_unbind_dim": -2},
    "transformers.apply_rotary_pos_emb": lambda: {**wide(), "cos": WIDE[0], "sin": WIDE[1]},
    "rotary.apply_rotary_transformers": lambda: {**wide(), "cos": WIDE[0], "sin": WIDE[1]},
    "rotary.apply_rotary only": lambda: {
        **{name: draw(6, 2, 8, seed=i) for i, name in enumerate(("x1", "x2", "out1", "out2"))}, "cos": COS[:6],
        "sin": SIN[:6], "conj": False},
    "transformer_engine.apply_rotary_pos_emb": lambda: {
        "t": draw(6, 2, 2, DIM), "freqs": torch.cat([PLACES[:, None] / (1 + torch.arange(8))] * 2, -1)[:, None, None]},
    "transformer_engine.apply_rotary_pos_emb ragged": lambda: {
        "t": draw(6, 2, DIM), "tensor_format": "thd", "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
        "freqs": torch.cat([PLACES[:, None] / (1 + torch.arange(8))] * 2, -1)[:, None, None]},
    "vllm.rotary_embedding": lambda: named(**heads_of(flat=True), **BY_TABLE, head_size=DIM, is_neox=True),
    "vllm.fused_qk_norm_rope": lambda: {**packed_qkv(), **numbers(), **weights(), "cos_sin_cache": CACHE,
                                        "is_neox": True, "position_ids": PLACES},
    "vllm.fused_qk_norm_rope_kvcache": lambda: {
        **packed_qkv(), **numbers(), **weights(), **outputs(), **BY_TABLE, "is_neox": True,
        **store("key_cache", "value_cache", "slots", paged=True)},
    "vllm.fused_qk_norm_mrope": lambda: {**packed_qkv(), **numbers(), **weights(), "positions": THREE,
                                         "cos_sin_cache": CACHE, "is_neox": True, "mrope_section_t": 4,
                                         "mrope_section_h": 2},
    "vllm.multimodal_rotary_embedding": lambda: named(**heads_of(flat=True), **MROPE, **SECTION, is_neox=True),
    "vllm.apply_rotary_emb": lambda: {"x": draw(6, 2, DIM), "cos": COS[:6], "sin": SIN[:6]},
    "vllm.deepseek_scaling_rope": lambda: named(**heads_of(), **BY_TABLE, offsets=None, rotary_dim=DIM, is_neox=True),
    **{f"flashinfer.apply_{kind}rope{suffix}": lambda: {**heads_of(), **RAGGED}
       for kind in ("", "llama31_") for suffix in ("", "_inplace")},
    **{f"flashinfer.apply_{kind}rope_pos_ids{suffix}": lambda: {**heads_of(), "pos_ids": PLACES}
       for kind in ("", "llama31_") for suffix in ("", "_inplace")},
    **{f"flashinfer.apply_rope_with_cos_sin_cache{suffix}": lambda: named(
        **heads_of(flat=True), **BY_TABLE, head_size=DIM) for suffix in ("", "_inplace")},
    **{f"{module}.fused_qk_norm_rope": lambda: {**packed_qkv(), **numbers(), **weights(), **YARN}
       for module in ("sglang_jit", "sgl_kernel", "sgl_kernel_xpu")},
    "sglang_jit.apply_rope_inplace": lambda: {**heads_of(), **BY_TABLE, "is_neox": True},
    "sglang_jit.apply_rope_inplace two dtypes": lambda: {
        "q": heads_of()["q"].bfloat16(), "k": heads_of()["k"], **BY_TABLE, "is_neox": True},
    **{f"{module}.apply_rope_inplace_with_kvcache": lambda: {**heads_of(), **V, **store(), **BY_TABLE, "is_neox": True}
       for module in ("sglang_jit", "sgl_kernel_xpu")},
    "sglang_jit.apply_rope_with_cos_sin_cache_inplace": lambda: {**heads_of(), **BY_TABLE, "is_neox": True},
    "sglang_jit.apply_rope_with_cos_sin_cache_inplace stored": lambda: {
        **heads_of(), **BY_TABLE, "is_neox": True, "fused_args": sglang_jit.FusedSetKVBufferArg(**BUFFERS)},
    **{f"{module}.fused_inplace_qknorm_rope": lambda: {**heads_of(), **weights(), **BY_TABLE, "is_neox": True}
       for module in ("sglang_jit", "sgl_kernel_xpu")},
    "sglang_jit.fused_inplace_qknorm_rope two passes": lambda: {
        **heads_of(), **weights(), **BY_TABLE, "is_neox": True, "round_norm_before_rope": True},
    "sglang_jit.fused_inplace_qknorm_rope whole table": lambda: {
        **heads_of(), **weights(), "positions": PLACES, "cos_sin_cache": torch.cat((*WIDE, ), -1), "is_neox": True,
        "cache_has_full_width": True},
    "sglang_jit.fused_qknorm_rope_out_of_place": lambda: {**heads_of(), **outputs(), **weights(), **BY_TABLE,
                                                          "is_neox": True},
    "sglang_jit.fused_qknorm_rope_pack_kv": lambda: {
        **heads_of((1,)), "v": V["v"][None], "k_prefix": draw(1, 2, 1, DIM), "v_prefix": draw(1, 2, 1, DIM, seed=1),
        "packed_kv": torch.zeros(2, 1, 8, 1, DIM), **weights(), **BY_TABLE, "is_neox": True},
    **{f"{module}.rotary_embedding": lambda: named(**heads_of(flat=True), **BY_TABLE, head_size=DIM, is_neox=True)
       for module in ("sglang_jit", "sgl_kernel", "sgl_kernel_xpu")},
    "sglang_jit.fused_qk_norm_mrope": lambda: {**heads_of(), **weights(), "cos_sin_cache": CACHE, "positions": THREE,
                                               "axis_map": AXES, "eps": 1e-6},
    "sglang_jit.table_qk_norm_rope_": lambda: {**packed_qkv(), **weights(), **BY_TABLE, "num_q_heads": 2,
                                               "num_k_heads": 1, "head_dim": DIM, "eps": 1e-6},
    "sglang_jit.triton_mrope_fused": lambda: {
        **heads_of(flat=True), **MROPE, **SECTION, "rotary_dim": DIM, "mrope_interleaved": False,
        "mrope_interleaved_glm": False, "is_neox_style": True, "axis_map": None},
    "sglang_jit.fused_qk_rope_reshape_and_cache": lambda: {
        **heads_of(), **V, **store("key_cache", "value_cache", "slot_mapping", paged=True), "pos": PLACES,
        "cos_sin": CACHE, "k_scale": None, "v_scale": None, "is_neox": True, "flash_layout": True},
    **{f"{module}.apply_rope_with_cos_sin_cache_inplace": lambda: named(
        **heads_of(flat=True), **BY_TABLE, head_size=DIM) for module in ("sgl_kernel", "sgl_kernel_xpu")},
    **{f"{module}.fused_qk_rope_with_cos_sin_cache_inplace": lambda: {**heads_of(), **BY_TABLE, "rope_dim": DIM,
                                                                      "is_neox": True}
       for module in ("sgl_kernel", "sgl_kernel_xpu")},
    "sgl_kernel_xpu.multimodal_rotary_embedding": lambda: named(
        **heads_of(flat=True), **MROPE, **SECTION, rotary_dim=DIM, mrope_interleaved=False,
        mrope_interleaved_glm=False, is_neox=True),
    "sgl_kernel_xpu.fused_q_norm_rope": lambda: {"q_input": draw(6, 2, DIM), "q_output": torch.zeros(6, 2, DIM),
                                                 "freqs_cis": CACHE, "positions": PLACES, "eps": 1e-6},
    "sgl_kernel_xpu.forward_xpu": lambda: named(**heads_of(flat=True), positions=PLACES, self=Layer()),
}  # fmt: skip


# The functions of other names that some go on with.
DELEGATES = ("liger_rotary_pos_emb", "apply_rotary_pos_emb")
NO_OPERATION = {"FusedSetKVBufferArg", "can_use_fused_inplace_qknorm_rope", "can_use_fused_qk_norm_rope"}


def function_of(name):
    module, function = name.split()[0].split(".")
    return getattr(importlib.import_module(f"ropewalk.compat.{module}"), function)


def test_none_is_forgotten():
    modules = {name.split(".")[0] for name in EVERY}
    assert modules == {path.stem for path in Path(ropewalk.compat.__file__).parent.glob("[!_]*.py")}
    known = {function_of(name) for name in EVERY}
    for module in map(importlib.import_module, (f"ropewalk.compat.{name}" for name in modules)):
        assert [n for n in module.__all__ if n not in NO_OPERATION and getattr(module, n) not in known] == []


def copied(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def of_all_outputs(name, arguments):
    """A weighted sum of all that a call returns, or of its arguments, which it then has written."""
    new = function_of(name)(**arguments)
    new = [*arguments.values()] if new is None else new if isinstance(new, tuple) else [new]
    tensors = [x for x in new if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
    return sum((x.double() * draw(*x.shape, seed=i)).sum() for i, x in enumerate(tensors))


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
ROTATED = ("x", "q", "k", "xq", "xk", "query", "key", "qkv", "kv", "t")
# Those without a gradient: norms that overwrite, stores, and what writes where it is told.
WITHOUT = ("norm", "kvcache", " stored", "reshape_and_cache", "rotary.apply_rotary only")
KINDS = {
    "leaf": lambda x: (x.requires_grad_(), x),
    "result": lambda x: (x.requires_grad_(), x * 1),
    "view of a leaf": lambda x: (x.requires_grad_(), x[:]),
    "one of many views": lambda x: (x.requires_grad_(), torch.stack((x, x)).unbind()[0]),
    "under no_grad": lambda x: (x, x),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_each_argument_has_its_gradient_or_is_refused_by_name(name, kind):
    for argument, x in EVERY[name]().items():
        if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()):
            check_gradient(name, argument, kind)


def check_gradient(name, argument, kind):
    before = EVERY[name]()
    arguments = copied(before)
    leaf, arguments[argument] = KINDS[kind](arguments[argument])
    if kind == "under no_grad":
        leaf.requires_grad_()
        with torch.no_grad():
            function_of(name)(**arguments)
        return
    serves = argument in ROTATED and not any(word in name for word in WITHOUT)
    try:
        loss = of_all_outputs(name, arguments)
    except ValueError as error:
        assert not (serves and kind == "result") or "two dtypes" in name
        message = str(error)
        assert message.startswith(tuple(f"{part}: " for part in (name.split()[0].split(".")[1], *DELEGATES)))
        assert f": {argument} " in message and "grad" in message
        for each, x in arguments.items():
            assert not isinstance(x, torch.Tensor) or torch.equal(x, before[each])
        return
    assert serves
    got = torch.autograd.grad(loss, leaf)[0]
    # A rotation is linear.
    step = draw(*leaf.shape, seed=77).to(leaf.dtype)
    with torch.no_grad():
        moved = {**copied(before), argument: before[argument] + step}
        low, high = (of_all_outputs(name, given) for given in (copied(before), moved))
    error = abs((got.double() * step.double()).sum() - (high - low))
    assert error <= TOLERANCE[got.dtype] * got.norm() * step.norm()
