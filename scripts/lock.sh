#!/usr/bin/env bash
# Writes requirements/lock/: what requirements/ names and all that it pulls in, each at one version with the hashes of
# its files, for every platform. setup.sh installs by these, so that nothing else is. Run it after a change in
# requirements/; needs uv (pip install uv) and PyPI. Versions that are locked already stay where they may.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

command -v uv >/dev/null || fail "uv was not found: pip install uv"
mkdir -p requirements/lock
for file in requirements/*.txt; do
  name=$(basename "$file" .txt)
  # Unpacked without what they need, see setup.sh.
  options=()
  [[ $name == sycl* || $name == weights || $name == tvm-ffi-oldest || $name == engines* ]] && options=(--no-deps)
  uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate "${options[@]}" "$@" \
    "$file" -o "requirements/lock/$name.txt"
  sed -i "1i# By scripts/lock.sh, from requirements/$name.txt. Do not edit." "requirements/lock/$name.txt"
done
