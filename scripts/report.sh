#!/usr/bin/env bash
# What compilers make of the kernels of GPUs; fails on a spill.
# scripts/report.sh cuda [arguments of cuda_report]: registers, spills, shared memory and size of the CUDA kernel's variants
# for every architecture; the table of all rows goes to build/cuda-report.csv.
# scripts/report.sh intel [arguments of intel_report]: what Intel's compiler makes of the SPIR-V kernel for pvc and dg2; fails
# also where aligned rows are not moved as vectors. The table goes to build/intel-report.csv, a page to
# build/intel-report.md. With --all (make intel-report) the page is put into docs/results/ too, if all held.
# scripts/report.sh intel verify: whether the report there is of the present kernel and of all its variants.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

compiler=${1:?usage: scripts/report.sh cuda|intel [ARGUMENTS]} committed=docs/results/intel-report.md
shift
choose_compiler
cmake --preset dev -DPython_EXECUTABLE="$venv/bin/python"
cmake --build --preset dev --target "${compiler}_report"
if [[ $compiler == cuda ]]; then
  say "cuda_report"
  build/dev/bin/cuda_report --csv build/cuda-report.csv "$@" models/models.json
  say "build/cuda-report.csv"
  exit
fi
if [[ ${1:-} == verify ]]; then
  say "intel_report --verify $committed"
  build/dev/bin/intel_report --verify $committed models/models.json || fail "$committed is not of this kernel: run make intel-report"
  exit
fi
say "intel_report"
held=0
{
  dpkg-query -W -f='${Package} ${Version}\n' intel-opencl-icd libigc1 libigc-tools 2>/dev/null || true
  build/dev/bin/intel_report --csv build/intel-report.csv "$@" models/models.json
} | tee build/intel-report.txt || held=1
python scripts/intel_report_page.py build/intel-report.txt build/intel-report.csv >build/intel-report.md
say "build/intel-report.csv, build/intel-report.md"
if ((held == 0)) && [[ " $* " == *" --all "* && " $* " != *" --device "* && " $* " != *" --every "* ]]; then
  cp build/intel-report.md $committed
  say "$committed"
fi
exit $held
