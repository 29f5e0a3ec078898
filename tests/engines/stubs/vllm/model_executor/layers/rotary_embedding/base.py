"""Rotation by a table."""

# SPDX-License-Identifier: Apache-2.0
import torch

from vllm import _custom_ops


def turned(x, cos, sin, neox):
    """x: [tokens, heads, width]; cos, sin: [tokens, width / 2]."""
    cos, sin = cos[:, None].double(), sin[:, None].double()
    half = x.shape[-1] // 2
    first, second = (x[..., :half], x[..., half:]) if neox else (x[..., ::2], x[..., 1::2])
    new = first.double() * cos - second.double() * sin, second.double() * cos + first.double() * sin
    return (torch.cat(new, -1) if neox else torch.stack(new, -1).flatten(-2)).to(x.dtype)


class RotaryEmbedding(torch.nn.Module):
    def __init__(self, head_size, rotary_dim, rows, base, is_neox_style, dtype):
        super().__init__()
        self.head_size, self.rotary_dim, self.is_neox_style = head_size, rotary_dim, is_neox_style
        inv_freq = float(base) ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
        angles = torch.arange(rows).double()[:, None] * inv_freq
        self.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), -1).to(dtype))

    def rows_of(self, positions):
        return self.cos_sin_cache[positions]

    def forward_native(self, positions, query, key=None, offsets=None):
        cos, sin = self.rows_of(positions).chunk(2, -1)

        def all_heads(x):
            rows = x.reshape(x.shape[0], -1, self.head_size)
            part = turned(rows[..., : self.rotary_dim], cos, sin, self.is_neox_style)
            return torch.cat((part, rows[..., self.rotary_dim :]), -1).reshape(x.shape)

        return all_heads(query), None if key is None else all_heads(key)

    def forward_cuda(self, positions, query, key=None):
        table = self.cos_sin_cache.to(query.dtype)
        _custom_ops.rotary_embedding(positions, query, key, self.head_size, table, self.is_neox_style)
        return query, key
