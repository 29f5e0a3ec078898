"""A table that begins at a position of its own, and axes of which time comes last."""

# SPDX-License-Identifier: Apache-2.0
import torch

from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.mrope import Ernie4_5_VLRotaryEmbedding


class BailingMRotaryEmbedding(RotaryEmbedding):
    position_start = -8
    native_axes = Ernie4_5_VLRotaryEmbedding.native_axes

    def __init__(self, head_size, rotary_dim, rows, inv_freq, is_neox_style, mrope_section):
        super().__init__(head_size, rotary_dim, rows + 8, inv_freq, is_neox_style)
        self.mrope_section = [*mrope_section[1:], mrope_section[0]]

    def rows_of(self, positions):
        if positions.ndim == 1:
            return self.cos_sin_cache[positions]
        axes = self.native_axes().repeat(2)
        return torch.stack([self.cos_sin_cache[positions[axis], i] for i, axis in enumerate(axes.tolist())], -1)

    def forward(self, positions, query, key, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions - self.position_start, query, key)
