// What a kernel on a device leaves behind of the first token that it poisoned or did not store.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_ROPE_FAULT_H_
#define ROPEWALK_ROPE_FAULT_H_

#include "rope/kernel_types.h"

// On the device; `key` is all ones while there is none.
typedef struct {
  rw_u64 key;     // row (of batch x tokens), times 4, plus the kind (kRopeFault..)
  rw_i64 value;   // the position, slot or axis
  rw_i64 limit;   // rows of the table, slots of the cache, axes
  rw_i64 tokens;  // of a batch entry, to tell the row's batch and token
  rw_u32 lock;
  rw_u32 axis;  // of a position; the pair of an axis
} rope_fault;

#endif  // ROPEWALK_ROPE_FAULT_H_
