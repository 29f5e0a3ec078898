#!/usr/bin/env bash
# A wheel for other machines in dist/: tagged with the oldest glibc that it loads on.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
say "wheel: building"
rm -rf build/dist dist
python -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/dist -v 2>&1 | scripts/build_progress.sh
say "wheel: naming the platform"
auditwheel show build/dist/ropewalk-*.whl
# libtvm_ffi.so is apache-tvm-ffi's, which the wheel depends on; libsycl is that of the process whose queue is handed over.
auditwheel repair --exclude libtvm_ffi.so --exclude libsycl.so.9 --exclude libsycl.so.8 --wheel-dir dist build/dist/ropewalk-*.whl
ls -l dist
