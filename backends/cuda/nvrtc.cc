// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/nvrtc.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string_view>

#include "backends/cuda/driver.h"
#include "base/environment.h"
#include "base/fork.h"
#include "base/text.h"
#include "base/wide_stack.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

constexpr int kOldestMajor = 12, kNewestMajor = 13;

// ---------------------------------------------------------------------------------------------------------------------
// Where it may lie

std::string EnvironmentText(const char* name) {
  const char* value = EnvironmentVariable(name);
  return value ? value : "";
}

// The file's real path; "" if there is no such file.
std::string RealPath(const fs::path& path) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  return error ? "" : real.string();
}

// Files mapped into this process. Not by std::ifstream: streams bring all of libstdc++'s locales into a static library.
std::vector<std::string> MappedFiles() {
  std::vector<std::string> files;
  const std::unique_ptr<FILE, int (*)(FILE*)> maps(std::fopen("/proc/self/maps", "re"), std::fclose);
  char* text = nullptr;
  size_t size = 0;
  while (maps && getline(&text, &size, maps.get()) > 0) {
    const std::string_view line(text, std::strcspn(text, "\n"));
    const size_t begin = line.find('/');
    if (begin == std::string_view::npos || line.find(".so", begin) == std::string_view::npos) continue;
    const std::string_view file = line.substr(begin);
    if (files.empty() || files.back() != file) files.emplace_back(file);
  }
  std::free(text);
  return files;
}

// The folders of Python packages that this process uses: NVIDIA's wheels lie beside torch's and ours.
std::vector<fs::path> PackageFolders(const std::vector<std::string>& mapped) {
  std::vector<fs::path> folders;
  const auto add = [&](const fs::path& folder) {
    if (std::ranges::find(folders, folder) == folders.end()) folders.push_back(folder);
  };
  for (const std::string& file : mapped) {
    for (const std::string_view name : {"/site-packages/", "/dist-packages/"}) {
      if (const size_t at = file.find(name); at != std::string::npos) add(file.substr(0, at + name.size() - 1));
    }
  }
  // A program of the wheel, in bin/: its packages are in ../lib/python3.X/site-packages.
  std::error_code error;
  const fs::path lib = fs::read_symlink("/proc/self/exe", error).parent_path().parent_path() / "lib";
  for (fs::directory_iterator it(lib, error), end; !error && it != end; it.increment(error)) {
    if (it->path().filename().string().starts_with("python3")) add(it->path() / "site-packages");
  }
  return folders;
}

struct Search {
  std::vector<std::string> found;   // real paths, the first choice first
  std::vector<std::string> places;  // looked at, for the message
};

Search FindNvrtc() {
  Search search;
  const auto add = [&](const fs::path& path) {
    const std::string real = RealPath(path);
    if (real.empty() || std::ranges::find(search.found, real) != search.found.end()) return;
    search.found.push_back(real);
  };
  if (const std::string named = EnvironmentText("ROPEWALK_LIBNVRTC"); !named.empty()) {
    search.places.push_back(Text(named, " (ROPEWALK_LIBNVRTC)"));
    add(named);
    return search;
  }
  const std::vector<std::string> mapped = MappedFiles();
  for (const std::string& file : mapped) {
    const std::string name = fs::path(file).filename();
    if (name.starts_with("libnvrtc") && name.find("builtins") == std::string::npos) add(file);
  }
  // Code of a newer compiler than the driver may not load: the driver's own version comes first.
  std::vector<std::string> names;
  const CudaDriver& driver = GetCudaDriver();
  const int newest = driver.version ? std::max(driver.version / 1000, kOldestMajor) : kNewestMajor;
  for (int major = newest; major >= kOldestMajor; --major) names.push_back(Text("libnvrtc.so.", major));
  for (int major = newest + 1; major <= kNewestMajor; ++major) names.push_back(Text("libnvrtc.so.", major));
  names.push_back("libnvrtc.so");

  std::vector<fs::path> folders;
  for (const fs::path& packages : PackageFolders(mapped)) {
    for (int major = newest; major > kOldestMajor; --major)
      folders.push_back(packages / "nvidia" / Text("cu", major) / "lib");
    folders.push_back(packages / "nvidia/cuda_nvrtc/lib");
  }
  const std::string library_path = EnvironmentText("LD_LIBRARY_PATH");
  for (size_t begin = 0; begin < library_path.size();) {
    const size_t end = std::min(library_path.find(':', begin), library_path.size());
    if (end > begin) folders.emplace_back(library_path.substr(begin, end - begin));
    begin = end + 1;
  }
  for (const char* home : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const std::string folder = EnvironmentText(home); !folder.empty())
      folders.push_back(fs::path(folder) / "lib64");
  }
  folders.emplace_back("/usr/local/cuda/lib64");
  for (const fs::path& folder : folders) {
    search.places.push_back(folder.string());
    for (const std::string& name : names) add(folder / name);
  }
  // Last, as the system's loader finds it: the one way that has to open it.
  search.places.push_back("the system's loader");
  if (search.found.empty()) {
    for (const std::string& name : names) {
      void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL);
      link_map* map = nullptr;
      if (!library || dlinfo(library, RTLD_DI_LINKMAP, &map) != 0) continue;
      add(map->l_name);
      break;
    }
  }
  return search;
}

// ---------------------------------------------------------------------------------------------------------------------
// The library

using Program = struct ProgramTag*;

// X(name, symbol, parameters..)
#define ROPEWALK_NVRTC_FUNCTIONS(X)                                                                        \
  X(GetErrorString, const char*, "nvrtcGetErrorString", int)                                               \
  X(Version, int, "nvrtcVersion", int*, int*)                                                              \
  X(GetNumSupportedArchs, int, "nvrtcGetNumSupportedArchs", int*)                                          \
  X(GetSupportedArchs, int, "nvrtcGetSupportedArchs", int*)                                                \
  X(CreateProgram, int, "nvrtcCreateProgram", Program*, const char*, const char*, int, const char* const*, \
    const char* const*)                                                                                    \
  X(DestroyProgram, int, "nvrtcDestroyProgram", Program*)                                                  \
  X(CompileProgram, int, "nvrtcCompileProgram", Program, int, const char* const*)                          \
  X(GetProgramLogSize, int, "nvrtcGetProgramLogSize", Program, size_t*)                                    \
  X(GetProgramLog, int, "nvrtcGetProgramLog", Program, char*)                                              \
  X(GetCUBINSize, int, "nvrtcGetCUBINSize", Program, size_t*)                                              \
  X(GetCUBIN, int, "nvrtcGetCUBIN", Program, char*)

struct OpenedNvrtc : Nvrtc {
#define ROPEWALK_MEMBER(name, result, symbol, ...) result (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_NVRTC_FUNCTIONS(ROPEWALK_MEMBER)
#undef ROPEWALK_MEMBER
};

// "" if the file serves, else why not.
std::string Open(const std::string& path, OpenedNvrtc* nvrtc) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return Text("cannot be opened: ", dlerror());
  std::string missing;
#define ROPEWALK_FIND(name, result, symbol, ...)                                 \
  nvrtc->name = reinterpret_cast<decltype(nvrtc->name)>(dlsym(library, symbol)); \
  if (!nvrtc->name) missing = symbol;
  ROPEWALK_NVRTC_FUNCTIONS(ROPEWALK_FIND)
#undef ROPEWALK_FIND
  if (nvrtc->Version && (nvrtc->Version(&nvrtc->major, &nvrtc->minor) != 0 || nvrtc->major < kOldestMajor)) {
    return Text("is version ", nvrtc->major, ".", nvrtc->minor, ", but ", kOldestMajor, ".0 or newer is needed");
  }
  if (!missing.empty()) return Text("has no ", missing);
  int count = 0;
  if (nvrtc->GetNumSupportedArchs(&count) != 0 || count <= 0) return "knows no architecture";
  nvrtc->archs.resize(static_cast<size_t>(count));
  if (nvrtc->GetSupportedArchs(nvrtc->archs.data()) != 0) return "knows no architecture";
  return "";
}

std::mutex nvrtc_mutex;
// Empty until something was found. Never destroyed: calls while the process ends are answered too.
Search* located = nullptr;
const OpenedNvrtc* opened = nullptr;  // never closed

const OnFork kForgetSearch([] {
  new (&nvrtc_mutex) std::mutex;
  located = nullptr;
});

constexpr const char* kRemedy =
    "install NVRTC 12.0 or newer (the CUDA toolkit, or pip install nvidia-cuda-nvrtc), name the file in "
    "ROPEWALK_LIBNVRTC, or make a bundle with `ropewalk compile`";

Status NotFound(const Search& search, const std::string& unusable) {
  std::string text = "NVRTC, the compiler of CUDA kernels, was not found";
  if (!unusable.empty()) text = Text("no NVRTC serves: ", unusable);
  Append(&text, "; looked for libnvrtc.so.13, libnvrtc.so.12 and libnvrtc.so in");
  for (size_t i = 0; i < search.places.size(); ++i) Append(&text, Text(i ? ", " : " ", search.places[i]));
  return Status::Unavailable(Text(text, "; ", kRemedy));
}

Status LocateLocked() {
  if (!located || located->found.empty()) {
    Search search = FindNvrtc();
    if (search.found.empty()) return NotFound(search, "");
    located = new Search(std::move(search));
  }
  return {};
}

NvrtcFile FileAt(const std::string& path) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  return {path, Text(fs::path(path).filename().string(), " ", error ? 0 : size)};
}

// -default-device: functions without __device__ are the device's too.
std::vector<std::string> Options() {
  std::vector<std::string> options = {"-std=c++17", "-default-device", "--fmad=true"};
#ifndef NDEBUG
  options.push_back("-DROPEWALK_CHECK_PLANS");  // backends/cuda/kernel/group.cuh
#endif
  if (EnvironmentText("ROPEWALK_CUDA_LINEINFO") == "1") options.push_back("-lineinfo");  // for profilers
  return options;
}

}  // namespace

Status LocateNvrtc(NvrtcFile* file) {
  const std::lock_guard lock(nvrtc_mutex);
  ROPEWALK_TRY(LocateLocked());
  *file = opened ? opened->file : FileAt(located->found.front());
  return {};
}

Status OpenNvrtc(const Nvrtc** nvrtc) {
  const std::lock_guard lock(nvrtc_mutex);
  std::string unusable;
  while (!opened) {
    ROPEWALK_TRY(LocateLocked());
    auto candidate = std::make_unique<OpenedNvrtc>();
    candidate->file = FileAt(located->found.front());
    const std::string why = Open(candidate->file.path, candidate.get());
    if (why.empty()) {
      opened = candidate.release();
      break;
    }
    Append(&unusable, Text(unusable.empty() ? "" : ", ", candidate->file.path, " ", why));
    located->found.erase(located->found.begin());
    if (located->found.empty()) return NotFound(*located, unusable);
  }
  *nvrtc = opened;
  return {};
}

std::string NvrtcText(const Nvrtc& nvrtc) {
  return Text("NVRTC ", nvrtc.major, ".", nvrtc.minor, " (", nvrtc.file.path, ")");
}

std::string ExactArch(const CudaDevice& device) { return Text(CudaArchText(device), device.major >= 9 ? "a" : ""); }

Status ChooseArch(const Nvrtc& nvrtc, const CudaDevice& device, std::string* arch) {
  int best = 0;
  for (const int candidate : nvrtc.archs) {
    if (candidate / 10 == device.major && candidate % 10 <= device.minor) best = std::max(best, candidate);
  }
  if (!best) {
    return Status::Unavailable(Text(NvrtcText(nvrtc), " cannot compile for ", CudaArchText(device), "; it knows sm_",
                                    nvrtc.archs.front(), " to sm_", nvrtc.archs.back(), "; ", kRemedy));
  }
  *arch = best == device.major * 10 + device.minor ? ExactArch(device) : Text("sm_", best);
  return {};
}

int ArchNumber(const std::string& arch) {
  if (!arch.starts_with("sm_")) return 0;
  int number = 0;
  const char* end = arch.data() + arch.size();
  const auto [rest, error] = std::from_chars(arch.data() + 3, end, number);
  const bool named = rest == end || (rest + 1 == end && (*rest == 'a' || *rest == 'f'));
  return error == std::errc() && number > 0 && named ? number : 0;
}

bool ArchServes(const std::string& arch, const CudaDevice& device) {
  const int number = ArchNumber(arch);
  if (number == 0) return false;
  if (arch.back() == 'a') return number == device.major * 10 + device.minor;
  return number / 10 == device.major && number % 10 <= device.minor;
}

std::string CompileOptionsText() {
  std::string text;
  for (const std::string& option : Options()) Append(&text, Text(text.empty() ? "" : " ", option));
  return text;
}

Status CompileCuda(const Nvrtc& base, const std::string& source, const std::string& arch, bool verbose,
                   Compilation* out) {
  const auto& nvrtc = static_cast<const OpenedNvrtc&>(base);
  const auto start = std::chrono::steady_clock::now();
  std::vector<const char*> paths, texts;
  for (size_t i = 0; i < kCudaSourceCount; ++i) {
    paths.push_back(kCudaSources[i].path);
    texts.push_back(kCudaSources[i].text);
  }
  std::vector<std::string> options = Options();
  // Without the declarations that come with every kernel and that ours does not use: 7 ms less, the same code.
  if (nvrtc.major > 12 || (nvrtc.major == 12 && nvrtc.minor >= 4)) options.push_back("-minimal");
  options.push_back(Text("--gpu-architecture=", arch));
  if (verbose) options.push_back("--ptxas-options=-v");
  std::vector<const char*> option_texts;
  option_texts.reserve(options.size());
  for (const std::string& option : options) option_texts.push_back(option.c_str());

  const auto check = [&](int result, const char* call) -> Status {
    if (result == 0) return {};
    return Status::Driver(Text("rope: ", call, " failed: ", nvrtc.GetErrorString(result), " in ", NvrtcText(nvrtc),
                               " for ", arch, out->log.empty() ? "" : "\n", out->log));
  };
  Program program = nullptr;
  *out = {};
  ROPEWALK_TRY(check(nvrtc.CreateProgram(&program, source.c_str(), "rope_kernel.cu", static_cast<int>(paths.size()),
                                         texts.data(), paths.data()),
                     "nvrtcCreateProgram"));
  const auto destroy = [&](Program* p) { nvrtc.DestroyProgram(p); };
  const std::unique_ptr<Program, decltype(destroy)> destroyed(&program, destroy);

  int compiled = 0;
  OnWideStack(
      [&] { compiled = nvrtc.CompileProgram(program, static_cast<int>(option_texts.size()), option_texts.data()); });
  size_t size = 0;
  if (nvrtc.GetProgramLogSize(program, &size) == 0 && size > 1) {
    out->log.resize(size);
    if (nvrtc.GetProgramLog(program, out->log.data()) != 0) out->log.clear();
    out->log.resize(out->log.find_last_not_of(std::string_view("\0\n", 2)) + 1);
  }
  ROPEWALK_TRY(check(compiled, "nvrtcCompileProgram"));
  ROPEWALK_TRY(check(nvrtc.GetCUBINSize(program, &size), "nvrtcGetCUBINSize"));
  out->cubin.resize(size);
  ROPEWALK_TRY(check(nvrtc.GetCUBIN(program, out->cubin.data()), "nvrtcGetCUBIN"));
  out->milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return {};
}

}  // namespace ropewalk
