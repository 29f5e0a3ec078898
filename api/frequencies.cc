// The C ABI of frequencies.
// SPDX-License-Identifier: Apache-2.0
#include "frequencies/frequencies.h"

#include <ropewalk/ropewalk.h>

#include <atomic>

#include "api/guard.h"
#include "models/model_config.h"

using namespace ropewalk;

extern "C" {

int ropewalk_frequencies_create(double theta, int64_t rotary_dim, const char* scaling_json, int64_t sequence_length,
                                ropewalk_frequencies** out) {
  return Guard([&]() -> Status {
    if (!out) return Status::Invalid("frequencies: out is null");
    return MakeFrequencies(theta, rotary_dim, scaling_json ? scaling_json : "", sequence_length, out);
  });
}

int ropewalk_frequencies_from_array(const double* inv_freq, int64_t count, double attention_scaling,
                                    const int32_t* axes, ropewalk_frequencies** out) {
  return Guard([&]() -> Status {
    if (!out) return Status::Invalid("frequencies: out is null");
    return FrequenciesFromArray(inv_freq, count, attention_scaling, axes, out);
  });
}

int ropewalk_frequencies_from_config(const char* json, const char* name, const char* layer_type,
                                     int64_t sequence_length, ropewalk_frequencies** out) {
  return Guard([&]() -> Status {
    if (!out) return Status::Invalid("frequencies: out is null");
    if (!json) return Status::Invalid("frequencies: json is null");
    return FrequenciesFromConfig(json, name ? name : "config", layer_type ? layer_type : "", sequence_length, out);
  });
}

void ropewalk_frequencies_retain(ropewalk_frequencies* frequencies) {
  if (frequencies) frequencies->references.fetch_add(1, std::memory_order_relaxed);
}

void ropewalk_frequencies_release(ropewalk_frequencies* frequencies) {
  if (frequencies && frequencies->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete frequencies;
}

int64_t ropewalk_frequencies_rotary_dim(const ropewalk_frequencies* frequencies) {
  return frequencies ? frequencies->rotary_dim : 0;
}

double ropewalk_frequencies_attention_scaling(const ropewalk_frequencies* frequencies) {
  return frequencies ? frequencies->attention_scaling : 1.0;
}

const double* ropewalk_frequencies_inv_freq(const ropewalk_frequencies* frequencies) {
  return frequencies ? frequencies->inv_freq.data() : nullptr;
}

const int32_t* ropewalk_frequencies_axes(const ropewalk_frequencies* frequencies) {
  return frequencies && !frequencies->axes.empty() ? frequencies->axes.data() : nullptr;
}

const char* ropewalk_frequencies_warnings(const ropewalk_frequencies* frequencies) {
  return frequencies ? frequencies->warnings.c_str() : "";
}

int ropewalk_frequencies_table(const ropewalk_frequencies* frequencies, DLTensor* cos, DLTensor* sin) {
  return Guard([&]() -> Status {
    if (!frequencies || !cos || !sin) return Status::Invalid("table: frequencies, cos and sin must not be null");
    return FillTable(*frequencies, cos, sin);
  });
}

}  // extern "C"
