"""Loads the plugins of the group."""

# SPDX-License-Identifier: Apache-2.0
from importlib.metadata import entry_points


def load_general_plugins():
    for entry in entry_points(group="vllm.general_plugins"):
        entry.load()()
