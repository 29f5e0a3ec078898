// What cuda_host_test.cc asks of the library that stands in for libcuda: switches, what was launched, what was called.
// Device memory is host memory, so that tests can look at it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "backends/cuda/kernel/backward_args.h"

// Environment: FAKE_CUDA_DEVICES, compute capabilities such as "90,90" (default "90"; "none": no device),
// FAKE_CUDA_SMS, multiprocessors of each (default 132), FAKE_CUDA_VERSION (default 13000), FAKE_CUDA_LEGACY_STREAM (1:
// copies on the null stream are no error; the library makes none).

struct FakeLaunch {
  int device;
  void* stream;
  void* context;
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  bool dependent;                         // programmatic stream serialization
  bool in_graph;                          // replayed by one
  std::string image;                      // of the function's module
  rope_cuda_args args;                    // of the gradient, `backward.turn`
  std::string function = {};              // its name
  void* pointers[4] = {};                 // what the argument of another function than rope_kernel begins with
  rope_backward_cuda_args backward = {};  // of rope_backward_kernel
};

struct FakeCuda {
  // Switches; a result of 0 is success.
  std::atomic<int> module_load_result{0}, launch_result{0}, alloc_result{0}, synchronize_result{0};
  // Of every kernel, but fewer where its text limits them, and what such a text then spills.
  std::atomic<int> registers{32}, spilled_bytes{0};
  std::atomic<int> lost_device{-1};    // everything but queries fails there
  std::atomic<int> refused_images{0};  // so many module loads fail with CUDA_ERROR_INVALID_IMAGE
  rope_fault next_fault = {};          // the next launch leaves it, if key is not 0

  // What a launch does, and how many microseconds it takes by the fake's clock; null: nothing, none.
  std::function<double(const FakeLaunch&)> execute;
  std::atomic<int> execute_result{0};  // what that ended with, for the launch to return
  bool keeps_launches = true;

  std::mutex mutex;
  std::vector<FakeLaunch> launches;  // not those in graphs
  int64_t allocated = 0;             // bytes that were not freed
  int graphs = 0;                    // that were not destroyed
  std::map<std::string, int> calls;  // by the driver's name of the function

  // Memory of a device, aligned to 256 bytes; contexts and streams.
  void* (*allocate)(int device, size_t bytes);
  void* (*create_context)(int device);  // not current
  void (*destroy_context)(void* context);
  void (*set_current)(void* context);
  void* (*current)();
  void* (*primary)(int device);
  void* (*create_stream)(void* context);
  void (*capture)(void* stream, bool on);
  int (*context_depth)();  // of this thread's stack
};

extern "C" FakeCuda* fake_cuda();
