// Some tokens of a call compared with the reference: what they must become is worked out once, and serves calls on any
// copy of the data.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "conformance/case_call.h"
#include "conformance/reference.h"

namespace ropewalk::bench {

class TokenCheck {
 public:
  // So many tokens of each batch entry, the first and the last among them.
  void Choose(const CaseCall& call, int64_t samples);
  int64_t tokens() const { return tokens_; }
  // Compares what `args` hold now, tensors like those of the call; "" if all is right, else the first that is not.
  // `worst`: the largest error in units of its tolerance.
  Status Run(const ropewalk_rope_args& args, DeviceMemory& memory, std::string* message, double* worst) const;

 private:
  struct Row {
    RopeOutput output;
    int64_t outer, token, head;
    const char* before;  // its bytes before the call
    std::vector<Expected> elements;
  };
  std::vector<Row> rows_;
  int64_t tokens_ = 0;
};

}  // namespace ropewalk::bench
