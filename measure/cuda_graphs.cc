// SPDX-License-Identifier: Apache-2.0
#include "measure/cuda_graphs.h"

#include <dlfcn.h>

#include <algorithm>

#include "base/text.h"
#include "measure/floor.h"

namespace ropewalk::bench {
namespace {

// X(name, symbol, parameters..)
#define ROPEWALK_GRAPH_FUNCTIONS(X)                                                                 \
  X(StreamBeginCapture, "cuStreamBeginCapture_v2", cu::Stream, int)                                 \
  X(StreamEndCapture, "cuStreamEndCapture", cu::Stream, cu::Graph*)                                 \
  X(StreamDestroy, "cuStreamDestroy_v2", cu::Stream)                                                \
  X(GraphInstantiate, "cuGraphInstantiateWithFlags", cu::GraphExec*, cu::Graph, unsigned long long) \
  X(GraphLaunch, "cuGraphLaunch", cu::GraphExec, cu::Stream)                                        \
  X(GraphExecDestroy, "cuGraphExecDestroy", cu::GraphExec)                                          \
  X(GraphDestroy, "cuGraphDestroy", cu::Graph)                                                      \
  X(EventCreate, "cuEventCreate", cu::Event*, unsigned)                                             \
  X(EventRecord, "cuEventRecord", cu::Event, cu::Stream)                                            \
  X(EventSynchronize, "cuEventSynchronize", cu::Event)                                              \
  X(EventElapsedTime, "cuEventElapsedTime", float*, cu::Event, cu::Event)                           \
  X(EventDestroy, "cuEventDestroy_v2", cu::Event)                                                   \
  X(MemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", cu::DevicePtr, cu::DevicePtr, size_t, cu::Stream)

}  // namespace

struct CudaGraphs::Functions {
#define ROPEWALK_MEMBER(name, symbol, ...) cu::Result (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_GRAPH_FUNCTIONS(ROPEWALK_MEMBER)
#undef ROPEWALK_MEMBER
};

Status CudaGraphs::Open(const CudaDriver& driver, std::unique_ptr<CudaGraphs>* out) {
  ROPEWALK_TRY(driver.status);
  void* library = dlopen(driver.path.c_str(), RTLD_NOW | RTLD_LOCAL);  // open already
  auto functions = std::make_shared<Functions>();
  const char* missing = library ? nullptr : "cuInit";
#define ROPEWALK_FIND(name, symbol, ...)                                                              \
  if (library) functions->name = reinterpret_cast<decltype(functions->name)>(dlsym(library, symbol)); \
  if (!functions->name && !missing) missing = symbol;
  ROPEWALK_GRAPH_FUNCTIONS(ROPEWALK_FIND)
#undef ROPEWALK_FIND
  if (missing) return Status::Unavailable(Text(driver.path, " is too old to time with: it has no ", missing));
  std::unique_ptr<CudaGraphs> graphs(new CudaGraphs(driver));
  graphs->functions_ = functions;
  ROPEWALK_TRY(driver.Check(driver.StreamCreate(&graphs->stream_, cu::kStreamNonBlocking), "cuStreamCreate"));
  for (cu::Event* event : {&graphs->begin_, &graphs->end_}) {
    ROPEWALK_TRY(driver.Check(functions->EventCreate(event, 0), "cuEventCreate"));
  }
  *out = std::move(graphs);
  return {};
}

CudaGraphs::~CudaGraphs() {
  for (const cu::Event event : {begin_, end_}) {
    if (event) functions_->EventDestroy(event);
  }
  if (stream_) functions_->StreamDestroy(stream_);
}

Status CudaGraphs::Capture(const std::function<Status()>& body, CudaGraph* graph) {
  ROPEWALK_TRY(
      driver_.Check(functions_->StreamBeginCapture(stream_, cu::kCaptureModeThreadLocal), "cuStreamBeginCapture"));
  const Status captured = body();
  cu::Graph nodes = nullptr;
  const Status ended = driver_.Check(functions_->StreamEndCapture(stream_, &nodes), "cuStreamEndCapture");
  cu::GraphExec exec = nullptr;
  Status status = captured.ok() ? ended : captured;
  if (status.ok()) status = driver_.Check(functions_->GraphInstantiate(&exec, nodes, 0), "cuGraphInstantiateWithFlags");
  if (nodes) functions_->GraphDestroy(nodes);
  ROPEWALK_TRY(std::move(status));
  *graph = CudaGraph(exec, [functions = functions_](cu::GraphExec made) { functions->GraphExecDestroy(made); });
  return {};
}

Status CudaGraphs::Replay(const CudaGraph& graph, double* seconds) {
  ROPEWALK_TRY(driver_.Check(functions_->GraphLaunch(graph.get(), stream_), "cuGraphLaunch"));
  ROPEWALK_TRY(driver_.Check(functions_->EventRecord(begin_, stream_), "cuEventRecord"));
  ROPEWALK_TRY(driver_.Check(functions_->GraphLaunch(graph.get(), stream_), "cuGraphLaunch"));
  ROPEWALK_TRY(driver_.Check(functions_->EventRecord(end_, stream_), "cuEventRecord"));
  ROPEWALK_TRY(driver_.Check(functions_->EventSynchronize(end_), "cuEventSynchronize"));
  float milliseconds = 0;
  ROPEWALK_TRY(driver_.Check(functions_->EventElapsedTime(&milliseconds, begin_, end_), "cuEventElapsedTime"));
  *seconds = static_cast<double>(milliseconds) * 1e-3;
  return {};
}

Status CudaGraphs::Copy(void* to, const void* from, size_t bytes) {
  return driver_.Check(functions_->MemcpyDtoDAsync(reinterpret_cast<cu::DevicePtr>(to),
                                                   reinterpret_cast<cu::DevicePtr>(from), bytes, stream_),
                       "cuMemcpyDtoDAsync");
}

Status CudaGraphs::Wait() { return driver_.Check(driver_.StreamSynchronize(stream_), "cuStreamSynchronize"); }

// ---- copies ---------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kWarmCopies = 8;  // which stay in the L2 if they fit, as in bench/gpu_compare.py
constexpr size_t kAlignment = 256;  // of device memory

// The tensors that a call reads or writes token by token.
constexpr size_t kCopied[] = {offsetof(ropewalk_rope_args, q), offsetof(ropewalk_rope_args, k),
                              offsetof(ropewalk_rope_args, v), offsetof(ropewalk_rope_args, k_cache),
                              offsetof(ropewalk_rope_args, v_cache)};
const DLTensor*& FieldOf(ropewalk_rope_args& args, size_t offset) {
  return *reinterpret_cast<const DLTensor**>(reinterpret_cast<char*>(&args) + offset);
}

int64_t WarmBytes(int64_t l2_bytes) { return l2_bytes * 7 / 10; }  // that stay in the L2

}  // namespace

bool RunsCold(const RopeCase& c, int64_t l2_bytes) {
  return std::max<int64_t>(c.batch, 1) * c.tokens >= kColdTokens || BytesOf(c) > WarmBytes(l2_bytes);
}

int64_t CopyCount(const RopeCase& c, int64_t l2_bytes, int64_t cold_bytes) {
  const int64_t bytes = std::max<int64_t>(BytesOf(c), 1);
  return RunsCold(c, l2_bytes) ? std::max<int64_t>(2, (cold_bytes + bytes - 1) / bytes) : kWarmCopies;
}

Status Copies::Make(CaseCall& call, int64_t count) {
  ropewalk_rope_args& args = call.args();
  ropewalk_rope_args host = call.host_args();
  for (const size_t offset : kCopied) {
    if (FieldOf(args, offset)) Add(SpanOf(*FieldOf(args, offset)), SpanOf(*FieldOf(host, offset)));
  }
  for (Part& part : parts_) {
    const size_t lead = reinterpret_cast<uintptr_t>(part.device.begin) % kAlignment + kAlignment;
    part.first = lead;
    part.stride = (lead + part.device.bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t bytes = part.stride * static_cast<size_t>(count);
    ROPEWALK_TRY(part.block.Allocate(bytes));
    ROPEWALK_TRY(part.untouched.Allocate(bytes));
    ROPEWALK_TRY(memory_.CopyIn(part.untouched.data() + lead, part.host.begin, part.host.bytes));
    for (int64_t i = 1; i < count; ++i) {
      ROPEWALK_TRY(graphs_.Copy(part.untouched.data() + static_cast<size_t>(i) * part.stride + lead,
                                part.untouched.data() + lead, part.host.bytes));
    }
    part.bytes = bytes;
  }
  ROPEWALK_TRY(Restore());
  ROPEWALK_TRY(graphs_.Wait());
  const int64_t rotary_dim = RotaryDim(call);
  calls_.resize(static_cast<size_t>(count));
  for (size_t i = 0; i < calls_.size(); ++i) {
    Call& copy = calls_[i];
    copy.args = args;
    for (size_t n = 0; n < copy.tensors.size(); ++n) {
      const DLTensor*& field = FieldOf(copy.args, kCopied[n]);
      if (!field) continue;
      copy.tensors[n] = *field;
      copy.tensors[n].data = At(i, DataOf(*field));
      copy.tensors[n].byte_offset = 0;
      field = &copy.tensors[n];
    }
    copy.regions = RegionsOf(copy.args, rotary_dim);
  }
  return {};
}

Status Copies::Restore(bool all) {
  for (const Part& part : parts_) {
    ROPEWALK_TRY(graphs_.Copy(part.block.data(), part.untouched.data(), all ? part.bytes : part.stride));
  }
  return {};
}

Status Copies::CheckFloor(bool* right) {
  *right = true;
  std::vector<std::vector<unsigned char>> now, expected;
  for (const Part& part : parts_) {
    now.emplace_back(part.host.bytes);
    ROPEWALK_TRY(memory_.CopyOut(now.back().data(), part.block.data() + part.first, part.host.bytes));
    expected.emplace_back(part.host.begin, part.host.begin + part.host.bytes);
  }
  for (FloorRegion region : calls_[0].regions) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const ptrdiff_t at = reinterpret_cast<char*>(region.data) - (parts_[i].block.data() + parts_[i].first);
      if (at < 0 || at >= static_cast<ptrdiff_t>(parts_[i].host.bytes)) continue;
      region.data = expected[i].data() + at;
      FloorRows(0, {&region, 1}, 0, region.rows);
      break;
    }
  }
  *right = now == expected;
  return {};
}

void Copies::Add(Span device, Span host) {
  for (Part& part : parts_) {
    if (device.begin >= part.device.end() || part.device.begin >= device.end()) continue;
    const char* begin = std::min(part.device.begin, device.begin);
    const size_t before = static_cast<size_t>(part.device.begin - begin);
    const size_t bytes = static_cast<size_t>(std::max(part.device.end(), device.end()) - begin);
    part.device = {begin, bytes};
    part.host = {part.host.begin - before, bytes};
    return;
  }
  parts_.emplace_back(device, host, memory_);
}

void* Copies::At(size_t copy, const void* address) const {
  for (const Part& part : parts_) {
    const char* at = static_cast<const char*>(address);
    if (at < part.device.begin || at >= part.device.end()) continue;
    return part.block.data() + copy * part.stride + part.first + (at - part.device.begin);
  }
  return nullptr;
}

}  // namespace ropewalk::bench
