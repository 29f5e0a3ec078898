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
