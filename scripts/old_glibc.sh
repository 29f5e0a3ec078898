#!/usr/bin/env bash
# scripts/old_glibc.sh FOLDER VERSION [MACHINE]: into FOLDER what links programs for glibc VERSION on MACHINE (this one's
# kind by default), whatever glibc this system has: zig (requirements/pins.txt) makes libraries with the symbols of that
# version, and the start files that go with them. For the compiler's -B and the linker's -L.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
usage="usage: scripts/old_glibc.sh FOLDER VERSION [MACHINE]"
folder=${1:?$usage} version=${2:?$usage} machine=${3:-$(uname -m)}
compiler=${CC:-cc} archiver=ar
if [[ $machine != "$(uname -m)" ]]; then compiler=$machine-linux-gnu-gcc archiver=$machine-linux-gnu-ar; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"
cat >"$work/program.c" <<'C'
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
int main(int count, char** names) { return (int)pow(count, 2.5) + (dlopen(names[0], RTLD_NOW) != 0) + (int)pthread_self(); }
C
for kind in -pie -no-pie; do
  ZIG_GLOBAL_CACHE_DIR=$work/cache ZIG_LOCAL_CACHE_DIR=$work/local python -m ziglang cc "$kind" \
    -target "$machine-linux-gnu.$version" "$work/program.c" -o "$work/program" -lm -lpthread -ldl
done
find "$work/cache" \( -name '*.so.*' -o -name libc_nonshared.a -o -name '*crt1.o' \) -exec cp {} "$folder/" \;
# libstdc++.a of a newer system asks glibc 2.32 whether there are threads: there may be.
echo '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;' >"$work/newer.c"
"$compiler" -O2 -fPIC -c "$work/newer.c" -o "$work/newer.o"
"$archiver" rcs "$folder/libnewer.a" "$work/newer.o"
for name in m pthread dl rt; do ln -sf "$(basename "$folder/lib$name.so."*)" "$folder/lib$name.so"; done
echo "GROUP ( libc.so.6 libc_nonshared.a libnewer.a AS_NEEDED ( libld.so.2 libpthread.so.0 libdl.so.2 ) )" >"$folder/libc.so"
