// What torch computes in float32, one rounding at a time: for the table that is transformers' bit for bit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace ropewalk {

inline float F(double value) { return static_cast<float>(value); }
inline double D(float value) { return value; }

}  // namespace ropewalk
