#!/usr/bin/env bash
# make intel-report: what Intel's compiler makes of the SPIR-V kernel for pvc and dg2; fails on a spill.
# scripts/intel_report.sh [arguments of intel_report]; the table of all rows goes to build/intel-report.csv,
# a page for docs/results/ to build/intel-report.md.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

choose_compiler
cmake --preset dev -DPython_EXECUTABLE="$venv/bin/python"
cmake --build --preset dev --target intel_report
say "intel_report"
held=0
build/dev/bin/intel_report --csv build/intel-report.csv "$@" models/*.json | tee build/intel-report.txt || held=1
python scripts/intel_report_page.py build/intel-report.txt build/intel-report.csv >build/intel-report.md
say "build/intel-report.csv, build/intel-report.md"
exit $held
