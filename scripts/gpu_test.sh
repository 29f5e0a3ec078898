#!/usr/bin/env bash
# The tests that need an NVIDIA GPU, and a report of them: conformance on the device, the Python tests on CUDA tensors,
# compute-sanitizer over a sample. For a machine with a driver and NVRTC and without a network:
#   scripts/gpu_test.sh REPORT.md      ROPEWALK: the command (build/dev/bin/ropewalk); PYTHONPATH: where the package is
# SPDX-License-Identifier: Apache-2.0
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:?usage: scripts/gpu_test.sh REPORT.md}
ropewalk=${ROPEWALK:-build/dev/bin/ropewalk}
jobs=$(nproc)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# check NAME OPTION..: conformance shared among processes, since most of the time goes into compiling.
check() {
  local name=$1; shift
  local i
  for ((i = 0; i < jobs; i++)); do "$@" check --backend cuda --shard "$i/$jobs" >"$work/$name.$i" 2>&1 & done
  wait
  awk '/cases ran/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "cases") run += $i; if ($(i + 1) ~ /^failed/) bad += $i; if ($(i + 1) == "elements") n += $i } shards++ }
       END { printf "%d cases ran, %d failed; %d elements compared; %d of '"$jobs"' processes told\n", run, bad, n, shards; exit !(run > 0 && bad == 0 && shards == '"$jobs"') }' "$work/$name".* ||
    failed=1
  grep -h -A3 '^FAILED  ' "$work/$name".* | head -40
}

{
  echo "# Tests on a GPU"
  echo
  echo "$(date -u +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), Ropewalk $("$ropewalk" --version | awk '{print $NF}')"
  echo
  echo '## Conformance: every case against the double-precision reference'
  echo '```'
  check plain "$ropewalk"
  echo '```'
  echo '## compute-sanitizer over every 23rd case'
  echo '```'
  for tool in memcheck racecheck initcheck; do
    printf '%s: ' "$tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$ropewalk" check --backend cuda --shard 7/23 >"$work/$tool" 2>&1 || failed=1
    grep -E 'cases ran|ERROR SUMMARY|RACECHECK SUMMARY' "$work/$tool" | tr '\n' ' '
    echo
  done
  echo '```'
  echo '## Python tests on CUDA tensors'
  echo '```'
  python3 -m pytest -q -p no:cacheprovider tests/python/test_cuda.py tests/python/test_compat.py \
    tests/python/test_compat_tables.py 2>&1 | tail -25
  [[ ${PIPESTATUS[0]} == 0 ]] || failed=1
  echo '```'
  if ((failed)); then echo 'Result: FAILED'; else echo 'Result: held'; fi
} >"$report"
exit $failed
