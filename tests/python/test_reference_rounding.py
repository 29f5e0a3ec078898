"""rounding="reference" against the chains of transformers' own modules, run by torch on the CPU.

The rotation alone must be the same bit for bit. With the norm before it at least 99.9 % of the elements must be in half
precision, and the rest within a unit in the last place of the pair: the sum of squares is taken in another order. The
gradient is that of the chain: in float32 within 1e-6, and in half precision nowhere more than a unit in the last place
further from float64 than the chain's own.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
import ropewalk
import torch

pytest.importorskip("transformers")
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm  # noqa: E402
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm_apply  # noqa: E402
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial_apply  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_apply  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = {"llama": LlamaRMSNorm, "qwen3": Qwen3RMSNorm, "gemma3": Gemma3RMSNorm}


def draw(*shape, dtype, seed):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def tables(tokens, dim, dtype):
    """As LlamaRotaryEmbedding makes them: full width, float32, then cast."""
    inv_freq = 1.0 / (5e5 ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    freqs = torch.arange(tokens)[:, None].float() * inv_freq
    emb = torch.cat((freqs, freqs), dim=-1)[None]
    return emb.cos().to(dtype), emb.sin().to(dtype)


def steps(a, b):
    """Distance in units of the last place."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16

    def ordered(x):
        i = x.contiguous().view(bits).long()
        return torch.where(i < 0, torch.iinfo(bits).min - i, i)

    return (ordered(a) - ordered(b)).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [llama_apply, partial_apply, glm_apply])
def test_rotation_is_the_same_to_the_bit(dtype, function):
    head_dim, rotary_dim = (128, 128) if function is llama_apply else (128, 64)
    q, k = (draw(2, heads, 500, head_dim, dtype=dtype, seed=heads) for heads in (8, 2))
    cos, sin = tables(500, rotary_dim, dtype)
    want = function(q, k, cos, sin)
    half = rotary_dim // 2
    got = ropewalk.rope(
        q.transpose(1, 2), k.transpose(1, 2), cos=cos[..., :half], sin=sin[..., :half], rounding="reference",
        pairing="interleaved" if function is glm_apply else "neox",
    )  # fmt: skip
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.transpose(1, 2), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("weight_scale", [0.0, 0.3])
def test_norm_and_rotation(dtype, family, weight_scale):
    q, k = (draw(2, 500, heads, 128, dtype=dtype, seed=heads) for heads in (8, 2))
    norms = []
    for seed in (3, 4):
        norm = NORMS[family](128, eps=1e-6)
        norm.weight.data += weight_scale * torch.randn(128, generator=torch.Generator().manual_seed(seed))
        norms.append(norm.to(dtype))
    cos, sin = tables(500, 128, dtype)
    with torch.no_grad():
        want = llama_apply(norms[0](q).transpose(1, 2), norms[1](k).transpose(1, 2), cos, sin)
        got = ropewalk.rope(
            q, k, cos=cos[..., :64], sin=sin[..., :64], rounding="reference", eps=1e-6, q_weight=norms[0].weight,
            k_weight=norms[1].weight, zero_centered_weight=family == "gemma3",
        )  # fmt: skip
    for x, y in zip(got, want, strict=True):
        check_nearly_all(x, y.transpose(1, 2))


def check_nearly_all(got, want):
    same = (got == want).float().mean().item()
    near = (steps(got, want) <= 1).float().mean().item()
    print(f"{want.dtype}: {100 * same:.4f} % the same, {100 * near:.4f} % within one unit in the last place")
    # Where a pair nearly cancels, a unit of what goes in is more than one of what comes out: so it is taken from the
    # length of the pair.
    length = torch.hypot(want.float(), want.float().roll(64, -1))
    error = (got.float() - want.float()).abs()
    assert same >= 0.999
    assert (error <= 2 * torch.finfo(want.dtype).eps * length).all()


ROTATIONS = {"halves": llama_apply, "halves of a part": partial_apply, "neighbours": glm_apply}


def gradients(norm, weight, x, grad, apply, cos, sin):
    """Those of x and the weight, of the chain norm, weight, rotation that `norm` begins, by autograd."""
    x, weight = (y.detach().clone().requires_grad_() for y in (x, weight))
    y = norm(x, weight).transpose(1, 2)
    new = apply(y, y, cos, sin)[0].transpose(1, 2)
    return torch.autograd.grad(new, (x, weight), grad.to(new.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])  # weights, and 1 + weights
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("weight_dtype", ["of x", "float32"])
@pytest.mark.parametrize("batch, tokens, heads, head_dim", [(2, 70, 4, 64), (1, 100, 1, 96), (1, 40, 3, 256)])
def test_gradient_of_norm_and_rotation(dtype, family, rotation, weight_dtype, batch, tokens, heads, head_dim):
    module = NORMS[family](head_dim, eps=1e-6)
    module.weight.data += 0.3 * torch.randn(head_dim, generator=torch.Generator().manual_seed(3))
    module = module if weight_dtype == "float32" else module.to(dtype)
    weight, zero, apply = module.weight.detach(), family == "gemma3", ROTATIONS[rotation]
    rotary_dim = head_dim if rotation == "halves" else head_dim // 2
    cos, sin = tables(tokens, rotary_dim, dtype)
    x, grad = (draw(batch, tokens, heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))

    def stock(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def exact(x, weight):
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return n * (1 + weight if zero else weight)

    chain = gradients(stock, weight, x, grad, apply, cos, sin)
    truth = gradients(exact, weight.double(), x.double(), grad.double(), apply, cos.double(), sin.double())
    given = [y.clone().requires_grad_() for y in (x, weight)]
    new = ropewalk.rope(
        given[0], q_weight=given[1], cos=cos[..., : rotary_dim // 2], sin=sin[..., : rotary_dim // 2], eps=1e-6,
        rounding="reference", pairing="interleaved" if rotation == "neighbours" else "neox", zero_centered_weight=zero,
    )[0]  # fmt: skip
    for ours, theirs, want in zip(torch.autograd.grad(new, given, grad), chain, truth, strict=True):
        assert ours.dtype == theirs.dtype
        largest = want.abs().amax(-1, keepdim=True)
        error, own = (ours.double() - want).abs(), (theirs.double() - want).abs()
        if ours.dtype == torch.float32:
            if dtype == torch.float32:
                assert ((ours - theirs).abs() <= 1e-6 * largest).all()
            unit = 1e-6 * largest
        else:
            bits = {torch.bfloat16: 8, torch.float16: 11}[ours.dtype]
            exponent = torch.frexp(want)[1].clamp(min=torch.frexp(torch.tensor(torch.finfo(dtype).tiny))[1])
            unit = torch.ldexp(torch.ones_like(want), exponent - bits)
        assert (error <= own + unit).all(), ((error - own) / unit).max()
