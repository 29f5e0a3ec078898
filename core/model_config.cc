// Shapes from a model's config.json, and the table of what the models' code fixes.
// SPDX-License-Identifier: Apache-2.0
#include "core/model_config.h"

#include "core/json_fields.h"
#include "core/model_traits.h"
#include "core/rope_config.h"

namespace ropewalk {
namespace {

constexpr auto kRms = TraitNorm::kRms;
constexpr auto kRmsZeroCentered = TraitNorm::kRmsZeroCentered;

// Only what differs from a plain Llama: halves, no norm, theta 10000, the whole head.
constexpr ModelTraits kTraits[] = {
    // interleaved pairs
    {.model_type = "axk1", .interleaved = true},
    {.model_type = "axk2", .interleaved = true},
    {.model_type = "bailing_hybrid", .interleaved = true},
    {.model_type = "blt", .interleaved = true, .theta = 5e5},
    {.model_type = "blt_global_transformer", .interleaved = true, .theta = 5e5},
    {.model_type = "blt_local_decoder", .interleaved = true, .theta = 5e5},
    {.model_type = "blt_local_encoder", .interleaved = true, .theta = 5e5},
    {.model_type = "blt_patcher", .interleaved = true},
    {.model_type = "codegen", .interleaved = true},
    {.model_type = "cohere", .interleaved = true, .theta = 5e5},
    {.model_type = "cohere2", .interleaved = true},
    {.model_type = "cohere2_moe", .interleaved = true},
    {.model_type = "deepseek_v2", .interleaved = true},
    {.model_type = "deepseek_v3", .interleaved = true},
    {.model_type = "deepseek_v32", .interleaved = true},
    {.model_type = "deepseek_v4", .interleaved = true},
    {.model_type = "ernie4_5", .interleaved = true, .theta = 5e5},
    {.model_type = "ernie4_5_moe", .interleaved = true, .theta = 5e5},
    {.model_type = "ernie4_5_vl_moe_text", .interleaved = true, .theta = 5e5, .mrope = TraitMrope::kErnie},
    {.model_type = "glm", .interleaved = true, .partial = 0.5},
    {.model_type = "glm4", .interleaved = true, .partial = 0.5},
    {.model_type = "glm4_moe_lite", .interleaved = true},
    {.model_type = "glm4v_text", .interleaved = true},
    {.model_type = "glm_moe_dsa", .interleaved = true},
    {.model_type = "glm_ocr_text", .interleaved = true},
    {.model_type = "gptj", .interleaved = true},
    {.model_type = "helium", .interleaved = true, .theta = 1e5},
    {.model_type = "llama4_text", .interleaved = true, .theta = 5e5},
    {.model_type = "longcat_flash", .interleaved = true, .theta = 1e7},
    {.model_type = "mistral4", .interleaved = true},
    {.model_type = "mistral_large4_text", .interleaved = true},
    {.model_type = "youtu", .interleaved = true},
    // RMSNorm of each head before the rotation
    {.model_type = "afmoe", .norm = kRms},
    {.model_type = "apertus", .norm = kRms, .theta = 1.2e7},
    {.model_type = "doge", .norm = kRms},
    {.model_type = "dots1", .norm = kRms},
    {.model_type = "exaone4", .norm = kRms},
    {.model_type = "exaone_moe", .norm = kRms},
    {.model_type = "gemma3_text",
     .norm = kRmsZeroCentered,
     .theta = 1e6,
     .local_theta = 1e4,
     .q_heads = 8,
     .k_heads = 4,
     .head_dim = 256},
    {.model_type = "gemma3n_text", .norm = kRms, .theta = 1e6, .local_theta = 1e4},
    {.model_type = "gemma4_text", .norm = kRms},
    {.model_type = "glm4_moe", .norm = kRms, .norm_if_asked = true, .partial = 0.5},
    {.model_type = "hy_v3", .norm = kRms, .theta = 11158840},
    {.model_type = "laguna", .norm = kRms},
    {.model_type = "lfm2", .norm = kRms, .theta = 1e6},
    {.model_type = "lfm2_moe", .norm = kRms, .theta = 1e6},
    {.model_type = "qwen3", .norm = kRms},
    {.model_type = "qwen3_5_moe_text", .norm = kRmsZeroCentered, .partial = 0.25, .mrope = TraitMrope::kInterleaved},
    {.model_type = "qwen3_5_text", .norm = kRmsZeroCentered, .partial = 0.25, .mrope = TraitMrope::kInterleaved},
    {.model_type = "qwen3_moe", .norm = kRms},
    {.model_type = "qwen3_next", .norm = kRmsZeroCentered, .partial = 0.25},
    {.model_type = "qwen3_omni_moe_text", .norm = kRms, .theta = 1e6, .mrope = TraitMrope::kInterleaved},
    {.model_type = "qwen3_vl_moe_text", .norm = kRms, .theta = 5e5, .mrope = TraitMrope::kInterleaved},
    {.model_type = "qwen3_vl_text", .norm = kRms, .theta = 5e5, .mrope = TraitMrope::kInterleaved},
    {.model_type = "t5gemma2_decoder", .norm = kRmsZeroCentered, .theta = 1e6, .local_theta = 1e4},
    {.model_type = "t5gemma2_text", .norm = kRmsZeroCentered, .theta = 1e6, .local_theta = 1e4},
    // another theta, or a part of the head
    {.model_type = "bamba", .partial = 0.5},
    {.model_type = "bitnet", .theta = 5e5},
    {.model_type = "csm", .theta = 5e5},
    {.model_type = "cwm", .theta = 1e6},
    {.model_type = "emu3_text_model", .theta = 1e6},
    {.model_type = "flex_olmo", .theta = 5e5},
    {.model_type = "fuyu", .theta = 25000},
    {.model_type = "glm4v_moe_text", .partial = 0.5},
    {.model_type = "gpt_neox", .partial = 0.25},
    {.model_type = "gpt_neox_japanese", .partial = 1},
    {.model_type = "gpt_oss", .theta = 150000},
    {.model_type = "gte", .theta = 160000},
    {.model_type = "hunyuan_vl_text", .mrope = TraitMrope::kUnsupported},
    {.model_type = "jina_embeddings_v3", .theta = 20000},
    {.model_type = "minimax", .theta = 1e6},
    {.model_type = "minimax_m2", .theta = 5e6},
    {.model_type = "mixtral", .theta = 1e6},
    {.model_type = "mllama_text_model", .theta = 5e5},
    {.model_type = "modernbert", .theta = 160000, .local_theta = 1e4},
    {.model_type = "modernbert-decoder", .theta = 160000, .local_theta = 1e4},
    {.model_type = "nemotron", .partial = 0.5},
    {.model_type = "nomic_bert", .theta = 1000},
    {.model_type = "olmo3", .theta = 5e5, .local_theta = 5e5},
    {.model_type = "paddleocr_vl_text", .theta = 5e5},
    {.model_type = "persimmon", .partial = 0.5},
    {.model_type = "phi", .partial = 0.5},
    {.model_type = "phimoe", .theta = 1e6},
    {.model_type = "qwen2_5_omni_text", .theta = 1e6},
    {.model_type = "qwen2_5_vl", .theta = 1e6},
    {.model_type = "qwen2_5_vl_text", .theta = 1e6},
    {.model_type = "qwen2_vl", .theta = 1e6},
    {.model_type = "qwen2_vl_text", .theta = 1e6},
    {.model_type = "recurrent_gemma", .partial = 0.5},
    {.model_type = "smollm3", .theta = 2e6},
    {.model_type = "solar_open", .theta = 1e6},
    {.model_type = "stablelm", .partial = 0.25},
    // diffusion transformers
    {.model_type = "FluxTransformer2DModel",
     .interleaved = true,
     .norm = kRms,
     .theta = 1e4,
     .axes_dims = {16, 56, 56},
     .double_table = true},
    {.model_type = "Flux2Transformer2DModel",
     .interleaved = true,
     .norm = kRms,
     .theta = 2000,
     .axes_dims = {32, 32, 32, 32},
     .double_table = true},
    {.model_type = "QwenImageTransformer2DModel",
     .interleaved = true,
     .norm = kRms,
     .theta = 1e4,
     .axes_dims = {16, 56, 56}},
    {.model_type = "ZImageTransformer2DModel",
     .interleaved = true,
     .norm = kRms,
     .theta = 256,
     .axes_dims = {32, 48, 48},
     .double_table = true},
};

}  // namespace

const ModelTraits& TraitsOf(std::string_view model_type) {
  static constexpr ModelTraits kPlain{};
  for (const ModelTraits& traits : kTraits) {
    if (traits.model_type == model_type) return traits;
  }
  return kPlain;
}

Status ReadModelConfig(std::string_view json, std::string_view name, ModelConfig* out) {
  return WithoutThrowing([&]() -> Status {
    RopeConfig config;
    ROPEWALK_TRY(ReadRopeConfig(json, name, {}, 0, /*any_layer_type=*/true, &config));
    out->name = std::move(config.name);
    out->model_type = std::move(config.model_type);
    out->q_heads = config.q_heads;
    out->k_heads = config.k_heads;
    out->head_dim = config.head_dim;
    out->rotary_dim = config.rule.rotary_dim;
    out->rotary_offset = config.rotary_offset;
    out->max_position = config.max_position;
    out->interleaved = config.interleaved;
    out->norm = config.norm;
    out->zero_centered_weight = config.zero_centered_weight;
    out->eps = config.eps;
    out->axes = config.axes;
    out->layer_types = std::move(config.layer_types);
    return {};
  });
}

}  // namespace ropewalk
