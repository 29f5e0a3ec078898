// A case made real: buffers with canaries around and between the elements, and the arguments of the call.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "conformance/cases.h"
#include "conformance/memory.h"
#include "conformance/reference.h"

#if defined(__SANITIZE_ADDRESS__)
#define ROPEWALK_POISONS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ROPEWALK_POISONS 1
#endif
#endif

namespace ropewalk {

class CaseCall {
 public:
  // Allocates and fills everything; the data depends on the case's name alone.
  static Status Make(const RopeCase& c, DeviceMemory& memory, std::unique_ptr<CaseCall>* out);
  // The gradient of the case, which must have no store: its gradients are laid out as q and k are, or as the outputs.
  static Status MakeBackward(const RopeCase& c, DeviceMemory& memory, std::unique_ptr<CaseCall>* out);
  ~CaseCall();
  CaseCall(const CaseCall&) = delete;
  CaseCall& operator=(const CaseCall&) = delete;

  const RopeCase& test_case() const { return case_; }
  ropewalk_rope_args& args() { return args_; }                        // tensors on the device
  const ropewalk_rope_args& host_args() const { return host_args_; }  // the same tensors as they were made, on the host
  ropewalk_rope_gradients& gradients() { return gradients_; }         // of a gradient
  const ropewalk_frequencies* frequencies() const { return frequencies_; }

  Status Run();    // ropewalk_rope, or its gradient, and, where the device runs on its own, the wait for it
  Status Reset();  // puts the first data back
  // Compares every byte of every buffer with what the reference says of the first data. "" if all is right.
  // `worst` is the largest error in units of its tolerance, `elements` how many were compared.
  Status Verify(std::string* message, double* worst, int64_t* elements) const;
  // "" if every byte of every buffer is as it was made: for calls that must be refused.
  Status VerifyUntouched(std::string* message) const;
  // What the text of ropewalk_check_faults() must contain; "" if the call has no fault. Valid after Verify.
  const std::string& expected_fault() const { return expected_fault_; }

  // What the operation must read and write once, for floors and GB/s.
  int64_t bytes_moved() const;
  int64_t rotated_elements() const;

 private:
  // Before and behind each buffer: what a wrong head or token writes lies within some KB. A multiple of 256, so that
  // what follows it is aligned as the buffer is.
  static constexpr int64_t kGuardBytes = 4096;

  // Bytes with canaries at both ends; tensors are views of them.
  struct Buffer {
    std::string name;
    std::vector<uint8_t> initial;
    std::vector<bool> covered;  // by an element; only where memory can be poisoned
    void* device = nullptr;
  };

  struct Tensor {
    std::string name;
    Buffer* buffer = nullptr;
    int64_t first = 0;  // byte of the first element in the buffer
    int64_t shape[4] = {}, strides[4] = {};
    DLTensor on_host = {}, on_device = {};
  };
  struct Builder;  // case_build.cc

  CaseCall(const RopeCase& c, DeviceMemory& memory, bool backward);
  static Status Make(const RopeCase& c, DeviceMemory& memory, bool backward, std::unique_ptr<CaseCall>* out);
  const DLTensor* Written(RopeOutput output) const;  // on the host
  Status MakeWorkspace(std::string_view name);
  Status Fetch(std::vector<std::vector<uint8_t>>* bytes) const;  // of each buffer
  std::string Compare(const std::vector<std::vector<uint8_t>>& expected,
                      const std::vector<std::vector<uint8_t>>& now) const;

  RopeCase case_;
  DeviceMemory& memory_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
  ropewalk_frequencies* frequencies_ = nullptr;
  bool backward_ = false;
  ropewalk_rope_args args_;
  ropewalk_rope_args host_args_;
  ropewalk_rope_gradients gradients_, host_gradients_;
  mutable std::string expected_fault_;
};

}  // namespace ropewalk
