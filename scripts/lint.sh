#!/usr/bin/env bash
# The checks of .pre-commit-config.yaml over the whole tree, without git's hooks; all of them run. Each bears the name of
# its hook: tests/python/test_tree.py compares the two files.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
failed=0
check() { say "$1"; shift; "$@" || failed=1; }
tracked() { git ls-files --cached --others --exclude-standard "$@"; }

mapfile -t cpp < <(tracked '*.c' '*.cc' '*.h' '*.hpp')
mapfile -t shell < <(tracked '*.sh' .ci/run)
check clang-format clang-format --dry-run --Werror "${cpp[@]}"
check ruff-format ruff format --check .
check ruff ruff check .
check shellcheck shellcheck "${shell[@]}"
check versions python scripts/check_versions.py
check headers scripts/check_headers.sh
check clang-tidy scripts/tidy.sh
((failed == 0)) && echo "lint: all held"
