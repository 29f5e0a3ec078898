"""Attention with a norm of each head before the rotation."""

# SPDX-License-Identifier: Apache-2.0
import torch

from sglang.srt.runtime_context import get_exec


class RMSNorm(torch.nn.Module):
    cast_x_before_out_mul = False
    variance_size_override = None
    _quant_linear = None

    def __init__(self, size, eps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * self.weight).to(x.dtype)


class Qwen3Attention(torch.nn.Module):
    def forward_prepare_native(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(1)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(1)
        return *self.rotary_emb(positions, q, k), v

    def forward(self, positions, hidden_states, forward_batch):
        get_exec()
        q, k, v = self.forward_prepare_native(positions=positions, hidden_states=hidden_states)
        return self.o_proj(self.attn(q, k, v, forward_batch, save_kv_cache=True))[0]
