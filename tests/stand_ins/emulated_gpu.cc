// Runs kernels that emulated_nvrtc.cc compiled for the processor: with fake_libcuda.cc it makes a libcuda with a GPU of
// its own, on which conformance runs where there is none. Blocks and warps come one after the other. The 32 lanes of a
// warp are fibers that go on in turn from one place where all meet (a shuffle, __syncwarp) to the next, so that a lane
// that reads what another one has not written yet, or a warp that parts before a shuffle, is seen. Every other block
// the lanes take their turns in reverse, and asynchronous copies are made when they are asked for or when they are
// waited for: a kernel must not depend on either. A misaligned access ends the launch, with the driver's error; PTX
// that is not known here ends the process.
// SPDX-License-Identifier: Apache-2.0
#undef _FORTIFY_SOURCE  // its longjmp knows one stack
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tests/stand_ins/emulated_gpu/machine.h"
#include "tests/stand_ins/fake_libcuda.h"

namespace {

using Kernel = void(const void*);

constexpr int kLanes = 32;
constexpr int kMisalignedAddress = 716;  // of the driver
constexpr size_t kStackBytes = 256 * 1024;

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "emulated GPU: %s\n", why.c_str());
  std::abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

uint32_t Bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
float FromBits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

uint32_t ToBFloat16(float f) {
  if (std::isnan(f)) return 0x7fff;
  return (Bits(f) + 0x7fff + (Bits(f) >> 16 & 1)) >> 16;
}

uint32_t ToHalf(float f) {
  if (std::isnan(f)) return 0x7fff;
  const uint32_t sign = std::signbit(f) ? 0x8000 : 0;
  const double x = std::fabs(static_cast<double>(f));
  if (x >= 65520) return sign | 0x7c00;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), -14);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(x, 10 - exponent)));  // 1024 and more: normal
  return sign | (units < 1024 ? units : (static_cast<uint32_t>(exponent + 15) << 10) + units - 1024);
}
float FromHalf(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), units = static_cast<int>(bits & 1023);
  const double x = exponent == 31  ? (units ? NAN : INFINITY)
                   : exponent == 0 ? std::ldexp(units, -24)
                                   : std::ldexp(1024 + units, exponent - 25);
  return static_cast<float>(bits & 0x8000 ? -x : x);
}

// To nearest even, the largest finite number for what is beyond.
uint32_t ToFp8(float f, int mantissa, int bias, uint32_t largest, uint32_t nan) {
  if (std::isnan(f)) return nan;
  const uint32_t sign = std::signbit(f) ? 0x80 : 0;
  const double x = std::fabs(static_cast<double>(f));
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(std::min(x, 1e30)), 1 - bias), hidden = 1 << mantissa;
  const double units = std::nearbyint(std::ldexp(x, mantissa - exponent));
  const double code = units < hidden ? units : (exponent + bias - 1) * hidden + units;
  return sign | (code > largest ? largest : static_cast<uint32_t>(code));
}

// ---------------------------------------------------------------------------------------------------------------------
// A warp

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};

// A fiber that runs a lane of one warp, block after block. It is entered by ucontext once and by longjmp from then on:
// that asks the system for nothing, where swapcontext sets the signal mask, which was a quarter of the time.
struct Lane {
  ucontext_t context;
  jmp_buf rest;
  bool entered = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int place = 0;  // where it waits: a kind; 0: running or at its end
  bool ended = false;
  std::deque<std::vector<Copy>> groups;  // asynchronous copies that were committed
  std::vector<Copy> open;                // and that were not
};

struct Gpu : EmulatedMachine {
  std::deque<std::array<Lane, kLanes>> warps;  // of a block
  Lane* lanes = nullptr;                       // of the warp in hand
  jmp_buf scheduler;
  unsigned values[2][kLanes];  // what lanes brought, of this meeting and the one before
  unsigned meetings = 0;
  int current = 0;
  bool late_copies = false;
  bool misaligned = false;  // the launch is over
  Kernel* kernel = nullptr;
  const void* args = nullptr;
};

Gpu& TheGpu() {
  static Gpu* const gpu = new Gpu;
  return *gpu;
}

// From a lane to the scheduler, until it lets the lane go on.
void Rest(Gpu& gpu) {
  if (_setjmp(gpu.lanes[gpu.current].rest) == 0) _longjmp(gpu.scheduler, 1);
}

// A lane that is not aligned never goes on.
void CheckAligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size == 0) return;
  Gpu& gpu = TheGpu();
  gpu.misaligned = true;
  _longjmp(gpu.scheduler, 1);
}

unsigned Meet(EmulatedMachine* machine, int kind, unsigned value, int from) {
  Gpu& gpu = *static_cast<Gpu*>(machine);
  const unsigned meeting = gpu.meetings % 2;
  gpu.values[meeting][gpu.current] = value;
  gpu.lanes[gpu.current].place = kind;
  Rest(gpu);
  return gpu.values[meeting][from];
}

void RunLane() {
  Gpu& gpu = TheGpu();
  for (Lane& lane = gpu.lanes[gpu.current];;) {
    gpu.kernel(gpu.args);
    if (!lane.open.empty()) Die("a thread ends with an asynchronous copy that it has not committed");
    lane.groups.clear();
    lane.ended = true;
    Rest(gpu);
  }
}

// From the scheduler to the current lane, until it rests.
void Enter(Gpu& gpu) {
  if (_setjmp(gpu.scheduler) != 0) return;
  Lane& lane = gpu.lanes[gpu.current];
  if (lane.entered) _longjmp(lane.rest, 1);
  lane.entered = true;
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = lane.stack.get();
  lane.context.uc_stack.ss_size = kStackBytes;
  lane.context.uc_link = nullptr;
  makecontext(&lane.context, RunLane, 0);
  setcontext(&lane.context);
}

// What lanes are amid is given up.
void Abandon(Gpu& gpu) {
  for (auto& warp : gpu.warps) {
    for (Lane& lane : warp) {
      lane.entered = false;
      lane.groups.clear();
      lane.open.clear();
    }
  }
}

// Up to its end, or to where it waits for the other warps of its block. True at its end.
bool RunWarp(Gpu& gpu, unsigned warp, bool reverse) {
  gpu.lanes = gpu.warps[warp].data();
  const std::span<Lane> lanes(gpu.lanes, kLanes);
  for (Lane& lane : lanes) lane.ended = false;
  for (int ended = 0; ended == 0;) {
    for (int i = 0; i < kLanes; ++i) {
      gpu.current = reverse ? kLanes - 1 - i : i;
      gpu.thread.x = warp * kLanes + static_cast<unsigned>(gpu.current);
      Lane& lane = gpu.lanes[gpu.current];
      lane.place = 0;
      Enter(gpu);
      if (gpu.misaligned) return Abandon(gpu), true;
      ended += lane.ended;
    }
    for (const Lane& lane : lanes) {
      if (lane.place != gpu.lanes[0].place) Die("the lanes of a warp wait at different places");
    }
    ++gpu.meetings;
    if (ended == 0 && gpu.lanes[0].place == EMULATED_BARRIER) return false;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// PTX

uintptr_t shared_base = 0;  // the upper half of addresses of shared memory
unsigned long SharedAddress(const void* p) {
  shared_base = reinterpret_cast<uintptr_t>(p) >> 32 << 32;
  return reinterpret_cast<uintptr_t>(p);
}

void Ptx(EmulatedMachine* machine, const char* whole, const EmulatedOperand* operands, int count) {
  Gpu& gpu = *static_cast<Gpu*>(machine);
  Lane& lane = gpu.lanes[gpu.current];
  std::string_view text = whole;
  const auto word = [&](int i) {
    uint32_t value = 0;
    std::memcpy(&value, operands[i].address, std::min<size_t>(4, operands[i].size));
    return value;
  };
  const auto put = [&](int i, uint32_t value) { std::memcpy(operands[i].address, &value, operands[i].size); };
  const auto number = [&](int i) { return FromBits(word(i)); };
  const auto pointer = [&](int i) {
    char* p = nullptr;
    std::memcpy(&p, operands[i].address, sizeof(p));
    return p;
  };
  // Those behind a predicate, as ROPEWALK_IF writes them.
  constexpr std::string_view kIf = "{ .reg .pred p; setp.ne.u32 p, %", kThen = ", 0; @p ";
  if (text.starts_with(kIf)) {
    text.remove_prefix(kIf.size());
    const int flag = text[0] - '0';
    text.remove_prefix(1);
    if (!text.starts_with(kThen) || flag >= count) Die("unknown PTX: " + std::string(whole));
    text.remove_prefix(kThen.size());
    if (word(flag) == 0) return;
  }
  const auto is = [&](std::string_view begin) { return text.starts_with(begin); };
  const auto load = [&](int words, int size) {
    const char* from = pointer(words);
    CheckAligned(from, static_cast<size_t>(words) * static_cast<size_t>(size));
    for (int i = 0; i < words; ++i) {
      uint32_t value = 0;
      std::memcpy(&value, from + i * size, static_cast<size_t>(size));
      put(i, value);
    }
  };
  const auto store = [&](int words, int size) {
    char* to = pointer(0);
    CheckAligned(to, static_cast<size_t>(words) * static_cast<size_t>(size));
    for (int i = 0; i < words; ++i) {
      const uint32_t value = word(1 + i);
      std::memcpy(to + i * size, &value, static_cast<size_t>(size));
    }
  };
  const auto copy = [&](size_t bytes) {
    const Copy made = {reinterpret_cast<char*>(shared_base | word(0)), pointer(1), bytes};
    CheckAligned(made.to, bytes);
    CheckAligned(made.from, bytes);
    if (!gpu.late_copies) std::memcpy(made.to, made.from, bytes);
    lane.open.push_back(made);
  };
  const auto wait = [&](size_t left) {
    for (; lane.groups.size() > left; lane.groups.pop_front()) {
      if (!gpu.late_copies) continue;
      for (const Copy& late : lane.groups.front()) std::memcpy(late.to, late.from, late.bytes);
    }
  };
  const auto commit = [&] {
    lane.groups.push_back(std::move(lane.open));
    lane.open.clear();
  };
  if (text.empty() || is("griddepcontrol.")) return;
  if (is("{.reg .pred never;")) return;  // an exit that no thread takes
  if (is("cvt.s64.s32 %0, %1;")) {
    const int64_t wide = static_cast<int32_t>(word(1));
    std::memcpy(operands[0].address, &wide, sizeof(wide));
    return;
  }
  if (is("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]")) return load(4, 4);
  if (is("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2]")) return load(2, 4);
  if (is("ld.global.u32 %0, [%1]")) return load(1, 4);
  if (is("ld.global.u16 %0, [%1]")) return load(1, 2);
  if (is("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4}")) return store(4, 4);
  if (is("st.global.L1::no_allocate.v2.u32 [%0], {%1,%2}")) return store(2, 4);
  if (is("st.global.u32 [%0], %1")) return store(1, 4);
  if (is("st.global.u16 [%0], %1")) return store(1, 2);
  if (is("cp.async.cg.shared.global [%0], [%1], 16;")) return copy(16);
  if (is("cp.async.ca.shared.global [%0], [%1], %2;")) return copy(word(2));
  if (is("cp.async.commit_group;")) return commit();
  if (is("cp.async.wait_group %0;")) return wait(word(0));
  if (is("cp.async.wait_all;")) return commit(), wait(0);
  if (is("mov.u32 %0, 0;")) return put(0, 0);
  if (is("cvt.f32.f16 %0, %1;")) return put(0, Bits(FromHalf(word(1))));
  if (is("cvt.rn.bf16x2.f32 %0, %1, %2;")) return put(0, ToBFloat16(number(1)) << 16 | ToBFloat16(number(2)));
  if (is("cvt.rn.f16x2.f32 %0, %1, %2;")) return put(0, ToHalf(number(1)) << 16 | ToHalf(number(2)));
  if (is("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;")) {
    return put(0, ToFp8(number(1), 3, 7, 0x7e, 0x7f) << 8 | ToFp8(number(2), 3, 7, 0x7e, 0x7f));
  }
  if (is("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;")) {
    return put(0, ToFp8(number(1), 2, 15, 0x7b, 0x7f) << 8 | ToFp8(number(2), 2, 15, 0x7b, 0x7f));
  }
  if (is("rsqrt.approx.ftz.f32 %0, %1;")) {
    return put(0, Bits(static_cast<float>(1 / std::sqrt(static_cast<double>(number(1))))));
  }
  Die("unknown PTX: " + std::string(whole));
}

// ---------------------------------------------------------------------------------------------------------------------
// A launch

// The kernel of an image, opened once and never closed.
Kernel* Open(const std::string& image) {
  static auto* const all = new std::map<std::string, Kernel*>;
  if (const auto known = all->find(image); known != all->end()) return known->second;
  std::string path = (std::filesystem::temp_directory_path() / "emulated-XXXXXX").string();
  const int file = mkstemp(path.data());
  if (file < 0 || write(file, image.data(), image.size()) != static_cast<ssize_t>(image.size())) Die("cannot write");
  close(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) Die(dlerror());
  unlink(path.c_str());
  auto* kernel = reinterpret_cast<Kernel*>(dlsym(library, "emulated_kernel"));
  auto* machine = static_cast<EmulatedMachine**>(dlsym(library, "emulated_machine"));
  if (!kernel || !machine) Die("an image that emulated_nvrtc.cc did not make");
  *machine = &TheGpu();
  (*all)[image] = kernel;
  return kernel;
}

double Launch(const FakeLaunch& launch) {
  Gpu& gpu = TheGpu();
  gpu.meet = Meet;
  gpu.ptx = Ptx;
  gpu.check_aligned = CheckAligned;
  gpu.shared_address = SharedAddress;
  gpu.kernel = Open(launch.image);
  gpu.args = launch.function == "rope_backward_kernel" ? static_cast<const void*>(&launch.backward) : &launch.args;
  gpu.grid = {launch.grid_x, launch.grid_y, launch.grid_z};
  if (launch.block_x % kLanes != 0 || launch.block_y != 1 || launch.block_z != 1) Die("blocks of whole warps only");
  const unsigned warps = launch.block_x / kLanes;
  gpu.misaligned = false;
  while (gpu.warps.size() < warps) gpu.warps.emplace_back();
  for (unsigned y = 0; y < launch.grid_y; ++y) {
    for (unsigned x = 0; x < launch.grid_x; ++x) {
      const bool odd = (x + y) % 2 != 0;
      gpu.block = {x, y, 0};
      gpu.late_copies = odd;
      for (unsigned ended = 0; ended < warps;) {  // the warps of a block meet at each of its barriers
        ended = 0;
        for (unsigned w = 0; w < warps; ++w) {
          ended += RunWarp(gpu, odd ? warps - 1 - w : w, odd);
          if (!gpu.misaligned) continue;
          fake_cuda()->execute_result = kMisalignedAddress;
          return 0;
        }
        if (ended > 0 && ended < warps) Die("some warps of a block end while others wait for them");
      }
    }
  }
  return 0;
}

const bool kInstalled = [] {
  FakeCuda* fake = fake_cuda();
  fake->execute = Launch;
  fake->keeps_launches = false;
  return true;
}();

}  // namespace
