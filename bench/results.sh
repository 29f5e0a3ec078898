#!/usr/bin/env bash
# The numbers of docs/results/, all from one run on a quiet machine: `ropewalk bench` with and without `--sweep`, the
# Google Benchmark program, the cost of a call from Python, torch beside us; then the page that shows them. Builds the
# programs first.
#   bench/results.sh [--quick]     --quick: a few shapes and no torch.compile, to try the script; writes to build/bench
# Set ROPEWALK and ROPE_BENCH to programs built elsewhere: then nothing is built.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/../scripts/common.sh"
if [[ ! ${ROPE_BENCH:-} ]]; then
  choose_compiler
  cmake --preset dev && cmake --build --preset dev
fi
python=${PYTHON:-.venv/bin/python}
ropewalk=${ROPEWALK:-.venv/bin/ropewalk}
rope_bench=${ROPE_BENCH:-build/dev/bench/rope_bench}
out=docs/results bench_options=() sweep_options=(--seconds 0.05) google_options=() torch_options=()
parts_options=(--tokens 64 --threads 1)
for part in 96,24 80,32 80,20 80,80 128,32 64,16; do parts_options+=(--heads "32,32,$part"); done
if [[ ${1:-} == --quick ]]; then
  out=build/bench
  bench_options=(--dtype bf16 --threads 1 --seconds 0.05)
  sweep_options=(--dtype bf16 --op rope --seconds 0.01)
  google_options=(--benchmark_filter='call|checks')
  parts_options=(--tokens 64 --threads 1 --heads "32,32,96,24" --no-compile)
  torch_options=(--tokens "1,64" --heads "32,8,128" --threads 1 --no-compile)
fi
for program in "$python" "$ropewalk" "$rope_bench"; do
  [[ -x $program ]] || { echo "error: $program is not there: run make setup, and cmake --workflow --preset dev" >&2; exit 2; }
done
date=$(date -u +%F)
cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1 | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' '-' | sed 's/^-//; s/-$//')
parts=build/bench/parts
rm -rf "$parts"
mkdir -p "$out" "$parts"

echo "load before: $(cut -d' ' -f1 /proc/loadavg)"
"$ropewalk" bench "${bench_options[@]}" --json "$parts/bench.json"
"$ropewalk" bench --sweep "${sweep_options[@]}" --json "$parts/sweep.json"
"$rope_bench" "${google_options[@]}" --benchmark_out="$parts/google.json" --benchmark_out_format=json
[[ ! -e bench/python_call.py ]] || "$python" bench/python_call.py --json "$parts/python.json"
"$python" bench/cpu_compare.py "${torch_options[@]}" --json "$parts/torch.json"
"$python" bench/cpu_compare.py "${parts_options[@]}" --json "$parts/torch-parts.json"
"$python" bench/summary.py "$out/$date-${cpu:-cpu}.json" --join "$parts" --markdown "$out/cpu.md"
