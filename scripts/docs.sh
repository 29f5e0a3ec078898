#!/usr/bin/env bash
# Makes anew what is generated: what `ropewalk describe` writes (the pages of arguments and of model types, Python's
# rope_), the page of Python's functions, and the site of all pages in build/site-html, which is read without a network.
# SPDX-License-Identifier: Apache-2.0
source "$(dirname "$0")/common.sh"
choose_compiler
cmake --preset dev >/dev/null
cmake --build --preset dev --target ropewalk_cli
for pair in markdown:docs/arguments.md models:docs/models.md python:bindings/python/ropewalk/_face.py; do
  build/dev/bin/ropewalk describe "--${pair%%:*}" >build/described
  mv build/described "${pair#*:}"
done
python scripts/reference_page.py
say "docs: the site"
site=build/site-html
rm -rf "$site"
PYTHONPATH=$venv/docs python -m sphinx -b html -n -W --keep-going -q -c scripts/site -d build/site-doctrees . "$site"
if grep -rnoE '<(script|link|img|iframe|source)[^>]*(src|href)="?(https?:)?//[^>]*>' "$site" --include='*.html'; then
  fail "these pages load something from a network"
fi
say "docs: $root/$site/index.html"
