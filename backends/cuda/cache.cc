// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <map>
#include <mutex>

#include "backends/cuda/bundle.h"
#include "backends/cuda/nvrtc.h"
#include "backends/cuda/sources.h"
#include "core/text.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kKernelMagic = "RWCUBIN1";

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
  if (entry.path.empty() || !ReadFile(entry.path, &bytes) || !Unseal(bytes, kKernelMagic, &identity, &payload))
    return false;
  if (identity != entry.identity) return false;
  *cubin = payload;
  return true;
}

std::mutex disk_mutex;
std::string disk_trouble;  // the last reason why nothing was written

void WriteDisk(const DiskEntry& entry, const std::string& cubin) {
  if (entry.path.empty()) return;
  std::error_code error;
  fs::create_directories(fs::path(entry.path).parent_path(), error);
  const Status status = PublishFile(entry.path, Sealed(kKernelMagic, entry.identity, cubin));
  const std::lock_guard lock(disk_mutex);
  disk_trouble = status.text();
}

// ---------------------------------------------------------------------------------------------------------------------
// From a variant to its cubin

// What the disk has of a variant, for its exact architecture or the one that NVRTC takes instead. NVRTC is opened only
// if the first is not there, which costs up to 11 ms; `nvrtc` stays null otherwise.
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
  // The file located may not serve, and another one have been opened.
  request->disk = DiskEntryOf(KernelIdentity(key, request->arch), request->nvrtc->file);
  if (request->arch != exact || request->nvrtc->file.path != file.path) {
    request->found = !no_disk && ReadDisk(request->disk, cubin);
  }
  return {};
}

// A machine without a compiler lives by bundles: both reasons, then.
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
  ROPEWALK_TRY(CompileCuda(*request.nvrtc, RopeCudaSource(key), request.arch, /*verbose=*/false, &compilation));
  out->bytes = std::move(compilation.cubin);
  out->source = Text("compiled by ", NvrtcText(*request.nvrtc), " in ", std::lround(compilation.milliseconds), " ms");
  WriteDisk(request.disk, out->bytes);
  return {};
}

// What a build came to; the cubin is null if it failed.
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

std::mutex builds_mutex;
std::map<BuildKey, std::shared_future<Built>>& Builds() {
  static auto* const builds = new std::map<BuildKey, std::shared_future<Built>>;  // outlives every thread
  return *builds;
}

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
  if (const char* directory = std::getenv("ROPEWALK_CACHE_DIR")) return directory;
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache == '/') return Text(cache, "/ropewalk");
  if (const char* home = std::getenv("HOME"); home && *home) return Text(home, "/.cache/ropewalk");
  return "";
}

std::string DiskCacheText() {
  const std::string directory = DiskCacheDirectory();
  if (directory.empty()) return "none (ROPEWALK_CACHE_DIR is empty, or there is no HOME)";
  const std::lock_guard lock(disk_mutex);
  return disk_trouble.empty() ? directory : Text(directory, ", not written: ", disk_trouble);
}

Digest DigestOf(std::string_view bytes) {
  using uint128 = unsigned __int128;
  constexpr uint128 kPrime = (static_cast<uint128>(1) << 88) + 0x13b;
  uint128 hash = (static_cast<uint128>(0x6c62272e07bb0142u) << 64) + 0x62b821756295c58du;
  for (const char byte : bytes) hash = (hash ^ static_cast<uint8_t>(byte)) * kPrime;
  Digest digest;
  for (size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<uint8_t>(hash >> (120 - 8 * i));
  return digest;
}

std::string Hex(const Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : digest) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::string KernelIdentity(const RopeCudaKey& key, const std::string& arch) {
  return Text("ropewalk ", ropewalk_version(), "\nsources ", kCudaSourceDigest, "\narch ", arch, "\noptions ",
              CompileOptionsText(), "\n", RopeCudaSource(key));
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
  if (magic != std::string_view(header.magic, sizeof(header.magic))) return false;
  if (header.identity_size > body.size() || header.payload_size != body.size() - header.identity_size) return false;
  if (DigestOf(body) != header.checksum) return false;
  *identity = body.substr(0, header.identity_size);
  *payload = body.substr(header.identity_size);
  return true;
}

bool ReadFile(const std::string& path, std::string* bytes) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  struct stat status = {};
  bool good = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  if (good) bytes->resize(static_cast<size_t>(status.st_size));
  for (size_t done = 0; good && done < bytes->size();) {
    const ssize_t got = read(file, bytes->data() + done, bytes->size() - done);
    if (got < 0 && errno == EINTR) continue;
    good = got > 0;
    if (good) done += static_cast<size_t>(got);
  }
  close(file);
  return good;
}

Status PublishFile(const std::string& path, std::string_view bytes) {
  static std::atomic<unsigned> count{0};
  const std::string temporary = Text(path, ".", getpid(), ".", count.fetch_add(1), ".tmp");
  const auto failed = [&](const char* what) {
    return Status::Driver(Text("cannot ", what, " ", temporary, ": ", std::strerror(errno)));
  };
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) return failed("create");
  Status status;
  for (size_t done = 0; status.ok() && done < bytes.size();) {
    const ssize_t put = write(file, bytes.data() + done, bytes.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0)
      status = failed("write");
    else
      done += static_cast<size_t>(put);
  }
  if (status.ok() && fsync(file) != 0) status = failed("flush");
  close(file);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0) status = failed("rename");
  if (!status.ok()) unlink(temporary.c_str());
  return status;
}

}  // namespace ropewalk
