// SPDX-License-Identifier: Apache-2.0
#include "backends/none/none.h"

namespace ropewalk {
namespace {

constexpr const char* kRemedy = "move the tensors to the CPU, or use a Ropewalk that has this backend";

Availability Absent(const char* detail) { return {false, detail, kRemedy}; }
Status Refuse(const char* detail) { return Status::Unavailable(std::string("rope: ") + detail + "; " + kRemedy); }

// One stub for each absent backend: `kDetail` is the reason, `kTypes` the DLPack device types that are its own.
template <const char* kDetail, int... kTypes>
struct Stub {
  static bool Serves(DLDevice device) { return ((static_cast<int>(device.device_type) == kTypes) || ...); }
  static Availability Available() { return Absent(kDetail); }
  static Status Launch(const RopeCall&) { return Refuse(kDetail); }
  static Status Explain(const RopeCall&, Explanation*) { return Refuse(kDetail); }
  static Status CheckFaults() { return {}; }
  static Status Force(const std::string& part) { return part.empty() ? Status() : Refuse(kDetail); }
  static void Counters(std::vector<std::pair<std::string, int64_t>>*) {}

  static constexpr Backend Make(const char* name) {
    return {name, Serves, Available, Launch, Launch, Explain, CheckFaults, Force, Counters};
  }
};

constexpr char kIntelDetail[] = "the Intel GPU backend is not part of this version";

}  // namespace

const Backend kIntelBackend = Stub<kIntelDetail, kDLOpenCL, 14 /* kDLOneAPI */>::Make("intel");

}  // namespace ropewalk
