#!/usr/bin/env bash
# Every header compiles alone. Those named -inl.h are compiled once per CPU target by the file that includes them and
# are left out.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
failed=0
for header in $(git ls-files --cached --others --exclude-standard '*.h' '*.hpp' | grep -v -e '-inl\.h$' -e '^tests/'); do
  "$CXX" -std=c++20 -fsyntax-only -Wall -Wextra -Iinclude -I. -x c++ - <<<"#include \"$header\"" ||
    { echo "$header does not compile alone"; failed=1; }
done
((failed == 0))
