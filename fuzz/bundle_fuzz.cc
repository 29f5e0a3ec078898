// Fuzzes what reads files that decide which kernel runs: bundles, as they are and with headers and checksums made
// right, and the shapes that `ropewalk tune` keeps, with the plans that come of them. A file is used, or refused with
// one sentence; one that changed by a byte is refused; whatever shape is asked for, the plan is right or none.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cuda/bundle.h"
#include "backends/cuda/nvrtc.h"
#include "backends/cuda/shapes.h"
#include "backends/cuda/tuned.h"
#include "base/text.h"
#include "conformance/case_call.h"

namespace ropewalk {
namespace {

void Require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "bundle_fuzz: %s\n", what.c_str());
  std::abort();
}

// Whether the bytes are used.
bool Read(std::string_view bytes) {
  const std::string copy(bytes);  // of its own size, for AddressSanitizer
  BundleContent content;
  const std::string why = ParseBundle(copy, &content);
  if (!why.empty()) {
    Require(why.starts_with("it ") && why.size() < 300, Text("why: ", why));
    return false;
  }
  const CudaDevice devices[] = {{132, 9, 0}, {108, 8, 0}, {148, 10, 3}};
  Require(ArchNumber(content.arch) > 0, "an architecture without a number");
  for (const CudaDevice& device : devices) (void)ArchServes(content.arch, device);
  size_t size = 0;
  for (const auto& [digest, kernel] : content.kernels) {
    Require(
        kernel.empty() || (kernel.data() >= copy.data() && kernel.data() + kernel.size() <= copy.data() + copy.size()),
        "a kernel outside the file");
    size += digest.size() + sizeof(uint64_t) + kernel.size();
  }
  Require(size <= copy.size(), "kernels larger than the file");
  return true;
}

void ReadChanged(std::string bytes, size_t at, uint8_t by) {
  if (by == 0) return;
  char& byte = bytes[at % bytes.size()];
  byte = static_cast<char>(byte ^ by);
  Require(!Read(bytes), Text("byte ", at % bytes.size(), " changed, but the bundle is used"));
}

// Identity and payload from the text, which a zero parts.
std::string SealedFrom(std::string_view text, const std::string& before) {
  const size_t zero = text.find('\0');
  const std::string identity = before + std::string(text.substr(0, zero));
  return Sealed(kBundleMagic, identity, zero == std::string_view::npos ? "" : text.substr(zero + 1));
}

const std::vector<RopeCall>& Calls() {
  static const auto* const calls = [] {
    const RopeCase cases[] = {
        {.name = "few", .tokens = 3, .q_heads = 8, .k_heads = 2, .head_dim = 128, .norm = true},
        {.name = "many", .tokens = 300, .q_heads = 5, .k_heads = 5, .head_dim = 80, .rotary_dim = 40},
        {.name = "store",
         .tokens = 70,
         .q_heads = 4,
         .k_heads = 1,
         .head_dim = 64,
         .layout = Layout::kPacked,
         .cache = Cache::kNhd,
         .cache_dtype = kBF16,
         .v_dim = 64}};
    auto* made = new std::vector<RopeCall>;
    static std::vector<std::unique_ptr<CaseCall>> kept;  // whose memory the calls name
    for (const RopeCase& c : cases) {
      Require(CaseCall::Make(c, HostMemory(), &kept.emplace_back()).ok(), c.name);
      const Status status = LowerRope(kept.back()->args(), nullptr, &made->emplace_back());
      Require(status.ok(), status.text());
    }
    return made;
  }();
  return *calls;
}

void PlanWith(const RopeCall& call, const CudaDevice& device, const RopeCudaOptions& options) {
  RopeCudaPlan plan;
  if (const Status status = PlanRopeCuda(call, device, options, &plan); !status.ok()) {
    Require(status.code() == ROPEWALK_INVALID_ARGUMENT && !status.text().empty(), status.text());
    return;
  }
  const Status right = CheckRopeCudaPlan(call, device, plan);
  Require(right.ok(), right.text());
}

void ReadShapes(std::string_view text) {
  std::vector<RopeCudaTuned::Entry> entries = ParseTunedShapes(text);
  if (entries.size() > 8) entries.resize(8);
  for (const RopeCall& call : Calls()) {
    CudaDevice device = {132, 9, 0, true};
    RopeCudaTuned tuned{entries};
    device.tuned = &tuned;
    PlanWith(call, device, {true});
    const RopeCudaFeatures features = FeaturesOf(call, device);
    for (RopeCudaTuned::Entry& entry : tuned.entries) {  // each as if it were of this call
      PlanWith(call, device, {.shape = &entry.shape});
      entry.features = features;
      PlanWith(call, device, {true});
      entry.features.norm = 255;  // of none
    }
  }
}

}  // namespace
}  // namespace ropewalk

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ropewalk;
  if (size < 4) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 4, size - 4);
  const auto at = static_cast<size_t>(data[1] | data[2] << 8);
  const std::string version = Text("ropewalk ", ropewalk_version(), "\n");
  const std::string ours = Text(version, "sources ", kCudaSourceDigest, "\n");
  switch (data[0] % 6) {
    case 0: (void)Read(rest); break;
    case 1: (void)Read(SealedFrom(rest, "")); break;
    case 2: (void)Read(SealedFrom(rest, version)); break;
    case 3: {
      const std::string bytes = SealedFrom(rest, ours + "arch sm_90a\n");
      (void)Read(bytes);
      ReadChanged(bytes, at, data[3]);
      (void)Read(std::string_view(bytes).substr(0, at % bytes.size()));
      break;
    }
    case 4: (void)Read(SealedFrom(rest, ours)); break;
    default: ReadShapes(rest); break;
  }
  return 0;
}
