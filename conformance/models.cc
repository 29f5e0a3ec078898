// SPDX-License-Identifier: Apache-2.0
#include "conformance/models.h"

#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/text.h"
#include "models/json_fields.h"

namespace ropewalk {
namespace {

constexpr int32_t kHalves = ROPEWALK_NEOX, kNeighbours = ROPEWALK_INTERLEAVED;
constexpr HeadNorm kNo = HeadNorm::kNone, kRms = HeadNorm::kWeight, kRms1 = HeadNorm::kZeroCentered;

// name, heads of q and k, head_dim, rotary_dim, rotary_offset, pairing, norm, source
constexpr ModelHeads kModels[] = {
    // Halves, the whole head.
    {"Llama-2-7B", 32, 32, 128, 128, 0, kHalves, kNo, "meta-llama/Llama-2-7b-hf"},
    {"Llama-2-13B", 40, 40, 128, 128, 0, kHalves, kNo, "meta-llama/Llama-2-13b-hf"},
    {"Llama-30B", 52, 52, 128, 128, 0, kHalves, kNo, "garage-bAInd/Platypus-30B"},
    {"Llama-3.1-8B", 32, 8, 128, 128, 0, kHalves, kNo, "meta-llama/Llama-3.1-8B"},
    {"Llama-3.1-70B", 64, 8, 128, 128, 0, kHalves, kNo, "meta-llama/Llama-3.1-70B"},
    {"Llama-3.1-405B", 128, 8, 128, 128, 0, kHalves, kNo, "meta-llama/Llama-3.1-405B"},
    {"Llama-3.2-1B", 32, 8, 64, 64, 0, kHalves, kNo, "meta-llama/Llama-3.2-1B"},
    {"Llama-3.2-3B", 24, 8, 128, 128, 0, kHalves, kNo, "meta-llama/Llama-3.2-3B"},
    {"OpenLlama-3B", 32, 32, 100, 100, 0, kHalves, kNo, "openlm-research/open_llama_3b"},
    {"TinyLlama-1.1B", 32, 4, 64, 64, 0, kHalves, kNo, "TinyLlama/TinyLlama-1.1B-Chat-v1.0"},
    {"MicroLlama-300M", 16, 4, 64, 64, 0, kHalves, kNo, "keeeeenw/MicroLlama"},
    {"SmolLM2-135M", 9, 3, 64, 64, 0, kHalves, kNo, "HuggingFaceTB/SmolLM2-135M-Instruct"},
    {"SmolLM2-360M", 15, 5, 64, 64, 0, kHalves, kNo, "HuggingFaceTB/SmolLM2-360M"},
    {"SmolLM2-1.7B", 32, 32, 64, 64, 0, kHalves, kNo, "HuggingFaceTB/SmolLM2-1.7B"},
    {"SmolLM3-3B", 16, 4, 128, 128, 0, kHalves, kNo, "HuggingFaceTB/SmolLM3-3B"},
    {"Mistral-7B", 32, 8, 128, 128, 0, kHalves, kNo, "mistralai/Mistral-7B-v0.3"},
    {"Mixtral-8x22B", 48, 8, 128, 128, 0, kHalves, kNo, "mistralai/Mixtral-8x22B-v0.1"},
    {"Mistral-Large-2", 96, 8, 128, 128, 0, kHalves, kNo, "mistralai/Mistral-Large-Instruct-2407"},
    {"Yi-6B", 32, 4, 128, 128, 0, kHalves, kNo, "01-ai/Yi-6B"},
    {"Yi-34B", 56, 8, 128, 128, 0, kHalves, kNo, "01-ai/Yi-34B"},
    {"InternLM2-20B", 48, 8, 128, 128, 0, kHalves, kNo, "internlm/internlm2-20b"},
    {"DBRX", 48, 8, 128, 128, 0, kHalves, kNo, "databricks/dbrx-base"},
    {"OLMo-1B", 16, 16, 128, 128, 0, kHalves, kNo, "allenai/OLMo-1B-hf"},
    {"OLMo-2-13B", 40, 40, 128, 128, 0, kHalves, kNo, "allenai/OLMo-2-1124-13B"},
    {"Phi-3-mini", 32, 32, 96, 96, 0, kHalves, kNo, "microsoft/Phi-3-mini-128k-instruct"},
    {"Phi-4", 40, 10, 128, 128, 0, kHalves, kNo, "microsoft/phi-4"},
    {"StarCoder2-3B", 24, 2, 128, 128, 0, kHalves, kNo, "bigcode/starcoder2-3b"},
    {"StarCoder2-7B", 36, 4, 128, 128, 0, kHalves, kNo, "bigcode/starcoder2-7b"},
    {"StarCoder2-15B", 48, 4, 128, 128, 0, kHalves, kNo, "bigcode/starcoder2-15b"},
    {"Granite-3.3-2B", 32, 8, 64, 64, 0, kHalves, kNo, "ibm-granite/granite-3.3-2b-base"},
    {"Granite-3.3-8B", 32, 8, 128, 128, 0, kHalves, kNo, "ibm-granite/granite-3.3-8b-base"},
    {"MiniCPM-2B", 36, 36, 64, 64, 0, kHalves, kNo, "openbmb/MiniCPM-2B-sft-bf16"},
    {"gpt-oss-20B", 64, 8, 64, 64, 0, kHalves, kNo, "openai/gpt-oss-20b"},
    {"Seed-OSS-36B", 80, 8, 128, 128, 0, kHalves, kNo, "ByteDance-Seed/Seed-OSS-36B-Instruct"},
    {"Falcon-7B", 71, 1, 64, 64, 0, kHalves, kNo, "tiiuae/falcon-7b"},
    {"Falcon-40B", 128, 8, 64, 64, 0, kHalves, kNo, "tiiuae/falcon-40b"},
    {"Falcon-180B", 232, 8, 64, 64, 0, kHalves, kNo, "tiiuae/falcon-180B"},
    {"Falcon3-1B", 8, 4, 256, 256, 0, kHalves, kNo, "tiiuae/Falcon3-1B-Base"},
    {"Falcon3-7B", 12, 4, 256, 256, 0, kHalves, kNo, "tiiuae/Falcon3-7B-Base"},
    {"Gemma-2B", 8, 1, 256, 256, 0, kHalves, kNo, "google/gemma-2b"},
    {"Gemma-7B", 16, 16, 256, 256, 0, kHalves, kNo, "google/gemma-7b"},
    {"Gemma-2-2B", 8, 4, 256, 256, 0, kHalves, kNo, "google/gemma-2-2b"},
    {"Gemma-2-9B", 16, 8, 256, 256, 0, kHalves, kNo, "google/gemma-2-9b"},
    {"Gemma-2-27B", 32, 16, 128, 128, 0, kHalves, kNo, "google/gemma-2-27b"},
    {"Qwen2.5-0.5B", 14, 2, 64, 64, 0, kHalves, kNo, "Qwen/Qwen2.5-0.5B"},
    {"Qwen2.5-1.5B", 12, 2, 128, 128, 0, kHalves, kNo, "Qwen/Qwen2.5-1.5B"},
    {"Qwen2.5-3B", 16, 2, 128, 128, 0, kHalves, kNo, "Qwen/Qwen2.5-3B"},
    {"Qwen2.5-7B", 28, 4, 128, 128, 0, kHalves, kNo, "Qwen/Qwen2.5-7B"},
    {"Qwen2.5-14B", 40, 8, 128, 128, 0, kHalves, kNo, "Qwen/Qwen2.5-14B"},
    {"Qwen2.5-32B", 40, 8, 128, 128, 0, kHalves, kNo, "Qwen/Qwen2.5-32B"},
    {"Qwen2.5-72B", 64, 8, 128, 128, 0, kHalves, kNo, "Qwen/Qwen2.5-72B"},
    // The same behind a norm of each head.
    {"Qwen3-0.6B", 16, 8, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-0.6B"},
    {"Qwen3-4B", 32, 8, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-4B"},
    {"Qwen3-8B", 32, 8, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-8B"},
    {"Qwen3-14B", 40, 8, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-14B"},
    {"Qwen3-32B", 64, 8, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-32B"},
    {"Qwen3-30B-A3B", 32, 4, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-30B-A3B"},
    {"Qwen3-235B-A22B", 64, 4, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-235B-A22B"},
    {"Qwen3-Coder-480B-A35B", 96, 8, 128, 128, 0, kHalves, kRms, "Qwen/Qwen3-Coder-480B-A35B-Instruct"},
    {"EXAONE-4.0-32B", 40, 8, 128, 128, 0, kHalves, kRms, "LGAI-EXAONE/EXAONE-4.0-32B"},
    {"Gemma-3-1B", 4, 1, 256, 256, 0, kHalves, kRms1, "google/gemma-3-1b-it"},
    {"Gemma-3-4B", 8, 4, 256, 256, 0, kHalves, kRms1, "google/gemma-3-4b-it"},
    {"Gemma-3-12B", 16, 8, 256, 256, 0, kHalves, kRms1, "google/gemma-3-12b-it"},
    {"Gemma-3-27B", 32, 16, 128, 128, 0, kHalves, kRms1, "google/gemma-3-27b-it"},
    // A part of the head.
    {"Qwen3-Next-80B-A3B", 16, 2, 256, 64, 0, kHalves, kRms1, "Qwen/Qwen3-Next-80B-A3B-Instruct"},
    {"GLM-4.5", 96, 8, 128, 64, 0, kHalves, kRms, "zai-org/GLM-4.5"},
    {"Phi-1.5", 32, 32, 64, 32, 0, kHalves, kNo, "microsoft/phi-1_5"},
    {"Phi-2", 32, 32, 80, 32, 0, kHalves, kNo, "microsoft/phi-2"},
    {"Phi-4-mini", 24, 8, 128, 96, 0, kHalves, kNo, "microsoft/Phi-4-mini-instruct"},
    {"GPT-NeoX-20B", 64, 64, 96, 24, 0, kHalves, kNo, "EleutherAI/gpt-neox-20b"},
    {"Pythia-14M", 4, 4, 32, 8, 0, kHalves, kNo, "EleutherAI/pythia-14m"},
    {"Pythia-160M", 12, 12, 64, 16, 0, kHalves, kNo, "EleutherAI/pythia-160m"},
    {"Pythia-1B", 8, 8, 256, 64, 0, kHalves, kNo, "EleutherAI/pythia-1b"},
    {"Pythia-2.8B", 32, 32, 80, 20, 0, kHalves, kNo, "EleutherAI/pythia-2.8b"},
    {"Pythia-12B", 40, 40, 128, 32, 0, kHalves, kNo, "EleutherAI/pythia-12b"},
    {"StableLM-2-12B", 32, 8, 160, 40, 0, kHalves, kNo, "stabilityai/stablelm-2-12b"},
    {"StableLM-alpha-7B", 48, 48, 128, 32, 0, kHalves, kNo, "stabilityai/stablelm-base-alpha-7b"},
    {"Nemotron-4-340B", 96, 8, 192, 96, 0, kHalves, kNo, "nvidia/Nemotron-4-340B-Base"},
    // Neighbours.
    {"Command-R", 64, 64, 128, 128, 0, kNeighbours, kNo, "CohereLabs/c4ai-command-r-v01"},
    {"Command-R+", 96, 8, 128, 128, 0, kNeighbours, kNo, "CohereLabs/c4ai-command-r-plus"},
    {"Llama-4-Scout", 40, 8, 128, 128, 0, kNeighbours, kNo, "meta-llama/Llama-4-Scout-17B-16E"},
    {"ERNIE-4.5-21B-A3B", 20, 4, 128, 128, 0, kNeighbours, kNo, "baidu/ERNIE-4.5-21B-A3B-PT"},
    {"GLM-4-9B", 32, 2, 128, 64, 0, kNeighbours, kNo, "zai-org/glm-4-9b-chat-hf"},
    {"GPT-J-6B", 16, 16, 256, 64, 0, kNeighbours, kNo, "EleutherAI/gpt-j-6b"},
    // The rotated part last, one head of k for all of q (MLA).
    {"DeepSeek-V3", 128, 1, 192, 64, 128, kNeighbours, kNo, "deepseek-ai/DeepSeek-V3"},
    {"DeepSeek-V2-Lite", 16, 1, 192, 64, 128, kNeighbours, kNo, "deepseek-ai/DeepSeek-V2-Lite"},
    {"Kimi-K2", 64, 1, 192, 64, 128, kNeighbours, kNo, "moonshotai/Kimi-K2-Instruct"},
    // Image and video: neighbours.
    {"Flux.1", 24, 24, 128, 128, 0, kNeighbours, kRms, "black-forest-labs/FLUX.1-dev"},
    {"Qwen-Image", 24, 24, 128, 128, 0, kNeighbours, kRms, "Qwen/Qwen-Image"},
    {"Lumina-Image-2.0", 24, 8, 96, 96, 0, kNeighbours, kRms, "Alpha-VLLM/Lumina-Image-2.0"},
    {"Wan2.1-1.3B", 12, 12, 128, 128, 0, kNeighbours, kNo, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
    {"Wan2.1-14B", 40, 40, 128, 128, 0, kNeighbours, kNo, "Wan-AI/Wan2.1-T2V-14B-Diffusers"},
    // Vision towers.
    {"Qwen2.5-VL-vision", 16, 16, 80, 80, 0, kHalves, kNo, "Qwen/Qwen2.5-VL-7B-Instruct"},
    {"Qwen3-VL-vision", 16, 16, 72, 72, 0, kHalves, kNo, "Qwen/Qwen3-VL-8B-Instruct"},
};

}  // namespace

std::span<const ModelHeads> AllModelHeads() { return kModels; }

bool SplitHeads(const ModelHeads& model, int32_t ranks, int64_t* q_heads, int64_t* k_heads) {
  if (model.q_heads % ranks != 0) return false;
  const bool fewer = model.k_heads < ranks;
  if (fewer ? ranks % model.k_heads != 0 : model.k_heads % ranks != 0) return false;
  *q_heads = model.q_heads / ranks;
  *k_heads = std::max(model.k_heads / ranks, 1);
  return true;
}

Status ReadConfigs(const std::string& path, std::vector<ConfigText>* out) {
  // As much as a configuration may have, and one byte, by which a longer one is refused.
  std::ifstream file(path, std::ios::binary);
  std::string text(kMostJsonBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) return Status::Invalid(Text("cannot read ", path));
  text.resize(static_cast<size_t>(file.gcount()));
  const std::filesystem::path name = std::filesystem::path(path).filename();
  if (name != "models.json") {
    out->push_back({name.stem().string(), path, std::move(text)});
    return {};
  }
  OwnedJson models;
  ROPEWALK_TRY(ParseJsonObject(text, path, &models));
  for (const auto& [key, model] : models.items()) out->push_back({key, Text(path, ": ", key), model.dump(2)});
  return {};
}

}  // namespace ropewalk
