#!/usr/bin/env bash
# The tests that need an NVIDIA GPU, and a report of them: conformance on the device in both layouts, 20,000 random calls,
# gradients of every case and of 1,000 random ones, the Python tests on CUDA tensors, compute-sanitizer. For a machine
# with a driver and NVRTC and without a network:
#   scripts/gpu_test.sh REPORT.md [conformance] [random] [gradients] [sanitizer] [python]     the parts named, else all
# random:K/N is the K-th of N parts of the random calls, K from 0 on, each with a seed of its own, for a machine that gives a
# command so much time only: their kernels take the time, about 6,000 of them. Not among all: models, every model of
# conformance/models.cc as tensor-parallel ranks have it, in every mode; engines, the plugins in the Python code of SGLang
# and vLLM on CUDA tensors, eager and in graphs. For that .venv/engines is needed, or for another machine's Python
# build/engines.tar.xz (scripts/setup.sh engines, engines-archive).
# ROPEWALK: the command (build/dev/bin/ropewalk); PYTHONPATH: where the package is; SEED: another than the day's.
# SPDX-License-Identifier: Apache-2.0
set -uo pipefail
cd "$(dirname "$0")/.." || exit
[[ ! -x .venv/bin/python3 ]] || PATH=$PWD/.venv/bin:$PATH
report=${1:?usage: scripts/gpu_test.sh REPORT.md [conformance] [random] [gradients] [sanitizer] [python]}
shift
parts=" ${*:-conformance random gradients sanitizer python} "
for part in $parts; do
  [[ $part =~ ^(conformance|random|random:[0-9]+/[1-9][0-9]*|engines|models|gradients|sanitizer|python)$ ]] || { echo "gpu_test: no part $part" >&2; exit 2; }
done
ropewalk=${ROPEWALK:-build/dev/bin/ropewalk}
jobs=$(env -u OMP_NUM_THREADS nproc)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT  # a file `failed` in it: something did not hold

# check BACKEND COMMAND..: cases on the backend, shared among processes, since most of the time goes into compiling.
# COMMAND: `ropewalk check` and which cases, or a tool that runs it.
check() {
  local backend=$1 i; shift
  rm -f "$work"/check.*
  for ((i = 0; i < jobs; i++)); do
    "$@" --backend "$backend" --shard "$i/$jobs" >"$work/check.$i" 2>&1 || touch "$work/failed" &
  done
  wait
  awk '/ cases? ran/ { for (i = 1; i < NF; i++) { if ($(i + 1) ~ /^cases?$/) run += $i; if ($(i + 1) ~ /^failed/) bad += $i; if ($(i + 1) ~ /^elements?$/) n += $i } shards++ }
       /ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards/ { clean++ } /ERROR SUMMARY|RACECHECK SUMMARY/ { summaries++ }
       END { printf "%d cases ran, %d failed; %d elements compared; %d of '"$jobs"' processes told", run, bad, n, shards
             if (summaries) printf "; %d of %d summaries without an error", clean, summaries
             print ""; exit !(run > 0 && bad == 0 && shards == '"$jobs"' && clean == summaries) }' "$work"/check.* || touch "$work/failed"
  grep -h -A3 -e '^FAILED  ' -e '^the process ended in: ' -e '^the device is lost' "$work"/check.* | head -40
}

# python_tests FILE..: shared among half as many processes as there are cores, likewise. One that took no test, or ended
# without its count, is a failure.
python_tests() {
  local processes=$(((jobs + 1) / 2)) i
  for ((i = 0; i < processes; i++)); do
    OMP_NUM_THREADS=2 python3 -m pytest -q -p no:cacheprovider --shard "$i/$processes" "$@" >"$work/pytest.$i" 2>&1 ||
      touch "$work/failed" "$work/pytest-failed.$i" &
  done
  wait
  awk '/^[0-9]+ (passed|failed|skipped|deselected|errors?|xfailed|xpassed|warnings?),? .*in [0-9.]+s/ {
         for (i = 1; i < NF; i++) { if ($(i + 1) ~ /^passed/) passed += $i; if ($(i + 1) ~ /^failed/) failed += $i
                                    if ($(i + 1) ~ /^error/) errors += $i; if ($(i + 1) ~ /^skipped/) skipped += $i } told++ }
       END { printf "%d passed, %d failed, %d errors, %d skipped; %d of '"$processes"' processes told\n", passed, failed, errors,
                    skipped, told
             exit !(passed > 0 && failed == 0 && errors == 0 && told == '"$processes"') }' "$work"/pytest.[0-9]* || touch "$work/failed"
  if grep -q 'finds no CUDA device' "$work"/pytest.[0-9]*; then
    echo "FAILED: torch finds no CUDA device, so that the tests of CUDA did not run"; touch "$work/failed"
  fi
  # Why tests were skipped, each reason once; which failed, and the end of what such a process said.
  sed -n 's/^SKIPPED \[[0-9]*\] /skipped: /p' "$work"/pytest.[0-9]* | sed 's/:[0-9]*: /: /' | sort -u | head -20
  sed -n 's/^\(FAILED\|ERROR\) /&/p' "$work"/pytest.[0-9]* | sort -u | head -40
  for ((i = 0; i < processes; i++)); do
    if [[ -e $work/pytest-failed.$i ]]; then echo "---- process $i of $processes ended with:"; tail -25 "$work/pytest.$i"; fi
  done | head -200
}

# plugins: tests/engines on CUDA tensors, in the engines' code that is here.
plugins() {
  local engines=.venv/engines
  if [[ ! -d $engines && -f build/engines.tar.xz ]]; then
    engines=$work/engines
    mkdir "$engines"
    tar xf build/engines.tar.xz -C "$engines" || touch "$work/failed"
  fi
  if [[ ! -d $engines ]]; then
    echo "not run: neither .venv/engines nor build/engines.tar.xz is here"
    return
  fi
  python3 -c 'import sys, torch; print("Python %d.%d.%d, torch" % sys.version_info[:3], torch.__version__)'
  ROPEWALK_TEST_ENGINES=$(realpath "$engines") ROPEWALK_TEST_COUNTS=$work/counts OMP_NUM_THREADS=2 \
    python3 -m pytest -q -p no:cacheprovider -k cuda tests/engines >"$work/engines.txt" 2>&1 || touch "$work/failed"
  [[ ! -f $work/counts ]] || cat "$work/counts"
  tail -n 1 "$work/engines.txt"
  if ! grep -qE '^[0-9]+ passed' "$work/engines.txt"; then
    touch "$work/failed"
    grep -E '^(E  |FAILED|ERROR)' "$work/engines.txt" | head -120
  fi
}

{
  echo "# Tests on a GPU"
  echo
  gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
  echo "$(date -u +%F), ${gpu:-no nvidia-smi}, Ropewalk $("$ropewalk" --version | awk '{print $NF}')"
  echo
  if [[ $parts == *" conformance "* ]]; then
    echo '## Conformance: every case against the double-precision reference'
    echo '```'
    for backend in cuda cuda:few cuda:many; do
      printf '%-9s ' "$backend"
      check "$backend" "$ropewalk" check
    done
    echo '```'
  fi
  for part in $parts; do
    [[ $part == random* ]] || continue
    IFS=:/ read -r _ k n _ <<<"$part:0/1"
    seed=$((${SEED:-$(date -u +%Y%m%d)} * 100 + k))
    echo "## Drawn at random: \`ropewalk check --random N --seed $seed\`"
    echo '```'
    # Half of them as they are planned, a quarter in each layout.
    for run in cuda=10000 cuda:few=5000 cuda:many=5000; do
      IFS='=' read -r backend count <<<"$run"
      printf '%-9s ' "$backend"
      check "$backend" "$ropewalk" check --random $((count / n)) --seed "$seed"
    done
    echo '```'
  done
  if [[ $parts == *" gradients "* ]]; then
    echo "## Gradients, against the double-precision reference, twice each: \`ropewalk check --gradients\`"
    echo '```'
    printf '%-20s ' cuda
    check cuda "$ropewalk" check --gradients
    printf '%-20s ' 'cuda, random'
    check cuda "$ropewalk" check --gradients --random 1000 --seed "${SEED:-$(date -u +%Y%m%d)}"
    for tool in memcheck racecheck initcheck; do
      printf '%-20s ' "$tool, random"
      check cuda compute-sanitizer --tool "$tool" --error-exitcode 9 "$ropewalk" check --gradients --random 500
    done
    echo '```'
  fi
  if [[ $parts == *" models "* ]]; then
    echo "## The heads of real models, as ranks have them: \`ropewalk check --engines\`"
    echo '```'
    printf '%-9s ' cuda
    check cuda "$ropewalk" check --engines
    echo '```'
  fi
  if [[ $parts == *" sanitizer "* ]]; then
    echo '## compute-sanitizer, over every case'
    echo '```'
    for run in memcheck:cuda memcheck:cuda:many racecheck:cuda:many initcheck:cuda; do
      IFS=: read -r tool backend <<<"$run"
      printf '%-9s %-9s ' "$tool" "$backend"
      check "$backend" compute-sanitizer --tool "$tool" --error-exitcode 9 "$ropewalk" check
    done
    echo '```'
  fi
  if [[ $parts == *" python "* ]]; then
    echo '## Python tests on CUDA tensors'
    echo '```'
    python_tests tests/python/test_cuda.py tests/python/test_compat.py tests/python/test_compat_tables.py \
      tests/python/test_compat_peers.py tests/python/test_first_hour.py
    echo '```'
  fi
  if [[ $parts == *" engines "* ]]; then
    echo "## The plugins in SGLang's and vLLM's own layers, on CUDA tensors"
    echo '```'
    plugins
    echo '```'
  fi
  if [[ -e $work/failed ]]; then echo 'Result: FAILED'; else echo 'Result: held'; fi
} >"$report"
[[ ! -e $work/failed ]]
