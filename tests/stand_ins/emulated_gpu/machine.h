// Between the emulated GPU (emulated_gpu.cc) and a kernel compiled for it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

struct EmulatedIndex {
  unsigned x, y, z;
};
struct EmulatedOperand {
  void* address;
  unsigned long size;
};
enum { EMULATED_SYNC = 1, EMULATED_SHUFFLE = 2, EMULATED_BARRIER = 3 };

struct EmulatedMachine {
  EmulatedIndex thread, block, grid;
  // Where the lanes of a warp meet, all at the same place. Returns what lane `from` brought.
  unsigned (*meet)(EmulatedMachine*, int kind, unsigned value, int from);
  void (*ptx)(EmulatedMachine*, const char* text, const EmulatedOperand* operands, int count);
  void (*check_aligned)(const void* p, unsigned long size);
  unsigned long (*shared_address)(const void* p);
};
