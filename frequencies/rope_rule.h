// Everything that decides the frequencies of a model, checked and in one spelling.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ropewalk {

constexpr int64_t kMaxRotaryDim = 8192;

enum class RopeType { kDefault, kLinear, kDynamic, kYarn, kLongrope, kLlama3, kProportional };

// Everything that decides the frequencies. One of these for each layer type.
struct RopeRule {
  RopeType type = RopeType::kDefault;
  double theta = 0;
  int64_t rotary_dim = 0;                // twice the number of frequencies
  double partial = 1;                    // proportional: this part of the frequencies turns, the others are zero
  double factor = 1;                     // linear, dynamic, yarn, llama3, proportional
  double alpha = 0;                      // dynamic with a fixed alpha (HunYuan); 0: none
  int64_t max_position = 0;              // dynamic
  int64_t original_position = 0;         // yarn, llama3: the length that the model was first trained on
  int64_t sequence_length = 0;           // dynamic; 0: max_position
  double beta_fast = 32, beta_slow = 1;  // yarn
  bool truncate = true;                  // yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  std::vector<double> divisors;                      // longrope: the short or the long factors, already chosen
  double attention_scaling = 1;
  std::vector<int32_t> axes;       // the row of positions each pair takes; empty: one row
  std::vector<int64_t> axes_dims;  // diffusion: frequencies of each axis on its own, one after the other
  bool double_table = false;       // diffusion: its own table is made in double, not in float32
  std::string warnings;            // fields that were ignored, a sentence a line
};

}  // namespace ropewalk
