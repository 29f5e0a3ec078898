#!/usr/bin/env bash
# scripts/wheel.sh [MACHINE..]: a source distribution in dist/, and from it a wheel for each kind of machine (this one's,
# and on x86-64 aarch64 too), for glibc 2.28 and later (RHEL 8, Debian 10, Ubuntu 18.10): linked against that version.
# auditwheel reads from the symbols on what it loads, and refuses another tag. Then a program in C and some of the
# conformance cases run on what is in the wheel, under qemu where it is for another machine.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
glibc=2.28 host=$(uname -m)
machines=("$@")
if ((!$#)); then
  machines=("$host")
  [[ $host == x86_64 ]] && machines+=(aarch64)
fi

# old_glibc FOLDER VERSION MACHINE: into FOLDER what links programs for glibc VERSION on MACHINE, whatever glibc this system
# has: zig (requirements/pins.txt) makes libraries with the symbols of that version, and the start files that go with
# them. For the compiler's -B and the linker's -L.
old_glibc() (
  folder=$1 version=$2 machine=$3
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
  # libstdc++.a of a newer system asks glibc 2.32 whether there are threads: there may be. The headers of glibc 2.38 and
  # later have other names for what reads numbers, which differ in binary literals alone.
  cat >"$work/newer.c" <<'C'
#include <stdarg.h>
#define HIDDEN __attribute__((visibility("hidden")))
#define NUMBER(type, name)                                              \
  type old_##name(const char*, char**, int) __asm__(#name);             \
  HIDDEN type __isoc23_##name(const char* text, char** end, int base) { \
    return old_##name(text, end, base);                                 \
  }
HIDDEN char __libc_single_threaded = 0;
NUMBER(long, strtol)
NUMBER(unsigned long, strtoul)
NUMBER(long long, strtoll)
NUMBER(unsigned long long, strtoull)
int __isoc99_vsscanf(const char*, const char*, va_list);
HIDDEN int __isoc23_sscanf(const char* text, const char* format, ...) {
  va_list values;
  va_start(values, format);
  const int found = __isoc99_vsscanf(text, format, values);
  va_end(values);
  return found;
}
C
  "$compiler" -O2 -fPIC -c "$work/newer.c" -o "$work/newer.o"
  "$archiver" rcs "$folder/libnewer.a" "$work/newer.o"
  for name in m pthread dl rt; do ln -sf "$(basename "$folder/lib$name.so."*)" "$folder/lib$name.so"; done
  echo "GROUP ( libc.so.6 libc_nonshared.a libnewer.a AS_NEEDED ( libld.so.2 libpthread.so.0 libdl.so.2 ) )" >"$folder/libc.so"
)

# cross_options MACHINE: sets `cross` to what builds for a machine that is not this one: its compiler, and its
# libtvm_ffi.so, of the version pinned and with the hashes of requirements/lock/base.txt.
cross_options() {
  local machine=$1 folder=$root/build/tvm-ffi-$1 platform platforms=()
  command -v "$machine-linux-gnu-g++" >/dev/null || fail "no compiler for $machine was found: scripts/setup.sh system arm"
  awk '/^apache-tvm-ffi==/ { on = 1 } on { print } on && !/\\$/ { exit }' requirements/lock/base.txt >build/tvm-ffi.txt
  if [[ ! -f $folder/of.txt ]] || ! cmp -s build/tvm-ffi.txt "$folder/of.txt"; then
    say "wheel: libtvm_ffi.so for $machine"
    for platform in 2_28 2_24 2_17; do platforms+=(--platform "manylinux_${platform}_$machine"); done
    rm -rf "$folder"
    python -m pip download --quiet --no-deps --only-binary :all: "${platforms[@]}" --python-version 3.11 --require-hashes \
      --dest "$folder" -r build/tvm-ffi.txt
    python -m zipfile -e "$folder"/*.whl "$folder"
    cp build/tvm-ffi.txt "$folder/of.txt"
  fi
  cross=(--config-settings="cmake.define.CMAKE_TOOLCHAIN_FILE=$root/cmake/$machine-linux-gnu.cmake"
    --config-settings="cmake.define.ROPEWALK_TVM_FFI_LIBRARY=$folder/tvm_ffi/lib/libtvm_ffi.so")
}

# check_wheel MACHINE: what is in the wheel loads and computes.
check_wheel() {
  local machine=$1 folder=$root/build/wheel-check-$1 cc=${CC:-cc} qemu=() run
  if [[ $machine != "$host" ]]; then
    cc=$machine-linux-gnu-gcc
    qemu=("$(command -v "qemu-$machine-static" || command -v "qemu-$machine")" -L "/usr/$machine-linux-gnu")
  fi
  rm -rf "$folder"
  python -m zipfile -e dist/ropewalk-*_"$machine".whl "$folder"
  "$cc" -std=c11 -I"$folder/ropewalk/include" tests/consumer/consumer.c -o "$folder/consumer" -L"$folder/ropewalk/lib" \
    -lropewalk -lm
  run=("${qemu[@]}")
  if ((${#qemu[@]})); then run+=(-E); else run=(env); fi
  "${run[@]}" LD_LIBRARY_PATH="$folder/ropewalk/lib" "$folder/consumer"
  chmod +x "$folder"/ropewalk-*.data/scripts/ropewalk
  "${qemu[@]}" "$folder"/ropewalk-*.data/scripts/ropewalk check --shard 0/20
}

mkdir -p build
rm -rf dist
say "sdist"
python -m build --sdist --no-isolation --outdir dist .
for machine in "${machines[@]}"; do
  libraries=$root/build/glibc-$glibc-$machine cross=()
  [[ $machine == "$host" ]] || cross_options "$machine"
  if [[ ! -e $libraries/libc.so ]]; then
    say "wheel: the libraries of glibc $glibc for $machine"
    old_glibc "$libraries" "$glibc" "$machine"
  fi
  say "wheel: building it from that, for $machine"
  rm -rf build/dist
  # This system's libgcc_s may ask for more than that glibc has; the other system has its own.
  link="-B$libraries -L$libraries -Wl,--allow-shlib-undefined"
  _PYTHON_HOST_PLATFORM=linux-$machine python -m pip wheel dist/ropewalk-*.tar.gz --no-build-isolation --no-deps \
    --wheel-dir build/dist -v "${cross[@]}" --config-settings=build-dir="$root/build/wheel-$machine" \
    --config-settings="cmake.define.CMAKE_SHARED_LINKER_FLAGS=$link" \
    --config-settings="cmake.define.CMAKE_MODULE_LINKER_FLAGS=$link" \
    --config-settings="cmake.define.CMAKE_EXE_LINKER_FLAGS=$link" 2>&1 | build_progress
  say "wheel: naming the platform"
  # libtvm_ffi.so is apache-tvm-ffi's, which the wheel depends on; libsycl is that of the process whose queue is handed over.
  # For another kind of machine than this it takes no name, but finds the oldest glibc that serves.
  plat=manylinux_2_28_$machine
  [[ $machine == "$host" ]] || plat=auto
  auditwheel repair --plat "$plat" --exclude libtvm_ffi.so --exclude libsycl.so.9 --exclude libsycl.so.8 \
    --wheel-dir dist build/dist/ropewalk-*.whl
  auditwheel show dist/ropewalk-*_"$machine".whl
  wheel=$(echo dist/ropewalk-*_"$machine".whl)
  [[ $wheel =~ manylinux_2_([0-9]+)_ && ${BASH_REMATCH[1]} -le 28 ]] || fail "$wheel asks for more than glibc $glibc"
  say "wheel: running what is in it"
  check_wheel "$machine"
done
twine check --strict dist/*
ls -l dist
