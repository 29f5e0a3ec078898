"""Layers with forwards of their own."""

# SPDX-License-Identifier: Apache-2.0
import torch

from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding, turned


class Llama3RotaryEmbedding(RotaryEmbedding):
    pass


class DeepseekScalingRotaryEmbedding(RotaryEmbedding):
    def forward_cpu(self, positions, query, key, offsets=None):
        return self.forward_native(positions, query, key, offsets)


class Phi3LongRoPEScaledRotaryEmbedding(torch.nn.Module):
    def __init__(self, head_size, rows, original, short, long):
        super().__init__()
        self.head_size = self.rotary_dim = head_size
        self.original_max_position_embeddings = original
        tables = []
        for count, inv_freq in ((original, short), (rows, long)):
            angles = torch.arange(count).double()[:, None] * inv_freq
            tables.append(torch.cat((angles.cos(), angles.sin()), -1))
        self.register_buffer("long_short_cos_sin_cache", torch.cat(tables).float())

    def forward(self, positions, query, key, offsets=None):
        original = self.original_max_position_embeddings
        first = original if (positions > original).any() else 0
        cos, sin = self.long_short_cos_sin_cache[positions + first].chunk(2, -1)
        return tuple(turned(x.reshape(len(x), -1, self.head_size), cos, sin, True).flatten(1) for x in (query, key))


class DualChunkRotaryEmbedding(torch.nn.Module):
    def __init__(self, head_size, rotary_dim, rows, base, is_neox_style, dtype, chunk_size, local_size):
        super().__init__()
        self.head_size, self.rotary_dim, self.is_neox_style = head_size, rotary_dim, is_neox_style
        self.chunk_size, self.local_size = chunk_size, local_size
        inv_freq = float(base) ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
        length = chunk_size - local_size
        t = torch.arange(length).double()
        times = {
            "q": t, "qc": (t + length).clamp(max=chunk_size), "k": torch.arange(rows).double() % length,
            "qc_no_clamp": t + length, "q_inter": t + chunk_size,
        }  # fmt: skip
        for name, time in times.items():
            angles = time[:, None] * inv_freq
            self.register_buffer(f"cos_sin_{name}_cache", torch.cat((angles.cos(), angles.sin()), -1).to(dtype))

    def forward(self, positions, query, key, offsets=None):
        length = self.chunk_size - self.local_size
        last = torch.full_like(positions, length - 1)
        within = positions % length
        tables = [(self.cos_sin_q_cache, within), (self.cos_sin_qc_cache, within), (self.cos_sin_qc_cache, last),
                  (self.cos_sin_qc_no_clamp_cache, within), (self.cos_sin_q_inter_cache, within)]  # fmt: skip

        def rotate(x, table, row):
            rows = x.reshape(len(x), -1, self.head_size)
            cos, sin = table[row].chunk(2, -1)
            part = turned(rows[..., : self.rotary_dim], cos, sin, self.is_neox_style)
            return torch.cat((part, rows[..., self.rotary_dim :]), -1).flatten(1)

        return torch.cat([rotate(query, *each) for each in tables], -1), rotate(key, self.cos_sin_k_cache, positions)
