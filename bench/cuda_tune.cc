// Searches the block shapes of the CUDA kernel against the searched floor, on the shapes of docs/cuda.md: how the
// constants in ops/rope/rope_cuda.cc were found. Needs the toolkit and a GPU:
//   g++ -std=c++20 -O2 -I. -Iinclude -I$CUDA/include bench/cuda_tune.cc ops/rope/rope_cuda.cc -L$CUDA/lib64 -lnvrtc
//   -lcuda
//   ./a.out few|many|sizes [NAME.. [MODE]]   NAME: a shape of few, a head size of sizes, several together; MODE: rope,
//   norm, kv
// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <nvrtc.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <future>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "ops/rope/rope_cuda.h"

namespace ropewalk {
namespace {

void Check(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return;
  const char* name = "?";
  cuGetErrorName(result, &name);
  std::fprintf(stderr, "%s: %s\n", call, name);
  std::exit(1);
}
#define CU(call) Check(call, #call)

std::string ReadFile(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

struct Kernel {
  CUfunction function = nullptr;
  int registers = 0, local = 0;
};

std::string Compile(const std::string& source) {
  static const std::vector<std::string> paths = {
      "kernels/kernel_types.h",  "ops/rope/rope_params.h", "ops/rope/rope_fault.h", "ops/rope/rope_cuda_args.h",
      "kernels/cuda/vector.cuh", "kernels/cuda/angle.cuh", "ops/rope/rope.cuh"};
  static const std::vector<std::string> texts = [] {
    std::vector<std::string> out;
    for (const auto& path : paths) out.push_back(ReadFile(path));
    return out;
  }();
  std::vector<const char*> text_pointers, path_pointers;
  for (size_t i = 0; i < paths.size(); ++i) {
    text_pointers.push_back(texts[i].c_str());
    path_pointers.push_back(paths[i].c_str());
  }
  nvrtcProgram program;
  nvrtcCreateProgram(&program, source.c_str(), "k.cu", static_cast<int>(paths.size()), text_pointers.data(),
                     path_pointers.data());
  const char* options[] = {"--gpu-architecture=sm_90a", "-std=c++17"};
  const nvrtcResult result = nvrtcCompileProgram(program, 2, options);
  if (result != NVRTC_SUCCESS) {
    size_t size;
    nvrtcGetProgramLogSize(program, &size);
    std::string log(size, 0);
    nvrtcGetProgramLog(program, log.data());
    std::fprintf(stderr, "%s\n", log.c_str());
    std::exit(1);
  }
  size_t size;
  nvrtcGetCUBINSize(program, &size);
  std::string cubin(size, 0);
  nvrtcGetCUBIN(program, cubin.data());
  nvrtcDestroyProgram(&program);
  return cubin;
}

Kernel LoadKernel(const std::string& cubin, const char* name) {
  CUmodule module;
  CU(cuModuleLoadData(&module, cubin.data()));
  Kernel kernel;
  CU(cuModuleGetFunction(&kernel.function, module, name));
  CU(cuFuncGetAttribute(&kernel.registers, CU_FUNC_ATTRIBUTE_NUM_REGS, kernel.function));
  CU(cuFuncGetAttribute(&kernel.local, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, kernel.function));
  return kernel;
}

void Launch(CUstream stream, const Kernel& kernel, unsigned x, unsigned y, unsigned threads, bool pdl, void** params) {
  CUlaunchConfig config = {};
  config.gridDimX = x;
  config.gridDimY = y;
  config.gridDimZ = 1;
  config.blockDimX = threads;
  config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = pdl ? 1 : 0;
  CU(cuLaunchKernelEx(&config, kernel.function, params, nullptr));
}

double Time(const std::function<void(CUstream, int)>& launch, int buffers, int count) {
  CUstream stream;
  CU(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  CUgraph graph;
  CUgraphExec exec;
  CU(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
  for (int i = 0; i < count; ++i) launch(stream, i % buffers);
  CU(cuStreamEndCapture(stream, &graph));
  CU(cuGraphInstantiate(&exec, graph, 0));
  CUevent begin, end;
  CU(cuEventCreate(&begin, 0));
  CU(cuEventCreate(&end, 0));
  std::vector<float> times;
  for (int i = 0; i < 8; ++i) {
    CU(cuEventRecord(begin, stream));
    CU(cuGraphLaunch(exec, stream));
    CU(cuEventRecord(end, stream));
    CU(cuEventSynchronize(end));
    float ms;
    CU(cuEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms * 1e3f / static_cast<float>(count));
  }
  std::sort(times.begin(), times.end());
  cuGraphExecDestroy(exec);
  cuGraphDestroy(graph);
  cuEventDestroy(begin);
  cuEventDestroy(end);
  cuStreamDestroy(stream);
  return times[times.size() / 2];
}

// In-place read-modify-write of the q and k part of packed rows.
constexpr const char* kFloorSource = R"(
template <int U, bool Cached> __device__ void Row(uint4* base, long long row, int vectors) {
  uint4* p = base + blockIdx.x * row;
  for (int i = threadIdx.x; i < vectors; i += U * blockDim.x) {
    uint4 v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) { int j = i + u * blockDim.x; if (j < vectors) { if (Cached) v[u] = p[j]; else
      asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];":"=r"(v[u].x),"=r"(v[u].y),"=r"(v[u].z),"=r"(v[u].w):"l"(p+j)); } }
#pragma unroll
    for (int u = 0; u < U; ++u) { int j = i + u * blockDim.x; if (j < vectors) { v[u].x ^= 1; if (Cached) p[j] = v[u]; else
      asm volatile("st.global.L1::no_allocate.v4.u32 [%0],{%1,%2,%3,%4};"::"l"(p+j),"r"(v[u].x),"r"(v[u].y),"r"(v[u].z),"r"(v[u].w):"memory"); } }
  }
}
template <int U> __device__ void Flat(uint4* base, long long row, int vectors, long long n) {
  long long i = (long long)blockIdx.x * blockDim.x * U + threadIdx.x; uint4 v[U];
#pragma unroll
  for (int u = 0; u < U; ++u) { long long j = i + u * blockDim.x; if (j < n) v[u] = base[j / vectors * row + j % vectors]; }
#pragma unroll
  for (int u = 0; u < U; ++u) { long long j = i + u * blockDim.x; if (j < n) { v[u].x ^= 1; base[j / vectors * row + j % vectors] = v[u]; } }
}
extern "C" {
#define ROW(U, C) __global__ void row##U##C(uint4* b, long long r, int q, long long) { Row<U, C>(b, r, q); }
ROW(1,0) ROW(2,0) ROW(4,0) ROW(1,1) ROW(2,1) ROW(4,1)
#define FLAT(U) __global__ void flat##U(uint4* b, long long r, int q, long long n) { Flat<U>(b, r, q, n); }
FLAT(1) FLAT(2) FLAT(4)
// At few tokens: reads the position and a weight beside the row, all loads at once.
#define DEP(NAME, PDL) __global__ void NAME(uint2* p, const long long* pos, const uint2* w, int row, int per, int n) { \
  if (PDL) asm volatile("griddepcontrol.wait;" ::: "memory"); int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { \
  int t = i / per; uint2* at = p + (long long)t * row + i % per; uint2 v = *at; long long P = pos[t]; uint2 ww = w[i & 31]; v.x ^= (unsigned)P ^ ww.x; v.y ^= ww.y; *at = v; } \
  if (PDL) asm volatile("griddepcontrol.launch_dependents;"); }
DEP(dep, 0) DEP(dep_pdl, 1)
}
// With the store: q and k in place, k and v to the caches (narrow: a byte for each element, as fp8).
template <int U, bool Narrow> __device__ void Kv(uint4* base, long long row, int q, int k, const long long* slots, char* kc, char* vc) {
  uint4* p = base + blockIdx.x * row; const long long slot = slots[blockIdx.x];
  for (int i = threadIdx.x; i < q + 2 * k; i += U * blockDim.x) {
    uint4 v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) { int j = i + u * blockDim.x; if (j < q + 2 * k) v[u] = p[j]; }
#pragma unroll
    for (int u = 0; u < U; ++u) { int j = i + u * blockDim.x; if (j < q + 2 * k) { v[u].x ^= 1; if (j < q + k) p[j] = v[u];
      if (j >= q) { char* c = j < q + k ? kc : vc; long long at = slot * k + (j < q + k ? j - q : j - q - k);
        if (Narrow) ((uint2*)c)[at] = make_uint2(v[u].x, v[u].y); else ((uint4*)c)[at] = v[u]; } } }
  }
}
extern "C" {
#define KV(U, N) __global__ void kv##U##N(uint4* b, long long r, int q, int k, const long long* s, char* kc, char* vc) { Kv<U, N>(b, r, q, k, s, kc, vc); }
KV(1,0) KV(2,0) KV(4,0) KV(1,1) KV(2,1) KV(4,1)
#define DEPKV(NAME, N, PDL) __global__ void NAME(uint2* p, const long long* pos, const uint2* w, const long long* slots, char* kc, char* vc, int q, int k, int n) { \
  if (PDL) asm volatile("griddepcontrol.wait;" ::: "memory"); int i = blockIdx.x * blockDim.x + threadIdx.x; int row = q + 2 * k; if (i < n) { \
  int t = i / row, j = i % row; uint2 v = p[i]; long long P = pos[t], slot = slots[t]; uint2 ww = w[i & 31]; v.x ^= (unsigned)P ^ ww.x; v.y ^= ww.y; if (j < q + k) p[i] = v; \
  if (j >= q) { char* c = j < q + k ? kc : vc; long long at = slot * k + (j < q + k ? j - q : j - q - k); if (N) ((unsigned*)c)[at] = v.x; else ((uint2*)c)[at] = v; } } }
DEPKV(depkv0, 0, 0) DEPKV(depkv0_pdl, 0, 1) DEPKV(depkv1, 1, 0) DEPKV(depkv1_pdl, 1, 1)
__global__ void empty() {}
}
)";

struct TuneShape {
  const char* name;
  int tokens, q_heads, k_heads, head_dim;
};

}  // namespace
}  // namespace ropewalk

using namespace ropewalk;

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  CU(cuInit(0));
  CUdevice device;
  CU(cuDeviceGet(&device, 0));
  CUcontext context;
  CU(cuDevicePrimaryCtxRetain(&context, device));
  CU(cuCtxSetCurrent(context));
  char name[256];
  CU(cuDeviceGetName(name, sizeof(name), device));
  std::printf("%s\n", name);

  const std::string floor_cubin = Compile(kFloorSource);
  std::map<std::string, Kernel> floors;
  for (const char* f : {"row10", "row20", "row40",   "row11",      "row21",  "row41",     "flat1", "flat2",
                        "flat4", "dep",   "dep_pdl", "empty",      "kv10",   "kv20",      "kv40",  "kv11",
                        "kv21",  "kv41",  "depkv0",  "depkv0_pdl", "depkv1", "depkv1_pdl"}) {
    floors[f] = LoadKernel(floor_cubin, f);
  }

  const TuneShape many[] = {
      {"1024 32/8", 1024, 32, 8, 128},     {"2048 32/8", 2048, 32, 8, 128},     {"flux", 4096, 24, 24, 128},
      {"qwen_image", 4096, 32, 32, 128},   {"8192 32/4", 8192, 32, 4, 128},     {"16384 32/8", 16384, 32, 8, 128},
      {"4096 32/8x64", 4096, 32, 8, 64},   {"4096 16/4x256", 4096, 16, 4, 256}, {"4096 8/2x512", 4096, 8, 2, 512},
      {"4096 32/8x72", 4096, 32, 8, 72},   {"4096 32/8x80", 4096, 32, 8, 80},   {"4096 32/8x96", 4096, 32, 8, 96},
      {"4096 32/8x112", 4096, 32, 8, 112}, {"4096 16/4x160", 4096, 16, 4, 160}, {"4096 16/4x192", 4096, 16, 4, 192}};
  const TuneShape few[] = {{"1", 1, 32, 8, 128},   {"4", 4, 32, 8, 128},     {"16", 16, 32, 8, 128},
                           {"64", 64, 32, 8, 128}, {"256", 256, 32, 8, 128}, {"1024", 1024, 32, 8, 128}};

  CUdeviceptr base, weights, turns, positions, table, fault, caches, slots;
  const size_t pool = size_t{1200} << 20;
  CU(cuMemAlloc(&base, pool));
  CU(cuMemAlloc(&weights, 1 << 16));
  CU(cuMemAlloc(&turns, 1 << 16));
  CU(cuMemAlloc(&positions, 8 << 16));
  CU(cuMemAlloc(&table, size_t{16384} * 1024 * 4));
  CU(cuMemAlloc(&fault, 256));
  const size_t cache_pool = size_t{1} << 30;
  CU(cuMemAlloc(&caches, 2 * cache_pool));
  CU(cuMemAlloc(&slots, 8 << 16));
  {
    std::vector<uint16_t> data(1 << 22);
    for (auto& x : data) x = static_cast<uint16_t>(0x3f00 + (std::rand() & 0xff) + (std::rand() & 1) * 0x8000);
    for (size_t at = 0; at + data.size() * 2 <= pool; at += data.size() * 2)
      CU(cuMemcpyHtoD(base + at, data.data(), data.size() * 2));
    CU(cuMemcpyHtoD(weights, data.data(), 1 << 16));
    std::vector<uint64_t> t(8192);
    for (size_t i = 0; i < t.size(); ++i)
      t[i] = static_cast<uint64_t>(std::pow(1e6, -static_cast<double>(i % 64) / 64.) / 6.283185307179586 *
                                   18446744073709551616.0);
    CU(cuMemcpyHtoD(turns, t.data(), 1 << 16));
    std::vector<int64_t> pos(1 << 16);
    for (size_t i = 0; i < pos.size(); ++i) pos[i] = static_cast<int64_t>(i % 16384);
    CU(cuMemcpyHtoD(positions, pos.data(), 8 << 16));
    // Slots in pages of 16 that lie anywhere.
    for (size_t i = 0; i < pos.size(); ++i) pos[i] = static_cast<int64_t>((i / 16 * 37 % 1024) * 16 + i % 16);
    CU(cuMemcpyHtoD(slots, pos.data(), 8 << 16));
    CU(cuMemsetD8(table, 0x3e, size_t{16384} * 1024 * 4));
    CU(cuMemsetD8(fault, 0xff, 256));
  }

  struct Mode {
    const char* name;
    int pairing, norm, table, cache;
  };
  const Mode modes[] = {{"rope neox turns", 0, 0, 0, 0}, {"rope il turns", 1, 0, 0, 0},
                        {"rope neox table", 0, 0, 1, 0}, {"rope il table", 1, 0, 1, 0},
                        {"norm neox turns", 0, 1, 0, 0}, {"norm il turns", 1, 1, 0, 0},
                        {"norm neox table", 0, 1, 1, 0}, {"norm il table", 1, 1, 1, 0},
                        {"kv bf16", 0, 1, 0, kRopeBF16}, {"kv fp8", 0, 1, 0, kRopeE4M3}};

  const auto run = [&](const TuneShape& s, bool is_few) {
    const int row = (s.q_heads + 2 * s.k_heads) * s.head_dim;  // packed
    const size_t bytes = static_cast<size_t>(row) * 2 * static_cast<size_t>(s.tokens);
    const bool cold = s.tokens >= 1024;
    const int buffers = static_cast<int>(std::clamp<size_t>((cold ? 800000000 : 16000000) / bytes, 4, cold ? 512 : 64));
    const int count = is_few && !cold ? 512 : std::max(buffers, 64);
    if (bytes * static_cast<size_t>(buffers) > pool) std::exit(2);
    const auto at = [&](int b) { return base + bytes * static_cast<size_t>(b); };
    double best = 1e9, best_pdl = 1e9;
    std::string winner;
    const int vectors = (s.q_heads + s.k_heads) * s.head_dim / 8;
    for (const char* f : {"row10", "row20", "row40", "row11", "row21", "row41", "flat1", "flat2", "flat4"}) {
      if (is_few && !cold) break;
      for (int threads : {64, 128, 256, 384, 512, 768, 1024}) {
        const bool flat = f[0] == 'f';
        const long long n = static_cast<long long>(s.tokens) * vectors;
        const int per = threads * (flat ? f[4] - '0' : 1);
        const unsigned grid = flat ? static_cast<unsigned>((n + per - 1) / per) : static_cast<unsigned>(s.tokens);
        const double t = Time(
            [&](CUstream stream, int b) {
              CUdeviceptr p = at(b);
              long long r = row / 8, nn = n;
              int q = vectors;
              void* params[] = {&p, &r, &q, &nn};
              Launch(stream, floors[f], grid, 1, static_cast<unsigned>(threads), false, params);
            },
            buffers, count);
        if (t < best) best = t, winner = std::string(f) + "/" + std::to_string(threads);
      }
    }
    if (is_few) {
      for (int threads : {32, 64, 128, 256, 512}) {
        for (bool pdl : {false, true}) {
          const int per = (s.q_heads + s.k_heads) * s.head_dim / 4;
          const double t = Time(
              [&](CUstream stream, int b) {
                CUdeviceptr p = at(b);
                int r = row / 4, q = per, n = s.tokens * per;
                void* params[] = {&p, &positions, &weights, &r, &q, &n};
                Launch(stream, floors[pdl ? "dep_pdl" : "dep"], static_cast<unsigned>((n + threads - 1) / threads), 1,
                       static_cast<unsigned>(threads), pdl, params);
              },
              buffers, count);
          double& b = pdl ? best_pdl : best;
          if (t < b) {
            b = t;
            if (!pdl) winner = "dep/" + std::to_string(threads);
          }
        }
      }
    }
    std::printf("\n%s (%s) x%d: floor %.2f us (%s, %.0f GB/s)", s.name, is_few ? "few" : "many", s.head_dim, best,
                winner.c_str(), static_cast<double>(vectors) * 32 * s.tokens / best / 1e3);
    if (is_few) std::printf(" pdl floor %.2f", best_pdl);
    std::printf("\n");

    // The floors of the store.
    double best_kv[2] = {1e9, 1e9}, best_kv_pdl[2] = {1e9, 1e9};
    const bool with_kv =
        s.head_dim == 128 &&
        static_cast<size_t>(buffers) * static_cast<size_t>(s.tokens * s.k_heads * s.head_dim) * 2 <= cache_pool;
    const auto cache_at = [&](int b, int which) {
      return caches + static_cast<size_t>(which) * cache_pool +
             static_cast<size_t>(b % (is_few && !cold ? 8 : buffers)) *
                 static_cast<size_t>((s.tokens < 16384 ? (is_few && !cold ? 16384 : s.tokens) : s.tokens) * s.k_heads *
                                     s.head_dim) *
                 2;
    };
    for (int narrow = 0; narrow < 2 && with_kv && is_few != cold; ++narrow) {
      if (cold) {
        for (const char* f : {"kv1", "kv2", "kv4"}) {
          for (int threads : {128, 256, 384, 512, 768}) {
            const double t = Time(
                [&](CUstream stream, int b) {
                  CUdeviceptr p = at(b), kc = cache_at(b, 0), vc = cache_at(b, 1);
                  long long r = row / 8;
                  int q = s.q_heads * s.head_dim / 8, k = s.k_heads * s.head_dim / 8;
                  void* params[] = {&p, &r, &q, &k, &positions, &kc, &vc};
                  Launch(stream, floors[f + std::to_string(narrow)], static_cast<unsigned>(s.tokens), 1,
                         static_cast<unsigned>(threads), false, params);
                },
                buffers, count);
            best_kv[narrow] = std::min(best_kv[narrow], t);
          }
        }
      } else {
        for (int threads : {64, 128, 256, 512}) {
          for (int pdl = 0; pdl < 2; ++pdl) {
            const double t = Time(
                [&](CUstream stream, int b) {
                  CUdeviceptr p = at(b), kc = cache_at(b, 0), vc = cache_at(b, 1);
                  int q = s.q_heads * s.head_dim / 4, k = s.k_heads * s.head_dim / 4, n = s.tokens * (q + 2 * k);
                  void* params[] = {&p, &positions, &weights, &slots, &kc, &vc, &q, &k, &n};
                  Launch(stream, floors[std::string("depkv") + std::to_string(narrow) + (pdl ? "_pdl" : "")],
                         static_cast<unsigned>((n + threads - 1) / threads), 1, static_cast<unsigned>(threads), pdl,
                         params);
                },
                buffers, count);
            double& b = pdl ? best_kv_pdl[narrow] : best_kv[narrow];
            b = std::min(b, t);
          }
        }
      }
    }
    if (with_kv)
      std::printf("  kv floors: bf16 %.2f pdl %.2f, fp8 %.2f pdl %.2f\n", best_kv[0], best_kv_pdl[0], best_kv[1],
                  best_kv_pdl[1]);

    for (const Mode& mode : modes) {
      if (mode.cache && (!with_kv || best_kv[0] == 1e9)) continue;
      if (s.head_dim != 128 && mode.pairing) continue;
      if (argc > 3 && !std::strstr(mode.name, argv[3])) continue;
      for (int pdl = 0; pdl <= (is_few ? 1 : 0); ++pdl) {
        struct Candidate {
          RopeCudaKey key;
          unsigned grid_y;
          std::future<std::string> cubin;
          double time = 1e9;
          int registers = 0, local = 0, min_blocks = 0;
        };
        std::vector<Candidate> candidates;
        const auto add = [&](int vector, int lanes, int threads, int in_flight, int min_blocks, int flat) {
          RopeCudaKey key;
          key.variant.dtype = kRopeBF16;
          key.variant.pairing = static_cast<uint8_t>(mode.pairing);
          key.variant.norm = static_cast<uint8_t>(mode.norm);
          key.variant.weight = mode.norm ? kRopeWeight : kRopeNoWeight;
          key.variant.weight_dtype = mode.norm ? kRopeBF16 : kRopeNoDtype;
          key.variant.table_dtype = mode.table ? kRopeF32 : kRopeNoDtype;
          key.variant.positions_dtype = kRopeI64;
          key.dense_indices = 1;
          key.packed = 1;
          key.flat = static_cast<uint8_t>(flat);
          key.min_blocks = static_cast<uint8_t>(min_blocks);
          key.table_row = mode.table ? s.head_dim : 0;
          key.eps = mode.norm ? 1e-6f : 0.0f;
          if (mode.cache) {
            key.variant.slots_dtype = kRopeI64;
            key.variant.cache_dtype = static_cast<uint8_t>(mode.cache);
            key.variant.store_k = key.variant.store_v = 1;
            key.v_dim = static_cast<uint16_t>(s.head_dim);
            key.page_shift = kFlatPages;
            key.v_token = row;
            key.cache_token = s.k_heads * s.head_dim;
            key.cache_head = s.head_dim;
          }
          key.head_dim = key.rotary_dim = static_cast<uint16_t>(s.head_dim);
          key.threads = static_cast<uint16_t>(threads);
          key.vector = static_cast<uint8_t>(vector);
          key.lanes = static_cast<uint8_t>(lanes);
          key.few_tokens = is_few && in_flight > 0;
          key.in_flight = static_cast<uint8_t>(std::max(in_flight, 1));
          key.q_heads = static_cast<uint16_t>(s.q_heads);
          key.k_heads = static_cast<uint16_t>(s.k_heads);
          key.q_token = key.k_token = row;
          key.unit_scaling = 1;
          key.dependent_launch = pdl ? 2 : 0;
          if (mode.cache && key.few_tokens) key.packed = 2;
          const int run = mode.pairing ? vector / 2 : vector;
          key.table_vector = static_cast<uint8_t>(!mode.table ? 1 : run % 4 == 0 ? 4 : run % 2 == 0 ? 2 : 1);
          const int groups = threads / lanes * key.in_flight;
          const unsigned grid_y =
              is_few ? static_cast<unsigned>((s.q_heads + (mode.cache ? 2 : 1) * s.k_heads + groups - 1) / groups) : 1;
          std::string source = RopeCudaSource(key);
          candidates.push_back({key, grid_y, std::async(std::launch::async, Compile, source), 1e9, 0, 0, min_blocks});
        };
        const auto pow2 = [](int x) {
          int r = 1;
          while (r < x) r *= 2;
          return r;
        };
        if (is_few) {
          for (int threads : {64, 96, 128, 160, 192, 256, 320, 384, 640}) {
            for (int heads : {1, 2}) {
              add(4, pow2(s.head_dim / 8), threads, heads, 1, 0);
              add(8, pow2(s.head_dim / 16), threads, heads, 1, 0);
              add(2, std::min(32, pow2(s.head_dim / 4)), threads, heads, 1, 0);
            }
          }
          if (s.tokens >= 128) {
            for (int threads : {64, 128, 160, 256, 384}) {
              for (int flat : {0, 1}) add(8, pow2(s.head_dim / 16), threads, 0, 0, flat);
            }
          }
        } else {
          // Vectors of an access each; and others, for heads fetched side by side.
          const int access = s.head_dim % 16 ? 4 : 8;
          std::vector<std::pair<int, int>> shares = {{access, s.head_dim / access / 2}};  // vector and lanes
          if (shares[0].second > 8) shares.emplace_back(access, (s.head_dim / access / 2 + 1) / 2);
          for (int vector : {6, 10, 12, 14, 16, 18, 20}) {
            if (mode.norm && s.head_dim / 2 % vector == 0) shares.emplace_back(vector, s.head_dim / 2 / vector);
          }
          for (const auto [vector, lanes] : shares) {
            if (lanes > 32) continue;
            const bool plain = vector == access;
            for (int threads : {32, 64, 96, 128, 160, 192, 224, 256, 320, 448}) {
              for (int in_flight : {1, 2, 3, 4, 5, 6, 8}) {
                if (s.head_dim != 128 && in_flight > (!plain && threads <= 64 ? 8 : threads <= 64 ? 3 : 2)) continue;
                if (s.head_dim == 128 && in_flight != 1 && in_flight != 2 && in_flight != 3 && in_flight != 5) continue;
                const int groups = threads / 32 * (32 / lanes), heads = s.q_heads + s.k_heads;
                for (int flat : {0, 1, 2, 3, 4, 5, 8}) {  // of so many rounds
                  const int at_once = groups * std::max(flat, 1);
                  if ((in_flight - 1) * at_once >= heads || at_once - groups >= heads) continue;
                  if (in_flight * (flat ? at_once * s.head_dim * 2 : threads * 32) > 48 * 1024) continue;
                  if (plain ? flat > 2 : !flat || threads > 128 || (flat > 1 && in_flight > 3)) continue;
                  for (int warps : {0, 32, 40, 48}) {
                    const int min_blocks = warps * 32 / threads;
                    if ((warps && min_blocks == 0) || min_blocks > 32 || (warps == 32 && !mode.cache && !flat) ||
                        (warps == 48 && s.head_dim != 128))
                      continue;
                    add(vector, lanes, threads, in_flight, min_blocks, flat);
                  }
                }
              }
            }
          }
        }
        for (Candidate& c : candidates) {
          const Kernel kernel = LoadKernel(c.cubin.get(), "rope_kernel");
          c.registers = kernel.registers;
          c.local = kernel.local;
          if (kernel.local) continue;
          std::vector<rope_cuda_args> args(static_cast<size_t>(buffers));
          for (int b = 0; b < buffers; ++b) {
            rope_cuda_args& a = args[static_cast<size_t>(b)];
            std::memset(&a, 0, sizeof(a));
            a.q = a.q_out = reinterpret_cast<void*>(at(b));
            a.k = a.k_out = reinterpret_cast<void*>(at(b) + static_cast<size_t>(s.q_heads * s.head_dim) * 2);
            a.positions = reinterpret_cast<void*>(positions);
            a.turns = reinterpret_cast<const rw_u64*>(turns);
            a.cos = reinterpret_cast<void*>(table);
            a.sin = reinterpret_cast<void*>(table + static_cast<size_t>(s.head_dim / 2) * 4);
            a.q_weight = reinterpret_cast<void*>(weights);
            a.k_weight = reinterpret_cast<void*>(weights + 1024);
            a.fault = reinterpret_cast<rope_fault*>(fault);
            if (mode.cache) {
              a.slots = reinterpret_cast<void*>(cold ? positions : slots);
              a.slot_count = 16384;
              a.v = reinterpret_cast<void*>(at(b) + static_cast<size_t>((s.q_heads + s.k_heads) * s.head_dim) * 2);
              a.k_cache = reinterpret_cast<void*>(cache_at(b, 0));
              a.v_cache = reinterpret_cast<void*>(cache_at(b, 1));
              a.k_inverse_scale = a.v_inverse_scale = 1.0f;
            }
            rope_params& p = a.params;
            p.batch = 1;
            p.tokens = s.tokens;
            p.rows = a.rows = 16384;
            p.q = p.k = p.q_out = p.k_out = {0, row, s.head_dim};
            p.positions_token = 1;
            p.cos_row = p.sin_row = s.head_dim;
            p.cos_pair = p.sin_pair = 1;
            p.q_heads = s.q_heads;
            p.k_heads = s.k_heads;
            p.head_dim = p.rotary_dim = s.head_dim;
            p.axes = 1;
            p.eps = 1e-6f;
            p.attention_scaling = 1.0f;
          }
          c.time = Time(
              [&](CUstream stream, int b) {
                void* params[] = {&args[static_cast<size_t>(b)]};
                Launch(stream, kernel, static_cast<unsigned>(s.tokens), c.key.few_tokens ? c.grid_y : 1, c.key.threads,
                       pdl, params);
              },
              buffers, count);
        }
        std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.time < b.time; });
        const int narrow = mode.cache == kRopeE4M3;
        const double floor = mode.cache ? (pdl ? best_kv_pdl[narrow] : best_kv[narrow]) : pdl ? best_pdl : best;
        std::printf("  %-16s%s", mode.name, pdl ? " pdl" : "");
        for (size_t i = 0; i < std::min<size_t>(6, candidates.size()); ++i) {
          const Candidate& c = candidates[i];
          std::printf(" | %.2f=%.3f v%d l%d t%d x%d b%d%s r%d", c.time, c.time / floor, c.key.vector, c.key.lanes,
                      c.key.threads, c.key.in_flight, c.min_blocks,
                      c.key.flat ? (" flat" + std::to_string(c.key.flat)).c_str() : "", c.registers);
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
  };
  if (what == "all" || what == "few") {
    for (const TuneShape& s : few) {
      if (argc < 3 || std::strstr(argv[2], s.name)) run(s, true);
    }
  }
  // "sizes": the heads that are not of 128 alone.
  if (what == "all" || what == "many" || what == "sizes") {
    for (const TuneShape& s : many) {
      if (what != "sizes" ||
          (s.head_dim != 128 && (argc < 3 || std::strstr(argv[2], std::to_string(s.head_dim).c_str())))) {
        run(s, false);
      }
    }
  }
}
