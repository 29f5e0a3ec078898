// libFuzzer target: any bytes as config.json and as a scaling text must give frequencies or one sentence, never a
// crash. Inputs of the corpus are small; run with -max_len=8192.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "frequencies/frequencies.h"
#include "models/model_config.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

// What was made must be usable; what was refused must say why.
void Check(const ropewalk::Status& status, ropewalk_frequencies* made) {
  Require(status.ok() == (made != nullptr));
  if (!status.ok()) {
    Require(status.code() == ROPEWALK_INVALID_ARGUMENT && !status.text().empty() && status.text().size() < 2000);
    return;
  }
  Require(made->rotary_dim >= 2 && made->rotary_dim % 2 == 0 && made->rotary_dim <= 8192);
  const auto pairs = static_cast<size_t>(made->rotary_dim / 2);
  Require(made->inv_freq.size() == pairs && made->exact.size() == pairs && made->turns.size() == pairs);
  Require(made->axes.empty() || made->axes.size() == pairs);
  Require(made->table_inv_freq.empty() || made->table_inv_freq.size() == pairs);
  Require(std::isfinite(made->attention_scaling));
  for (const double frequency : made->inv_freq) Require(std::isfinite(frequency));
  delete made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const char* layer_type : {"", "full_attention", "sliding_attention", "compress"}) {
    for (const int64_t length : {int64_t{0}, int64_t{100000}}) {
      ropewalk_frequencies* made = nullptr;
      const ropewalk::Status status = ropewalk::FrequenciesFromConfig(text, "config.json", layer_type, length, &made);
      Check(status, made);
      if (layer_type[0] != '\0') break;  // the length is the same code
    }
  }
  ropewalk::ModelConfig model;
  if (const ropewalk::Status status = ropewalk::ReadModelConfig(text, "config.json", &model); status.ok()) {
    Require(model.rotary_offset + model.rule.rotary_dim <= model.head_dim && model.q_heads > 0 && model.k_heads > 0);
  } else {
    Require(status.code() == ROPEWALK_INVALID_ARGUMENT && !status.text().empty());
  }
  ropewalk_frequencies* made = nullptr;
  const ropewalk::Status status = ropewalk::MakeFrequencies(10000, 32, text, 8192, &made);
  Check(status, made);
  return 0;
}
