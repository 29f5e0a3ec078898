// SPDX-License-Identifier: Apache-2.0
#include "measure/cuda_graphs.h"

#include <dlfcn.h>

#include "base/text.h"

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

}  // namespace ropewalk::bench
