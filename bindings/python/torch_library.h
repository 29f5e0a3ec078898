// What the Python module has to do with torch's libraries, where Python has loaded them: their threads, whether
// somebody watches their operators, and our own among these.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <ropewalk/ropewalk.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/tensor.h"
#include "base/text.h"
#include "bindings/python/border.h"
#include "rope/arguments.h"
#include "rope/call.h"

namespace ropewalk {

// torch_parallel_for of torch >= 2.10, found in the library that Python has loaded.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                     void* context);
inline TorchParallelFor torch_parallel_for = nullptr;
// OpenMP's threads do not survive fork(), and a parallel region would hang: a child works alone.
inline std::atomic<bool> is_forked_child = false;

inline void ParallelForByTorch(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                               const void* body_context, void*) {
  struct Task {
    void (*body)(int64_t, int64_t, const void*);
    const void* context;
  } task{body, body_context};
  const auto run = [](int64_t first, int64_t last, void* context) {
    const auto* t = static_cast<const Task*>(context);
    t->body(first, last, t->context);
  };
  if (is_forked_child.load(std::memory_order_relaxed) || torch_parallel_for(begin, end, grain, run, &task) != 0) {
    body(begin, end, body_context);
  }
}

inline bool UseTorchThreads() {
  if (torch_parallel_for) return ropewalk_set_parallel_for(ParallelForByTorch, nullptr) == ROPEWALK_OK;
  void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) return false;
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(dlsym(library, "torch_parallel_for"));
  if (!torch_parallel_for) return false;
  pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });
  return ropewalk_set_parallel_for(ParallelForByTorch, nullptr) == ROPEWALK_OK;
}

template <class Function>
bool FindIn(void* library, const std::string& symbol, Function* out) {
  return (*out = reinterpret_cast<Function>(dlsym(library, symbol.c_str()))) != nullptr;
}

using TorchTensor = const void*;  // the address of an at::Tensor, as a reference is, which is that of a c10::TensorImpl

// What eager calls ask torch, and tell autograd: a few instructions each, where Python's own ways take 40 to 90 ns.
// Null: not found, and Python asks itself.
struct TorchQuestions {
  bool (*key_is_included)(uint16_t key) = nullptr;
  bool (*function_mode_is_enabled)() = nullptr;
  bool (*grad_mode_is_enabled)() = nullptr;
  bool (*requires_grad)(const void* impl) = nullptr;
  bool (*is_negated)(TorchTensor) = nullptr;
  bool (*is_inference)(TorchTensor) = nullptr;
  void (*bump_version)(TorchTensor) = nullptr;

  bool Find() {
    void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);  // its symbols are those that it needs, too
    return library &&
           FindIn(library, "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE", &key_is_included) &&
           FindIn(library, "_ZN2at4impl27torch_function_mode_enabledEv", &function_mode_is_enabled) &&
           FindIn(library, "aoti_torch_grad_mode_is_enabled", &grad_mode_is_enabled) &&
           FindIn(library, "_ZNK3c1010TensorImpl13requires_gradEv", &requires_grad) &&
           FindIn(library, "_ZN2at6native6is_negERKNS_6TensorE", &is_negated) &&
           FindIn(library, "_ZN2at6native12is_inferenceERKNS_6TensorE", &is_inference) &&
           (FindIn(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &bump_version) ||
            FindIn(library, "_ZN5torch8autograd4impl12bump_versionERKN2at10TensorBaseE", &bump_version));
  }
};
inline TorchQuestions ask_torch;
inline bool torch_answers = false;
inline std::array<uint16_t, 4> watching_keys{};  // while one of them is included, somebody watches

// Modes, torch.jit.trace and torch.func would not see a call that goes past torch's operators.
inline bool SomebodyWatchesTorch() {
  if (!torch_answers) return false;
  for (const uint16_t key : watching_keys) {
    if (ask_torch.key_is_included(key)) return true;
  }
  return ask_torch.function_mode_is_enabled();
}

// `keys`: torch's dispatch keys that are included in a thread where somebody watches. Whether torch can be asked.
inline bool WatchTorch(const std::array<uint16_t, 4>& keys) {
  watching_keys = keys;
  return torch_answers = ask_torch.Find();
}

// Whether a c10::TensorImpl's memory is what the tensor says, and no gradient goes through it.
inline bool MayBeOverwritten(const void* impl) {
  return !ask_torch.is_negated(&impl) && !(ask_torch.grad_mode_is_enabled() && ask_torch.requires_grad(impl));
}

// Has autograd notice that a tensor was written. Inference tensors have no version, and autograd saves none of them.
inline void WroteTorch(TorchTensor tensor) {
  if (!ask_torch.is_inference(tensor)) ask_torch.bump_version(tensor);
}

// ---- torch.ops.ropewalk.rope_, rope_out and their short forms -------------------------------------------------------
// Python defines them; here is what they do. torch's stable ABI (torch/csrc/stable/c/shim.h) as it was in 2.10, of
// which the functions are found in the library: torch is no more needed to build the module than to use it.

using TorchValue = uint64_t;  // StableIValue
using TorchFunction = void (*)(TorchValue* stack, uint64_t inputs, uint64_t outputs);
inline constexpr uint64_t kTorch210 = (2ull << 56) | (10ull << 48);

// Result, name, arguments. An int is 0, or of an error that torch has printed, so that calls ask for nothing unlikely.
#define ROPEWALK_TORCH_FUNCTIONS(X)                                                                            \
  X(int, aoti_torch_library_init_impl, const char* space, const char* key, const char* file, uint32_t, void**) \
  X(int, torch_library_impl, void* library, const char* name, TorchFunction, uint64_t version)                 \
  X(int, aoti_torch_delete_library_object, void* library)                                                      \
  X(int, aoti_torch_delete_tensor_object, TorchTensor)                                                         \
  X(int, torch_string_length, void* text, size_t*)                                                             \
  X(int, torch_string_c_str, void* text, const char**)                                                         \
  X(int, torch_delete_string, void* text)                                                                      \
  X(int, aoti_torch_is_defined, TorchTensor, bool*)                                                            \
  X(int, aoti_torch_get_layout, TorchTensor, int32_t*)                                                         \
  X(int, aoti_torch_get_dtype, TorchTensor, int32_t*)                                                          \
  X(int, aoti_torch_get_device_type, TorchTensor, int32_t*)                                                    \
  X(int, aoti_torch_get_device_index, TorchTensor, int32_t*)                                                   \
  X(int, aoti_torch_get_dim, TorchTensor, int64_t*)                                                            \
  X(int, aoti_torch_get_sizes, TorchTensor, int64_t**)                                                         \
  X(int, aoti_torch_get_strides, TorchTensor, int64_t**)                                                       \
  X(int, aoti_torch_get_data_ptr, TorchTensor, void**)                                                         \
  X(int32_t, aoti_torch_layout_strided)                                                                        \
  X(size_t, aoti_torch_dtype_element_size, int32_t dtype)

struct TorchFunctions {
#define X(result, name, ...) result (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_TORCH_FUNCTIONS(X)
#undef X
  int (*delete_boxed)(TorchValue*) = nullptr;  // from 2.13 on; before, the memory was the caller's to delete
  int (*current_cuda_stream)(int32_t device, void** stream) = nullptr;
  // torch's own errors, and its own run-time library of C++: a wheel has another one inside, which would not count what
  // flies in this one. The place is c10::SourceLocation.
  struct Place {
    const char *function, *file;
    uint32_t line;
  };
  struct Error {
    void* type = nullptr;
    void** table = nullptr;  // of virtual functions: what it is to be destroyed by is the first
  };
  Error value_error, runtime_error;
  void (*make_error)(void* error, Place place, std::string text) = nullptr;  // c10::Error, which value_error is, too
  void* (*allocate_exception)(size_t size) = nullptr;
  __attribute__((noreturn)) void (*throw_exception)(void* exception, void* type, void (*destroy)(void*)) = nullptr;

  // By torch's numbers, which it is asked for.
  std::array<DLDataType, 128> dtypes{};
  std::array<int32_t, 128> devices{};

  bool Find();

 private:
  bool FindErrors(void* library);
  bool FindNumbers(void* library);
};
inline TorchFunctions torch;

inline bool TorchFunctions::FindErrors(void* library) {
  // A library's symbols are looked for in those that it needs, too.
  const auto find = [&](const std::string& name, Error* out) {
    if (!FindIn(library, "_ZTI" + name, &out->type) || !FindIn(library, "_ZTV" + name, &out->table)) return false;
    out->table += 2;  // past the offset and the type
    return true;
  };
  return find("N3c1010ValueErrorE", &value_error) && find("N3c105ErrorE", &runtime_error) &&
         FindIn(library, "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
                &make_error) &&
         FindIn(library, "__cxa_allocate_exception", &allocate_exception) &&
         FindIn(library, "__cxa_throw", &throw_exception);
}

inline bool TorchFunctions::FindNumbers(void* library) {
  struct Named {
    const char* name;
    uint8_t code, bits;
  };
  constexpr Named kNamed[] = {
      {"float16", kDLFloat, 16},     {"float32", kDLFloat, 32},     {"float64", kDLFloat, 64},
      {"bfloat16", kDLBfloat, 16},   {"float8_e4m3fn", 10, 8},      {"float8_e5m2", 12, 8},
      {"int8", kDLInt, 8},           {"int16", kDLInt, 16},         {"int32", kDLInt, 32},
      {"int64", kDLInt, 64},         {"uint8", kDLUInt, 8},         {"uint16", kDLUInt, 16},
      {"uint32", kDLUInt, 32},       {"uint64", kDLUInt, 64},       {"bool", kDLBool, 8},
      {"complex32", kDLComplex, 32}, {"complex64", kDLComplex, 64}, {"complex128", kDLComplex, 128},
  };
  constexpr std::pair<const char*, int32_t> kDevices[] = {
      {"cpu", kDLCPU}, {"cuda", kDLCUDA}, {"xpu", kDlOneApi}, {"mps", kDLMetal}};
  int32_t (*number)() = nullptr;
  dtypes.fill({UINT8_MAX, 0, 1});
  for (const Named& named : kNamed) {
    if (!FindIn(library, std::string("aoti_torch_dtype_") + named.name, &number)) return false;
    const int32_t index = number();
    if (index < 0 || static_cast<size_t>(index) >= dtypes.size()) return false;
    dtypes[static_cast<size_t>(index)] = {named.code, named.bits, 1};
  }
  devices.fill(kDLExtDev);
  for (const auto& [name, device] : kDevices) {
    if (!FindIn(library, std::string("aoti_torch_device_type_") + name, &number)) return false;
    const int32_t index = number();
    if (index < 0 || static_cast<size_t>(index) >= devices.size()) return false;
    devices[static_cast<size_t>(index)] = device;
  }
  return true;
}

inline bool TorchFunctions::Find() {
  void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  // There CUDA's names stand for AMD's devices.
  if (!library || dlopen("libtorch_hip.so", RTLD_NOW | RTLD_NOLOAD)) return false;
#define X(result, name, ...) \
  if (!FindIn(library, #name, &name)) return false;
  ROPEWALK_TORCH_FUNCTIONS(X)
#undef X
  FindIn(library, "torch_delete_stable_ivalue", &delete_boxed);
  if (void* cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD)) {
    if (!FindIn(cuda, "aoti_torch_get_current_cuda_stream", &current_cuda_stream)) return false;
  }
  return FindErrors(library) && FindNumbers(library);
}

// From what graphs hold of frequencies to the address of the core's object. Python is asked once for each.
inline border::Callback find_frequencies;

// Found without a lock, and kept for ever, as graphs are not known to end.
class KnownFrequencies {
 public:
  // Null: unknown.
  void* Find(std::string_view text) const {
    const Known* known = buckets_[Bucket(text)].load(std::memory_order_acquire);
    while (known && known->text != text) known = known->next;
    return known ? known->handle : nullptr;
  }
  void Add(std::string_view text, void* handle) {  // twice does no harm
    std::atomic<Known*>& first = buckets_[Bucket(text)];
    Known* known = new Known{std::string(text), handle, first.load(std::memory_order_relaxed)};
    while (!first.compare_exchange_weak(known->next, known, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }

 private:
  struct Known {
    std::string text;
    void* handle;
    Known* next;
  };
  static size_t Bucket(std::string_view text) {
    uint64_t hash = text.size();
    const size_t step = text.size() / 16 + 1;  // texts have hundreds of bytes, and differ all over
    for (size_t i = 0; i < text.size(); i += step) hash = (hash ^ static_cast<uint8_t>(text[i])) * 0x100000001b3;
    return (hash ^ hash >> 32) % kBuckets;
  }
  static constexpr size_t kBuckets = 256;
  std::array<std::atomic<Known*>, kBuckets> buckets_{};
};
inline KnownFrequencies known_frequencies;

// Which arguments an operator has: all, the first ones up to `pairing`, or these and the outputs. torch takes 60 ns for
// each that an operator has, given or not.
class TorchPlaces {
 public:
  bool Find() {
    const std::span<const Arg> table = RopeDescription();
    for (size_t i = 0; i < table.size(); ++i) {
      if (std::string_view(table[i].name) == "pairing") first_ = i + 1;
      if (std::string_view(table[i].name) == "q_out") outputs_ = i;
    }
    return first_ && outputs_ >= first_;
  }
  // In the description, of the i-th of `count`.
  size_t operator()(size_t i, size_t count) const {
    return i < first_ || count == RopeDescription().size() ? i : i - first_ + outputs_;
  }

 private:
  size_t first_ = 0, outputs_ = 0;
};
inline TorchPlaces torch_places;

// The arguments of one call, which are ours to give back.
class TorchArguments {
 public:
  static constexpr size_t kMost = 40;

  TorchArguments(const TorchValue* stack, size_t count) : stack_(stack), count_(count) {
    for (size_t i = 0; i < count; ++i) {
      const Arg& arg = ArgAt(i);
      if (arg.kind == Kind::kHandle) text_ = reinterpret_cast<void*>(stack[i]);
      if (arg.kind != Kind::kTensor) continue;
      tensors_[i].tensor = reinterpret_cast<TorchTensor>(stack[i]);
      if (arg.flags & kRequired || !stack[i]) continue;
      auto* boxed = reinterpret_cast<TorchValue*>(stack[i]);  // as what may be None is
      tensors_[i].tensor = reinterpret_cast<TorchTensor>(*boxed);
      if (torch.delete_boxed) {
        torch.delete_boxed(boxed);
      } else {
        delete boxed;
      }
    }
  }
  ~TorchArguments() {
    for (size_t i = 0; i < count_; ++i) {
      if (tensors_[i].tensor) torch.aoti_torch_delete_tensor_object(tensors_[i].tensor);
    }
    if (text_) torch.torch_delete_string(text_);
  }
  TorchArguments(const TorchArguments&) = delete;
  TorchArguments& operator=(const TorchArguments&) = delete;

  // What the module's own functions are given, in the description's order. How many, or -1 with the error raised.
  int32_t Read(std::array<TVMFFIAny, kMost>* values) {
    size_t read = 0;
    for (size_t i = 0; i < count_; ++i) {
      const size_t place = torch_places(i, count_);
      for (; read <= place; ++read) {
        (*values)[read] = {};
        (*values)[read].type_index = kTVMFFINone;
      }
      if (ReadOne(i, &(*values)[place])) return -1;
    }
    return static_cast<int32_t>(read);
  }

  struct Tensor {
    DLTensor view;  // read only where it was filled: 2 KB of zeros else
    TorchTensor tensor = nullptr;
  };

  static int ReadTensor(const char* name, Tensor* out);
  // torch's current stream for q, on CUDA. False: torch does not tell.
  static bool FindStream(const DLTensor& q, void** stream) {
    return DeviceType(q.device) != kDLCUDA ||
           (torch.current_cuda_stream && torch.current_cuda_stream(q.device.device_id, stream) == 0);
  }
  // Has autograd notice what a call wrote, whose tensors are views of the above.
  static void TellOfWritten(const ropewalk_rope_gradients& gradients) {
    Wrote(gradients.q_grad_out ? gradients.q_grad_out : gradients.q_grad);
    Wrote(gradients.k_grad_out ? gradients.k_grad_out : gradients.k_grad);
    Wrote(gradients.q_weight_grad);
    Wrote(gradients.k_weight_grad);
  }
  static void TellOfWritten(const ropewalk_rope_args& args) {
    Wrote(args.q_out ? args.q_out : args.q);
    if (!args.k_store_only) Wrote(args.k_out ? args.k_out : args.k);
    Wrote(args.k_cache);
    Wrote(args.v_cache);
  }

 private:
  static void Wrote(const DLTensor* written) {
    if (written) WroteTorch(reinterpret_cast<const Tensor*>(written)->tensor);
  }

  const Arg& ArgAt(size_t i) const { return RopeDescription()[torch_places(i, count_)]; }

  int ReadOne(size_t i, TVMFFIAny* out) {
    const Arg& arg = ArgAt(i);
    switch (arg.kind) {
      case Kind::kTensor: {
        bool is_defined = false;
        if (!tensors_[i].tensor || torch.aoti_torch_is_defined(tensors_[i].tensor, &is_defined) || !is_defined)
          return 0;
        out->type_index = kTVMFFIDLTensorPtr;
        out->v_ptr = &tensors_[i].view;
        return ReadTensor(arg.name, &tensors_[i]);
      }
      case Kind::kHandle: return ReadFrequencies(out);
      case Kind::kDouble:
        out->type_index = kTVMFFIFloat;
        std::memcpy(&out->v_float64, &stack_[i], sizeof(double));
        return 0;
      default:
        out->type_index = kTVMFFIInt;
        out->v_int64 = static_cast<int64_t>(stack_[i]);
        return 0;
    }
  }

  int ReadFrequencies(TVMFFIAny* out) {
    size_t size = 0;
    const char* data = nullptr;
    if (torch.torch_string_length(text_, &size) || torch.torch_string_c_str(text_, &data))
      return border::Raise("RuntimeError", "rope: frequencies are no text of torch's");
    if (!size || *data == '#') return 0;  // behind #, by which operators the graph was made
    const std::string_view text(data, size);
    void* handle = known_frequencies.Find(text);
    if (!handle) {
      const TVMFFIByteArray bytes{data, size};
      TVMFFIAny argument{};
      int64_t address = 0;
      if (const int error = TVMFFIStringFromByteArray(&bytes, &argument)) return error;
      const int error = find_frequencies.Ask(argument, &address);
      if (argument.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(argument.v_obj);
      if (error) return error;
      handle = reinterpret_cast<void*>(address);
      known_frequencies.Add(text, handle);
    }
    out->type_index = kTVMFFIInt;
    out->v_int64 = reinterpret_cast<int64_t>(handle);
    return 0;
  }

  const TorchValue* stack_;
  size_t count_;
  std::array<Tensor, kMost> tensors_;
  void* text_ = nullptr;
};

inline int TorchArguments::ReadTensor(const char* name, Tensor* out) {
  DLTensor& view = out->view;
  int32_t layout = 0, dtype = 0, device = 0;
  int64_t dims = 0;
  if (torch.aoti_torch_get_layout(out->tensor, &layout) || layout != torch.aoti_torch_layout_strided())
    return border::Raise("ValueError", Text("rope: ", name, " must be a strided tensor, but has another layout"));
  if (torch.aoti_torch_get_dtype(out->tensor, &dtype) || torch.aoti_torch_get_device_type(out->tensor, &device) ||
      torch.aoti_torch_get_device_index(out->tensor, &view.device.device_id) ||
      torch.aoti_torch_get_dim(out->tensor, &dims) || torch.aoti_torch_get_sizes(out->tensor, &view.shape) ||
      torch.aoti_torch_get_strides(out->tensor, &view.strides) ||
      torch.aoti_torch_get_data_ptr(out->tensor, &view.data))
    return border::Raise("RuntimeError", Text("rope: ", name, " has no memory that torch tells of"));
  view.ndim = static_cast<int32_t>(dims);
  view.byte_offset = 0;
  view.device.device_type = static_cast<DLDeviceType>(torch.devices[static_cast<size_t>(device) % 128]);
  if (view.device.device_id < 0) view.device.device_id = 0;  // torch has no number for the CPU
  view.dtype = torch.dtypes[static_cast<size_t>(dtype) % 128];
  if (!view.dtype.bits) view.dtype.bits = static_cast<uint8_t>(8 * torch.aoti_torch_dtype_element_size(dtype));
  return 0;
}

// 0, or -1 with the error raised.
inline int RopeOfTorch(const TorchValue* stack, size_t inputs) {
  const border::InFlight in_flight;
  TorchArguments arguments(stack, inputs);
  std::array<TVMFFIAny, TorchArguments::kMost> values;
  border::RopeArgs rope{};
  const int32_t count = arguments.Read(&values);
  if (count < 0 || rope.Fill(values.data(), count)) return -1;
  const ropewalk_rope_args& args = rope.args;
  if (args.q && !TorchArguments::FindStream(*args.q, &rope.stream))
    return border::Raise("RuntimeError", "rope: torch does not tell of its current CUDA stream");
  if (const int error = border::Raise(ropewalk_rope(&args, rope.stream))) return error;
  TorchArguments::TellOfWritten(args);
  return 0;
}

// Throws what was raised as torch's error, with all else given back before.
[[noreturn]] inline void ThrowRaised() {
  constexpr size_t kRoom = 512;  // a c10::Error has some 100 bytes
  void* thrown = torch.allocate_exception(kRoom);
  const TorchFunctions::Error* kind = &torch.runtime_error;
  {
    std::string text = "rope: an error without a text";
    TVMFFIObjectHandle raised = nullptr;
    TVMFFIErrorMoveFromRaised(&raised);
    if (raised) {
      const TVMFFIErrorCell* cell = TVMFFIErrorGetCellPtr(raised);
      if (std::string_view(cell->kind.data, cell->kind.size) == "ValueError") kind = &torch.value_error;
      text.assign(cell->message.data, cell->message.size);
      TVMFFIObjectDecRef(raised);
    }
    torch.make_error(thrown, {"rope", "ropewalk", 0}, std::move(text));
    *static_cast<void***>(thrown) = kind->table;  // as the constructor of the derived class does, which adds nothing
  }
  torch.throw_exception(thrown, kind->type, reinterpret_cast<void (*)(void*)>(kind->table[0]));
}

inline void ServeRope(TorchValue* stack, uint64_t inputs, uint64_t) {
  if (RopeOfTorch(stack, inputs) != 0) ThrowRaised();
}

inline void* torch_registration = nullptr;

inline void LeaveTorch() {
  if (torch_registration) torch.aoti_torch_delete_library_object(torch_registration);
  torch_registration = nullptr;
}

// Whether torch's operators that write what they are given, whose schemas are defined, are served from here on.
inline bool ServeTorch() {
  if (torch_registration) return true;
  if (RopeDescription().size() > TorchArguments::kMost || !find_frequencies.function) return false;
  if (!torch_answers || !torch.Find() || !torch_places.Find()) return false;
  constexpr const char* kKey = "CompositeExplicitAutograd";
  if (torch.aoti_torch_library_init_impl("ropewalk", kKey, "ropewalk", 0, &torch_registration) != 0) return false;
  for (const char* name : {"rope_", "rope_out", "rope_short_", "rope_short_out"}) {
    if (torch.torch_library_impl(torch_registration, name, ServeRope, kTorch210) == 0) continue;
    LeaveTorch();
    return false;
  }
  return true;
}

}  // namespace ropewalk
