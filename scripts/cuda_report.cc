// What the compiler makes of the CUDA kernel: registers, spills, shared memory and size for each variant and
// architecture, and a digest of the cubin, by which two runs are compared after a change that is to change no kernel.
// Ends with 1 if a variant spills, warns or does not compile. cuda_report [--all] [--arch sm_90a,sm_100a]
// [--csv FILE] [MODEL.json ..]: without --all, as few variants as hold every pair of choices; models add their own
// shapes.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "backends/cuda/bundle.h"
#include "backends/cuda/nvrtc.h"
#include "base/files.h"
#include "base/text.h"
#include "conformance/variants.h"
#include "scripts/report.h"

namespace ropewalk {
namespace {

struct Row {
  PtxasText said;
  size_t cubin_bytes = 0;
  std::string digest, error;
};

std::vector<Row> CompileAll(const Nvrtc& nvrtc, const std::vector<CudaVariant>& variants, const std::string& arch) {
  std::vector<Row> rows(variants.size());
  OnAllThreads(rows.size(), [&](const auto& next) {
    for (size_t i = next(); i < rows.size(); i = next()) {
      Compilation compilation;
      const Status status = CompileCuda(nvrtc, RopeCudaSource(variants[i].key), arch, /*verbose=*/true, &compilation);
      rows[i] = {ReadPtxas(compilation.log), compilation.cubin.size(), Hex(DigestOf(compilation.cubin)), status.text()};
      if (i % 50 == 0) std::fprintf(stderr, "\r%s: %zu of %zu ", arch.c_str(), i, rows.size());
    }
  });
  std::fprintf(stderr, "\r");
  return rows;
}

template <class Number>
Number Quantile(std::vector<Number> values, double part) {
  std::ranges::sort(values);
  return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
}

// Prints a line for the architecture and one for each bad variant; returns how many are bad.
int Report(const std::string& arch, const std::vector<CudaVariant>& variants, const std::vector<Row>& rows) {
  std::vector<int> registers, shared;
  std::vector<size_t> sizes;
  int bad = 0, stacks = 0;
  for (const Row& row : rows) {
    if (!row.error.empty() || row.said.spilled_bytes || !row.said.warnings.empty()) ++bad;
    if (!row.error.empty()) continue;
    registers.push_back(row.said.registers);
    shared.push_back(row.said.shared_bytes);
    sizes.push_back(row.cubin_bytes);
    stacks += row.said.stack_bytes > 0;
  }
  if (!registers.empty()) {
    std::printf(
        "%-8s %5zu variants   registers %d to %d, median %d   shared bytes up to %d   cubin %zu to %zu bytes, median "
        "%zu   "
        "with a stack %d   bad %d\n",
        arch.c_str(), rows.size(), Quantile(registers, 0), Quantile(registers, 1), Quantile(registers, 0.5),
        Quantile(shared, 1), Quantile(sizes, 0), Quantile(sizes, 1), Quantile(sizes, 0.5), stacks, bad);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    const std::string name = Text(RopeCudaName(variants[i].key), " (case ", variants[i].of, ")");
    if (!row.error.empty()) std::printf("  FAILED %s: %s\n", name.c_str(), row.error.c_str());
    if (row.said.spilled_bytes) std::printf("  SPILLS %d bytes: %s\n", row.said.spilled_bytes, name.c_str());
    if (!row.said.warnings.empty()) std::printf("  WARNS %s: %s", name.c_str(), row.said.warnings.c_str());
  }
  return bad;
}

int Main(const ReportOptions& options) {
  const Nvrtc* nvrtc = nullptr;
  const auto fail = [](const Status& status) {
    std::fprintf(stderr, "error: %s\n", status.text().c_str());
    return 2;
  };
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) return fail(status);
  std::vector<RopeCase> cases = RopeCases();
  if (const Status status = AddModelCases(options.models, &cases); !status.ok()) return fail(status);
  std::ofstream csv(options.csv.empty() ? "/dev/null" : options.csv);
  csv << "arch,kernel,registers,spilled_bytes,stack_bytes,shared_bytes,cubin_bytes,digest\n";
  std::printf("%s\n", NvrtcText(*nvrtc).c_str());
  int bad = 0;
  for (const std::string& arch : options.targets.empty() ? BundleArchs() : options.targets) {
    std::vector<CudaDevice> devices;
    if (const Status status = BundleDevices(arch, &devices); !status.ok()) return fail(status);
    std::vector<CudaVariant> variants;
    if (const Status status = CudaVariantsOf(cases, devices.front(), &variants); !status.ok()) return fail(status);
    if (!options.all) variants = CoveringVariants(variants);
    const std::vector<Row> rows = CompileAll(*nvrtc, variants, arch);
    bad += Report(arch, variants, rows);
    for (size_t i = 0; i < rows.size(); ++i) {
      const PtxasText& said = rows[i].said;
      csv << arch << ',' << RopeCudaName(variants[i].key) << ',' << said.registers << ',' << said.spilled_bytes << ','
          << said.stack_bytes << ',' << said.shared_bytes << ',' << rows[i].cubin_bytes << ',' << rows[i].digest
          << '\n';
    }
  }
  return bad ? 1 : 0;
}

}  // namespace
}  // namespace ropewalk

int main(int count, char** arguments) {
  ropewalk::ReportOptions options;
  const char* usage = "cuda_report [--all] [--arch sm_90a,sm_100a] [--csv FILE] [MODEL.json ..]";
  return ropewalk::ParseOptions(count, arguments, "--arch", usage, &options) ? ropewalk::Main(options) : 2;
}
