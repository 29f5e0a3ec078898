// SPDX-License-Identifier: Apache-2.0
#include "measure/timed_case.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "base/text.h"
#include "conformance/reference.h"
#include "measure/place.h"
#include "measure/token_check.h"
#include "rope/arguments.h"

namespace ropewalk::bench {
namespace {

void Flatten(const DLTensor* tensor, int64_t first, int64_t count, std::vector<FloorRegion>* out) {
  if (!tensor) return;
  const int n = tensor->ndim;
  const int64_t bytes = tensor->dtype.bits / 8;
  const int64_t batches = n == 4 ? tensor->shape[0] : 1;
  for (int64_t b = 0; b < batches; ++b) {
    FloorRegion region;
    region.data = static_cast<unsigned char*>(DataOf(*tensor)) + first * bytes;
    if (n == 4) region.data += b * StrideOf(*tensor, 0) * bytes;
    region.rows = tensor->shape[n - 3];
    region.row_stride = StrideOf(*tensor, n - 3) * bytes;
    region.runs = tensor->shape[n - 2];
    region.run_stride = StrideOf(*tensor, n - 2) * bytes;
    region.bytes = count * bytes;
    out->push_back(region);
  }
}

void MoveTowardsOne(const DLTensor* weight, bool zero_centered) {
  if (!weight) return;
  const uint32_t dtype = DtypeOf(weight->dtype);
  const double centre = zero_centered ? 0.0 : 1.0;
  auto* data = static_cast<char*>(DataOf(*weight));
  for (int64_t i = 0; i < weight->shape[0]; ++i) {
    char* at = data + i * StrideOf(*weight, 0) * DtypeBytes(dtype);
    StoreNumber(dtype, centre + (LoadNumber(dtype, at) - centre) / 64, at);
  }
}

}  // namespace

std::vector<FloorRegion> RegionsOf(const ropewalk_rope_args& args, int64_t rotary_dim) {
  const int64_t head_dim = args.q->shape[args.q->ndim - 1];
  const bool whole = args.norm == ROPEWALK_NORM_RMS || args.q_weight;
  const int64_t first = whole ? 0 : args.rotary_offset;
  const int64_t count = whole ? head_dim : rotary_dim;
  std::vector<FloorRegion> regions;
  Flatten(args.q, first, count, &regions);
  Flatten(args.k, first, count, &regions);
  return regions;
}

int64_t RotaryDim(CaseCall& call) {
  const ropewalk_rope_args& args = call.args();
  return args.rotary_dim    ? args.rotary_dim
         : args.frequencies ? ropewalk_frequencies_rotary_dim(args.frequencies)
                            : call.test_case().rotary_dim;
}

Status SteadyWeights(CaseCall& call) {
  // The reference's own copy, which is also what the call's data is put back from.
  const ropewalk_rope_args& args = call.host_args();
  MoveTowardsOne(args.q_weight, args.zero_centered_weight != 0);
  MoveTowardsOne(args.k_weight, args.zero_centered_weight != 0);
  return args.q_weight ? call.Reset() : Status();
}

int64_t CallsBeforeReset(const RopeCase& c) { return c.weight == Weight::kNone ? 100000 : 64; }

Span SpanOf(const DLTensor& tensor) {
  int64_t first = 0, last = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    const int64_t reach = (tensor.shape[i] - 1) * StrideOf(tensor, i);
    if (tensor.shape[i] == 0) return {static_cast<const char*>(DataOf(tensor)), 0};
    (reach < 0 ? first : last) += reach;
  }
  const int64_t item = tensor.dtype.bits / 8;
  return {static_cast<const char*>(DataOf(tensor)) + first * item, static_cast<size_t>((last - first + 1) * item)};
}

Status TimeCase(const RopeCase& c, const TimingOptions& options, TimedCase* out, Place& place) {
  *out = {};
  std::unique_ptr<CaseCall> call;
  ROPEWALK_TRY(CaseCall::Make(c, place.memory(), &call));
  ROPEWALK_TRY(SteadyWeights(*call));
  const ropewalk_rope_args& args = call->args();

  const char* explanation = ropewalk_explain(&args);
  if (!explanation) return Status::Internal(Text("explain refuses case ", c.name, ": ", ropewalk_last_error()));
  const auto explained = nlohmann::json::parse(explanation);
  out->backend = explained.value("backend", "");
  out->kernel = explained.value("kernel", "");

  {
    const Team team(options.threads);
    ROPEWALK_TRY(call->Run());
  }
  const int64_t batch = std::max<int64_t>(c.batch, 1);
  out->tokens = batch * c.tokens;
  if (out->tokens * (c.q_heads + c.k_heads) * c.head_dim <= options.full_check) {
    int64_t elements = 0;
    ROPEWALK_TRY(call->Verify(&out->message, &out->worst, &elements));
    out->held = out->message.empty();
    out->checked_tokens = out->tokens;
  } else {
    TokenCheck check;
    check.Choose(*call, options.sampled_tokens);
    ROPEWALK_TRY(check.Run(args, place.memory(), &out->message, &out->worst));
    out->held = out->message.empty();
    out->checked_tokens = check.tokens();
  }
  return out->held && options.seconds > 0 ? place.Time(options, *call, out) : Status();
}

void Complete(RopeCase* c) {
  if (c->rotary_dim == 0) c->rotary_dim = c->head_dim;
  c->weight_dtype = c->weight == Weight::kNone ? 0 : c->weight_dtype ? c->weight_dtype : c->dtype;
  c->table_dtype = c->angles == Angles::kFrequencies ? 0 : c->table_dtype ? c->table_dtype : kF32;
  if (c->cache == Cache::kNone) {
    c->cache_dtype = 0;
    c->v_dim = 0;
  } else {
    if (c->cache_dtype == 0) c->cache_dtype = c->dtype;
    if (c->v_dim == 0) c->v_dim = c->head_dim;
  }
  c->name = CaseName(*c);
}

RopeCase ShapeCase(int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t head_dim, uint32_t dtype) {
  RopeCase c;
  c.tokens = tokens;
  c.q_heads = q_heads;
  c.k_heads = k_heads;
  c.head_dim = head_dim;
  c.dtype = dtype;
  c.theta = 1e6;
  // Positions 0, 1, .. would leave a single token unrotated.
  c.positions = tokens < 1024 ? Positions::kRandom : Positions::kArange;
  Complete(&c);
  return c;
}

void SetVariant(bool norm, int32_t pairing, RopeCase* c) {
  c->norm = norm;
  c->weight = norm ? Weight::kPlain : Weight::kNone;
  c->pairing = pairing;
  c->weight_dtype = 0;
  Complete(c);
}

int64_t BytesOf(const RopeCase& c) {
  return std::max<int64_t>(c.batch, 1) * c.tokens * (c.q_heads + c.k_heads) * c.head_dim * DtypeBytes(c.dtype);
}

std::string OpName(const RopeCase& c) {
  return Text(c.norm ? "norm+rope " : "rope ", c.pairing == ROPEWALK_NEOX ? "neox" : "interleaved");
}

// ---- the machine ----------------------------------------------------------------------------------------------------

Caches CacheSizes() {
  Caches out;
  for (int index = 0; index < 8; ++index) {
    const std::string directory = Text("/sys/devices/system/cpu/cpu0/cache/index", index, "/");
    std::string level, type, size;
    if (!(std::ifstream(directory + "level") >> level)) break;
    std::ifstream(directory + "type") >> type;
    std::ifstream(directory + "size") >> size;
    if (type == "Instruction" || size.empty()) continue;
    const int64_t unit = size.back() == 'M' ? 1 << 20 : size.back() == 'K' ? 1 << 10 : 1;
    const int64_t bytes = std::atoll(size.c_str()) * unit;
    (level == "1" ? out.l1 : level == "2" ? out.l2 : out.l3) = bytes;
  }
  if (!out.l1) out.l1 = 32 << 10;
  if (!out.l2) out.l2 = 1 << 20;
  if (!out.l3) out.l3 = 32 << 20;
  return out;
}

std::string MemoryOf(int64_t bytes) {
  const Caches caches = CacheSizes();
  if (bytes <= caches.l1 * 7 / 10) return "L1";
  if (bytes <= caches.l2 * 7 / 10) return "L2";
  if (bytes <= caches.l3 * 7 / 10) return "L3";
  return bytes >= caches.l3 * 4 ? "DRAM" : "L3+DRAM";
}

std::vector<int64_t> TokensByCache(uint32_t dtype) {
  const Caches caches = CacheSizes();
  const int64_t row = BytesOf(ShapeCase(1, 32, 8, 128, dtype));
  const auto below = [row](int64_t bytes) {  // the largest power of two
    int64_t tokens = 1;
    while (tokens * 2 * row <= bytes) tokens *= 2;
    return tokens;
  };
  int64_t dram = below(caches.l3 * 5);
  if (dram * row < caches.l3 * 4) dram *= 2;
  return {below(caches.l2 * 7 / 10), below(caches.l3 / 2), dram};
}

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line, name;
  std::string family, model;
  while (std::getline(file, line) && !line.empty()) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string key = line.substr(0, line.find_last_not_of("\t ", colon - 1) + 1);
    const std::string value = colon + 2 <= line.size() ? line.substr(colon + 2) : "";
    if (key == "model name" || key == "Model" || key == "CPU part") name = value;
    if (key == "cpu family") family = value;
    if (key == "model") model = value;
  }
  if (name.empty()) name = "unknown CPU";
  return family.empty() ? name : Text(name, " (family ", family, ", model ", model, ")");
}

}  // namespace ropewalk::bench
