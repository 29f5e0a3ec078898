#!/usr/bin/env bash
# What Intel's compiler makes of the SPIR-V kernel for pvc and dg2; fails on a spill, and where aligned rows are not moved
# as vectors. scripts/intel_report.sh [arguments of intel_report]: the table goes to build/intel-report.csv, a page to
# build/intel-report.md. With --all (make intel-report) the page is put into docs/results/ too, if all held.
# scripts/intel_report.sh verify: whether the report there is of the present kernel and of all its variants.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

committed=docs/results/intel-report.md
choose_compiler
cmake --preset dev -DPython_EXECUTABLE="$venv/bin/python"
cmake --build --preset dev --target intel_report
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
