// Rotation frequencies as 64-bit fractions of a turn per position (docs/design: exact at every position), and the rules
// that they are made by.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

// The opaque type of the C ABI. Immutable once made.
struct ropewalk_frequencies {
  int64_t rotary_dim = 0;
  double attention_scaling = 1.0;     // multiplies cos and sin
  std::vector<double> inv_freq;       // [rotary_dim/2] radians per position, rounded from `exact`
  std::vector<long double> exact;     // [rotary_dim/2] the same, as exact as the host can (reference and turns)
  std::vector<uint64_t> turns;        // [rotary_dim/2] round(exact / 2pi * 2^64) modulo 2^64
  std::vector<int32_t> axes;          // empty, or [rotary_dim/2] the row of positions each pair takes
  std::vector<float> table_inv_freq;  // [rotary_dim/2] Hugging Face's own, for its table; empty: it uses double
  std::string warnings;               // what was ignored in the configuration, a sentence a line
  mutable std::atomic<int64_t> references{1};
  uint64_t id = 0;  // unique in the process, so that backends can key device copies by it
};

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

inline constexpr int32_t kMaxAxes = 1 << 20;  // rows of positions

Status FrequenciesFromRule(const RopeRule& rule, ropewalk_frequencies** out);
Status FrequenciesFromArray(const double* inv_freq, int64_t count, double attention_scaling, const int32_t* axes,
                            ropewalk_frequencies** out);
// From another's turns, the bits of which a call goes by. The frequencies in radians are the doubles next to them.
Status FrequenciesFromTurns(const uint64_t* turns, int64_t count, double attention_scaling, const int32_t* axes,
                            ropewalk_frequencies** out);
// What a device's copy holds: the turns, then the axes, which begin after AxesOffset bytes.
inline size_t AxesOffset(const ropewalk_frequencies& frequencies) {
  return frequencies.turns.size() * sizeof(uint64_t);
}
std::string DeviceCopyOf(const ropewalk_frequencies& frequencies);
// Hugging Face's table: cos and sin [rows, rotary_dim/2] on the host, float32, float16 or bfloat16, any strides.
Status FillTable(const ropewalk_frequencies& frequencies, DLTensor* cos, DLTensor* sin);

}  // namespace ropewalk
