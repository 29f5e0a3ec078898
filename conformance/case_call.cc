// SPDX-License-Identifier: Apache-2.0
#include "conformance/case_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>

#include "base/text.h"
#include "conformance/reference.h"
#include "rope/backward.h"
#include "rope/call.h"

#ifdef ROPEWALK_POISONS
#include <sanitizer/asan_interface.h>
#endif

namespace ropewalk {
namespace {

// The number that the bytes are in memory, in hexadecimal: the last byte first.
std::string Number(const uint8_t* bytes, int64_t count) {
  const std::string first_last(std::make_reverse_iterator(bytes + count), std::make_reverse_iterator(bytes));
  return "0x" + Hex(first_last);
}

}  // namespace

CaseCall::CaseCall(const RopeCase& c, DeviceMemory& memory, bool backward)
    : case_(c), memory_(memory), backward_(backward) {}

CaseCall::~CaseCall() {
  for (const auto& buffer : buffers_) {
    if (buffer->device) memory_.Free(buffer->device);
  }
  ropewalk_frequencies_release(frequencies_);
}

const DLTensor* CaseCall::Written(RopeOutput output) const {
  if (!backward_) return OutputTensor(host_args_, output);
  const ropewalk_rope_gradients& g = host_gradients_;
  if (output == RopeOutput::kQ) return g.q_grad_out ? g.q_grad_out : g.q_grad;
  return g.k_grad_out ? g.k_grad_out : g.k_grad;
}

Status CaseCall::Reset() {
  for (const auto& buffer : buffers_) {
    ROPEWALK_TRY(memory_.CopyIn(buffer->device, buffer->initial.data(), buffer->initial.size()));
  }
  return memory_.Synchronize();
}

Status CaseCall::Run() {
#ifdef ROPEWALK_POISONS
  // Whatever is no element of a tensor must not even be read.
  const bool poisons = memory_.device().device_type == kDLCPU;
  for (const auto& buffer : buffers_) {
    const size_t bytes = buffer->covered.size();
    for (size_t begin = 0; poisons && begin < bytes;) {
      size_t end = begin;
      while (end < bytes && !buffer->covered[end]) ++end;
      if (end > begin) ASAN_POISON_MEMORY_REGION(static_cast<uint8_t*>(buffer->device) + begin, end - begin);
      begin = end;
      while (begin < bytes && buffer->covered[begin]) ++begin;
    }
  }
#endif
  const int code = backward_ ? ropewalk_rope_backward(&args_, &gradients_, memory_.stream())
                             : ropewalk_rope(&args_, memory_.stream());
#ifdef ROPEWALK_POISONS
  for (const auto& buffer : buffers_) {
    if (poisons) ASAN_UNPOISON_MEMORY_REGION(buffer->device, buffer->initial.size());
  }
#endif
  if (code != ROPEWALK_OK) return {static_cast<ropewalk_code>(code), ropewalk_last_error()};
  return memory_.Synchronize();
}

Status CaseCall::Verify(std::string* message, double* worst, int64_t* elements) const {
  message->clear();
  *worst = 0;
  *elements = 0;
  std::vector<std::vector<uint8_t>> now, expected;
  ROPEWALK_TRY(Fetch(&now));
  for (const auto& buffer : buffers_) expected.push_back(buffer->initial);

  // The chain's norm sums and takes the root in a way of its own: a last bit may differ, but seldom. Subnormal numbers
  // have so few bits that their products often lie half-way between two, where the last bit of the root decides;
  // and a short head of mixed ones may have subnormal ones alone.
  const bool tiny = case_.data == Data::kTiny || (case_.data == Data::kMixed && case_.head_dim < 16);
  const bool counts_inexact = !backward_ && case_.norm && case_.rounding == ROPEWALK_ROUND_REFERENCE &&
                              case_.dtype != kF32 && case_.angles != Angles::kFrequencies && !tiny;
  int64_t rotated = 0, inexact = 0;
  const auto tensor_of = [&](const DLTensor* written, size_t* b) -> const Tensor& {
    const auto tensor = std::find_if(tensors_.begin(), tensors_.end(),
                                     [&](const auto& candidate) { return &candidate->on_host == written; });
    *b = 0;
    while (buffers_[*b].get() != (*tensor)->buffer) ++*b;
    return **tensor;
  };
  const auto check_row = [&](const ExpectedRow& row) {
    const DLTensor* written = Written(row.output);
    size_t b = 0;
    const Tensor& tensor = tensor_of(written, &b);
    const uint32_t dtype = DtypeOf(written->dtype);
    const int64_t item = written->dtype.bits / 8;
    const int64_t first = tensor.first + RowOffset(*written, row.outer, row.token, row.head) * item;
    for (size_t i = 0; i < row.elements.size(); ++i) {
      const Expected& want = row.elements[i];
      if (want.want == Expected::Want::kSame) continue;
      const auto at = static_cast<size_t>(first + static_cast<int64_t>(i) * item);
      const uint8_t* got_bytes = now[b].data() + at;
      std::memcpy(expected[b].data() + at, got_bytes, static_cast<size_t>(item));
      ++*elements;
      const double got = LoadNumber(dtype, got_bytes);
      bool right = false;
      switch (want.want) {
        case Expected::Want::kSame: break;
        case Expected::Want::kBits: right = std::memcmp(got_bytes, &want.bits, static_cast<size_t>(item)) == 0; break;
        case Expected::Want::kNan: right = std::isnan(got); break;
        case Expected::Want::kRange: {
          right = got >= want.low && got <= want.high;
          const double tolerance = std::max(want.high - want.value, want.value - want.low);
          if (tolerance > 0 && std::isfinite(tolerance)) {
            *worst = std::max(*worst, std::abs(got - want.value) / tolerance);
          }
          rotated += row.output == RopeOutput::kQ || row.output == RopeOutput::kK;
          inexact += (row.output == RopeOutput::kQ || row.output == RopeOutput::kK) && got != want.value;
          break;
        }
      }
      if (right || !message->empty()) continue;
      *message = Text(tensor.name, "[");
      if (written->ndim == 4) Append(message, Text(row.outer, ", "));
      Append(message,
             Text(row.token, ", ", row.head, ", ", i, "]: got ", got, " (", Number(got_bytes, item), "), want "));
      switch (want.want) {
        case Expected::Want::kBits:
          Append(message, Text("the bits ", Number(reinterpret_cast<const uint8_t*>(&want.bits), item), ", a copy"));
          break;
        case Expected::Want::kNan: Append(message, "NaN"); break;
        default: Append(message, Text(want.value, " (", want.low, " to ", want.high, ")"));
      }
    }
  };
  // Sums: errors are fractions of the magnitudes of what was added up.
  const auto check_sums = [&](const DLTensor* written, const ReferenceWeightGrad& grad) {
    if (!written) return;
    size_t b = 0;
    const Tensor& tensor = tensor_of(written, &b);
    for (size_t i = 0; i < grad.value.size(); ++i) {
      const auto at = static_cast<size_t>(tensor.first) + 4 * i;
      std::memcpy(expected[b].data() + at, now[b].data() + at, 4);
      ++*elements;
      const double got = LoadNumber(kF32, now[b].data() + at), want = grad.value[i];
      const double tolerance = 0x1p-20 * grad.magnitude[i] + 0x1p-140;
      if (std::isfinite(want)) *worst = std::max(*worst, std::abs(got - want) / tolerance);
      const bool right = std::isfinite(want) ? std::abs(got - want) <= tolerance + 0x1p-25 * std::abs(want)
                                             : std::isnan(got) || std::isnan(want) || got == want;
      if (right || !message->empty()) continue;
      *message = Text(tensor.name, "[", i, "]: got ", got, ", want ", want, " within ", tolerance);
    }
  };
  ReferenceFault fault;
  if (backward_) {
    ReferenceWeightGrad q_weight, k_weight;
    fault = RopeBackwardReference(host_args_, host_gradients_, check_row, &q_weight, &k_weight);
    check_sums(host_gradients_.q_weight_grad, q_weight);
    check_sums(host_gradients_.k_weight_grad, k_weight);
    if (host_gradients_.workspace) {
      size_t b = 0;
      const Tensor& tensor = tensor_of(host_gradients_.workspace, &b);
      const auto bytes = static_cast<size_t>(4 * tensor.shape[0]);
      std::memcpy(expected[b].data() + tensor.first, now[b].data() + tensor.first, bytes);
    }
  } else {
    fault = RopeReference(host_args_, check_row);
  }
  expected_fault_.clear();
  if (fault.token >= 0) {
    const std::string where =
        case_.batch > 1 ? Text(fault.token / case_.tokens, ", ", fault.token % case_.tokens) : Text(fault.token);
    expected_fault_ = fault.kind == kRopeFaultAxis       ? Text("axes[")
                      : fault.kind == kRopeFaultPosition ? Text("positions[", where, "]")
                                                         : Text("slots[", where, "]");
  }
  if (!message->empty()) return {};
  if (counts_inexact && inexact > 2 + rotated / 1000) {
    *message = Text(inexact, " of ", rotated, " elements differ from the chain's last bit, more than 0.1 %");
    return {};
  }
  *message = Compare(expected, now);
  return {};
}

Status CaseCall::VerifyUntouched(std::string* message) const {
  std::vector<std::vector<uint8_t>> now, expected;
  ROPEWALK_TRY(Fetch(&now));
  for (const auto& buffer : buffers_) expected.push_back(buffer->initial);
  *message = Compare(expected, now);
  return {};
}

Status CaseCall::Fetch(std::vector<std::vector<uint8_t>>* bytes) const {
  for (const auto& buffer : buffers_) {
    bytes->emplace_back(buffer->initial.size());
    ROPEWALK_TRY(memory_.CopyOut(bytes->back().data(), buffer->device, bytes->back().size()));
  }
  return {};
}

std::string CaseCall::Compare(const std::vector<std::vector<uint8_t>>& expected,
                              const std::vector<std::vector<uint8_t>>& now) const {
  for (size_t b = 0; b < buffers_.size(); ++b) {
    if (expected[b] == now[b]) continue;  // by memcmp
    const auto [want, got] = std::mismatch(expected[b].begin(), expected[b].end(), now[b].begin());
    return Text("memory of ", buffers_[b]->name, ": byte ", (want - expected[b].begin()) - kGuardBytes, " of ",
                static_cast<int64_t>(now[b].size()) - 2 * kGuardBytes, " must not change, but did, from ",
                Number(&*want, 1), " to ", Number(&*got, 1));
  }
  return "";
}

int64_t CaseCall::rotated_elements() const {
  return std::max<int64_t>(case_.batch, 1) * case_.tokens * (case_.q_heads + case_.k_heads) * case_.rotary_dim;
}

int64_t CaseCall::bytes_moved() const {
  const int64_t tokens = std::max<int64_t>(case_.batch, 1) * case_.tokens;
  const int64_t item = DtypeBytes(case_.dtype), cache_item = DtypeBytes(case_.cache_dtype);
  // Without a norm and in place, only the rotated part is touched.
  const bool whole = case_.norm || case_.out_of_place;
  const int64_t dim = whole ? case_.head_dim : case_.rotary_dim;
  int64_t bytes = 2 * tokens * (case_.q_heads + case_.k_heads) * dim * item;
  if (args_.k_cache) bytes += tokens * case_.k_heads * (case_.head_dim * cache_item + (case_.head_dim - dim) * item);
  if (args_.k_store_only) bytes -= tokens * case_.k_heads * dim * item;
  if (args_.v_cache) bytes += tokens * case_.k_heads * case_.v_dim * (item + cache_item);
  if (args_.positions) bytes += tokens * DtypeBytes(case_.positions_dtype);
  if (args_.slots) bytes += tokens * DtypeBytes(case_.slots_dtype);
  if (case_.angles != Angles::kFrequencies) bytes += tokens * case_.rotary_dim * DtypeBytes(case_.table_dtype);
  return bytes;
}

}  // namespace ropewalk
