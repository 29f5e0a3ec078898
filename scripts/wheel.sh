#!/usr/bin/env bash
# A source distribution in dist/, and from it a wheel for other machines, for glibc 2.28 and later (RHEL 8, Debian 10,
# Ubuntu 18.10): linked against that version (scripts/old_glibc.sh). auditwheel reads from the symbols on what it loads,
# and refuses another tag.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
glibc=2.28 platform=manylinux_2_28_$(uname -m) libraries=$root/build/glibc-2.28
rm -rf build/dist dist
if [[ ! -e $libraries/libc.so ]]; then
  say "wheel: the libraries of glibc $glibc"
  scripts/old_glibc.sh "$libraries" "$glibc"
fi
say "sdist"
python -m build --sdist --no-isolation --outdir dist .
say "wheel: building it from that"
# This system's libgcc_s may ask for more than that glibc has; the other system has its own.
link="-B$libraries -L$libraries -Wl,--allow-shlib-undefined"
python -m pip wheel dist/ropewalk-*.tar.gz --no-build-isolation --no-deps --wheel-dir build/dist -v \
  --config-settings=build-dir="$root/build/wheel-old-glibc" --config-settings="cmake.define.CMAKE_SHARED_LINKER_FLAGS=$link" \
  --config-settings="cmake.define.CMAKE_MODULE_LINKER_FLAGS=$link" \
  --config-settings="cmake.define.CMAKE_EXE_LINKER_FLAGS=$link" 2>&1 | scripts/build_progress.sh
say "wheel: naming the platform"
# libtvm_ffi.so is apache-tvm-ffi's, which the wheel depends on; libsycl is that of the process whose queue is handed over.
auditwheel repair --plat "$platform" --exclude libtvm_ffi.so --exclude libsycl.so.9 --exclude libsycl.so.8 --wheel-dir dist \
  build/dist/ropewalk-*.whl
auditwheel show dist/ropewalk-*.whl
twine check --strict dist/*
ls -l dist
