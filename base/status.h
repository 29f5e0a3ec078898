// What the core returns instead of throwing: a code and one sentence.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <exception>
#include <new>
#include <string>
#include <utility>

namespace ropewalk {

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(ropewalk_code code, std::string text) : code_(code), text_(std::move(text)) {}

  static Status Invalid(std::string text) { return {ROPEWALK_INVALID_ARGUMENT, std::move(text)}; }
  static Status Unavailable(std::string text) { return {ROPEWALK_UNAVAILABLE, std::move(text)}; }
  static Status Driver(std::string text) { return {ROPEWALK_DRIVER_ERROR, std::move(text)}; }
  static Status Fault(std::string text) { return {ROPEWALK_FAULT, std::move(text)}; }
  static Status Internal(std::string text) {
    return {ROPEWALK_INTERNAL, std::move(text) + "; this is a bug in Ropewalk"};
  }

  bool ok() const { return code_ == ROPEWALK_OK; }
  ropewalk_code code() const { return code_; }
  const std::string& text() const& { return text_; }
  std::string text() && { return std::move(text_); }

 private:
  ropewalk_code code_ = ROPEWALK_OK;
  std::string text_;
};

// Leaves the function with the status of `expression` unless it is OK.
#define ROPEWALK_TRY(expression)                                                  \
  do {                                                                            \
    if (::ropewalk::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

// Runs `body`, which returns a Status, and turns what it throws into one: memory that is short, the JSON library's
// errors.
template <class Body>
Status WithoutThrowing(Body body) noexcept {
  try {
    try {
      return body();
    } catch (const std::bad_alloc&) {
      return Status::Driver("out of memory");
    } catch (const std::exception& error) {
      return Status::Internal(error.what());
    }
  } catch (...) {  // not even the sentence could be had
    return Status(ROPEWALK_DRIVER_ERROR, {});
  }
}

}  // namespace ropewalk
