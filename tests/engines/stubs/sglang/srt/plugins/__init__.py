"""Loads the plugins of the group and applies their hooks."""

# SPDX-License-Identifier: Apache-2.0
from importlib.metadata import entry_points

from sglang.srt.plugins.hook_registry import HookRegistry


def load_plugins():
    for entry in entry_points(group="sglang.srt.plugins"):
        entry.load()()
    HookRegistry.apply_hooks()
