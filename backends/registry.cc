// SPDX-License-Identifier: Apache-2.0
#include "backends/registry.h"

#include <atomic>
#include <cstring>
#include <string_view>

#include "base/text.h"

namespace ropewalk {
namespace {

std::atomic<const Backend*> forced{nullptr};

}  // namespace

std::span<const Backend* const> Backends() {
  static constexpr const Backend* kBackends[] = {&kCpuBackend, &kCudaBackend, &kIntelBackend, &kOpenClBackend};
  return kBackends;
}

Status ChooseBackend(DLDevice device, const Backend** backend) {
  if (const Backend* only = forced.load(std::memory_order_acquire)) {
    if (!only->serves(device)) {
      return Status::Unavailable(Text("rope: backend ", only->name, " is forced, but q is on ", DeviceName(device)));
    }
    *backend = only;
    return {};
  }
  for (const Backend* candidate : Backends()) {
    if (!candidate->serves(device)) continue;
    *backend = candidate;
    return {};
  }
  return Status::Invalid(Text("rope: q must be on the CPU, an NVIDIA GPU, an Intel GPU or an OpenCL device, but is on ",
                              DeviceName(device)));
}

Status ForceBackend(const char* name) {
  const std::string_view text = name ? name : "";
  const std::string_view backend_name = text.substr(0, text.find(':'));
  const std::string part(text.size() > backend_name.size() ? text.substr(backend_name.size() + 1) : "");
  const Backend* chosen = nullptr;
  std::string names;
  for (const Backend* candidate : Backends()) {
    if (backend_name == candidate->name) chosen = candidate;
    Append(&names, Text(names.empty() ? "" : ", ", candidate->name));
  }
  if (!text.empty() && !chosen) {
    return Status::Invalid(Text("force_backend: name must be one of ", names, ", but is \"", text, "\""));
  }
  if (chosen) {
    const Availability availability = chosen->availability();
    if (!availability.available) {
      return Status::Unavailable(
          Text("force_backend: ", availability.detail, availability.remedy.empty() ? "" : "; ", availability.remedy));
    }
    ROPEWALK_TRY(chosen->force(part));
  }
  for (const Backend* candidate : Backends()) {
    if (candidate != chosen) ROPEWALK_TRY(candidate->force(""));
  }
  forced.store(chosen, std::memory_order_release);
  return {};
}

}  // namespace ropewalk
