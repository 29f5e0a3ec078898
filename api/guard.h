// What every function of the C ABI ends with: a code, and the text of an error kept for the thread.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/status.h"

namespace ropewalk {

// Keeps the text for ropewalk_last_error().
int Return(Status status);
// What a handler has caught, as a status.
Status Thrown() noexcept;

// Nothing may be thrown across the C border, not even because there is no memory to say why.
template <class Body>
int Guard(const Body& body) noexcept {
  try {
    return Return(body());
  } catch (...) {
    return Return(Thrown());
  }
}

}  // namespace ropewalk
