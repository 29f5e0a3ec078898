"""Models of which `ropewalk.transformers.patch` serves a part, or whose layers ask for more than the common ones."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import os
import types
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import ropewalk.transformers  # noqa: E402

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def model_of(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def ids() -> Any:
    return torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def same(model: Any, prompt: Any, **options: Any) -> Any:
    """Patches, compares, restores."""
    want = model(prompt).logits
    before = sum(ropewalk.counters().values())
    with ropewalk.transformers.patch(model, **options) as patch:
        got = model(prompt).logits
        assert sum(ropewalk.counters().values()) - before >= patch.layers > 0
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert torch.equal(model(prompt).logits, want)
    return patch


def test_a_layer_that_asks_for_positions() -> None:
    rule = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0}  # fmt: skip
    patch = same(model_of("ministral3", head_dim=16, rope_parameters=rule), ids())
    assert (patch.layers, patch.skipped) == (2, {})


def test_a_layer_that_could_have_alibi() -> None:
    options = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
    assert same(model_of("falcon", **options), ids()).layers == 2


def mistral3() -> Any:
    text = {**SMALL, "model_type": "mistral", "head_dim": 16}
    vision = {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
              "num_attention_heads": 4, "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    return transformers.Mistral3ForConditionalGeneration(config).eval()


@torch.no_grad()
def test_a_vision_tower_goes_by_its_own_tables() -> None:
    model = mistral3()
    patch = same(model, ids().clamp(min=6))
    assert (patch.layers, patch.skipped, list(patch.by_table)) == (3, {}, ["PixtralAttention"])
    assert "rows and columns of images" in patch.by_table["PixtralAttention"]
    tower, image = model.model.vision_tower, torch.randn((1, 3, 32, 24), generator=torch.Generator().manual_seed(4))
    want = tower(image, image_sizes=[(32, 24)]).last_hidden_state
    with ropewalk.transformers.patch(model):
        before = sum(ropewalk.counters().values())
        got = tower(image, image_sizes=[(32, 24)]).last_hidden_state
        assert sum(ropewalk.counters().values()) == before + 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_part_that_does_something_unknown_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.pixtral import modeling_pixtral

    stock = modeling_pixtral.apply_rotary_pos_emb

    def scaled(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        q, k = stock(q, k, cos, sin, unsqueeze_dim)
        return q * 1.01, k

    monkeypatch.setattr(modeling_pixtral, "apply_rotary_pos_emb", scaled)
    patch = same(mistral3(), ids().clamp(min=6))
    assert patch.layers == 2
    assert "apply_rotary_pos_emb of PixtralAttention does something that" in patch.skipped["PixtralAttention"]


def test_nothing_is_skipped_where_all_is_served() -> None:
    assert same(model_of("llama"), ids()).skipped == {}


def test_each_part_keeps_its_mode() -> None:
    model = model_of("llama")
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with ropewalk.transformers.patch(model):
        assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: module.training for name, module in model.named_modules()} == before


def test_where_nothing_can_be_served_it_is_said() -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.head_dim = 6
    with pytest.raises(
        ValueError, match="patch: LlamaAttention alone ends in RuntimeError|does something that Ropewalk"
    ):
        ropewalk.transformers.patch(model)
    assert all("_ropewalk" not in module.__dict__ for module in model.modules())


class Quantised(torch.nn.Module):
    """A linear layer whose weight is of 8 bits, as quantisers leave it."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.scale = float(linear.weight.abs().max() / 127)
        weight = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Any) -> Any:
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
@torch.no_grad()
def test_layers_of_eight_bits(name: str, dtype: Any) -> None:
    model = model_of(name, head_dim=16).to(dtype)
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, part, Quantised(getattr(layer.self_attn, part)))
    want = model(ids()).logits.float()
    with ropewalk.transformers.patch(model) as patch:
        got = model(ids()).logits.float()
    assert patch.layers == 2
    assert float((got - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_a_function_of_the_package_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is a module with a forward of any arguments but for its own."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.apply_rotary_pos_emb

    class Func(torch.nn.Module):
        forward = staticmethod(plain)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", Func())
    assert same(model_of("llama"), ids()).layers == 2


def slot(modeling: Any) -> Any:
    """As `kernels` makes it of a modeling file's function: a module, whose forward is then Ropewalk's."""
    from ropewalk.transformers import _RotaryPosEmb

    class Func(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return modeling.apply_rotary_pos_emb(*args, **kwargs)

    made = Func()
    made.forward = types.MethodType(_RotaryPosEmb.forward, made)
    return made


@pytest.mark.parametrize(
    ("name", "width", "served"), [("llama", 16, True), ("gpt_oss", 8, False), ("nanochat", 16, False)]
)
def test_the_slot_serves_the_common_function_alone(name: str, width: int, served: bool) -> None:
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    q, k = (torch.randn((2, heads, 5, 16)).requires_grad_() for heads in (4, 2))
    half = torch.randn((2, 1, 5, 8))
    tables = torch.cat((half, half), -1) if width == 16 else half
    before = sum(ropewalk.counters().values())
    call = slot(modeling)
    got = call(q, k, *tables)
    tried = sum(ropewalk.counters().values())
    for new, old in zip(got, modeling.apply_rotary_pos_emb(q, k, *tables), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
    call(q, k, *tables)
    assert (sum(ropewalk.counters().values()) - tried == 1) == served
    assert tried > before or not served
    gradients = torch.autograd.grad([x.square().sum() for x in got], (q, k))
    want = torch.autograd.grad([x.square().sum() for x in modeling.apply_rotary_pos_emb(q, k, *tables)], (q, k))
    for new, old in zip(gradients, want, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_without_the_package_kernels_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: False)
    with pytest.raises(ImportError, match="the package kernels is not installed in a version that transformers takes"):
        ropewalk.transformers.use_kernels()
