"""Calls from Python at odd places of a process: small stacks, daemon threads at its end, threads set meanwhile."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import sys, threading, time
import numpy as np, ropewalk
f = ropewalk.Frequencies(1e4, 64)
big, small = np.ones((2000, 8, 64), "f4"), np.ones((1, 1, 64), "f4")
cos, far = np.ones((4, 32), "f4"), np.array([99], "i8")
"""


def run(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("mode", ["big", "small", "fault", "error", "version", "made"])
def test_daemon_threads_do_not_end_the_process(mode: str) -> None:
    code = """
def go(mode):
    version = ropewalk._module.function("version")
    q = (big if mode == "big" else small).copy()
    while True:
        if mode in ("big", "small"): ropewalk.rope_(q, frequencies=f)
        elif mode == "fault": ropewalk.rope_(q, positions=far, cos=cos, sin=cos)
        elif mode == "version": version()
        elif mode == "made": ropewalk.Frequencies(1e4, 64)
        else:
            try: ropewalk.rope_(q, positions=np.zeros((3, 3, 3), "i8"), frequencies=f)
            except ValueError: pass
for _ in range(3): threading.Thread(target=go, args=(sys.argv[1],), daemon=True).start()
time.sleep(0.1)
print("end")
"""
    for _ in range(3):
        done = run(code, mode)
        assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_small_stacks() -> None:
    code = """
size = int(sys.argv[1])
threading.stack_size(size)
def go():
    for dim in (64, 128, 8192):
        for dtype in ("f4", "f2"):
            q = np.ones((4, 2, dim), dtype)
            ropewalk.rope_(q, q.copy(), frequencies=ropewalk.Frequencies(1e4, dim), norm="rms", rounding="reference")
            ropewalk.rope_(q[..., : dim - 6], frequencies=ropewalk.Frequencies(1e4, dim - 10), rotary_offset=4)
    print("served")
thread = threading.Thread(target=go)
thread.start()
thread.join()
"""
    for size in (128 << 10, 256 << 10):  # Python's own frames need the first
        done = run(code, str(size))
        assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_threads_are_set_while_others_call() -> None:
    code = """
stop, calls = threading.Event(), [0] * 3
def go(i):
    q, k = np.ones((256, 8, 64), "f4"), np.ones((256, 8, 64), "f4")
    while not stop.is_set():
        ropewalk.rope_(q, k, frequencies=f)
        calls[i] += 1
threads = [threading.Thread(target=go, args=(i,)) for i in range(3)]
for thread in threads: thread.start()
n = 0
while n < 300 or min(calls) < 3:  # however late a thread gets its first turn
    ropewalk.set_threads(1 + n % 4 if n % 5 else None)
    n += 1
stop.set()
for thread in threads: thread.join()
print(min(calls) > 0)
"""
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
