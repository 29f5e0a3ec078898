// ropewalk floor: the kernels of the floor on CUDA for one shape, so that other programs can launch the very kernels
// that `bench --backend cuda` divides by. Needs no GPU.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "backends/cuda/nvrtc.h"
#include "cli/common.h"
#include "cli/model_cases.h"
#include "measure/cuda_floor.h"

namespace ropewalk::cli {
namespace {

struct FloorOptions {
  int64_t tokens = 1, head_dim = 128, rotary_dim = 0, slots = 0;
  std::vector<int64_t> heads = {32, 8, 8};
  std::string dtype = "bf16", cache, arch, output;
  bool few = false, many = false, apart = false, out_of_place = false, k_store_only = false;
};

// Where tensors would lie: far enough from each other, and aligned as allocations are. Nothing is read there.
unsigned char* Address(uintptr_t number) {
  return reinterpret_cast<unsigned char*>((number + 1) << 44);  // NOLINT(performance-no-int-to-ptr)
}

Status RowsOfOptions(const FloorOptions& options, bench::CudaFloorRows* rows) {
  const int64_t item = DtypeBytes(ParseDtype(options.dtype));
  const int64_t head = options.head_dim * item;
  const bool stores = !options.cache.empty();
  const int64_t row_heads = options.heads[0] + options.heads[1] + options.heads[2];
  std::vector<bench::CudaFloorTensor> tensors;
  int64_t before = 0;  // heads in the row
  for (size_t i = 0; i < 3; ++i) {
    const int64_t heads = options.heads[i];
    bench::CudaFloorTensor tensor;
    tensor.rows.data = options.apart ? Address(i) : Address(0) + before * head;
    tensor.rows.rows = options.tokens;
    tensor.rows.row_stride = (options.apart ? heads : row_heads) * head;
    tensor.rows.runs = heads;
    tensor.rows.run_stride = head;
    tensor.rows.bytes = (options.rotary_dim ? options.rotary_dim : options.head_dim) * item;
    before += heads;
    if (heads == 0 || (i == 2 && !stores)) continue;
    const bool written = i == 0 || (i == 1 && !options.k_store_only);
    tensor.out = !written ? nullptr : options.out_of_place ? Address(3 + i) : tensor.rows.data;
    if (stores && i > 0) {
      const int64_t bytes = options.cache == "fp8" ? head / item : head;
      tensor.cache = {Address(6 + i), options.slots ? options.slots : options.tokens, heads * bytes, heads, bytes,
                      bytes};
    }
    tensors.push_back(tensor);
  }
  return bench::RowsOf(tensors, options.few, rows);
}

int Floor(const FloorOptions& options) {
  if (options.heads.size() != 3) throw Failure("--heads must be q,k,v heads, such as 32,8,8");
  if (options.few == options.many)
    throw Failure("give one of --few and --many: with a position and a weight, or without");
  if (options.head_dim % 2 || options.rotary_dim % 2 || options.rotary_dim > options.head_dim) {
    throw Failure(
        fmt::format("--rotary-dim must be even and at most --head-dim, which must be even, but they are {} and {}",
                    options.rotary_dim, options.head_dim));
  }
  const bool stores = !options.cache.empty();
  if (stores && (options.heads[1] == 0 || options.heads[1] != options.heads[2])) {
    throw Failure("--cache needs as many heads of v as of k");
  }
  if (stores && options.rotary_dim) throw Failure("--rotary-dim is for calls without --cache, which move whole heads");
  if (options.cache == "fp8" && options.dtype == "f32") throw Failure("--cache fp8 needs --dtype bf16 or f16");
  if (options.k_store_only && !stores) throw Failure("--k-store-only needs --cache");

  bench::CudaFloorRows rows;
  if (const Status status = RowsOfOptions(options, &rows); !status.ok()) throw Failure(status.text());
  const std::string source = bench::CudaFloorSource(rows);
  Json arguments = Json::array(), shapes = Json::array();
  for (const int pointer : bench::CudaFloorArguments(rows)) arguments.push_back(bench::CudaFloorPointerName(pointer));
  for (const bench::CudaFloorShape& shape : bench::CudaFloorShapes(rows)) {
    shapes.push_back({{"name", bench::ShapeName(shape)},
                      {"kernel", fmt::format("f{}", shape.kernel)},
                      {"blocks", bench::CudaFloorBlocks(rows, shape)},
                      {"threads", shape.threads}});
  }
  if (!options.output.empty()) {
    const Nvrtc* nvrtc = nullptr;
    Compilation compilation;
    Status status = OpenNvrtc(&nvrtc);
    if (status.ok()) status = CompileCuda(*nvrtc, source, options.arch, /*verbose=*/false, &compilation);
    if (!status.ok()) throw Failure(status.text());
    WriteText(options.output, compilation.cubin);
  }
  const Json out = {{"arguments", arguments},
                    {"read_bytes", rows.read_bytes()},
                    {"written_bytes", rows.written_bytes()},
                    {"run_bytes", rows.run_bytes},
                    {"position", bench::kFloorFlip},
                    {"shapes", shapes},
                    {"source", source}};
  fmt::print("{}\n", out.dump(1));
  return kHeld;
}

}  // namespace

void AddFloor(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<FloorOptions>();
  CLI::App* command = app->add_subcommand("floor", "the CUDA kernels of the floor for one shape, as JSON");
  command->add_option("--tokens", options->tokens, "rows")->check(Above0())->capture_default_str();
  command->add_option("--heads", options->heads, "of q, k and v (default: 32,8,8); k and v may be 0")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 16))
      ->type_name("Q,K,V");
  command->add_option("--head-dim", options->head_dim)->check(Above0())->capture_default_str();
  command->add_option("--rotary-dim", options->rotary_dim, "only so much of each head (default: all)")->check(Above0());
  command->add_option("--dtype", options->dtype, "bf16, f16, f32")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}))
      ->capture_default_str()
      ->type_name("DTYPE");
  command->add_flag("--few", options->few, "few tokens: each thread also reads a position and a weight");
  command->add_flag("--many", options->many, "many tokens");
  command->add_flag("--apart", options->apart, "q, k and v are tensors of their own (default: packed rows)");
  command->add_flag("--out-of-place", options->out_of_place, "q and k are written elsewhere, with the same strides");
  command->add_option("--cache", options->cache, "k and v are also written to caches [slots, heads, head_dim]")
      ->check(CLI::IsMember({"same", "fp8"}))
      ->type_name("same|fp8");
  command->add_option("--slots", options->slots, "rows of the caches (default: tokens)")->check(Above0());
  command->add_flag("--k-store-only", options->k_store_only, "k is written to its cache alone");
  CLI::Option* output =
      command->add_option("-o,--output", options->output, "compile, and write the kernels there")->type_name("CUBIN");
  CLI::Option* arch =
      command->add_option("--arch", options->arch, "what to compile for, such as sm_90a")->type_name("ARCH");
  output->needs(arch);
  arch->needs(output);
  command->footer(
      "Examples:\n"
      "  rope, in place, packed rows:\n"
      "    ropewalk floor --tokens 64 --heads 32,8,8 --few\n"
      "  a store, compiled:\n"
      "    ropewalk floor --tokens 4096 --many --cache fp8 --arch sm_90a -o a.cubin\n\n"
      "A kernel takes one argument: the pointers that \"arguments\" names, 8 bytes each.\n"
      "slots: an int64 for each row; positions: 4 bytes for each row, which hold\n"
      "\"position\"; weight: run_bytes of zeros. The floor is the fastest of \"shapes\".");
  command->callback([options, exit_code] { *exit_code = Floor(*options); });
}

}  // namespace ropewalk::cli
