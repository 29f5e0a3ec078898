// `rope_` and `rope_backward` of torch's tensors, called by Python itself: tvm-ffi takes 1.5 us for such a call's
// arguments, and Python 1.7 to ask what is asked here. Whatever is not plain is left to the way over tvm-ffi, which
// says what is wrong.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>
#include <ropewalk/ropewalk.h>
#include <tvm/ffi/c_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

#include "base/tensor.h"
#include "bindings/python/border.h"
#include "bindings/python/torch_library.h"
#include "rope/call.h"

namespace ropewalk::python {

// Python's stable ABI as it was in 3.10, of which the functions are found in the process: nothing of Python is needed
// to build the module, and one module serves all its versions. Builds without a GIL have another layout.
struct Object {
  intptr_t references;
  const Object* type;
};
struct MethodDefinition {
  const char* name;
  Object* (*function)(Object* self, Object* const* args, intptr_t count);
  int flags;
  const char* doc;
};
inline constexpr int kPositionalArray = 0x80;  // METH_FASTCALL

#define ROPEWALK_PYTHON_FUNCTIONS(X)                                             \
  X(Object*, PyCFunction_NewEx, MethodDefinition*, Object* self, Object* module) \
  X(Object*, PyDict_GetItem, Object* dict, Object* key)                          \
  X(void, PyErr_SetString, Object* type, const char* text)                       \
  X(void, PyErr_Clear)                                                           \
  X(void, PyEval_RestoreThread, void* thread)                                    \
  X(void*, PyEval_SaveThread)                                                    \
  X(double, PyFloat_AsDouble, Object*)                                           \
  X(long long, PyLong_AsLongLong, Object*) /* NOLINT(google-runtime-int): its */ \
  X(void*, PyLong_AsVoidPtr, Object*)                                            \
  X(Object*, PyLong_FromLongLong, long long) /* NOLINT(google-runtime-int) */    \
  X(Object*, PyObject_GetAttr, Object*, Object* name)                            \
  X(Object*, PyTuple_GetItem, Object* tuple, intptr_t)                           \
  X(Object*, PyTuple_Pack, intptr_t count, ...)                                  \
  X(intptr_t, PyTuple_Size, Object* tuple)                                       \
  X(Object*, PyUnicode_InternFromString, const char*)                            \
  X(void, Py_DecRef, Object*)                                                    \
  X(void, Py_IncRef, Object*)

struct Functions {
#define X(result, name, ...) result (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_PYTHON_FUNCTIONS(X)
#undef X
  Object *none = nullptr, *true_ = nullptr, *false_ = nullptr;
  const Object *int_type = nullptr, *float_type = nullptr, *text_type = nullptr;
  Object** runtime_error = nullptr;

  bool Find() {
#define X(result, name, ...) \
  if (!FindIn(RTLD_DEFAULT, #name, &name)) return false;
    ROPEWALK_PYTHON_FUNCTIONS(X)
#undef X
    const auto find = [](const char* name, auto* out) {
      *out = static_cast<std::remove_pointer_t<decltype(out)>>(dlsym(RTLD_DEFAULT, name));
      return *out != nullptr;
    };
    return find("_Py_NoneStruct", &none) && find("_Py_TrueStruct", &true_) && find("_Py_FalseStruct", &false_) &&
           find("PyLong_Type", &int_type) && find("PyFloat_Type", &float_type) && find("PyUnicode_Type", &text_type) &&
           find("PyExc_RuntimeError", &runtime_error);
  }
};
inline Functions py;

// What these are told of Python, kept for ever.
struct Told {
  const Object *tensor = nullptr, *parameter = nullptr, *frequencies = nullptr;  // types
  Object *forward_ad = nullptr, *no_level = nullptr;                     // its names, and its level of no gradient
  Object *cdata = nullptr, *handle = nullptr, *current_level = nullptr;  // names of attributes
  // By argument of the gradient, those of a call behind its own; choices: dicts.
  std::array<Object*, TorchArguments::kMost> defaults{}, choices{};
  // A tensor's c10::TensorImpl is what comes first in its object, as a trial showed; not in every version of torch.
  bool impl_is_first = false;
  bool (*has_storage)(const void* impl) = nullptr;  // false: there is no address to ask for
  // torch before 2.13 prints that nested tensors have no sizes, so that it is not asked for theirs: c10::TensorImpl's
  // table of virtual functions, which only plain tensors have, or else the name of an attribute, 40 to 100 ns each.
  const void* plain_table = nullptr;
  Object* is_nested = nullptr;
  size_t q_out = 0, k_out = 0, k_store_only = 0;  // places among the arguments
};
inline Told told;
// From the end of the process on, calls keep Python's lock: see _module.py.
inline std::atomic<bool> keeps_lock = false;

// Python's lock given away for a while.
class Unlocked {
 public:
  Unlocked() : thread_(keeps_lock ? nullptr : py.PyEval_SaveThread()) {}
  ~Unlocked() {
    if (thread_) py.PyEval_RestoreThread(thread_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  void* thread_;
};

// The address that an attribute holds as an int; null: none.
inline void* AddressOf(Object* object, Object* name) {
  Object* number = py.PyObject_GetAttr(object, name);
  if (!number) return py.PyErr_Clear(), nullptr;
  void* address = number->type == py.int_type ? py.PyLong_AsVoidPtr(number) : nullptr;
  py.Py_DecRef(number);
  return address;
}

// What an object with virtual functions begins with.
inline const void* TableOf(const void* object) { return *static_cast<const void* const*>(object); }

// The c10::TensorImpl of a tensor; null: none.
inline const void* ImplOf(Object* tensor) {
  return told.impl_is_first ? reinterpret_cast<const void* const*>(tensor + 1)[0] : AddressOf(tensor, told.cdata);
}

// The values of a call, as the module's functions over tvm-ffi are given them.
class Values {
 public:
  // As many as the table has, which begins with the `first`-th argument of the gradient. False: the call is none of
  // those that are served here.
  bool Read(Object* const* args, std::span<const Arg> table, size_t first) {
    for (size_t i = 0; i < table.size(); ++i) {
      values_[i] = {};
      values_[i].type_index = kTVMFFINone;
      const bool given = args[i] != told.defaults[first + i] && (args[i] != py.none || table[i].kind == Kind::kChoice);
      if (given && !ReadOne(table[i], i, told.choices[first + i], args[i])) return false;
    }
    return true;
  }
  const TVMFFIAny* data() const { return values_.data(); }

 private:
  bool ReadOne(const Arg& arg, size_t i, Object* choices, Object* value) {
    TVMFFIAny& out = values_[i];
    switch (arg.kind) {
      case Kind::kTensor:
        if (arg.flags & kHostScalar && value->type == py.float_type) return ReadDouble(value, &out);
        out.type_index = kTVMFFIDLTensorPtr;
        out.v_ptr = &tensors_[i].view;
        return ReadTensor(arg.name, value, i);
      case Kind::kDouble: return value->type == py.float_type && ReadDouble(value, &out);
      case Kind::kHandle:
        out.type_index = kTVMFFIInt;
        return value->type == told.frequencies &&
               (out.v_int64 = reinterpret_cast<int64_t>(AddressOf(value, told.handle)));
      case Kind::kBool:
        out.type_index = kTVMFFIInt;
        out.v_int64 = value == py.true_;
        return value == py.true_ || value == py.false_;
      case Kind::kChoice: {
        // Of others Python would run code of the user's, while addresses of tensors are held.
        if (value->type != py.text_type && value != py.none) return false;
        Object* number = py.PyDict_GetItem(choices, value);
        return number && ReadInt(number, &out);
      }
      case Kind::kInt: return value->type == py.int_type && ReadInt(value, &out);
      default: return false;
    }
  }

  static bool ReadDouble(Object* value, TVMFFIAny* out) {
    out->type_index = kTVMFFIFloat;
    out->v_float64 = py.PyFloat_AsDouble(value);
    return true;
  }
  static bool ReadInt(Object* value, TVMFFIAny* out) {
    out->type_index = kTVMFFIInt;
    out->v_int64 = py.PyLong_AsLongLong(value);
    if (out->v_int64 != -1) return true;
    py.PyErr_Clear();  // of one beyond 64 bits; -1 itself is for the other way, too
    return false;
  }

  bool ReadTensor(const char* name, Object* value, size_t i) {
    if (value->type != told.tensor && value->type != told.parameter) return false;
    const void* impl = impls_[i] = ImplOf(value);
    TorchArguments::Tensor& tensor = tensors_[i];
    tensor.tensor = &impls_[i];
    if (!impl || !MayBeOverwritten(impl) || !told.has_storage(impl)) return false;
    if (told.plain_table && TableOf(impl) != told.plain_table) return false;
    if (told.is_nested) {
      Object* nested = py.PyObject_GetAttr(value, told.is_nested);
      if (!nested) return py.PyErr_Clear(), false;
      py.Py_DecRef(nested);
      if (nested != py.false_) return false;
    }
    return TorchArguments::ReadTensor(name, &tensor) == 0;
  }

  std::array<TVMFFIAny, TorchArguments::kMost> values_;
  std::array<TorchArguments::Tensor, TorchArguments::kMost> tensors_;  // read only where they were filled
  std::array<const void*, TorchArguments::kMost> impls_;
};

// None: nothing was written, and another way is to serve.
inline Object* Refuse() {
  TVMFFIObjectHandle raised = nullptr;
  TVMFFIErrorMoveFromRaised(&raised);
  if (raised) TVMFFIObjectDecRef(raised);
  py.PyErr_Clear();
  py.Py_IncRef(py.none);
  return py.none;
}
// What a call that was made ends with: nothing, or an exception, as once more could be once too much.
inline Object* Fail() {
  py.PyErr_SetString(*py.runtime_error, ValidUtf8(ropewalk_last_error()).c_str());
  return nullptr;
}
// Whether these many arguments may be of a call that is served here.
inline bool MayServe(Object* const* args, intptr_t count, size_t all) {
  return static_cast<size_t>(count) == all && !SomebodyWatchesTorch() &&
         (args[0]->type == told.tensor || args[0]->type == told.parameter) &&
         py.PyDict_GetItem(told.forward_ad, told.current_level) == told.no_level;
}

// (all arguments of rope_, by position): what rope_ returns, or None.
inline Object* Rope(Object*, Object* const* args, intptr_t count) {
  const std::span<const Arg> table = RopeDescription();
  Values values;
  if (!MayServe(args, count, table.size()) || !values.Read(args, table, kRopeGradients)) return Refuse();

  border::RopeArgs rope{};
  int code = ROPEWALK_OK;
  {
    const border::InFlight in_flight;
    if (rope.Fill(values.data(), static_cast<int32_t>(table.size())) != 0) return Refuse();
    if (!TorchArguments::FindStream(*rope.args.q, &rope.stream)) return Refuse();
    const Unlocked unlocked;
    code = ropewalk_rope(&rope.args, rope.stream);
  }
  if (code == ROPEWALK_INVALID_ARGUMENT) return Refuse();
  if (code != ROPEWALK_OK) return Fail();
  TorchArguments::TellOfWritten(rope.args);
  Object* q = args[told.q_out] == py.none ? args[0] : args[told.q_out];
  Object* k = args[told.k_out] == py.none ? args[1] : args[told.k_out];
  return py.PyTuple_Pack(2, q, args[told.k_store_only] == py.true_ ? py.none : k);
}

// (all arguments of rope_backward, its workspace among them and then those of a call, by position): True, or how many
// elements the workspace needs that was not given, or None.
inline Object* RopeBackward(Object*, Object* const* args, intptr_t count) {
  const std::span<const Arg> table = RopeBackwardDescription();
  Values values;
  if (!MayServe(args, count, table.size()) || !values.Read(args, table, 0)) return Refuse();

  border::RopeArgs rope{};
  const ropewalk_rope_gradients& gradients = rope.all.gradients;
  int code = ROPEWALK_OK;
  {
    const border::InFlight in_flight;
    if (rope.Fill(values.data(), static_cast<int32_t>(table.size()), table) != 0) return Refuse();
    if (!TorchArguments::FindStream(*gradients.q_grad, &rope.stream)) return Refuse();
    if (!gradients.workspace && (gradients.q_weight_grad || gradients.k_weight_grad)) {
      const int64_t needed = ropewalk_rope_backward_workspace(&rope.args, &gradients);
      if (needed < 0) return Refuse();
      if (needed > 0) return py.PyLong_FromLongLong(needed);
    }
    const Unlocked unlocked;
    code = ropewalk_rope_backward(&rope.args, &gradients, rope.stream);
  }
  if (code == ROPEWALK_INVALID_ARGUMENT) return Refuse();
  if (code != ROPEWALK_OK) return Fail();
  TorchArguments::TellOfWritten(gradients);
  py.Py_IncRef(py.true_);
  return py.true_;
}

// (types of tensors, parameters and Frequencies; torch.autograd.forward_ad's names, and its level where there is none;
// tuples of each argument's default and choices; some tensor): the first function above, or null where it cannot serve.
inline Object* MakeRope(Object* tensor, Object* parameter, Object* frequencies, Object* forward_ad, Object* no_level,
                        Object* defaults, Object* choices, Object* trial) {
  static MethodDefinition definition = {"rope_", Rope, kPositionalArray, nullptr};
  if (!torch_answers || !torch_registration || !py.Find()) return nullptr;
  void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library || !FindIn(library, "_ZNK3c1010TensorImpl11has_storageEv", &told.has_storage)) return nullptr;
  const std::span<const Arg> table = RopeDescription();
  const auto size = static_cast<intptr_t>(table.size());
  // Of more arguments both functions would go to the slow way: kMost is to grow then.
  const bool fits = RopeBackwardDescription().size() <= TorchArguments::kMost && py.PyTuple_Size(defaults) == size &&
                    py.PyTuple_Size(choices) == size;
  if (!fits) return py.PyErr_Clear(), nullptr;
  for (size_t i = 0; i < table.size(); ++i) {
    const std::string_view name = table[i].name;
    if (name == "q_out") told.q_out = i;
    if (name == "k_out") told.k_out = i;
    if (name == "k_store_only") told.k_store_only = i;
    told.defaults[kRopeGradients + i] = py.PyTuple_GetItem(defaults, static_cast<intptr_t>(i));
    Object* of_choice = py.PyTuple_GetItem(choices, static_cast<intptr_t>(i));
    told.choices[kRopeGradients + i] = of_choice == py.none ? nullptr : of_choice;
  }
  told.tensor = tensor;
  told.parameter = parameter;
  told.frequencies = frequencies;
  told.forward_ad = forward_ad;
  told.no_level = no_level;
  told.cdata = py.PyUnicode_InternFromString("_cdata");
  told.handle = py.PyUnicode_InternFromString("_handle");
  told.current_level = py.PyUnicode_InternFromString("_current_level");
  const void* impl = AddressOf(trial, told.cdata);
  told.impl_is_first = impl && reinterpret_cast<const void* const*>(trial + 1)[0] == impl;
  if (!dlsym(library, "torch_exception_get_what")) {
    const void* const* plain = nullptr;  // before its functions: an offset and the type
    if (impl && FindIn(library, "_ZTVN3c1010TensorImplE", &plain) && TableOf(impl) == plain + 2) {
      told.plain_table = plain + 2;
    }
    if (!told.plain_table) told.is_nested = py.PyUnicode_InternFromString("is_nested");
  }
  for (Object* each : {tensor, parameter, frequencies, forward_ad, no_level, defaults, choices}) {
    py.Py_IncRef(each);
  }
  return py.PyCFunction_NewEx(&definition, nullptr, nullptr);
}

// The second one, after the first.
inline Object* MakeRopeBackward() {
  static MethodDefinition definition = {"rope_backward", RopeBackward, kPositionalArray, nullptr};
  return py.PyCFunction_NewEx(&definition, nullptr, nullptr);
}

}  // namespace ropewalk::python
