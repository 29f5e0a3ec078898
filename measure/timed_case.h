// A case of the one list, checked against the reference and then timed against the floor of the same bytes, on the host
// or on a device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "conformance/case_call.h"
#include "conformance/cases.h"
#include "measure/floor.h"
#include "measure/measure.h"
#include "measure/place.h"

namespace ropewalk::bench {

struct TimingOptions {
  int threads = 1;                        // on the host
  double seconds = 0.2;                   // of timing; 0: only check
  int64_t full_check = int64_t{4} << 20;  // elements up to which every byte is compared; above, some tokens are
  int64_t sampled_tokens = 128;
  int64_t cold_bytes = 800'000'000;  // of the buffers that calls go round where caches shall be cold, on a GPU
};

struct TimedCase {
  bool held = false;
  std::string message;  // why not
  double worst = 0;     // largest error in units of its tolerance: 1 is the bound
  int64_t tokens = 0, checked_tokens = 0;
  std::string backend, kernel;  // who served
  std::string floor_shape;      // the floor's kernel
  int64_t bytes = 0;            // read and written
  Paired time;

  double gigabytes_per_second() const { return time.ours > 0 ? static_cast<double>(bytes) / time.ours * 1e-9 : 0; }
};

// An error says that the case could not be run at all; a wrong result is in `out`.
Status TimeCase(const RopeCase& c, const TimingOptions& options, TimedCase* out, Place& place = HostPlace());

// The bytes of q and k that a call in place must read and write: whole heads with the norm, else their rotated part.
std::vector<FloorRegion> RegionsOf(const ropewalk_rope_args& args, int64_t rotary_dim);
int64_t RotaryDim(CaseCall& call);  // as the library understands the arguments
// A norm applied again and again in place would drive values into denormals; with weights near 1 it takes far longer.
Status SteadyWeights(CaseCall& call);
// How many calls in place may follow each other before the data must be put back.
int64_t CallsBeforeReset(const RopeCase& c);

// The memory from a tensor's first byte to its last.
struct Span {
  const char* begin = nullptr;
  size_t bytes = 0;
  const char* end() const { return begin + bytes; }
};
Span SpanOf(const DLTensor& tensor);

// Fills in what a case's fields leave to others (the dtype of weights, cache and table, v_dim), and its name.
void Complete(RopeCase* c);
// A shape of the benchmarks, with q and k apart and computed angles.
RopeCase ShapeCase(int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t head_dim, uint32_t dtype);
void SetVariant(bool norm, int32_t pairing, RopeCase* c);
int64_t BytesOf(const RopeCase& c);  // of q and k
// Tokens of 32/8 heads of 128 that fill most of the L2, up to half of the L3, and four to five times the L3.
std::vector<int64_t> TokensByCache(uint32_t dtype);
// Where so many bytes lie when one core uses them again and again: "L1", "L2", "L3", "L3+DRAM", "DRAM".
std::string MemoryOf(int64_t bytes);

// "rope" or "norm+rope", then the pairing.
std::string OpName(const RopeCase& c);

// Bytes of the data caches, from the system; a guess where it does not say.
struct Caches {
  int64_t l1 = 0, l2 = 0, l3 = 0;
};
Caches CacheSizes();
std::string CpuName();

}  // namespace ropewalk::bench
