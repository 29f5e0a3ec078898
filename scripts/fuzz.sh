#!/usr/bin/env bash
# Runs each libFuzzer target for the seconds given (600), starting from its corpus in fuzz/corpus.tar.xz; new inputs go to
# build/fuzz/corpus/, and into the archive, minimised, with `scripts/fuzz.sh merge`. Then fuzz/python_fuzz.py for so long.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
seconds=${1:-600}
unset CC CXX
cmake --preset fuzz -DPython_EXECUTABLE="$venv/bin/python" && cmake --build --preset fuzz
export ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1

ran=0 failed=0
for target in build/fuzz/fuzz/*_fuzz; do
  [[ -x $target ]] || continue
  name=$(basename "$target")
  found=build/fuzz/corpus/$name seeds=build/fuzz/seeds/$name  # unpacked by cmake
  mkdir -p "$found" "$seeds"
  ran=$((ran + 1))
  if [[ $seconds == merge ]]; then
    say "$name: merging what was found into its corpus"
    # Only what reaches new code: what differs in how often it does is thousands of files.
    "$target" -merge=1 -use_counters=0 "$seeds" "$found" || failed=$((failed + 1))
  else
    say "$name: $seconds s"
    "$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 \
      -artifact_prefix="build/fuzz/$name-" "$found" "$seeds" || failed=$((failed + 1))
  fi
done
if [[ $seconds == merge ]]; then
  tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C build/fuzz/seeds -cJf fuzz/corpus.tar.xz .
else
  say "python_fuzz, of the installed package: $seconds s"
  ran=$((ran + 1))
  python fuzz/python_fuzz.py --seconds "$seconds" || failed=$((failed + 1))
fi
printf '%d passed, %d failed\n' $((ran - failed)) "$failed"
((ran > 0 && failed == 0))
