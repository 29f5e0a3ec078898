// The C++20 face of Ropewalk: arguments by designated initialisers, a Result, frequencies that free themselves. Nothing
// here that is not in ropewalk.h.
//
//   ropewalk::View q(data, ropewalk::kBfloat16, {tokens, 32, 128});
//   auto f = ropewalk::Frequencies::Make(1e6, 128);
//   auto r = ropewalk::rope({.q = &q, .frequencies = f.get()});
//   if (!r) std::puts(r.text.c_str());
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_ROPEWALK_HPP_
#define ROPEWALK_ROPEWALK_HPP_

#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace ropewalk {

using RopeArgs = ropewalk_rope_args;
using RopeGradients = ropewalk_rope_gradients;

// The dtypes of tensors. fp8: DLPack's codes, which older copies of dlpack.h have no names for.
inline constexpr DLDataType kFloat32 = {kDLFloat, 32, 1}, kFloat16 = {kDLFloat, 16, 1}, kBfloat16 = {kDLBfloat, 16, 1};
inline constexpr DLDataType kFloat8E4m3fn = {10, 8, 1}, kFloat8E5m2 = {12, 8, 1};
inline constexpr DLDataType kInt32 = {kDLInt, 32, 1}, kInt64 = {kDLInt, 64, 1};

// A tensor of memory that the caller owns: a DLTensor whose sizes and strides lie in itself.
class View : public DLTensor {
 public:
  static constexpr size_t kMostDims = 8;

  // strides: in elements, one for each size; none: contiguous. Throws std::invalid_argument if there are more than
  // eight sizes, or another number of strides.
  View(void* pointer, DLDataType type, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> steps = {},
       DLDevice where = {kDLCPU, 0})
      : DLTensor{} {
    if (sizes.size() > kMostDims) throw std::invalid_argument("ropewalk::View: at most eight sizes");
    if (steps.size() != 0 && steps.size() != sizes.size()) {
      throw std::invalid_argument("ropewalk::View: as many strides as sizes, or none");
    }
    data = pointer;
    device = where;
    ndim = static_cast<int32_t>(sizes.size());
    dtype = type;
    std::ranges::copy(sizes, sizes_.begin());
    std::ranges::copy(steps, strides_.begin());
    if (steps.size() == 0) {
      int64_t step = 1;
      for (size_t i = sizes.size(); i-- > 0; step *= sizes_[i]) strides_[i] = step;
    }
    Bind();
  }
  View(const View& other) : DLTensor(other), sizes_(other.sizes_), strides_(other.strides_) { Bind(); }
  View& operator=(const View& other) {
    static_cast<DLTensor&>(*this) = other;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    Bind();
    return *this;
  }
  ~View() = default;

 private:
  void Bind() {
    shape = sizes_.data();
    strides = strides_.data();
  }

  std::array<int64_t, kMostDims> sizes_ = {}, strides_ = {};
};

// What went wrong, or nothing.
struct Result {
  ropewalk_code code = ROPEWALK_OK;
  std::string text;
  explicit operator bool() const { return code == ROPEWALK_OK; }
};

inline Result MakeResult(int code) {
  return {static_cast<ropewalk_code>(code), code == ROPEWALK_OK ? "" : ropewalk_last_error()};
}

// Designated initialisers stand in the order of the struct in ropewalk.h: pairing before q, rounding before eps.
inline Result rope(const RopeArgs& args, void* stream = nullptr) { return MakeResult(ropewalk_rope(&args, stream)); }
inline Result rope_backward(const RopeArgs& args, const RopeGradients& gradients, void* stream = nullptr) {
  return MakeResult(ropewalk_rope_backward(&args, &gradients, stream));
}
// How many float32 elements the call's workspace must have; negative with the reason in ropewalk_last_error().
inline int64_t rope_backward_workspace(const RopeArgs& args, const RopeGradients& gradients) {
  return ropewalk_rope_backward_workspace(&args, &gradients);
}
inline Result prepare(const RopeArgs& args) { return MakeResult(ropewalk_prepare(&args)); }
inline Result check_faults() { return MakeResult(ropewalk_check_faults()); }
inline Result force_backend(const char* name) { return MakeResult(ropewalk_force_backend(name)); }

// A JSON object, or nothing with the reason in ropewalk_last_error().
inline std::optional<std::string> explain(const RopeArgs& args) {
  const char* text = ropewalk_explain(&args);
  return text ? std::optional<std::string>(text) : std::nullopt;
}

// Owns a share of a ropewalk_frequencies. If making it failed it is false, `result()` says why, and whatever would read
// it throws std::runtime_error with that sentence: rope() could only say that there are none.
class Frequencies {
 public:
  static Frequencies Make(double theta, int64_t rotary_dim, const std::string& scaling_json = "",
                          int64_t sequence_length = 0) {
    Frequencies f;
    f.result_ = MakeResult(ropewalk_frequencies_create(
        theta, rotary_dim, scaling_json.empty() ? nullptr : scaling_json.c_str(), sequence_length, &f.handle_));
    return f;
  }
  static Frequencies FromArray(const double* inv_freq, int64_t count, double attention_scaling = 1.0,
                               const int32_t* axes = nullptr) {
    Frequencies f;
    f.result_ = MakeResult(ropewalk_frequencies_from_array(inv_freq, count, attention_scaling, axes, &f.handle_));
    return f;
  }
  static Frequencies FromConfig(const std::string& json, const std::string& name, const std::string& layer_type = "",
                                int64_t sequence_length = 0) {
    Frequencies f;
    f.result_ = MakeResult(ropewalk_frequencies_from_config(
        json.c_str(), name.c_str(), layer_type.empty() ? nullptr : layer_type.c_str(), sequence_length, &f.handle_));
    return f;
  }

  Frequencies() = default;
  Frequencies(const Frequencies& other) : handle_(other.handle_), result_(other.result_) {
    ropewalk_frequencies_retain(handle_);
  }
  Frequencies(Frequencies&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), result_(std::move(other.result_)) {}
  Frequencies& operator=(Frequencies other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(result_, other.result_);
    return *this;
  }
  ~Frequencies() { ropewalk_frequencies_release(handle_); }

  explicit operator bool() const { return handle_ != nullptr; }
  const Result& result() const { return result_; }
  // Null of an empty one, which nobody has made yet.
  const ropewalk_frequencies* get() const {
    if (!result_) throw std::runtime_error(result_.text);
    return handle_;
  }
  int64_t rotary_dim() const { return ropewalk_frequencies_rotary_dim(get()); }
  double attention_scaling() const { return ropewalk_frequencies_attention_scaling(get()); }
  const double* inv_freq() const { return ropewalk_frequencies_inv_freq(get()); }
  const char* warnings() const { return ropewalk_frequencies_warnings(get()); }

 private:
  ropewalk_frequencies* handle_ = nullptr;
  Result result_;
};

}  // namespace ropewalk

#endif  // ROPEWALK_ROPEWALK_HPP_
