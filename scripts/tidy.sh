#!/usr/bin/env bash
# clang-tidy (14) over all of our C++ that a build for development compiles, the Python module included, or over those of
# the files given. A file that held is not checked again until it, a header, a setting or clang-tidy changes (build/tidy),
# so a run that was stopped goes on where it was.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
export database=$root/build/lint held=$root/build/tidy
cmake --preset dev -B "$database" -DROPEWALK_PYTHON=ON -DPython_EXECUTABLE="$venv/bin/python" >/dev/null
mapfile -t compiled < <(sed -n "s|^ *\"file\": \"$root/\(.*\.cc\)\".*|\1|p" "$database/compile_commands.json" |
  grep -v '^build/' | sort -u)
if (($#)); then
  mapfile -t files < <(printf '%s\n' "$@" | sort -u | comm -12 - <(printf '%s\n' "${compiled[@]}"))
else
  files=("${compiled[@]}")
fi
((${#files[@]})) || exit 0
mapfile -t shared < <(git ls-files --cached --others --exclude-standard '*.h' '*.hpp' '*.cmake' CMakeLists.txt .clang-tidy)

export shared_digest
shared_digest=$(clang-tidy-14 --version)$(digest "${shared[@]}")
tidy() {
  local stamp=$held/${1//\//.} key
  key=$shared_digest$(sha256sum "$1")
  [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
  clang-tidy-14 -p "$database" --quiet --warnings-as-errors='*' --extra-arg=-Wno-unknown-warning-option \
    --extra-arg=-Wno-ignored-optimization-argument "$1" &&
    printf '%s\n' "$key" >"$stamp"
}
export -f tidy
mkdir -p "$held"
# shellcheck disable=SC2016  # expanded by the shell that xargs starts
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" bash -c 'tidy "$1"' tidy
