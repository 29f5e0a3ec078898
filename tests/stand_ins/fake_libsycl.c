// By the name that the build gives it a run-time of SYCL, and nothing else: for what is told when one is loaded.
// SPDX-License-Identifier: Apache-2.0
int ropewalk_fake_libsycl(void);
int ropewalk_fake_libsycl(void) { return 0; }
