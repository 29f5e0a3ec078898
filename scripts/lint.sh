#!/usr/bin/env bash
# The checks of .pre-commit-config.yaml over the whole tree, without git's hooks; all of them run.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
failed=0
check() { say "$1"; shift; "$@" || failed=1; }
check "format" scripts/format.sh --check
check "ruff" ruff check .
check "versions" python scripts/check_versions.py
check "headers" scripts/check_headers.sh
cmake --preset dev >/dev/null
check "clang-tidy" scripts/tidy.sh
((failed == 0)) && echo "lint: all held"
