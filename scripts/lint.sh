#!/usr/bin/env bash
# The checks of .pre-commit-config.yaml over the whole tree, without git's hooks; all of them run. Each bears the name of
# its hook: tests/python/test_tree.py compares the two files. scripts/lint.sh CHECK [FILE..] runs that one alone, clang-tidy
# over the files given; scripts/lint.sh --fix formats in place.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
only=${1:-} failed=0 ran=0
check() {
  [[ $only && $only != "$1" ]] && return
  say "$1"; ran=$((ran + 1)); shift; "$@" || failed=1
}
tracked() { git ls-files --cached --others --exclude-standard "$@"; }

# Every header compiles alone. Parts of kernels (-inl.h, .cuh), which want flags of their own, do in ctest -L headers.
headers() {
  local header held=0 ffi=("$venv"/lib/python3*/site-packages/tvm_ffi/include)
  for header in $(tracked '*.h' '*.hpp' | grep -v -e '-inl\.h$' -e '^tests/'); do
    "$CXX" -std=c++20 -fsyntax-only -Wall -Wextra -Iinclude -I. -isystem "${ffi[0]}" -x c++ - <<<"#include \"$header\"" ||
      { echo "$header does not compile alone"; held=1; }
  done
  return $held
}

# clang-tidy (14) over all of our C++ that a build for development compiles, the Python module included, or over those of
# the files given. A file that held is not checked again until it, a header, a setting or clang-tidy changes (build/tidy),
# so a run that was stopped goes on where it was.
tidy() {
  export database=$root/build/lint held=$root/build/tidy
  local compiled files shared
  if ! command -v clang-tidy-14 >/dev/null; then
    echo "clang-tidy-14 was not found, and not every release has it: Debian 12 does"
    return 1
  fi
  cmake --preset dev -B "$database" -DROPEWALK_ONE_UNIT=OFF -DROPEWALK_PYTHON=ON -DPython_EXECUTABLE="$venv/bin/python" >/dev/null
  mapfile -t compiled < <(sed -n "s|^ *\"file\": \"$root/\(.*\.cc\)\".*|\1|p" "$database/compile_commands.json" |
    grep -v '^build/' | sort -u)
  if (($#)); then
    mapfile -t files < <(printf '%s\n' "$@" | sort -u | comm -12 - <(printf '%s\n' "${compiled[@]}"))
  else
    files=("${compiled[@]}")
  fi
  ((${#files[@]})) || return 0
  mapfile -t shared < <(tracked '*.h' '*.hpp' '*.cmake' CMakeLists.txt .clang-tidy)
  export shared_digest
  shared_digest=$(clang-tidy-14 --version)$(digest "${shared[@]}")
  mkdir -p "$held"
  # shellcheck disable=SC2016  # expanded by the shell that xargs starts
  printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" bash -c 'tidy_file "$1"' tidy
}
tidy_file() {
  local stamp=$held/${1//\//.} key
  key=$shared_digest$(sha256sum "$1")
  [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
  local fewer=()
  # Tests may copy as they like; what stands in for a library has that library's names.
  [[ $1 != tests/* ]] || fewer=(--checks=-performance-*)
  [[ $1 != tests/stand_ins/* ]] || fewer=("--checks=-performance-*,-readability-identifier-naming")
  clang-tidy-14 "${fewer[@]}" -p "$database" --quiet --warnings-as-errors='*' --extra-arg=-Wno-unknown-warning-option \
    --extra-arg=-Wno-ignored-optimization-argument "$1" &&
    printf '%s\n' "$key" >"$stamp"
}
export -f tidy_file

mapfile -t cpp < <(tracked '*.c' '*.cc' '*.h' '*.hpp')
mapfile -t shell < <(tracked '*.sh' .ci/run)
if [[ $only == --fix ]]; then
  clang-format -i "${cpp[@]}"
  ruff format .
  exit
fi
check clang-format clang-format --dry-run --Werror "${cpp[@]}"
check ruff-format ruff format --check .
check ruff ruff check .
check shellcheck shellcheck "${shell[@]}"
check versions python scripts/check_versions.py
check headers headers
check clang-tidy tidy "${@:2}"
((ran)) || fail "no check '$only'"
((failed == 0)) && echo "lint: ${only:-all} held"
