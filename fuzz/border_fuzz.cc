// Fuzzes the Python module: its functions with values as tvm-ffi hands them over, of the right type or of any other.
// Each call ends well, or with an error of Python's with one sentence; one that is refused has written nothing. Two
// things the package sees to, and so does this: what stands for a Frequencies is one, and arguments that are needed are
// there.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "conformance/case_call.h"
#include "fuzz/bytes.h"
#include "rope/call.h"

using Function = int(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
#define ROPEWALK_FUNCTIONS(X)      \
  X(rope)                          \
  X(prepare)                       \
  X(explain)                       \
  X(check_faults)                  \
  X(counters)                      \
  X(version)                       \
  X(description)                   \
  X(torch_schema)                  \
  X(set_threads)                   \
  X(set_find_sycl_queue)           \
  X(default_threads)               \
  X(force_backend)                 \
  X(set_dtype)                     \
  X(frequencies_create)            \
  X(frequencies_from_array)        \
  X(frequencies_from_config)       \
  X(frequencies_release)           \
  X(frequencies_rotary_dim)        \
  X(frequencies_attention_scaling) \
  X(frequencies_inv_freq)          \
  X(frequencies_axes)              \
  X(frequencies_warnings)          \
  X(frequencies_table)
#define ROPEWALK_DECLARE(name) extern "C" Function __tvm_ffi_##name;
ROPEWALK_FUNCTIONS(ROPEWALK_DECLARE)

namespace ropewalk {
namespace {

void Require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "border_fuzz: %s\n", what.c_str());
  std::abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// Values

// What the values of one call need while it runs.
struct Kept {
  struct Tensor {
    DLTensor tensor;
    int64_t shape[8], strides[8];
    std::vector<uint8_t> memory;
  };
  std::deque<Tensor> tensors;
  std::vector<TVMFFIObjectHandle> objects;
  std::deque<std::string> texts;
  std::deque<TVMFFIByteArray> arrays;

  Kept() = default;
  Kept(const Kept&) = delete;
  ~Kept() {
    for (TVMFFIObjectHandle object : objects) TVMFFIObjectDecRef(object);
  }
};

TVMFFIAny Value(int32_t type_index) {
  TVMFFIAny value{};
  value.type_index = type_index;
  return value;
}
TVMFFIAny Int(int64_t number, int32_t type_index = kTVMFFIInt) {
  TVMFFIAny value = Value(type_index);
  value.v_int64 = number;
  return value;
}
TVMFFIAny Float(double number) {
  TVMFFIAny value = Value(kTVMFFIFloat);
  value.v_float64 = number;
  return value;
}
TVMFFIAny Pointer(int32_t type_index, void* pointer) {
  TVMFFIAny value = Value(type_index);
  value.v_ptr = pointer;
  return value;
}
TVMFFIAny TextOrBytes(Kept* kept, const std::string& text, bool bytes) {
  const TVMFFIByteArray array{text.data(), text.size()};
  TVMFFIAny value = Value(kTVMFFINone);
  Require((bytes ? TVMFFIBytesFromByteArray : TVMFFIStringFromByteArray)(&array, &value) == 0, "no text");
  if (value.type_index >= kTVMFFIStaticObjectBegin) kept->objects.push_back(value.v_obj);
  return value;
}

double Number(Bytes& bytes) {
  constexpr double kNumbers[] = {1e4, 1.0, 0.5, 0.0, -1.0, NAN, HUGE_VAL, -HUGE_VAL, 1e-300, 1e300, 5e-324, 1e-6};
  const uint8_t which = bytes.Next();
  if (which < 200) return kNumbers[which % std::size(kNumbers)];
  int64_t wide = bytes.Wide();
  double number;
  std::memcpy(&number, &wide, sizeof(number));
  return number;
}
int64_t Whole(Bytes& bytes) {
  constexpr int64_t kEdges[] = {0,         1,        2, -1, 64, 8192, INT32_MAX, INT32_MIN, int64_t{INT32_MAX} + 1,
                                INT64_MAX, INT64_MIN};
  const uint8_t which = bytes.Next();
  return which < 128   ? kEdges[static_cast<size_t>(which) % std::size(kEdges)]
         : which < 192 ? static_cast<int8_t>(bytes.Next())
                       : bytes.Wide();
}

// A tensor with memory of its own for each of its elements, of any dtype.
DLTensor* NewTensor(Bytes& bytes, Kept* kept) {
  constexpr DLDataType kTypes[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}, {kDLInt, 64, 1},
                                   {kDLInt, 32, 1},   {10, 8, 1},         {12, 8, 1},        {kDLUInt, 8, 1}};
  Kept::Tensor& made = kept->tensors.emplace_back();
  made.tensor = {};
  made.tensor.device = {bytes.OneIn(16) ? static_cast<DLDeviceType>(bytes.Next() % 20) : kDLCPU, 0};
  made.tensor.dtype = kTypes[bytes.Next() % 8];
  made.tensor.ndim = bytes.Next() % 5;
  size_t count = 1;
  for (int i = 0; i < made.tensor.ndim; ++i) {
    made.shape[i] = bytes.Next() % 10;
    count *= static_cast<size_t>(made.shape[i]);
  }
  int64_t stride = 1;
  for (int i = made.tensor.ndim; i-- > 0;) {
    made.strides[i] = stride;
    stride *= std::max<int64_t>(made.shape[i], 1);
  }
  made.tensor.shape = made.shape;
  if (bytes.OneIn(2)) made.tensor.strides = made.strides;
  made.memory.assign(count * made.tensor.dtype.bits / 8, bytes.Next());
  made.tensor.data = made.memory.data();
  if (bytes.OneIn(32)) made.tensor.dtype = {bytes.Next(), 8, 1};
  return &made.tensor;
}

TVMFFIAny Any(Bytes& bytes, Kept* kept) {
  switch (bytes.Next() % 12) {
    case 0: return Value(kTVMFFINone);
    case 1: return Int(Whole(bytes));
    case 2: return Int(bytes.Next() % 2, kTVMFFIBool);
    case 3: return Float(Number(bytes));
    case 4: return TextOrBytes(kept, bytes.Some(6), bytes.OneIn(2));   // inside the value
    case 5: return TextOrBytes(kept, bytes.Some(80), bytes.OneIn(2));  // an object
    case 6: return Pointer(kTVMFFIDLTensorPtr, NewTensor(bytes, kept));
    case 7: return Pointer(kTVMFFIOpaquePtr, reinterpret_cast<void*>(bytes.Wide()));
    case 8: {
      TVMFFIAny value = Value(kTVMFFIDataType);
      value.v_dtype = {bytes.Next(), bytes.Next(), bytes.Next()};
      return value;
    }
    case 9: {
      TVMFFIAny value = Value(kTVMFFIDevice);
      value.v_device = {kDLCPU, bytes.Next()};
      return value;
    }
    case 10: {
      kept->texts.push_back(bytes.Some(40));
      return Pointer(kTVMFFIRawStr, kept->texts.back().data());
    }
    default: {
      kept->texts.push_back(bytes.Some(40));
      kept->arrays.push_back({kept->texts.back().data(), kept->texts.back().size()});
      return Pointer(kTVMFFIByteArrayPtr, &kept->arrays.back());
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Calls

// True if it succeeded; what it gave in `*result`.
bool Call(const char* name, Function* function, const std::vector<TVMFFIAny>& values, TVMFFIAny* result) {
  *result = Value(kTVMFFINone);
  const int code = function(nullptr, values.data(), static_cast<int32_t>(values.size()), result);
  if (code == 0) return true;
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  Require(code == -1 && error, Text(name, " failed without an error"));
  const TVMFFIErrorCell* cell = TVMFFIErrorGetCellPtr(error);
  const std::string kind(cell->kind.data, cell->kind.size), text(cell->message.data, cell->message.size);
  TVMFFIObjectDecRef(error);
  Require(kind == "ValueError" || kind == "TypeError" || kind == "RuntimeError", Text(name, " raised a ", kind));
  Require(!text.empty() && text.size() < 4000 && ValidUtf8(text) == text, Text(name, ": ", text));
  // At its end: before it, a message may quote what it was given.
  Require(!std::string_view(text).ends_with("bug in Ropewalk"), Text(name, ": ", text));
  return false;
}

// Gives back what a function returned.
void Drop(const TVMFFIAny& result) {
  if (result.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(result.v_obj);
}

// Calls that are good, a few of each kind.
std::vector<std::unique_ptr<CaseCall>>& GoodCalls() {
  static auto* const calls = [] {
    auto* made = new std::vector<std::unique_ptr<CaseCall>>;
    const RopeCase cases[] = {
        {.name = "plain", .dtype = kF32, .tokens = 2, .q_heads = 2, .k_heads = 1, .head_dim = 8},
        {.name = "table", .tokens = 3, .q_heads = 1, .head_dim = 16, .norm = true, .angles = Angles::kTable},
        EveryArgumentCase(Angles::kFrequencies)};
    for (const RopeCase& c : cases) {
      const Status status = CaseCall::Make(c, HostMemory(), &made->emplace_back());
      Require(status.ok(), status.text());
    }
    return made;
  }();
  return *calls;
}

TVMFFIAny Given(const Arg& arg, const ropewalk_rope_args& args) {
  const char* const field = reinterpret_cast<const char*>(&args) + arg.offset;
  const auto read = [&](auto value) {
    std::memcpy(&value, field, sizeof(value));
    return value;
  };
  switch (arg.kind) {
    case Kind::kTensor: {
      auto* tensor = read(static_cast<DLTensor*>(nullptr));
      return tensor ? Pointer(kTVMFFIDLTensorPtr, tensor) : Value(kTVMFFINone);
    }
    case Kind::kHandle: {
      const auto handle = read(int64_t{});
      return handle ? Int(handle) : Value(kTVMFFINone);
    }
    case Kind::kQueue: return Value(kTVMFFINone);
    case Kind::kDouble: return Float(read(double{}));
    default: return Int(read(int32_t{}));
  }
}

void CallRope(Bytes& bytes, const char* name, Function* function) {
  Kept kept;
  CaseCall& good = *GoodCalls()[bytes.Next() % GoodCalls().size()];
  const std::span<const Arg> table = RopeDescription();
  std::vector<TVMFFIAny> values;
  for (const Arg& arg : table) values.push_back(Given(arg, good.args()));
  for (int changes = bytes.Next() % 4; changes >= 0; --changes) {
    const size_t i = bytes.Next() % table.size();
    TVMFFIAny value = Any(bytes, &kept);
    if (bytes.OneIn(8)) value = values[bytes.Next() % values.size()];  // what belongs elsewhere
    if (table[i].kind == Kind::kHandle && (value.type_index == kTVMFFIInt || value.type_index == kTVMFFIBool))
      value = Int(reinterpret_cast<int64_t>(good.frequencies()));
    values[i] = value;
  }
  if (bytes.OneIn(4)) values.resize(bytes.Next() % (values.size() + 1));
  if (bytes.OneIn(16)) values.insert(values.end(), 3, Any(bytes, &kept));
  TVMFFIAny result;
  const bool served = Call(name, function, values, &result);
  Drop(result);
  std::string message;
  if (!served || function != __tvm_ffi_rope) {
    Require(good.VerifyUntouched(&message).ok() && message.empty(), Text(name, " wrote: ", message));
    for (const Kept::Tensor& tensor : kept.tensors) {
      for (const uint8_t byte : tensor.memory)
        Require(byte == tensor.memory[0], Text(name, " wrote into a new tensor"));
    }
  } else {
    Require(good.Reset().ok(), "no reset");
    (void)ropewalk_check_faults();
  }
}

void CallFrequencies(Bytes& bytes) {
  Kept kept;
  TVMFFIAny result;
  std::vector<TVMFFIAny> values;
  const auto one_of = [&](const TVMFFIAny& usual) { values.push_back(bytes.OneIn(3) ? Any(bytes, &kept) : usual); };
  Function* make = __tvm_ffi_frequencies_create;
  switch (bytes.Next() % 3) {
    case 0:
      one_of(Float(Number(bytes)));
      one_of(Int(bytes.Next() % 70));
      one_of(bytes.OneIn(2) ? TextOrBytes(&kept, R"({"rope_type": "linear", "factor": 2.0})", false)
                            : TextOrBytes(&kept, bytes.Some(200), false));
      one_of(Int(Whole(bytes)));
      break;
    case 1: {
      make = __tvm_ffi_frequencies_from_array;
      std::string doubles, ints;
      for (int pairs = bytes.Next() % 8; pairs > 0; --pairs) {
        const double number = Number(bytes);
        const auto axis = static_cast<int32_t>(Whole(bytes));
        doubles.append(reinterpret_cast<const char*>(&number), sizeof(number));
        ints.append(reinterpret_cast<const char*>(&axis), sizeof(axis));
      }
      one_of(TextOrBytes(&kept, doubles, true));
      one_of(Float(Number(bytes)));
      // As many as there are frequencies: the package sees to that.
      values.push_back(bytes.OneIn(2) && values[0].type_index != kTVMFFINone && values.size() == 2 &&
                               doubles.size() / 2 == ints.size()
                           ? TextOrBytes(&kept, ints, true)
                           : Value(kTVMFFINone));
      break;
    }
    default:
      make = __tvm_ffi_frequencies_from_config;
      one_of(TextOrBytes(
          &kept,
          bytes.OneIn(2) ? R"({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2})" : bytes.Some(200),
          false));
      one_of(TextOrBytes(&kept, "config.json", false));
      one_of(Value(kTVMFFINone));
      one_of(Int(Whole(bytes)));
      break;
  }
  if (!Call("frequencies", make, values, &result)) return;
  Require(result.type_index == kTVMFFIInt && result.v_int64 != 0, "frequencies: no address");
  const std::vector<TVMFFIAny> made = {result};
  Require(Call("rotary_dim", __tvm_ffi_frequencies_rotary_dim, made, &result) && result.v_int64 >= 2, "rotary_dim");
  const int64_t pairs = result.v_int64 / 2;
  Require(Call("scaling", __tvm_ffi_frequencies_attention_scaling, made, &result) && std::isfinite(result.v_float64),
          "attention_scaling");
  for (Function* get : {__tvm_ffi_frequencies_inv_freq, __tvm_ffi_frequencies_axes, __tvm_ffi_frequencies_warnings}) {
    Require(Call("get", get, made, &result), "a property");
    if (get == __tvm_ffi_frequencies_inv_freq && result.type_index == kTVMFFIBytes)
      Require(TVMFFIBytesGetByteArrayPtr(result.v_obj)->size == static_cast<size_t>(pairs) * sizeof(double),
              "inv_freq");
    Drop(result);
  }
  std::vector<TVMFFIAny> table = {made[0]};
  for (int i = 0; i < 2; ++i)
    table.push_back(bytes.OneIn(4) ? Any(bytes, &kept) : Pointer(kTVMFFIDLTensorPtr, NewTensor(bytes, &kept)));
  (void)Call("table", __tvm_ffi_frequencies_table, table, &result);
  (void)Call("release", __tvm_ffi_frequencies_release, made, &result);
}

void CallOther(Bytes& bytes, const char* name, Function* function) {
  if (std::string_view(name).starts_with("frequencies") || function == __tvm_ffi_rope) return;  // see above
  Kept kept;
  std::vector<TVMFFIAny> values;
  for (int i = bytes.Next() % 4; i > 0; --i) values.push_back(Any(bytes, &kept));
  if (function == __tvm_ffi_set_threads && !values.empty() && values[0].type_index == kTVMFFIInt &&
      values[0].v_int64 > 4 && values[0].v_int64 < 5000) {
    values[0].v_int64 %= 4;  // a thousand threads take their time
  }
  if (function == __tvm_ffi_force_backend && bytes.OneIn(2)) values = {TextOrBytes(&kept, "cpu", false)};
  TVMFFIAny result;
  (void)Call(name, function, values, &result);
  Drop(result);
  if (function == __tvm_ffi_force_backend) Require(ropewalk_force_backend(nullptr) == ROPEWALK_OK, "force_backend");
  if (function == __tvm_ffi_set_threads) Require(ropewalk_set_threads(1) == ROPEWALK_OK, "set_threads");
}

}  // namespace
}  // namespace ropewalk

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ropewalk;
  Bytes bytes(data, size);
  const uint8_t what = bytes.Next();
  if (what < 100) {
    CallRope(bytes, "rope", __tvm_ffi_rope);
  } else if (what < 130) {
    CallRope(bytes, "explain", __tvm_ffi_explain);
  } else if (what < 150) {
    CallRope(bytes, "prepare", __tvm_ffi_prepare);
  } else if (what < 220) {
    CallFrequencies(bytes);
  } else {
    static constexpr struct {
      const char* name;
      Function* function;
    } kFunctions[] = {
#define ROPEWALK_NAMED(name) {#name, __tvm_ffi_##name},
        ROPEWALK_FUNCTIONS(ROPEWALK_NAMED)};
    const auto& [name, function] = kFunctions[bytes.Next() % std::size(kFunctions)];
    CallOther(bytes, name, function);
  }
  return 0;
}
