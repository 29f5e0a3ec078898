// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/cache.h"

#include <elf.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <future>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "backends/cuda/bundle.h"
#include "backends/cuda/nvrtc.h"
#include "base/environment.h"
#include "base/files.h"
#include "base/fork.h"
#include "base/text.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kKernelMagic = "RWCUBIN1";
constexpr size_t kMostCubinBytes = size_t{64} << 20;

struct SealedHeader {
  char magic[8];
  uint32_t identity_size;
  uint32_t reserved;
  uint64_t payload_size;
  Digest checksum;  // of identity and payload
};
static_assert(sizeof(SealedHeader) == 40);

// ---------------------------------------------------------------------------------------------------------------------
// The disk

struct DiskEntry {
  std::string path;      // "" if nothing is kept
  std::string identity;  // with the compiler
};

DiskEntry DiskEntryOf(const std::string& kernel_identity, const NvrtcFile& nvrtc) {
  const std::string directory = DiskCacheDirectory();
  if (directory.empty()) return {};
  DiskEntry entry;
  entry.identity = Text("compiler ", nvrtc.identity, "\n", kernel_identity);
  entry.path = Text(directory, "/", Hex(DigestOf(entry.identity)), ".cubin");
  return entry;
}

bool ReadDisk(const DiskEntry& entry, std::string* cubin) {
  std::string bytes;
  std::string_view identity, payload;
  if (entry.path.empty() || !ReadFile(entry.path, Trust::kOwn, kMostCubinBytes, &bytes).empty() ||
      !Unseal(bytes, kKernelMagic, &identity, &payload)) {
    return false;
  }
  if (identity != entry.identity) return false;
  *cubin = payload;
  return true;
}

constinit ForkMutex disk_mutex;
// The last reason why nothing was written. Never destroyed: calls while the process ends are answered too.
std::string& DiskTrouble() {
  static auto* const trouble = new std::string;
  return *trouble;
}

void WriteDisk(const DiskEntry& entry, const std::string& cubin) {
  if (entry.path.empty()) return;
  std::string trouble = MakeOwnDirectory(fs::path(entry.path).parent_path().string(), 0700);
  if (trouble.empty()) trouble = PublishFile(entry.path, Sealed(kKernelMagic, entry.identity, cubin), 0600).text();
  const std::lock_guard lock(disk_mutex);
  DiskTrouble() = std::move(trouble);
}

// ---------------------------------------------------------------------------------------------------------------------
// From a variant to its cubin

// Looks for a variant on the disk: for its exact architecture, then for the one that NVRTC takes instead. Only the
// second opens NVRTC, which costs up to 11 ms; else `nvrtc` stays null.
struct Request {
  std::string arch;
  DiskEntry disk;
  bool found = false;
  const Nvrtc* nvrtc = nullptr;
};

Status AskDisk(const RopeCudaKey& key, const CudaDevice& device, bool no_disk, std::string* cubin, Request* request) {
  NvrtcFile file;
  ROPEWALK_TRY(LocateNvrtc(&file));
  request->arch = ExactArch(device);
  request->disk = DiskEntryOf(KernelIdentity(key, request->arch), file);
  request->found = !no_disk && ReadDisk(request->disk, cubin);
  if (request->found) return {};
  ROPEWALK_TRY(OpenNvrtc(&request->nvrtc));
  const std::string exact = request->arch;
  ROPEWALK_TRY(ChooseArch(*request->nvrtc, device, &request->arch));
  // The file that was found first may not serve, so that another one was opened.
  request->disk = DiskEntryOf(KernelIdentity(key, request->arch), request->nvrtc->file);
  if (request->arch != exact || request->nvrtc->file.path != file.path) {
    request->found = !no_disk && ReadDisk(request->disk, cubin);
  }
  return {};
}

// False if that lies beyond the end.
template <class T>
bool ReadAt(std::string_view bytes, size_t offset, T* out) {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return false;
  std::memcpy(out, bytes.data() + offset, sizeof(T));
  return true;
}

// A machine without a compiler needs bundles: tell why neither serves.
Status WithBundles(const Status& status, const RopeCudaKey& key, const CudaDevice& device) {
  if (status.code() != ROPEWALK_UNAVAILABLE) return status;
  return Status::Unavailable(
      Text("rope: no kernel for this call (", RopeCudaName(key), "): ", status.text(), "; ", BundleRefusals(device)));
}

Status MakeCubin(const RopeCudaKey& key, const CudaDevice& device, bool no_disk, Cubin* out) {
  if (FindInBundles(key, device, out)) return {};
  Request request;
  ROPEWALK_TRY(AskDisk(key, device, no_disk, &out->bytes, &request));
  if (request.found) {
    out->source = Text("disk ", request.disk.path);
    return {};
  }
  Compilation compilation;
  ROPEWALK_TRY(CompileRopeCuda(*request.nvrtc, key, request.arch, /*verbose=*/false, &compilation));
  out->bytes = std::move(compilation.cubin);
  out->source = Text("compiled by ", NvrtcText(*request.nvrtc), " in ", std::lround(compilation.milliseconds), " ms");
  WriteDisk(request.disk, out->bytes);
  return {};
}

// The result of a build; the cubin is null if it failed.
struct Built {
  Status status;
  std::shared_ptr<const Cubin> cubin;
};

struct BuildKey {
  RopeCudaKey key;
  int major, minor;
  bool operator<(const BuildKey& other) const {
    if (major != other.major) return major < other.major;
    if (minor != other.minor) return minor < other.minor;
    return std::memcmp(&key, &other.key, sizeof(key)) < 0;
  }
};

using BuildMap = std::map<BuildKey, std::shared_future<Built>>;
std::mutex builds_mutex;
BuildMap* builds = nullptr;  // outlives every thread

// Under builds_mutex.
BuildMap& Builds() {
  if (!builds) builds = new BuildMap;
  return *builds;
}

// Threads that were building are not in a child, which would wait for them.
const OnFork kForgetBuilds([] {
  new (&builds_mutex) std::mutex;
  builds = nullptr;
});

}  // namespace

Status GetCubin(const RopeCudaKey& key, const CudaDevice& device, bool no_disk, std::shared_ptr<const Cubin>* out) {
  const BuildKey build_key{key, device.major, device.minor};
  std::promise<Built> promise;
  std::shared_future<Built> others;  // valid if another thread builds or has built it
  {
    const std::lock_guard lock(builds_mutex);
    std::shared_future<Built>& known = Builds()[build_key];
    if (known.valid() && !no_disk) {
      others = known;
    } else {
      known = promise.get_future().share();
    }
  }
  if (others.valid()) {
    const Built& built = others.get();
    *out = built.cubin;
    return built.status;
  }
  // A failure is told to those who waited, and forgotten: the next call tries again.
  Built built;
  struct Forget {
    const BuildKey& key;
    const Built& built;
    ~Forget() {
      if (built.cubin) return;
      const std::lock_guard lock(builds_mutex);
      Builds().erase(key);
    }
  } const forget{build_key, built};
  Cubin cubin;
  built.status = WithBundles(MakeCubin(key, device, no_disk, &cubin), key, device);
  if (built.status.ok()) built.cubin = std::make_shared<const Cubin>(std::move(cubin));
  promise.set_value(built);
  *out = built.cubin;
  return built.status;
}

// The section .nv.info is a list: a format and an attribute (one byte each), the size of what follows (two), and, by
// format 4, a function and a number of it.
int CubinStackBytes(std::string_view cubin) {
  constexpr uint8_t kSized = 4, kFrameSize = 0x11;
  constexpr std::array<char, 10> kName = {'\0', '.', 'n', 'v', '.', 'i', 'n', 'f', 'o', '\0'};  // between two others
  int most = 0;
  Elf64_Ehdr header;
  Elf64_Shdr names, section;
  const auto section_at = [&](unsigned i, Elf64_Shdr* out) {
    return ReadAt(cubin, header.e_shoff + size_t{i} * sizeof(*out), out);
  };
  if (!cubin.starts_with(ELFMAG) || !ReadAt(cubin, 0, &header) || !section_at(header.e_shstrndx, &names)) return 0;
  for (unsigned i = 0; i < header.e_shnum && section_at(i, &section); ++i) {
    std::array<char, 10> name;
    if (!ReadAt(cubin, names.sh_offset + section.sh_name - 1, &name) || name != kName) continue;
    struct {
      uint8_t format, attribute;
      uint16_t size;
    } entry;
    const size_t end = section.sh_offset + section.sh_size;
    for (size_t at = section.sh_offset; at < end && ReadAt(cubin, at, &entry);) {
      at += sizeof(entry);
      if (entry.format != kSized) continue;
      uint32_t number = 0;
      if (entry.attribute == kFrameSize && ReadAt(cubin, at + 4, &number))
        most = std::max(most, static_cast<int>(number));
      at += entry.size;
    }
  }
  return most;
}

Status CompileRopeCuda(const Nvrtc& nvrtc, const RopeCudaKey& key, const std::string& arch, bool verbose,
                       Compilation* out) {
  ROPEWALK_TRY(CompileCuda(nvrtc, RopeCudaSource(key), arch, verbose, out));
  const int spilled = CubinStackBytes(out->cubin);
  if (key.backward != kCudaForward || key.at_once || key.min_blocks == 1 || spilled == 0) return {};
  // By a limit of registers: eight bytes spilled cost up to 7 %, 56 cost 21 % (H200).
  RopeCudaKey free = key;
  free.min_blocks = 1;
  Compilation again;
  if (!CompileCuda(nvrtc, RopeCudaSource(free), arch, verbose, &again).ok()) return {};  // the first one serves
  again.milliseconds += out->milliseconds;
  out->milliseconds = again.milliseconds;
  if (CubinStackBytes(again.cubin) < spilled) *out = std::move(again);
  return {};
}

Status FindCubinSource(const RopeCudaKey& key, const CudaDevice& device, std::string* source) {
  Cubin cubin;
  if (FindInBundles(key, device, &cubin)) {
    *source = cubin.source;
    return {};
  }
  Request request;
  const Status status = AskDisk(key, device, /*no_disk=*/false, &cubin.bytes, &request);
  if (!status.ok()) return WithBundles(status, key, device);
  *source =
      request.found ? Text("disk ", request.disk.path) : Text("would be compiled now by ", NvrtcText(*request.nvrtc));
  return {};
}

std::string DiskCacheDirectory() {
  if (const char* directory = EnvironmentVariable("ROPEWALK_CACHE_DIR")) return directory;
  if (const char* cache = EnvironmentVariable("XDG_CACHE_HOME"); cache && *cache == '/')
    return Text(cache, "/ropewalk");
  if (const char* home = EnvironmentVariable("HOME"); home && *home) return Text(home, "/.cache/ropewalk");
  return "";
}

std::string DiskCacheText() {
  const std::string directory = DiskCacheDirectory();
  if (directory.empty()) return "none (ROPEWALK_CACHE_DIR is empty, or there is no HOME)";
  if (const std::string why = WhyDirectoryIsNotTrusted(directory); !why.empty()) {
    return Text(directory, ", not used: ", why);
  }
  const std::lock_guard lock(disk_mutex);
  return DiskTrouble().empty() ? directory : Text(directory, ", not written: ", DiskTrouble());
}

std::string KernelIdentity(const RopeCudaKey& key, const std::string& arch) {
  return Text("ropewalk ", ropewalk_version(), "\nsources ", kCudaSourceDigest, "\narch ", arch, "\noptions ",
              CompileOptionsText(), key.at_once ? "\nat once\n" : "\n", RopeCudaSource(key));
}

std::string Sealed(std::string_view magic, std::string_view identity, std::string_view payload) {
  std::string body(identity);
  body += payload;
  SealedHeader header = {};
  std::memcpy(header.magic, magic.data(), sizeof(header.magic));
  header.identity_size = static_cast<uint32_t>(identity.size());
  header.payload_size = payload.size();
  header.checksum = DigestOf(body);
  return std::string(reinterpret_cast<const char*>(&header), sizeof(header)) + body;
}

bool Unseal(std::string_view bytes, std::string_view magic, std::string_view* identity, std::string_view* payload) {
  SealedHeader header;
  if (bytes.size() < sizeof(header)) return false;
  std::memcpy(&header, bytes.data(), sizeof(header));
  const std::string_view body = bytes.substr(sizeof(header));
  if (magic != std::string_view(header.magic, sizeof(header.magic)) || header.reserved != 0) return false;
  if (header.identity_size > body.size() || header.payload_size != body.size() - header.identity_size) return false;
  if (DigestOf(body) != header.checksum) return false;
  *identity = body.substr(0, header.identity_size);
  *payload = body.substr(header.identity_size);
  return true;
}

}  // namespace ropewalk
