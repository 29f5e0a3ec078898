// The floor on CUDA, the one that all benchmarks divide by: the read-modify-write of measure/floor.h by kernels made
// for the very rows, in shapes to be searched: by row or flat, bytes and vectors in flight of a thread, threads of a
// block, kept out of L1, evicted first. `few`: at few tokens each thread also reads a position and a weight, as a
// rotation must, all issued together. For a store it also reads the slots, and copies to the caches what it read of k
// and v.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backends/cuda/driver.h"
#include "base/status.h"
#include "measure/floor.h"

namespace ropewalk::bench {

struct CudaFloorShape {
  bool by_row = false;  // a block for each row; else flat over all rows
  int bytes = 0;        // of an access
  int in_flight = 0;    // accesses of a thread before the first result is used
  int policy = 0;       // of the caches: 0 as usual, 1 not kept in L1, 2 evicted first
  int kernel = 0;       // its number in the source
  int threads = 0;
};
std::string ShapeName(const CudaFloorShape& shape);  // "row, 16 B x2, 384 threads, evict first"

// One of q, k and v, or q and k as one where k lies behind q in a row.
struct CudaFloorTensor {
  FloorRegion rows;              // what is read
  unsigned char* out = nullptr;  // where it is written, with the same strides: rows.data in place; null: nowhere
  FloorRegion cache = {};  // where row i is written as well, in row slots[i]: runs of as many bytes, or, as fp8 of
                           // 16-bit floats, of half as many; bytes 0: nowhere
};

// What the kernels are made for: rows of one to three parts, of equal runs of bytes.
struct CudaFloorRows {
  enum class Written { kInPlace, kApart, kNot };
  struct Part {
    int64_t runs = 0, row_stride = 0, run_stride = 0;
    bool behind = false;  // so many bytes behind the first part's rows, in the same rows
    int64_t offset = 0;
    Written written = Written::kInPlace;
    int64_t cache_bytes = 0, slot_stride = 0, cache_run_stride = 0;  // of a run; 0: not stored
  };
  int64_t rows = 0, run_bytes = 0, slots = 0;
  Part parts[3];
  int access_bytes = 0;  // the widest access that all addresses are aligned to, at most 16
  bool few = false;

  int64_t runs() const { return parts[0].runs + parts[1].runs + parts[2].runs; }
  int64_t read_bytes() const { return rows * runs() * run_bytes; }
  int64_t written_bytes() const;
  bool stores() const { return slots > 0; }
};
Status RowsOf(std::span<const CudaFloorTensor> tensors, bool few, CudaFloorRows* out);
std::vector<CudaFloorTensor> InPlace(std::span<const FloorRegion> regions);

// The pointers that a kernel may take; of the first three kinds one for each part.
enum CudaFloorPointer {
  kFloorRows = 0,
  kFloorOut = 3,
  kFloorCache = 6,
  kFloorSlots = 9,  // rows of int64
  kFloorPositions,  // rows of 4 bytes that hold kFloorFlip; read if the rows are few
  kFloorWeight,     // run_bytes of zeros; likewise
  kFloorPointers
};
const char* CudaFloorPointerName(int pointer);  // "rows0", "slots"
// Those that a kernel for such rows takes, in the order of its argument.
std::vector<int> CudaFloorArguments(const CudaFloorRows& rows);
struct CudaFloorData {
  const void* pointers[kFloorPointers] = {};
};
// All but slots, positions and weight.
CudaFloorData FloorDataOf(std::span<const CudaFloorTensor> tensors);

// The kernels' source and their shapes, kernel f<n> with n = shape.kernel.
std::string CudaFloorSource(const CudaFloorRows& rows);
std::vector<CudaFloorShape> CudaFloorShapes(const CudaFloorRows& rows);
int64_t CudaFloorBlocks(const CudaFloorRows& rows, const CudaFloorShape& shape);
// The source without the PTX that loads and stores, for tests on the host.
std::string CudaFloorWalk(const CudaFloorRows& rows);

// The kernels, loaded in the current context.
inline constexpr uint32_t kFloorFlip = 0x80008000u;
class CudaFloor {
 public:
  static Status Make(const CudaDriver& driver, const CudaDevice& device, const CudaFloorRows& rows,
                     std::unique_ptr<CudaFloor>* out);
  ~CudaFloor();
  CudaFloor(const CudaFloor&) = delete;
  CudaFloor& operator=(const CudaFloor&) = delete;

  const std::vector<CudaFloorShape>& shapes() const { return shapes_; }
  Status Launch(const CudaFloorShape& shape, const CudaFloorData& data, cu::Stream stream) const;

 private:
  CudaFloor(const CudaDriver& driver, const CudaFloorRows& rows)
      : driver_(driver), rows_(rows), arguments_(CudaFloorArguments(rows)) {}

  const CudaDriver& driver_;
  CudaFloorRows rows_;
  std::vector<int> arguments_;
  std::vector<CudaFloorShape> shapes_;
  cu::Module module_ = nullptr;
  std::vector<cu::Function> functions_;  // by number of the kernel
};

}  // namespace ropewalk::bench
