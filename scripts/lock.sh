#!/usr/bin/env bash
# Writes requirements/lock/: what each section of requirements/pins.txt names and all that it pulls in, each at one version
# with the hashes of its files, for every platform; the sections that are installed alone go into one file, alone.txt.
# setup.sh installs by these, so that nothing else is. Run it after a change of pins.txt; needs uv (pip install uv) and PyPI.
# Versions that are locked already stay where they may.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

command -v uv >/dev/null || fail "uv was not found: pip install uv"
pins=requirements/pins.txt lock=requirements/lock
compile() {
  uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate "$@"
}
# What pip reads of a section and of those that it begins with.
section() {
  local other
  other=$(sed -n "s/^\[$1: \(.*\)\]$/\1/p" $pins)
  [[ $other ]] && section "$other"
  awk -v name="$1" '/^\[/ { split($0, part, /[^a-z0-9-]+/); on = part[2] == name; next } on' $pins
}

alone="# By scripts/lock.sh, from the sections of $pins that are installed alone. Do not edit."
mapfile -t headings < <(grep '^\[' $pins)
for heading in "${headings[@]}"; do
  name=${heading#[} name=${name%%[]: ]*}
  if [[ $heading == *" alone]" ]]; then
    alone+=$'\n'"[$name]"$'\n'$(section "$name" | compile --no-deps "$@" -)
  else
    section "$name" | compile "$@" - -o "$lock/$name.txt"
    sed -i "1i# By scripts/lock.sh, from [$name] of $pins. Do not edit." "$lock/$name.txt"
  fi
done
printf '%s\n' "$alone" >$lock/alone.txt
