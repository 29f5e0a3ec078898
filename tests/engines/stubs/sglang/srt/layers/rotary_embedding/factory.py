"""`get_rope`, for the kinds of scaling that the walk asks for."""

# SPDX-License-Identifier: Apache-2.0
import math

import torch

from sglang.srt.layers.rotary_embedding.bailing_mrope import BailingMRotaryEmbedding
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import (
    DeepseekScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
)


def get_rope(head_size, rotary_dim, max_position, base, is_neox_style=True, rope_scaling=None, dtype=None):
    rule = rope_scaling or {"rope_type": "default"}
    inv_freq = float(base) ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    kind, factor = rule["rope_type"], rule.get("factor", 1.0)
    if kind == "longrope":
        longer = [inv_freq / torch.tensor(rule[name]).double() for name in ("short_factor", "long_factor")]
        return Phi3LongRoPEScaledRotaryEmbedding(
            head_size, max_position, rule["original_max_position_embeddings"], *longer
        )
    args = head_size, rotary_dim, max_position, inv_freq / factor, is_neox_style
    if rule.get("video_rope"):
        return BailingMRotaryEmbedding(*args, mrope_section=rule["mrope_section"])
    if "mrope_section" in rule:
        return MRotaryEmbedding(
            *args, mrope_section=rule["mrope_section"], mrope_interleaved=rule.get("mrope_interleaved", False)
        )
    if kind == "llama3":
        return Llama3RotaryEmbedding(*args)
    if kind == "deepseek_yarn":
        return DeepseekScalingRotaryEmbedding(*args, scale=0.1 * math.log(factor) + 1)
    return RotaryEmbedding(*args)
