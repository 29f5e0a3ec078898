// The floor: an in-place read-modify-write (load, xor, store) of the very bytes that the operation must touch, by a
// trivial kernel with the widest vectors of the CPU. Benchmarks divide by it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <span>
#include <vector>

namespace ropewalk::bench {

// The bytes of one tensor that are read and written: in each of `rows` rows, `runs` runs of `bytes` bytes.
struct FloorRegion {
  unsigned char* data = nullptr;
  int64_t rows = 0, row_stride = 0;  // strides in bytes
  int64_t runs = 0, run_stride = 0;
  int64_t bytes = 0;

  int64_t total() const { return rows * runs * bytes; }
};

// The kernel's shapes that this CPU can run: vector width, unrolling, how far ahead it prefetches.
int FloorShapes();
const char* FloorShapeName(int shape);
// Bytes of the widest vector used.
int FloorVectorBytes();

// Reads, flips and writes the rows [begin, end) of every region.
void FloorRows(int shape, std::span<const FloorRegion> regions, int64_t begin, int64_t end);

// The floor over regions of one number of rows, split like the operation. Regions are joined where memory is
// contiguous.
class Floor {
 public:
  // `parallel_for` null: on the caller's thread alone.
  Floor(std::vector<FloorRegion> regions, ropewalk_parallel_for parallel_for);

  void Run() const { Run(shape_); }
  void Run(int shape) const;
  // Times every shape on this data and keeps the fastest.
  void Tune();
  int shape() const { return shape_; }
  int64_t bytes() const;  // read, and as many written

 private:
  std::vector<FloorRegion> regions_;
  ropewalk_parallel_for parallel_for_;
  int64_t grain_ = 1;  // rows
  int shape_ = 0;
};

}  // namespace ropewalk::bench
