// What ThreadSanitizer leaves out in the programs that run kernels by Intel's OpenCL run-time for CPUs: the run-time
// and the code that it makes are not compiled with it, so that it does not see how their threads wait for one another.
// The code it makes is in no library, and shows only by the memcpy and memset that it calls.
// SPDX-License-Identifier: Apache-2.0
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "race:libintelocl.so\nrace:libtbb.so\nrace:libsycl.so\nrace:interceptor_memcpy\nrace:interceptor_memset\n";
}
