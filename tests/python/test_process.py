"""Calls from Python at odd places of a process: small stacks, daemon threads at its end, threads set meanwhile; many
callers at once, and children that are forked after use."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import ropewalk
import torch

F = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
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


def draw(tokens):
    return torch.randn((tokens, 8, 64), generator=torch.Generator().manual_seed(0))


def in_child(body, seconds=20):
    """Runs body in a forked child; its exit code, or -1 if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(seconds)
            code = 0 if body() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("own_pool", [False, True])
def test_fork_after_use(own_pool):
    q = draw(4000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ropewalk.set_threads(2 if own_pool else None)
        want = ropewalk.rope(q, frequencies=F)[0]
        bits = want.numpy().tobytes()

        def again():
            new = ropewalk.rope(q.numpy(), frequencies=F)[0]  # numpy: torch's own threads do not survive fork()
            other = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
            ropewalk.rope(q.numpy(), frequencies=other)
            return new.tobytes() == bits

        assert in_child(again) == 0
        assert in_child(lambda: in_child(again) == 0) == 0
        assert torch.equal(ropewalk.rope(q, frequencies=F)[0], want)
    finally:
        ropewalk.set_threads(None)
        torch.set_num_threads(before)


def test_torchs_operator_in_a_forked_child():
    q = draw(3)
    torch.ops.ropewalk.rope_(q, frequencies=F._content)
    other = ropewalk.Frequencies(theta=3e4, rotary_dim=64)
    want = ropewalk.rope(q, frequencies=other)[0]

    def again():  # frequencies that nobody has asked for yet
        torch.ops.ropewalk.rope_(q, frequencies=other._content)
        return torch.equal(q, want)

    assert in_child(again) == 0
    assert in_child(lambda: in_child(again) == 0) == 0
    assert again()


@pytest.mark.parametrize("own_pool", [False, True])
def test_callers_at_once(own_pool):
    q = draw(500)
    want = ropewalk.rope(q, frequencies=F)[0]
    wrong = []

    def caller(index):
        for _ in range(50):
            f = ropewalk.Frequencies(theta=1e4, rotary_dim=64)  # made and freed while others run
            if not torch.equal(ropewalk.rope(q, frequencies=f)[0], want):
                wrong.append(index)
            try:
                ropewalk.rope_(q[:, :, :63], frequencies=f)
                wrong.append(index)
            except ValueError as error:
                if "head_dim" not in str(error):
                    wrong.append(str(error))

    try:
        if own_pool:
            ropewalk.set_threads(2)
        threads = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        ropewalk.set_threads(None)
    assert wrong == []
