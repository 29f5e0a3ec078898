// ropewalk doctor: what serves on this machine, why the rest does not, and what would help.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "backends/cuda/bundle.h"
#include "backends/cuda/cache.h"
#include "backends/cuda/nvrtc.h"
#include "base/environment.h"
#include "cli/common.h"
#include "conformance/runner.h"
#include "measure/floor.h"
#include "measure/timed_case.h"

namespace ropewalk::cli {
namespace {

struct DoctorOptions {
  bool json = false;
};

int Cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

// The name of the first of these libraries that the loader finds; "" if there is none. It stays open: some leave memory
// of their own behind when they are closed.
std::string FindLibrary(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL)) return name;
  }
  return "";
}

Json Tool(const char* what, const char* used_for, const std::string& found, const char* remedy) {
  Json tool = {{"what", what}, {"used_for", used_for}, {"found", !found.empty()}, {"where", found}};
  tool["remedy"] = found.empty() ? remedy : "";
  return tool;
}

Json Tools() {
  Json tools = Json::array();
  tools.push_back(Tool("NVIDIA driver", "cuda", FindLibrary({"libcuda.so.1"}), "install the NVIDIA driver"));
  NvrtcFile nvrtc;  // the one that would serve
  (void)LocateNvrtc(&nvrtc);
  tools.push_back(Tool("NVRTC", "cuda, kernels compiled here", nvrtc.path,
                       "install the CUDA toolkit, or pip install nvidia-cuda-nvrtc"));
  tools.push_back(Tool("Level Zero loader", "intel", FindLibrary({"libze_loader.so.1"}),
                       "apt-get install libze1 and Intel's GPU driver"));
  tools.push_back(Tool("libsycl", "intel, on the caller's sycl::queue", FindLibrary({"libsycl.so.9", "libsycl.so.8"}),
                       "comes with torch for XPU and with dpctl (pip install intel-sycl-rt)"));
  tools.push_back(Tool("OpenCL loader", "opencl; intel, on SYCL queues of OpenCL", FindLibrary({"libOpenCL.so.1"}),
                       "apt-get install ocl-icd-libopencl1"));
  return tools;
}

// The version of a package of Python by its folder NAME-VERSION.dist-info; "" if it is not there.
std::string PackageVersion(const std::vector<std::filesystem::path>& places, const std::string& package) {
  std::error_code error;
  for (const auto& place : places) {
    for (const auto& entry : std::filesystem::directory_iterator(place, error)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with(package + "-") && name.ends_with(".dist-info")) {
        return name.substr(package.size() + 1, name.size() - package.size() - 1 - std::string(".dist-info").size());
      }
    }
  }
  return "";
}

// As ropewalk/engines/__init__.py has it: by the variable, or by the engine's own list of plugins.
bool AsksForRopewalk(const Json& engine) {
  const auto text = [&](const char* key) {
    const char* value = EnvironmentVariable(engine[key].get<std::string>().c_str());
    return std::string(value ? value : "");
  };
  const std::string value = text("variable");
  if (!value.empty()) return value == "1";
  std::string plugins = text("plugins");
  std::erase(plugins, ' ');
  return ("," + plugins + ",").find(",ropewalk,") != std::string::npos;
}

// The engines that the Python package beside this command has a plugin for; none where there is no such package.
Json Engines() {
  Json engines = Json::array();
  const auto places = PythonPackages();
  for (const auto& place : places) {
    std::ifstream file(place / "ropewalk/engines/known.json");
    const Json known = file ? Json::parse(file, nullptr, /*allow_exceptions=*/false) : Json();
    if (!known.is_object()) continue;
    for (const auto& [name, engine] : known.items()) {
      const std::string version = PackageVersion(places, engine["package"]);
      const auto versions = engine["versions"].get<std::vector<std::string>>();
      const bool is_known = std::ranges::find(versions, version.substr(0, version.find('+'))) != versions.end();
      const bool asks = AsksForRopewalk(engine);
      std::string why;
      if (version.empty()) {
        why = "not installed";
      } else if (!is_known) {
        why = fmt::format("the plugin knows {}", fmt::join(versions, ", "));
      } else if (!asks) {
        why = fmt::format("not asked: set {}=1", engine["variable"].get<std::string>());
      }
      engines.push_back({{"name", name}, {"version", version}, {"serves", why.empty()}, {"why", why}});
    }
    break;
  }
  return engines;
}

// One small case of each dtype, to see that what is said to serve does.
Json SelfTest() {
  RunSummary sum;
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    const RopeCase c = bench::ShapeCase(5, 3, 2, 128, dtype);
    const CaseResult result = RunCase(c, HostMemory());
    ++sum.run;
    if (!result.passed) {
      ++sum.failed;
      sum.error = result.message;
    }
    sum.worst = std::max(sum.worst, result.worst);
  }
  return {{"cases", sum.run}, {"failed", sum.failed}, {"worst", sum.worst}, {"message", sum.error}};
}

Json Examine() {
  Json out;
  out["version"] = ropewalk_version();
  const bench::Caches caches = bench::CacheSizes();
  out["cpu"] = {{"name", bench::CpuName()}, {"cores", Cores()},      {"vector_bytes", bench::FloorVectorBytes()},
                {"l1_bytes", caches.l1},    {"l2_bytes", caches.l2}, {"l3_bytes", caches.l3}};
  out["backends"] = Parsed(ropewalk_backends());
  out["self_test"] = SelfTest();
  out["kernels_run"] = Parsed(ropewalk_counters());
  out["tools"] = Tools();
  out["engines"] = Engines();
  std::vector<std::string> tried;
  std::string models, problem = "none found: give --model CONFIG.json, or set ROPEWALK_MODELS";
  try {
    models = ModelsDirectory(&tried);
  } catch (const Failure& failure) {
    problem = failure.what();
  }
  out["models"] = {{"directory", models}, {"tried", tried}, {"problem", models.empty() ? problem : ""}};
  out["kernel_cache"] = DiskCacheText();
  out["bundles"] = BundleTexts();
  if (const char* named = EnvironmentVariable("ROPEWALK_BUNDLE"); named && *named && out["bundles"].empty()) {
    out["bundles"].push_back(fmt::format("none at {} (ROPEWALK_BUNDLE)", named));
  }
  return out;
}

std::string Kib(const Json& bytes) {
  const auto value = bytes.get<int64_t>();
  return value >= 1 << 20 ? fmt::format("{} MB", value >> 20) : fmt::format("{} KB", value >> 10);
}

int Doctor(const DoctorOptions& options) {
  const Json found = Examine();
  const bool held = found["self_test"]["failed"] == 0;
  if (options.json) {
    fmt::print("{}\n", found.dump(2));
    return held ? kHeld : kNotHeld;
  }
  const Json& cpu = found["cpu"];
  fmt::print("Ropewalk {}\n", found["version"].get<std::string>());
  fmt::print("CPU: {}, {} core{}, {}-byte vectors, caches {} / {} / {}\n\n", cpu["name"].get<std::string>(),
             cpu["cores"].get<int>(), cpu["cores"].get<int>() == 1 ? "" : "s", cpu["vector_bytes"].get<int>(),
             Kib(cpu["l1_bytes"]), Kib(cpu["l2_bytes"]), Kib(cpu["l3_bytes"]));

  fmt::print("backend  serves  what, or why not\n");
  for (const Json& backend : found["backends"]) {
    fmt::print("{:<7}  {:<6}  {}\n", backend["name"].get<std::string>(),
               backend["available"].get<bool>() ? "yes" : "no", Wrapped(backend["detail"].get<std::string>(), 17));
    if (const std::string remedy = backend["remedy"]; !remedy.empty()) {
      fmt::print("{:17}remedy: {}\n", "", Wrapped(remedy, 25));
    }
  }
  for (const Json& backend : found["backends"]) {
    const std::string name = backend["name"];
    std::string parts;
    for (const Json& part : backend.value("parts", Json::array())) {
      parts += fmt::format("{}{}:{}", parts.empty() ? "" : ", ", name, part.get<std::string>());
    }
    if (!parts.empty()) fmt::print("\n{} can be forced to: {}\n", name, parts);
  }

  fmt::print("\n");
  fmt::print("found  what\n");
  for (const Json& tool : found["tools"]) {
    const bool there = tool["found"].get<bool>();
    fmt::print(
        "{:<5}  {}\n", there ? "yes" : "no",
        Wrapped(fmt::format("{} (for {})", tool["what"].get<std::string>(), tool["used_for"].get<std::string>()), 7));
    fmt::print("{:7}{}{}\n", "", there ? "" : "remedy: ",
               Wrapped(there ? tool["where"].get<std::string>() : tool["remedy"].get<std::string>(), there ? 7 : 15));
  }
  if (!found["engines"].empty()) {
    fmt::print("\n");
    Table engines({"engine", "version", "plugin serves", "why not"});
    for (const Json& engine : found["engines"]) {
      engines.Add({engine["name"], engine["version"], engine["serves"].get<bool>() ? "yes" : "no", engine["why"]});
    }
    engines.Print();
  }

  const std::string models = found["models"]["directory"];
  fmt::print("\nmodels:       {}\n",
             models.empty() ? Wrapped(found["models"]["problem"].get<std::string>(), 14) : models);
  for (const Json& bundle : found["bundles"]) {
    fmt::print("CUDA bundle:  {}\n", Wrapped(bundle.get<std::string>(), 14));
  }
  fmt::print("CUDA cache:   {}\n", found["kernel_cache"].get<std::string>());
  std::string kernels;
  for (const auto& [kernel, count] : found["kernels_run"].items()) {
    kernels += (kernels.empty() ? "" : ", ") + kernel;
  }
  fmt::print("self-test:    {}\n",
             Wrapped(fmt::format("{} ({}{}; worst error {:.2f} of the tolerance)", Verdict(held),
                                 Counted(found["self_test"]["cases"].get<int>(), "case"),
                                 kernels.empty() ? "" : " by " + kernels, found["self_test"]["worst"].get<double>()),
                     14));
  if (!held) fmt::print("              {}\n", Wrapped(found["self_test"]["message"].get<std::string>(), 14));
  return held ? kHeld : kNotHeld;
}

}  // namespace

void AddDoctor(CLI::App* app, int* exit_code) {
  auto options = std::make_shared<DoctorOptions>();
  CLI::App* command =
      app->add_subcommand("doctor", "what serves here: backends, drivers, compilers, caches; why not; the remedy");
  command->add_flag("--json", options->json, "print JSON");
  command->footer("Example:\n  ropewalk doctor --json");
  command->callback([options, exit_code] { *exit_code = Doctor(*options); });
}

}  // namespace ropewalk::cli
