"""Positions with three axes."""

# SPDX-License-Identifier: Apache-2.0
import torch

from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding


class MRotaryEmbedding(RotaryEmbedding):
    def __init__(self, *args, mrope_section, mrope_interleaved=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.mrope_section = mrope_section
        self.axis_map = self.make_axis_map(mrope_interleaved)

    def make_axis_map(self, interleaved):
        axes = [axis for axis, size in enumerate(self.mrope_section) for _ in range(size)]
        if interleaved:
            axes = [i % 3 if i < 3 * self.mrope_section[i % 3] else 0 for i in range(self.rotary_dim // 2)]
        return torch.tensor(axes)

    def native_axes(self):
        return self.axis_map

    def rows_of(self, positions):
        if positions.ndim == 1:
            return self.cos_sin_cache[positions]
        axes = self.native_axes().repeat(2)
        return torch.stack([self.cos_sin_cache[positions[axis], i] for i, axis in enumerate(axes.tolist())], -1)

    def forward_cuda(self, positions, query, key, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions, query, key)

    def forward_xpu(self, positions, query, key, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions, query, key)

    def forward_cpu(self, positions, query, key, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions, query, key)


class Ernie4_5_VLRotaryEmbedding(MRotaryEmbedding):  # noqa: N801
    def __init__(self, head_size, rotary_dim, rows, base, is_neox_style, dtype, mrope_section):
        inv_freq = float(base) ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
        super().__init__(head_size, rotary_dim, rows, inv_freq, is_neox_style, mrope_section=mrope_section)

    def make_axis_map(self, interleaved):
        return None

    def native_axes(self):
        height, width, time = self.mrope_section
        return torch.tensor([1 + i % 2 for i in range(height + width)] + [0] * time)

    def forward_cuda(self, positions, query, key=None):
        return self.forward_native(positions, query, key)

    def forward_xpu(self, positions, query, key=None):
        return self.forward_native(positions, query, key)
