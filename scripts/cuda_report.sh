#!/usr/bin/env bash
# make cuda-report: registers, spills, shared memory and size of the CUDA kernel's variants for every architecture; fails
# on a spill. scripts/cuda_report.sh [arguments of cuda_report]; the table of all rows goes to build/cuda-report.csv.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

choose_compiler
cmake --preset dev -DPython_EXECUTABLE="$venv/bin/python"
cmake --build --preset dev --target cuda_report
say "cuda_report"
build/dev/bin/cuda_report --csv build/cuda-report.csv "$@" models/models.json
say "build/cuda-report.csv"
