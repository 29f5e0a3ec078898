#!/usr/bin/env bash
# `make run` (scripts/run.sh; --plan: the first part alone): says what it will take, sets up what is missing, then shows what
# serves here, real models' shapes checked and timed, and a real language model; on the GPU where there is an NVIDIA one.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

# ---- what it will take ----------------------------------------------------------------------------------------------

# As counted on a fresh Debian 12 (scripts/fresh_debian.sh): MB to fetch, MB on disk.
plan() {
  local fetch=0 disk=0 lines=()
  add() { lines+=("$(printf '  %-44s %5d MB to fetch, %5d MB on disk' "$1" "$2" "$3")"); fetch=$((fetch + $2)) disk=$((disk + $3)); }
  if command -v apt-get >/dev/null && ! dpkg-query -W -f='${db:Status-Status}' libhwy-dev clang g++ 2>/dev/null | grep -qx "\(installed\)\{3\}"; then
    add "the system's packages: compilers, drivers" 240 1200
  fi
  [[ -f $stamps/base ]] || add "what builds Ropewalk" 55 190
  [[ -f $stamps/sycl8 || $(uname -m) != x86_64 ]] || add "SYCL's headers" 30 35
  if ! fresh full "$(digest requirements/lock/full.txt)" && ! fresh run "$(digest requirements/lock/run.txt)"; then
    add "torch with CUDA's libraries, transformers" 3000 6000
  fi
  [[ -f $stamps/weights ]] || add "the weights of SmolLM2-135M" 95 100
  [[ -d build/wheel ]] || add "what is built" 0 200
  say "make run: two minutes to look at, about three of two cores at the first time"
  if ((${#lines[@]})); then
    printf '%s\n' "${lines[@]}"
    printf '  %-44s %5d MB to fetch, %5d MB on disk; the time to fetch comes on top\n' "in all" "$fetch" "$disk"
    local free; free=$(df -Pm . | awk 'NR == 2 { print $4 }')
    ((free > disk)) || fail "only $free MB are free below $root, but $disk are needed"
  fi
}

# ---- the run --------------------------------------------------------------------------------------------------------

plan
[[ ${1:-} == --plan ]] && exit 0
scripts/setup.sh system base sycl wheel run
say "what serves here (ropewalk doctor)"
ropewalk doctor
backend=()
if ropewalk doctor --json | python -c 'import json, sys
sys.exit(not any(b["name"] == "cuda" and b["available"] for b in json.load(sys.stdin)["backends"]))'; then
  backend=(--backend cuda)
fi
say "real models' shapes (ropewalk run${backend[*]:+ ${backend[*]}}), half a minute"
ropewalk run "${backend[@]}"
say "a real language model (examples/smollm2.py), a minute"
python examples/smollm2.py
