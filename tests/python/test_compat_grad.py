"""The functions with a gradient: what autograd keeps of a call, and what has no gradient."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import ropewalk
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
