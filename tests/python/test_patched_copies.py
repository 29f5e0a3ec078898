"""Copies, pickles and wrappers of a patched transformers model, and what it does with gradients."""

# SPDX-License-Identifier: Apache-2.0
import copy
import functools
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers")
import ropewalk.transformers as rt
from test_transformers import ids, launches, make
from transformers import AutoConfig, AutoModelForCausalLM

NAMES = ["llama", "qwen3", "gemma3_text", "gpt_neox", "olmo2"]


def attentions(model):
    return [m for m in model.modules() if "Attention" in type(m).__name__]


def calls(layer):
    """Of a layer: norms over all heads are calls of their own."""
    return 3 if "Olmo2" in type(layer).__name__ else 1


def served(model, prompt):
    """The logits, if every attention layer was served by Ropewalk."""
    before = launches()
    logits = model(prompt).logits
    assert launches() == before + sum(map(calls, attentions(model)))
    return logits


def stock(model, prompt):
    before = launches()
    logits = model(prompt).logits
    assert launches() == before
    return logits


def close(got, want):
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def change_norms(model):
    for layer in attentions(model):
        for name in ("q_norm", "k_norm"):
            if hasattr(layer, name):
                getattr(layer, name).weight.mul_(1.5)


@torch.no_grad()
@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_by_their_own_weights(name, angles, how):
    model, prompt = make(name), ids()
    want = model(prompt).logits
    other = make(name)
    change_norms(other)
    want_other = other(prompt).logits
    patch = rt.patch(model, angles=angles)
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        data = io.BytesIO()
        torch.save(model, data)
        clone = torch.load(io.BytesIO(data.getvalue()), weights_only=False)
    change_norms(clone)
    close(served(clone, prompt), want_other)
    close(served(model, prompt), want)
    patch.unpatch()
    assert torch.equal(stock(model, prompt), want)
    close(served(clone, prompt), want_other)  # its patch is its own
    rt.Patch(clone).unpatch()
    assert torch.equal(stock(clone, prompt), want_other)
    for one in (clone, model):
        assert {type(m) for m in one.modules()} == {type(m) for m in other.modules()}


@torch.no_grad()
def test_shallow_copy_and_replica_of_a_layer():
    """As torch.nn.DataParallel makes them: other weights in the same objects' copies."""
    model, hidden = make("qwen3"), torch.randn(1, 6, 64)
    tables = model.model.rotary_emb(hidden, torch.arange(6)[None])
    rt.patch(model, angles="table")
    layer = model.model.layers[0].self_attn
    for clone in (copy.copy(layer), layer._replicate_for_data_parallel()):
        clone._modules = dict(layer._modules)
        clone.q_norm = copy.deepcopy(layer.q_norm)
        clone.q_norm.weight.mul_(3)
        plain = copy.deepcopy(clone)
        rt.Patch(plain).unpatch()
        want = plain(hidden, tables, None)[0]
        close(clone(hidden, tables, None)[0], want)


@torch.no_grad()
def test_saved_model_in_another_process(loads_elsewhere):
    model, prompt = make("qwen3"), ids()
    want = model(prompt).logits
    rt.patch(model)
    loads_elsewhere(model, prompt, want, "model(given).logits", launches=2, most=1e-6)


@torch.no_grad()
def test_save_pretrained_holds_the_model_alone(tmp_path):
    model, prompt = make("qwen3"), ids()
    want = model(prompt).logits
    with rt.patch(model):
        model.save_pretrained(tmp_path)
        state = model.state_dict()
    assert torch.equal(stock(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), prompt), want)
    assert state.keys() == model.state_dict().keys()


# ---- what others put on forward


class Hook:
    """What accelerate's add_hook_to_module and remove_hook_from_module do with a module's forward."""

    def __init__(self):
        self.calls = 0

    def add(self, module):
        old = module.forward
        module._old_forward = old

        def new_forward(module, *args, **kwargs):
            self.calls += 1
            return module._old_forward(*args, **kwargs)

        module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)

    def remove(self, module):
        module.forward = module._old_forward
        del module._old_forward


def hooked(model):
    """The modules that a device map's hooks would be on."""
    return [*attentions(model), *(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))]


@torch.no_grad()
@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("first", ["hooks", "patch"])
@pytest.mark.parametrize("removed", ["never", "before unpatch", "after unpatch"])
def test_hooks_survive(first, removed, angles):
    model, prompt, hook = make("llama"), ids(), Hook()
    want, modules = model(prompt).logits, hooked(model)
    if first == "patch":
        patch = rt.patch(model, angles=angles)
    for module in modules:
        hook.add(module)
    if first == "hooks":
        patch = rt.patch(model, angles=angles)
    hook.calls = 0
    close(served(model, prompt), want)
    assert hook.calls == len(modules)
    if removed == "before unpatch":
        for module in modules:
            hook.remove(module)
        close(served(model, prompt), want)
    patch.unpatch()
    hook.calls = 0
    assert torch.equal(stock(model, prompt), want)
    assert hook.calls == (0 if removed == "before unpatch" else len(modules))
    if removed == "after unpatch":
        for module in modules:
            hook.remove(module)
        assert torch.equal(stock(model, prompt), want)
    with rt.patch(model, angles=angles):
        close(served(model, prompt), want)
    assert torch.equal(stock(model, prompt), want)


@torch.no_grad()
@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_accelerate(first):
    hooks = pytest.importorskip("accelerate.hooks")
    model, prompt = make("qwen3"), ids()
    want = model(prompt).logits
    if first == "patch":
        patch = rt.patch(model)
    hooks.attach_align_device_hook_on_blocks(model, execution_device={"model": "cpu", "lm_head": "cpu"}, offload=False)
    for module in hooked(model):
        if not hasattr(module, "_hf_hook"):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    if first == "hooks":
        patch = rt.patch(model)
    close(served(model, prompt), want)
    patch.unpatch()
    assert torch.equal(stock(model, prompt), want)
    assert all("forward" in module.__dict__ and hasattr(module, "_hf_hook") for module in hooked(model))
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(stock(model, prompt), want)


@torch.no_grad()
def test_any_wrapper_put_on_later_stays():
    model, prompt, calls = make("llama"), ids(), []
    want = model(prompt).logits
    patch = rt.patch(model)
    layer = model.model.layers[0].self_attn
    old = layer.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return old(*args, **kwargs)

    layer.forward = wrapper
    close(served(model, prompt), want)
    patch.unpatch()
    assert torch.equal(stock(model, prompt), want) and len(calls) == 2 and layer.forward is wrapper
    with pytest.raises(ValueError, match="LlamaAttention is patched already, by others: its forward is .*wrapper"):
        rt.patch(model)
    assert torch.equal(stock(model, prompt), want)


@torch.no_grad()
def test_a_class_made_from_the_patched_one_stays():
    """As FSDP's fully_shard makes them."""
    model, prompt = make("qwen3"), ids()
    want = model(prompt).logits
    patch = rt.patch(model)
    layer = model.model.layers[0].self_attn
    layer.__class__ = type("ShardedAttention", (type(layer),), {})
    close(served(model, prompt), want)
    patch.unpatch()
    assert torch.equal(stock(model, prompt), want) and type(layer).__name__ == "ShardedAttention"


@torch.no_grad()
def test_an_offloaded_model_is_told_so():
    model = make("llama")
    model.model.layers[1].to("meta")  # as offloading leaves it
    with pytest.raises(ValueError, match="layers of LlamaForCausalLM are offloaded .* before"):
        rt.patch(model)


def dispatched(model, how, folder):
    """As a device map leaves a model: parts on another device, from where hooks fetch them for each call."""
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        return
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"], "cpu")
    places.update({"model.layers.1": "disk", "model.rotary_emb": "disk"})
    options = {"main_device": "cpu", "offload_dir": folder, "offload_buffers": True, "force_hooks": True}
    accelerate.dispatch_model(model, places, **options)


@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_a_model_that_is_offloaded_after_patch(name, how, angles, tmp_path):
    model, prompt = make(name), ids()
    with torch.no_grad():
        want = model(prompt).logits
    patch = rt.patch(model, angles=angles)
    dispatched(model, how, tmp_path)
    assert "meta" in {x.device.type for x in model.parameters()}
    with torch.no_grad():
        close(served(model, prompt), want)
    close(served(model, prompt).detach(), want)  # with gradients
    patch.unpatch()
    with torch.no_grad():
        assert torch.equal(stock(model, prompt), want)
    with pytest.raises(ValueError, match="offloaded .*meta.*: load the model without offloading, and call"):
        rt.patch(model, angles=angles)


def other_numbers(rotary):
    for name, buffer in rotary.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(0.7)


def other_tensors(rotary):
    for name, buffer in list(rotary.named_buffers()):
        setattr(rotary, name, buffer * 0.7)


def other_scaling(rotary):
    for name in [name for name in vars(rotary) if name.endswith("attention_scaling")]:
        setattr(rotary, name, 1.5)


@torch.no_grad()
@pytest.mark.parametrize("change", [other_numbers, other_tensors, other_scaling])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_frequencies_that_are_changed_after_patch(name, change):
    """The layers then turn as the module does, which is said once; and by Ropewalk's angles where it is as it was."""
    model, prompt, other = make(name), ids(), make(name)
    want = model(prompt).logits
    change(other.model.rotary_emb)
    changed = other(prompt).logits
    assert (changed - want).abs().max() > 1e-3 * want.abs().max()
    kept = {name: buffer.clone() for name, buffer in model.model.rotary_emb.named_buffers()}
    with rt.patch(model), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        close(served(model, prompt), want)
        assert not [each for each in said if "were changed after" in str(each.message)]
        change(model.model.rotary_emb)
        for each in (model, model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(served(each, prompt), changed)
        assert len([each for each in said if "were changed after" in str(each.message)]) == 3  # each model once
        if change is not other_scaling:
            for name_, buffer in kept.items():
                getattr(model.model.rotary_emb, name_).copy_(buffer)
            close(served(model, prompt), want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama dynamic"])
def test_another_dtype_or_place_is_no_change_of_frequencies(name):
    model, prompt = make(name), ids()
    want = model(prompt).logits
    with rt.patch(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        close(served(model, prompt), want)
        served(model.to(torch.bfloat16), prompt)
        served(model.to(torch.float32), prompt)
        model.load_state_dict(make(name).state_dict())
        close(served(model, prompt), want)


class Doubled(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return 2 * self.base_layer(x)


def hook(attention):
    attention.k_norm.register_forward_hook(lambda module, args, out: 2 * out)


def wrap(attention):
    attention.q_norm = Doubled(attention.q_norm)


def other_eps(attention):
    attention.q_norm.variance_epsilon = 0.5


@torch.no_grad()
@pytest.mark.parametrize("change", [hook, wrap, other_eps])
@pytest.mark.parametrize(
    "through", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_norms_that_are_changed_after_patch(name, change, through):
    model, prompt = make(name), ids()
    with rt.patch(model) as patched:
        model = through(model)
        close(served(model, prompt), make(name)(prompt).logits)
        change(attentions(model)[0])
        got = served(model, prompt)
        if patched.model is not model:
            rt.Patch(model).unpatch()
    want = stock(model, prompt)
    close(got, want)
    assert not torch.equal(want, make(name)(prompt).logits)


# ---- gradients; cosines and sines that others take


def test_gradients_of_a_layer_with_angles_made_without():
    """The rotary module was called under no_grad, the layer is run with gradients, as by EAGLE's training."""
    model, hidden, positions = make("qwen3"), torch.randn(1, 6, 64), torch.arange(6)[None]
    layer = model.model.layers[0]

    def gradient(tables):
        layer.zero_grad()
        out = layer(hidden, position_embeddings=tables)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        return layer.self_attn.q_proj.weight.grad.clone(), layer.self_attn.q_norm.weight.grad.clone()

    with torch.no_grad():
        want_tables = model.model.rotary_emb(hidden, positions)
    want = gradient(want_tables)
    with rt.patch(model):
        with torch.no_grad():
            tables = model.model.rotary_emb(hidden, positions)
        got = gradient(tables)
    for x, y in zip(got, want, strict=True):
        close(x, y)
    with pytest.raises(AttributeError, match=r"ropewalk\.transformers\.patch"):
        gradient(tables)  # unpatched since


@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_are_served_without_no_grad(name, angles):
    model, prompt = make(name).requires_grad_(False), ids()
    want = model(prompt).logits
    with rt.patch(model, angles=angles):
        close(served(model, prompt), want)
    assert torch.equal(stock(model, prompt), want)


def error_of(got, want):
    return (got - want).abs().max() / want.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_one_gradient_of_a_frozen_model(name):
    model, prompt = make(name).requires_grad_(False), ids()
    layers = attentions(model)
    embedded = model.get_input_embeddings()(prompt)

    def gradients(parameter):
        embedded.requires_grad_(parameter is None)
        x = embedded if parameter is None else parameter
        x.requires_grad_(True)
        before = launches()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), x)
        x.requires_grad_(False)
        return gradient, launches() - before

    # The input; what comes after the rotation in the last layer; what comes before it in the first.
    for parameter in (None, layers[-1].o_proj.weight, layers[0].k_proj.weight):
        want, _ = gradients(parameter)
        with rt.patch(model):
            got, served_layers = gradients(parameter)
        assert error_of(got, want) < 1e-5
        assert served_layers >= len(layers)


def test_a_gradient_from_elsewhere():
    model, prompt = make("qwen3").requires_grad_(False), ids()
    shift = torch.ones((), requires_grad=True)
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, out: out + shift)

    def gradient():
        return torch.autograd.grad(model(prompt).logits.square().sum(), shift)[0]

    want = gradient()
    with rt.patch(model):
        before = launches()
        assert error_of(gradient(), want) < 1e-5 and launches() > before


USES = {
    "unsqueeze": lambda q, x: x.unsqueeze(1),
    "shape": lambda q, x: x.shape,
    "dtype": lambda q, x: x.dtype,
    "times a tensor": lambda q, x: q * x,
    "a tensor times": lambda q, x: x * q,
    "index": lambda q, x: x[..., :4],
    "negative": lambda q, x: -x,
    "torch.cat": lambda q, x: torch.cat((x, x), -1),
    "torch.sin": lambda q, x: torch.sin(x),
}


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("which", [0, 1])
def test_others_cannot_take_angles_for_tables(use, which):
    model, hidden, positions = make("llama"), torch.randn(1, 6, 64), torch.arange(6)[None]
    with rt.patch(model):
        table = model.model.rotary_emb(hidden, positions)[which]
        words = r"ropewalk\.transformers\.patch .* use patch\(model, angles='table'\)"
        with pytest.raises(AttributeError, match=words):
            USES[use](torch.randn(1, 4, 6, 16), table)
    with rt.patch(model, angles="table"):
        USES[use](torch.randn(1, 4, 6, 16), model.model.rotary_emb(hidden, positions)[which])


def test_signatures_and_names_stay():
    model = make("qwen3")
    before = [(type(m).__name__, repr(m), inspect.signature(m.forward)) for m in model.modules()]
    with rt.patch(model):
        assert before == [(type(m).__name__, repr(m), inspect.signature(m.forward)) for m in model.modules()]


@torch.no_grad()
def test_layers_that_call_their_own_rotary_module_go_by_its_tables():
    options = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
               "vocab_size": 128, "max_position_embeddings": 64, "num_codebooks": 2}  # fmt: skip
    from transformers.models.moshi.modeling_moshi import MoshiModel

    model, prompt = MoshiModel(AutoConfig.for_model("moshi", **options)).eval(), ids()
    want = model(prompt).last_hidden_state
    with rt.patch(model) as patch:
        before = launches()
        close(model(prompt).last_hidden_state, want)
        assert launches() == before + 2
        assert patch.by_table == {"MoshiAttention": "its angles come from no rotary module that is known"}


@torch.no_grad()
@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_layers_compiled_alone_are_one_graph(name, angles):
    torch._dynamo.reset()
    model = make(name)
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 12, "layer_types": None})
    model = AutoModelForCausalLM.from_config(config).eval()
    hidden, positions = torch.randn(1, 6, 64), torch.arange(6)[None]
    tables = model.model.rotary_emb(hidden, positions)
    want = [layer(hidden, position_embeddings=tables) for layer in model.model.layers]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with rt.patch(model, angles=angles):
        tables = model.model.rotary_emb(hidden, positions)
        for layer, x in zip(model.model.layers, want, strict=True):
            close(torch.compile(layer, fullgraph=True, backend=counter)(hidden, position_embeddings=tables), x)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_code_of_a_layer_is_not_said_to_be_of_its_module():
    """torch 2.11's Dynamo else takes the names in it from that module, whose functions are the stock ones: "'NoneType'
    object is not subscriptable", from a guard on the closure of ours."""
    model = make("qwen3")
    with rt.patch(model):
        function = attentions(model)[0]._ropewalk.function
        assert "__name__" not in function.__globals__ and function.__module__ == type(attentions(model)[0]).__module__


@torch.no_grad()
def test_longrope_compiles_to_one_graph():
    rule = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [4.0 + i for i in range(8)], "original_max_position_embeddings": 8}  # fmt: skip
    config = AutoConfig.for_model(
        "phi3", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, rope_parameters=rule, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [torch.arange(2 * n).reshape(2, n) % 128 for n in (6, 20)]  # by the short factors, by the long ones
    wants = [model(prompt, use_cache=False).logits for prompt in prompts]
    with rt.patch(model):
        for prompt, want in zip(prompts, wants, strict=True):
            close(served(model, prompt), want)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for prompt, want in zip(prompts, wants, strict=True):
            before = launches()
            close(compiled(prompt, use_cache=False).logits, want)
            assert launches() == before + 1
    torch._dynamo.reset()
