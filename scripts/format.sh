#!/usr/bin/env bash
# Formats C++ and Python in place; with --check only says what would change.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
mapfile -t cpp < <(git ls-files --cached --others --exclude-standard '*.c' '*.cc' '*.h' '*.hpp')
if [[ ${1:-} == --check ]]; then
  clang-format --dry-run --Werror "${cpp[@]}"
  ruff format --check .
else
  clang-format -i "${cpp[@]}"
  ruff format .
fi
