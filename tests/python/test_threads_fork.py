"""Many callers at once, and children that are forked after use."""

# SPDX-License-Identifier: Apache-2.0
import os
import signal
import threading
import warnings

import pytest
import ropewalk
import torch

F = ropewalk.Frequencies(theta=1e4, rotary_dim=64)


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
