// The Python module over tvm-ffi: one function for each of the C API. The operation's arguments are filled by a loop
// over its description, so that a new argument needs nothing here. Errors become ValueError (the caller's) or
// RuntimeError.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "base/fork.h"
#include "base/text.h"
#include "bindings/python/torch_library.h"
#include "frequencies/frequencies.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace {

using ropewalk::Arg;
using ropewalk::Kind;

// Without a backtrace, which tvm-ffi would take in SetRaisedFromCStr: the process's first one reads the symbols of
// every library (380 ms and 23 MB), and a refusal is of what the caller gave.
int Raise(const char* kind, const std::string& text) {
  const std::string valid = ropewalk::ValidUtf8(text);
  const TVMFFIByteArray kind_bytes{kind, std::strlen(kind)}, message{valid.data(), valid.size()}, no_backtrace{"", 0};
  TVMFFIObjectHandle error = nullptr;
  if (TVMFFIErrorCreate(&kind_bytes, &message, &no_backtrace, &error) != 0) return -1;
  TVMFFIErrorSetRaised(error);
  TVMFFIObjectDecRef(error);
  return -1;
}

int Raise(int code) {
  if (code == ROPEWALK_OK) return 0;
  return Raise(code == ROPEWALK_INVALID_ARGUMENT ? "ValueError" : "RuntimeError", ropewalk_last_error());
}

// ---- values out -----------------------------------------------------------------------------------------------------

int Return(TVMFFIAny* result, int64_t value, int32_t type_index = kTVMFFIInt) {
  *result = {};
  result->type_index = type_index;
  result->v_int64 = value;
  return 0;
}

int ReturnText(TVMFFIAny* result, const char* text) {
  if (!text) return Raise(ROPEWALK_INVALID_ARGUMENT);
  const TVMFFIByteArray bytes{text, std::strlen(text)};
  return TVMFFIStringFromByteArray(&bytes, result);
}

int ReturnBytes(TVMFFIAny* result, const void* data, size_t size) {
  if (!data) return Return(result, 0, kTVMFFINone);
  const TVMFFIByteArray bytes{static_cast<const char*>(data), size};
  return TVMFFIBytesFromByteArray(&bytes, result);
}

// ---- values in; false: of another type ------------------------------------------------------------------------------

bool IsInt(const TVMFFIAny& value) { return value.type_index == kTVMFFIInt || value.type_index == kTVMFFIBool; }
bool IsNone(const TVMFFIAny& value) { return value.type_index == kTVMFFINone; }

bool GetDouble(const TVMFFIAny& value, double* out) {
  if (value.type_index == kTVMFFIFloat) return *out = value.v_float64, true;
  if (IsInt(value)) return *out = static_cast<double>(value.v_int64), true;
  return false;
}

// The one way in for ints, called `name` in messages. 0, or -1 with the error raised: another type, among them Python's
// ints beyond 64 bits, or one outside [low, high].
int GetInt(const std::string& name, const TVMFFIAny& value, int64_t low, int64_t high, int64_t* out) {
  if (!IsInt(value)) return Raise("TypeError", name + " must be an int of at most 64 bits");
  *out = value.v_int64;
  if (*out >= low && *out <= high) return 0;
  return Raise("ValueError", ropewalk::Text(name, " must be from ", low, " to ", high, ", but is ", *out));
}
int GetInt(const char* name, const TVMFFIAny& value, int64_t* out) {
  return GetInt(name, value, INT64_MIN, INT64_MAX, out);
}
int GetDouble(const char* name, const TVMFFIAny& value, double* out) {
  return GetDouble(value, out) ? 0 : Raise("TypeError", std::string(name) + " must be a number");
}

bool GetTensor(const TVMFFIAny& value, DLTensor** out) {
  if (value.type_index == kTVMFFITensor) return *out = TVMFFITensorGetDLTensorPtr(value.v_obj), true;
  if (value.type_index == kTVMFFIDLTensorPtr) return *out = static_cast<DLTensor*>(value.v_ptr), true;
  return false;
}

// Text or bytes; they live as long as `value`.
bool GetBytes(const TVMFFIAny& value, std::string_view* out) {
  if (value.type_index == kTVMFFISmallStr || value.type_index == kTVMFFISmallBytes) {
    return *out = {value.v_bytes, value.small_str_len}, true;
  }
  if (value.type_index != kTVMFFIStr && value.type_index != kTVMFFIBytes) return false;
  const TVMFFIByteArray* bytes = TVMFFIBytesGetByteArrayPtr(value.v_obj);
  return *out = {bytes->data, bytes->size}, true;
}

// ---- the operation --------------------------------------------------------------------------------------------------

// Python's function from the index of an Intel GPU to the address of its current SYCL queue.
TVMFFIObjectHandle find_sycl_queue = nullptr;

int FindSyclQueue(int32_t device, void** queue) {
  if (!find_sycl_queue) return 0;
  TVMFFIAny argument{}, result{};
  argument.type_index = kTVMFFIInt;
  argument.v_int64 = device;
  result.type_index = kTVMFFINone;
  if (const int error = TVMFFIFunctionCall(find_sycl_queue, &argument, 1, &result)) return error;
  if (IsInt(result)) *queue = reinterpret_cast<void*>(result.v_int64);
  return 0;
}

// A scale given as a Python number: a tensor of no dimensions, on the host.
struct HostScalar {
  DLTensor tensor = {};
  float value = 0.0f;
};

struct RopeArgs {
  ropewalk::RopeBackwardArgs all;  // of a call, and of its gradient
  ropewalk_rope_args& args = all.rope;
  std::array<HostScalar, ropewalk::kMostHostScalars> scalars;
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
          if (!(arg.flags & ropewalk::kHostScalar) || !GetDouble(value, &number)) return false;
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
  int Fill(const TVMFFIAny* values, int32_t count, std::span<const Arg> table = ropewalk::RopeDescription()) {
    static_assert(offsetof(ropewalk::RopeBackwardArgs, rope) == 0, "descriptions count from the same place");
    if (count > static_cast<int32_t>(table.size())) return Raise("TypeError", "rope: too many arguments");
    for (int32_t i = 0; i < count; ++i) {
      if (IsNone(values[i])) continue;
      const Arg& arg = table[static_cast<size_t>(i)];
      if (IsInt(values[i]) && arg.kind != Kind::kHandle && arg.kind != Kind::kQueue) {
        int64_t number;
        if (GetInt(std::string("rope: ") + arg.name, values[i], INT32_MIN, INT32_MAX, &number)) return -1;
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
    const int32_t device = first ? ropewalk::DeviceType(first->device) : kDLCPU;
    if (device == ropewalk::kDlOneApi) {
      if (!args.sycl_queue) return FindSyclQueue(first->device.device_id, &args.sycl_queue);
    } else if (device != kDLCPU) {
      stream = TVMFFIEnvGetStream(device, first->device.device_id);
    }
    return 0;
  }
};

// ---- frequencies ----------------------------------------------------------------------------------------------------

// Null for anything but an address.
ropewalk_frequencies* Handle(const TVMFFIAny& value) {
  return IsInt(value) ? reinterpret_cast<ropewalk_frequencies*>(value.v_int64) : nullptr;
}
size_t Pairs(const TVMFFIAny& value) { return static_cast<size_t>(ropewalk_frequencies_rotary_dim(Handle(value)) / 2); }

int ReturnFrequencies(TVMFFIAny* result, int code, const ropewalk_frequencies* frequencies) {
  if (code != ROPEWALK_OK) return Raise(code);
  return Return(result, reinterpret_cast<int64_t>(frequencies));
}

// A text with a zero at its end, called `name` in messages, or null for None. 0, or -1 with the error raised: another
// type, or a zero inside, behind which nothing would be read.
struct OptionalText {
  std::string storage;
  const char* text = nullptr;

  int Get(const char* name, const TVMFFIAny& value) {
    if (IsNone(value)) return 0;
    std::string_view given;
    if (!GetBytes(value, &given)) return Raise("TypeError", ropewalk::Text(name, " must be a str or None"));
    if (given.find('\0') != std::string_view::npos)
      return Raise("ValueError", ropewalk::Text(name, " must not hold a zero byte, but has one at ", given.find('\0')));
    storage = given;
    text = storage.c_str();
    return 0;
  }
};

// How many calls are in the functions below.
std::atomic<int64_t> in_flight_count{0};
// A child of fork() makes none of its parent's.
const ropewalk::OnFork kForgetCalls([] { in_flight_count.store(0); });
struct InFlight {
  InFlight() { in_flight_count.fetch_add(1, std::memory_order_relaxed); }
  ~InFlight() { in_flight_count.fetch_sub(1, std::memory_order_relaxed); }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;
};

}  // namespace

// Exports Python's function `name` with at least `needed` arguments, whose types the package has seen to.
#define EXPORT(name, needed)                                                                                          \
  static int name(const TVMFFIAny* args, int32_t count, TVMFFIAny* result);                                           \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t count, \
                                                                         TVMFFIAny* result) {                         \
    const InFlight in_flight;                                                                                         \
    if (count < (needed)) return Raise("TypeError", #name " needs " #needed " arguments");                            \
    return name(args, count, result);                                                                                 \
  }                                                                                                                   \
  static int name([[maybe_unused]] const TVMFFIAny* args, [[maybe_unused]] int32_t count,                             \
                  [[maybe_unused]] TVMFFIAny* result)

EXPORT(rope, 1) {
  RopeArgs rope_args{};
  if (const int error = rope_args.Fill(args, count)) return error;
  return Raise(ropewalk_rope(&rope_args.args, rope_args.stream));
}
// As rope, but a TypeError, and nothing written, where that would go past somebody who watches torch's operators.
EXPORT(rope_unwatched, 1) {
  if (ropewalk::SomebodyWatchesTorch()) return Raise("TypeError", "rope: torch's operators are watched");
  return rope(args, count, result);
}
// (keys..): torch's dispatch keys that are included in a thread where somebody watches. Whether torch can be asked.
EXPORT(set_watching_keys, 4) {
  std::array<uint16_t, 4> keys;
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<uint16_t>(args[i].v_int64);
  return Return(result, ropewalk::WatchTorch(keys), kTVMFFIBool);
}
// The gradient's own arguments, then those of the call.
EXPORT(rope_backward, 1) {
  RopeArgs rope_args{};
  if (const int error = rope_args.Fill(args, count, ropewalk::RopeBackwardDescription())) return error;
  return Raise(ropewalk_rope_backward(&rope_args.args, &rope_args.all.gradients, rope_args.stream));
}
EXPORT(rope_backward_workspace, 1) {
  RopeArgs rope_args{};
  if (const int error = rope_args.Fill(args, count, ropewalk::RopeBackwardDescription())) return error;
  const int64_t needed = ropewalk_rope_backward_workspace(&rope_args.args, &rope_args.all.gradients);
  return needed < 0 ? Raise(static_cast<int>(-needed)) : Return(result, needed);
}
EXPORT(backward_description, 0) {
  const auto own = ropewalk::RopeBackwardDescription().first(ropewalk::kRopeGradients);
  return ReturnText(result, ropewalk::DescriptionJson(own).c_str());
}
EXPORT(prepare, 1) {
  RopeArgs rope_args{};
  if (const int error = rope_args.Fill(args, count)) return error;
  return Raise(ropewalk_prepare(&rope_args.args));
}
EXPORT(explain, 1) {
  RopeArgs rope_args{};
  if (const int error = rope_args.Fill(args, count)) return error;
  return ReturnText(result, ropewalk_explain(&rope_args.args));
}
EXPORT(check_faults, 0) { return Raise(ropewalk_check_faults()); }
EXPORT(backends, 0) { return ReturnText(result, ropewalk_backends()); }
EXPORT(counters, 0) { return ReturnText(result, ropewalk_counters()); }
EXPORT(calls_in_flight, 0) { return Return(result, in_flight_count.load()); }
EXPORT(version, 0) { return ReturnText(result, ropewalk_version()); }
EXPORT(description, 0) { return ReturnText(result, ropewalk_description()); }
EXPORT(torch_schema, 0) { return ReturnText(result, ropewalk_torch_schema()); }
EXPORT(use_torch_threads, 0) { return Return(result, ropewalk::UseTorchThreads(), kTVMFFIBool); }
EXPORT(set_threads, 1) {
  int64_t threads;
  if (GetInt("set_threads: threads", args[0], INT32_MIN, INT32_MAX, &threads)) return -1;
  return Raise(ropewalk_set_threads(static_cast<int32_t>(threads)));
}
// (function): what finds the queue of calls on Intel GPUs that name none.
EXPORT(set_find_sycl_queue, 1) {
  if (args[0].type_index != kTVMFFIFunction) return Raise("TypeError", "set_find_sycl_queue: needs a function");
  TVMFFIObjectIncRef(args[0].v_obj);
  if (find_sycl_queue) TVMFFIObjectDecRef(find_sycl_queue);
  find_sycl_queue = args[0].v_obj;
  return 0;
}
EXPORT(default_threads, 0) { return Raise(ropewalk_set_parallel_for(nullptr, nullptr)); }
EXPORT(force_backend, 1) {
  OptionalText name;
  if (name.Get("force_backend: name", args[0])) return -1;
  return Raise(ropewalk_force_backend(name.text));
}
// (tensor, code, bits): says what the elements of a tensor are, where the array's own DLPack cannot.
EXPORT(set_dtype, 3) {
  DLTensor* tensor = nullptr;
  if (!GetTensor(args[0], &tensor)) return Raise("TypeError", "set_dtype: needs a tensor");
  int64_t code, bits;
  if (GetInt("set_dtype: code", args[1], 0, UINT8_MAX, &code)) return -1;
  if (GetInt("set_dtype: bits", args[2], 0, UINT8_MAX, &bits)) return -1;
  tensor->dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  return 0;
}

EXPORT(frequencies_create, 4) {
  OptionalText scaling;
  ropewalk_frequencies* frequencies = nullptr;
  double theta;
  int64_t rotary_dim, sequence_length;
  if (GetDouble("frequencies: theta", args[0], &theta)) return -1;
  if (GetInt("frequencies: rotary_dim", args[1], &rotary_dim)) return -1;
  if (GetInt("frequencies: sequence_length", args[3], &sequence_length)) return -1;
  if (scaling.Get("frequencies: scaling", args[2])) return -1;
  const int code = ropewalk_frequencies_create(theta, rotary_dim, scaling.text, sequence_length, &frequencies);
  return ReturnFrequencies(result, code, frequencies);
}
// (bytes of an array of Ts, attention scaling, None or bytes of as many int32s).
// `make` gives a code of ropewalk.h, or -1 with the error raised.
template <class T, class Make>
int MakeFrequencies(const TVMFFIAny* args, TVMFFIAny* result, Make make) {
  std::string_view values, axes;
  ropewalk_frequencies* frequencies = nullptr;
  if (!GetBytes(args[0], &values)) return Raise("TypeError", "frequencies: needs bytes");
  double scaling;
  if (GetDouble("frequencies: attention_scaling", args[1], &scaling)) return -1;
  const std::string array(values);  // aligned, as small bytes may not be
  std::string ints;
  if (GetBytes(args[2], &axes)) ints = axes;
  const int code =
      make(reinterpret_cast<const T*>(array.data()), static_cast<int64_t>(array.size() / sizeof(T)), scaling,
           IsNone(args[2]) ? nullptr : reinterpret_cast<const int32_t*>(ints.data()), &frequencies);
  return code < 0 ? code : ReturnFrequencies(result, code, frequencies);
}
EXPORT(frequencies_from_array, 3) { return MakeFrequencies<double>(args, result, ropewalk_frequencies_from_array); }
EXPORT(frequencies_from_turns, 3) {
  return MakeFrequencies<uint64_t>(args, result, [](auto... values) {
    const ropewalk::Status status = ropewalk::FrequenciesFromTurns(values...);
    return status.ok() ? 0 : Raise("ValueError", "frequencies: " + status.text());
  });
}
EXPORT(frequencies_from_config, 4) {
  OptionalText json, name, layer_type;
  ropewalk_frequencies* frequencies = nullptr;
  int64_t sequence_length;
  if (GetInt("frequencies: sequence_length", args[3], &sequence_length)) return -1;
  if (json.Get("frequencies: config", args[0]) || name.Get("frequencies: config's name", args[1]) ||
      layer_type.Get("frequencies: layer_type", args[2]))
    return -1;
  const int code =
      ropewalk_frequencies_from_config(json.text, name.text, layer_type.text, sequence_length, &frequencies);
  return ReturnFrequencies(result, code, frequencies);
}
EXPORT(frequencies_release, 1) { return ropewalk_frequencies_release(Handle(args[0])), 0; }
EXPORT(frequencies_rotary_dim, 1) { return Return(result, ropewalk_frequencies_rotary_dim(Handle(args[0]))); }
EXPORT(frequencies_attention_scaling, 1) {
  Return(result, 0, kTVMFFIFloat);
  result->v_float64 = ropewalk_frequencies_attention_scaling(Handle(args[0]));
  return 0;
}
EXPORT(frequencies_inv_freq, 1) {
  return ReturnBytes(result, ropewalk_frequencies_inv_freq(Handle(args[0])), Pairs(args[0]) * sizeof(double));
}
EXPORT(frequencies_turns, 1) {
  return ReturnBytes(result, Handle(args[0])->turns.data(), Pairs(args[0]) * sizeof(uint64_t));
}
EXPORT(frequencies_axes, 1) {
  return ReturnBytes(result, ropewalk_frequencies_axes(Handle(args[0])), Pairs(args[0]) * sizeof(int32_t));
}
EXPORT(frequencies_warnings, 1) {
  const std::string_view text = ropewalk_frequencies_warnings(Handle(args[0]));
  return ReturnBytes(result, text.data(), text.size());
}
EXPORT(frequencies_table, 3) {
  DLTensor *cos = nullptr, *sin = nullptr;
  if (!GetTensor(args[1], &cos) || !GetTensor(args[2], &sin))
    return Raise("TypeError", "frequencies_table: needs tensors");
  return Raise(ropewalk_frequencies_table(Handle(args[0]), cos, sin));
}
