#!/usr/bin/env bash
# Benchmarks: the command line's (floor, ours) and the Google Benchmark programs; results as JSON in build/bench/.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
cmake --preset dev && cmake --build --preset dev
mkdir -p build/bench
say "ropewalk bench"
ropewalk bench --json build/bench/ropewalk.json
for program in build/dev/bench/*_bench; do
  say "$(basename "$program")"
  "$program" --benchmark_out="build/bench/$(basename "$program").json" --benchmark_out_format=json
done
for script in bench/*.py; do
  [[ -e $script ]] || continue
  say "$script"
  python "$script" --json "build/bench/$(basename "$script" .py).json"
done
