#!/usr/bin/env bash
# All tests: C++ by ctest, Python by pytest against the installed wheel, conformance by the installed command. Every
# part runs even if one before it failed; the exit code is 0 only if all held. scripts/test.sh [asan|tsan|arm|..] runs the
# C++ tests built that way instead (asan: the Python tests too); intel: every case on Intel's CPU OpenCL device with the
# exact kernel that a GPU would have and with a general one, of which `make test` runs half; emulated: every case
# and 2,000 random ones with the CUDA kernel, run on the processor; models: the heads of every model of
# conformance/models.cc, as tensor-parallel ranks have them, in every mode, on the CPU and likewise; engines: the plugins
# in the Python code of SGLang and vLLM; transformers: all its model classes that rotate, of which `make test` runs a sample.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

names=() results=() seconds=()
# part NAME COMMAND..: runs it and keeps its result for the summary.
part() {
  local name=$1 start=$SECONDS; shift
  say "$name"
  if "$@"; then results+=(held); else results+=(FAILED); fi
  names+=("$name") seconds+=($((SECONDS - start)))
}
summary() {
  printf '\n'
  if [[ -s ${ROPEWALK_TEST_COUNTS:-} ]]; then
    printf 'Without a GPU:\n'
    sed 's/^/  /' "$ROPEWALK_TEST_COUNTS"
    printf '\n'
  fi
  local i failed=0
  for i in "${!names[@]}"; do
    printf '%-7s %5d s  %s\n' "${results[i]}" "${seconds[i]}" "${names[i]}"
    [[ ${results[i]} == held ]] || failed=$((failed + 1))
  done
  printf '%d parts passed, %d failed\n' $((${#names[@]} - failed)) "$failed"
  ((failed == 0))
}

# build PRESET [OPTION..]: configure, build. cpp: run the tests too.
build() {
  local preset=$1; shift
  cmake --preset "$preset" "$@" && cmake --build --preset "$preset"
}
cpp() { build "$@" && ctest --preset "$1"; }

# Intel's OpenCL run-time for CPUs in .venv stands in for a GPU: each of the two loaders has its own variable for it.
# Which cases ran on which device is told at the end.
use_opencl_runtime() {
  export OCL_ICD_VENDORS=$venv/lib/libintelocl.so OCL_ICD_FILENAMES=$venv/lib/libintelocl.so
  export ROPEWALK_TEST_OPENCL=required ROPEWALK_TEST_COUNTS=$root/build/intel-cases.txt
  mkdir -p "$root/build"
  : >"$ROPEWALK_TEST_COUNTS"
}

# on_emulated_gpu REPORT PART..: scripts/gpu_test.sh where libcuda and NVRTC are those that the tests have.
on_emulated_gpu() {
  local held=0
  rm -rf build/emulated-cache
  env FAKE_CUDA_LEGACY_STREAM=1 ROPEWALK_LIBCUDA="$root/build/dev/tests/libemulated_libcuda.so" \
    ROPEWALK_LIBNVRTC="$root/build/dev/tests/libemulated_nvrtc.so" ROPEWALK_CACHE_DIR="$root/build/emulated-cache" \
    scripts/gpu_test.sh "$@" || held=1
  rm -rf build/emulated-cache
  cat "$1"
  return "$held"
}

mode=${1:-all}
case $mode in
  all)
    choose_compiler
    use_opencl_runtime
    part "C++ tests (build/dev)" cpp dev
    part "Python tests (the installed wheel)" python -m pytest tests/python -n 2 --dist worksteal
    part "Python's border on the oldest tvm-ffi that serves" env PYTHONPATH="$venv/oldest" ROPEWALK_TEST_TVM_FFI=0.1.11 \
      python -m pytest -q tests/python/test_{rope,border,bad_input,import}.py
    part "ropewalk check (the installed command)" ropewalk check
    if command -v ocloc >/dev/null && command -v iga64 >/dev/null && command -v spirv-opt >/dev/null; then
      part "Intel's compiler on the SPIR-V kernel" scripts/report.sh intel
      part "the report of Intel's compiler is of this kernel" scripts/report.sh intel verify
    else
      say "Intel's compiler: not here (apt-get install intel-opencl-icd libigc-tools spirv-tools)"
    fi
    ;;
  asan)
    choose_compiler
    part "C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer (build/asan)" \
      cpp asan -DPython_EXECUTABLE="$venv/bin/python"
    # The sanitizer's library must come first in a Python that knows nothing of it; libstdc++ beside it, so that it can
    # wrap exceptions. Leaks are left out: Python keeps what it likes until the end. An allocation beyond all memory
    # fails, as it does without the sanitizer: tests ask torch for one. no_deepbind: see tests/stand_ins/no_deepbind.c.
    sanitized=(env PYTHONPATH="$root/build/asan/python" \
      LD_PRELOAD="$root/build/asan/tests/libno_deepbind.so $("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)" \
      ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:allocator_may_return_null=1 \
      UBSAN_OPTIONS=print_stacktrace=1 ROPEWALK_SANITIZED=1)
    part "the package tested is the one of build/asan" "${sanitized[@]}" python -c \
      "import ropewalk; assert ropewalk.__file__.startswith('$root/build/asan/'), ropewalk.__file__"
    part "Python tests under the same" "${sanitized[@]}" python -m pytest tests/python -p no:cacheprovider
    ;;
  emulated)
    choose_compiler
    part "build/dev" build dev
    part "every case with the CUDA kernel run on the processor (build/emulated.md)" \
      on_emulated_gpu build/emulated.md conformance random:0/10
    ;;
  models)
    choose_compiler
    part "build/dev" build dev
    part "the heads of every model on the CPU" build/dev/bin/ropewalk check --engines
    part "the same with the CUDA kernel run on the processor (build/models.md)" on_emulated_gpu build/models.md models
    ;;
  engines)
    part "the engines' own loaders and layers (tests/engines)" env ROPEWALK_TEST_ENGINES="$venv/engines" \
      python -m pytest -p no:cacheprovider tests/engines
    ;;
  transformers)
    part "all model classes of transformers that rotate" python -m pytest -p no:cacheprovider -rP --all-models \
      tests/python/test_transformers_walk.py
    ;;
  tsan)
    choose_compiler
    # But for cuda_compile_test: its threads only call NVIDIA's compiler, whose own locks ThreadSanitizer does not see.
    # And for the conformance cases on OpenCL and SYCL, which one thread calls one after the other.
    part "threaded C++ tests under ThreadSanitizer (build/tsan)" cpp tsan
    ;;
  intel)
    use_opencl_runtime
    export ROPEWALK_OPENCL_GENERAL=0
    for dtype in bf16 f16 f32; do  # a process for each, as it keeps its kernels
      for pairing in neox interleaved; do
        part "exact kernels, $dtype $pairing (build/intel-$dtype-$pairing.txt)" bash -o pipefail -c \
          "ropewalk check --backend opencl --case '*.$dtype.$pairing.*' >build/intel-$dtype-$pairing.txt"
        part "general kernels, $dtype $pairing" bash -o pipefail -c \
          "ROPEWALK_OPENCL_GENERAL=1 ropewalk check --backend opencl --case '*.$dtype.$pairing.*' | tail -n1"
      done
    done
    tail -qn1 build/intel-{bf16,f16,f32}-{neox,interleaved}.txt
    ;;
  arm)
    # But for cuda_compile_test: the CUDA kernels are compiled for GPUs, by this machine's compiler, in build/dev.
    part "C++ tests for aarch64 under qemu (build/arm)" cpp arm
    part "conformance for aarch64 under qemu" qemu-aarch64-static -L /usr/aarch64-linux-gnu build/arm/bin/ropewalk check
    ;;
  *) fail "no mode '$mode'; see the head of $0" ;;
esac
summary
