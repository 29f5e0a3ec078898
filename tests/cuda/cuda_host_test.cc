// The host's side of the CUDA backend, driven through the C API against a library that stands in for libcuda: what is
// launched, with which arguments, grid and attributes; caches, bundles, contexts, capture, threads; every refusal.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "backends/cuda/bundle.h"
#include "backends/cuda/cache.h"
#include "backends/cuda/driver.h"
#include "backends/cuda/nvrtc.h"
#include "backends/cuda/plan.h"
#include "backends/cuda/shapes.h"
#include "backends/cuda/tuned.h"
#include "base/files.h"
#include "base/text.h"
#include "frequencies/frequencies.h"
#include "tests/fresh_process.h"
#include "tests/stand_ins/fake_libcuda.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// Processes and environment: the driver is opened once in a process, so each scenario has its own.

// The fake libraries and a cache of this test's own; `changes` are made on top of that.
void InFreshProcess(const Environment& changes, const std::function<void()>& body) {
  InChild([&] {
    ChangeEnvironment(
        {"ROPEWALK_PDL", "ROPEWALK_BUNDLE", "ROPEWALK_CUDA_LINEINFO", "CUDA_HOME", "CUDA_PATH", "FAKE_CUDA_DEVICES",
         "FAKE_CUDA_VERSION", "FAKE_NVRTC_VERSION", "FAKE_NVRTC_FAIL", "FAKE_NVRTC_DELAY_MS"},
        {{"ROPEWALK_LIBCUDA", ROPEWALK_FAKE_LIBCUDA},
         {"ROPEWALK_LIBNVRTC", ROPEWALK_FAKE_NVRTC},
         {"ROPEWALK_CACHE_DIR", Directory() + "/cache"},
         {"FAKE_NVRTC_LOG", Directory() + "/compilations"}});
    ChangeEnvironment({}, changes);
    body();
  });
}

// Compilations of all processes since the test began.
int Compilations() {
  std::ifstream log(Directory() + "/compilations");
  int count = 0;
  for (std::string line; std::getline(log, line);) ++count;
  return count;
}

class CudaHost : public ::testing::Test {
 protected:
  void SetUp() override { fs::create_directories(Directory()); }
  void TearDown() override {
    fs::permissions(Directory(), fs::perms::owner_all);
    for (const auto& entry : fs::directory_iterator(Directory())) fs::remove_all(entry.path());
  }
  static void TearDownTestSuite() { fs::remove_all(Directory()); }
};

FakeCuda& Fake() {
  static FakeCuda& fake = FakeOf<FakeCuda>(ROPEWALK_FAKE_LIBCUDA, "fake_cuda");
  return fake;
}

// ---------------------------------------------------------------------------------------------------------------------
// A call with q, k and positions on a fake device

// Makes the driver known, so that the fake has devices to allocate on.
void StartDriver() { ASSERT_NE(ropewalk_backends(), nullptr); }

struct Call {
  DLTensor q, k, positions, offsets;
  int64_t q_shape[4], k_shape[4], positions_shape[2];
  ropewalk_frequencies* frequencies = nullptr;
  ropewalk_rope_args args;

  explicit Call(int64_t tokens = 4, int device = 0, int64_t batch = 0, double theta = 10000.0) {
    StartDriver();
    const int nd = batch ? 4 : 3;
    const auto shape = [&](int64_t* out, int64_t heads) {
      if (batch) *out++ = batch;
      *out++ = tokens;
      *out++ = heads;
      *out = 128;
    };
    shape(q_shape, 32);
    shape(k_shape, 8);
    positions_shape[0] = batch ? batch : tokens;
    positions_shape[1] = tokens;
    const auto tensor = [&](int ndim, DLDataType dtype, int64_t* sizes) {
      size_t bytes = dtype.bits / 8;
      for (int i = 0; i < ndim; ++i) bytes *= static_cast<size_t>(sizes[i]);
      return DLTensor{Fake().allocate(device, bytes), {kDLCUDA, device}, ndim, dtype, sizes, nullptr, 0};
    };
    q = tensor(nd, {kDLBfloat, 16, 1}, q_shape);
    k = tensor(nd, {kDLBfloat, 16, 1}, k_shape);
    positions = tensor(nd - 2, {kDLInt, 64, 1}, positions_shape);
    offsets = tensor(nd - 2, {kDLInt, 64, 1}, positions_shape);
    EXPECT_EQ(ropewalk_frequencies_create(theta, 128, nullptr, 0, &frequencies), ROPEWALK_OK);
    args.q = &q;
    args.k = &k;
    args.positions = &positions;
    args.frequencies = frequencies;
  }
  ~Call() { ropewalk_frequencies_release(frequencies); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  int Run(void* stream = nullptr) { return ropewalk_rope(&args, stream); }
};

void ExpectOk(int code) { EXPECT_EQ(code, ROPEWALK_OK) << ropewalk_last_error(); }
void ExpectRefused(int code, int expected, std::initializer_list<std::string_view> parts) {
  EXPECT_EQ(code, expected);
  const std::string text = ropewalk_last_error();
  for (const std::string_view part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << text << "\n  lacks: " << part;
}
std::string Explained(const ropewalk_rope_args& args) {
  const char* text = ropewalk_explain(&args);
  return text ? text : ropewalk_last_error();
}
void ExpectContains(const std::string& text, std::string_view part) {
  EXPECT_NE(text.find(part), std::string::npos) << text << "\n  lacks: " << part;
}
const FakeLaunch& Last() { return Fake().launches.back(); }

// ---------------------------------------------------------------------------------------------------------------------
// Launches

TEST_F(CudaHost, LaunchHasTheCallsArguments) {
  InFreshProcess({}, [] {
    Call call(4);
    call.args.inverse = 1;
    void* stream = Fake().create_stream(Fake().primary(0));
    ExpectOk(call.Run(stream));
    ASSERT_EQ(Fake().launches.size(), 1u);
    const FakeLaunch& launch = Last();
    EXPECT_EQ(launch.stream, stream);
    EXPECT_EQ(launch.args.q, call.q.data);
    EXPECT_EQ(launch.args.k, call.k.data);
    EXPECT_EQ(launch.args.q_out, call.q.data);
    EXPECT_EQ(launch.args.positions, call.positions.data);
    EXPECT_EQ(launch.args.offsets, nullptr);
    EXPECT_EQ(launch.args.cos, nullptr);
    EXPECT_EQ(launch.args.axes, nullptr);
    EXPECT_EQ(launch.args.params.tokens, 4);
    EXPECT_EQ(launch.args.params.q_heads, 32);
    EXPECT_EQ(launch.args.params.k_heads, 8);
    EXPECT_EQ(launch.args.params.q.token, 32 * 128);
    ASSERT_NE(launch.args.turns, nullptr);
    EXPECT_EQ(std::memcmp(launch.args.turns, call.frequencies->turns.data(), 64 * sizeof(uint64_t)), 0);
    ASSERT_NE(launch.args.fault, nullptr);
    EXPECT_EQ(launch.args.fault->key, ~rw_u64{0});

    RopeCall lowered;
    RopeCudaPlan plan;
    ASSERT_TRUE(LowerRope(call.args, stream, &lowered).ok());
    ASSERT_TRUE(PlanRopeCuda(lowered, {132, 9, 0}, {.dependent_launch = true}, &plan).ok());
    EXPECT_EQ(launch.grid_x, plan.grid_x);
    EXPECT_EQ(launch.grid_y, plan.grid_y);
    EXPECT_EQ(launch.grid_z, 1u);
    EXPECT_EQ(launch.block_x, plan.key.threads);
    EXPECT_EQ(launch.block_y * launch.block_z, 1u);
    EXPECT_EQ(launch.shared_bytes, 0u);
    EXPECT_TRUE(launch.dependent);
    ExpectContains(launch.image, "--gpu-architecture=sm_90a");
    ExpectContains(launch.image, RopeCudaSource(plan.key));
    EXPECT_EQ(Fake().context_depth(), 0);
  });
}

// What is kept of a call serves the next of its shape: with its own addresses and stream, in its own context and
// layout.
TEST_F(CudaHost, CallsOfOneShapeKeepTheirOwnAddresses) {
  InFreshProcess({}, [] {
    Call first, second;
    void* streams[] = {nullptr, Fake().create_stream(Fake().primary(0))};
    second.args.frequencies = first.frequencies;
    for (int i = 0; i < 8; ++i) {
      Call& call = i % 2 ? second : first;
      void* const stream = streams[i / 2 % 2];
      ExpectOk(call.Run(stream));
      EXPECT_EQ(Last().stream, stream) << i;
      EXPECT_EQ(Last().args.q, call.q.data) << i;
      EXPECT_EQ(Last().args.q_out, call.q.data) << i;
      EXPECT_EQ(Last().args.k, call.k.data) << i;
      EXPECT_EQ(Last().args.positions, call.positions.data) << i;
      EXPECT_EQ(Last().args.turns, Fake().launches.front().args.turns) << i;
    }
    const std::string few = Last().image;
    ExpectOk(ropewalk_force_backend("cuda:many"));
    ExpectOk(first.Run());
    EXPECT_NE(Last().image, few) << "another layout was forced meanwhile";
    ExpectOk(ropewalk_force_backend(nullptr));
    ExpectOk(first.Run());
    EXPECT_EQ(Last().image, few);

    second.args.frequencies = second.frequencies;  // others, of the same content
    second.args.eps = 1e-5;                        // matters not without a norm
    ExpectOk(second.Run());
    EXPECT_EQ(Last().args.turns, Fake().launches.front().args.turns);

    // As if k lay in q: a call like those before, but for that.
    second.k.data = second.q.data;
    ExpectRefused(second.Run(), ROPEWALK_INVALID_ARGUMENT, {"k must not share memory with q"});
    second.k.data = static_cast<char*>(Fake().allocate(0, 1 << 16)) + 2;  // and one whose accesses must be narrower
    ExpectOk(second.Run());
    EXPECT_NE(Last().image, few);
    EXPECT_EQ(Last().args.k, second.k.data);
  });
}

TEST_F(CudaHost, DependentLaunchOnlyWhereAllowed) {
  const auto plain = [] {
    Call call;
    ExpectOk(call.Run());
    EXPECT_FALSE(Last().dependent);
    EXPECT_EQ(Explained(call.args).find("\"dependent launch\": \"yes\""), std::string::npos);
  };
  InFreshProcess({{"ROPEWALK_PDL", "0"}}, plain);
  InFreshProcess({{"FAKE_CUDA_DEVICES", "86"}}, plain);
}

TEST_F(CudaHost, WarmCallAsksTheDriverTwice) {
  InFreshProcess({}, [] {
    Call call;
    Fake().set_current(Fake().primary(0));
    ExpectOk(call.Run());
    Fake().calls.clear();
    ExpectOk(call.Run());
    EXPECT_EQ(Fake().calls.size(), 2u);
    EXPECT_EQ(Fake().calls["cuCtxGetCurrent"], 1);
    EXPECT_EQ(Fake().calls["cuLaunchKernelEx"], 1);
    ExpectContains(ropewalk_counters(), Text("\": 2"));
  });
}

TEST_F(CudaHost, NoTokensIsNoWork) {
  InFreshProcess({}, [] {
    Call call(0);
    Fake().calls.clear();
    ExpectOk(call.Run());
    ExpectOk(ropewalk_prepare(&call.args));
    EXPECT_TRUE(Fake().calls.empty());
    ExpectContains(Explained(call.args), "there is no work");
  });
}

TEST_F(CudaHost, AxesOfTheFrequenciesAreOnTheDevice) {
  InFreshProcess({}, [] {
    Call call(4);
    std::vector<double> inv_freq(64, 0.5);
    std::vector<int32_t> axes(64);
    for (size_t i = 0; i < 64; ++i) axes[i] = static_cast<int32_t>(i % 3);
    ropewalk_frequencies* mapped = nullptr;
    ExpectOk(ropewalk_frequencies_from_array(inv_freq.data(), 64, 1.0, axes.data(), &mapped));
    int64_t shape[] = {3, 4};
    call.positions.ndim = 2;
    call.positions.shape = shape;
    call.positions.data = Fake().allocate(0, 3 * 4 * 8);
    call.args.frequencies = mapped;
    ExpectOk(call.Run());
    ASSERT_NE(Last().args.axes, nullptr);
    EXPECT_EQ(std::memcmp(Last().args.axes, axes.data(), 64 * sizeof(int32_t)), 0);
    EXPECT_EQ(std::memcmp(Last().args.turns, mapped->turns.data(), 64 * sizeof(uint64_t)), 0);
    ropewalk_frequencies_release(mapped);
  });
}

TEST_F(CudaHost, EqualFrequenciesShareACopy) {
  InFreshProcess({}, [] {
    Call first, second, other(4, 0, 0, 5e5);
    ExpectOk(first.Run());
    ExpectOk(second.Run());
    EXPECT_EQ(Fake().launches[0].args.turns, Fake().launches[1].args.turns);
    ExpectOk(other.Run());
    EXPECT_NE(Last().args.turns, Fake().launches[0].args.turns);
    const int allocations = Fake().calls["cuMemAlloc_v2"];
    // More than there are places by id: a new one takes an old one's, and both stay right.
    for (int i = 0; i < 3000; ++i) {
      ropewalk_frequencies* made = nullptr;
      ASSERT_EQ(ropewalk_frequencies_create(i % 2 ? 10000.0 : 5e5, 128, nullptr, 0, &made), ROPEWALK_OK);
      first.args.frequencies = made;
      ASSERT_EQ(first.Run(), ROPEWALK_OK);
      EXPECT_EQ(std::memcmp(Last().args.turns, made->turns.data(), 64 * sizeof(uint64_t)), 0);
      ropewalk_frequencies_release(made);
    }
    ExpectOk(second.Run());
    EXPECT_EQ(Fake().launches[0].args.turns, Last().args.turns);
    EXPECT_EQ(Fake().calls["cuMemAlloc_v2"], allocations);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Caches

TEST_F(CudaHost, OneProcessCompilesAnotherReadsTheDisk) {
  const auto source_is = [](std::string cold, std::string warm) {
    return [cold, warm] {
      Call call;
      ExpectContains(Explained(call.args), Text("\"source\": \"", cold));
      ExpectOk(call.Run());
      const std::string text = Explained(call.args);
      ExpectContains(text, Text("\"source\": \"memory, from ", warm));
      ExpectContains(text, "\"registers\": \"32\"");
    };
  };
  InFreshProcess({}, source_is("would be compiled now by NVRTC", "compiled by NVRTC 13.0"));
  EXPECT_EQ(Compilations(), 1);
  InFreshProcess({}, source_is("disk ", "disk "));
  EXPECT_EQ(Compilations(), 1);
  // Another architecture, another compiler, no cache: compiled.
  InFreshProcess({{"FAKE_CUDA_DEVICES", "80"}}, source_is("would be", "compiled"));
  EXPECT_EQ(Compilations(), 2);
  const std::string copy = Directory() + "/libfake_nvrtc.so.12.9";
  fs::copy_file(ROPEWALK_FAKE_NVRTC, copy);
  InFreshProcess({{"ROPEWALK_LIBNVRTC", copy}}, source_is("would be", "compiled"));
  EXPECT_EQ(Compilations(), 3);
  InFreshProcess({{"ROPEWALK_CACHE_DIR", ""}}, source_is("would be", "compiled"));
  EXPECT_EQ(Compilations(), 4);
}

// What `ropewalk tune` keeps serves every later process on such a device, and no other.
TEST_F(CudaHost, TunedShapesServeLaterProcesses) {
  const auto plan_is = [](std::string origin, std::string part) {
    return [origin, part] {
      Call call;
      const std::string text = Explained(call.args);
      ExpectContains(text, Text("\"plan\": \"", origin));
      const size_t shape = text.find("\"shape\": \"");
      ASSERT_NE(shape, std::string::npos) << text;
      const std::string numbers = text.substr(shape + 10, text.find('"', shape + 10) - shape - 10);
      EXPECT_EQ(std::ranges::count(numbers, ' '), 9) << numbers;  // ten of them
      ExpectContains(text, part);
      ExpectOk(call.Run());
    };
  };
  InFreshProcess({}, plan_is("model", " few "));
  InFreshProcess({}, [] {
    Call call;
    RopeCall lowered;
    ASSERT_TRUE(LowerRope(call.args, nullptr, &lowered).ok());
    const CudaDriver& driver = GetCudaDriver();
    RopeCudaTuned::Entry entry;
    entry.features = FeaturesOf(lowered, driver.devices[0].properties);
    entry.shape.few = 1;
    entry.shape.vector = 4;
    entry.shape.in_flight = 2;
    entry.shape.cut = 5;
    std::string path;
    ASSERT_TRUE(KeepTunedShapes(driver.devices[0].name, driver.version, {entry, entry}, &path).ok());
    EXPECT_TRUE(fs::exists(path)) << path;
    entry.shape.vector = 8;
    ASSERT_TRUE(KeepTunedShapes(driver.devices[0].name, driver.version, {entry}, &path).ok());
    EXPECT_EQ(LoadTunedShapes(driver.devices[0].name, driver.version)->entries.size(), 1u) << "the same call";
    const RopeCudaFeatures read = LoadTunedShapes(driver.devices[0].name, driver.version)->entries[0].features;
    EXPECT_NEAR(read.lanes, entry.features.lanes, 1e-4);
    EXPECT_NEAR(read.bytes, entry.features.bytes, 1e-4);
    EXPECT_NEAR(read.turns, entry.features.turns, 1e-4);
    EXPECT_NEAR(read.tokens, entry.features.tokens, 1e-4);
    const auto parsed =
        ParseTunedShapes("1 0 4 1 0.0000 -0.5000 3 12.3456 0 0 3 1 2 1 2 0 1 3\n");  // whatever the locale
    ASSERT_EQ(parsed.size(), 1u);
    EXPECT_EQ(parsed[0].features.bytes, -0.5f);
    EXPECT_EQ(parsed[0].features.tokens, 12.3456f);
    for (const char* wrong :
         {"1 0 4 1 0,0000 -0,5000 3 12,3456 0 0 3 1 2 1 2 0 1 3\n", "1 0 4 1 0.0 1 3 12 0 0 3 1 2 1 2 0 1\n",
          "1 0 4 1 0.0 1 3 12 0 0 3 1 2 1 2 0 1 3 4\n", "1 0 4 1 nan 1 3 12 0 0 3 1 2 1 2 0 1 3\n",
          " 1 0 4 1 1 1 3 12 0 0 3 1 2 1 2 0 1 3\n", "1 0 4 1 1 1 3 12 0 0 3 1 2 1 2 0 1 333\n"}) {
      EXPECT_TRUE(ParseTunedShapes(wrong).empty()) << wrong;
    }
    EXPECT_EQ(LoadTunedShapes("another device", driver.version), nullptr);
    EXPECT_EQ(LoadTunedShapes(driver.devices[0].name, driver.version + 10), nullptr);
  });
  InFreshProcess({}, plan_is("tuned here", " few v8 "));
  // Other tokens are another call; nor does a changed file serve, nor one that is gone.
  InFreshProcess({}, [] {
    Call call(4096);
    EXPECT_EQ(Explained(call.args).find("tuned here"), std::string::npos);
  });
  for (const auto& file : fs::recursive_directory_iterator(Directory())) {
    if (file.path().extension() != ".shapes") continue;
    std::fstream(file.path(), std::ios::in | std::ios::out | std::ios::binary).seekp(-3, std::ios::end) << '9';
  }
  InFreshProcess({}, plan_is("model", " few "));
}

TEST_F(CudaHost, DamagedFilesAreASlowStart) {
  const auto run = [] {
    Call call;
    ExpectOk(call.Run());
  };
  InFreshProcess({}, run);
  ASSERT_EQ(Compilations(), 1);
  fs::path file;
  for (const auto& entry : fs::directory_iterator(Directory() + "/cache")) file = entry.path();
  ASSERT_EQ(file.extension(), ".cubin");
  std::string good;
  ASSERT_EQ(ReadFile(file.string(), Trust::kOwn, 1 << 20, &good), "");

  std::vector<std::string> bad = {"", good.substr(0, 20), good.substr(0, good.size() - 1), good + "x",
                                  "no such file at all"};
  for (const size_t at : {size_t{0}, size_t{9}, size_t{17}, size_t{30}, size_t{60}, good.size() - 5}) {
    bad.push_back(good);
    bad.back()[at] = static_cast<char>(bad.back()[at] ^ 1);
  }
  // Whole, but of another kernel.
  std::string_view identity, payload;
  ASSERT_TRUE(Unseal(good, "RWCUBIN1", &identity, &payload));
  bad.push_back(Sealed("RWCUBIN1", std::string(identity) + " ", payload));
  int expected = 1;
  for (const std::string& bytes : bad) {
    std::ofstream(file, std::ios::trunc | std::ios::binary) << bytes;
    InFreshProcess({}, run);
    EXPECT_EQ(Compilations(), ++expected) << bytes.size();
    InFreshProcess({}, run);  // and repaired
    EXPECT_EQ(Compilations(), expected) << bytes.size();
  }
  // A directory in its place, and places where nothing can be written.
  fs::remove(file);
  fs::create_directory(file);
  InFreshProcess({}, run);
  EXPECT_EQ(Compilations(), ++expected);
  for (const char* place : {"/proc/ropewalk", "/dev/null/cache"}) {
    InFreshProcess({{"ROPEWALK_CACHE_DIR", place}}, [&] {
      run();
      ExpectContains(ropewalk_backends(), "not written: cannot create");
    });
    EXPECT_EQ(Compilations(), ++expected);
  }
}

// A file of the cache is code: one that others could have written is compiled again, and so is what is no plain file of
// a sane size, without waiting for it or reading it.
TEST_F(CudaHost, OnlyFilesOfItsOwnAreLoaded) {
  const std::string cache = Directory() + "/cache";
  const auto run = [] {
    umask(0);
    Call call;
    ExpectOk(call.Run());
  };
  const auto mode = [](const std::string& path) {
    struct stat status = {};
    EXPECT_EQ(stat(path.c_str(), &status), 0);
    return status.st_mode & 07777u;
  };
  InFreshProcess({}, run);
  ASSERT_EQ(Compilations(), 1);
  std::string file;
  for (const auto& entry : fs::directory_iterator(cache)) file = entry.path().string();
  EXPECT_EQ(mode(cache), 0700u);
  EXPECT_EQ(mode(file), 0600u);

  int expected = 1;
  const auto spoiled = [&](const char* what, const std::function<void()>& spoil) {
    SCOPED_TRACE(what);
    spoil();
    InFreshProcess({}, run);
    EXPECT_EQ(Compilations(), ++expected);
    InFreshProcess({}, run);  // and repaired
    EXPECT_EQ(Compilations(), expected);
  };
  spoiled("of mode 0620", [&] { chmod(file.c_str(), 0620); });
  spoiled("of mode 0602", [&] { chmod(file.c_str(), 0602); });
  spoiled("a FIFO", [&] {
    unlink(file.c_str());
    ASSERT_EQ(mkfifo(file.c_str(), 0600), 0);
  });
  spoiled("of 1 TB", [&] { ASSERT_EQ(truncate(file.c_str(), off_t{1} << 40), 0); });
  constexpr uid_t kNobody = 65534;
  if (geteuid() == 0) spoiled("another user's", [&] { ASSERT_EQ(chown(file.c_str(), kNobody, 0), 0); });

  // A directory that others may write is neither read nor written.
  const auto unused = [&](const char* why) {
    for (int i = 0; i < 2; ++i) {
      InFreshProcess({}, [&] {
        run();
        ExpectContains(ropewalk_backends(), Text(cache, ", not used: ", why));
      });
      EXPECT_EQ(Compilations(), ++expected) << why;
    }
  };
  for (const mode_t wrong : {0777u, 0770u, 0702u, 01777u}) {
    chmod(cache.c_str(), wrong);
    unused("others may write it");
  }
  chmod(cache.c_str(), 0700);
  if (geteuid() == 0) {
    ASSERT_EQ(chown(cache.c_str(), kNobody, 0), 0);
    unused("it belongs to another user (65534)");
    ASSERT_EQ(chown(cache.c_str(), 0, 0), 0);
  }
  InFreshProcess({}, run);
  EXPECT_EQ(Compilations(), expected);
}

// A child that is forked while other threads compile and launch does not wait for them.
TEST_F(CudaHost, ForksWhileThreadsCompile) {
  InFreshProcess({{"FAKE_NVRTC_DELAY_MS", "300"}}, [] {
    // Before the threads: a child that is forked while one of them loads an OpenCL driver hangs in the C library's own
    // lock over exit handlers when it loads one too.
    StartDriver();
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([i] {
        Call call(i == 0 ? 1 : 4096);
        ExpectOk(call.Run());
      });
    }
    for (int i = 0; i < 20; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const pid_t child = fork();
      if (child == 0) {
        alarm(20);
        Call call(4096);
        const bool ok = call.Run() == ROPEWALK_OK && ropewalk_check_faults() == ROPEWALK_OK && ropewalk_counters();
        _exit(ok ? 0 : 1);
      }
      int status = -1;
      waitpid(child, &status, 0);
      EXPECT_EQ(status, 0) << "fork " << i;
    }
    for (std::thread& thread : threads) thread.join();
  });
}

TEST_F(CudaHost, FileThatTheDriverRefusesIsCompiledAgain) {
  InFreshProcess({}, [] {
    Call call;
    ExpectOk(call.Run());
  });
  InFreshProcess({}, [] {
    Call call;
    Fake().refused_images = 1;
    ExpectOk(call.Run());
    ExpectContains(Explained(call.args), "memory, from compiled");
  });
  EXPECT_EQ(Compilations(), 2);
  InFreshProcess({{"FAKE_CUDA_VERSION", "12040"}}, [] {
    Call call;
    Fake().refused_images = 2;
    ExpectRefused(
        call.Run(), ROPEWALK_DRIVER_ERROR,
        {"cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE", "the driver is for CUDA 12.4", "ROPEWALK_LIBNVRTC"});
  });
}

TEST_F(CudaHost, ManyProcessesAtOnce) {
  InFreshProcess({{"FAKE_NVRTC_DELAY_MS", "20"}}, [] {
    std::vector<pid_t> children;
    for (int i = 0; i < 6; ++i) {
      children.push_back(fork());
      if (children.back() != 0) continue;
      Call few(1), many(4096);
      const bool ok = few.Run() == ROPEWALK_OK && many.Run() == ROPEWALK_OK;
      _exit(ok ? 0 : 1);
    }
    for (const pid_t child : children) {
      int status = -1;
      waitpid(child, &status, 0);
      EXPECT_EQ(status, 0);
    }
  });
  int files = 0;
  for (const auto& entry : fs::directory_iterator(Directory() + "/cache")) {
    std::string bytes;
    std::string_view identity, payload;
    EXPECT_EQ(ReadFile(entry.path().string(), Trust::kOwn, 1 << 20, &bytes), "");
    EXPECT_TRUE(Unseal(bytes, "RWCUBIN1", &identity, &payload)) << entry.path();
    ++files;
  }
  EXPECT_EQ(files, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bundles

// A bundle for the architecture with what Call needs, few tokens and many.
void MakeBundle(const std::string& arch, const std::string& directory) {
  Call call;
  RopeCall lowered;
  ASSERT_TRUE(LowerRope(call.args, nullptr, &lowered).ok());
  std::vector<CudaDevice> devices;
  ASSERT_TRUE(BundleDevices(arch, &devices).ok());
  std::vector<RopeCudaKey> keys;
  ASSERT_TRUE(CollectBundleKeys(lowered, devices, 8192, &keys).ok());
  EXPECT_GE(keys.size(), 2u);
  EXPECT_LE(keys.size(), 32u);
  size_t steps = 0;
  BundleReport report;
  const Status status = WriteBundle(
      keys, arch, directory, [&](size_t, const RopeCudaKey&) { ++steps; }, &report);
  ASSERT_TRUE(status.ok()) << status.text();
  EXPECT_EQ(steps, keys.size());
  EXPECT_EQ(report.kernels, keys.size());
}

TEST_F(CudaHost, BundleServesWithoutACompiler) {
  const std::string bundles = Directory() + "/b";
  InFreshProcess({}, [&] { MakeBundle("sm_90a", bundles); });
  const int compiled = Compilations();
  for (const std::string& name : {bundles, bundles + "/ropewalk-sm_90a.bundle"}) {
    InFreshProcess({{"ROPEWALK_BUNDLE", name}, {"ROPEWALK_LIBNVRTC", "/nowhere/libnvrtc.so"}}, [&] {
      Call few(1), many(4096);
      ExpectContains(Explained(few.args), Text("\"source\": \"bundle ", bundles, "/ropewalk-sm_90a.bundle"));
      ExpectOk(few.Run());
      ExpectOk(many.Run());
      ExpectContains(ropewalk_backends(), "(sm_90a, ");
      ExpectContains(ropewalk_backends(), "\"name\": \"cuda\", \"available\": true");
      few.args.norm = ROPEWALK_NORM_RMS;
      ExpectRefused(few.Run(), ROPEWALK_UNAVAILABLE,
                    {"no kernel for this call (bfloat16 neox rms", "/nowhere/libnvrtc.so (ROPEWALK_LIBNVRTC)",
                     "does not hold this variant"});
    });
  }
  EXPECT_EQ(Compilations(), compiled);
  InFreshProcess({}, [&] {
    BundleReport report;
    std::vector<CudaDevice> devices;
    EXPECT_EQ(BundleDevices("sm_70", &devices).text(),
              "compile: arch must be one of sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_103a, sm_120a, but is \"sm_70\"");
    EXPECT_FALSE(WriteBundle({}, "sm_90a", "/proc/nowhere", {}, &report).ok());
  });
}

TEST_F(CudaHost, BundlesAreRefusedWithTheReason) {
  const std::string bundles = Directory() + "/b", file = bundles + "/ropewalk-sm_80.bundle";
  InFreshProcess({}, [&] { MakeBundle("sm_80", bundles); });
  const auto refused = [&](std::string_view reason) {
    InFreshProcess({{"ROPEWALK_BUNDLE", bundles}, {"ROPEWALK_LIBNVRTC", "/nowhere/libnvrtc.so"}}, [&] {
      Call call;
      ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE, {reason, file});
      EXPECT_NE(ropewalk_prepare(&call.args), ROPEWALK_OK);
      ExpectContains(Explained(call.args), reason);
      ExpectContains(ropewalk_backends(), "\"name\": \"cuda\", \"available\": false");
    });
  };
  refused("has kernels for sm_80, but the GPU is sm_90");
  // The same major version: serves.
  InFreshProcess({{"ROPEWALK_BUNDLE", bundles}, {"ROPEWALK_LIBNVRTC", "/nowhere/x"}, {"FAKE_CUDA_DEVICES", "86"}}, [] {
    Call call;
    ExpectOk(call.Run());
  });

  std::string good;
  ASSERT_EQ(ReadFile(file, Trust::kOwn, 1 << 20, &good), "");
  std::string_view identity, payload;
  ASSERT_TRUE(Unseal(good, "RWBUNDL1", &identity, &payload));
  const auto changed = [&](std::string_view from, std::string_view to) {
    std::string text(identity);
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos);
    return Sealed("RWBUNDL1", text.replace(at, from.size(), to), payload);
  };
  const auto put = [&](const std::string& bytes) { std::ofstream(file, std::ios::trunc | std::ios::binary) << bytes; };
  put(changed(Text("ropewalk ", ropewalk_version()), "ropewalk 9.9.9"));
  refused(Text("it was made by Ropewalk 9.9.9, but this is ", ropewalk_version()));
  put(changed(kCudaSourceDigest, std::string(64, '0')));
  refused("it was made from other kernel sources (000000000000), but this library has");
  put(good.substr(0, good.size() / 2));
  refused("it is damaged, or no bundle");
  put(Sealed("RWBUNDL1", identity, payload.substr(0, payload.size() - 3)));
  refused("it is damaged");
  put(good);
  for (const mode_t mode : {0664u, 0646u}) {
    chmod(file.c_str(), mode);
    refused("others may write it (chmod go-w)");
  }
  chmod(file.c_str(), 0644);
  chmod(bundles.c_str(), 0777);
  refused("others may write its directory (chmod go-w)");
  chmod(bundles.c_str(), 0755);
  ASSERT_EQ(truncate(file.c_str(), off_t{1} << 40), 0);
  refused("it is larger than 1024 MiB");
  fs::remove(file);
  ASSERT_EQ(mkfifo(file.c_str(), 0600), 0);
  refused("it is no regular file");
  fs::remove(file);
  InFreshProcess({{"ROPEWALK_BUNDLE", file}, {"ROPEWALK_LIBNVRTC", "/nowhere/libnvrtc.so"}}, [&] {
    Call call;
    ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE, {"it cannot be read"});
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The compiler

TEST_F(CudaHost, CompilerRefusals) {
  InFreshProcess({{"ROPEWALK_LIBNVRTC", "/nowhere/libnvrtc.so"}}, [] {
    Call call;
    ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE,
                  {"NVRTC, the compiler of CUDA kernels, was not found", "/nowhere/libnvrtc.so (ROPEWALK_LIBNVRTC)",
                   "no bundle was found: ROPEWALK_BUNDLE is not set", "ropewalk compile"});
  });
  InFreshProcess({{"FAKE_NVRTC_VERSION", "11.8"}}, [] {
    Call call;
    ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE,
                  {ROPEWALK_FAKE_NVRTC, "is version 11.8, but 12.0 or newer is needed"});
  });
  InFreshProcess({{"ROPEWALK_LIBNVRTC", ROPEWALK_FAKE_LIBCUDA}}, [] {
    Call call;
    ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE, {"has no nvrtc"});
  });
  InFreshProcess({{"FAKE_NVRTC_FAIL", "1"}}, [] {
    Call call;
    for (int i = 0; i < 2; ++i) {
      ExpectRefused(
          call.Run(), ROPEWALK_DRIVER_ERROR,
          {"nvrtcCompileProgram failed: NVRTC_ERROR_COMPILATION in NVRTC 13.0 (", "for sm_90a", "error: a fake error"});
    }
    setenv("FAKE_NVRTC_FAIL", "0", 1);
    ExpectOk(call.Run());
  });
  // An option that only newer ones know.
  for (const char* version : {"12.3", "12.4", "13.0"}) {
    InFreshProcess({{"FAKE_NVRTC_VERSION", version}, {"ROPEWALK_CACHE_DIR", Directory() + "/" + version}}, [&] {
      Call call;
      ExpectOk(call.Run());
      EXPECT_EQ(Last().image.find(" -minimal ") != std::string::npos, std::string(version) != "12.3") << version;
    });
  }
  // Newer than the compiler: the nearest architecture that runs there; else a refusal.
  InFreshProcess({{"FAKE_CUDA_DEVICES", "121"}}, [] {
    Call call;
    ExpectOk(call.Run());
    ExpectContains(Last().image, "--gpu-architecture=sm_120\n");
  });
  const int compiled = Compilations();
  InFreshProcess({{"FAKE_CUDA_DEVICES", "121"}}, [] {
    Call call;
    ExpectContains(Explained(call.args), "\"source\": \"disk ");
    ExpectOk(call.Run());
  });
  EXPECT_EQ(Compilations(), compiled);
  InFreshProcess({{"FAKE_CUDA_DEVICES", "130"}}, [] {
    Call call;
    ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE, {"cannot compile for sm_130"});
  });
}

// Where NVIDIA's wheels put it, beside a library of another package that is loaded; then where the environment says.
TEST_F(CudaHost, CompilerIsFoundWithoutBeingNamed) {
  const std::string packages = Directory() + "/lib/python3.99/site-packages";
  const auto put = [&](const char* from, const std::string& to) {
    fs::create_directories(fs::path(to).parent_path());
    fs::copy_file(from, to);
    return to;
  };
  const std::string loaded = put(ROPEWALK_FAKE_LIBCUDA, packages + "/torch/lib/libtorch_fake.so");
  const std::string home = put(ROPEWALK_FAKE_NVRTC, Directory() + "/home/lib64/libnvrtc.so.12");
  const std::string path = put(ROPEWALK_FAKE_NVRTC, Directory() + "/path/libnvrtc.so");
  const auto found = [&](const std::string& where, bool beside_torch) {
    return [&loaded, where, beside_torch] {
      EXPECT_TRUE(!beside_torch || dlopen(loaded.c_str(), RTLD_NOW));
      Call call;
      ExpectContains(Explained(call.args), Text("would be compiled now by NVRTC 13.0 (", where, ")"));
      ExpectOk(call.Run());
    };
  };
  const Environment unnamed = {{"ROPEWALK_LIBNVRTC", ""}, {"ROPEWALK_CACHE_DIR", ""}, {"LD_LIBRARY_PATH", ""}};
  const auto with = [&](Environment more) {
    more.insert(more.end(), unnamed.begin(), unnamed.end() - (more.empty() ? 0 : 1));
    return more;
  };
  const std::string wheel12 = put(ROPEWALK_FAKE_NVRTC, packages + "/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
  InFreshProcess(with({}), found(wheel12, true));
  const std::string wheel13 = put(ROPEWALK_FAKE_NVRTC, packages + "/nvidia/cu13/lib/libnvrtc.so.13");
  InFreshProcess(with({}), found(wheel13, true));
  const std::string colons = Text("/nowhere::", Directory(), "/path");
  InFreshProcess(with({{"LD_LIBRARY_PATH", colons}}), found(path, false));
  InFreshProcess(with({{"LD_LIBRARY_PATH", ""}, {"CUDA_HOME", Directory() + "/home"}}), found(home, false));
  // The first does not serve (it is no library): the next one does.
  fs::resize_file(path, 100);
  InFreshProcess(with({{"LD_LIBRARY_PATH", colons}, {"CUDA_HOME", Directory() + "/home"}}), found(home, false));
  // One that is loaded already comes before all.
  const std::string already = put(ROPEWALK_FAKE_NVRTC, Directory() + "/libnvrtc-0123abcd.so.12");
  InFreshProcess(with({}), [&] {
    EXPECT_TRUE(dlopen(already.c_str(), RTLD_NOW));
    found(already, true)();
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals

TEST_F(CudaHost, DriverAbsentOrUnusable) {
  const auto refused = [](std::initializer_list<std::string_view> parts) {
    int64_t shape[] = {4, 32, 128};
    alignas(64) static char data[4 * 32 * 128 * 2];
    DLTensor q = {data, {kDLCUDA, 0}, 3, {kDLBfloat, 16, 1}, shape, nullptr, 0};
    ropewalk_rope_args args;
    ExpectOk(ropewalk_frequencies_create(1e4, 128, nullptr, 0, const_cast<ropewalk_frequencies**>(&args.frequencies)));
    args.q = &q;
    ExpectRefused(ropewalk_rope(&args, nullptr), ROPEWALK_UNAVAILABLE, parts);
    EXPECT_EQ(ropewalk_prepare(&args), ROPEWALK_UNAVAILABLE);
    EXPECT_EQ(ropewalk_explain(&args), nullptr);
    EXPECT_EQ(ropewalk_force_backend("cuda"), ROPEWALK_UNAVAILABLE);
    ExpectContains(ropewalk_backends(), "\"name\": \"cuda\", \"available\": false");
    ExpectOk(ropewalk_check_faults());
    // The CPU still serves.
    q.device = {kDLCPU, 0};
    ExpectOk(ropewalk_rope(&args, nullptr));
  };
  InFreshProcess({{"ROPEWALK_LIBCUDA", "/nowhere/libcuda.so.1"}}, [&] {
    refused({"CUDA is not available", "ROPEWALK_LIBCUDA names /nowhere/libcuda.so.1", "install the NVIDIA driver"});
  });
  InFreshProcess({{"ROPEWALK_LIBCUDA", ROPEWALK_FAKE_NVRTC}}, [&] { refused({"is too old: it has no cuInit"}); });
  InFreshProcess({{"FAKE_CUDA_DEVICES", "none"}}, [&] {
    refused({"cuInit failed: CUDA_ERROR_NO_DEVICE", "nvidia-smi"});
  });
  InFreshProcess({{"FAKE_CUDA_DEVICES", "75"}},
                 [&] { refused({"cuda:0 (Fake GPU, sm_75), but sm_80 or newer is needed"}); });
}

TEST_F(CudaHost, DevicesOfTheTensors) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,75,90"}}, [] {
    Call call;
    const auto on = [&](int device) {
      for (DLTensor* tensor : {&call.q, &call.k, &call.positions}) tensor->device.device_id = device;
    };
    for (const int device : {3, -1}) {
      on(device);
      ExpectRefused(call.Run(), ROPEWALK_INVALID_ARGUMENT,
                    {Text("q is on cuda:", device, ", but this machine has 3 CUDA devices")});
    }
    on(1);
    ExpectRefused(call.Run(), ROPEWALK_UNAVAILABLE, {"q is on cuda:1 (Fake GPU, sm_75)"});
    on(2);
    ExpectRefused(call.Run(), ROPEWALK_INVALID_ARGUMENT, {"q is said to be on cuda:2, but its data is on cuda:0"});
    on(0);
    ExpectOk(call.Run());
    alignas(256) static char host[4 * 8 * 128 * 2];
    call.k.data = host;
    ExpectRefused(call.Run(), ROPEWALK_INVALID_ARGUMENT, {"k is said to be on cuda:0, but its data is in host memory"});
    EXPECT_EQ(Fake().launches.size(), 1u);
    call.k.device = {kDLCUDA, 2};
    ExpectRefused(call.Run(), ROPEWALK_INVALID_ARGUMENT, {"k", "cuda:2"});  // the core's own check
  });
}

TEST_F(CudaHost, StreamOfAnotherDevice) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,90"}}, [] {
    Call call;
    void* other = Fake().create_stream(Fake().primary(1));
    ExpectRefused(call.Run(other), ROPEWALK_INVALID_ARGUMENT, {"q is on cuda:0, but the stream is one of cuda:1"});
    void* elsewhere = Fake().create_stream(Fake().create_context(0));
    ExpectRefused(call.Run(elsewhere), ROPEWALK_INVALID_ARGUMENT, {"belongs to another context of cuda:0"});
    EXPECT_EQ(Fake().context_depth(), 0);
    ExpectOk(call.Run());
  });
}

TEST_F(CudaHost, CaptureNeedsPrepare) {
  InFreshProcess({}, [] {
    Call call;
    void* stream = Fake().create_stream(Fake().primary(0));
    Fake().capture(stream, true);
    ExpectRefused(
        call.Run(stream), ROPEWALK_INVALID_ARGUMENT,
        {"the stream is being captured, but the kernel (bfloat16 neox", "is not loaded yet", "call prepare()"});
    EXPECT_EQ(Fake().calls["cuModuleLoadData"], 0);
    // prepare() may run beside a capture, whatever its mode, and the mode is put back.
    ExpectOk(ropewalk_prepare(&call.args));
    EXPECT_TRUE(Fake().launches.empty());
    ExpectOk(call.Run(stream));
    EXPECT_EQ(Fake().launches.size(), 1u);
    Call other(4, 0, 0, 777.0);
    ExpectRefused(other.Run(stream), ROPEWALK_INVALID_ARGUMENT,
                  {"these frequencies are not on the device yet", "call prepare()"});
    Fake().capture(stream, false);
    ExpectOk(other.Run(stream));
    Fake().capture(stream, true);
    ExpectOk(other.Run(stream));
    // Equal frequencies made during the capture are known by their content.
    Call again(4, 0, 0, 777.0);
    ExpectOk(again.Run(stream));
  });
}

// A number of tokens of `Call` whose grid runs at once by fewer registers than `plan.crowded_from`, and another one
// that has the same variant in a grid of more rounds.
struct JustFits {
  JustFits() {
    const Call call;
    RopeCall lowered;
    EXPECT_TRUE(LowerRope(call.args, nullptr, &lowered).ok());
    std::vector<std::pair<int64_t, RopeCudaPlan>> fit;
    for (lowered.params.tokens = 1024; lowered.params.tokens < 16384; ++lowered.params.tokens) {
      RopeCudaPlan met;
      EXPECT_TRUE(PlanRopeCuda(lowered, {132, 9, 0}, {.dependent_launch = true}, &met).ok());
      const auto same = std::ranges::find(fit, met.key, [](const auto& one) { return one.second.key; });
      if (met.at_once && same == fit.end()) fit.emplace_back(lowered.params.tokens, met);
      if (!met.at_once && same != fit.end()) {
        std::tie(tokens, plan) = *same;
        more = lowered.params.tokens;
        return;
      }
    }
    ADD_FAILURE() << "no grid of these heads just fits";
  }

  int64_t tokens = 0, more = 0;
  RopeCudaPlan plan;
};

TEST_F(CudaHost, AGridThatJustFitsHasAKernelOfFewerRegisters) {
  // Spilled bytes; whether the kernel with the limit serves.
  for (const auto& [spilled, serves] : {std::pair(0, true), std::pair(16, true), std::pair(24, false)}) {
    TearDown();
    InFreshProcess({}, [spilled = spilled, serves = serves] {
      const JustFits fits;
      const RopeCudaPlan& plan = fits.plan;
      Fake().spilled_bytes = spilled;
      Fake().registers = plan.crowded_from;
      Call call(fits.tokens), other(fits.more);
      ExpectOk(other.Run());
      EXPECT_EQ(Fake().calls["cuModuleLoadData"], 1);
      const std::string any_grid = Last().image;
      // What is loaded serves a capture.
      void* stream = Fake().create_stream(Fake().primary(0));
      Fake().capture(stream, true);
      other.args.frequencies = call.args.frequencies;
      ExpectOk(ropewalk_prepare(&other.args));
      ExpectOk(call.Run(stream));
      EXPECT_EQ(Last().image, any_grid);
      Fake().capture(stream, false);
      for (int i = 0; i < 3; ++i) {
        ExpectOk(call.Run(stream));
        EXPECT_EQ(Last().image != any_grid, serves);
        EXPECT_EQ(Last().block_x, plan.key.threads);
        EXPECT_EQ(Fake().calls["cuModuleLoadData"], 2);
      }
      if (serves) ExpectContains(Last().image, Text("__launch_bounds__(", plan.key.threads, ", ", plan.at_once, ")"));
      Fake().capture(stream, true);
      ExpectOk(call.Run(stream));
      EXPECT_EQ(Last().image != any_grid, serves);
      ExpectOk(other.Run(stream));
      EXPECT_EQ(Last().image, any_grid);
      EXPECT_EQ(Fake().calls["cuModuleLoadData"], 2);
    });
  }
  for (const bool too_many : {false, true}) {  // few enough; too many for a limit
    TearDown();
    InFreshProcess({}, [too_many] {
      const JustFits fits;
      Call call(fits.tokens);
      Fake().registers = too_many ? fits.plan.crowded_to + 1 : fits.plan.crowded_from - 1;
      ExpectOk(call.Run());
      EXPECT_EQ(Fake().calls["cuModuleLoadData"], 1);
    });
  }
  TearDown();
  InFreshProcess({}, [] {  // the second kernel cannot be had: asked for once
    const JustFits fits;
    Fake().registers = fits.plan.crowded_from;
    Call call(fits.tokens), other(fits.more);
    ExpectOk(other.Run());
    const std::string any_grid = Last().image;
    Fake().module_load_result = 2;
    for (int i = 0; i < 2; ++i) {
      ExpectOk(call.Run());
      ExpectOk(ropewalk_prepare(&call.args));
      EXPECT_EQ(Last().image, any_grid);
      EXPECT_EQ(Fake().calls["cuModuleLoadData"], 2);
    }
  });
}

TEST_F(CudaHost, DriverErrors) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,90"}}, [] {
    Call call, second(4, 1);
    Fake().module_load_result = 2;
    for (int i = 0; i < 2; ++i) {
      ExpectRefused(call.Run(), ROPEWALK_DRIVER_ERROR,
                    {"cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY (a fake failure) for bfloat16 neox"});
    }
    Fake().module_load_result = 0;
    Fake().alloc_result = 2;
    ExpectRefused(second.Run(), ROPEWALK_DRIVER_ERROR, {"cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY"});
    Fake().alloc_result = 0;
    ExpectOk(call.Run());
    Fake().launch_result = 719;
    ExpectRefused(call.Run(), ROPEWALK_DRIVER_ERROR,
                  {"cuLaunchKernelEx failed: CUDA_ERROR_LAUNCH_FAILED", "on cuda:0"});
    Fake().launch_result = 0;
    ExpectOk(call.Run());
    // A device lost, the next one works; faults of the one do not hide behind the other's state.
    Fake().lost_device = 0;
    ExpectRefused(call.Run(), ROPEWALK_DRIVER_ERROR, {"CUDA_ERROR_ILLEGAL_ADDRESS"});
    ExpectOk(second.Run());
    EXPECT_EQ(Last().device, 1);
    ExpectRefused(ropewalk_check_faults(), ROPEWALK_DRIVER_ERROR,
                  {"cuCtxSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS"});
    EXPECT_EQ(Fake().context_depth(), 0);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Contexts and devices

TEST_F(CudaHost, CurrentContextOfTheDeviceIsUsed) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,90"}}, [] {
    Call call;
    void* own = Fake().create_context(0);
    Fake().set_current(own);
    ExpectOk(call.Run());
    EXPECT_EQ(Last().context, own);
    // None is current: the primary one, and none is current afterwards.
    Fake().set_current(nullptr);
    ExpectOk(call.Run());
    EXPECT_EQ(Last().context, Fake().primary(0));
    EXPECT_EQ(Fake().current(), nullptr);
    // Another device's is current: the primary one of q's device, and the other afterwards.
    Fake().set_current(Fake().primary(1));
    ExpectOk(call.Run());
    EXPECT_EQ(Last().context, Fake().primary(0));
    EXPECT_EQ(Fake().current(), Fake().primary(1));
    EXPECT_EQ(Compilations(), 1);
    ExpectContains(ropewalk_counters(), "\": 3");
    // Destroyed, and its handle given to a new context: what was loaded there is gone.
    Fake().set_current(nullptr);
    Fake().destroy_context(own);
    ExpectOk(ropewalk_check_faults());
    void* reborn = Fake().create_context(0);
    ASSERT_EQ(reborn, own);
    const int loads = Fake().calls["cuModuleLoadData"];
    Fake().set_current(reborn);
    ExpectOk(call.Run());
    EXPECT_EQ(Fake().calls["cuModuleLoadData"], loads + 1);
  });
}

TEST_F(CudaHost, TwoDevices) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,80"}}, [] {
    Call first(4, 0), second(4, 1);
    ExpectOk(first.Run());
    ExpectOk(second.Run());
    EXPECT_EQ(Last().device, 1);
    EXPECT_FALSE(Last().dependent);
    ExpectContains(Last().image, "--gpu-architecture=sm_80\n");
    EXPECT_NE(Fake().launches[0].args.turns, Last().args.turns);
    ExpectContains(Explained(second.args), "cuda:1 (Fake GPU, sm_80)");
  });
}

TEST_F(CudaHost, ThreadsCompileOnce) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,90"}, {"FAKE_NVRTC_DELAY_MS", "50"}}, [] {
    constexpr int kThreads = 8, kRuns = 200;
    std::vector<std::unique_ptr<Call>> calls;
    for (int i = 0; i < kThreads; ++i) calls.push_back(std::make_unique<Call>(i % 2 ? 4096 : 1, i / 2 % 2));
    std::vector<std::thread> threads;
    std::atomic<int> failures{0};
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        for (int run = 0; run < kRuns; ++run) {
          const bool ok = calls[static_cast<size_t>(i)]->Run() == ROPEWALK_OK;
          if (!ok && failures.fetch_add(1) == 0) ADD_FAILURE() << ropewalk_last_error();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(failures, 0);
    EXPECT_EQ(Fake().launches.size(), static_cast<size_t>(kThreads * kRuns));
    EXPECT_EQ(Compilations(), 2);                    // two variants
    EXPECT_EQ(Fake().calls["cuModuleLoadData"], 4);  // on two devices
    ExpectContains(ropewalk_counters(), Text("\": ", kThreads / 2 * kRuns));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults

TEST_F(CudaHost, FaultsAreToldAndCleared) {
  InFreshProcess({{"FAKE_CUDA_DEVICES", "90,90"}}, [] {
    ExpectOk(ropewalk_check_faults());
    Call call;
    ExpectOk(call.Run());
    ExpectOk(ropewalk_check_faults());
    const auto left = [&](Call& by, rope_fault fault, std::string_view text) {
      Fake().next_fault = fault;
      ExpectOk(by.Run());
      ExpectRefused(ropewalk_check_faults(), ROPEWALK_FAULT, {text});
      ExpectOk(ropewalk_check_faults());
    };
    left(call, {3 * 4 + kRopeFaultPosition, 9000, 4096, 4, 0, 0},
         "rope: positions[3] is 9000, but the table has 4096 rows; the token was filled with NaN");
    left(call, {2 * 4 + kRopeFaultSlot, 77, 64, 4, 0, 0},
         "rope: slots[2] is 77, but the cache has 64 slots; the token was not stored");
    left(call, {0 * 4 + kRopeFaultAxis, 5, 3, 4, 0, 11},
         "rope: axes[11] is 5, but positions have 3 rows; all tokens were filled with NaN");
    Call batched(4, 1, 2);
    batched.args.offsets = &batched.offsets;
    left(batched, {1 * 4 + kRopeFaultPosition, -1, 4096, 4, 0, 2},
         "rope: positions[0, 1] is -1 on axis 2 with its offset, but the table has 4096 rows");
    left(batched, {6 * 4 + kRopeFaultSlot, 77, 64, 4, 0, 0}, "rope: slots[1, 2] is 77");
    // A failed check keeps the fault for the next.
    Fake().next_fault = {4 + kRopeFaultSlot, 77, 64, 4, 0, 0};
    ExpectOk(call.Run());
    Fake().synchronize_result = 719;
    ExpectRefused(ropewalk_check_faults(), ROPEWALK_DRIVER_ERROR,
                  {"cuCtxSynchronize failed: CUDA_ERROR_LAUNCH_FAILED"});
    Fake().synchronize_result = 0;
    ExpectRefused(ropewalk_check_faults(), ROPEWALK_FAULT, {"slots[1] is 77"});
  });
}

// Who only reports does not start the driver: a process that has started it must not fork.
TEST_F(CudaHost, ReportsDoNotStartTheDriver) {
  InFreshProcess({}, [] {
    ExpectOk(ropewalk_check_faults());
    EXPECT_STREQ(ropewalk_counters(), "{}");
    EXPECT_TRUE(Fake().calls.empty());
  });
}

TEST_F(CudaHost, ForceTakesTheLayout) {
  InFreshProcess({}, [] {
    ExpectOk(ropewalk_force_backend("cuda"));
    Call call;
    ExpectOk(call.Run());
    ExpectRefused(ropewalk_force_backend("cuda:sm_90"), ROPEWALK_INVALID_ARGUMENT, {"few or many", "sm_90"});
    ExpectOk(ropewalk_force_backend(nullptr));
  });
}

}  // namespace
}  // namespace ropewalk
