// Frequencies: every scaling rule against values worked out here in __float128, the fixed-point turns at far positions,
// the table, and every sentence that a bad configuration gets.
// SPDX-License-Identifier: Apache-2.0
#include "frequencies/frequencies.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "models/model_config.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

struct Deleter {
  void operator()(ropewalk_frequencies* frequencies) const { delete frequencies; }
};
using Handle = std::unique_ptr<ropewalk_frequencies, Deleter>;

Handle Made(const Status& status, ropewalk_frequencies* made) {
  EXPECT_TRUE(status.ok()) << status.text();
  return Handle(made);
}
Handle Make(double theta, int64_t rotary_dim, std::string_view scaling = {}, int64_t length = 0) {
  ropewalk_frequencies* made = nullptr;
  const Status status = MakeFrequencies(theta, rotary_dim, scaling, length, &made);
  return Made(status, made);
}
Handle FromConfig(std::string_view json, std::string_view layer_type = {}, int64_t length = 0) {
  ropewalk_frequencies* made = nullptr;
  const Status status = FrequenciesFromConfig(json, "config.json", layer_type, length, &made);
  return Made(status, made);
}
std::string MakeError(double theta, int64_t rotary_dim, std::string_view scaling = {}, int64_t length = 0) {
  ropewalk_frequencies* made = nullptr;
  const Status status = MakeFrequencies(theta, rotary_dim, scaling, length, &made);
  EXPECT_EQ(status.code(), ROPEWALK_INVALID_ARGUMENT) << scaling;
  EXPECT_EQ(made, nullptr);
  delete made;
  return status.text();
}
std::string ConfigError(std::string_view json, std::string_view layer_type = {}) {
  ropewalk_frequencies* made = nullptr;
  const Status status = FrequenciesFromConfig(json, "config.json", layer_type, 0, &made);
  EXPECT_EQ(status.code(), ROPEWALK_INVALID_ARGUMENT) << json;
  EXPECT_EQ(made, nullptr);
  delete made;
  return status.text();
}

// ---------------------------------------------------------------------------------------------------------------------
// An oracle of its own, in 113 bits and by other series than the core's: no libquadmath, which is not everywhere.

#ifdef __SIZEOF_FLOAT128__
__extension__ using Quad = __float128;
#else
using Quad = long double;  // aarch64: 113 bits
#endif

Quad QuadExp(Quad x) {  // halved until small, then squared back
  int halvings = 0;
  while (x > Quad(0.01) || x < Quad(-0.01)) {
    x /= 2;
    ++halvings;
  }
  Quad term = 1, sum = 1;
  for (int n = 1; n < 24; ++n) {
    term *= x / n;
    sum += term;
  }
  while (halvings-- > 0) sum *= sum;
  return sum;
}

Quad QuadLog(Quad x) {  // 2 artanh((x - 1) / (x + 1)) after division by powers of two
  const auto log_near_one = [](Quad y) {
    const Quad t = (y - 1) / (y + 1);
    Quad power = t, sum = 0;
    for (int n = 1; n < 90; n += 2) {
      sum += power / n;
      power *= t * t;
    }
    return 2 * sum;
  };
  int twos = 0;
  for (; x > Quad(1.4); ++twos) x /= 2;
  for (; x < Quad(0.7); --twos) x *= 2;
  return log_near_one(x) + twos * (log_near_one(Quad(4) / 3) + log_near_one(Quad(3) / 2));  // ln 2 = ln 4/3 + ln 3/2
}

const Quad kPi = [] {  // Machin
  const auto arctan_inverse = [](int n) {
    Quad power = Quad(1) / n, sum = 0;
    for (int k = 0; k < 60; ++k) {
      sum += (k % 2 == 0 ? power : -power) / (2 * k + 1);
      power /= Quad(n) * n;
    }
    return sum;
  };
  return 4 * (4 * arctan_inverse(5) - arctan_inverse(239));
}();

Quad Plain(double theta, int64_t dim, int64_t i) { return QuadExp(-QuadLog(theta) * Quad(2 * i) / Quad(dim)); }

uint64_t QuadTurns(Quad frequency) {
  Quad turns = frequency / (2 * kPi);
  turns -= static_cast<int64_t>(turns);
  return static_cast<uint64_t>(turns * Quad(18446744073709551616.0) + Quad(0.5));
}

void ExpectFrequencies(const ropewalk_frequencies& made, const std::function<Quad(int64_t)>& expected) {
  ASSERT_EQ(made.rotary_dim, 2 * std::ssize(made.inv_freq));
  for (int64_t i = 0; i < made.rotary_dim / 2; ++i) {
    const Quad w = expected(i);
    const auto at = static_cast<size_t>(i);
    EXPECT_NEAR(made.inv_freq[at], static_cast<double>(w), 1.2e-16 * static_cast<double>(w)) << i;
    EXPECT_LE(std::fabs(static_cast<double>(Quad(made.exact[at]) - w)), 6e-20 * static_cast<double>(w)) << i;
    // To the last bit, but for a rounding that the oracle itself cannot tell.
    EXPECT_LE(static_cast<int64_t>(made.turns[at] - QuadTurns(w)) + 1, 2) << i;
    EXPECT_GE(static_cast<int64_t>(made.turns[at] - QuadTurns(w)) + 1, 0) << i;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The rules

TEST(Frequencies, Default) {
  for (const double theta : {10000.0, 500000.0, 1e6, 150000.0, 1.5, 1e15}) {
    for (const int64_t dim : {2, 20, 64, 128, 192, 8192}) {
      const Handle made = Make(theta, dim);
      ASSERT_NE(made, nullptr);
      ExpectFrequencies(*made, [&](int64_t i) { return Plain(theta, dim, i); });
      EXPECT_EQ(made->attention_scaling, 1.0);
      EXPECT_TRUE(made->axes.empty());
    }
  }
  const Handle by_hand = Make(10000, 8);
  EXPECT_EQ(by_hand->inv_freq, (std::vector<double>{1, 0.1, 0.01, 0.001}));
  EXPECT_EQ(by_hand->turns[0], 2935890503282001226u);  // round(2^64 / 2 pi)
}

TEST(Frequencies, Linear) {
  const Handle made = Make(10000, 128, R"({"rope_type": "linear", "factor": 8.0})");
  ExpectFrequencies(*made, [](int64_t i) { return Plain(10000, 128, i) / 8; });
}

TEST(Frequencies, Dynamic) {
  const char* scaling = R"({"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 4096})";
  for (const int64_t length : {0, 4096, 10000, 131072}) {
    const Handle made = Make(10000, 64, scaling, length);
    const Quad ratio = 2 * Quad(std::max<int64_t>(length, 4096)) / 4096 - 1;
    ExpectFrequencies(
        *made, [&](int64_t i) { return QuadExp(-(QuadLog(10000) + QuadLog(ratio) * 64 / 62) * Quad(2 * i) / 64); });
  }
  // HunYuan's alpha, whatever the length.
  const Handle alpha =
      Make(10000, 128, R"({"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32})", 9999);
  ExpectFrequencies(
      *alpha, [](int64_t i) { return QuadExp(-(QuadLog(10000) + QuadLog(1000) * 128 / 126) * Quad(2 * i) / 128); });
}

Quad Yarn(double theta, int64_t dim, int64_t i, double factor, Quad low, Quad high) {
  Quad ramp = (Quad(static_cast<double>(i)) - low) / (high - low);
  ramp = ramp < 0 ? Quad(0) : ramp > 1 ? Quad(1) : ramp;
  return Plain(theta, dim, i) * (ramp / factor + 1 - ramp);
}

TEST(Frequencies, Yarn) {
  // DeepSeek-V3: 64 ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 10.47, and 22.51 for one turn.
  const char* deepseek = R"({"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                             "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096})";
  const Handle made = Make(10000, 64, deepseek);
  ExpectFrequencies(*made, [](int64_t i) { return Yarn(10000, 64, i, 40, 10, 23); });
  EXPECT_EQ(made->attention_scaling, 1.0);

  // gpt-oss: not truncated.
  const Handle gpt_oss = Make(150000, 64, R"({"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                              "truncate": false, "original_max_position_embeddings": 4096})");
  const auto index_of = [](double turns) {
    return 64 * QuadLog(Quad(4096) / (Quad(turns) * 2 * kPi)) / (2 * QuadLog(150000));
  };
  ExpectFrequencies(*gpt_oss, [&](int64_t i) { return Yarn(150000, 64, i, 32, index_of(32), index_of(1)); });
  EXPECT_EQ(gpt_oss->attention_scaling, 0.1 * std::log(32.0) + 1.0);
}

TEST(Frequencies, YarnAttentionFactor) {
  const auto scaling = [](const std::string& more) {
    return Make(10000, 64,
                R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096)" + more + "}")
        ->attention_scaling;
  };
  const double log4 = std::log(4.0);
  EXPECT_EQ(scaling(""), 0.1 * log4 + 1);
  EXPECT_EQ(scaling(R"(, "attention_factor": 1.0)"), 1.0);  // a key given is never dropped
  EXPECT_EQ(scaling(R"(, "attention_factor": null)"), 0.1 * log4 + 1);
  EXPECT_EQ(scaling(R"(, "mscale": 0.707, "mscale_all_dim": 0.707)"), 1.0);
  EXPECT_EQ(scaling(R"(, "mscale": 1.0, "mscale_all_dim": 0.5)"), (0.1 * log4 + 1) / (0.1 * 0.5 * log4 + 1));
  EXPECT_EQ(scaling(R"(, "mscale": 0.707)"), 0.1 * log4 + 1);  // one alone says nothing
  EXPECT_EQ(scaling(R"(, "mscale": 0.707, "mscale_all_dim": 0)"), 0.1 * log4 + 1);
  EXPECT_EQ(Make(1e4, 64, R"({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096})")
                ->attention_scaling,
            1.0);
}

TEST(Frequencies, YarnLowEqualsHigh) {
  // beta_fast = beta_slow, not truncated: the range is empty and widened by 0.001, at an index that is no integer.
  const Handle made = Make(10000, 64, R"({"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 4,
                                          "truncate": false, "original_max_position_embeddings": 4096})");
  const Quad edge = 64 * QuadLog(Quad(4096) / (4 * 2 * kPi)) / (2 * QuadLog(10000));
  ExpectFrequencies(*made,
                    [&](int64_t i) { return Plain(10000, 64, i) / (Quad(static_cast<double>(i)) < edge ? 1 : 4); });
  // All clamped to zero: low = high = 0.
  const Handle zero = Make(10000, 64, R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6})");
  ExpectFrequencies(*zero, [](int64_t i) { return Plain(10000, 64, i) / (i == 0 ? 1 : 4); });
}

TEST(Frequencies, Llama3) {
  const Handle made = Make(500000, 128, R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})");
  int kept = 0, blended = 0, divided = 0;
  ExpectFrequencies(*made, [&](int64_t i) -> Quad {
    const Quad w = Plain(500000, 128, i), wavelength = 2 * kPi / w;
    if (wavelength < 2048) return ++kept, w;
    if (wavelength > 8192) return ++divided, w / 8;
    const Quad smooth = (8192 / wavelength - 1) / 3;
    return ++blended, (1 - smooth) * w / 8 + smooth * w;
  });
  EXPECT_EQ(kept, 29);
  EXPECT_EQ(blended, 6);
  EXPECT_EQ(divided, 29);
}

TEST(Frequencies, Longrope) {
  const std::string scaling = R"({"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2, 32.5],
                                  "original_max_position_embeddings": 4096, "factor": 32})";
  for (const int64_t length : {0, 1, 4096}) {
    ExpectFrequencies(*Make(10000, 4, scaling, length),
                      [](int64_t i) { return Plain(10000, 4, i) / (i == 0 ? 1 : 1.5); });
  }
  const Handle made = Make(10000, 4, scaling, 4097);
  ExpectFrequencies(*made, [](int64_t i) { return Plain(10000, 4, i) / (i == 0 ? 2 : 32.5); });
  EXPECT_EQ(made->attention_scaling, std::sqrt(1 + std::log(32.0) / std::log(4096.0)));
  // Phi-3: the factor is the ratio of the lengths, and original_max_position_embeddings stands outside.
  const Handle phi =
      FromConfig(R"({"model_type": "phi3", "head_dim": 4, "num_attention_heads": 1, "max_position_embeddings": 131072,
      "original_max_position_embeddings": 4096, "rope_scaling": {"type": "su", "short_factor": [1, 1],
      "long_factor": [2, 3]}})",
                 {}, 100000);
  EXPECT_EQ(phi->attention_scaling, std::sqrt(1 + std::log(32.0) / std::log(4096.0)));
  EXPECT_EQ(phi->inv_freq[0], 0.5);
  // Phi-3.5-MoE: a scaling for each.
  const char* moe = R"({"type": "longrope", "short_factor": [1], "long_factor": [2], "short_mscale": 1.25,
                        "long_mscale": 1.5, "original_max_position_embeddings": 4096})";
  EXPECT_EQ(Make(10000, 2, moe)->attention_scaling, 1.25);
  EXPECT_EQ(Make(10000, 2, moe, 5000)->attention_scaling, 1.5);
}

TEST(Frequencies, Proportional) {
  const Handle made = Make(1e6, 512, R"({"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0})");
  ASSERT_EQ(made->rotary_dim, 512);
  ExpectFrequencies(*made, [](int64_t i) { return i < 64 ? Plain(1e6, 512, i) / 2 : Quad(0); });
  EXPECT_EQ(made->turns[64], 0u);
}

TEST(Frequencies, Partial) {
  for (const char* json :
       {R"({"model_type": "phi3", "head_dim": 128, "num_attention_heads": 1, "partial_rotary_factor": 0.5})",
        R"({"head_dim": 128, "num_attention_heads": 1, "rotary_pct": 0.5, "rotary_emb_base": 10000})",
        R"({"model_type": "gptj", "n_embd": 256, "n_head": 2, "rotary_dim": 64})",
        R"({"hidden_size": 256, "num_attention_heads": 2, "model_type": "glm"})",
        R"({"head_dim": 128, "num_attention_heads": 1, "rope_parameters": {"rope_type": "default",
                               "rope_theta": 10000, "partial_rotary_factor": 0.5}})",
        R"({"model_type": "deepseek_v3", "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
             "num_attention_heads": 1})",
        R"({"head_dim": 512, "qk_rope_head_dim": 64, "partial_rotary_factor": 0.125,
                               "num_attention_heads": 1, "rope_theta": 10000})"}) {
    const Handle made = FromConfig(json);
    ASSERT_NE(made, nullptr) << json;
    ExpectFrequencies(*made, [](int64_t i) { return Plain(10000, 64, i); });
  }
}

TEST(Frequencies, Sections) {
  const Handle contiguous = FromConfig(R"({"head_dim": 16, "num_attention_heads": 1, "rope_theta": 10000,
      "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}})");
  EXPECT_EQ(contiguous->axes, (std::vector<int32_t>{0, 0, 1, 1, 1, 2, 2, 2}));
  const char* interleaved = R"({"mrope_section": [4, 2, 2], "mrope_interleaved": true, "rope_type": "default"})";
  EXPECT_EQ(Make(10000, 16, interleaved)->axes, (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 0}));
  // A scaling rule and sections go together.
  const Handle yarn = Make(10000, 16, R"({"mrope_section": [4, 2, 2], "mrope_interleaved": true, "rope_type": "yarn",
      "factor": 4.0, "original_max_position_embeddings": 4096})");
  EXPECT_EQ(yarn->axes.size(), 8u);
  EXPECT_GT(yarn->attention_scaling, 1.1);
  const Handle ernie = FromConfig(R"({"model_type": "ernie4_5_vl_moe_text", "head_dim": 16, "num_attention_heads": 1,
      "rope_parameters": {"rope_type": "default", "rope_theta": 500000, "mrope_section": [3, 3, 2]}})");
  EXPECT_EQ(ernie->axes, (std::vector<int32_t>{1, 2, 1, 2, 1, 2, 0, 0}));
}

TEST(Frequencies, LayerTypes) {
  const char* nested = R"({"head_dim": 64, "num_attention_heads": 1, "layer_types": ["full_attention", "mamba"],
      "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "chunked": null}})";
  ExpectFrequencies(*FromConfig(nested, "full_attention"), [](int64_t i) { return Plain(1e6, 64, i) / 8; });
  ExpectFrequencies(*FromConfig(nested, "sliding_attention"), [](int64_t i) { return Plain(1e4, 64, i); });
  EXPECT_EQ(ConfigError(nested, "chunked"), "config.json: layers of type \"chunked\" have no rotary embedding");
  EXPECT_EQ(ConfigError(nested),
            "layer_type is missing, but config.json has different rotary embeddings for "
            "\"full_attention\" or \"sliding_attention\"");
  EXPECT_EQ(ConfigError(nested, "none"),
            "layer_type is \"none\", but config.json has \"full_attention\" or "
            "\"sliding_attention\"");
  // Gemma 3 as first published.
  const char* old = R"({"model_type": "gemma3_text", "head_dim": 64, "rope_theta": 1e6,
      "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8}})";
  ExpectFrequencies(*FromConfig(old, "full_attention"), [](int64_t i) { return Plain(1e6, 64, i) / 8; });
  ExpectFrequencies(*FromConfig(old, "sliding_attention"), [](int64_t i) { return Plain(1e4, 64, i); });
  EXPECT_EQ(
      ConfigError(R"({"model_type": "gemma3_text", "head_dim": 64, "rope_local_base_freq": 2e4,
                "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}})",
                  "sliding_attention"),
      "config.json: rope_parameters.sliding_attention.rope_theta is 10000, but config.json: rope_local_base_freq is "
      "20000");
  EXPECT_EQ(
      ConfigError(R"({"model_type": "gemma3_text", "head_dim": 64, "rope_parameters": {"rope_theta": 1e6}})"),
      "config.json: rope_parameters is one for all layers, but model_type \"gemma3_text\" needs one for each layer "
      "type: give it, or make Frequencies(theta=.., rotary_dim=..)");
  EXPECT_EQ(ConfigError(R"({"model_type": "cwm", "head_dim": 64, "num_attention_heads": 1, "rope_theta": 1e6})"),
            "config.json: rope_parameters is missing, but model_type \"cwm\" needs it: give it, or make "
            "Frequencies(theta=.., rotary_dim=..)");
  EXPECT_EQ(
      ConfigError(R"({"model_type": "llama", "head_dim": 64, "num_attention_heads": 1, "global_rope_theta": 1e6})")
          .rfind("config.json: global_rope_theta is not a field", 0),
      0u);
  // One rule for all: any layer type that the configuration lists may be asked for.
  const char* flat =
      R"({"head_dim": 64, "num_attention_heads": 1, "layer_types": ["full_attention"], "rope_theta": 1e4})";
  ExpectFrequencies(*FromConfig(flat, "full_attention"), [](int64_t i) { return Plain(1e4, 64, i); });
  EXPECT_EQ(ConfigError(flat, "sliding"), "layer_type is \"sliding\", but config.json has \"full_attention\"");
  // The same rule under each name needs no choice.
  EXPECT_NE(FromConfig(R"({"head_dim": 64, "num_attention_heads": 1, "rope_parameters": {
      "a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e4}}})"),
            nullptr);
}

TEST(Frequencies, FromArray) {
  const std::vector<double> values{1.0, -0.25, 0.0, 1e6, 1e-300};
  const std::vector<int32_t> axes{0, 1, 2, 1, 0};
  ropewalk_frequencies* made = nullptr;
  Status status = FrequenciesFromArray(values.data(), 5, 1.5, axes.data(), &made);
  const Handle handle = Made(status, made);
  EXPECT_EQ(handle->rotary_dim, 10);
  EXPECT_EQ(handle->inv_freq, values);
  EXPECT_EQ(handle->axes, axes);
  EXPECT_EQ(handle->attention_scaling, 1.5);
  EXPECT_EQ(handle->turns[0], 2935890503282001226u);
  EXPECT_EQ(handle->turns[1], 0 - uint64_t{733972625820500307u});  // a quarter of it, turned back
  EXPECT_EQ(handle->turns[2], 0u);
  EXPECT_EQ(handle->turns[3], QuadTurns(Quad(1e6)));

  const auto error = [&](const double* data, int64_t count, double scaling, const int32_t* rows) {
    made = nullptr;
    const Status refused = FrequenciesFromArray(data, count, scaling, rows, &made);
    EXPECT_EQ(made, nullptr);
    return refused.text();
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double bad[] = {1.0, nan};
  const int32_t negative[] = {0, -1};
  EXPECT_EQ(error(values.data(), 0, 1, nullptr), "inv_freq must have from 1 to 4096 elements, but has 0");
  EXPECT_EQ(error(nullptr, 2, 1, nullptr), "inv_freq is missing");
  EXPECT_EQ(error(bad, 2, 1, nullptr), "inv_freq[1] must be from -1e+06 to 1e+06, but is nan");
  EXPECT_EQ(error(values.data(), 2, nan, nullptr), "attention_scaling must be from -1e+06 to 1e+06, but is nan");
  EXPECT_EQ(error(values.data(), 2, 1, negative), "axes[1] must be from 0 to 1048575, but is -1");
}

// The phase at a far position: turns * position modulo 2^64 against the angle in 113 bits.
TEST(Frequencies, FarPositions) {
  for (const char* scaling : {"", R"({"rope_type": "linear", "factor": 3})",
                              R"({"rope_type": "yarn", "factor": 7, "original_max_position_embeddings": 4096})"}) {
    const Handle made = Make(500000, 128, scaling);
    for (const int64_t position : {1L, 2047L, 131071L, (1L << 24) + 1, (1L << 31) - 1}) {
      for (const int64_t signed_position : {position, -position}) {
        for (size_t i = 0; i < made->turns.size(); ++i) {
          const uint64_t phase = made->turns[i] * static_cast<uint64_t>(signed_position);
          Quad turns = Quad(made->exact[i]) / (2 * kPi) * Quad(signed_position);
          turns -= static_cast<int64_t>(turns);
          Quad error = turns - Quad(phase) / Quad(18446744073709551616.0);
          error -= static_cast<int64_t>(error + (error < 0 ? Quad(-0.5) : Quad(0.5)));
          EXPECT_LE(std::fabs(static_cast<double>(error)), 0x1p-33) << scaling << " " << i << " " << signed_position;
        }
      }
    }
  }
}

TEST(Frequencies, IdsDiffer) { EXPECT_NE(Make(10000, 64)->id, Make(10000, 64)->id); }

// ---------------------------------------------------------------------------------------------------------------------
// The table

struct Table {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::vector<unsigned char> bytes;
  DLTensor tensor{};

  Table(int64_t rows, int64_t columns, DLDataType dtype, int64_t row_stride = 0, int64_t column_stride = 1)
      : shape{rows, columns}, strides{row_stride != 0 ? row_stride : columns, column_stride} {
    bytes.assign(static_cast<size_t>(rows * std::max(strides[0], columns * column_stride) * dtype.bits / 8 + 16), 0xa5);
    tensor = {bytes.data(), {kDLCPU, 0}, 2, dtype, shape.data(), strides.data(), 0};
  }
  template <class T>
  T At(int64_t row, int64_t column) const {
    T value;
    std::memcpy(&value, bytes.data() + (row * strides[0] + column * strides[1]) * static_cast<int64_t>(sizeof(T)),
                sizeof(T));
    return value;
  }
};
constexpr DLDataType kFloat32{kDLFloat, 32, 1}, kFloat16{kDLFloat, 16, 1}, kBfloat16{kDLBfloat, 16, 1};

TEST(FrequenciesTable, AsHuggingFace) {
  const Handle made = Make(10000, 128);
  constexpr int64_t kRows = 3000;
  Table cos(kRows, 64, kFloat32), sin(kRows, 64, kFloat32), half(kRows, 64, kFloat16), brain(kRows, 64, kBfloat16);
  ASSERT_TRUE(FillTable(*made, &cos.tensor, &sin.tensor).ok());
  Table unused(kRows, 64, kFloat16);
  ASSERT_TRUE(FillTable(*made, &half.tensor, &brain.tensor).ok());
  for (int64_t row = 0; row < kRows; row += 7) {
    for (int64_t pair = 0; pair < 64; ++pair) {
      const float frequency = made->table_inv_freq[static_cast<size_t>(pair)];
      EXPECT_NEAR(frequency, made->inv_freq[static_cast<size_t>(pair)], 4e-7 * static_cast<double>(frequency));
      const double product = static_cast<double>(row) * static_cast<double>(frequency);
      const auto angle = static_cast<double>(static_cast<float>(product));
      const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
      ASSERT_EQ(cos.At<float>(row, pair), c);
      ASSERT_EQ(sin.At<float>(row, pair), s);
      ASSERT_NEAR(std::ldexp(static_cast<double>(half.At<uint16_t>(row, pair) & 0x3ff), 0), 512, 512);
      // bfloat16: the nearest of the 8-bit significands, so at most half of one away.
      uint32_t bits = static_cast<uint32_t>(brain.At<uint16_t>(row, pair)) << 16;
      float rounded;
      std::memcpy(&rounded, &bits, 4);
      ASSERT_LE(std::fabs(rounded - s), std::ldexp(std::fabs(s), -8)) << row << " " << pair;
      // float16: likewise with 11 bits, or of 2^-24 where it is subnormal.
      const uint16_t h = half.At<uint16_t>(row, pair);
      const int exponent = (h >> 10) & 31, fraction = h & 1023;
      const double value = (h >> 15 != 0 ? -1 : 1) *
                           (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
      const double unit = std::max(std::ldexp(std::fabs(static_cast<double>(c)), -11), 0x1p-25);
      ASSERT_LE(std::fabs(value - static_cast<double>(c)), unit) << row << " " << pair;
    }
  }
}

TEST(FrequenciesTable, Float16OfEveryKind) {
  // Through the attention scaling, cos 0 = 1 becomes any value.
  const auto bits_of = [](double scaling, DLDataType dtype) {
    const double frequency = 1;
    ropewalk_frequencies* made = nullptr;
    const Status status = FrequenciesFromArray(&frequency, 1, scaling, nullptr, &made);
    const Handle handle = Made(status, made);
    Table cos(1, 1, dtype), sin(1, 1, dtype);
    EXPECT_TRUE(FillTable(*handle, &cos.tensor, &sin.tensor).ok());
    return cos.At<uint16_t>(0, 0);
  };
  EXPECT_EQ(bits_of(1, kFloat16), 0x3c00);
  EXPECT_EQ(bits_of(-2, kFloat16), 0xc000);
  EXPECT_EQ(bits_of(1 + 0x1p-11, kFloat16), 0x3c00);  // ties to even
  EXPECT_EQ(bits_of(1 + 3 * 0x1p-11, kFloat16), 0x3c02);
  EXPECT_EQ(bits_of(65504, kFloat16), 0x7bff);
  EXPECT_EQ(bits_of(65519, kFloat16), 0x7bff);
  EXPECT_EQ(bits_of(65520, kFloat16), 0x7c00);
  EXPECT_EQ(bits_of(0x1p-14, kFloat16), 0x0400);
  EXPECT_EQ(bits_of(0x1p-24, kFloat16), 0x0001);
  EXPECT_EQ(bits_of(0x1p-25, kFloat16), 0x0000);
  EXPECT_EQ(bits_of(1.5 * 0x1p-24, kFloat16), 0x0002);
  EXPECT_EQ(bits_of(0x1p-14 - 0x1p-26, kFloat16), 0x0400);  // rounds up out of the subnormals
  EXPECT_EQ(bits_of(1 + 0x1p-8, kBfloat16), 0x3f80);
  EXPECT_EQ(bits_of(1 + 3 * 0x1p-8, kBfloat16), 0x3f82);
  EXPECT_EQ(bits_of(-1, kBfloat16), 0xbf80);
}

TEST(FrequenciesTable, StridesAndCanaries) {
  const Handle made = Make(10000, 8);
  Table cos(5, 4, kFloat32, 11, 2), sin(5, 4, kFloat32);
  sin.tensor.strides = nullptr;
  Table plain(5, 4, kFloat32);
  ASSERT_TRUE(FillTable(*made, &cos.tensor, &sin.tensor).ok());
  ASSERT_TRUE(FillTable(*made, &plain.tensor, &sin.tensor).ok());
  std::vector<bool> written(cos.bytes.size(), false);
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t pair = 0; pair < 4; ++pair) {
      EXPECT_EQ(cos.At<float>(row, pair), plain.At<float>(row, pair));
      for (int64_t byte = 0; byte < 4; ++byte) written[static_cast<size_t>((row * 11 + pair * 2) * 4 + byte)] = true;
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    if (!written[i]) {
      EXPECT_EQ(cos.bytes[i], 0xa5) << i;
    }
  }
  Table none(0, 4, kFloat32);
  EXPECT_TRUE(FillTable(*made, &none.tensor, &none.tensor).ok());
}

TEST(FrequenciesTable, BadArguments) {
  const Handle made = Make(10000, 8);
  Table good(5, 4, kFloat32), narrow(5, 3, kFloat32), short_one(4, 4, kFloat32), integers(5, 4, {kDLInt, 32, 1});
  const auto error = [&](DLTensor* cos, DLTensor* sin) { return FillTable(*made, cos, sin).text(); };
  EXPECT_EQ(error(nullptr, &good.tensor), "table: cos is missing");
  EXPECT_EQ(error(&good.tensor, &narrow.tensor), "table: sin must be [rows, 4], but is [5, 3]");
  EXPECT_EQ(error(&good.tensor, &short_one.tensor), "table: sin has 4 rows, but cos has 5");
  EXPECT_EQ(error(&good.tensor, &integers.tensor), "table: sin must be float32, float16 or bfloat16");
  DLTensor elsewhere = good.tensor;
  elsewhere.device.device_type = kDLCUDA;
  EXPECT_EQ(error(&elsewhere, &good.tensor), "table: cos must be on the CPU, but is on cuda:0");
  DLTensor flat = good.tensor;
  flat.ndim = 1;
  EXPECT_EQ(error(&flat, &good.tensor), "table: cos must have 2 dimensions, but has 1");
  DLTensor empty = good.tensor;
  empty.data = nullptr;
  EXPECT_EQ(error(&empty, &good.tensor), "table: cos has no data");
  for (const unsigned char byte : good.bytes) ASSERT_EQ(byte, 0xa5);
}

TEST(FrequenciesTable, DiffusersInDouble) {  // FLUX makes its table in double, Qwen-Image in float32
  const Handle flux = FromConfig(R"({"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24,
                                     "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]})");
  EXPECT_TRUE(flux->table_inv_freq.empty());
  Table cos(100, 64, kFloat32), sin(100, 64, kFloat32);
  ASSERT_TRUE(FillTable(*flux, &cos.tensor, &sin.tensor).ok());
  EXPECT_EQ(cos.At<float>(99, 9), static_cast<float>(std::cos(99 * flux->inv_freq[9])));
  ExpectFrequencies(*flux, [](int64_t i) {
    return i < 8 ? Plain(1e4, 16, i) : i < 36 ? Plain(1e4, 56, i - 8) : Plain(1e4, 56, i - 36);
  });
  EXPECT_EQ(flux->axes[7], 0);
  EXPECT_EQ(flux->axes[8], 1);
  EXPECT_EQ(flux->axes[36], 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sentences

TEST(FrequenciesErrors, Arguments) {
  EXPECT_EQ(MakeError(0, 64), "theta must be greater than 1 and at most 1e+15, but is 0");
  EXPECT_EQ(MakeError(-1e4, 64), "theta must be greater than 1 and at most 1e+15, but is -10000");
  EXPECT_EQ(MakeError(std::numeric_limits<double>::quiet_NaN(), 64),
            "theta must be greater than 1 and at most 1e+15, but is nan");
  EXPECT_EQ(MakeError(1e308, 64), "theta must be greater than 1 and at most 1e+15, but is 1e+308");
  for (const int64_t dim : {int64_t{0}, int64_t{-2}, int64_t{63}, int64_t{8194}, int64_t{1000000000000},
                            std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()}) {
    EXPECT_EQ(MakeError(1e4, dim), "rotary_dim must be an even number from 2 to 8192, but is " + std::to_string(dim));
  }
  EXPECT_EQ(MakeError(1e4, 64, {}, -1), "sequence_length must be from 0 to 1099511627776, but is -1");
}

TEST(FrequenciesErrors, Scaling) {
  const auto error = [](std::string_view text) { return MakeError(10000, 8, text); };
  EXPECT_EQ(error("[]"), "scaling: must be a JSON object, but is an array of 0");
  EXPECT_EQ(
      error(R"({"rope_type": "ntk"})"),
      "scaling.rope_type must be one of \"default\", \"linear\", \"dynamic\", \"yarn\", \"longrope\", \"llama3\" or "
      "\"proportional\", but is \"ntk\"");
  EXPECT_EQ(error(R"({"rope_type": 3})"), "scaling.rope_type must be a string, but is 3");
  EXPECT_EQ(error(R"({"rope_type": "yarn", "type": "linear", "factor": 2})"),  // the new name decides
            "scaling.original_max_position_embeddings is missing, but rope_type \"yarn\" needs it");
  EXPECT_EQ(error(R"({"rope_type": "default", "rope_theta": 5})"), "scaling.rope_theta is 5, but theta is 10000");
  EXPECT_EQ(error(R"({"rope_type": "default", "factor": 2})"),
            "scaling.factor is not a field that rope_type \"default\" knows");
  EXPECT_EQ(error(R"({"rope_type": "default", "partial_rotary_factor": 0.5})"),
            "scaling.partial_rotary_factor is 0.5, but rotary_dim is 8 of a head of 8");
  EXPECT_EQ(error(R"({"rope_type": "linear"})"), "scaling.factor is missing, but rope_type \"linear\" needs it");
  for (const char* value : {"0", "-1", "1e7", "1e308", "NaN", "Infinity", "\"2\"", "true", "[2]", "{}"}) {
    const std::string text = error(std::string(R"({"rope_type": "linear", "factor": )") + value + "}");
    EXPECT_EQ(text.rfind("scaling.factor must be a number from 1e-06 to 1e+06, but is ", 0), 0u) << text;
  }
  EXPECT_EQ(error(R"({"rope_type": "dynamic", "max_position_embeddings": 9})"),
            "scaling.factor is missing, but rope_type \"dynamic\" needs it");
  EXPECT_EQ(error(R"({"rope_type": "dynamic", "factor": 2})"),
            "scaling.max_position_embeddings is missing, but rope_type \"dynamic\" needs it");
  EXPECT_EQ(MakeError(1e4, 2, R"({"rope_type": "dynamic", "factor": 2, "max_position_embeddings": 9})"),
            "scaling.rope_type \"dynamic\" needs more than one pair");
  const auto yarn = [&](const std::string& more) { return error(R"({"rope_type": "yarn", "factor": 4)" + more + "}"); };
  EXPECT_EQ(yarn(""), "scaling.original_max_position_embeddings is missing, but rope_type \"yarn\" needs it");
  EXPECT_EQ(yarn(R"(, "original_max_position_embeddings": 4096.5)"),
            "scaling.original_max_position_embeddings must be an integer from 1 to 1099511627776, but is 4096.5");
  EXPECT_EQ(yarn(R"(, "original_max_position_embeddings": 4096, "truncate": 0)"),
            "scaling.truncate must be true or false, but is 0");
  EXPECT_EQ(yarn(R"(, "original_max_position_embeddings": 4096, "exrapolation_factor": 1)"),
            "scaling.exrapolation_factor is not a field that rope_type \"yarn\" knows");
  const auto longrope = [&](const std::string& more) { return error(R"({"rope_type": "longrope")" + more + "}"); };
  EXPECT_EQ(longrope(""), "scaling.short_factor is missing, but rope_type \"longrope\" needs it");
  EXPECT_EQ(longrope(R"(, "short_factor": [1])"),
            "scaling.long_factor is missing, but rope_type \"longrope\" needs it");
  EXPECT_EQ(longrope(R"(, "short_factor": [1], "long_factor": 2)"),
            "scaling.long_factor must be an array of numbers, but is 2");
  EXPECT_EQ(longrope(R"(, "short_factor": [1], "long_factor": [1, null])"),
            "scaling.long_factor[1] must be a number from 1e-06 to 1e+12, but is null");
  EXPECT_EQ(longrope(R"(, "short_factor": [1], "long_factor": [1, 1, 1, 1])"),
            "scaling.original_max_position_embeddings is missing, but rope_type \"longrope\" needs it");
  const std::string original = R"(, "original_max_position_embeddings": 4096)";
  EXPECT_EQ(longrope(original + R"(, "short_factor": [1], "long_factor": [1, 1, 1, 1])"),
            "scaling.short_factor must have 4 numbers, one for each pair of the rotated part, but has 1");
  EXPECT_EQ(longrope(original + R"(, "short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 1])"),
            "scaling.factor is missing, but rope_type \"longrope\" needs it");
  const auto llama3 = [&](const std::string& more) {
    return error(R"({"rope_type": "llama3", "factor": 8)" + more + "}");
  };
  EXPECT_EQ(llama3(""), "scaling.low_freq_factor is missing, but rope_type \"llama3\" needs it");
  EXPECT_EQ(llama3(R"(, "low_freq_factor": 1)"),
            "scaling.high_freq_factor is missing, but rope_type \"llama3\" needs it");
  EXPECT_EQ(llama3(R"(, "low_freq_factor": 1, "high_freq_factor": 4)"),
            "scaling.original_max_position_embeddings is missing, but rope_type \"llama3\" needs it");
  EXPECT_EQ(error(R"({"type": "mrope"})"), "scaling.mrope_section is missing, but rope_type \"mrope\" needs it");
  EXPECT_EQ(error(R"({"mrope_interleaved": true})"),
            "scaling.mrope_section is missing, but mrope_interleaved needs it");
  EXPECT_EQ(
      error(R"({"mrope_section": [1, 1, 1]})"),
      "scaling.mrope_section must have 3 numbers whose sum is 4, the pairs of the rotated part, but has 3 whose sum "
      "is 3");
  EXPECT_EQ(error(R"({"mrope_section": [2, -1, 3]})"),
            "scaling.mrope_section[1] must be an integer from 0 to 8192, but is -1");
  EXPECT_EQ(error(R"({"mrope_section": [0, 4, 0], "mrope_interleaved": true})"),
            "scaling.mrope_section[1] is 4, but interleaved only 1 of the pairs can take it");
}

TEST(FrequenciesErrors, DynamicTooFar) {
  EXPECT_EQ(
      MakeError(1e15, 4, R"({"rope_type": "dynamic", "factor": 1000000, "max_position_embeddings": 1})", 1000000000),
      "scaling.factor 1e+06 is too large for a sequence of 1000000000");
}

TEST(FrequenciesErrors, Config) {
  const auto error = [](std::string_view json) { return ConfigError(json); };
  EXPECT_EQ(
      error("{}"),
      "config.json: rope_theta is missing, and a model_type, which would tell it, is missing, too: give it, or make "
      "Frequencies(theta=.., rotary_dim=..)");
  EXPECT_EQ(error(R"({"model_type": "llama"})"), "config.json: num_attention_heads is missing");
  EXPECT_EQ(error(R"({"rope_theta": 1e4, "num_attention_heads": 8})"),
            "config.json: head_dim is missing, and so is hidden_size");
  EXPECT_EQ(error(R"({"rope_theta": 1e4, "num_attention_heads": 0})"),
            "config.json: num_attention_heads must be an integer from 1 to 1048576, but is 0");
  EXPECT_EQ(error(R"({"model_type": "llama", "num_attention_heads": 8, "hidden_size": 100})"),
            "config.json: hidden_size is 100, not a multiple of num_attention_heads, 8");
  EXPECT_EQ(error(R"({"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 3, "head_dim": 64})"),
            "config.json: num_attention_heads is 8, not a multiple of num_key_value_heads, 3");
  EXPECT_EQ(error(R"({"model_type": "llama", "num_attention_heads": 8, "head_dim": 63})"),
            "config.json: rotary_dim must be an even number from 2 to 8192, but is 63");
  EXPECT_EQ(error(R"({"model_type": "llama", "num_attention_heads": 8, "head_dim": 64, "rotary_dim": 1000000000000})"),
            "config.json: rotary_dim is 1000000000000, more than the head of 64");
  EXPECT_EQ(error(R"({"model_type": "llama", "num_attention_heads": 8, "head_dim": 1000000000000})"),
            "config.json: rotary_dim must be an even number from 2 to 8192, but is 1000000000000");
  EXPECT_EQ(
      error(
          R"({"model_type": "llama", "num_attention_heads": 8, "head_dim": 64, "rotary_dim": 32, "partial_rotary_factor": 0.25})"),
      "config.json: partial_rotary_factor is 0.25, but rotary_dim is 32 of a head of 64");
  const std::string head = R"({"model_type": "llama", "num_attention_heads": 8, "head_dim": 64, )";
  EXPECT_EQ(error(head + R"("rope_theta": -1})"),
            "config.json: rope_theta must be a number from 1 to 1e+15, but is -1");
  EXPECT_EQ(error(head + R"("rope_theta": 1})"), "config.json: rope_theta must be greater than 1, but is 1");
  EXPECT_EQ(error(head + R"("rope_theta": NaN})"),
            "config.json: rope_theta must be a number from 1 to 1e+15, but is \"NaN\"");
  EXPECT_EQ(error(head + R"("rope_theta": 1e308})"),
            "config.json: rope_theta must be a number from 1 to 1e+15, but is 1e+308");
  EXPECT_EQ(error(head + R"("rope_theta": 500000, "rope_parameters": {"rope_theta": 10000}})"),
            "config.json: rope_parameters.rope_theta is 10000, but config.json: rope_theta is 500000");
  EXPECT_EQ(
      error(head + R"("partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}})"),
      "config.json: rope_parameters.partial_rotary_factor is 0.25, but config.json: partial_rotary_factor is 0.5");
  // The default rotation of many a class of transformers turns the whole head; its other rules do not.
  const std::string whole =
      " is 0.5, but the code of model_type \"llama\" turns whole heads by rope_type \"default\": give 1, or make "
      "Frequencies(theta=.., rotary_dim=..)";
  EXPECT_EQ(error(head + R"("partial_rotary_factor": 0.5})"), "config.json: partial_rotary_factor" + whole);
  EXPECT_EQ(error(head + R"("rotary_pct": 0.5})"), "config.json: rotary_pct" + whole);
  EXPECT_EQ(error(head + R"("rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}})"),
            "config.json: rope_parameters.partial_rotary_factor" + whole);
  EXPECT_NE(FromConfig(head + R"("partial_rotary_factor": 1.0})"), nullptr);
  const std::string scaled =
      R"("rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}})";
  EXPECT_NE(FromConfig(head + scaled), nullptr);
  // What transformers reads of rope_parameters themselves alone, and layers that it finds nothing for.
  const std::string yarn =
      R"({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "truncate": false})";
  EXPECT_NE(FromConfig(head + R"("rope_parameters": )" + yarn + "}"), nullptr);
  EXPECT_EQ(
      error(head + R"("rope_parameters": {"full_attention": )" + yarn + "}}"),
      "config.json: rope_parameters.full_attention.truncate is false, which transformers does not read of a layer "
      "type: leave it out, or make Frequencies(theta=.., rotary_dim=..)");
  const std::string kinds = R"("layer_types": ["sliding_attention", "linear_attention", "full_attention"], )";
  EXPECT_EQ(error(head + kinds + R"("rope_parameters": {"full_attention": {"rope_theta": 10000}}})"),
            "config.json: rope_parameters has nothing for \"sliding_attention\", of which layer_types has layers: give "
            "it, or null if they do not rotate");
  const std::string null =
      R"("rope_parameters": {"full_attention": {"rope_theta": 10000}, "sliding_attention": null}})";
  EXPECT_NE(FromConfig(head + kinds + null), nullptr);
  EXPECT_EQ(error(head + R"("rope_parameters": {"rope_type": "yarn"}})"),
            "config.json: rope_parameters.factor is missing, but rope_type \"yarn\" needs it");
  EXPECT_EQ(error(head + R"("rope_scaling": {"rope_type": "yarn"}})"),
            "config.json: rope_scaling.factor is missing, but rope_type \"yarn\" needs it");
  EXPECT_EQ(error(head + R"("rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8},
                            "original_max_position_embeddings": 9})"),
            "config.json: rope_scaling.original_max_position_embeddings is 8, but config.json: "
            "original_max_position_embeddings is 9");
  EXPECT_EQ(error(head + R"("rope_scaling": 7})"), "config.json: rope_scaling must be an object, but is 7");
  EXPECT_EQ(error(head + R"("rope_scaling": {"factor": 7}, "rope_parameters": {"factor": 8}})"),
            "config.json: rope_scaling and rope_parameters are both there and differ");
  EXPECT_EQ(error(head + R"("rope_parameters": {"full_attention": {}, "rope_theta": 1e4}})"),
            "config.json: rope_parameters.rope_theta stands next to layer types and must be an object, but is 10000.0");
  EXPECT_EQ(error(head + R"("rope_parameters": {"wat\n": 1}})"),
            "config.json: rope_parameters.wat\\n is not a field that rope_type \"default\" knows");
  EXPECT_EQ(error(head + R"("layer_types": 5})"), "config.json: layer_types must be an array, but is 5");
  EXPECT_EQ(error(R"({"model_type": "llama", "text_config": {"head_dim": 64}})"),
            "config.json: text_config.num_attention_heads is missing");
  EXPECT_EQ(
      error(R"({"model_type": "hunyuan_vl_text", "num_attention_heads": 8, "head_dim": 64,
                      "rope_parameters": {"mrope_section": [8, 12, 12]}})"),
      "config.json: rope_parameters.mrope_section: the multimodal rotation of model_type \"hunyuan_vl_text\" is not "
      "supported: it turns the two elements of a pair by different positions");
  for (const auto& [given, missing] :
       {std::pair{"", "axes_dims_rope"}, {R"(, "axes_dims_rope": [16, 56, 56])", "rope_theta"}}) {
    EXPECT_EQ(error(std::string(R"({"_class_name": "SomeTransformer", "num_attention_heads": 8)") + given + "}"),
              std::string("config.json: ") + missing +
                  " is missing, and _class_name \"SomeTransformer\" is not one that Ropewalk knows: give it, or make "
                  "Frequencies(theta=.., rotary_dim=..)");
  }
  EXPECT_EQ(error(R"({"_class_name": "FluxTransformer2DModel", "num_attention_heads": 8, "attention_head_dim": 64})"),
            "config.json: axes_dims_rope sums to more than the head of 64");
  EXPECT_EQ(error(R"({"_class_name": "FluxTransformer2DModel", "num_attention_heads": 8, "axes_dims_rope": [15]})"),
            "config.json: axes_dims_rope[0] must be even, but is 15");
}

TEST(FrequenciesErrors, HostileJson) {
  const std::string deep(100000, '[');
  EXPECT_EQ(ConfigError(deep), "config.json: nests deeper than 64 levels");
  std::string objects;
  for (int i = 0; i < 100; ++i) objects += R"({"rope_parameters":)";
  EXPECT_EQ(ConfigError(objects), "config.json: nests deeper than 64 levels");
  for (const char* text :
       {"", " ", "{", "nul", "{\"a\":}", "{\"a\" 1}", "\xff\xfe", "{\"a\": \"\xc3\"}", "{\"a\": 1e999}", "{\"a\": 01}",
        "{}{}", "{\"a\": -}", "{\"a\": -Infinit}", "{\"a\\", "{\"a"}) {
    const std::string error = ConfigError(text);
    EXPECT_EQ(error.rfind("config.json: is not JSON: ", 0), 0u) << text << ": " << error;
    EXPECT_LT(error.size(), 300u);
  }
  EXPECT_EQ(ConfigError(std::string_view("{\0}", 3)).rfind("config.json: is not JSON: ", 0), 0u);
  EXPECT_EQ(ConfigError(R"({"rope_theta": 1e4, "rope_theta": 1e6})"),
            "config.json: has the field \"rope_theta\" twice");
  EXPECT_EQ(ConfigError("7"), "config.json: must be a JSON object, but is 7");
  const std::string longest(100000, 'x');
  EXPECT_LT(ConfigError("{\"rope_theta\": 1e4, \"num_attention_heads\": \"" + longest + "\"}").size(), 200u);
  EXPECT_LT(ConfigError(R"({"rope_theta": 1e4, "num_attention_heads": 1, "head_dim": 64, "rope_parameters": {")" +
                        longest + "\": 1}}")
                .size(),
            200u);
  // Truncated anywhere, and with any one byte changed: a sentence or frequencies, never a crash.
  const std::string whole = OurModel("deepseek-v3");
  ASSERT_FALSE(whole.empty());
  for (size_t i = 0; i < whole.size(); ++i) {
    for (std::string text :
         {whole.substr(0, i), std::string(whole).replace(i, 1, "9"), std::string(whole).replace(i, 1, "}")}) {
      ropewalk_frequencies* made = nullptr;
      const Status status = FrequenciesFromConfig(text, "config.json", {}, 0, &made);
      EXPECT_EQ(status.ok(), made != nullptr);
      EXPECT_TRUE(status.ok() || !status.text().empty());
      delete made;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Model types

// What a model's own code has, beside the fields that all have: by its configuration as published.
TEST(ModelTypes, FieldsOfTheirOwn) {
  const std::string heads = R"("hidden_size": 4096, "num_attention_heads": 32)";
  const auto made = [&](const std::string& type, const std::string& more, int64_t length = 0, const char* layer = "") {
    return FromConfig(R"({"model_type": ")" + type + "\", " + heads + ", " + more + "}", layer, length);
  };
  const auto plain = [](double theta, int64_t dim) { return [=](int64_t i) { return Plain(theta, dim, i); }; };
  // microsoft/Phi-3-small-8k-instruct, and its modeling_phi3_small.py
  ExpectFrequencies(*made("phi3small", R"("rope_embedding_base": 1000000, "rope_position_scale": 1.0)"),
                    plain(1e6, 128));
  // zai-org/glm-4-9b, and its modeling_chatglm.py: half the head, and the base is 10000 times rope_ratio
  ExpectFrequencies(*made("chatglm", R"("kv_channels": 128, "rope_ratio": 500)"), plain(5e6, 64));
  // databricks/dbrx-instruct; transformers reads rope_parameters instead, which must not say something else
  ExpectFrequencies(*FromConfig(R"({"model_type": "dbrx", "d_model": 6144, "n_heads": 48,
                                    "attn_config": {"kv_n_heads": 8, "rope_theta": 500000}})"),
                    plain(5e5, 128));
  EXPECT_EQ(
      ConfigError(R"({"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "rope_parameters": {"rope_theta": 1e4},
                            "attn_config": {"kv_n_heads": 8, "rope_theta": 500000}})"),
      "config.json: rope_parameters.rope_theta is 10000, but config.json: attn_config.rope_theta is 500000");
  // Qwen/Qwen-7B, and its modeling_qwen.py: theta grows with 2^ceil(log2(length / seq_length) + 1) - 1
  const std::string qwen =
      R"("kv_channels": 128, "rotary_emb_base": 10000, "seq_length": 2048, "use_dynamic_ntk": true)";
  for (const auto& [length, ratio] : {std::pair{0, 1}, {2048, 1}, {2049, 3}, {4096, 3}, {6000, 7}, {8193, 15}}) {
    const Quad base = QuadLog(10000) + QuadLog(ratio) * 128 / 126;
    ExpectFrequencies(*made("qwen", qwen, length), [&](int64_t i) { return QuadExp(-base * Quad(2 * i) / 128); });
  }
  // baidu/ERNIE-4.5 with compression_ratio: positions are divided by it
  ExpectFrequencies(*made("ernie4_5", R"("head_dim": 128, "rope_theta": 500000, "compression_ratio": 2.0)"),
                    [](int64_t i) { return Plain(5e5, 128, i) / 2; });
  // Granite with a theta for each layer: one for those that have any
  ExpectFrequencies(*made("granite_swa", R"("rope_theta": 1e4, "layer_rope_theta": [1e4, 0, 1e4])"), plain(1e4, 128));
  EXPECT_EQ(ConfigError("{\"model_type\": \"granite_swa\", " + heads +
                        R"(, "rope_theta": 1e4, "layer_rope_theta": [1e4, 5e5]})"),
            "config.json: layer_rope_theta has layers of 500000, but rope_theta is 10000: make Frequencies(theta=.., "
            "rotary_dim=..) for each");
}

// Mistral's own params.json (Magistral, Devstral): alpha and beta are yarn's betas.
TEST(ModelTypes, MistralParams) {
  const std::string params = R"({"dim": 4096, "n_layers": 40, "head_dim": 128, "n_heads": 32, "n_kv_heads": 8,
      "rope_theta": 1e6, "norm_eps": 1e-5, "yarn": {"original_max_position_embeddings": 16384, "factor": 16,
      "beta": 32, "alpha": 1, "apply_scale": )";
  const auto index_of = [](double turns) {
    return 128 * QuadLog(Quad(16384) / (Quad(turns) * 2 * kPi)) / (2 * QuadLog(1e6));
  };
  const auto floor_of = [](Quad x) { return Quad(std::floor(static_cast<double>(x))); };
  const Handle plain = FromConfig(params + "false}}"), scaled = FromConfig(params + "true}}");
  for (const Handle& made : {std::cref(plain), std::cref(scaled)}) {
    ExpectFrequencies(
        *made, [&](int64_t i) { return Yarn(1e6, 128, i, 16, floor_of(index_of(32)), floor_of(index_of(1)) + 1); });
  }
  EXPECT_EQ(plain->attention_scaling, 1.0);
  EXPECT_EQ(scaled->attention_scaling, 0.1 * std::log(16.0) + 1.0);
  EXPECT_EQ(ConfigError(R"({"dim": 4096, "head_dim": 128, "n_heads": 32, "yarn": {"factor": 16}})"),
            "config.json: yarn.original_max_position_embeddings is missing, but rope_type \"yarn\" needs it");
}

// deepseek-ai/DeepSeek-V4: plain on sliding layers, another theta and yarn, without its scaling, where keys are
// compressed.
TEST(ModelTypes, DeepseekV4) {
  const std::string released = R"({"model_type": "deepseek_v4", "hidden_size": 4096, "num_attention_heads": 64,
      "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "rope_theta": 10000,
      "compress_rope_theta": 160000, "max_position_embeddings": 1048576, "rope_scaling": {"type": "yarn", "factor": 16,
      "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}})";
  for (const char* layer : {"main", "sliding_attention"}) {
    const Handle made = FromConfig(released, layer);
    ExpectFrequencies(*made, [](int64_t i) { return Plain(1e4, 64, i); });
    EXPECT_EQ(made->attention_scaling, 1.0);
  }
  for (const char* layer : {"compress", "compressed_sparse_attention", "heavily_compressed_attention"}) {
    const Handle made = FromConfig(released, layer);
    // 64 ln(65536 / (32 * 2 pi)) / (2 ln 160000) = 15.46, and 24.71 for one turn.
    ExpectFrequencies(*made, [](int64_t i) { return Yarn(16e4, 64, i, 16, 15, 25); });
    EXPECT_EQ(made->attention_scaling, 1.0);
  }
  EXPECT_EQ(ConfigError(released),
            "layer_type is missing, but config.json has different rotary embeddings for \"main\" or \"compress\"");
}

// allenai/Olmo-3: yarn is for full attention; sliding layers are plain, in every spelling.
TEST(ModelTypes, Olmo3) {
  const std::string shape = R"({"model_type": "olmo3", "hidden_size": 4096, "num_attention_heads": 32,
      "max_position_embeddings": 65536, "layer_types": ["sliding_attention", "full_attention"], )";
  const std::string yarn = R"("factor": 8.0, "original_max_position_embeddings": 8192)";
  for (const std::string& config :
       {shape + R"("rope_theta": 500000, "rope_scaling": {"rope_type": "yarn", )" + yarn + "}}",
        shape + R"("rope_parameters": {"rope_type": "yarn", "rope_theta": 500000, )" + yarn + "}}",
        shape + R"("rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500000},
            "full_attention": {"rope_type": "yarn", "rope_theta": 500000, )" +
            yarn + "}}}"}) {
    const Handle sliding = FromConfig(config, "sliding_attention"), full = FromConfig(config, "full_attention");
    ExpectFrequencies(*sliding, [](int64_t i) { return Plain(5e5, 128, i); });
    EXPECT_EQ(sliding->attention_scaling, 1.0);
    EXPECT_EQ(full->attention_scaling, 0.1 * std::log(8.0) + 1.0);
    EXPECT_LT(full->inv_freq.back(), sliding->inv_freq.back() / 7);
  }
}

TEST(ModelTypes, UnknownIsServedIfItSaysEverything) {
  const std::string shape = R"("hidden_size": 256, "num_attention_heads": 4)";
  for (const std::string& type : {std::string(), std::string(R"("model_type": "never_heard_of", )")}) {
    for (const char* theta :
         {R"("rope_theta": 5e5)", R"("rope_parameters": {"rope_theta": 5e5})", R"("rotary_emb_base": 5e5)",
          R"("rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 5e5}})",
          R"("rope_theta": 5e5, "use_dynamic_ntk": false, "rope_scaling": null, "alibi": false)",
          R"("rope_theta": 5e5, "position_embedding_type": "rope", "no_rope_layers": [1, 1])",
          R"("rope_theta": 5e5, "vision_config": {"rope_theta": 100}, "ffn_config": {"ffn_hidden_size": 9})"}) {
      const std::string config = "{" + type + shape + ", " + theta + "}";
      const Handle made = FromConfig(config);
      ASSERT_NE(made, nullptr) << config;
      ExpectFrequencies(*made, [](int64_t i) { return Plain(5e5, 64, i); });
    }
    EXPECT_EQ(ConfigError("{" + type + shape + "}"),
              "config.json: rope_theta is missing, and " +
                  (type.empty() ? std::string("a model_type, which would tell it, is missing, too")
                                : std::string("model_type \"never_heard_of\" is not one that Ropewalk knows")) +
                  ": give it, or make Frequencies(theta=.., rotary_dim=..)");
    EXPECT_EQ(ConfigError("{" + type + shape + R"(, "rope_scaling": {"type": "linear", "factor": 2}})")
                  .find("config.json: rope_theta is missing"),
              0u);
  }
  ModelConfig model;  // its pairing and norm are not known
  EXPECT_EQ(
      ReadModelConfig(R"({"model_type": "never_heard_of", "rope_theta": 1e4, "hidden_size": 256,
                                "num_attention_heads": 4})",
                      "config.json", &model)
          .text(),
      "config.json: model_type \"never_heard_of\" is not one that Ropewalk knows, and so neither are its pairing and "
      "its norm");
}

// A field that may change the rotation, that nobody has read: of a model type that is known, of one that is not.
TEST(ModelTypes, FieldsThatNobodyReadsAreRefused) {
  for (const char* type : {"llama", "qwen3", "never_heard_of"}) {
    const std::string config = std::string(R"({"model_type": ")") + type +
                               R"(", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4, )";
    ASSERT_NE(FromConfig(config + R"("swan": null, "use_rope_3d": false, "theta_names": []})"), nullptr);
    ASSERT_NE(FromConfig(config + R"("apply_rope_fusion": false, "rotary_emb_interleaved": false, "no_rope": false,
                                     "is_property": false, "position_embedding_xdrope": false,
                                     "flash_rotary": false})"),
              nullptr);
    for (const char* field : {"rope_thetta",
                              "rope_ratio",
                              "rope_3d",
                              "rope_base_local",
                              "local_attention_rope_scaling",
                              "rotary_scale_base",
                              "rotary_scaling_factor",
                              "partial_rotary_factors",
                              "swa_qk_rope_head_dim",
                              "swa_rope_theta",
                              "use_dynamic_ntk",
                              "ntk_alpha",
                              "yarn_factor",
                              "alibi_bias_max",
                              "use_absolute_position_embeddings",
                              "compress_rope_theta",
                              "rope_embedding_base",
                              "Rope_Scale",
                              "rop_theta",
                              "rope",
                              "rotary",
                              "use_rotary",
                              "alibi",
                              "position_embedding_type"}) {
      for (const char* value : {"2", "true", "[1]", "{\"a\": 1}", "\"x\""}) {
        const std::string_view name = field;
        const bool said = value[0] == 't'
                              ? name == "rope" || name == "rotary" || name == "use_rotary" || name == "alibi"
                              : value[0] == '"' && name == "position_embedding_type";
        if (said) continue;  // what kind of positions there are: below
        EXPECT_EQ(ConfigError(config + "\"" + field + "\": " + value + "}"),
                  "config.json: " + std::string(field) +
                      " is not a field that Ropewalk knows, and may change the rotation: correct it, or make "
                      "Frequencies(theta=.., rotary_dim=..)");
      }
    }
  }
  const std::string unknown =
      R"({"model_type": "never_heard_of", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4, )";
  EXPECT_EQ(ConfigError(unknown + R"("attn_config": {"deep": {"rope_theta": 5e5}}})"),
            "config.json: attn_config.deep.rope_theta is not a field that Ropewalk knows, and may change the rotation: "
            "correct it, or make Frequencies(theta=.., rotary_dim=..)");
  // Around the text model.
  const std::string text = R"("text_config": {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4,
                              "rope_theta": 1e4}})";
  EXPECT_NE(FromConfig(R"({"rope_theta": 1e4, )" + text), nullptr);
  EXPECT_EQ(ConfigError(R"({"rope_theta": 1e6, )" + text).rfind("config.json: rope_theta is not a field", 0), 0u);
  // A diffusion transformer.
  EXPECT_EQ(
      ConfigError(R"({"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24, "rope_max_seq_len": 1})")
          .rfind("config.json: rope_max_seq_len is not a field", 0),
      0u);
}

TEST(ModelTypes, WithoutRotaryEmbedding) {
  const std::string shape = R"("hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4)";
  const auto error = [&](const std::string& more) { return ConfigError("{" + more + ", " + shape + "}"); };
  EXPECT_EQ(error(R"("model_type": "bloom")"),
            "config.json: model_type is \"bloom\", a model with ALiBi, without rotary embedding");
  EXPECT_EQ(error(R"("model_type": "mpt", "attn_config": {"alibi": true})"),
            "config.json: model_type is \"mpt\", a model with ALiBi, without rotary embedding");
  EXPECT_EQ(error(R"("model_type": "gpt2")"),
            "config.json: model_type is \"gpt2\", a model with absolute positions, without rotary embedding");
  EXPECT_EQ(error(R"("model_type": "t5")"),
            "config.json: model_type is \"t5\", a model with relative positions, without rotary embedding");
  EXPECT_EQ(
      error(R"("model_type": "jamba")"),
      "config.json: model_type is \"jamba\", a model without position embedding (NoPE), so without rotary embedding");
  for (const char* type : {"falcon", "never_heard_of"}) {
    const std::string start = std::string(R"("model_type": ")") + type + "\", ";
    EXPECT_EQ(error(start + R"("alibi": true)"),
              "config.json: alibi is true: a model with ALiBi has no rotary embedding");
    EXPECT_EQ(error(start + R"("attn_config": {"alibi": true})"),
              "config.json: attn_config.alibi is true: a model with ALiBi has no rotary embedding");
    EXPECT_EQ(error(start + R"("mla_use_nope": true)"),
              "config.json: mla_use_nope is true: a model with NoPE has no rotary embedding");
    for (const char* positions : {"absolute", "nope", "alibi", "relative_key", "learned"}) {
      EXPECT_EQ(error(start + R"("position_embedding_type": ")" + positions + "\""),
                std::string("config.json: position_embedding_type is \"") + positions +
                    "\": a model with such positions has no rotary embedding");
    }
    EXPECT_EQ(error(start + R"("use_rotary": false)"),
              "config.json: use_rotary is false: such a model has no rotary embedding");
  }
  EXPECT_EQ(error(R"("model_type": "granitemoehybrid")"),
            "config.json: position_embedding_type is missing: without it model_type \"granitemoehybrid\" has no rotary "
            "embedding");
  EXPECT_NE(FromConfig(R"({"model_type": "granitemoehybrid", "position_embedding_type": "rope", )" + shape + "}"),
            nullptr);
  EXPECT_EQ(
      error(R"("model_type": "qwen2_vl_vision")"),
      "config.json: model_type is \"qwen2_vl_vision\", which rotates by the rows and columns of images: that is not "
      "supported");
  EXPECT_EQ(error(R"("model_type": "chatglm", "position_encoding_2d": true)"),
            "config.json: position_encoding_2d is true: the rotation of ChatGLM's first version is not supported");
}

// Served without a word, each of these would be another model's rotation.
TEST(ModelTypes, SaidOtherwise) {
  const std::string shape = R"("hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 1e4)";
  const std::string way_out = ": correct it, or make Frequencies(theta=.., rotary_dim=..)";
  const std::string unknown = " is not a field that Ropewalk knows, and may change the rotation" + way_out;
  for (const char* type : {"llama", "dbrx", "never_heard_of"}) {
    const std::string start = std::string(R"({"model_type": ")") + type + "\", " + shape + ", ";
    const auto error = [&](const std::string& more) { return ConfigError(start + more + "}"); };
    // False says that there is none, whatever the key is called.
    for (const char* key : {"apply_rope", "enable_rope", "has_rotary", "rotary_embedding", "Use_RoPE",
                            "use_rotary_positional_embeddings", "rope_enabled"}) {
      EXPECT_EQ(error(std::string("\"") + key + "\": false"),
                std::string("config.json: ") + key + " is false: such a model has no rotary embedding");
      EXPECT_EQ(error(std::string(R"("attn_config": {")") + key + "\": false}"),
                std::string("config.json: attn_config.") + key + " is false: such a model has no rotary embedding");
    }
    // NoPE, ALiBi and other positions, in other words than true.
    for (const char* key : {"nope", "use_nope", "mla_use_nope", "alibi", "use_alibi"}) {
      for (const char* value : {"1", "\"true\"", "[true]"}) {
        EXPECT_EQ(error(std::string("\"") + key + "\": " + value), std::string("config.json: ") + key + unknown);
        EXPECT_EQ(error(std::string(R"("attn_config": {")") + key + "\": " + value + "}"),
                  std::string("config.json: attn_config.") + key + unknown);
      }
    }
    for (const char* key : {"position_embedding_type", "positional_encoding", "position_encoding", "pos_emb",
                            "positional_embeddings", "pos_encoding_type"}) {
      for (const char* value : {"alibi", "learned"}) {
        EXPECT_EQ(error(std::string("\"") + key + "\": \"" + value + "\""),
                  std::string("config.json: ") + key + " is \"" + value +
                      "\": a model with such positions has no rotary embedding");
      }
      for (const char* value : {"no_rope", "rope_2d", "alibi_and_rope", "rotary_and_learned"}) {
        EXPECT_EQ(
            error(std::string("\"") + key + "\": \"" + value + "\""),
            std::string("config.json: ") + key + " must be \"rope\" or \"rotary\", but is \"" + value + "\"" + way_out);
      }
      for (const char* value : {"rope", "RoPE", "rotary", "rope_gptj"}) {
        EXPECT_NE(FromConfig(start + "\"" + key + "\": \"" + value + "\"}"), nullptr);
      }
    }
    // In the attention's part, and in arrays.
    for (const char* field : {"rope_thetta", "rope_scaling", "rope_base"}) {
      EXPECT_EQ(error(std::string(R"("attn_config": {")") + field + "\": {\"a\": 1}}"),
                std::string("config.json: attn_config.") + field + unknown);
      EXPECT_EQ(error(std::string(R"("layers": [1, {")") + field + "\": 3}]"),
                std::string("config.json: layers[1].") + field + unknown);
    }
    // One letter more, less or else, or two that changed places.
    for (const auto& [field, meant] : {std::pair{"rop_scaling", "rope_scaling"},
                                       {"roep_scaling", "rope_scaling"},
                                       {"ropescaling", "rope_scaling"},
                                       {"rotay_dim", "rotary_dim"},
                                       {"rotray_pct", "rotary_pct"},
                                       {"partial_rotory_factor", "partial_rotary_factor"},
                                       {"orignal_max_position_embeddings", "original_max_position_embeddings"},
                                       {"_rop_scaling", "rope_scaling"}}) {
      const std::string text = error(std::string("\"") + field + "\": 2");
      EXPECT_EQ(text.rfind(std::string("config.json: ") + field + " is not a field that Ropewalk knows", 0), 0u)
          << text;
      EXPECT_NE(ConfigError("{" + shape + ", \"" + field + "\": 2}").find(field), std::string::npos) << meant;
    }
    EXPECT_EQ(error(R"("rotay_dim": 2)"),
              "config.json: rotay_dim is not a field that Ropewalk knows, but looks like rotary_dim" + way_out);
    for (const char* field : {"_rope_theta", "freq_base", "rotary_freq_base"}) {
      EXPECT_EQ(error(std::string("\"") + field + "\": 5e5"), std::string("config.json: ") + field + unknown);
    }
    EXPECT_NE(FromConfig(start + R"("_comment": "rope_theta of another", "_name": 1, "properties": 3,
                                    "label2id": {"rope": 1}, "protein_encoder_config": {"rope_theta": 5}})"),
              nullptr);
    EXPECT_EQ(error(R"("rotary_dim": 64, "partial_rotary_factor": 1.0)"),
              "config.json: partial_rotary_factor is 1, but rotary_dim is 64 of a head of 128");
  }
  // What a known type reads in its attention's part is not refused; what it does not is.
  EXPECT_NE(FromConfig(R"({"model_type": "dbrx", "d_model": 6144, "n_heads": 48,
                           "attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "alibi": false}})"),
            nullptr);
  EXPECT_EQ(ConfigError(R"({"model_type": "llama", )" + shape + R"(, "attn_config": {"rope_theta": 5e5}})"),
            "config.json: attn_config.rope_theta" + unknown);
}

TEST(ModelTypes, SeveralTextModels) {
  const std::string shape = R"("hidden_size": 4096, "num_attention_heads": 32)";
  const std::string start = R"({"model_type": "qwen2_5_vl", "rope_theta": 1e6, )" + shape + ", ";
  for (const char* key : {"text_config", "llm_config", "language_config", "thinker_config"}) {
    for (const char* field : {R"("rope_theta": 5e5)", R"("rope_scaling": {"type": "linear", "factor": 4})"}) {
      const std::string text =
          ConfigError(start + "\"" + key + R"(": {"model_type": "qwen2_5_vl_text", )" + field + "}}");
      EXPECT_EQ(text.rfind(std::string("config.json: ") + key + ".rope_", 0), 0u) << text;
      EXPECT_TRUE(text.ends_with(std::string("; ") + key + " is not read, as it has no hidden_size")) << text;
    }
    EXPECT_NE(FromConfig(start + "\"" + key + R"(": {"rope_theta": 1e6, "vocab_size": 9}})"), nullptr);
    EXPECT_NE(FromConfig(start + "\"" + key + R"(": {}})"), nullptr);
  }
  const std::string text = R"({"model_type": "llama", "rope_theta": 1e4, )" + shape + "}";
  const std::string other = R"({"model_type": "llama", "rope_theta": 5e5, )" + shape + "}";
  EXPECT_NE(FromConfig(R"({"text_config": )" + text + R"(, "llm_config": )" + text + "}"), nullptr);
  EXPECT_NE(FromConfig(R"({"text_config": {"vocab_size": 9}, "llm_config": )" + text + "}"), nullptr);
  EXPECT_EQ(ConfigError(R"({"text_config": )" + text + R"(, "llm_config": )" + other + "}"),
            "config.json: text_config and llm_config are both there and differ: leave one, or make "
            "Frequencies(theta=.., rotary_dim=..)");
}

TEST(ModelTypes, KnownWithoutRotaryEmbedding) {
  for (const char* type : {"cpmant", "ctrl", "falcon_mamba", "flaubert", "fnet", "kimi_linear", "mra", "nllb-moe",
                           "nemotron_h", "pegasus_x", "prophetnet", "reformer", "roc_bert", "xlstm", "zamba"}) {
    const std::string text = ConfigError(std::string(R"({"model_type": ")") + type +
                                         R"(", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4})");
    EXPECT_TRUE(text.ends_with("without rotary embedding")) << text;
  }
}

// meta-llama/Llama-4-Scout-17B-16E: low_freq_factor = high_freq_factor = 1. As transformers has it, wavelengths above
// 8192 are divided and the others kept.
TEST(Frequencies, Llama3WithoutBlend) {
  const std::string rule = R"({"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192, )";
  const Handle scout = Make(500000, 128, rule + R"("low_freq_factor": 1.0, "high_freq_factor": 1.0})");
  int kept = 0, divided = 0;
  ExpectFrequencies(*scout, [&](int64_t i) -> Quad {
    const Quad w = Plain(500000, 128, i);
    return 2 * kPi / w > 8192 ? (++divided, w / 16) : (++kept, w);
  });
  EXPECT_EQ(kept, 35);
  EXPECT_EQ(divided, 29);
  EXPECT_EQ(scout->warnings, "");
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_NEAR(scout->table_inv_freq[i], scout->inv_freq[i], 4e-7 * scout->inv_freq[i]);
  }
  const Handle crossed = Make(500000, 128, rule + R"("low_freq_factor": 4.0, "high_freq_factor": 1.0})");
  ExpectFrequencies(*crossed, [&](int64_t i) -> Quad {
    const Quad w = Plain(500000, 128, i);
    return 2 * kPi / w > 2048 ? w / 16 : w;
  });
  EXPECT_EQ(crossed->warnings, "scaling.high_freq_factor should be at least low_freq_factor, 4, but is 1");
}

// What transformers goes on without, or with, and only says.
TEST(Frequencies, IgnoredWithAWarning) {
  const std::string yarn = R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096)";
  const Handle plain = Make(10000, 64, yarn + "}");
  EXPECT_EQ(plain->warnings, "");
  for (const auto& [more, warning] :
       {std::pair{R"("attn_factor": 2.0)", "scaling.attn_factor is ignored, as transformers ignores it"},
        {R"("extrapolation_factor": 1)", "scaling.extrapolation_factor is ignored, as transformers ignores it"},
        {R"("finetuned": true)", "scaling.finetuned is ignored, as transformers ignores it"},
        {R"("type": "linear")", "scaling.type is ignored: it is \"linear\", but rope_type is \"yarn\""},
        {R"("type": "ntk-aware")", "scaling.type is ignored: it is \"ntk-aware\", but rope_type is \"yarn\""},
        {R"("attn_factor": 1, "finetuned": false)",
         "scaling.attn_factor is ignored, as transformers ignores it\nscaling.finetuned is ignored, as transformers "
         "ignores it"},
        {R"("type": "yarn")", ""},
        {R"("attn_factor": null)", ""}}) {
    const Handle made = Make(10000, 64, yarn + ", " + more + "}");
    EXPECT_EQ(made->inv_freq, plain->inv_freq) << more;
    EXPECT_EQ(made->attention_scaling, plain->attention_scaling) << more;
    EXPECT_EQ(made->warnings, warning) << more;
  }
  // beta_fast < beta_slow: the ramp falls.
  const Handle falling = Make(10000, 64, yarn + R"(, "beta_fast": 1, "beta_slow": 32})");
  const Handle rising = Make(10000, 64, yarn + R"(, "beta_fast": 32, "beta_slow": 1})");
  EXPECT_EQ(falling->warnings, "scaling.beta_fast should be at least beta_slow, 32, but is 1");
  EXPECT_EQ(falling->inv_freq.front(), 1.0 / 4);
  EXPECT_EQ(rising->inv_freq.front(), 1.0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shapes

TEST(ModelConfigTest, EveryModel) {
  struct Expected {
    const char* name;
    int64_t q_heads, k_heads, head_dim, rotary_dim, rotary_offset;
    bool interleaved, norm, zero_centered_weight;
    int axes;
    size_t layer_types;
  };
  const Expected models[] = {
      {"command-r", 64, 64, 128, 128, 0, true, false, false, 1, 0},
      {"deepseek-v3", 128, 128, 192, 64, 128, true, false, false, 1, 0},
      {"flux.1", 24, 24, 128, 128, 0, true, true, false, 3, 0},
      {"gemma-3-4b", 8, 4, 256, 256, 0, false, true, true, 1, 2},
      {"glm-4-9b", 32, 2, 128, 64, 0, true, false, false, 1, 0},
      {"gpt-j-6b", 16, 16, 256, 64, 0, true, false, false, 1, 0},
      {"gpt-neox-20b", 64, 64, 96, 24, 0, false, false, false, 1, 0},
      {"gpt-oss-20b", 64, 8, 64, 64, 0, false, false, false, 1, 0},
      {"llama-2-7b", 32, 32, 128, 128, 0, false, false, false, 1, 0},
      {"llama-3.1-8b", 32, 8, 128, 128, 0, false, false, false, 1, 0},
      {"mistral-7b", 32, 8, 128, 128, 0, false, false, false, 1, 0},
      {"phi-3-mini-128k", 32, 32, 96, 96, 0, false, false, false, 1, 0},
      {"qwen-image", 24, 24, 128, 128, 0, true, true, false, 3, 0},
      {"qwen2.5-vl-7b", 28, 4, 128, 128, 0, false, false, false, 3, 0},
      {"qwen3-30b-a3b", 32, 4, 128, 128, 0, false, true, false, 1, 0},
      {"qwen3-8b", 32, 8, 128, 128, 0, false, true, false, 1, 0},
      {"qwen3-vl-8b", 32, 8, 128, 128, 0, false, true, false, 3, 0},
      {"smollm2-135m", 9, 3, 64, 64, 0, false, false, false, 1, 0},
  };
  EXPECT_EQ(OurModels().size(), std::size(models)) << "a model without an expectation here";
  for (const Expected& expected : models) {
    const std::string name = expected.name, text = OurModel(name);
    ModelConfig model;
    const Status status = ReadModelConfig(text, name, &model);
    ASSERT_TRUE(status.ok()) << status.text();
    EXPECT_NE(model.name.find('/'), std::string::npos) << name;
    EXPECT_NE(text.find("\"_source\""), std::string::npos) << name;
    EXPECT_EQ(model.q_heads, expected.q_heads) << name;
    EXPECT_EQ(model.k_heads, expected.k_heads) << name;
    EXPECT_EQ(model.head_dim, expected.head_dim) << name;
    EXPECT_EQ(model.rule.rotary_dim, expected.rotary_dim) << name;
    EXPECT_EQ(model.rotary_offset, expected.rotary_offset) << name;
    EXPECT_EQ(model.interleaved, expected.interleaved) << name;
    EXPECT_EQ(model.norm, expected.norm) << name;
    EXPECT_EQ(model.zero_centered_weight, expected.zero_centered_weight) << name;
    EXPECT_EQ(model.axes, expected.axes) << name;
    EXPECT_EQ(model.layer_types.size(), expected.layer_types) << name;
    std::vector<std::string> layer_types = model.layer_types;
    if (layer_types.empty()) layer_types.emplace_back();
    for (const std::string& layer_type : layer_types) {
      const Handle made = FromConfig(text, layer_type);
      ASSERT_NE(made, nullptr) << name;
      EXPECT_EQ(made->rotary_dim, model.rule.rotary_dim) << name;
      EXPECT_EQ(made->axes.empty(), model.axes == 1) << name;
    }
  }
}

// Heads and pairing of models whose configurations say them in words of their own. The numbers are those of the
// published config.json that is named; pairing and norm those of the model's code.
TEST(ModelConfigTest, HeadsAndPairing) {
  struct Expected {
    const char* source;
    const char* json;
    int64_t q_heads, k_heads, head_dim, rotary_dim, rotary_offset;
    bool interleaved, norm;
  };
  const Expected models[] = {
      {"databricks/dbrx-instruct", R"({"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "max_seq_len": 32768,
           "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000}})",
       48, 8, 128, 128, 0, false, false},
      {"tiiuae/falcon-7b", R"({"model_type": "falcon", "alibi": false, "hidden_size": 4544, "multi_query": true,
           "new_decoder_architecture": false, "num_attention_heads": 71, "parallel_attn": true})",
       71, 1, 64, 64, 0, false, false},
      {"tiiuae/falcon-40b", R"({"model_type": "falcon", "alibi": false, "hidden_size": 8192, "multi_query": true,
           "new_decoder_architecture": true, "num_attention_heads": 128, "num_kv_heads": 8})",
       128, 8, 64, 64, 0, false, false},
      {"tiiuae/falcon-7b of 2023-05", R"({"model_type": "RefinedWebModel", "alibi": false, "hidden_size": 4544,
           "multi_query": true, "n_head": 71})",
       71, 1, 64, 64, 0, false, false},
      {"zai-org/chatglm2-6b", R"({"model_type": "chatglm", "hidden_size": 4096, "kv_channels": 128,
           "multi_query_attention": true, "multi_query_group_num": 2, "num_attention_heads": 32, "seq_length": 32768})",
       32, 2, 128, 64, 0, true, false},
      {"zai-org/glm-4-9b-chat", R"({"model_type": "chatglm", "hidden_size": 4096, "kv_channels": 128,
           "multi_query_attention": true, "multi_query_group_num": 2, "num_attention_heads": 32, "rope_ratio": 500,
           "seq_length": 131072})",
       32, 2, 128, 64, 0, true, false},
      {"moonshotai/Kimi-K2-Instruct", R"({"model_type": "kimi_k2", "hidden_size": 7168, "num_attention_heads": 64,
           "num_key_value_heads": 64, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
           "max_position_embeddings": 131072, "rope_theta": 50000.0, "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0,
           "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
           "type": "yarn"}})",
       64, 64, 192, 64, 128, true, false},
      {"inclusionAI/Ling-mini-2.0", R"({"model_type": "bailing_moe", "hidden_size": 2048, "num_attention_heads": 16,
           "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64, "partial_rotary_factor": 0.5,
           "rope_theta": 600000, "rope_scaling": null, "use_qk_norm": true, "rms_norm_eps": 1e-06})",
       16, 4, 128, 64, 0, false, true},
      {"inclusionAI/Ling-lite", R"({"model_type": "bailing_moe", "hidden_size": 2048, "num_attention_heads": 16,
           "num_key_value_heads": 4, "head_dim": 128, "rope_theta": 600000, "rope_scaling": null})",
       16, 4, 128, 128, 0, false, false},
      {"hunyuanvideo-community/HunyuanVideo transformer", R"({"_class_name": "HunyuanVideoTransformer3DModel",
           "attention_head_dim": 128, "num_attention_heads": 24, "qk_norm": "rms_norm", "rope_axes_dim": [16, 56, 56],
           "rope_theta": 256.0})",
       24, 24, 128, 128, 0, true, true},
      {"microsoft/Phi-3-small-8k-instruct", R"({"model_type": "phi3small", "hidden_size": 4096,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_embedding_base": 1000000,
           "rope_position_scale": 1.0})",
       32, 8, 128, 128, 0, false, false},
      {"mistralai/Devstral-Small-2507 params.json", R"({"dim": 5120, "n_layers": 40, "head_dim": 128, "n_heads": 32,
           "n_kv_heads": 8, "rope_theta": 1000000000.0, "norm_eps": 1e-05})",
       32, 8, 128, 128, 0, true, false},
  };
  for (const Expected& expected : models) {
    ModelConfig model;
    const Status status = ReadModelConfig(expected.json, "config.json", &model);
    ASSERT_TRUE(status.ok()) << expected.source << ": " << status.text();
    EXPECT_EQ(model.q_heads, expected.q_heads) << expected.source;
    EXPECT_EQ(model.k_heads, expected.k_heads) << expected.source;
    EXPECT_EQ(model.head_dim, expected.head_dim) << expected.source;
    EXPECT_EQ(model.rule.rotary_dim, expected.rotary_dim) << expected.source;
    EXPECT_EQ(model.rotary_offset, expected.rotary_offset) << expected.source;
    EXPECT_EQ(model.interleaved, expected.interleaved) << expected.source;
    EXPECT_EQ(model.norm, expected.norm) << expected.source;
  }
}

TEST(ModelConfigTest, NameAndEps) {
  ModelConfig model;
  ASSERT_TRUE(ReadModelConfig(R"({"model_type": "gptj", "n_head": 2, "n_embd": 128, "layer_norm_epsilon": 0.5})",
                              "a/b/tiny.json", &model)
                  .ok());
  EXPECT_EQ(model.name, "tiny");
  EXPECT_EQ(model.eps, 0.5);
  EXPECT_EQ(model.k_heads, 2);
  EXPECT_EQ(ReadModelConfig("{", "a/b.json", &model).text().rfind("a/b.json: is not JSON: ", 0), 0u);
}

}  // namespace
}  // namespace ropewalk
