// Every part of every head on every CPU target: each element of an output has been written, and no byte outside a
// tensor is read or written: tensors end where a page ends behind which there is none, or begin where one begins.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <ropewalk/ropewalk.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/text.h"
#include "tests/plan_space.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

constexpr int kMostDim = 512;
constexpr int kHeads = 2, kGap = 3;   // elements between heads, which no one may write
constexpr uint8_t kFinite = 0x3C;     // bytes that are a finite number in every dtype
constexpr uint8_t kUntouched = 0xFF;  // and a NaN

// What runs now, for the message of a fault.
struct Now {
  std::string target;
  int head_dim, rotary_dim, rotary_offset, mode, at_end;
  unsigned bits, pairing, norm, table;
} now;

std::string Describe() {
  constexpr const char* kModes[] = {"in place",      "out of place",        "stored", "out of place, stored as fp8",
                                    "k only stored", "k only stored as fp8"};
  return Text(now.target, ", ", now.bits, " bits, head_dim ", now.head_dim, ", rotary_dim ", now.rotary_dim, " at ",
              now.rotary_offset, ", pairing ", now.pairing, ", norm ", now.norm, ", ", now.table ? "a table" : "turns",
              ", ", kModes[now.mode], ", at the ", now.at_end ? "end" : "begin", " of a page");
}

void TellOfAFault(int) {
  const std::string text = Text("an access outside its tensor: ", Describe(), "\n");
  if (write(STDERR_FILENO, text.data(), text.size()) < 0) _exit(2);
  _exit(1);
}

// Pages with none before and none behind.
class Pages {
 public:
  explicit Pages(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page;
    void* all = mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(all, MAP_FAILED);
    data_ = static_cast<uint8_t*>(all) + page;
    EXPECT_EQ(mprotect(data_, size_, PROT_READ | PROT_WRITE), 0);
  }
  // `bytes` of them, filled.
  uint8_t* Take(size_t bytes, bool at_end, uint8_t fill) const {
    uint8_t* data = at_end ? data_ + size_ - bytes : data_;
    std::memset(data, fill, bytes);
    return data;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// [1, kHeads, dim] with gaps between heads; or [rows, dim], or [dim].
struct Tensor {
  Pages pages{(kHeads * kMostDim + kGap) * 4};
  DLTensor tensor = {};
  int64_t shape[3] = {}, strides[3] = {};
  int64_t dim = 0;

  DLTensor* Make(int ndim, int64_t width, DLDataType type, uint8_t fill) {
    dim = width;
    const int64_t heads = ndim == 3 ? kHeads : 1, item = type.bits / 8;
    const int64_t elements = heads * width + (heads - 1) * kGap;
    const int64_t shapes[3][3] = {{width, 0, 0}, {1, width, 0}, {1, kHeads, width}};
    const int64_t steps[3][3] = {{1, 0, 0}, {width, 1, 0}, {elements, width + kGap, 1}};
    std::copy_n(shapes[ndim - 1], 3, shape);
    std::copy_n(steps[ndim - 1], 3, strides);
    tensor = {
        pages.Take(static_cast<size_t>(elements * item), now.at_end, fill), {kDLCPU, 0}, ndim, type, shape, strides, 0};
    return &tensor;
  }
  // Whether each element was written and no gap was.
  template <class Raw>
  bool Written() const {
    const Raw* data = static_cast<const Raw*>(tensor.data);
    bool right = true;
    for (int64_t i = 0; i < kHeads * dim + kGap; ++i) {
      const bool gap = i >= dim && i < dim + kGap;
      right &= (data[i] == static_cast<Raw>(~uint64_t{0})) == gap;
    }
    return right;
  }
  bool Written() const {
    return tensor.dtype.bits == 32   ? Written<uint32_t>()
           : tensor.dtype.bits == 16 ? Written<uint16_t>()
                                     : Written<uint8_t>();
  }
};

struct Tensors {
  Tensor q, k, v, q_out, k_out, k_cache, v_cache, cos, sin, q_weight, k_weight;
  int64_t slot = 0, one = 1;
  DLTensor slots = {&slot, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &one, nullptr, 0};
};

// Makes the call. "" or which output is wrong.
std::string WrongOf(Tensors& t, DLDataType type, const ropewalk_frequencies* frequencies) {
  const bool store = now.mode >= 2, fp8 = now.mode == 3 || now.mode == 5, only = now.mode >= 4;
  const bool out = now.mode == 1 || now.mode == 3;
  const DLDataType cache_type = fp8 ? DLDataType{10, 8, 1} : type;
  ropewalk_rope_args args;
  args.pairing = static_cast<int32_t>(now.pairing);
  args.rotary_offset = now.rotary_offset;
  args.q = t.q.Make(3, now.head_dim, type, kFinite);
  args.k = t.k.Make(3, now.head_dim, type, kFinite);
  if (now.table) {
    args.cos = t.cos.Make(2, now.rotary_dim / 2, type, kFinite);
    args.sin = t.sin.Make(2, now.rotary_dim / 2, type, kFinite);
  } else {
    args.frequencies = frequencies;
  }
  if (now.norm) {
    args.q_weight = t.q_weight.Make(1, now.head_dim, type, kFinite);
    args.k_weight = t.k_weight.Make(1, now.head_dim, type, kFinite);
  }
  if (out) {
    args.q_out = t.q_out.Make(3, now.head_dim, type, kUntouched);
    args.k_out = t.k_out.Make(3, now.head_dim, type, kUntouched);
  }
  if (store) {
    args.v = t.v.Make(3, now.head_dim, type, kFinite);
    args.k_cache = t.k_cache.Make(3, now.head_dim, cache_type, kUntouched);
    args.v_cache = t.v_cache.Make(3, now.head_dim, cache_type, kUntouched);
    args.slots = &t.slots;
    args.k_store_only = only;
  }
  if (ropewalk_rope(&args, nullptr) != ROPEWALK_OK) return ropewalk_last_error();
  if (out && !t.q_out.Written()) return "q_out";
  if (out && !t.k_out.Written()) return "k_out";
  if (store && !t.k_cache.Written()) return "k_cache";
  if (store && !t.v_cache.Written()) return "v_cache";
  return "";
}

TEST(CpuParts, TheChecksSee) {
  Tensor tensor;
  now.at_end = 1;
  tensor.Make(3, 8, {kDLBfloat, 16, 1}, kUntouched);
  auto* const data = static_cast<uint16_t*>(tensor.tensor.data);
  const auto fill = [&](int64_t begin, int64_t count) { std::fill_n(data + begin, count, uint16_t{0}); };
  EXPECT_FALSE(tensor.Written());
  fill(0, 8);
  fill(8 + kGap, 7);
  EXPECT_FALSE(tensor.Written()) << "one element is not written";
  fill(8 + kGap, 8);
  EXPECT_TRUE(tensor.Written());
  fill(8 + kGap - 1, 1);
  EXPECT_FALSE(tensor.Written()) << "the gap is written";
  EXPECT_EXIT(
      {
        signal(SIGSEGV, TellOfAFault);
        *static_cast<volatile uint16_t*>(data + 16 + kGap) = 0;
      },
      testing::ExitedWithCode(1), "an access outside its tensor");
}

std::vector<PlanPart> Parts() {
  PlanDraw draw(21);
  std::vector<PlanPart> parts;
  for (int head_dim = 2; head_dim <= kMostDim; head_dim += 2) {
    // Every part of small heads, some of large ones.
    const int step = kPlansOfEach < 1000 ? 32 : head_dim <= 128 ? 2 : 2 * static_cast<int>(draw.From(5, 15));
    for (int rotary_dim = head_dim; rotary_dim > 0; rotary_dim -= step) {
      const int rest = head_dim - rotary_dim;
      parts.push_back({head_dim, rotary_dim, 0});
      if (rest) parts.push_back({head_dim, rotary_dim, draw.OneIn(2) ? rest : static_cast<int>(draw.From(1, rest))});
    }
  }
  return parts;
}

TEST(CpuParts, EveryElementIsWrittenAndNoOther) {
  constexpr DLDataType kTypes[] = {{kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}};
  const std::vector<PlanPart> parts = Parts();
  std::map<int, ropewalk_frequencies*> frequencies;
  for (const PlanPart& part : parts) {
    ropewalk_frequencies*& f = frequencies[part.rotary_dim];
    if (f) continue;
    ASSERT_EQ(ropewalk_frequencies_create(1e4, part.rotary_dim, nullptr, 0, &f), ROPEWALK_OK);
  }
  Tensors tensors;
  struct sigaction action = {}, before = {};
  action.sa_handler = TellOfAFault;
  ASSERT_EQ(sigaction(SIGSEGV, &action, &before), 0);
  int64_t calls = 0;
  PlanDraw draw(22);
  const nlohmann::json backends = nlohmann::json::parse(ropewalk_backends());
  for (const auto& target : backends.at(0).at("parts")) {
    now.target = "cpu:" + target.get<std::string>();
    ASSERT_EQ(ropewalk_force_backend(now.target.c_str()), ROPEWALK_OK) << ropewalk_last_error();
    for (const PlanPart& part : parts) {
      now.head_dim = part.head_dim;
      now.rotary_dim = part.rotary_dim;
      now.rotary_offset = part.rotary_offset;
      for (const DLDataType& type : kTypes) {
        now.bits = type.bits;
        for (unsigned choice = 0; choice < 4; ++choice) {
          now.pairing = choice % 2;
          now.norm = choice / 2;
          now.mode = static_cast<int>(draw.From(0, 5));
          now.table = draw.OneIn(2);
          for (now.at_end = 0; now.at_end < 2; ++now.at_end) {
            const std::string wrong = WrongOf(tensors, type, frequencies.at(part.rotary_dim));
            ASSERT_EQ(wrong, "") << Describe();
            ++calls;
          }
        }
      }
    }
  }
  EXPECT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK);
  ASSERT_EQ(sigaction(SIGSEGV, &before, nullptr), 0);
  for (const auto& [rotary_dim, f] : frequencies) ropewalk_frequencies_release(f);
  Report(Text(calls, " calls between pages that are not there: every part of heads up to ", kMostDim));
}

}  // namespace
}  // namespace ropewalk
