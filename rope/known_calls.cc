// SPDX-License-Identifier: Apache-2.0
#include "rope/known_calls.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "base/overlap.h"
#include "rope/call.h"

namespace ropewalk {
namespace {

using Known = KnownCalls::Known;

// Numbers for RopeCall::shape; 0 is none.
std::atomic<uint64_t> next_shape{1};

using Words = std::array<uint64_t, Known::kWords>;

// Everything that is an argument by itself, and no tensor more or less than before.
bool SameArguments(const Known& known, const ropewalk_rope_args& args) {
  const auto words = std::bit_cast<Words>(args);
  uint64_t difference = 0;
  for (size_t i = 0; i < words.size(); ++i) difference |= (words[i] & known.mask[i]) ^ known.words[i];
  return difference == 0;
}

uintptr_t AddressOf(const DLTensor& tensor) { return reinterpret_cast<uintptr_t>(DataOf(tensor)); }

Known::Tensor Describe(const Arg& arg, const DLTensor& tensor) {
  Known::Tensor t{};
  t.offset = static_cast<uint16_t>(arg.offset);
  t.strided = tensor.strides != nullptr;
  t.written = arg.intent != Intent::kIn;
  t.device = tensor.device;
  t.ndim = tensor.ndim;
  t.dtype = tensor.dtype;
  for (int i = 0; i < tensor.ndim; ++i) {
    t.shape[i] = tensor.shape[i];
    t.strides[i] = t.strided ? tensor.strides[i] : 0;
  }
  const Footprint footprint = FootprintOf(tensor);
  t.empty = footprint.empty();
  t.address = AddressOf(tensor);
  t.begin = static_cast<int64_t>(footprint.base - t.address);
  t.end = static_cast<int64_t>(footprint.end() - t.address);
  t.is_value = IsHostValue(arg, tensor);
  if (t.is_value) t.value = *static_cast<const float*>(DataOf(tensor));
  t.is_scales = HoldsHostScales(arg, tensor) && !t.is_value;
  return t;
}

// All but the address.
bool SameForm(const Known::Tensor& known, const DLTensor& tensor) {
  static_assert(offsetof(DLTensor, dtype) + sizeof(DLDataType) - offsetof(DLTensor, device) == 16);
  static_assert(offsetof(Known::Tensor, dtype) + sizeof(DLDataType) - offsetof(Known::Tensor, device) == 16);
  if (std::memcmp(&known.device, &tensor.device, 16) != 0 || known.strided != (tensor.strides != nullptr)) return false;
  if (known.ndim > 0 && !tensor.shape) return false;
  for (int i = 0; i < known.ndim; ++i) {
    if (known.shape[i] != tensor.shape[i] || (known.strided && known.strides[i] != tensor.strides[i])) return false;
  }
  return true;
}

// Which of the spans share bytes with that of tensor i.
uint32_t MetBy(int i, int count, const uintptr_t* begin, const uintptr_t* end) {
  uint32_t met = 0;
  for (int j = 0; j < count; ++j) met |= (begin[i] < end[j] && begin[j] < end[i] ? 1u : 0u) << j;
  return met;
}

bool Matches(const Known& known, const ropewalk_rope_args& args) {
  uintptr_t begin[Known::kMostTensors], end[Known::kMostTensors];
  intptr_t moved[Known::kMostTensors];
  if (!SameArguments(known, args)) return false;
  if (args.frequencies && args.frequencies->id != known.frequencies_id) return false;
  const int count = known.count;
  for (int i = 0; i < count; ++i) {
    const Known::Tensor& t = known.tensors[i];
    const DLTensor* tensor;
    std::memcpy(&tensor, reinterpret_cast<const char*>(&args) + t.offset, sizeof(tensor));
    if (!tensor || !SameForm(t, *tensor)) return false;
    const uintptr_t address = AddressOf(*tensor);
    if ((address ^ t.address) % kAddressClass != 0 || (!tensor->data && !t.empty)) return false;
    if (t.is_value && std::memcmp(DataOf(*tensor), &t.value, sizeof(float)) != 0) return false;
    if (t.is_scales && FirstBadScale(*tensor) >= 0) return false;  // for lowering to refuse
    begin[i] = address + static_cast<uintptr_t>(t.begin);
    end[i] = address + static_cast<uintptr_t>(t.end);
    moved[i] = static_cast<intptr_t>(address - t.address);
  }
  // What is written must meet what it met before, and in the same way.
  for (int i = 0; i < count; ++i) {
    const Known::Tensor& t = known.tensors[i];
    if (!t.written) continue;
    if (MetBy(i, count, begin, end) != t.entangled) return false;
    for (uint32_t met = t.entangled; met; met &= met - 1) {
      if (moved[std::countr_zero(met)] != moved[i]) return false;
    }
  }
  return true;
}

}  // namespace

Known* KnownCalls::Find(const ropewalk_rope_args& args, void* stream) {
  if (args.sycl_queue && stream) return nullptr;  // refused
  for (unsigned i = 0; i < kMost; ++i) {
    const unsigned place = (last_ + i) % kMost;
    Known& known = known_[place];
    if (known.call.shape == 0 || known.in_use || !Matches(known, args)) continue;
    last_ = place;
    known.call.stream = stream;
    known.call.frequencies = args.frequencies;
    SetTensors(args, &known.call);
    return &known;
  }
  return nullptr;
}

Known* KnownCalls::Remember(const ropewalk_rope_args& args, const RopeCall& call) {
  unsigned place = (last_ + 1) % kMost;  // the one that was not used for longest, if they take turns
  while (known_[place].in_use && place != last_) place = (place + 1) % kMost;
  Known& known = known_[place];
  if (known.in_use) return nullptr;
  last_ = place;
  known.call = call;
  known.words = std::bit_cast<Words>(args);
  known.mask.fill(~uint64_t{0});
  known.frequencies_id = args.frequencies ? args.frequencies->id : 0;
  known.count = 0;
  uintptr_t begin[Known::kMostTensors], end[Known::kMostTensors];
  for (const Arg& arg : RopeDescription()) {
    const DLTensor* tensor = arg.kind == Kind::kTensor ? TensorOf(arg, &args) : nullptr;
    if (!tensor) continue;
    const size_t word = arg.offset / sizeof(uint64_t);
    known.words[word] = known.mask[word] = 0;
    const Known::Tensor& t = known.tensors[known.count] = Describe(arg, *tensor);
    begin[known.count] = t.address + static_cast<uintptr_t>(t.begin);
    end[known.count] = t.address + static_cast<uintptr_t>(t.end);
    ++known.count;
  }
  for (int i = 0; i < known.count; ++i) known.tensors[i].entangled = MetBy(i, known.count, begin, end);
  known.call.shape = next_shape.fetch_add(1, std::memory_order_relaxed);
  return &known;
}

}  // namespace ropewalk
