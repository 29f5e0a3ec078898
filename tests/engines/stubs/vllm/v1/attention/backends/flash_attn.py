"""The backend that takes norm, rotation and store."""

# SPDX-License-Identifier: Apache-2.0
from vllm.v1.attention.backend import AttentionImpl


class FlashAttentionImpl(AttentionImpl):
    pass
