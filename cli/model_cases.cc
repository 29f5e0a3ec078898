// SPDX-License-Identifier: Apache-2.0
#include "cli/model_cases.h"

#include <fmt/format.h>
#include <sched.h>

#include "measure/timed_case.h"

namespace ropewalk::cli {

void AddModelOption(CLI::App* command, std::vector<std::string>* models) {
  command
      ->add_option("--model,--models", *models,
                   "config.json, a directory, or a name such as qwen3-8b; may be repeated (default: all in models/)")
      ->delimiter(',')
      ->type_name("CONFIG.json|DIR");
}

namespace {

struct DtypeName {
  const char* name;
  uint32_t dtype;
};
constexpr DtypeName kDtypeNames[] = {
    {"bf16", kBF16},   {"f16", kF16},     {"f32", kF32},  {"bfloat16", kBF16},
    {"float16", kF16}, {"float32", kF32}, {"fp16", kF16}, {"fp32", kF32},
};

}  // namespace

CLI::Validator Dtypes() {
  std::vector<std::string> names;
  for (const DtypeName& entry : kDtypeNames) names.emplace_back(entry.name);
  return CLI::IsMember(names, CLI::ignore_case);
}

void AddDtypeOption(CLI::App* command, std::string* dtype) {
  command->add_option("--dtype", *dtype, "of q and k: bf16, f16 or f32")
      ->check(Dtypes())
      ->type_name("DTYPE")
      ->capture_default_str();
}

void AddPlaceOption(CLI::App* command, std::string* backend) {
  command->add_option("--backend", *backend,
                      "force a backend, or one CPU target as in cpu:avx2; cuda: tensors on the first NVIDIA GPU "
                      "(default: tensors on the CPU, also where there is a GPU)");
}

bench::Place& PlaceOf(const std::string& backend) {
  // For a moment where none is named, so that a wrong ROPEWALK_CPU_TARGET is one sentence.
  Require(ropewalk_force_backend(backend.empty() ? "cpu" : backend.c_str()));
  if (backend.empty()) Require(ropewalk_force_backend(nullptr));
  bench::Place* place = nullptr;
  if (const Status status = bench::PlaceOf(backend, &place); !status.ok()) throw Failure(status.text());
  return *place;
}

void RequireNoThreads(bool given, const std::string& backend) {
  if (given) throw Failure(fmt::format("--threads is for the CPU: leave it out with --backend {}", backend));
}

void WarnOfThreads(int32_t threads) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0 || threads <= CPU_COUNT(&set)) return;
  fmt::print(stderr, "ropewalk: {} threads on {} will wait for each other\n", threads,
             Counted(CPU_COUNT(&set), "core"));
}

std::string DeviceText(const bench::Place& place) {
  const std::string driver = place.driver();
  return driver.empty() ? place.device() : fmt::format("{}, driver {}", place.device(), driver);
}

std::string ThreadsText(int32_t threads) {
  return threads ? fmt::format(", {} thread{}", threads, threads == 1 ? "" : "s") : "";
}

uint32_t ParseDtype(const std::string& name) {
  const std::string lower = Lower(name);
  for (const DtypeName& entry : kDtypeNames) {
    if (lower == entry.name) return entry.dtype;
  }
  throw Failure(fmt::format("--dtype must be bf16, f16 or f32, but is {}", name));
}

const char* ShortDtype(uint32_t dtype) {
  for (const DtypeName& entry : kDtypeNames) {
    if (dtype == entry.dtype) return entry.name;
  }
  return "?";
}

RopeCase ParseShape(const std::string& text, uint32_t dtype) {
  std::vector<int64_t> numbers;
  for (const std::string& part : CLI::detail::split(text, ',')) {
    int64_t number = 0;
    if (!CLI::detail::lexical_cast(part, number) || number < 0) {
      throw Failure(fmt::format("--shape must be tokens,q_heads,k_heads,head_dim[,rotary_dim], but is {}", text));
    }
    numbers.push_back(number);
  }
  if (numbers.size() != 4 && numbers.size() != 5) {
    throw Failure(fmt::format("--shape must be tokens,q_heads,k_heads,head_dim[,rotary_dim], but is {}", text));
  }
  RopeCase c = bench::ShapeCase(numbers[0], numbers[1], numbers[2], numbers[3], dtype);
  if (numbers.size() == 5) c.rotary_dim = numbers[4];
  const int64_t rotated = c.rotary_dim ? c.rotary_dim : c.head_dim;
  if (numbers[0] < 1 || numbers[1] < 1 || rotated < 2 || rotated % 2 || rotated > c.head_dim) {
    throw Failure(fmt::format(
        "--shape must have tokens and heads, and rotate an even number of elements of a head (all of them unless "
        "rotary_dim is given), but is {}",
        text));
  }
  bench::Complete(&c);
  return c;
}

std::vector<RopeCase> ModelCases(const Model& model, int64_t tokens, uint32_t dtype) {
  std::vector<RopeCase> cases = CasesOfModel(model.config, model.json, tokens, dtype);
  if (cases.empty()) throw Failure(fmt::format("{}: no layer of this model rotates queries and keys", model.path));
  for (RopeCase& c : cases) {
    // Positions 0, 1, .. would leave a single token unrotated.
    c.positions = tokens < 1024 ? Positions::kRandom : Positions::kArange;
    bench::Complete(&c);
  }
  return cases;
}

std::string ModelLabel(const Model& model, const RopeCase& c) {
  const std::string name = model.config.name.substr(model.config.name.rfind('/') + 1);  // without who publishes it
  return c.layer_type.empty() ? name : fmt::format("{} ({})", name, c.layer_type);
}

}  // namespace ropewalk::cli
