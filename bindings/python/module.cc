// The Python module over tvm-ffi: one function for each of the C API. Errors become ValueError (the caller's) or
// RuntimeError.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>
#include <tvm/ffi/c_api.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/text.h"
#include "bindings/python/border.h"
#include "bindings/python/direct.h"
#include "bindings/python/torch_library.h"
#include "frequencies/frequencies.h"
#include "rope/backward.h"
#include "rope/call.h"

using namespace ropewalk::border;

namespace {

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
// (addresses of the c10::TensorImpl of q and k where torch's are rotated in place, else 0; what rope takes): as rope,
// but a TypeError, and nothing written, where that would go past autograd or somebody who watches torch's operators.
EXPORT(rope_unwatched, 3) {
  if (ropewalk::SomebodyWatchesTorch()) return Raise("TypeError", "rope: torch's operators are watched");
  const std::array written = {reinterpret_cast<const void*>(args[0].v_int64),
                              reinterpret_cast<const void*>(args[1].v_int64)};
  for (const void* impl : written) {
    if (impl && !ropewalk::MayBeOverwritten(impl)) return Raise("TypeError", "rope: autograd is to see it");
  }
  if (const int error = rope(args + 2, count - 2, result)) return error;
  for (const void* const& impl : written) {
    if (impl) ropewalk::WroteTorch(&impl);
  }
  return 0;
}
// (keys..): torch's dispatch keys that are included in a thread where somebody watches. Whether torch can be asked.
EXPORT(set_watching_keys, 4) {
  std::array<uint16_t, 4> keys;
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<uint16_t>(args[i].v_int64);
  return Return(result, ropewalk::WatchTorch(keys), kTVMFFIBool);
}
// For ctypes.PyDLL, to which a null is a ValueError.
extern "C" __attribute__((visibility("default"))) ropewalk::python::Object* ropewalk_python_rope(
    ropewalk::python::Object* tensor, ropewalk::python::Object* parameter, ropewalk::python::Object* frequencies,
    ropewalk::python::Object* forward_ad, ropewalk::python::Object* no_level, ropewalk::python::Object* defaults,
    ropewalk::python::Object* choices, ropewalk::python::Object* trial) {
  return ropewalk::python::MakeRope(tensor, parameter, frequencies, forward_ad, no_level, defaults, choices, trial);
}
// After the function above gave another one than null.
extern "C" __attribute__((visibility("default"))) ropewalk::python::Object* ropewalk_python_rope_backward() {
  return ropewalk::python::MakeRopeBackward();
}
// Calls keep Python's lock from here on.
EXPORT(keep_lock, 0) { return ropewalk::python::keeps_lock.store(true), 0; }
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
EXPORT(set_find_sycl_queue, 1) { return find_sycl_queue.Set("set_find_sycl_queue", args[0]); }
// (function): from what graphs hold of frequencies to their address, which stays theirs.
EXPORT(set_find_frequencies, 1) { return ropewalk::find_frequencies.Set("set_find_frequencies", args[0]); }
// Whether torch's operators that write, whose schemas are defined, are served by the module from here on.
EXPORT(serve_torch, 0) { return Return(result, ropewalk::ServeTorch(), kTVMFFIBool); }
EXPORT(leave_torch, 0) { return ropewalk::LeaveTorch(), 0; }
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
  double scaling = 0.0;
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
