// For AddressSanitizer, where a test runs Intel's compiler for GPUs (libigc): it allocates objects of 28 bytes that it
// frees as 24. ASAN_OPTIONS adds to this.
// SPDX-License-Identifier: Apache-2.0
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "new_delete_type_mismatch=0";
}
