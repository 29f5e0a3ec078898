// SPDX-License-Identifier: Apache-2.0
#include "measure/token_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/text.h"
#include "rope/arguments.h"

namespace ropewalk::bench {
namespace {

// How far `got` is from what is expected, in units of the tolerance on its side.
double Units(const Expected& want, double got) {
  if (want.want == Expected::Want::kNan) return std::isnan(got) ? 0 : HUGE_VAL;
  const double off = got - want.value;
  if (off == 0) return 0;
  const double allowed = off > 0 ? want.high - want.value : want.value - want.low;
  return allowed > 0 && std::isfinite(got) ? std::abs(off) / allowed : HUGE_VAL;
}

const char* RowIn(const DLTensor& tensor, int64_t outer, int64_t token, int64_t head) {
  return static_cast<const char*>(DataOf(tensor)) +
         RowOffset(tensor, outer, token, head) * DtypeBytes(DtypeOf(tensor.dtype));
}

}  // namespace

void TokenCheck::Choose(const CaseCall& call, int64_t samples) {
  const ropewalk_rope_args& before = call.host_args();
  const int64_t batch = before.q->ndim == 4 ? before.q->shape[0] : 1;
  const int64_t tokens = before.q->shape[before.q->ndim - 3];
  samples = std::min(samples, tokens);
  tokens_ = batch * samples;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t token = samples > 1 ? i * (tokens - 1) / (samples - 1) : 0;
      RopeReferenceToken(before, b, token, [&](const ExpectedRow& row) {
        rows_.push_back({row.output,
                         row.outer,
                         row.token,
                         row.head,
                         RowIn(*OutputTensor(before, row.output), row.outer, row.token, row.head),
                         {row.elements.begin(), row.elements.end()}});
      });
    }
  }
}

Status TokenCheck::Run(const ropewalk_rope_args& args, DeviceMemory& memory, std::string* message,
                       double* worst) const {
  message->clear();
  const bool on_host = memory.device().device_type == kDLCPU;
  std::vector<char> fetched;
  for (size_t first = 0, last = 0; first < rows_.size(); first = last) {
    // Heads that follow each other in memory are fetched together.
    const DLTensor& tensor = *OutputTensor(args, rows_[first].output);
    const uint32_t dtype = DtypeOf(tensor.dtype);
    const int64_t bytes = DtypeBytes(dtype);
    const auto size = [&](const Row& row) { return static_cast<int64_t>(row.elements.size()) * bytes; };
    const auto place = [&](const Row& row) { return RowIn(tensor, row.outer, row.token, row.head); };
    last = first + 1;
    while (last < rows_.size() && rows_[last].output == rows_[first].output &&
           place(rows_[last]) == place(rows_[last - 1]) + size(rows_[last - 1])) {
      ++last;
    }
    const char* data = place(rows_[first]);
    if (!on_host) {
      fetched.resize(static_cast<size_t>(place(rows_[last - 1]) + size(rows_[last - 1]) - data));
      ROPEWALK_TRY(memory.CopyOut(fetched.data(), data, fetched.size()));
      data = fetched.data();
    }
    for (size_t r = first; r < last; ++r) {
      const Row& row = rows_[r];
      for (size_t e = 0; e < row.elements.size(); ++e, data += bytes) {
        const Expected& want = row.elements[e];
        double units = 0;
        if (want.want == Expected::Want::kSame) {
          units = std::memcmp(data, row.before + static_cast<int64_t>(e) * bytes, static_cast<size_t>(bytes)) ? HUGE_VAL
                                                                                                              : 0;
        } else if (want.want == Expected::Want::kBits) {
          units = std::memcmp(data, &want.bits, static_cast<size_t>(bytes)) ? HUGE_VAL : 0;
        } else {
          units = Units(want, LoadNumber(dtype, data));
        }
        *worst = std::max(*worst, units);
        if (units > 1 && message->empty()) {
          *message =
              Text(OutputName(args, row.output), " of token ", row.token, ", head ", row.head, ", element ", e, " is ",
                   LoadNumber(dtype, data), ", but must be ", want.value, " (", want.low, " to ", want.high, ")");
        }
      }
    }
  }
  return {};
}

}  // namespace ropewalk::bench
