#!/usr/bin/env bash
# Builds the benchmark programs and hands over to bench/results.sh, which runs everything and writes docs/results/.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
cmake --preset dev && cmake --build --preset dev
exec bench/results.sh "$@"
