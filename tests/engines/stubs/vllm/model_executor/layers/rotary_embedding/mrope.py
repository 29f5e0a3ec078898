"""Positions with three axes."""

# SPDX-License-Identifier: Apache-2.0
import torch

from .base import RotaryEmbedding

library = torch.library.Library("vllm", "DEF")
library.define(
    "mrope(Tensor positions, Tensor(a1!) query, Tensor(a2!) key, Tensor cos_sin_cache, SymInt head_size, "
    "SymInt rotary_dim, SymInt mrope_section_t, SymInt mrope_section_h, SymInt mrope_section_w, "
    "bool mrope_interleaved, bool is_neox_style) -> ()"
)


class MRotaryEmbedding(RotaryEmbedding):
    def __init__(self, *args, mrope_section, mrope_interleaved=False):
        super().__init__(*args)
        self.mrope_section, self.mrope_interleaved = mrope_section, mrope_interleaved

    def rows_of(self, positions):
        if positions.ndim == 1:
            return self.cos_sin_cache[positions]
        section = self.mrope_section
        axes = [axis for axis, size in enumerate(section) for _ in range(size)]
        if self.mrope_interleaved:
            axes = [i % 3 if i < 3 * section[i % 3] else 0 for i in range(sum(section))]
        return torch.stack([self.cos_sin_cache[positions[axis], i] for i, axis in enumerate(axes + axes)], -1)

    def forward_cuda(self, positions, query, key=None, offsets=None):
        return self.forward_native(positions, query, key)

    def forward_hip(self, positions, query, key=None, offsets=None):
        table = self.cos_sin_cache.to(query.dtype)
        torch.ops.vllm.mrope(
            positions, query, key, table, self.head_size, self.rotary_dim, *self.mrope_section, self.mrope_interleaved,
            self.is_neox_style,
        )  # fmt: skip
        return query, key
