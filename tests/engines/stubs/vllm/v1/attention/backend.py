"""What an attention backend may be asked."""


# SPDX-License-Identifier: Apache-2.0
class AttentionImpl:
    def fused_qk_norm_rope_kvcache_supported(self):
        return False

    def fused_qk_norm_mrope_kvcache_supported(self):
        return False

    def fused_rope_kvcache_supported(self):
        return False

    def do_qk_norm_rope_kvcache_update(
        self, layer, qkv, q_out, k_out, positions, q_weight, k_weight, rms_norm_eps, cos_sin_cache, is_neox, kv_cache,
        layer_slot_mapping,
    ):  # fmt: skip
        raise NotImplementedError

    def do_qk_norm_mrope_kvcache_update(
        self, layer, qkv, q_out, positions, q_weight, k_weight, rms_norm_eps, cos_sin_cache, is_neox, mrope_section,
        is_interleaved, rotary_dim, kv_cache, layer_slot_mapping,
    ):  # fmt: skip
        raise NotImplementedError

    def do_rope_and_kv_cache_update(
        self, layer, query, key, value, positions, cos_sin_cache, is_neox, kv_cache, layer_slot_mapping
    ):
        raise NotImplementedError
