"""Rotation by a table. `turned` is the formula in the plainest form."""

# SPDX-License-Identifier: Apache-2.0
import torch


def turned(x, cos, sin, neox):
    """x: [tokens, heads, width]; cos, sin: [tokens, width / 2]."""
    cos, sin = cos[:, None].double(), sin[:, None].double()
    half = x.shape[-1] // 2
    first, second = (x[..., :half], x[..., half:]) if neox else (x[..., ::2], x[..., 1::2])
    new = first.double() * cos - second.double() * sin, second.double() * cos + first.double() * sin
    return (torch.cat(new, -1) if neox else torch.stack(new, -1).flatten(-2)).to(x.dtype)


class RotaryEmbedding(torch.nn.Module):
    def __init__(self, head_size, rotary_dim, rows, inv_freq, is_neox_style, scale=1.0):
        super().__init__()
        self.head_size, self.rotary_dim, self.is_neox_style = head_size, rotary_dim, is_neox_style
        angles = torch.arange(rows).double()[:, None] * inv_freq
        self.register_buffer("cos_sin_cache", (torch.cat((angles.cos(), angles.sin()), -1) * scale).float())

    def rows_of(self, positions):
        return self.cos_sin_cache[positions]

    def forward_native(self, positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
        cos, sin = self.rows_of(positions if offsets is None else positions + offsets).chunk(2, -1)

        def all_heads(x):
            rows = x.reshape(x.shape[0], -1, self.head_size)
            part = turned(rows[..., : self.rotary_dim], cos, sin, self.is_neox_style)
            return torch.cat((part, rows[..., self.rotary_dim :]), -1).reshape(x.shape)

        return all_heads(query), all_heads(key)

    def forward_cuda(self, positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions, query, key, offsets)

    def forward_xpu(self, positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions, query, key, offsets)

    def forward_cpu(self, positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
        return self.forward_native(positions, query, key, offsets)

    def forward(self, *args, **kwargs):
        return self.forward_cuda(*args, **kwargs)
