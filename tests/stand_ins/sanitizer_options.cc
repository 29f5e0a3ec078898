// What sanitizers leave out where a test runs code of others that is not compiled with them. ASAN_OPTIONS and
// TSAN_OPTIONS add to this.
// SPDX-License-Identifier: Apache-2.0
#define OPTIONS extern "C" __attribute__((visibility("default"))) const char*

#ifdef ROPEWALK_ASAN_OPTIONS

OPTIONS __asan_default_options() { return ROPEWALK_ASAN_OPTIONS; }
// What the OpenCL run-time keeps of a program until the process ends.
OPTIONS __lsan_default_suppressions() { return "leak:libintelocl.so\n"; }

#else

// Intel's OpenCL run-time for CPUs and the code that it makes are not compiled with ThreadSanitizer, so that it does
// not see how their threads wait for one another; that code is in no library, and shows only by the memcpy and memset
// that it calls. In a child of fork() it starts a thread of its own, for which glibc takes the stack of one of the
// parent's threads, which the child lacks, and frees what the dynamic linker had allocated for that one. Likewise a
// child, which is alone, makes locks new (base/fork.h) that threads of its parent had.
OPTIONS __tsan_default_suppressions();
OPTIONS __tsan_default_suppressions() {
  return "race:libintelocl.so\nrace:libtbb.so\nrace:libsycl.so\nrace:interceptor_memcpy\nrace:interceptor_memset\n"
         "race:get_cached_stack\nrace:allocate_dtv_entry\nrace:ropewalk::ForkMutexes::Child\n";
}

#endif
