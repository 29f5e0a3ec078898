// For AddressSanitizer, where a test runs code of others that is not compiled with it. ASAN_OPTIONS adds to this.
// SPDX-License-Identifier: Apache-2.0
extern "C" {

__attribute__((visibility("default"))) const char* __asan_default_options() { return ROPEWALK_ASAN_OPTIONS; }

// What the OpenCL run-time keeps of a program until the process ends.
__attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libintelocl.so\n"; }
}
