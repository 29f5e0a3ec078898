"""Ropewalk in place of the norm of q and k and the rotation of diffusers' transformers, small and random, against their
stock selves."""

# SPDX-License-Identifier: Apache-2.0
import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("diffusers")
import diffusers  # noqa: E402
import ropewalk  # noqa: E402
import ropewalk.diffusers as rd  # noqa: E402
from ropewalk import _patched_processor as known  # noqa: E402
from tiny_diffusers import MODELS, make, run  # noqa: E402

NAMES = list(MODELS)
# Largest difference to the stock model in float32, to the largest output of it. Sums are taken in another order.
CLOSE = 2e-6
# In bfloat16 the norm and the rotation round once here and twice there: three digits of eight bits.
CLOSE_BF16 = 3e-2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launches():
    return sum(ropewalk.counters().values())


def error(got, want):
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def classes(model):
    return [(type(m), type(getattr(m, "processor", None))) for m in model.modules()]


def layers_of(name):
    return MODELS[name][1:]


# ---- equal to stock


@torch.no_grad()
@pytest.mark.parametrize("fuse_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_gives_what_the_stock_model_gives(name, dtype, fuse_norm):
    model, given = make(name, dtype)
    want, before = run(model, given), classes(model)
    layers, fused = layers_of(name)
    with rd.patch(model, fuse_norm=fuse_norm) as patch:
        assert (patch.layers, patch.fused_norms, patch.skipped) == (layers, fused if fuse_norm else 0, {})
        began = launches()
        got = run(model, given)
        assert launches() >= began + layers
        kind = known.NORM_AND_ROTATION if fuse_norm and fused else known.ROTATION
        assert patch.calls == {kind: layers}
        assert got.dtype == want.dtype and error(got, want) <= (CLOSE if dtype == torch.float32 else CLOSE_BF16)
    began = launches()
    assert torch.equal(run(model, given), want) and launches() == began
    assert classes(model) == before and patch.calls == {kind: layers} and "as it was" in repr(patch)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_further_from_float32_than_stock(name):
    model, given = make(name)
    exact = run(model, given)
    model, given = make(name, torch.bfloat16)
    stock = error(run(model, given), exact)
    with rd.patch(model):
        assert error(run(model, given), exact) <= 1.5 * stock  # of a few numbers: noise of the rest of the model


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_rotation_is_seen(name, monkeypatch):
    """A patch that turned otherwise would not give the same: the comparison above says something."""
    model, given = make(name)
    want = run(model, given)
    turn = known.Stream.turn
    with rd.patch(model):
        monkeypatch.setattr(known.Stream, "turn", lambda self, rounding, out: turn(
            self if self.tables is None else self._replace(tables=(self.tables[0], -self.tables[1])), rounding, out
        ))  # fmt: skip
        assert error(run(model, given), want) > 100 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("name", ["Flux", "Flux 2", "Wan"])
def test_with_fused_projections(name):
    model, given = make(name)
    want = run(model, given)
    model.fuse_qkv_projections()
    with rd.patch(model) as patch:
        assert patch.layers == 2
        assert error(run(model, given), want) <= CLOSE


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen-Image", "HunyuanVideo", "Lumina 2", "LTX"])
def test_of_one_sequence_and_without_a_mask(name):
    model, given = make(name)
    for key, value in given.items():
        if isinstance(value, (torch.Tensor, list)) and key not in ("image_rotary_emb", "img_ids", "txt_ids"):
            given[key] = value[:1]
    for key in ("encoder_hidden_states_mask", "encoder_attention_mask"):
        if key in given and name in ("Qwen-Image", "LTX"):
            given[key] = None
        elif key in given:
            given[key] = torch.ones_like(given[key])
    want = run(model, given)
    with rd.patch(model):
        assert error(run(model, given), want) <= CLOSE


@torch.no_grad()
def test_a_scaled_softmax_of_lumina():
    attn = make("Lumina 2")[0].layers[0].attn
    x = torch.randn(2, 5, attn.query_dim)
    given = {"encoder_hidden_states": x, "base_sequence_length": 3, "image_rotary_emb":
             torch.polar(torch.ones(2, 5, 4), torch.rand(2, 5, 4)).to(torch.complex128)}  # fmt: skip
    want = attn(x, **given)
    model = torch.nn.ModuleList([make("Lumina 2")[0]])
    model[0].layers[0].attn = attn
    with rd.patch(model) as patch:
        assert error(attn(x, **given), want) <= CLOSE
        assert patch.calls == {known.NORM_AND_ROTATION: 1}


@torch.no_grad()
@pytest.mark.parametrize("rounding", ["fused", "reference"])
def test_rounding(rounding):
    model, given = make("Flux", torch.bfloat16)
    want = run(model, given)
    with rd.patch(model, rounding=rounding):
        assert error(run(model, given), want) <= CLOSE_BF16


# ---- gradients


def gradients(model, given):
    model.zero_grad()
    out = run(model, given)
    out.square().sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    model, given = make(name)
    want, of_stock = gradients(model, given)
    largest = max(float(x.abs().max()) for x in of_stock.values())
    with rd.patch(model) as patch:
        began = launches()
        got, ours = gradients(model, given)
        layers, fused = layers_of(name)
        assert launches() >= began + 2 * layers  # there and back
        kind = known.NORM_AND_ROTATION if fused else known.ROTATION
        assert patch.calls == {kind + known.WITH_GRADIENT: layers}
    assert error(got, want) <= CLOSE and ours.keys() == of_stock.keys()
    for key, value in of_stock.items():  # some are 0 but for rounding
        assert (ours[key] - value).abs().max() <= 2e-5 * value.abs().max() + 1e-7 * largest, key


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_need_no_gradient(name):
    model, given = make(name)
    model.requires_grad_(False)
    want = run(model, given)
    with rd.patch(model) as patch:
        got = run(model, given)
        layers, fused = layers_of(name)
        assert patch.calls == {known.NORM_AND_ROTATION if fused else known.ROTATION: layers}
        assert error(got, want) <= CLOSE


@pytest.mark.parametrize("name", ["Flux", "Wan", "LTX"])
def test_norms_alone_are_trained(name):
    model, given = make(name)
    model.requires_grad_(False)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("attn" in path and "norm_q" in path)
    _, want = gradients(model, given)
    with rd.patch(model):
        _, got = gradients(model, given)
    assert want and want.keys() == got.keys()
    assert all(error(got[key], want[key]) <= 2e-5 for key in want)


def test_tables_of_wan_made_without_gradients_serve_with_them():
    model, given = make("Wan")
    attn, x = model.blocks[0].attn1, torch.randn(2, 12, 24)
    with torch.no_grad():
        tables = model.rope(given["hidden_states"])
    want = torch.autograd.grad(attn(x, rotary_emb=tables).square().sum(), attn.to_q.weight)[0]
    with rd.patch(model) as patch:
        with torch.no_grad():
            wide = model.rope(given["hidden_states"])
        assert wide[0].shape == (1, 12, 2, 6)
        got = torch.autograd.grad(attn(x, rotary_emb=wide).square().sum(), attn.to_q.weight)[0]
        assert error(got, want) <= 2e-5
        with torch.no_grad():  # and the stock ones
            assert error(attn(x, rotary_emb=tables), attn(x, rotary_emb=wide)) <= CLOSE
    assert patch.layers == 2


# ---- what is not served


@torch.no_grad()
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_what_is_refused_goes_the_stock_way(name, monkeypatch):
    model, given = make(name)
    want = run(model, given)

    def refuses(*args, **kwargs):
        raise ValueError("rope: q must be something else")

    with rd.patch(model) as patch:
        monkeypatch.setattr(known, "rope_", refuses)
        assert torch.equal(run(model, given), want)
        assert patch.calls == {"stock: rope: q must be something else": 2}


@torch.no_grad()
def test_float64_stays_stock():
    model, given = make("Flux")
    patch = rd.patch(model)
    model.double()
    given = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    got = run(model, given)
    assert patch.calls == {"stock: float64": 2}
    patch.unpatch()
    assert torch.equal(run(model, given), got)
    with pytest.raises(ValueError, match="no layer of FluxTransformer2DModel can be served: transformer_blocks.0.attn: "
                       "alone ends in ValueError: its weights are of no dtype that Ropewalk has"):  # fmt: skip
        rd.patch(model)


@torch.no_grad()
def test_norms_of_another_kind_stay_the_models_own():
    model, given = make("Qwen-Image")
    attn = model.transformer_blocks[0].attn
    attn.norm_q = torch.nn.LayerNorm(16)
    want = run(model, given)
    with rd.patch(model) as patch:
        assert (patch.layers, patch.fused_norms, patch.skipped) == (2, 1, {})
        assert error(run(model, given), want) <= CLOSE
        assert patch.calls == {known.NORM_AND_ROTATION: 1, known.ROTATION: 1}


@torch.no_grad()
def test_norms_with_weights_of_another_dtype_stay_the_models_own():
    model, given = make("Lumina 2", torch.bfloat16)
    for layer in model.layers:
        layer.attn.norm_q.float()
        layer.attn.norm_k.float()
    want = run(model, given)
    with rd.patch(model) as patch:
        assert (patch.layers, patch.fused_norms) == (4, 2)
        assert error(run(model, given), want) <= CLOSE_BF16


@torch.no_grad()
def test_an_unknown_processor_stays_and_is_named():
    model, given = make("Flux")

    class Mine(diffusers.models.transformers.transformer_flux.FluxAttnProcessor):
        pass

    model.single_transformer_blocks[0].attn.set_processor(Mine())
    want = run(model, given)
    with rd.patch(model) as patch:
        assert patch.layers == 1
        assert patch.skipped == {"single_transformer_blocks.0.attn": "Mine is no processor that Ropewalk knows"}
        assert "1 left stock" in repr(patch)
        assert error(run(model, given), want) <= CLOSE
        assert patch.calls == {known.NORM_AND_ROTATION: 1}
    model.transformer_blocks[0].attn.set_processor(Mine())
    with pytest.raises(ValueError, match="can be served: transformer_blocks.0.attn: Mine is no processor"):
        rd.patch(model)
    assert torch.equal(run(model, given), want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Flux", "Wan", "CogVideoX"])
def test_layers_that_differ_stay_stock(name, monkeypatch):
    """A call that does not do what the stock one does is found out."""
    model, given = make(name)
    want, before = run(model, given), classes(model)
    turn = known.Stream.turn
    monkeypatch.setattr(
        known.Stream,
        "turn",
        lambda self, rounding, out: turn(
            self if self.tables is None else self._replace(tables=(self.tables[1], self.tables[0])), rounding, out
        ),
    )
    with pytest.raises(ValueError, match="can be served: .*: with Ropewalk it gives another result"):
        rd.patch(model)
    assert classes(model) == before and torch.equal(run(model, given), want)


@torch.no_grad()
def test_wan_rotates_alone_where_all_heads_cannot_be_one(monkeypatch):
    model, given = make("Wan")
    want = run(model, given)
    rope_ = known.rope_

    def small_heads(q, k, **options):
        if q.shape[-1] > 12:
            raise ValueError("rope: head_dim must be at most 12")
        return rope_(q, k, **options)

    monkeypatch.setattr(known, "rope_", small_heads)
    with rd.patch(model) as patch:
        assert (patch.layers, patch.fused_norms) == (2, 0) and type(model.rope) is known.WAN_ROTARY
        assert error(run(model, given), want) <= CLOSE
        assert patch.calls == {known.ROTATION: 2}


@torch.no_grad()
def test_one_processor_of_many_layers():
    model, given = make("LTX")
    model.set_attn_processor(diffusers.models.transformers.transformer_ltx.LTXVideoAttnProcessor())
    want = run(model, given)
    with rd.patch(model) as patch:
        assert (patch.layers, patch.fused_norms) == (2, 2)
        assert error(run(model, given), want) <= CLOSE
        assert patch.calls == {known.NORM_AND_ROTATION: 2}


@torch.no_grad()
def test_a_model_without_rotation_is_refused():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=1, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no layer of CogVideoXTransformer3DModel is handed cosines and sines"):
        rd.patch(model)


def test_unknown_models_and_versions(monkeypatch):
    names = "is none of those that Ropewalk knows: FluxTransformer2DModel, "
    with pytest.raises(ValueError, match="patch: Linear " + names):
        rd.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="patch: model must be a transformer .* or a pipeline .*, but is a str"):
        rd.patch("black-forest-labs/FLUX.1-dev")
    model, given = make("Flux")
    before = classes(model)
    with pytest.raises(ValueError, match="patch: rounding must be 'fused' or 'reference', but is 'up'"):
        rd.patch(model, rounding="up")
    patch = rd.patch(model)
    with pytest.raises(ValueError, match="patch: FluxTransformer2DModel is patched already, by Ropewalk"):
        rd.patch(model)
    patch.unpatch()
    monkeypatch.setattr(diffusers, "__version__", "0.43.0")
    with pytest.raises(ValueError, match=r"^patch: diffusers must be 0\.42\.1, but is 0\.43\.0$"):
        rd.patch(model)
    assert classes(model) == before


def test_a_model_on_the_meta_device_is_refused():
    model, _ = make("Flux")
    model.to("meta")
    with pytest.raises(ValueError, match="can be served: .*: its weights are on the meta device: patch before"):
        rd.patch(model)


# ---- pipelines and wrappers


class Mine(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
    pass


@torch.no_grad()
def test_pipelines():
    (first, given), (second, _) = make("Wan"), make("Wan")
    want = run(first, given)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=first, transformer_2=second
    )
    with rd.patch(pipeline) as patch:
        assert (patch.layers, patch.fused_norms) == (4, 4) and "WanPipeline" in repr(patch)
        assert error(run(first, given), want) <= CLOSE and error(run(second, given), want) <= CLOSE
        assert patch.calls == {known.NORM_AND_ROTATION: 4}
    assert torch.equal(run(first, given), want)
    for part in (first, second):
        part.blocks[1].attn1.set_processor(Mine())
    with rd.patch(pipeline) as patch:
        assert (patch.layers, patch.fused_norms) == (2, 0)
        reason = "Mine is no processor that Ropewalk knows"
        assert patch.skipped == {f"{name}.blocks.1.attn1": reason for name in ("transformer", "transformer_2")}
        assert error(run(first, given), want) <= CLOSE
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=torch.nn.Linear(2, 2), vae=None, scheduler=scheduler, transformer=None,
        transformer_2=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="patch: WanPipeline has Linear, none of those that Ropewalk knows: Flux"):
        rd.patch(pipeline)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=None, transformer_2=None
    )
    with pytest.raises(TypeError, match="but is a WanPipeline"):
        rd.patch(pipeline)


@torch.no_grad()
def test_inside_of_a_wrapper():
    model, given = make("Flux")
    want = run(model, given)
    wrapped = torch.nn.Sequential(model)
    with rd.patch(wrapped) as patch:
        assert patch.layers == 2 and error(run(model, given), want) <= CLOSE


@torch.no_grad()
def test_hooks_that_skip_layers_go_on():
    model, given = make("Z-Image")
    config = diffusers.LayerSkipConfig([0], fqn="layers", skip_attention=True, skip_ff=False,
                                       skip_attention_scores=False)  # fmt: skip
    diffusers.hooks.apply_layer_skip(model, config)
    want = run(model, given)
    with rd.patch(model):
        assert error(run(model, given), want) <= CLOSE
    with rd.patch(make("Z-Image")[0]) as patch:
        diffusers.hooks.apply_layer_skip(patch.model, config)
        assert error(run(patch.model, given), want) <= CLOSE


@torch.no_grad()
@pytest.mark.parametrize("first", ["patch", "offloading"])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_hooks_of_group_offloading_survive(name, first):
    model, given = make(name)
    want = run(model, given)
    patch = rd.patch(model) if first == "patch" else None
    device = torch.device("cpu")
    diffusers.hooks.apply_group_offloading(
        model, onload_device=device, offload_device=device, offload_type="leaf_level"
    )
    patch = patch or rd.patch(model)
    assert error(run(model, given), want) <= CLOSE
    fuses = name != "Wan" or first == "patch"  # else the hook holds the forward of Wan's rotary module
    assert patch.calls == {known.NORM_AND_ROTATION if fuses else known.ROTATION: 2}
    assert patch.fused_norms == (2 if fuses else 0)
    patch.unpatch()
    assert torch.equal(run(model, given), want)


@torch.no_grad()
def test_weights_in_fp8():
    model, given = make("Flux", torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    want = run(model, given)
    with rd.patch(model) as patch:
        assert error(run(model, given), want) <= CLOSE_BF16
        assert patch.calls == {known.NORM_AND_ROTATION: 2}


def test_a_pipeline_runs():
    model, _ = make("Flux")
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=model,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def latents():
        return pipeline(
            prompt_embeds=torch.full((1, 3, 32), 0.3), pooled_prompt_embeds=torch.full((1, 32), 0.1), height=64,
            width=64, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip

    want = latents()
    with rd.patch(pipeline) as patch:
        assert error(latents(), want) <= CLOSE and patch.calls == {known.NORM_AND_ROTATION: 4}
    assert torch.equal(latents(), want)


@pytest.mark.parametrize("name", ["Flux", "Wan", "Lumina 2"])
def test_autocast_and_inference_mode(name):
    model, given = make(name)
    with torch.inference_mode():
        want = run(model, given)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        of_autocast = run(model, given)
    with rd.patch(model):
        with torch.inference_mode():
            assert error(run(model, given), want) <= CLOSE
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert error(run(model, given), of_autocast) <= CLOSE_BF16


# ---- copies


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_copies_go_by_their_own_weights(name):
    model, given = make(name)
    want = run(model, given)
    layers, fused = layers_of(name)
    patch = rd.patch(model)
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    if name == "Wan":
        data = io.BytesIO()
        torch.save(model, data)
        data.seek(0)
        clones.append(torch.load(data, weights_only=False))
    for clone in clones:
        for path, parameter in clone.named_parameters():
            if "norm_q" in path:
                parameter.mul_(1.5)
        of_clone = rd.Patch(clone)
        assert (of_clone.layers, of_clone.fused_norms) == (layers, fused)
        got = run(clone, given)
        assert sum(of_clone.calls.values()) == layers and patch.calls == {}  # each counts its own
        of_clone.unpatch()
        changed = run(clone, given)
        assert error(got, changed) <= CLOSE and error(changed, want) > 100 * CLOSE
        assert classes(clone) == classes(make(name)[0])
    assert error(run(model, given), want) <= CLOSE
    patch.unpatch()
    assert torch.equal(run(model, given), want)


@torch.no_grad()
def test_saved_model_in_another_process(loads_elsewhere):
    model, given = make("Wan")
    want = run(model, given)
    rd.patch(model)
    loads_elsewhere(model, given, want, "model(**given, return_dict=False)[0]", launches=2, most=2e-6)


@torch.no_grad()
def test_a_pickle_in_another_version_of_diffusers_is_stock(monkeypatch):
    model, given = make("Wan")
    want, before = run(model, given), classes(model)
    with rd.patch(model):
        data = pickle.dumps(model)
    monkeypatch.setattr(diffusers, "__version__", "0.43.0")
    clone = pickle.loads(data)
    assert classes(clone) == before and torch.equal(run(clone, given), want)


@torch.no_grad()
def test_save_pretrained_holds_the_model_alone(tmp_path):
    model, given = make("Wan")
    want, keys = run(model, given), model.state_dict().keys()
    with rd.patch(model):
        model.save_pretrained(tmp_path)
        assert model.state_dict().keys() == keys
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, given), want)


@torch.no_grad()
def test_processors_that_others_put_there_since_stay():
    model, given = make("Flux")
    want = run(model, given)
    patch = rd.patch(model)
    other = diffusers.models.transformers.transformer_flux.FluxAttnProcessor()
    model.transformer_blocks[0].attn.set_processor(other)
    assert error(run(model, given), want) <= CLOSE
    patch.unpatch()
    assert model.transformer_blocks[0].attn.processor is other and torch.equal(run(model, given), want)


# ---- compiled


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen-Image", "Wan"])
def test_blocks_compiled_alone_are_one_graph(name):
    model, given = make(name)
    want = run(model, given)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with rd.patch(model):
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        began = launches()
        assert error(run(model, given), want) <= CLOSE and launches() > began
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_layers_compile_to_one_graph(name):
    model, given = make(name)
    x = torch.randn(2, 12, 24 if name == "Wan" else 32)
    with rd.patch(model):
        if name == "Wan":
            attn, more = model.blocks[0].attn1, {"rotary_emb": model.rope(given["hidden_states"])}
        else:
            attn = model.transformer_blocks[0].attn
            angles = torch.rand(15, 8).repeat_interleave(2, -1)
            more = {"encoder_hidden_states": torch.randn(2, 3, 32), "image_rotary_emb": (angles.cos(), angles.sin())}
        want = attn(x, **more)
        torch._dynamo.reset()
        got = torch.compile(attn, fullgraph=True, backend="aot_eager")(x, **more)
        torch._dynamo.reset()
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    assert all(error(a, b) <= CLOSE for a, b in pairs)


@pytest.mark.parametrize("name", ["Flux", "HunyuanVideo", "Wan"])
def test_gradients_of_each_of_vmaps_calls(name):
    model, given = make(name)
    key = next(key for key, x in given.items() if isinstance(x, torch.Tensor) and x.dim() >= 3)
    parameters = {each: x.detach() for each, x in model.named_parameters()}
    inputs = torch.stack([given[key] * scale for scale in (1.0, 0.5)])

    def loss(parameters, x):
        out = torch.func.functional_call(model, parameters, (), {**given, key: x})
        return (out[0] if isinstance(out, tuple) else out.sample).square().mean()

    want = [torch.func.grad(loss)(parameters, x) for x in inputs]
    largest = max(float(x.abs().max()) for x in want[0].values())
    with rd.patch(model) as patch:
        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
        assert all("with a gradient" in kind for kind in patch.calls)
    for each, x in got.items():
        for i, of_call in enumerate(want):
            assert float((x[i] - of_call[each]).abs().max()) <= 2e-6 * largest, each


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_another_default_device(name):
    """As torch.set_default_device("cuda") has it while the model is elsewhere."""
    model, given = make(name)
    want = run(model, given)
    with torch.device("meta"):
        patch = rd.patch(model)
    assert (patch.layers, patch.skipped) == (layers_of(name)[0], {})
    assert error(run(model, given), want) <= CLOSE
