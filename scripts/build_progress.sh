#!/usr/bin/env bash
# Shows the lines of a build that say how far it is, with the time since it began, or what is wrong; keeps all of it in
# build/wheel.log. Of how far, a line every ten seconds.
# SPDX-License-Identifier: Apache-2.0
mkdir -p build
start=$SECONDS told=-10 last=
[[ -t 1 ]] && clear='\r\033[K' || clear=  # another may have left a line half written
now() { printf "$clear"'    %d:%02d  ' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }
tee build/wheel.log | sed -u 's/^ *//' | grep --line-buffered -E '^\[[0-9]+/[0-9]+\]|[Ee]rror|warning:|^\*\*\*' | {
  while IFS= read -r line; do
    if [[ $line != \[* ]]; then
      printf '%s\n' "$line"
    elif ((SECONDS - told >= 10)); then
      told=$SECONDS last=
      printf '%s%s\n' "$(now)" "$line"
    else
      last=$line
    fi
  done
  if [[ $last ]]; then printf '%s%s\n' "$(now)" "$last"; fi
} || true
