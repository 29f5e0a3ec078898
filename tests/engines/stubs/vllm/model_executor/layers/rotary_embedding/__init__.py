"""`get_rope`, for what the walk asks for."""

# SPDX-License-Identifier: Apache-2.0
from .base import RotaryEmbedding
from .mrope import MRotaryEmbedding


def get_rope(head_size, max_position, is_neox_style=True, rope_parameters=None, dtype=None):
    rule = rope_parameters or {}
    rotary_dim = int(head_size * rule.get("partial_rotary_factor", 1.0))
    args = head_size, rotary_dim, max_position, rule.get("rope_theta", 10000), is_neox_style, dtype
    if "mrope_section" in rule:
        return MRotaryEmbedding(
            *args, mrope_section=rule["mrope_section"], mrope_interleaved=rule.get("mrope_interleaved", False)
        )
    return RotaryEmbedding(*args)
