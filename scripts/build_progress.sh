#!/usr/bin/env bash
# Shows the lines of a build that say how far it is or what is wrong; keeps all of it in build/wheel.log.
# SPDX-License-Identifier: Apache-2.0
mkdir -p build
tee build/wheel.log | sed -u 's/^ *//' | grep --line-buffered -E '^\[[0-9]+/[0-9]+\]|[Ee]rror|warning:|^\*\*\*' || true

