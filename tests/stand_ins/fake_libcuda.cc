// A library that stands in for libcuda: records launches, keeps device memory on the host, fails on demand. It refuses
// what the real one refuses: a function or a stream of another context than the current one. Graphs hold launches, and
// events read a clock that launches move.
// SPDX-License-Identifier: Apache-2.0
#include "tests/stand_ins/fake_libcuda.h"

#include <elf.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "backends/cuda/driver.h"

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace ropewalk;

struct FakeContext {
  int device;
  unsigned long long id;
  bool alive = true;
};
struct FakeGraph {
  std::vector<FakeLaunch> launches;
};
struct FakeStream {
  FakeContext* context;
  bool capturing = false;
  FakeGraph* graph = nullptr;  // where launches go instead
};
struct FakeModule {  // and a function of it
  FakeContext* context;
  std::string image;
  std::string function = "rope_kernel";
};
struct FakeEvent {
  double microseconds = 0;
};
struct Range {
  uintptr_t begin, end;
  int device;
};

constexpr int kL2CacheBytes = 38;  // an attribute of a device
constexpr size_t kArenaBytes = size_t{1} << 33, kPage = size_t{2} << 20;

struct State {
  FakeCuda face;
  std::vector<int> capabilities;
  std::deque<FakeContext> contexts;
  std::deque<FakeStream> streams;
  std::deque<FakeModule> modules;
  std::vector<FakeContext*> primaries;
  std::vector<int> retained;
  std::vector<Range> arenas;
  std::vector<uintptr_t> used;
  std::map<cu::DevicePtr, size_t> sizes;                   // of what was allocated
  std::multimap<std::pair<int, size_t>, uintptr_t> freed;  // by device and what they took
  double microseconds = 0;                                 // the clock
  unsigned long long next_id = 1;
  bool initialised = false;
  bool legacy_stream = false;
};

State& state() {
  static State* const s = new State;
  return *s;
}

thread_local std::vector<FakeContext*> stack;
thread_local int capture_mode = 0;

FakeContext* Current() { return stack.empty() ? nullptr : stack.back(); }

std::unique_lock<std::mutex> Enter(const char* name) {
  std::unique_lock lock(state().face.mutex);
  ++state().face.calls[name];
  return lock;
}
#define ENTER() const auto lock = Enter(__func__)

cu::Result Lost() { return Current() && Current()->device == state().face.lost_device ? 700 : 0; }

// What an allocation takes.
size_t WholeUnits(size_t bytes) { return (bytes + 255) / 256 * 256; }

void* AllocateLocked(int device, size_t bytes) {
  State& s = state();
  const auto d = static_cast<size_t>(device);
  bytes = WholeUnits(bytes);
  if (const auto freed = s.freed.find({device, bytes}); freed != s.freed.end()) {
    void* out = reinterpret_cast<void*>(freed->second);
    s.freed.erase(freed);
    return out;
  }
  if (s.used[d] + bytes > s.arenas[d].end) return nullptr;
  void* out = reinterpret_cast<void*>(s.used[d]);
  s.used[d] += bytes;
  return out;
}

// A destroyed context's handle is given again, with another id, as the real driver may do.
FakeContext* Make(int device) {
  for (FakeContext& context : state().contexts) {
    if (context.alive || context.device != device) continue;
    context = {device, state().next_id++};
    return &context;
  }
  state().contexts.push_back({device, state().next_id++});
  return &state().contexts.back();
}

FakeContext* PrimaryLocked(int device) {
  FakeContext*& primary = state().primaries[static_cast<size_t>(device)];
  if (!primary) primary = Make(device);
  return primary;
}

}  // namespace

FAKE_API FakeCuda* fake_cuda() {
  FakeCuda& face = state().face;
  face.allocate = [](int device, size_t bytes) {
    const std::lock_guard lock(state().face.mutex);
    return AllocateLocked(device, bytes);
  };
  face.create_context = [](int device) -> void* {
    const std::lock_guard lock(state().face.mutex);
    return Make(device);
  };
  face.destroy_context = [](void* context) { static_cast<FakeContext*>(context)->alive = false; };
  face.set_current = [](void* context) {
    stack.clear();
    if (context) stack.push_back(static_cast<FakeContext*>(context));
  };
  face.current = []() -> void* { return Current(); };
  face.primary = [](int device) -> void* {
    const std::lock_guard lock(state().face.mutex);
    ++state().retained[static_cast<size_t>(device)];
    return PrimaryLocked(device);
  };
  face.create_stream = [](void* context) -> void* {
    const std::lock_guard lock(state().face.mutex);
    state().streams.push_back({static_cast<FakeContext*>(context)});
    return &state().streams.back();
  };
  face.capture = [](void* stream, bool on) { static_cast<FakeStream*>(stream)->capturing = on; };
  face.context_depth = [] { return static_cast<int>(stack.size()); };
  return &face;
}

FAKE_API int cuInit(unsigned) {
  ENTER();
  State& s = state();
  if (s.initialised) return 0;
  const char* text = std::getenv("FAKE_CUDA_DEVICES");
  const std::string devices = text ? text : "90";
  if (devices == "none") return cu::kNoDevice;
  for (const char* at = devices.c_str(); *at;) {
    char* end = nullptr;
    s.capabilities.push_back(static_cast<int>(std::strtol(at, &end, 10)));
    at = *end ? end + 1 : end;
    // Whole pages of 2 MB, as the real one's.
    void* memory =
        mmap(nullptr, kArenaBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    s.arenas.push_back({begin, begin + kArenaBytes, static_cast<int>(s.arenas.size())});
    s.used.push_back(begin);
    s.primaries.push_back(nullptr);
    s.retained.push_back(0);
  }
  const char* legacy_stream = std::getenv("FAKE_CUDA_LEGACY_STREAM");
  s.legacy_stream = legacy_stream && std::strcmp(legacy_stream, "1") == 0;
  s.initialised = true;
  return 0;
}

FAKE_API int cuDriverGetVersion(int* version) {
  ENTER();
  const char* text = std::getenv("FAKE_CUDA_VERSION");
  *version = text ? std::atoi(text) : 13000;
  return 0;
}

FAKE_API int cuGetErrorName(int result, const char** name) {
  switch (result) {
    case cu::kOutOfMemory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return 0;
    case cu::kNoDevice: *name = "CUDA_ERROR_NO_DEVICE"; return 0;
    case cu::kInvalidImage: *name = "CUDA_ERROR_INVALID_IMAGE"; return 0;
    case cu::kInvalidHandle: *name = "CUDA_ERROR_INVALID_HANDLE"; return 0;
    case 700: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return 0;
    case 716: *name = "CUDA_ERROR_MISALIGNED_ADDRESS"; return 0;
    case 719: *name = "CUDA_ERROR_LAUNCH_FAILED"; return 0;
    default: *name = "CUDA_ERROR_OTHER"; return 0;
  }
}
FAKE_API int cuGetErrorString(int, const char** text) { return *text = "a fake failure", 0; }

FAKE_API int cuDeviceGetCount(int* count) {
  ENTER();
  return *count = static_cast<int>(state().capabilities.size()), 0;
}
FAKE_API int cuDeviceGet(int* device, int ordinal) {
  ENTER();
  return *device = ordinal, 0;
}
FAKE_API int cuDeviceGetName(char* name, int size, int) {
  ENTER();
  std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
  return 0;
}
FAKE_API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER();
  const int capability = state().capabilities[static_cast<size_t>(device)];
  const char* multiprocessors = std::getenv("FAKE_CUDA_SMS");
  *value = attribute == cu::kMultiprocessorCount      ? (multiprocessors ? std::atoi(multiprocessors) : 132)
           : attribute == cu::kComputeCapabilityMajor ? capability / 10
           : attribute == cu::kComputeCapabilityMinor ? capability % 10
           : attribute == kL2CacheBytes               ? 50 << 20
                                                      : 0;
  return 0;
}

FAKE_API int cuDevicePrimaryCtxRetain(FakeContext** context, int device) {
  ENTER();
  if (device == state().face.lost_device) return 700;
  ++state().retained[static_cast<size_t>(device)];
  *context = PrimaryLocked(device);
  return 0;
}
FAKE_API int cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER();
  --state().retained[static_cast<size_t>(device)];
  return 0;
}
FAKE_API int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  ENTER();
  *flags = 0;
  *active = state().retained[static_cast<size_t>(device)] > 0;
  return 0;
}
FAKE_API int cuCtxGetCurrent(FakeContext** context) {
  ENTER();
  return *context = Current(), 0;
}
FAKE_API int cuCtxPushCurrent_v2(FakeContext* context) {
  ENTER();
  if (!context || !context->alive) return cu::kInvalidContext;
  stack.push_back(context);
  return 0;
}
FAKE_API int cuCtxPopCurrent_v2(FakeContext** context) {
  ENTER();
  if (stack.empty()) return cu::kInvalidContext;
  *context = stack.back();
  stack.pop_back();
  return 0;
}
FAKE_API int cuCtxGetDevice(int* device) {
  ENTER();
  if (!Current()) return cu::kInvalidContext;
  return *device = Current()->device, 0;
}
FAKE_API int cuCtxGetId(FakeContext* context, unsigned long long* id) {
  ENTER();
  if (!context || !context->alive) return cu::kInvalidContext;
  return *id = context->id, 0;
}
FAKE_API int cuCtxSynchronize() {
  ENTER();
  if (!Current()) return cu::kInvalidContext;
  if (Lost()) return Lost();
  return state().face.synchronize_result;
}
FAKE_API int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER();
  std::swap(*mode, capture_mode);
  return 0;
}

namespace {
// What a capture forbids this thread to do, unless its mode is relaxed.
bool Forbidden() {
  for (const FakeStream& stream : state().streams) {
    if (stream.capturing && capture_mode != cu::kCaptureModeRelaxed) return true;
  }
  return false;
}

// A shared object (emulated_gpu.cc) ends with its table of sections; what fake_nvrtc.cc makes is text.
size_t ImageBytes(const void* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof(header.e_ident));
  if (header.e_ident[EI_CLASS] != ELFCLASS64) return std::strlen(static_cast<const char*>(image));
  std::memcpy(&header, image, sizeof(header));
  return header.e_shoff + size_t{header.e_shnum} * header.e_shentsize;
}
}  // namespace

FAKE_API int cuModuleLoadData(FakeModule** module, const void* image) {
  ENTER();
  State& s = state();
  if (!Current()) return cu::kInvalidContext;
  if (Lost()) return Lost();
  if (Forbidden()) return cu::kStreamCaptureUnsupported;
  if (s.face.module_load_result) return s.face.module_load_result;
  if (s.face.refused_images > 0 && s.face.refused_images--) return cu::kInvalidImage;
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return cu::kInvalidImage;
  s.modules.push_back({Current(), std::string(static_cast<const char*>(image), ImageBytes(image))});
  *module = &s.modules.back();
  return 0;
}
FAKE_API int cuModuleUnload(FakeModule*) {
  ENTER();
  return 0;
}
FAKE_API int cuModuleGetFunction(FakeModule** function, FakeModule* module, const char* name) {
  ENTER();
  if (std::strcmp(name, "rope_kernel") == 0) return *function = module, 0;
  const bool known = std::strcmp(name, "rope_backward_kernel") == 0;  // an emulated image is no text
  if (!known && module->image.find(std::string(" ") + name + "(") == std::string::npos) return 500;
  state().modules.push_back({module->context, module->image, name});
  return *function = &state().modules.back(), 0;
}
FAKE_API int cuFuncGetAttribute(int* value, int attribute, FakeModule* module) {
  ENTER();
  int registers = state().face.registers, limit = registers;
  int threads = 0, blocks = 0;
  const size_t at = module->image.find("__launch_bounds__(");
  if (at != std::string::npos && std::sscanf(&module->image[at], "__launch_bounds__(%d, %d)", &threads, &blocks) == 2) {
    limit = 16384 / ((blocks * threads / 32 + 3) / 4) / 32 / 8 * 8;
  }
  const int spilled = limit < registers ? state().face.spilled_bytes.load() : 0;
  registers = std::min(registers, limit);
  return *value = attribute == cu::kNumRegs ? registers : attribute == cu::kLocalSizeBytes ? spilled : 0, 0;
}

FAKE_API int cuMemAlloc_v2(cu::DevicePtr* pointer, size_t bytes) {
  ENTER();
  if (!Current()) return cu::kInvalidContext;
  if (Lost()) return Lost();
  if (Forbidden()) return cu::kStreamCaptureUnsupported;
  if (state().face.alloc_result) return state().face.alloc_result;
  *pointer = reinterpret_cast<uintptr_t>(AllocateLocked(Current()->device, bytes));
  if (!*pointer) return cu::kOutOfMemory;
  state().sizes[*pointer] = bytes;
  state().face.allocated += static_cast<int64_t>(bytes);
  return 0;
}
FAKE_API int cuMemFree_v2(cu::DevicePtr pointer) {
  ENTER();
  const auto size = state().sizes.find(pointer);
  if (!Current() || size == state().sizes.end()) return cu::kInvalidValue;
  state().face.allocated -= static_cast<int64_t>(size->second);
  state().freed.emplace(std::pair(Current()->device, WholeUnits(size->second)), size->first);
  state().sizes.erase(size);
  return 0;
}
namespace {
bool CopiesOn(const FakeStream* stream) {
  return stream ? stream->context == Current() : Current() && state().legacy_stream;
}
}  // namespace
FAKE_API int cuMemcpyHtoDAsync_v2(cu::DevicePtr to, const void* from, size_t bytes, FakeStream* stream) {
  ENTER();
  if (!CopiesOn(stream)) return cu::kInvalidHandle;
  if (Lost()) return Lost();
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
FAKE_API int cuMemcpyDtoHAsync_v2(void* to, cu::DevicePtr from, size_t bytes, FakeStream* stream) {
  ENTER();
  if (!CopiesOn(stream)) return cu::kInvalidHandle;
  if (Lost()) return Lost();
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return 0;
}
FAKE_API int cuMemcpyDtoDAsync_v2(cu::DevicePtr to, cu::DevicePtr from, size_t bytes, FakeStream* stream) {
  ENTER();
  if (!CopiesOn(stream)) return cu::kInvalidHandle;
  if (Lost()) return Lost();
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return 0;
}
FAKE_API int cuStreamCreate(FakeStream** stream, unsigned flags) {
  ENTER();
  if (!Current() || flags != cu::kStreamNonBlocking) return cu::kInvalidValue;
  if (Lost()) return Lost();
  state().streams.push_back({Current()});
  *stream = &state().streams.back();
  return 0;
}
FAKE_API int cuStreamSynchronize(FakeStream*) {
  ENTER();
  if (Forbidden()) return cu::kStreamCaptureUnsupported;
  return Lost();
}
FAKE_API int cuStreamIsCapturing(FakeStream* stream, int* capturing) {
  ENTER();
  *capturing = stream && stream->capturing;
  return 0;
}
FAKE_API int cuStreamGetCtx(FakeStream* stream, FakeContext** context) {
  ENTER();
  *context = stream ? stream->context : Current();
  return 0;
}

FAKE_API int cuPointerGetAttributes(unsigned count, int* attributes, void** values, cu::DevicePtr pointer) {
  ENTER();
  int owner = -1;
  for (const Range& arena : state().arenas) {
    if (pointer >= arena.begin && pointer < arena.end) owner = arena.device;
  }
  for (unsigned i = 0; i < count; ++i) {
    const int value = attributes[i] == cu::kMemoryType      ? (owner >= 0 ? cu::kMemoryTypeDevice : 0)
                      : attributes[i] == cu::kDeviceOrdinal ? (owner >= 0 ? owner : -2)
                                                            : 0;
    std::memcpy(values[i], &value, attributes[i] == cu::kIsManaged ? 1 : sizeof(value));
  }
  return 0;
}

namespace {
void Execute(const FakeLaunch& launch) {
  if (state().face.execute) state().microseconds += state().face.execute(launch);
}
}  // namespace

FAKE_API int cuLaunchKernelEx(const cu::LaunchConfig* config, FakeModule* function, void** parameters, void** extra) {
  ENTER();
  State& s = state();
  if (!Current()) return cu::kInvalidContext;
  if (Lost()) return Lost();
  if (s.face.launch_result) return s.face.launch_result;
  auto* stream = reinterpret_cast<FakeStream*>(config->stream);
  if (function->context != Current() || (stream && stream->context != Current())) return cu::kInvalidHandle;
  if (!parameters || extra) return cu::kInvalidValue;
  FakeLaunch launch = {Current()->device,
                       config->stream,
                       Current(),
                       config->grid_x,
                       config->grid_y,
                       config->grid_z,
                       config->block_x,
                       config->block_y,
                       config->block_z,
                       config->shared_bytes,
                       false,
                       stream && stream->graph,
                       function->image,
                       {},
                       function->function};
  if (function->function == "rope_kernel") {
    launch.args = *static_cast<const rope_cuda_args*>(parameters[0]);
  } else if (function->function == "rope_backward_kernel") {
    launch.backward = *static_cast<const rope_backward_cuda_args*>(parameters[0]);
    launch.args = launch.backward.turn;
  } else {
    std::memcpy(launch.pointers, parameters[0], sizeof(launch.pointers));
  }
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const cu::LaunchAttribute& attribute = config->attributes[i];
    if (attribute.id != cu::kProgrammaticStreamSerialization || launch.dependent) return cu::kInvalidValue;
    launch.dependent = attribute.value.number != 0;
  }
  if (stream && stream->graph) {
    stream->graph->launches.push_back(std::move(launch));
    return 0;
  }
  Execute(launch);
  if (const int result = s.face.execute_result.exchange(0)) return result;
  if (s.face.next_fault.key) {
    *launch.args.fault = s.face.next_fault;
    s.face.next_fault.key = 0;
  }
  if (s.face.keeps_launches) s.face.launches.push_back(std::move(launch));
  return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs and events

FAKE_API int cuStreamBeginCapture_v2(FakeStream* stream, int) {
  ENTER();
  if (!stream || stream->capturing) return cu::kInvalidValue;
  stream->capturing = true;
  stream->graph = new FakeGraph;
  ++state().face.graphs;
  return 0;
}
FAKE_API int cuStreamEndCapture(FakeStream* stream, FakeGraph** graph) {
  ENTER();
  if (!stream || !stream->graph) return cu::kInvalidValue;
  stream->capturing = false;
  *graph = stream->graph;
  stream->graph = nullptr;
  return 0;
}
FAKE_API int cuStreamDestroy_v2(FakeStream*) {
  ENTER();
  return 0;
}
FAKE_API int cuGraphInstantiateWithFlags(FakeGraph** exec, FakeGraph* graph, unsigned long long) {
  ENTER();
  *exec = new FakeGraph(*graph);
  ++state().face.graphs;
  return 0;
}
FAKE_API int cuGraphLaunch(FakeGraph* exec, FakeStream* stream) {
  ENTER();
  if (!stream || stream->capturing || stream->context != Current()) return cu::kInvalidHandle;
  if (Lost()) return Lost();
  for (const FakeLaunch& launch : exec->launches) Execute(launch);
  return 0;
}
FAKE_API int cuGraphDestroy(FakeGraph* graph) {
  ENTER();
  --state().face.graphs;
  delete graph;
  return 0;
}
FAKE_API int cuGraphExecDestroy(FakeGraph* exec) {
  ENTER();
  --state().face.graphs;
  delete exec;
  return 0;
}
FAKE_API int cuEventCreate(FakeEvent** event, unsigned) {
  ENTER();
  return *event = new FakeEvent, 0;
}
FAKE_API int cuEventDestroy_v2(FakeEvent* event) {
  ENTER();
  delete event;
  return 0;
}
FAKE_API int cuEventRecord(FakeEvent* event, FakeStream*) {
  ENTER();
  return event->microseconds = state().microseconds, 0;
}
FAKE_API int cuEventSynchronize(FakeEvent*) {
  ENTER();
  return Lost();
}
FAKE_API int cuEventElapsedTime(float* milliseconds, const FakeEvent* begin, const FakeEvent* end) {
  ENTER();
  *milliseconds = static_cast<float>((end->microseconds - begin->microseconds) * 1e-3);
  return 0;
}
