// ropewalk compile: bundles of CUDA kernels for machines without a compiler.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "backends/cuda/bundle.h"
#include "cli/common.h"
#include "cli/model_cases.h"
#include "conformance/case_call.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

struct CompileOptions {
  std::vector<std::string> models, archs, dtypes = {"bf16"};
  std::string directory = "ropewalk-bundles";
  int64_t tokens = 16384;
};

// The ways in which a model's layers may be called: stages, layouts, dtypes of positions.
std::vector<RopeCase> Ways(const RopeCase& base) {
  std::vector<RopeCase> stages = {base};
  const auto add = [&](auto change) {
    stages.push_back(base);
    change(&stages.back());
  };
  add([](RopeCase* c) { c->out_of_place = true; });
  if (base.axes == Axes::kNone) add([](RopeCase* c) { c->angles = Angles::kTable; });
  if (base.k_heads > 0) {
    add([](RopeCase* c) { c->cache = Cache::kNhd; });
    add([](RopeCase* c) { c->cache = Cache::kNhd, c->cache_dtype = kE4M3; });
  }
  std::vector<RopeCase> ways;
  for (const RopeCase& stage : stages) {
    for (const Layout layout : {Layout::kSeparate, Layout::kPacked, Layout::kTransposed}) {
      for (const uint32_t positions : {kI64, kI32}) {
        RopeCase c = stage;
        c.layout = layout;
        c.batch = layout == Layout::kTransposed ? 2 : 0;  // [batch, heads, tokens, dim], as transformers has it
        c.positions_dtype = positions;
        bench::Complete(&c);
        ways.push_back(c);
      }
    }
  }
  return ways;
}

// The variants that the models need on the devices of one architecture.
std::vector<RopeCudaKey> Keys(const CompileOptions& options, const std::vector<Model>& models,
                              const std::string& arch) {
  constexpr int64_t kCaseTokens = 16;  // of the calls whose strides and alignments are taken; any number above one
  std::vector<CudaDevice> devices;
  if (const Status status = BundleDevices(arch, &devices); !status.ok()) throw Failure(status.text());
  std::vector<RopeCudaKey> keys;
  for (const Model& model : models) {
    for (const std::string& dtype : options.dtypes) {
      for (const RopeCase& base : ModelCases(model, kCaseTokens, ParseDtype(dtype))) {
        for (const RopeCase& way : Ways(base)) {
          std::unique_ptr<CaseCall> call;
          RopeCall lowered;
          Status status = CaseCall::Make(way, HostMemory(), &call);
          if (status.ok()) status = LowerRope(call->args(), nullptr, &lowered);
          if (status.ok()) status = CollectBundleKeys(lowered, devices, options.tokens, &keys);
          if (!status.ok()) throw Failure(fmt::format("{}, {}: {}", model.path, way.name, status.text()));
        }
      }
    }
  }
  return keys;
}

int Compile(const CompileOptions& options) {
  const std::vector<Model> models = LoadModels(options.models);
  const std::vector<std::string> archs = options.archs.empty() ? BundleArchs() : options.archs;
  Table table({"arch", ">kernels", ">MB", ">CPU s", "file"});
  for (const std::string& arch : archs) {
    const std::vector<RopeCudaKey> keys = Keys(options, models, arch);
    BundleReport report;
    Status status;
    {
      Progress progress(arch, static_cast<int64_t>(keys.size()));
      status = WriteBundle(
          keys, arch, options.directory, [&](size_t, const RopeCudaKey& key) { progress.Step(RopeCudaName(key)); },
          &report);
    }
    if (!status.ok()) throw Failure(status.text());
    table.Add({arch, fmt::format("{}", report.kernels), fmt::format("{:.1f}", static_cast<double>(report.bytes) / 1e6),
               fmt::format("{:.1f}", report.milliseconds / 1e3), report.path});
  }
  table.Print();
  fmt::print("\nOn machines without a compiler: ROPEWALK_BUNDLE={} (ropewalk doctor tells whether it serves).\n",
             options.directory);
  return kHeld;
}

}  // namespace

void AddCompile(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<CompileOptions>();
  CLI::App* command = app->add_subcommand("compile", "bundles of CUDA kernels for machines without a compiler");
  command->add_option("--arch", options->archs, "architectures, such as sm_90a,sm_100a (default: all that are known)")
      ->delimiter(',')
      ->check(CLI::IsMember(BundleArchs()))
      ->type_name("ARCH");
  AddModelOption(command, &options->models);
  command->add_option("--dtype", options->dtypes, "of q and k: bf16, f16, f32; several by commas (default: bf16)")
      ->delimiter(',')
      ->check(CLI::IsMember({"bf16", "f16", "f32"}))
      ->type_name("DTYPE");
  command->add_option("--tokens", options->tokens, "kernels for 1 to so many tokens")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("-o,--output", options->directory, "the directory, made if need be: one file an architecture")
      ->type_name("DIR")
      ->capture_default_str();
  command->footer(
      "Examples:\n"
      "  ropewalk compile --arch sm_90a --model qwen3-8b  one model, for H100 and H200\n"
      "  ropewalk compile -o bundles                      all that come with Ropewalk\n\n"
      "Needs NVRTC and no GPU. Each way of calling a model's layers is compiled: in\n"
      "place and out of place, from frequencies and from a table, with the KV store in\n"
      "the model's dtype and in fp8, tensors apart, packed and transposed, positions of\n"
      "32 and 64 bits. A bundle serves only the version of Ropewalk that made it.");
  command->callback([options, exit_code] { *exit_code = Compile(*options); });
}

}  // namespace ropewalk::cli
