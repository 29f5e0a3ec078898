#!/usr/bin/env bash
# scripts/fresh_debian.sh RELEASE [FOLDER [PART..]]: README's ways of installing, as printed there, on a fresh Debian (12 or
# 13), which debootstrap lays in FOLDER (/tmp/ropewalk-debian-RELEASE): a chroot that knows nothing of this machine but how
# it reaches Debian's packages and PyPI. Parts: run (`make run`), source (`make setup`), pip (`make wheel` and pip, or
# the wheel that lies in dist/ here), cmake (cmake --install, and a program of a user's); and test (`make test`), only if
# it is named. Needs root; 12 GB.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
usage="usage: scripts/fresh_debian.sh 12|13 [FOLDER [run|source|pip|cmake|test ..]]"
case ${1:?$usage} in 12) suite=bookworm ;; 13) suite=trixie ;; *) fail "$usage" ;; esac
folder=${2:-/tmp/ropewalk-debian-$1} parts=("${@:3}")
((${#parts[@]})) || parts=(run source pip cmake)
((EUID == 0)) || fail "only root can make a chroot"
command -v debootstrap >/dev/null || fail "debootstrap was not found: apt-get install debootstrap"

if [[ ! -e $folder/etc/debian_version ]]; then
  say "Debian $1 into $folder"
  quietly debootstrap build/debootstrap.log debootstrap --variant=minbase --include=ca-certificates "$suite" "$folder"
fi
# How this machine reaches the registries, if not as any.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  if [[ -f $file ]]; then mkdir -p "$folder/$(dirname "$file")"; cat "$file" >"$folder$file"; fi
done
tree=$folder/work/ropewalk
mkdir -p "$tree" "$folder/proc" "$folder/sys"
# PoCL aborts where it cannot read the machine's memory from /sys. Never remove the folder while these are there.
mounted=()
trap 'for place in "${mounted[@]}"; do umount "$place"; done' EXIT
mount_at() {
  local place=$1; shift
  if mountpoint -q "$place"; then return; fi
  mount "$@" "$place"
  mounted+=("$place")
}
mount_at "$folder/proc" -t proc proc
mount_at "$folder/sys" -t sysfs -o ro sysfs
mount_at "$folder/dev/pts" --bind /dev/pts  # terminals, of which the tests take one
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - | tar -xf - -C "$tree"
if compgen -G "dist/ropewalk-*_$(uname -m).whl" >/dev/null; then
  mkdir -p "$tree/dist"
  cp dist/ropewalk-*_"$(uname -m)".whl "$tree/dist/"
fi
# The lines of README's first block of commands, by what they begin with.
# shellcheck disable=SC2016  # backquotes of Markdown
command_of() { sed -n '/^```$/,/^```$/p' README.md | sed -n "s/^\\($1.*\\)/\\1/p" | sed 's/ *#.*//' | head -n 1; }
# inside COMMANDS: in the chroot, in the tree, with as little of this environment as may be.
inside() {
  printf '$ %s\n' "$1"
  chroot "$folder" /usr/bin/env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    ${CCACHE_DIR:+CCACHE_DIR="/ccache" CCACHE_BASEDIR=/work CCACHE_NOHASHDIR=1} bash -euc "cd /work/ropewalk; $1"
}
if [[ ${CCACHE_DIR:-} ]]; then
  mkdir -p "$folder/ccache"
  mount_at "$folder/ccache" --bind "$CCACHE_DIR"
fi
inside "command -v make >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends make >/dev/null; }"
for part in "${parts[@]}"; do
  start=$SECONDS
  say "Debian $1: $part"
  case $part in
    run | test) inside "make $part" ;;
    source) inside "$(command_of 'make setup')" ;;
    pip)
      install=$(command_of 'make wheel')
      if compgen -G "$tree/dist/ropewalk-*_$(uname -m).whl" >/dev/null; then install=${install#*&& }; fi
      inside "apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; rm -rf /root/env
        python3 -m venv /root/env; PATH=/root/env/bin:\$PATH
        $install
        cd /; ropewalk doctor | head -n 2; python -c 'import ropewalk; print(ropewalk.__version__, ropewalk.backends()[0])'"
      ;;
    cmake)
      inside "$(command_of 'apt-get install' | sed 's/install/install -y -qq --no-install-recommends/') >/dev/null
        $(command_of 'cmake -S')
        rm -rf /root/user; mkdir /root/user; cp examples/rope.cc /root/user/; cd /root/user
        printf '%s\n' 'cmake_minimum_required(VERSION 3.22)' 'project(user LANGUAGES CXX)' 'find_package(ropewalk REQUIRED)' \
          'add_executable(app rope.cc)' 'target_link_libraries(app PRIVATE ropewalk::ropewalk)' >CMakeLists.txt
        cmake -S . -B build -DCMAKE_PREFIX_PATH=/root/.local && cmake --build build && build/app"
      ;;
    *) fail "$usage" ;;
  esac
  say "Debian $1: $part held, $(clock $((SECONDS - start)))"
done
