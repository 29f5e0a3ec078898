// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/bundle.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "backends/cuda/nvrtc.h"
#include "base/environment.h"
#include "base/files.h"
#include "base/fork.h"
#include "base/text.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".bundle";
constexpr size_t kMostBundleBytes = size_t{1} << 30;

// One file.
struct Bundle {
  std::string path;
  std::string bytes;  // what the content's views point into
  BundleContent content;
};

struct Bundles {
  std::vector<std::unique_ptr<const Bundle>> usable;
  std::vector<std::string> refused;  // "PATH: why"
  std::string looked_at;
};

std::string BundleIdentity(const std::string& arch, const std::string& compiler) {
  return Text("ropewalk ", ropewalk_version(), "\nsources ", kCudaSourceDigest, "\narch ", arch, "\ncompiler ",
              compiler, "\n");
}

// The value of a line "name value"; "" if there is none.
std::string_view Line(std::string_view identity, std::string_view name) {
  const std::string start = Text(name, " ");
  for (size_t at = 0; at < identity.size();) {
    const size_t end = std::min(identity.find('\n', at), identity.size());
    const std::string_view line = identity.substr(at, end - at);
    if (line.starts_with(start)) return line.substr(start.size());
    at = end + 1;
  }
  return "";
}

// "" if the file serves, else why not.
std::string Load(Bundle* bundle, Trust trust) {
  if (std::string why = ReadFile(bundle->path, trust, kMostBundleBytes, &bundle->bytes); !why.empty()) return why;
  return ParseBundle(bundle->bytes, &bundle->content);
}

void LoadFrom(const fs::path& place, Trust trust, Bundles* bundles) {
  std::vector<fs::path> files;
  std::error_code error;
  if (fs::is_directory(place, error)) {
    for (fs::directory_iterator it(place, error), end; !error && it != end; it.increment(error)) {
      if (it->path().extension() == kSuffix) files.push_back(it->path());
    }
    std::ranges::sort(files);
  } else {
    files.push_back(place);
  }
  for (const fs::path& file : files) {
    auto bundle = std::make_unique<Bundle>();
    bundle->path = file.string();
    if (const std::string why = Load(bundle.get(), trust); !why.empty()) {
      bundles->refused.push_back(Text(bundle->path, ": ", why));
    } else {
      bundles->usable.push_back(std::move(bundle));
    }
  }
}

const Bundles* ReadBundles() {
  auto* loaded = new Bundles;
  const char* named = EnvironmentVariable("ROPEWALK_BUNDLE");
  if (named && *named) LoadFrom(named, Trust::kOwn, loaded);
  loaded->looked_at = named && *named ? Text("ROPEWALK_BUNDLE is ", named) : "ROPEWALK_BUNDLE is not set";
  Dl_info library;
  if (dladdr(reinterpret_cast<const void*>(&ReadBundles), &library) && library.dli_fname) {
    std::error_code error;
    const fs::path beside = fs::absolute(library.dli_fname, error).parent_path() / "bundles";
    if (fs::is_directory(beside, error)) LoadFrom(beside, Trust::kAny, loaded);
    Append(&loaded->looked_at, Text(", and there is nothing in ", beside.string()));
  }
  return loaded;
}

// Read once: the environment does not change under a process.
const Bundles& LoadedBundles() { return OnceMade<Bundles, ReadBundles>::Get(); }

CudaDevice DeviceOf(const std::string& arch, int sm_count) {
  const int number = std::atoi(arch.c_str() + 3);
  return {sm_count, number / 10, number % 10};
}

// The GPUs of each architecture that are in use, by their multiprocessors.
struct ArchDevices {
  const char* arch;
  std::vector<int> sm_counts;
};

const std::vector<ArchDevices>& KnownArchs() {
  static const auto* const archs = new std::vector<ArchDevices>{
      {"sm_80", {108, 56}},                         // A100, A30
      {"sm_86", {84, 82, 80, 72, 68, 48, 46, 28}},  // A40, A10, RTX 3090 to 3060
      {"sm_89", {142, 128, 76, 60, 58, 46, 34}},    // L40S, RTX 4090, 4080, 4070, L4
      {"sm_90a", {132, 114, 78}},                   // H100 SXM and H200, H100 PCIe, H20
      {"sm_100a", {148}},                           // B200
      {"sm_103a", {148, 160}},                      // B300
      {"sm_120a", {188, 170, 84, 70, 48}},          // RTX PRO 6000, RTX 5090, 5080, 5070 Ti, 5070
  };
  return *archs;
}

}  // namespace

// Its identity is lines of "name value"; its payload, for each kernel: the digest of its identity, a size, bytes.
std::string ParseBundle(std::string_view bytes, BundleContent* content) {
  std::string_view identity, payload;
  if (!Unseal(bytes, kBundleMagic, &identity, &payload)) return "it is damaged, or no bundle";
  if (const auto version = Line(identity, "ropewalk"); version != ropewalk_version()) {
    return Text("it was made by Ropewalk ", version.substr(0, 32), ", but this is ", ropewalk_version());
  }
  if (const auto sources = Line(identity, "sources"); sources != kCudaSourceDigest) {
    return Text("it was made from other kernel sources (", sources.substr(0, 12), "), but this library has ",
                std::string_view(kCudaSourceDigest).substr(0, 12));
  }
  const std::string_view arch = Line(identity, "arch");
  if (ArchNumber(std::string(arch.substr(0, 16))) == 0 || arch.size() > 16) {
    return Text("it has kernels for an unknown architecture (", arch.substr(0, 16), ")");
  }
  content->arch = arch;
  content->kernels.clear();
  while (!payload.empty()) {
    Digest digest;
    uint64_t size;
    if (payload.size() < sizeof(digest) + sizeof(size)) return "it is damaged";
    std::memcpy(&digest, payload.data(), sizeof(digest));
    std::memcpy(&size, payload.data() + sizeof(digest), sizeof(size));
    payload.remove_prefix(sizeof(digest) + sizeof(size));
    if (payload.size() < size) return "it is damaged";
    content->kernels[digest] = payload.substr(0, size);
    payload.remove_prefix(size);
  }
  return "";
}

bool FindInBundles(const RopeCudaKey& key, const CudaDevice& device, Cubin* out) {
  for (const auto& bundle : LoadedBundles().usable) {
    if (!ArchServes(bundle->content.arch, device)) continue;
    const auto it = bundle->content.kernels.find(DigestOf(KernelIdentity(key, bundle->content.arch)));
    if (it == bundle->content.kernels.end()) continue;
    out->bytes = it->second;
    out->source = Text("bundle ", bundle->path);
    return true;
  }
  return false;
}

bool BundlesServe(const CudaDevice& device) {
  return std::ranges::any_of(LoadedBundles().usable,
                             [&](const auto& b) { return ArchServes(b->content.arch, device); });
}

std::string BundleRefusals(const CudaDevice& device) {
  const Bundles& bundles = LoadedBundles();
  std::string text;
  const auto add = [&](const std::string& sentence) { Append(&text, Text(text.empty() ? "" : "; ", sentence)); };
  for (const auto& bundle : bundles.usable) {
    if (ArchServes(bundle->content.arch, device)) {
      add(Text("the bundle ", bundle->path, " does not hold this variant"));
    } else {
      add(Text("the bundle ", bundle->path, " has kernels for ", bundle->content.arch, ", but the GPU is sm_",
               device.major, device.minor));
    }
  }
  for (const std::string& refused : bundles.refused) add(Text("the bundle ", refused));
  return text.empty() ? Text("no bundle was found: ", bundles.looked_at) : text;
}

std::vector<std::string> BundleTexts() {
  std::vector<std::string> texts;
  for (const auto& b : LoadedBundles().usable)
    texts.push_back(Text(b->path, " (", b->content.arch, ", ", b->content.kernels.size(), " kernels)"));
  for (const std::string& refused : LoadedBundles().refused) texts.push_back(Text("refused ", refused));
  return texts;
}

std::vector<std::string> BundleArchs() {
  std::vector<std::string> archs;
  for (const ArchDevices& known : KnownArchs()) archs.emplace_back(known.arch);
  return archs;
}

Status BundleDevices(const std::string& arch, std::vector<CudaDevice>* devices) {
  std::string names;
  for (const ArchDevices& known : KnownArchs()) {
    Append(&names, Text(names.empty() ? "" : ", ", known.arch));
    if (arch != known.arch) continue;
    for (const int count : known.sm_counts) devices->push_back(DeviceOf(arch, count));
    return {};
  }
  return Status::Invalid(Text("compile: arch must be one of ", names, ", but is \"", arch, "\""));
}

Status CollectBundleKeys(const RopeCall& call, const std::vector<CudaDevice>& devices, int64_t max_tokens,
                         std::vector<RopeCudaKey>* keys) {
  std::unordered_set<std::string> known;
  const auto bytes = [](const RopeCudaKey& key) {
    return std::string(reinterpret_cast<const char*>(&key), sizeof(key));
  };
  for (const RopeCudaKey& key : *keys) known.insert(bytes(key));
  // A dimension of size 1 has no stride.
  RopeCall one = call;
  rope_params& p = one.params;
  for (rope_strides* strides : {&p.q, &p.k, &p.q_out, &p.k_out, &p.v}) strides->token = 0;
  p.positions_token = p.offsets_token = p.slots_token = 0;
  for (int64_t tokens = 1; tokens <= max_tokens; ++tokens) {
    // The layout changes with the number of tokens: try each small number, then go on in steps of an eighth.
    if (tokens > 512) tokens = std::min(max_tokens, tokens + tokens / 8);
    RopeCall sized = tokens == 1 ? one : call;
    sized.params.tokens = tokens;
    for (const CudaDevice& device : devices) {
      RopeCudaPlan plan;
      ROPEWALK_TRY(PlanRopeCuda(sized, device, {.dependent_launch = true, .rules = true}, &plan));
      if (plan.grid_x && known.insert(bytes(plan.key)).second) keys->push_back(plan.key);
    }
  }
  return {};
}

Status WriteBundle(const std::vector<RopeCudaKey>& keys, const std::string& arch, const std::string& directory,
                   const std::function<void(size_t done, const RopeCudaKey& key)>& progress, BundleReport* report) {
  // For others to read: a bundle is often made by one user and run by another.
  if (const std::string why = MakeOwnDirectory(directory, 0755); !fs::is_directory(directory)) {
    return Status::Invalid(Text("compile: ", directory, " is no directory and cannot be made: ", why));
  }
  const Nvrtc* nvrtc;
  ROPEWALK_TRY(OpenNvrtc(&nvrtc));
  *report = {};
  std::vector<std::string> cubins(keys.size());
  std::mutex mutex;  // over what follows
  size_t next = 0;
  Status status;
  const auto work = [&] {
    for (;;) {
      size_t i;
      {
        const std::lock_guard lock(mutex);
        if (!status.ok() || next == keys.size()) return;
        i = next++;
        if (progress) progress(i, keys[i]);
      }
      Compilation compilation;
      Status compiled = CompileRopeCuda(*nvrtc, keys[i], arch, /*verbose=*/false, &compilation);
      cubins[i] = std::move(compilation.cubin);
      const std::lock_guard lock(mutex);
      report->milliseconds += compilation.milliseconds;
      if (status.ok()) status = std::move(compiled);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  ROPEWALK_TRY(status);

  std::string payload;
  for (size_t i = 0; i < keys.size(); ++i) {
    const Digest digest = DigestOf(KernelIdentity(keys[i], arch));
    const uint64_t size = cubins[i].size();
    payload.append(reinterpret_cast<const char*>(digest.data()), digest.size());
    payload.append(reinterpret_cast<const char*>(&size), sizeof(size));
    payload += cubins[i];
  }
  report->kernels = keys.size();
  report->path = (fs::path(directory) / Text("ropewalk-", arch, kSuffix)).string();
  report->bytes = payload.size();
  return PublishFile(report->path, Sealed(kBundleMagic, BundleIdentity(arch, nvrtc->file.identity), payload), 0644);
}

}  // namespace ropewalk
