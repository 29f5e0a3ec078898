// Preloaded where sanitizers are on: their run-time ends a program that opens a library with RTLD_DEEPBIND, as Intel's
// GPU driver does with a library of Windows' when `ropewalk_backends` asks it for devices. Here the flag is left out.
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

__attribute__((visibility("default"))) void* dlopen(const char* file, int flags) {
  void* (*next)(const char*, int);
  void* const symbol = dlsym(RTLD_NEXT, "dlopen");
  memcpy(&next, &symbol, sizeof(next));  // C knows no cast from an object's address to a function's
  return next(file, flags & ~RTLD_DEEPBIND);
}
