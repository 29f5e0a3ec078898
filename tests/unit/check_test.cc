// Breaks each rule of the description and of lower() once: the call must be refused, the message must name the
// argument, the value and what would be accepted, and no byte may be written.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "base/text.h"
#include "conformance/case_call.h"
#include "rope/call.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

std::unique_ptr<CaseCall> EveryArgument(Angles angles) { return MakeCall(EveryArgumentCase(angles)); }

// The three ways to give angles.
constexpr Angles kWays[] = {Angles::kFrequencies, Angles::kTable, Angles::kPacked};

template <class T>
void SetField(ropewalk_rope_args* args, size_t offset, T value) {
  std::memcpy(reinterpret_cast<char*>(args) + offset, &value, sizeof(value));
}

// A tensor's description that a test may spoil; its memory stays the call's.
struct Spoiled {
  DLTensor tensor;
  int64_t shape[8] = {}, strides[8] = {};

  Spoiled(const DLTensor& from) : tensor(from) {
    std::copy(from.shape, from.shape + from.ndim, shape);
    std::copy(from.strides, from.strides + from.ndim, strides);
    tensor.shape = shape;
    tensor.strides = strides;
  }
};

// The same call with its tensors on a GPU must be refused in the same words, before any backend is asked.
void ExpectRefusedOnOtherDevices(const ropewalk_rope_args& args, const std::string& text) {
  if (!args.q || args.q->device.device_type != kDLCPU || args.sycl_queue) return;  // a queue is for one device
  for (const DLDevice device :
       {DLDevice{kDLCUDA, 0}, DLDevice{static_cast<DLDeviceType>(kDlOneApi), 0}, DLDevice{kDLOpenCL, 0}}) {
    ropewalk_rope_args moved = args;
    std::vector<DLTensor> tensors;
    tensors.reserve(RopeDescription().size());
    for (const Arg& arg : RopeDescription()) {
      const DLTensor* tensor = arg.kind == Kind::kTensor ? TensorOf(arg, &args) : nullptr;
      if (!tensor || tensor->device.device_type != kDLCPU) continue;
      if ((tensor->ndim == 0 || tensor->shape) && IsHostValue(arg, *tensor)) continue;  // may lie on the host
      tensors.push_back(*tensor);
      tensors.back().device = device;
      SetField(&moved, arg.offset, &tensors.back());
    }
    std::string expected = text;
    const std::string of_q = "the device of q (cpu)";
    if (const size_t at = expected.find(of_q); at != std::string::npos) {
      expected.replace(at, of_q.size(), Text("the device of q (", DeviceName(device), ")"));
    }
    EXPECT_EQ(ropewalk_rope(&moved, nullptr), ROPEWALK_INVALID_ARGUMENT) << DeviceName(device);
    EXPECT_EQ(ropewalk_last_error(), expected) << DeviceName(device);
  }
}

// Runs a call that must be refused; each of `words` must be in the message.
void ExpectRefused(CaseCall& call, const ropewalk_rope_args& args, const std::vector<std::string>& words) {
  const int code = ropewalk_rope(&args, nullptr);
  const std::string text = ropewalk_last_error();
  EXPECT_EQ(code, ROPEWALK_INVALID_ARGUMENT) << text;
  EXPECT_EQ(text.rfind("rope: ", 0), 0u) << text;
  for (const std::string& word : words)
    EXPECT_NE(text.find(word), std::string::npos) << "no \"" << word << "\" in: " << text;
  EXPECT_EQ(ropewalk_explain(&args), nullptr);
  EXPECT_EQ(ropewalk_prepare(&args), ROPEWALK_INVALID_ARGUMENT);
  ExpectRefusedOnOtherDevices(args, text);
  std::string message;
  ASSERT_TRUE(call.VerifyUntouched(&message).ok());
  EXPECT_EQ(message, "");
}

// Calls body(call, argument, its tensor) for each tensor of the description, in a call that has it.
void EachTensor(const std::function<void(CaseCall&, const Arg&, const DLTensor&)>& body) {
  std::vector<std::string> seen;
  for (const Angles angles : kWays) {
    const auto call = EveryArgument(angles);
    for (const Arg& arg : RopeDescription()) {
      if (arg.kind != Kind::kTensor || std::find(seen.begin(), seen.end(), arg.name) != seen.end()) continue;
      const DLTensor* tensor = TensorOf(arg, &call->args());
      if (!tensor) continue;
      SCOPED_TRACE(arg.name);
      seen.emplace_back(arg.name);
      body(*call, arg, *tensor);
    }
  }
  for (const Arg& arg : RopeDescription()) {
    if (arg.kind != Kind::kTensor) continue;
    EXPECT_NE(std::find(seen.begin(), seen.end(), arg.name), seen.end()) << arg.name << " is in no call of this test";
  }
}

void ExpectRefusedWith(CaseCall& call, const Arg& arg, const Spoiled& spoiled, const std::vector<std::string>& words) {
  ropewalk_rope_args args = call.args();
  SetField(&args, arg.offset, &spoiled.tensor);
  ExpectRefused(call, args, words);
}

TEST(Check, UnspoiledCallsAreServed) {
  for (const Angles angles : kWays) {
    const auto call = EveryArgument(angles);
    const Status status = call->Run();
    EXPECT_TRUE(status.ok()) << status.text();
    EXPECT_EQ(MessageOf(*call), "");
  }
}

TEST(Check, MissingRequired) {
  const auto call = EveryArgument(Angles::kFrequencies);
  for (const Arg& arg : RopeDescription()) {
    if (!(arg.flags & kRequired)) continue;
    ropewalk_rope_args args = call->args();
    SetField<DLTensor*>(&args, arg.offset, nullptr);
    ExpectRefused(*call, args, {Text(arg.name, " is missing"), ShapeSpec(arg)});
  }
}

TEST(Check, WrongDtype) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    Spoiled spoiled(tensor);
    spoiled.tensor.dtype = {kDLUInt, tensor.dtype.bits, 1};
    const uint32_t right = DtypeOf(tensor.dtype);
    std::vector<std::string> words = {Text(arg.name, " must be "),
                                      Text("but is uint", static_cast<int>(tensor.dtype.bits))};
    words.push_back(DtypeName(arg.like ? TensorOf(RopeDescription()[0], &call.args())->dtype : tensor.dtype));
    if (arg.like && !(right & kFp8)) words.back() = DtypeName(tensor.dtype);
    ExpectRefusedWith(call, arg, spoiled, words);

    Spoiled lanes(tensor);
    lanes.tensor.dtype.lanes = 2;
    ExpectRefusedWith(call, arg, lanes, {Text(arg.name, " must be "), "x2"});

    // One that is right elsewhere.
    Spoiled other(tensor);
    other.tensor.dtype = {kDLFloat, 64, 1};
    ExpectRefusedWith(call, arg, other, {Text(arg.name, " must be "), "but is float64"});
  });
}

TEST(Check, DtypesThatMustAgree) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    if (!arg.like) return;
    Spoiled spoiled(tensor);
    spoiled.tensor.dtype = {kDLFloat, 16, 1};  // that of q is bfloat16, of q_weight and cos float32
    ExpectRefusedWith(call, arg, spoiled, {Text(arg.name, " must be "), "but is float16"});
  });
}

TEST(Check, WrongRank) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    for (const int ndim : {tensor.ndim + 2, 0, -1}) {
      if (ndim == 0 && (arg.flags & kHostScalar)) continue;  // a scalar is right
      Spoiled spoiled(tensor);
      for (int i = tensor.ndim; i < ndim; ++i) spoiled.shape[i] = spoiled.strides[i] = 1;
      spoiled.tensor.ndim = ndim;
      std::vector<std::string> words = {arg.name};
      if (ndim >= 0)
        words.insert(words.end(), {ShapeSpec(arg), Text("has ", ndim, " dimension"), ShapeText(spoiled.tensor)});
      ExpectRefusedWith(call, arg, spoiled, words);
    }
    Spoiled shapeless(tensor);
    shapeless.tensor.shape = nullptr;
    ExpectRefusedWith(call, arg, shapeless, {Text(arg.name, " has no shape")});
  });
}

// Before any size is read: of tensors that have none, and of more than there can be.
TEST(Check, ShapesThatCannotBeRead) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    for (const int ndim : {1, 2, 3, 4, 5, 64, 65, INT32_MAX}) {
      Spoiled spoiled(tensor);
      spoiled.tensor.ndim = ndim;
      spoiled.tensor.shape = nullptr;
      ExpectRefusedWith(call, arg, spoiled, {Text(arg.name, " has no shape")});
    }
    for (const int ndim : {65, 1 << 20, INT32_MAX}) {
      Spoiled spoiled(tensor);
      spoiled.tensor.ndim = ndim;
      ExpectRefusedWith(call, arg, spoiled, {ShapeSpec(arg), Text("has ", ndim, " dimensions")});
    }
  });
}

// Strides between no elements may be anything.
TEST(Check, EmptyTensorsOfAnyStrides) {
  for (const int empty : {0, 1, 2}) {  // no batch, no tokens, no heads
    RopeCase c = {.batch = 2, .q_heads = 3, .k_heads = 2, .head_dim = 32, .norm = true};
    if (empty == 1) c.tokens = 0;
    const auto call = MakeCall(c);
    for (const int64_t stride : {int64_t{0}, int64_t{-1}, int64_t{7}, INT64_MAX / 64}) {
      Spoiled q(*call->args().q), k(*call->args().k), positions(*call->args().positions);
      for (Spoiled* tensor : {&q, &k, &positions}) {
        if (empty == 2 && tensor == &positions) continue;
        tensor->shape[empty] = 0;
        for (int i = 0; i < tensor->tensor.ndim; ++i) tensor->strides[i] = stride;
      }
      ropewalk_rope_args args = call->args();
      args.q = &q.tensor;
      args.k = &k.tensor;
      args.positions = &positions.tensor;
      EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
      EXPECT_NE(ropewalk_explain(&args), nullptr) << ropewalk_last_error();
    }
  }
}

// Against every byte: q and k of one piece of memory, with strides that lie between each other's in all ways.
TEST(Check, OverlapIsExact) {
  const auto call = MakeCall({.dtype = kF32, .k_heads = 1, .head_dim = 4});
  std::vector<float> memory(1 << 16);
  uint64_t state = 1;
  const auto random = [&](int64_t count) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(count));
  };
  int served = 0, refused = 0, interleaved = 0;
  for (int round = 0; round < 20000; ++round) {
    int64_t tokens = 2 + random(12), q_heads = 1 + random(4), k_heads = 1 + random(3);
    int64_t q_shape[] = {tokens, q_heads, 4}, k_shape[] = {tokens, k_heads, 4};
    int64_t q_strides[] = {4 + random(40), 4 + random(60), 1}, k_strides[] = {4 + random(40), 4 + random(60), 1};
    DLTensor q = *call->args().q, k = *call->args().k;
    q.data = memory.data();
    k.data = memory.data() + random(400);
    q.shape = q_shape, k.shape = k_shape, q.strides = q_strides, k.strides = k_strides;
    q.byte_offset = k.byte_offset = 0;
    ropewalk_rope_args args = ROPEWALK_ROPE_ARGS_INIT;
    args.q = &q;
    args.k = &k;
    args.frequencies = call->frequencies();
    std::vector<int> uses(memory.size());
    bool shared = false;
    for (const DLTensor* tensor : {&q, &k}) {
      const int64_t begin = static_cast<float*>(tensor->data) - memory.data();
      for (int64_t t = 0; t < tensor->shape[0]; ++t) {
        for (int64_t h = 0; h < tensor->shape[1]; ++h) {
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t at = begin + t * tensor->strides[0] + h * tensor->strides[1] + i;
            shared |= uses[static_cast<size_t>(at)]++ > 0;
          }
        }
      }
    }
    const bool is_served = ropewalk_explain(&args) != nullptr;
    ASSERT_EQ(is_served, !shared) << ropewalk_last_error() << ", q " << tokens << " x " << q_heads << " by "
                                  << q_strides[0] << ", " << q_strides[1] << "; k by " << k_strides[0] << ", "
                                  << k_strides[1] << ", at " << static_cast<float*>(k.data) - memory.data();
    ++(is_served ? served : refused);
    const int64_t inner = std::min(q_strides[0], q_strides[1]), outer = std::max(q_strides[0], q_strides[1]);
    const int64_t span = inner * ((q_strides[0] == inner ? tokens : q_heads) - 1) + 4;
    interleaved += is_served && outer < span;
  }
  EXPECT_GT(served, 500);
  EXPECT_GT(refused, 500);
  EXPECT_GT(interleaved, 50);
}

// Where telling them apart would take too long, they are refused: strides of nearly one period, for many rows.
TEST(Check, EntangledTensorsAreRefused) {
  const auto call = MakeCall({.dtype = kF32, .q_heads = 1, .k_heads = 1, .head_dim = 4});
  std::vector<float> memory(2000 * 2594 + 4000);
  int64_t shape[] = {2000, 1, 4}, q_strides[] = {2594, 4, 1}, k_strides[] = {2593, 4, 1};
  DLTensor q = *call->args().q, k = *call->args().k;
  q.data = memory.data();
  q.byte_offset = k.byte_offset = 0;
  q.shape = k.shape = shape;
  q.strides = q_strides, k.strides = k_strides;
  ropewalk_rope_args args = ROPEWALK_ROPE_ARGS_INIT;
  args.q = &q;
  args.k = &k;
  args.frequencies = call->frequencies();
  for (const int64_t offset : {5, 100, 1999, 2593}) {
    k.data = memory.data() + offset;
    EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_INVALID_ARGUMENT) << offset;
    EXPECT_NE(std::string(ropewalk_last_error()).find("k must not share memory with q"), std::string::npos);
  }
}

// No heads is no work, however many tokens.
TEST(Check, NoHeadsIsNoWork) {
  const auto call = MakeCall({.dtype = kF32, .q_heads = 1, .k_heads = 0});
  DLTensor q = *call->args().q;
  int64_t shape[] = {int64_t{1} << 40, 0, 128};
  q.shape = shape;
  q.strides = nullptr;
  ropewalk_rope_args args = ROPEWALK_ROPE_ARGS_INIT;
  args.q = &q;
  args.frequencies = call->frequencies();
  EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
}

// eps and scales are float32 in the kernels.
TEST(Check, NumbersThatFloat32CannotHold) {
  const auto call = EveryArgument(Angles::kFrequencies);
  for (const double eps : {1e-300, 5e-324, 1e-46, 1e-39, 3.5e38, 1e300}) {
    ropewalk_rope_args args = call->args();
    args.eps = eps;
    ExpectRefused(*call, args, {"eps must be 0 or from 1.1754944e-38 to 3.4028235e+38", Text("but is ", eps)});
  }
  for (float scale : {1e-39f, 1e-45f}) {
    DLTensor tensor = {&scale, {kDLCPU, 0}, 0, {kDLFloat, 32, 1}, nullptr, nullptr, 0};
    ropewalk_rope_args args = call->args();
    args.k_scale = &tensor;
    ExpectRefused(*call, args, {"k_scale must be at least 1.1754944e-38", Text("but is ", scale)});
  }
}

// Scales of each head, too, in a call that is new and in one like an earlier one.
TEST(Check, ScalesInAnArray) {
  const auto call = EveryArgument(Angles::kFrequencies);
  const int64_t heads = call->args().k_scale->shape[0];
  ASSERT_GT(heads, 1);
  std::vector<float> scales(static_cast<size_t>(2 * heads));
  int64_t shape = heads, stride = 2;
  DLTensor tensor = {scales.data(), {kDLCPU, 0}, 1, {kDLFloat, 32, 1}, &shape, &stride, 0};
  for (const bool of_v : {false, true}) {
    ropewalk_rope_args args = call->args();
    (of_v ? args.v_scale : args.k_scale) = &tensor;
    for (const float value : {0.0f, -1.0f, std::nanf(""), HUGE_VALF, 1e-39f}) {
      for (const int64_t head : {int64_t{0}, heads - 1}) {
        SCOPED_TRACE(Text(value, " of head ", head));
        const std::string text =
            Text("rope: ", of_v ? "v_scale[" : "k_scale[", head, "] must be ",
                 value == 1e-39f ? "at least 1.1754944e-38" : "a finite number > 0", ", but is ", value);
        for (const bool known : {false, true}) {
          std::fill(scales.begin(), scales.end(), 0.5f);
          if (known) {
            ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
          }
          ASSERT_TRUE(call->Reset().ok());
          scales[static_cast<size_t>(2 * head)] = value;
          EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_INVALID_ARGUMENT);
          EXPECT_EQ(ropewalk_last_error(), text);
          EXPECT_EQ(ropewalk_explain(&args), nullptr);
          EXPECT_EQ(ropewalk_prepare(&args), ROPEWALK_INVALID_ARGUMENT);
          std::string message;
          ASSERT_TRUE(call->VerifyUntouched(&message).ok());
          EXPECT_EQ(message, "");
        }
      }
    }
  }
}

// Devices that an older dlpack.h does not name.
TEST(Check, DevicesOfANewerDlpack) {
  const auto call = MakeCall({});
  for (const int32_t type : {0, 16, 17, 255, -1, INT32_MAX, INT32_MIN}) {
    DLTensor q = *call->args().q;
    std::memcpy(&q.device.device_type, &type, sizeof(type));
    ropewalk_rope_args args = ROPEWALK_ROPE_ARGS_INIT;
    args.q = &q;
    args.frequencies = call->frequencies();
    EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_NE(std::string(ropewalk_last_error()).find(Text("device type ", type)), std::string::npos);
  }
}

TEST(Check, WrongDevice) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    if (std::strcmp(arg.name, "q") == 0) return;
    Spoiled spoiled(tensor);
    spoiled.tensor.device = {kDLCUDA, 1};
    ExpectRefusedWith(call, arg, spoiled, {Text(arg.name, " must be on the device of q (cpu)"), "but is on cuda:1"});
  });
}

TEST(Check, UnservedDevice) {
  const auto call = EveryArgument(Angles::kFrequencies);
  DLTensor q = *call->args().q;
  q.device = {kDLVulkan, 0};
  ropewalk_rope_args args;
  args.q = &q;
  args.frequencies = call->frequencies();
  args.axes = nullptr;
  ExpectRefused(*call, args, {"q must be on the CPU", "but is on"});
}

TEST(Check, StrideOfTheLastDimension) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    if (!(arg.flags & kUnitStride)) return;
    Spoiled spoiled(tensor);
    spoiled.strides[tensor.ndim - 1] = 2;
    ExpectRefusedWith(call, arg, spoiled, {Text(arg.name, " must be contiguous in its last dimension"), "is 2"});
  });
}

// Each dimension one larger. Where another argument has it too, the message may name either, and has both numbers.
TEST(Check, SizesThatDisagree) {
  int disagreements = 0;
  EachTensor([&](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    for (int i = 0; i < tensor.ndim; ++i) {
      const bool pages = std::strstr(arg.name, "_cache") && i == 0;
      const bool page_size = std::strstr(arg.name, "_cache") && i == 1;
      const bool axes = std::strcmp(arg.name, "positions") == 0 && i == 0;
      const bool rows = std::strcmp(arg.name, "cos_sin") == 0 && i == 0;
      if (axes || rows) continue;  // as many as the caller likes
      SCOPED_TRACE(i);
      Spoiled spoiled(tensor);
      spoiled.shape[i] += 1;
      ropewalk_rope_args args = call.args();
      SetField(&args, arg.offset, &spoiled.tensor);
      if (pages || page_size) {
        ExpectRefused(call, args, {pages ? "pages" : "page_size", Text(spoiled.shape[i]), Text(tensor.shape[i])});
      } else {
        ExpectRefused(call, args, {Text(spoiled.shape[i]), Text(tensor.shape[i])});
        const std::string text = ropewalk_last_error();
        int named = 0;
        for (const Arg& other : RopeDescription()) named += text.find(other.name) != std::string::npos;
        EXPECT_GT(named, 0) << text;
      }
      ++disagreements;
    }
  });
  EXPECT_GT(disagreements, 40);
}

TEST(Check, NegativeSizes) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    for (int i = 0; i < tensor.ndim; ++i) {
      Spoiled spoiled(tensor);
      spoiled.shape[i] = -3;
      ExpectRefusedWith(call, arg, spoiled, {Text(arg.name, " has a negative size: "), ShapeText(spoiled.tensor)});
    }
  });
}

// Sizes whose products leave 64 bits: no overflow on the way, which UndefinedBehaviorSanitizer sees.
TEST(Check, SizesBeyondAllMemory) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    for (int i = 0; i < tensor.ndim; ++i) {
      for (const int64_t size : {INT64_MAX, INT64_MAX / 2, int64_t{1} << 61}) {
        Spoiled spoiled(tensor);
        spoiled.shape[i] = size;
        if (i == 0) spoiled.tensor.strides = nullptr;
        ropewalk_rope_args args = call.args();
        SetField(&args, arg.offset, &spoiled.tensor);
        // Rows that no position names, and axes that no pair takes, may be as many as they like.
        const char* text = ropewalk_explain(&args);
        EXPECT_TRUE(text || std::string(ropewalk_last_error()).rfind("rope: ", 0) == 0) << ropewalk_last_error();
      }
    }
  });
}

TEST(Check, Misaligned) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    if (tensor.dtype.bits == 8) return;
    Spoiled spoiled(tensor);
    spoiled.tensor.byte_offset += 1;
    ExpectRefusedWith(
        call, arg, spoiled,
        {Text(arg.name, " must be aligned to its ", tensor.dtype.bits / 8, "-byte elements"), "ends in 1"});
  });
}

TEST(Check, NoData) {
  EachTensor([](CaseCall& call, const Arg& arg, const DLTensor& tensor) {
    Spoiled spoiled(tensor);
    spoiled.tensor.data = nullptr;
    ExpectRefusedWith(call, arg, spoiled, {Text(arg.name, " has no data"), ShapeText(tensor)});
  });
}

TEST(Check, Scalars) {
  const auto call = EveryArgument(Angles::kFrequencies);
  int broken = 0;
  for (const Arg& arg : RopeDescription()) {
    SCOPED_TRACE(arg.name);
    ropewalk_rope_args args = call->args();
    const auto refuse = [&](auto value, const std::vector<std::string>& words) {
      args = call->args();
      SetField(&args, arg.offset, value);
      ExpectRefused(*call, args, words);
      ++broken;
    };
    switch (arg.kind) {
      case Kind::kBool:
        for (const int32_t value : {2, -1, INT32_MIN})
          refuse(value, {Text(arg.name, " must be 0 or 1, but is ", value)});
        break;
      case Kind::kChoice:
        for (const int32_t value : {2, -1, INT32_MAX}) {
          refuse(value, {Text(arg.name, " must be ", arg.choices[0]), arg.choices[1], Text("but is ", value)});
        }
        break;
      case Kind::kInt:
        for (const int32_t value : {-1, -2, INT32_MIN})
          refuse(value, {Text(arg.name, " must be >= 0, but is ", value)});
        break;
      case Kind::kDouble:
        refuse(-1.0, {Text(arg.name, " must be a finite number >= 0, but is -1")});
        refuse(std::numeric_limits<double>::infinity(), {arg.name, "but is inf"});
        refuse(std::nan(""), {arg.name, "but is nan"});
        break;
      case Kind::kTensor:
      case Kind::kHandle:
      case Kind::kQueue: break;
    }
  }
  EXPECT_GE(broken, 21);
}

TEST(Check, AChoiceMayHaveMoreThanTwoNames) {
  struct Own {
    int32_t mode;
  } own = {};
  const Arg table[] = {{.name = "mode", .kind = Kind::kChoice, .offset = 0, .doc = "", .choices = {"a", "b", "c"}}};
  Sizes sizes;
  Strides strides[1];
  for (own.mode = 0; own.mode < 3; ++own.mode) EXPECT_TRUE(Check(table, &own, false, &sizes, strides).ok());
  EXPECT_EQ(Check(table, &own, false, &sizes, strides).text(), "rope: mode must be a (0), b (1) or c (2), but is 3");
  EXPECT_NE(DescriptionJson(table).find("\"choices\": [\"a\", \"b\", \"c\"]"), std::string::npos);
}

TEST(Check, ArgumentsAreNull) {
  EXPECT_EQ(ropewalk_rope(nullptr, nullptr), ROPEWALK_INVALID_ARGUMENT);
  EXPECT_STREQ(ropewalk_last_error(), "rope: args is null");
  EXPECT_EQ(ropewalk_explain(nullptr), nullptr);
  EXPECT_EQ(ropewalk_prepare(nullptr), ROPEWALK_INVALID_ARGUMENT);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rules on what goes together

struct Rule {
  const char* name;
  Angles angles;
  std::function<void(ropewalk_rope_args*)> spoil;
  std::vector<std::string> words;
};

void PrintTo(const Rule& rule, std::ostream* out) { *out << rule.name; }

class Combination : public testing::TestWithParam<Rule> {};

TEST_P(Combination, IsRefused) {
  const auto call = EveryArgument(GetParam().angles);
  ropewalk_rope_args args = call->args();
  GetParam().spoil(&args);
  ExpectRefused(*call, args, GetParam().words);
}

std::vector<Rule> Rules() {
  constexpr Angles kF = Angles::kFrequencies, kT = Angles::kTable, kP = Angles::kPacked;
  return {
      {"CosSinTwice",
       kP,
       [](auto* a) {
         a->axes = a->positions = nullptr;
         a->cos = a->sin = a->cos_sin;
       },
       {"cos_sin is given together with cos"}},
      {"CosAlone", kT, [](auto* a) { a->sin = nullptr; }, {"sin is missing", "cos and sin"}},
      {"SinAlone", kT, [](auto* a) { a->cos = nullptr; }, {"cos is missing", "cos and sin"}},
      {"NoAngles", kF, [](auto* a) { a->frequencies = nullptr; }, {"frequencies are missing", "cos_sin"}},
      {"KWeightWithoutK",
       kF,
       [](auto* a) {
         a->k = a->k_out = a->k_cache = nullptr;
         a->k_scale = nullptr;
       },
       {"k_weight is given, but k is missing"}},
      {"KOutWithoutK", kF, [](auto* a) { a->k = nullptr; }, {"k_out is given, but k is missing"}},
      {"KCacheWithoutK",
       kF,
       [](auto* a) {
         a->k = a->k_out = nullptr;
         a->k_weight = nullptr;
       },
       {"k_cache is given, but k is missing"}},
      {"KWeightAlone", kF, [](auto* a) { a->q_weight = nullptr; }, {"q_weight is missing, but k_weight is given"}},
      {"QWeightAlone", kF, [](auto* a) { a->k_weight = nullptr; }, {"k_weight is missing, but q_weight is given"}},
      {"ZeroCenteredWithoutWeight",
       kF,
       [](auto* a) {
         a->q_weight = a->k_weight = nullptr;
         a->zero_centered_weight = 1;
       },
       {"zero_centered_weight is given, but q_weight is missing"}},
      {"VAlone",
       kF,
       [](auto* a) {
         a->v_cache = nullptr;
         a->v_scale = nullptr;
       },
       {"v_cache is missing, but v is given"}},
      {"VCacheAlone", kF, [](auto* a) { a->v = nullptr; }, {"v is missing, but v_cache is given"}},
      {"CacheWithoutSlots", kF, [](auto* a) { a->slots = nullptr; }, {"slots are missing, but k_cache is given"}},
      {"SlotsWithoutCache",
       kF,
       [](auto* a) {
         a->k_cache = a->v_cache = nullptr;
         a->v = a->k_scale = a->v_scale = nullptr;
       },
       {"slots are given, but k_cache and v_cache are missing"}},
      {"KScaleWithoutFp8",
       kF,
       [](auto* a) {
         a->k_cache = a->v_cache = nullptr;
         a->v = a->slots = a->v_scale = nullptr;
       },
       {"k_scale is given, but k_cache is not an fp8 cache"}},
      {"VScaleWithoutFp8",
       kF,
       [](auto* a) {
         a->v_cache = nullptr;
         a->v = nullptr;
       },
       {"v_scale is given, but v_cache is not an fp8 cache"}},
      {"CachesOfTwoDtypes",
       kF,
       [](auto* a) {
         a->v_cache->dtype = {12, 8, 1};
       },
       {"v_cache must be float8_e4m3fn like k_cache, but is float8_e5m2"}},
      {"KStoreOnlyWithoutK",
       kF,
       [](auto* a) {
         a->k = a->k_out = a->k_cache = nullptr;
         a->k_weight = a->k_scale = nullptr;
         a->k_store_only = 1;
       },
       {"k_store_only is 1, but k is missing"}},
      {"KStoreOnlyWithoutItsCache",
       kF,
       [](auto* a) {
         a->k_out = a->k_cache = nullptr;
         a->k_scale = nullptr;
         a->k_store_only = 1;
       },
       {"k_store_only is 1, but k_cache is missing"}},
      {"KStoreOnlyWithKOut",
       kF,
       [](auto* a) { a->k_store_only = 1; },
       {"k_store_only is 1, but k_out is given: k goes to k_cache alone"}},
      {"KStoreOnlyOverlapsTheQThatIsWritten",
       kF,
       [](auto* a) {
         a->q_out = a->k_out = nullptr;
         a->k->data = a->q->data;
         a->k_store_only = 1;
       },
       {"k must not share memory with q"}},
      {"KStoreOnlyOverlapsItsCache",
       kF,
       [](auto* a) {
         a->k_out = nullptr;
         a->k_cache->data = a->k->data;
         a->k_store_only = 1;
       },
       {"k_cache must not share memory with k"}},
      {"OddRotaryDim", kT, [](auto* a) { a->rotary_dim = 23; }, {"rotary_dim must be even, but is 23"}},
      {"OddPackedTable",
       kP,
       [](auto* a) {
         a->rotary_dim = 0;
         a->axes = nullptr;
         a->positions = nullptr;
         a->cos_sin->shape[1] = 23;
       },
       {"cos_sin must be even, but is 23 wide"}},
      {"FrequenciesForAnotherRotaryDim",
       kF,
       [](auto* a) { a->rotary_dim = 22; },
       {"rotary_dim is 22, but frequencies are for 24"}},
      {"TableNarrowerThanRotaryDim",
       kT,
       [](auto* a) { a->rotary_dim = 26; },
       {"cos must be 13 wide for rotary_dim 26, but is 12 wide"}},
      {"TableWiderThanRotaryDim",
       kP,
       [](auto* a) { a->rotary_dim = 20; },
       {"cos_sin must be 20 wide for rotary_dim 20, but is 24 wide"}},
      {"RotaryPartOutsideTheHead",
       kT,
       [](auto* a) { a->rotary_offset = 10; },
       {"rotary_offset 10 and rotary_dim 24 must fit in head_dim 32"}},
      {"HugeRotaryOffset",
       kT,
       [](auto* a) { a->rotary_offset = INT32_MAX; },
       {"rotary_offset 2147483647", "head_dim 32"}},
      {"HugeRotaryDim", kT, [](auto* a) { a->rotary_dim = INT32_MAX - 1; }, {"rotary_dim 2147483646"}},
      {"TooFewAxes",
       kF,
       [](auto* a) { a->axes->shape[0] = 11; },
       {"axes must have 12 entries for rotary_dim 24, but has 11"}},
      {"NoRowsOfPositions",
       kF,
       [](auto* a) { a->positions->shape[0] = 0; },
       {"positions must have a row for each axis, but have none"}},
      {"TableTooShortWithoutPositions",
       kT,
       [](auto* a) {
         a->positions = a->offsets = nullptr;
         a->cos->shape[0] = a->sin->shape[0] = 5;
       },
       {"positions run from 0 to 5 (none given), but cos has 5 rows"}},
      {"QShallow", kF, [](auto* a) { a->q->ndim = 2; }, {"q must be [batch?, tokens, q_heads, head_dim], but has 2"}},
      {"CachesOfTwoRanks",
       kF,
       [](auto* a) {
         a->v_cache->ndim = 3;
         for (int i = 0; i < 3; ++i) {
           a->v_cache->shape[i] = a->v_cache->shape[i + 1];
           a->v_cache->strides[i] = a->v_cache->strides[i + 1];
         }
       },
       {"v_cache must have 4 dimensions like k_cache, but has 3"}},
      {"SyclQueueOfTheCpu", kF, [](auto* a) { a->sycl_queue = a; }, {"sycl_queue is given, but q is on cpu"}},
      {"ScaleOfZero",
       kF,
       [](auto* a) {
         static float zero = 0;
         static int64_t one = 1;
         static DLTensor scale = {&zero, {kDLCPU, 0}, 1, {kDLFloat, 32, 1}, &one, &one, 0};
         a->k_scale = &scale;
       },
       {"k_scale must be a finite number > 0, but is 0"}},
      {"ScaleOfNan",
       kF,
       [](auto* a) {
         static float nan = std::nanf("");
         static DLTensor scale = {&nan, {kDLCPU, 0}, 0, {kDLFloat, 32, 1}, nullptr, nullptr, 0};
         a->v_scale = &scale;
       },
       {"v_scale must be a finite number > 0, but is nan"}},
      {"ElementsOfQShareMemory",
       kF,
       [](auto* a) { a->q_out->strides[2] = 0; },
       {"q_out is written, but some of its elements share memory"}},
      {"OutputsShareMemory",
       kF,
       [](auto* a) { a->k_out->data = a->q_out->data; },
       {"k_out must not share memory with q_out"}},
      {"OutputOverlapsItsInput",
       kF,
       [](auto* a) {
         a->q_out->data = a->q->data;
         a->q_out->byte_offset = a->q->byte_offset + 2;
       },
       {"q_out must not share memory with q"}},
      {"CacheOverlapsK", kF, [](auto* a) { a->k_cache->data = a->k->data; }, {"k_cache must not share memory with k"}},
      {"QIsItsOwnPositions",
       kF,
       [](auto* a) {
         a->q_out = nullptr;
         a->offsets = nullptr;
         const_cast<DLTensor*>(a->positions)->data = a->q->data;
       },
       {"positions must not share memory with q"}},
      {"QAndKShareMemory",
       kF,
       [](auto* a) {
         a->q_out = a->k_out = nullptr;
         a->k->data = a->q->data;
       },
       {"k must not share memory with q"}},
      {"HeadDimOdd",
       kF,
       [](auto* a) {
         ropewalk_rope_args plain;
         plain.q = a->q;
         plain.frequencies = a->frequencies;
         a->q->shape[3] = 31;
         *a = plain;
       },
       {"q must have an even head_dim from 2 to 8192, but has head_dim 31"}},
      {"HeadDimTooLarge",
       kF,
       [](auto* a) {
         ropewalk_rope_args plain;
         plain.q = a->q;
         plain.frequencies = a->frequencies;
         a->q->shape[3] = 8194;
         *a = plain;
       },
       {"from 2 to 8192, but has head_dim 8194"}},
      {"HeadDimZero",
       kF,
       [](auto* a) {
         ropewalk_rope_args plain;
         plain.q = a->q;
         plain.frequencies = a->frequencies;
         a->q->shape[3] = 0;
         *a = plain;
       },
       {"but has head_dim 0"}},
      {"RotaryDimLargerThanTheHead",
       kF,
       [](auto* a) {
         ropewalk_rope_args plain;
         plain.q = a->q;
         plain.frequencies = a->frequencies;
         a->q->shape[3] = 22;
         *a = plain;
       },
       {"rotary_dim must be at most head_dim 22, but is 24 (from frequencies)"}},
      {"TooManyHeads",
       kF,
       [](auto* a) {
         ropewalk_rope_args plain;
         plain.q = a->q;
         plain.frequencies = a->frequencies;
         a->q->shape[2] = (1 << 20) + 1;
         *a = plain;
       },
       {"q must have at most 1048576 heads, but has 1048577"}},
      {"VDimTooLarge",
       kF,
       [](auto* a) { a->v->shape[3] = a->v_cache->shape[3] = 65537; },
       {"v must have a v_dim of at most 65536, but has 65537"}},
  };
}

INSTANTIATE_TEST_SUITE_P(, Combination, testing::ValuesIn(Rules()),
                         [](const auto& rule) { return std::string(rule.param.name); });

TEST(Check, FrequenciesAndTable) {
  const auto call = EveryArgument(Angles::kTable);
  const auto other = EveryArgument(Angles::kFrequencies);
  ropewalk_rope_args args = call->args();
  args.frequencies = other->frequencies();
  ExpectRefused(*call, args, {"frequencies and cos are both given"});
}

TEST(Check, TooFewRowsOfPositionsForFrequencies) {
  const auto call = MakeCall({.axes = Axes::kSections});
  call->args().positions->shape[0] = 2;
  ExpectRefused(*call, call->args(), {"positions must have 3 rows, one for each axis of frequencies, but has 2"});
}

TEST(Check, TextStaysUntilTheNextFailure) {
  ropewalk_rope_args args;
  EXPECT_NE(ropewalk_rope(&args, nullptr), ROPEWALK_OK);
  const std::string text = ropewalk_last_error();
  EXPECT_NE(text.find("q is missing"), std::string::npos) << text;
}

// Messages have numbers as std::to_chars writes them, which is too large for the library to hold; powers of two may
// have a digit more.
template <class Number, class Bits>
void ExpectShortest(uint64_t seed) {
  std::mt19937_64 random(seed);
  for (int i = 0; i < 100'000; ++i) {
    // Any bits, decimal fractions, integers of any length.
    const uint64_t drawn = random();
    const Number fraction = static_cast<Number>(drawn % 100'000'000) / static_cast<Number>(1000);
    Number number = i % 3 == 1 ? fraction : static_cast<Number>(drawn >> (drawn % 64));
    const auto bits = static_cast<Bits>(drawn);
    if (i % 3 == 0) std::memcpy(&number, &bits, sizeof(number));
    if (std::isnan(number)) continue;
    char wanted[64];
    *std::to_chars(wanted, wanted + sizeof(wanted), number).ptr = 0;
    ASSERT_EQ(Text(number), wanted);
  }
}

TEST(Check, NumbersInMessagesAreTheShortestThatReadBack) {
  ExpectShortest<double, uint64_t>(1);
  ExpectShortest<float, uint32_t>(2);
  const double denormal = std::numeric_limits<double>::denorm_min(), infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(Text(0.0, " ", -0.0, " ", 1e22, " ", denormal, " ", 0.1f, " ", -infinity, " ", -std::nan("")),
            "0 -0 1e+22 5e-324 0.1 -inf nan");
  for (int power = -1074; power < 1024; ++power) {
    const double number = std::ldexp(1.0, power);
    ASSERT_EQ(std::strtod(Text(number).c_str(), nullptr), number) << power;
  }
  EXPECT_EQ(Show(5e5) + " " + Show(5e6) + " " + Show(-0.5), "500000 5e+06 -0.5");
}

}  // namespace
}  // namespace ropewalk
