"""Tiny models with random weights of every class of transformers that rotates: found in the installed package, one for
each modeling file, from its default configuration with all sizes made small."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import glob
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 128, 4, 2, 32, 160
LARGEST = 30_000_000  # parameters: a default that was not made small is an error

# What a field whose name ends so becomes; the first that fits. Fields that a configuration has not stay away.
SIZES: list[tuple[str, Any]] = [
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_hash_layers|mtp_num_(hidden_)?layers", 0),
    (r"num_mem_blocks", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(num_|n_)?(key_value_heads|kv_heads|key_value_attention_heads|num_kv_heads)|multi_query_group_num", KV_HEADS),
    (r"linear_num_(key|value)_heads", KV_HEADS),
    (r"index_n_heads|index_num_heads|indexer_n_heads", KV_HEADS),
    (r"index_topk|indexer_topk|index_top_k", 64),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|moe_latent_size", 48),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim", 16),
    (r"qk_head_dim", 32),
    (r"(global_|swa_|linear_key_|linear_value_|attention_|kv_|mamba_)?head_dim", HEAD_DIM),
    (r"attention_key_size|kv_channels", HEAD_DIM),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", 8),
    (r"(mamba_d_head)", HEAD_DIM),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)", 4),
    (r".*(num_experts_per_tok(en)?|experts_per_token|top_k_experts|moe_k|num_selected_experts|moe_topk)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*(attention_heads|n_heads?|num_heads|n_attention_heads|heads)", HEADS),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|inner_dim|intermediate_size_mlp)", 96),
    (r"out_hidden_size|projection_dim|output_dim|text_hidden_size", WIDTH),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|lru_width|cross_attention_hidden_size)", WIDTH),
    (r"embedding_size|word_embed_proj_dim", WIDTH),
    (r".*(num_layers|n_layers?|num_blocks|hidden_layers|depth|_layers)", LAYERS),
    (r"hidden_size_per_layer_input", 16),
    (r".*vocab_size(_per_layer_input)?", VOCABULARY),
    (r"crop_size", 32),
    (r"frames_per_clip", 4),
    (r".*(num_channels|in_channels|in_chans)", 3),
    (r"image_size|img_size", 32),
    (r"(spatial_)?patch_size", 8),
    (r"max_position_embeddings|n_positions|max_seq_len", 256),
    (r"sliding_window|attention_window_size|attention_chunk_size|local_attention", 8),
    (r"pad_token_id", 0),
]  # fmt: skip
_SIZES = [(re.compile(pattern), value) for pattern, value in SIZES]


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or isinstance(value, float):
        return value
    for pattern, size in _SIZES:
        if pattern.fullmatch(name):
            return min(size, value) if value > 0 else value
    if name.endswith(("_id", "_token_index", "_index")) and value >= VOCABULARY:
        return 3 + value % (VOCABULARY - 4)
    return value


def _sections(value: list[int], pairs: int) -> list[int]:
    """The same shares of fewer pairs."""
    made = [max(1, each * pairs // sum(value)) for each in value]
    made[0] += pairs - sum(made)
    return made


def _rule(rule: dict[str, Any], pairs: int) -> dict[str, Any]:
    made = dict(rule)
    for name, value in rule.items():
        if isinstance(value, dict):
            made[name] = _rule(value, pairs)
        elif name == "mrope_section" and value:
            made[name] = _sections(list(value), pairs)
        elif name in ("short_factor", "long_factor"):
            made[name] = list(value)[:pairs] + [1.0] * max(0, pairs - len(value))
        elif name == "original_max_position_embeddings" and value:
            made[name] = 64
    return made


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "depth", "n_layers", "encoder_layers")
_LEFT_OUT = ("transformers_version", "architectures", "dtype", "_name_or_path", "id2label", "label2id", "stage_names",
             "out_features", "out_indices", "_out_features", "_out_indices")  # fmt: skip
# What is None by default, and not in a model that runs.
_GIVEN = {"head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "n_routed_experts": 4, "n_shared_experts": 1,
          "num_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_intermediate_size": 64,
          "topk_group": 1, "n_group": 1}  # fmt: skip


def shrunk(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with sizes made small; those of its parts likewise. Of the layers the first of
    each kind stays."""
    made: dict[str, Any] = {}
    depth = next((given[name] for name in _DEPTHS if given.get(name)), LAYERS)
    kinds = given.get("layer_types") or given.get("layers_block_type") or []
    kinds = kinds if len(kinds) == depth else [None] * depth
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept = sorted({*kept, *[i for i in range(depth) if i not in kept][: max(0, LAYERS - len(kept))]})
    for name, value in given.items():
        if name in _LEFT_OUT:
            continue
        if value is None:
            made[name] = _GIVEN.get(name)
        elif name == "per_layer_config" and value:
            by_layer = {int(i): layer for i, layer in value.items()}
            made[name] = {new: shrunk(by_layer[old]) for new, old in enumerate(kept) if old in by_layer}
        elif isinstance(value, dict):
            made[name] = value if name in ("rope_parameters", "rope_scaling") else shrunk(value)
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            made[name] = [value[i] for i in kept]
        elif name == "window_size" and isinstance(value, int):  # of an image, if there are patches
            made[name] = 32 if "patch_size" in given else 8
        else:
            made[name] = len(kept) if name in _DEPTHS and value == depth else _small(name, value)
    if "qk_rope_head_dim" in given:  # multi-head latent attention
        if given.get("head_dim") == given["qk_rope_head_dim"]:
            made["head_dim"] = made["qk_rope_head_dim"]
        if "num_key_value_heads" in given:
            made["num_key_value_heads"] = HEADS
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(given.get(name), dict):
            share = given[name].get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0
            width = made.get("qk_rope_head_dim") or made.get("head_dim") or HEAD_DIM
            made[name] = _rule(given[name], int(width * share) // 2)
    return made


_DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": {**_DEFAULT, "mrope_section": [4, 6, 6]}}
# What a class needs beyond smaller sizes, by its modeling file.
OPTIONS: dict[str, dict[str, Any]] = {
    "bamba/bamba": {"attn_layer_indices": [1]},
    "chameleon/chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass/cohere_compass": {"text_config": {"rope_parameters": {"full_attention": dict(_DEFAULT)}}},
    "codegen/codegen": {"rotary_dim": 16},
    "dbrx/dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2/deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "dots3_note/dots3_note": {"num_key_value_heads": HEADS},
    "esm/esm": {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 2},
    "esmc/esmc": {"num_key_value_heads": HEADS, "vocab_size": 160},
    "qwen2_5_omni/qwen2_5_omni": {"text_config": _MROPE},
    "falcon_h1/falcon_h1": {"mamba_d_ssm": 256, "mamba_d_head": 32},
    "glm46v/glm46v": {"text_config": _MROPE},
    "gptj/gptj": {"rotary_dim": 16},
    "granitemoehybrid/granitemoehybrid": {"position_embedding_type": "rope", "layer_types": ["mamba", "attention"]},
    "hunyuan_vl/hunyuan_vl": {"text_config": {"rope_parameters": {**_DEFAULT, "mrope_section": [4, 4, 4, 4]}}},
    "lfm2_moe/lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron/nemotron": {"num_key_value_heads": KV_HEADS},
    "nemotron3_diarization/nemotron3_diarization": {"num_key_value_heads": HEADS},
    "paddleocr_vl/paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_vl/qwen2_5_vl": {"text_config": _MROPE},
    "qwen4_exp/qwen4_exp": {"text_config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}},
    "recurrent_gemma/recurrent_gemma": {"num_hidden_layers": 3},
    "unlimited_ocr/unlimited_ocr": {"text_config": {"num_key_value_heads": HEADS}},
    "zamba2/zamba2": {"use_mem_rope": True},
}  # fmt: skip


def _merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    more = dict(more)
    if "text_config" not in fields:  # the text model alone
        more.update(more.pop("text_config", {}))
    both = {name: _merged(fields.get(name) or {}, more[name]) for name in more if isinstance(more[name], dict)}
    return {**fields, **more, **both}


_PREFERRED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "Model")
_PARTS = ("Talker", "Token2Wav", "Decoder", "MTP")  # that a user does not run alone


def _order(cls: Any) -> tuple[bool, int]:
    ends = (i for i, end in enumerate(_PREFERRED) if cls.__name__.endswith(end))
    return any(part in cls.__name__ for part in _PARTS), next(ends, len(_PREFERRED))


@functools.cache
def modeling_files() -> list[str]:
    """The modeling files that name a rotation, as "folder/name"."""
    root = os.path.join(os.path.dirname(transformers.__file__), "models")
    rotates = re.compile(r"rotary|rope", re.IGNORECASE)
    paths = (Path(path) for path in sorted(glob.glob(os.path.join(root, "*", "modeling_*.py"))))
    return [
        f"{path.parent.name}/{path.stem.removeprefix('modeling_')}"
        for path in paths
        if rotates.search(path.read_text(encoding="utf-8"))
    ]


def classes(name: str) -> list[Any]:
    """The model classes of a modeling file, the most common first."""
    folder, file = name.split("/")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{file}")
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
        and issubclass(cls, transformers.PreTrainedModel)
        and getattr(cls, "config_class", None)
        and not cls.__name__.endswith("PreTrainedModel")
        and "forward" in vars(cls)
    ]
    return sorted(found, key=_order)


def rotates(model: Any) -> bool:
    """Whether some module's code names a rotation, or its class is one."""
    word = re.compile(r"rotary|rope_?(att|emb|2d)|^rotate_", re.IGNORECASE)
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if any(map(word.search, (type(module).__name__, *(code.co_names if code else ())))):
            return True
    return False


def make(cls: Any, **options: Any) -> Any:
    """A tiny model of that class, in eval mode, whose norms do something."""
    whole = cls.config_class()
    config = cls.config_class(**_merged(shrunk(whole.to_dict()), options))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{cls.__name__}: {size} parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if not torch.isfinite(parameter).all() or parameter.dim() > 2 and not parameter.any():
            parameter.data = 0.02 * noise
        elif parameter.dim() == 1:
            parameter.data += 0.1 * noise
    return model


def inputs(model: Any) -> dict[str, Any]:
    """What its forward takes, drawn at random."""
    generator = torch.Generator().manual_seed(2)
    parameters = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {}
    ids = torch.randint(10, VOCABULARY - 20, (2, 12), generator=generator)
    if "input_ids" in parameters:
        made["input_ids"] = ids
        if "decoder_input_ids" in parameters:
            made["decoder_input_ids"] = ids.flip(1)
    else:
        config = model.config
        first = next(iter(parameters))
        if "grid_thw" in parameters:
            side = 2 * getattr(config, "spatial_merge_size", 2)
            volume = getattr(config, "in_channels", getattr(config, "num_channels", 3))
            volume *= getattr(config, "temporal_patch_size", 1) * config.patch_size**2
            made[first] = torch.randn((side * side, volume), generator=generator)
            made["grid_thw"] = torch.tensor([[1, side, side]])
        elif first == "input_features" and getattr(config, "num_mel_bins", None):
            made[first] = torch.randn((2, 64, config.num_mel_bins), generator=generator)
        elif first == "pixel_values_videos":
            shape = 2, config.frames_per_clip, 3, config.crop_size, config.crop_size
            made[first] = torch.randn(shape, generator=generator)
        elif "pixel_values" in parameters:
            made["pixel_values"] = torch.randn((2, 3, config.image_size, config.image_size), generator=generator)
        else:
            raise TypeError(f"inputs of {type(model).__name__}: {', '.join(parameters)}")
    return made


def built(name: str) -> tuple[Any, dict[str, Any], Any]:
    """The first class of a modeling file that builds and runs: the model, its inputs, its output."""
    reasons = []
    for cls in classes(name)[:4]:
        try:
            model = make(cls, **OPTIONS.get(name, {}))
            given = inputs(model)
            want = output(model, given)
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{cls.__name__}: {type(error).__name__}: {error}")
            continue
        if torch.isfinite(want).all():
            return model, given, want
        reasons.append(f"{cls.__name__}: its output is not finite")
    raise ValueError("; ".join(reasons) or f"{name} has no model class")


def output(model: Any, given: dict[str, Any]) -> Any:
    """The first floating-point tensor that it gives, in float32."""
    result = model(**{**given, **({"use_cache": False} if "input_ids" in given else {})})
    values = result.values() if hasattr(result, "values") else [result]
    return next(x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()).float()
