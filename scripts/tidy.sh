#!/usr/bin/env bash
# clang-tidy over the files given, or over all of ours that build/dev compiles.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
[[ -f build/dev/compile_commands.json ]] || cmake --preset dev >/dev/null
if (($#)); then files=("$@"); else mapfile -t files < <(git ls-files --cached --others --exclude-standard \
  'core/*.cc' 'ops/*.cc' 'backends/*.cc' 'conformance/*.cc' 'cli/*.cc'); fi
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" clang-tidy -p build/dev --quiet --warnings-as-errors='*' \
  --extra-arg=-Wno-unknown-warning-option
