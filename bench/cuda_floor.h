// The floor on CUDA: the in-place read-modify-write of bench/floor.h by kernels made for the very rows, in shapes to
// be searched: by row or flat, bytes and vectors in flight of a thread, threads of a block, kept out of L1, evicted
// first. `few`: at few tokens each thread also reads a position and a weight, as a rotation must, all issued together.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backends/cuda/driver.h"
#include "bench/floor.h"
#include "core/status.h"

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

// What the kernels are made for: rows of one or two parts (k behind q is one part with it), of equal runs of bytes.
struct CudaFloorRows {
  struct Part {
    int64_t runs = 0, row_stride = 0, run_stride = 0;
  };
  int64_t rows = 0, run_bytes = 0;
  Part parts[2] = {};
  int access_bytes = 0;  // the widest access that all addresses are aligned to, at most 16
  bool few = false;

  int64_t runs() const { return parts[0].runs + parts[1].runs; }
  int64_t bytes() const { return rows * runs() * run_bytes; }
};
Status RowsOf(std::span<const FloorRegion> regions, bool few, CudaFloorRows* out);
// Where the parts of such regions begin; the second may be null.
struct CudaFloorData {
  void* parts[2] = {};
};
CudaFloorData FloorDataOf(std::span<const FloorRegion> regions);

// The kernels' source and their shapes, kernel f<n> with n = shape.kernel.
std::string CudaFloorSource(const CudaFloorRows& rows);
std::vector<CudaFloorShape> CudaFloorShapes(const CudaFloorRows& rows);

// The kernels, loaded in the current context. Positions must hold kFloorFlip, weights zeros.
inline constexpr uint32_t kFloorFlip = 0x80008000u;
class CudaFloor {
 public:
  static Status Make(const CudaDriver& driver, const CudaDevice& device, const CudaFloorRows& rows,
                     std::unique_ptr<CudaFloor>* out);
  ~CudaFloor();
  CudaFloor(const CudaFloor&) = delete;
  CudaFloor& operator=(const CudaFloor&) = delete;

  const std::vector<CudaFloorShape>& shapes() const { return shapes_; }
  // `positions`: rows of 4 bytes; `weight`: run_bytes; both may be null unless the rows are few.
  Status Launch(const CudaFloorShape& shape, const CudaFloorData& data, const void* positions, const void* weight,
                cu::Stream stream) const;

 private:
  CudaFloor(const CudaDriver& driver, const CudaFloorRows& rows) : driver_(driver), rows_(rows) {}

  const CudaDriver& driver_;
  CudaFloorRows rows_;
  std::vector<CudaFloorShape> shapes_;
  cu::Module module_ = nullptr;
  std::vector<cu::Function> functions_;  // by number of the kernel
};

}  // namespace ropewalk::bench
