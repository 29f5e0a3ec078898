// What crosses the Python module's border, in both directions: errors, values, and the operation's arguments, which are
// filled by a loop over its description, so that a new argument needs nothing here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "base/fork.h"
#include "base/text.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk::border {

// Without a backtrace, which tvm-ffi would take in SetRaisedFromCStr: the process's first one reads the symbols of
// every library (380 ms and 23 MB), and a refusal is of what the caller gave.
inline int Raise(const char* kind, const std::string& text) {
  const std::string valid = ValidUtf8(text);
  const TVMFFIByteArray kind_bytes{kind, std::strlen(kind)}, message{valid.data(), valid.size()}, no_backtrace{"", 0};
  TVMFFIObjectHandle error = nullptr;
  if (TVMFFIErrorCreate(&kind_bytes, &message, &no_backtrace, &error) != 0) return -1;
  TVMFFIErrorSetRaised(error);
  TVMFFIObjectDecRef(error);
  return -1;
}

inline int Raise(int code) {
  if (code == ROPEWALK_OK) return 0;
  return Raise(code == ROPEWALK_INVALID_ARGUMENT ? "ValueError" : "RuntimeError", ropewalk_last_error());
}

// ---- values out -----------------------------------------------------------------------------------------------------

inline int Return(TVMFFIAny* result, int64_t value, int32_t type_index = kTVMFFIInt) {
  *result = {};
  result->type_index = type_index;
  result->v_int64 = value;
  return 0;
}

inline int ReturnText(TVMFFIAny* result, const char* text) {
  if (!text) return Raise(ROPEWALK_INVALID_ARGUMENT);
  const TVMFFIByteArray bytes{text, std::strlen(text)};
  return TVMFFIStringFromByteArray(&bytes, result);
}

inline int ReturnBytes(TVMFFIAny* result, const void* data, size_t size) {
  if (!data) return Return(result, 0, kTVMFFINone);
  const TVMFFIByteArray bytes{static_cast<const char*>(data), size};
  return TVMFFIBytesFromByteArray(&bytes, result);
}

// ---- values in; false: of another type ------------------------------------------------------------------------------

inline bool IsInt(const TVMFFIAny& value) { return value.type_index == kTVMFFIInt || value.type_index == kTVMFFIBool; }
inline bool IsNone(const TVMFFIAny& value) { return value.type_index == kTVMFFINone; }

inline bool GetDouble(const TVMFFIAny& value, double* out) {
  if (value.type_index == kTVMFFIFloat) return *out = value.v_float64, true;
  if (IsInt(value)) return *out = static_cast<double>(value.v_int64), true;
  return false;
}

// The one way in for ints, called `name` in messages. 0, or -1 with the error raised: another type, among them Python's
// ints beyond 64 bits, or one outside [low, high].
inline int GetInt(const std::string& name, const TVMFFIAny& value, int64_t low, int64_t high, int64_t* out) {
  if (!IsInt(value)) return Raise("TypeError", name + " must be an int of at most 64 bits");
  *out = value.v_int64;
  if (*out >= low && *out <= high) return 0;
  return Raise("ValueError", Text(name, " must be from ", low, " to ", high, ", but is ", *out));
}
inline int GetInt(const char* name, const TVMFFIAny& value, int64_t* out) {
  return GetInt(name, value, INT64_MIN, INT64_MAX, out);
}
inline int GetDouble(const char* name, const TVMFFIAny& value, double* out) {
  return GetDouble(value, out) ? 0 : Raise("TypeError", std::string(name) + " must be a number");
}

inline bool GetTensor(const TVMFFIAny& value, DLTensor** out) {
  if (value.type_index == kTVMFFITensor) return *out = TVMFFITensorGetDLTensorPtr(value.v_obj), true;
  if (value.type_index == kTVMFFIDLTensorPtr) return *out = static_cast<DLTensor*>(value.v_ptr), true;
  return false;
}

// Text or bytes; they live as long as `value`.
inline bool GetBytes(const TVMFFIAny& value, std::string_view* out) {
  if (value.type_index == kTVMFFISmallStr || value.type_index == kTVMFFISmallBytes) {
    return *out = {value.v_bytes, value.small_str_len}, true;
  }
  if (value.type_index != kTVMFFIStr && value.type_index != kTVMFFIBytes) return false;
  const TVMFFIByteArray* bytes = TVMFFIBytesGetByteArrayPtr(value.v_obj);
  return *out = {bytes->data, bytes->size}, true;
}

// ---- the operation --------------------------------------------------------------------------------------------------

// A function of Python's, kept for ever.
struct Callback {
  TVMFFIObjectHandle function = nullptr;

  int Set(const char* name, const TVMFFIAny& value) {
    if (value.type_index != kTVMFFIFunction) return Raise("TypeError", std::string(name) + ": needs a function");
    TVMFFIObjectIncRef(value.v_obj);
    if (function) TVMFFIObjectDecRef(function);
    function = value.v_obj;
    return 0;
  }
  // An int, or None, which leaves `result` as it is.
  int Ask(TVMFFIAny argument, int64_t* result) const {
    TVMFFIAny given{};
    given.type_index = kTVMFFINone;
    if (const int error = TVMFFIFunctionCall(function, &argument, 1, &given)) return error;
    if (IsInt(given)) *result = given.v_int64;
    return 0;
  }
};

// From the index of an Intel GPU to the address of its current SYCL queue.
inline Callback find_sycl_queue;

inline int FindSyclQueue(int32_t device, void** queue) {
  if (!find_sycl_queue.function) return 0;
  TVMFFIAny argument{};
  argument.type_index = kTVMFFIInt;
  argument.v_int64 = device;
  int64_t address = 0;
  if (const int error = find_sycl_queue.Ask(argument, &address)) return error;
  *queue = reinterpret_cast<void*>(address);
  return 0;
}

// A scale given as a Python number: a tensor of no dimensions, on the host.
struct HostScalar {
  DLTensor tensor = {};
  float value = 0.0f;
};

struct RopeArgs {
  RopeBackwardArgs all;  // of a call, and of its gradient
  ropewalk_rope_args& args = all.rope;
  std::array<HostScalar, kMostHostScalars> scalars;
  size_t scalars_used = 0;
  void* stream = nullptr;

  template <class T>
  void Set(const Arg& arg, T value) {
    std::memcpy(reinterpret_cast<char*>(&all) + arg.offset, &value, sizeof(value));
  }

  bool SetValue(const Arg& arg, const TVMFFIAny& value) {
    double number = 0;
    switch (arg.kind) {
      case Kind::kTensor: {
        DLTensor* tensor = nullptr;
        if (!GetTensor(value, &tensor)) {
          if (!(arg.flags & kHostScalar) || !GetDouble(value, &number)) return false;
          HostScalar& scalar = scalars[scalars_used++];
          scalar.value = static_cast<float>(number);
          scalar.tensor.data = &scalar.value;
          scalar.tensor.device = {kDLCPU, 0};
          scalar.tensor.dtype = {kDLFloat, 32, 1};
          tensor = &scalar.tensor;
        }
        Set(arg, tensor);
        return true;
      }
      case Kind::kHandle:
        if (!IsInt(value)) return false;
        Set(arg, reinterpret_cast<void*>(value.v_int64));
        return true;
      case Kind::kQueue:
        if (!IsInt(value)) return false;
        Set(arg, reinterpret_cast<void*>(value.v_int64));
        return true;
      case Kind::kDouble:
        if (!GetDouble(value, &number)) return false;
        Set(arg, number);
        return true;
      default:
        if (!IsInt(value)) return false;
        Set(arg, static_cast<int32_t>(value.v_int64));
        return true;
    }
  }

  // Positional values in the order of the description; None and what is missing at the end stay at their defaults.
  int Fill(const TVMFFIAny* values, int32_t count, std::span<const Arg> table = RopeDescription()) {
    static_assert(offsetof(RopeBackwardArgs, rope) == 0, "descriptions count from the same place");
    if (count > static_cast<int32_t>(table.size())) return Raise("TypeError", "rope: too many arguments");
    for (int32_t i = 0; i < count; ++i) {
      if (IsNone(values[i])) continue;
      const Arg& arg = table[static_cast<size_t>(i)];
      if (IsInt(values[i]) && arg.kind != Kind::kHandle && arg.kind != Kind::kQueue) {
        int64_t number = values[i].v_int64;
        const bool fits = number >= INT32_MIN && number <= INT32_MAX;  // the name is put together only for a message
        if (!fits) return GetInt(std::string("rope: ") + arg.name, values[i], INT32_MIN, INT32_MAX, &number);
      }
      if (SetValue(arg, values[i])) continue;
      const char* wanted = arg.kind == Kind::kTensor   ? "a tensor with DLPack (torch, numpy, ..)"
                           : arg.kind == Kind::kDouble ? "a number"
                           : arg.kind == Kind::kHandle ? "a ropewalk.Frequencies"
                           : arg.kind == Kind::kQueue  ? "a dpctl.SyclQueue, a torch.xpu.Stream or an address"
                                                       : "an int";
      return Raise("TypeError", std::string("rope: ") + arg.name + " must be " + wanted);
    }
    const DLTensor* first = all.gradients.q_grad ? all.gradients.q_grad : args.q;
    const int32_t device = first ? DeviceType(first->device) : kDLCPU;
    if (device == kDlOneApi) {
      if (!args.sycl_queue) return FindSyclQueue(first->device.device_id, &args.sycl_queue);
    } else if (device != kDLCPU) {
      stream = TVMFFIEnvGetStream(device, first->device.device_id);
    }
    return 0;
  }
};

// ---- calls ----------------------------------------------------------------------------------------------------------

// How many calls are in our functions.
inline std::atomic<int64_t> in_flight_count{0};
// A child of fork() makes none of its parent's.
inline const OnFork kForgetCalls([] { in_flight_count.store(0); });
struct InFlight {
  InFlight() { in_flight_count.fetch_add(1, std::memory_order_relaxed); }
  ~InFlight() { in_flight_count.fetch_sub(1, std::memory_order_relaxed); }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;
};

}  // namespace ropewalk::border
