#!/bin/sh
# interleave.sh OUTPUT CHUNKS FILE..: all files in one, each cut into so many chunks of a size: the first chunk of each, the
# second of each and so on. What files of one origin have in common comes so close together that gzip, whose memory is
# 32 KB, finds it: the SPIR-V modules take half of what they take one after the other.
# SPDX-License-Identifier: Apache-2.0
set -eu
output=$1 chunks=$2
shift 2
: >"$output"
i=0
while [ "$i" -lt "$chunks" ]; do
  for file in "$@"; do
    size=$(wc -c <"$file")
    dd if="$file" bs=$(((size + chunks - 1) / chunks)) skip="$i" count=1 2>/dev/null >>"$output"
  done
  i=$((i + 1))
done
