"""Tiny diffusers transformers with random weights, and what they are called with."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

BATCH, TEXT = 2, 3


def _drawn(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _flux() -> Any:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    ids = torch.tensor([[0, i, j] for i in range(3) for j in range(4)], dtype=torch.float32)
    return model, {
        "hidden_states": _drawn(BATCH, 12, 4),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "pooled_projections": _drawn(BATCH, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _flux2() -> Any:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    ids = torch.tensor([[0, i, j, 0] for i in range(3) for j in range(4)], dtype=torch.float32)
    text_ids = torch.tensor([[0, 0, 0, i] for i in range(TEXT)], dtype=torch.float32)
    return model, {
        "hidden_states": _drawn(BATCH, 12, 4),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": ids[None].expand(BATCH, -1, -1),
        "txt_ids": text_ids[None].expand(BATCH, -1, -1),
    }


def _qwen_image() -> Any:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = {
        "hidden_states": _drawn(BATCH, 12, 16),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_shapes": [[(1, 3, 4)]] * BATCH,
    }
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:
        given["txt_seq_lens"] = [TEXT] * BATCH
    return model, given


def _z_image() -> Any:
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 4, 8], axes_lens=[64, 64, 64],
    )  # fmt: skip
    return model, {
        "x": [_drawn(4, 1, 4, 8), _drawn(4, 1, 4, 8)],
        "t": torch.tensor([0.3, 0.7]),
        "cap_feats": [_drawn(5, 32), _drawn(7, 32)],
    }


def _wan() -> Any:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _drawn(BATCH, 4, 2, 4, 6),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
    }


def _ltx() -> Any:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _drawn(BATCH, 12, 4),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "num_frames": 1,
        "height": 3,
        "width": 4,
        "rope_interpolation_scale": (0.3, 32.0, 32.0),
    }


def _hunyuan_video() -> Any:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=32,
        pooled_projection_dim=32, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": _drawn(BATCH, 4, 2, 3, 2),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "pooled_projections": _drawn(BATCH, 32),
        "guidance": torch.tensor([3500.0, 3500.0]),
    }


def _cogvideox() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = 6 * torch.rand((3 * 2 * 2, 8), generator=torch.Generator().manual_seed(9))
    return model, {
        "hidden_states": _drawn(BATCH, 3, 4, 4, 4),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "timestep": torch.tensor([3, 7]),
        "image_rotary_emb": tuple(x.repeat_interleave(2, -1) for x in (angles.cos(), angles.sin())),
    }


def _lumina2() -> Any:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _drawn(BATCH, 4, 4, 6),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _drawn(BATCH, TEXT, 32),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool),
    }


# With the layers that rotate, and those of them whose norm is done with the rotation.
MODELS = {
    "Flux": (_flux, 2, 2),
    "Flux 2": (_flux2, 2, 2),
    "Qwen-Image": (_qwen_image, 2, 2),
    "Z-Image": (_z_image, 3, 3),
    "Wan": (_wan, 2, 2),
    "LTX": (_ltx, 2, 2),
    "HunyuanVideo": (_hunyuan_video, 2, 2),
    "CogVideoX": (_cogvideox, 2, 0),
    "Lumina 2": (_lumina2, 4, 4),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode and its arguments, the same at each call. Norms and biases have weights of their own."""
    torch.manual_seed(3)
    model, given = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(x) for x in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    kept = {key: value for key, value in given.items() if key in ("image_rotary_emb", "img_ids", "txt_ids")}
    in_float32 = model._keep_in_fp32_modules or []  # as from_pretrained does
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(part in in_float32 for part in path.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval(), {**{key: cast(value) for key, value in given.items()}, **kept}


def run(model: Any, given: Any) -> Any:
    """What it gives, as one tensor."""
    result = model(**given, return_dict=False)[0]
    return torch.stack(list(result)) if isinstance(result, (list, tuple)) else result
