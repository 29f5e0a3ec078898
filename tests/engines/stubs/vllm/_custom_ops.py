"""Its operators, by their schemas; their kernels, in C++ there, only say that they were called."""

# SPDX-License-Identifier: Apache-2.0
import torch

SCHEMAS = (
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    "fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, "
    "Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids, "
    "int forced_token_heads_per_warp=-1) -> ()",
)
calls = []
library = torch.library.Library("_C", "DEF")
for schema in SCHEMAS:
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, lambda *args, name=name: calls.append(name), "CPU")


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox):
    torch.ops._C.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)
