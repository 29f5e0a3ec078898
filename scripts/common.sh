# Sourced by the other scripts: where things are, how to speak, what is up to date.
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
stamps=$venv/.stamps
export PATH=$venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1

if [[ -t 1 ]]; then say() { printf '\033[1m==> %s\033[0m\n' "$*"; }; else say() { printf '==> %s\n' "$*"; }; fi
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# digest FILE..: one hash of the names and contents of files and of all files below folders.
digest() {
  find "$@" -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}
# lock_of NAME: the file of the versions and hashes of a section of requirements/pins.txt, as pip reads it; those of
# alone.txt (scripts/lock.sh) come into build/lock/ first.
lock_of() {
  local file=requirements/lock/$1.txt
  if [[ ! -f $file ]]; then
    file=build/lock/$1.txt
    mkdir -p build/lock
    awk -v name="[$1]" '/^\[/ { on = $0 == name; next } on' requirements/lock/alone.txt >"$file"
    [[ -s $file ]] || fail "requirements/lock has no section '$1'"
  fi
  echo "$file"
}
# A stage is up to date if its stamp holds the digest of what it was made from.
fresh() { [[ -f $stamps/$1 && $(<"$stamps/$1") == "$2" ]]; }
mark() { mkdir -p "$stamps"; printf '%s\n' "$2" >"$stamps/$1"; }

# The wheel and the tests are compiled with the same flags, so that ccache gives one what the other has compiled.
if command -v ccache >/dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}; fi

# The newest of the names given that is a g++ of 12 or later, unless CXX says which.
choose_compiler() {
  [[ -n ${CXX:-} ]] && return
  local name
  for name in g++ g++-14 g++-13 g++-12; do
    if command -v "$name" >/dev/null && (($("$name" -dumpversion | cut -d. -f1) >= 12)); then
      export CXX=$name CC=${name/g++/gcc}
      return
    fi
  done
  fail "no g++ of version 12 or later was found; set CC and CXX"
}

# clock SECONDS: as 1:05.
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
# quietly NAME LOG COMMAND..: the command's output goes to LOG. Meanwhile a terminal shows the time and the last line of
# it, over and over in one line; elsewhere a line comes every 20 seconds. If it fails, the end of LOG is shown.
quietly() {
  local name=$1 log=$2 status=0 ticker; shift 2
  mkdir -p "$(dirname "$log")"
  : >"$log"
  tell_progress "$name" "$log" "$([[ -t 1 ]] && echo 1 || echo 20)" &
  ticker=$!
  "$@" >"$log" 2>&1 || status=$?
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
  if ((status)); then tail -n 25 "$log" >&2; fi
  return "$status"
}
# tell_progress NAME LOG SECONDS: a line that often, as long as this script lives.
tell_progress() {
  local start=$SECONDS last
  while sleep "$3" && kill -0 $$ 2>/dev/null; do
    last=$(tail -c 600 "$2" | tr '\r' '\n' | sed 's/^ *//; s/[^[:print:]]//g' | grep -v '^$' | tail -n 1) || true
    if [[ -t 1 ]]; then
      printf '\r\033[K    %s %s  %s' "$1" "$(clock $((SECONDS - start)))" "${last:0:55}"
    else
      printf '    %s %s  %s\n' "$1" "$(clock $((SECONDS - start)))" "${last:0:90}"
    fi
  done
}
# build_progress: of a build's output the lines that say how far it is, one every ten seconds with the time since it began,
# or what is wrong; all of it is kept in build/wheel.log.
build_progress() {
  local start=$SECONDS told=-10 last='' clear='' line
  [[ -t 1 ]] && clear='\r\033[K'  # another may have left a line half written
  mkdir -p build
  tee build/wheel.log | sed -u 's/^ *//' | grep --line-buffered -E '^\[[0-9]+/[0-9]+\]|[Ee]rror|warning:|^\*\*\*' | {
    while IFS= read -r line; do
      if [[ $line != \[* ]]; then
        printf '%s\n' "$line"
      elif ((SECONDS - told >= 10)); then
        told=$SECONDS last=
        printf "$clear"'    %s  %s\n' "$(clock $((SECONDS - start)))" "$line"
      else
        last=$line
      fi
    done
    if [[ $last ]]; then printf "$clear"'    %s  %s\n' "$(clock $((SECONDS - start)))" "$last"; fi
  } || true
}
