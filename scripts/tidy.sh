#!/usr/bin/env bash
# clang-tidy (14) over the files given, or over all of ours that build/dev compiles. What held is not checked again until it,
# a header, a setting or clang-tidy changes (build/tidy), so that a run that was stopped goes on where it was.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
[[ -f build/dev/compile_commands.json ]] || cmake --preset dev >/dev/null
if (($#)); then files=("$@"); else mapfile -t files < <(git ls-files --cached --others --exclude-standard \
  {api,backends,base,cli,conformance,frequencies,measure,models,rope}/'*.cc'); fi
mapfile -t shared < <(git ls-files --cached --others --exclude-standard '*.h' '*.hpp' '*.cmake' CMakeLists.txt .clang-tidy)

export held=$root/build/tidy shared_digest
shared_digest=$(clang-tidy-14 --version)$(digest "${shared[@]}")
tidy() {
  local stamp=$held/${1//\//.} key
  key=$shared_digest$(sha256sum "$1")
  [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
  clang-tidy-14 -p build/dev --quiet --warnings-as-errors='*' --extra-arg=-Wno-unknown-warning-option \
    --extra-arg=-Wno-ignored-optimization-argument "$1" &&
    printf '%s\n' "$key" >"$stamp"
}
export -f tidy
mkdir -p "$held"
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" bash -c 'tidy "$1"' tidy
