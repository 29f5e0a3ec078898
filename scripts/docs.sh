#!/usr/bin/env bash
# Makes what `ropewalk describe` writes anew: the pages of arguments and of model types, and Python's rope_.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
cmake --preset dev >/dev/null
cmake --build --preset dev --target ropewalk_cli
for pair in markdown:docs/arguments.md models:docs/models.md python:bindings/python/ropewalk/_face.py; do
  build/dev/bin/ropewalk describe "--${pair%%:*}" >build/described
  mv build/described "${pair#*:}"
done
