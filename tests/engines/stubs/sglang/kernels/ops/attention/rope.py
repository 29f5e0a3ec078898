"""Functions by their parameters."""


# SPDX-License-Identifier: Apache-2.0
def apply_rope_with_cos_sin_cache_inplace(q, k, cos_sin_cache, positions, *, is_neox, rope_dim=0, fused_args=None):
    raise NotImplementedError


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    raise NotImplementedError
