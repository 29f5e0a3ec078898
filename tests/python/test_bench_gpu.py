"""bench/gpu_compare.py and bench/gpu_sweep.py without a GPU: what they check, write, skip and tell, on CPU tensors.
Graphs and clocks are stand-ins; the floor's kernels are those of `ropewalk floor`, done by numpy."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gpu_compare as compare  # noqa: E402
import gpu_contenders as makers  # noqa: E402
import gpu_floor  # noqa: E402
import gpu_problem as problems  # noqa: E402
import gpu_sweep as sweep  # noqa: E402
import gpu_timing as timing  # noqa: E402
import ropewalk  # noqa: E402


def array(address: int, dtype: type, *shape: int) -> np.ndarray:
    return np.ctypeslib.as_array((dtype * int(np.prod(shape))).from_address(address)).reshape(shape)


class HostFloor(gpu_floor.Floor):
    """Does on the host what the kernels of a description do; `wrong` leaves the last element out."""

    wrong = False

    def __init__(self, description: dict[str, Any]) -> None:
        self.description, self.shapes = description, description["shapes"]
        self.bytes = description["read_bytes"] + description["written_bytes"]

    def call(self, shape: dict[str, Any], pointers: dict[str, int], stream: Any) -> Any:
        rows: gpu_floor.Rows = self.description["rows"]
        at = {name: pointers[name] for name in self.description["arguments"]}
        q, k, v = rows.heads

        def call() -> None:
            if rows.apart:  # out of place, with a store of k and v as they are
                parts = [array(at[f"rows{i}"], ctypes.c_uint16, rows.tokens, n, rows.head_dim) ^ 0x8000
                         for i, n in enumerate(rows.heads)]  # fmt: skip
                for i in range(2):
                    array(at[f"out{i}"], ctypes.c_uint16, *parts[i].shape)[:] = parts[i]
                    array(at[f"cache{i + 1}"], ctypes.c_uint16, *parts[1].shape)[
                        array(at["slots"], ctypes.c_int64, rows.tokens)] = parts[i + 1]  # fmt: skip
                return
            data = array(at["rows0"], ctypes.c_uint16, rows.tokens, q + k + v, rows.head_dim)
            flipped = data ^ 0x8000
            part = slice(0, rows.rotary_dim or rows.head_dim)
            data[:, : q if rows.k_store_only else q + k, part] = flipped[:, : q if rows.k_store_only else q + k, part]
            if self.wrong:
                data[-1, 0, 0] ^= 0x8000
            if rows.few:
                assert (array(at["positions"], ctypes.c_uint32, rows.tokens) == self.description["position"]).all()
                assert not array(at["weight"], ctypes.c_uint8, self.description["run_bytes"]).any()
            if rows.cache:
                slots = array(at["slots"], ctypes.c_int64, rows.tokens)
                for name, heads in (("cache1", slice(q, q + k)), ("cache2", slice(q + k, q + k + v))):
                    fp8 = rows.cache == "fp8"
                    dtype = ctypes.c_uint8 if fp8 else ctypes.c_uint16
                    cache = array(at[name], dtype, rows.slots, k, rows.head_dim)
                    cache[slots] = flipped[:, heads] >> 8 if fp8 else flipped[:, heads]

        return call

    def unload(self) -> None:
        pass


def described(rows: gpu_floor.Rows, arch: str = "") -> dict[str, Any]:
    assert arch == "sm_90a"
    out = gpu_floor.describe(rows)
    out["shapes"] = out["shapes"][:4]
    return out | {"rows": rows}


class Graph:
    def __init__(self, us: float) -> None:
        self.us = us

    def replay(self) -> None:
        pass


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        gpu_floor.command()
    except RuntimeError as error:
        pytest.skip(str(error))
    for name, value in {
        "is_available": lambda: True, "synchronize": lambda *a: None, "empty_cache": lambda: None,
        "Stream": lambda: None, "stream": lambda s: contextlib.nullcontext(),
        "get_device_capability": lambda: (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(problems, "DEVICE", "cpu")
    monkeypatch.setattr(problems, "COLD_FROM", 16)
    monkeypatch.setattr(problems, "COLD_BYTES", 60_000)
    monkeypatch.setattr(compare, "gpu_name", lambda: {"name": "Host"})
    monkeypatch.setattr(gpu_floor, "Floor", HostFloor)
    monkeypatch.setattr(HostFloor, "wrong", False)
    monkeypatch.setattr(sweep.gpu_floor.Compiler, "want", _want)

    def capture(calls: list[Any], total: int, stream: Any) -> Graph:
        for i in range(total):
            calls[i % len(calls)]()
        return Graph(2.0 * total)

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "once", lambda graph: graph.us)


def _want(self: gpu_floor.Compiler, rows: gpu_floor.Rows) -> Any:
    if rows not in self.made:
        self.made[rows] = self.pool.submit(described, rows, self.arch)
    return self.made[rows]


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", ["gpu_sweep.py", "--out", str(out), "--workers", "2", *arguments])
    code = sweep.main()
    return code, json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def test_a_sweep(monkeypatch, tmp_path):
    code, data, page = run(monkeypatch, tmp_path / "sweep", "--heads", "4/2x64,3/1x80", "--tokens", "1,7,33",
                           "--random", "1", "--modes", "rope,norm+rope,store,k-only")  # fmt: skip
    rows = data["results"]
    modes = 8 + len(problems.STORES)
    assert code == 0, [row for row in rows if "failure" in row]
    assert len(rows) == 7 * modes and data["left"] == 0
    # All take two microseconds here.
    assert {round(row["of_floor"], 6) for row in rows} == {1.0}
    assert "| 4/2x64 | 1.00 | 1.00 | 1.00 |" in page and "**" not in page
    assert "## Drawn by seed 1" in page and f"{7 * modes} figures, 0 above their aim" in page


def test_a_wrong_result_is_a_dash(monkeypatch, tmp_path):
    right = ropewalk.rope_

    def wrong(q: Any, k: Any, **options: Any) -> None:
        right(q, k, **options)
        if "v" in options:
            options["v_cache"][-1] = 1

    monkeypatch.setattr(ropewalk, "rope_", wrong)
    code, data, page = run(monkeypatch, tmp_path / "sweep", "--heads", "4/2x64", "--tokens", "3")
    failed = {(row["op"], row["failure"]) for row in data["results"] if "failure" in row}
    assert code == 1
    assert failed == {(op, "wrong: a slot that was not named was written") for op in problems.STORES
                      if "k only" not in op}  # fmt: skip
    assert "| 4/2x64 | - |" in page and "norm+rope+kv fp8, frequencies, neox: wrong: a slot" in page


def test_a_shape_that_fails_is_left_behind(monkeypatch, tmp_path):
    real = problems.Problem.fill

    def fill(problem: Any) -> None:
        if problem.shape.tokens == 2:
            raise RuntimeError("out of memory\nand more")
        real(problem)

    monkeypatch.setattr(problems.Problem, "fill", fill)
    code, data, _ = run(monkeypatch, tmp_path / "sweep", "--heads", "4/2x64", "--tokens", "2,3", "--modes", "rope")
    assert code == 1
    assert [row.get("failure", "") for row in data["results"]] == ["RuntimeError: out of memory"] * 4 + [""] * 4


def test_a_wrong_floor_is_no_floor(monkeypatch, tmp_path):
    monkeypatch.setattr(HostFloor, "wrong", True)
    code, data, _ = run(monkeypatch, tmp_path / "sweep", "--heads", "4/2x64", "--tokens", "3", "--modes", "rope")
    assert code == 1
    assert {row["failure"] for row in data["results"]} == {"no floor"}


def test_time_and_resuming(monkeypatch, tmp_path):
    out, options = tmp_path / "sweep", ("--heads", "4/2x64", "--tokens", "1,2,3", "--modes", "rope")
    real, clock = sweep.time_shape, [0.0]

    def slow(*arguments: Any) -> Any:
        clock[0] += 100
        return real(*arguments)

    now = time.time
    monkeypatch.setattr(sweep, "time_shape", slow)
    monkeypatch.setattr(sweep.time, "time", lambda: now() + clock[0])
    code, data, page = run(monkeypatch, out, *options, "--seconds", "150")
    assert code == 0 and data["left"] == 2 and {row["tokens"] for row in data["results"]} == {1}
    assert "2 of 3 shapes not reached" in page
    data["results"][0]["us"] = 123.0  # kept, not timed again
    out.with_suffix(".json").write_text(json.dumps(data))
    code, data, _ = run(monkeypatch, out, *options, "--resume")
    assert code == 0 and data["left"] == 0
    assert [row["tokens"] for row in data["results"]] == [1] * 4 + [2] * 4 + [3] * 4
    assert data["results"][0]["us"] == 123.0


def test_a_lost_context_goes_on_in_a_new_process(monkeypatch, tmp_path):
    class ReplacedError(Exception):
        pass

    def execv(program: str, arguments: list[str]) -> None:
        raise ReplacedError(arguments)

    monkeypatch.setattr(compare, "alive", lambda: False)
    monkeypatch.setattr(compare.os, "execv", execv)
    out = tmp_path / "sweep"
    with pytest.raises(ReplacedError) as caught:
        run(monkeypatch, out, "--heads", "4/2x64", "--tokens", "1,2", "--modes", "rope")
    arguments = caught.value.args[0]
    assert "--resume" in arguments and any(a.startswith("--until=") for a in arguments)
    assert json.loads(out.with_suffix(".json").read_text())["lost"] == ["4/2x64 @ 1"]


@pytest.mark.parametrize(
    "of_floor, op, tokens, text",
    [(1.049, "rope", 4096, "1.05"), (1.051, "rope", 4096, "**1.05**"), (1.099, "norm+rope", 4095, "1.10"),
     (1.11, "norm+rope+kv bf16", 64, "**1.11**"), (1.149, "norm+rope+kv fp8, k only", 8192, "1.15"),
     (1.16, "norm+rope+kv fp8", 1, "**1.16**")],
)  # fmt: skip
def test_marks(of_floor, op, tokens, text):
    assert sweep.mark({"of_floor": of_floor, "aim": compare.general_aim(op, tokens)}) == text
    assert sweep.mark({"failure": "wrong", "aim": 1.0}) == "-"
    assert sweep.mark(None) == ""


def test_refusals(monkeypatch, tmp_path, capsys):
    for arguments, text in ((["--heads", "8x128"], "heads must be Q/KxHEAD_DIM"), (["--modes", "rop"], "rop")):
        monkeypatch.setattr(sys, "argv", ["gpu_sweep.py", "--out", str(tmp_path / "sweep"), *arguments])
        assert sweep.main() == 2
        assert text in capsys.readouterr().err


def test_one_shape_beside_its_peers(monkeypatch):
    monkeypatch.setattr(makers, "PEERS", {"broken": ("broken", lambda problem: 1 / 0)})
    shape = problems.Shape("decode_4", 4, 4, 2, 2, 64, 32)
    options = type("Options", (), {"quick": True})
    monkeypatch.setattr(problems, "WITH_STORE", ["decode_4"])
    rows = compare.compare(shape, options, {"broken": "1.0"}, False, gpu_floor.Compiler("sm_90a", 2))
    assert not [row for row in rows if "failure" in row]
    ours = [row for row in rows if row["contender"] == "ropewalk"]
    assert len(ours) == 8 + 2 * len(problems.STORES) and all("of_floor" in row for row in ours)
    floors = {row["op"]: row["bytes"] for row in rows if row["contender"] == "floor"}
    # Part of each head by rope, whole heads by norm + rope, v and the caches besides.
    assert floors["rope"] == 2 * 4 * 6 * 32 * 2
    assert floors["norm+rope"] == 2 * 4 * 6 * 64 * 2
    assert floors["norm+rope+kv bf16"] == 4 * (6 * 64 * 2 * 2 + 2 * 64 * 2 + 4 * 64 * 2)
    for row in ours:
        assert row["bytes"] == floors[row["op"]], row["op"]
    assert {row["contender"] for row in rows} == {"ropewalk", "floor", "torch eager"}


def append(s: Any, qkv: Any, table: Any, lengths: Any, indptr: Any, pages: Any, caches: Any, q_out: Any,
           weights: Any) -> Any:  # fmt: skip
    """What FlashInfer documents of its generated kernels: the position of row r of request b is r + its length - the
    end of its rows, and its k and v go to that position's place in the page table."""
    q, k, v = qkv.view(s.tokens, -1, 128).split([s.q_heads, s.k_heads, s.v_heads], 1)
    for b in range(len(lengths)):
        for row in range(int(indptr[b]), int(indptr[b + 1])):
            position = row + int(lengths[b]) - int(indptr[b + 1])
            cos, sin = table[position].double().chunk(2)
            angles = torch.atan2(sin, cos)[None]
            for x, weight, out in ((q, weights[0], q_out), (k, weights[1], None)):
                done = problems.reference(x[row : row + 1], angles, "neox", weight)[0]
                if out is not None:
                    out[row] = done.to(out.dtype)
                else:
                    page, place = int(pages[b, position // 16]), position % 16
                    caches[0][page, place] = done.to(caches[0].dtype)
                    caches[1][page, place] = v[row].to(caches[1].dtype)
    return q_out


@pytest.mark.parametrize("tokens", [8, 320])
def test_cake_is_given_its_positions_and_pages(monkeypatch, tokens):
    shape = problems.Shape("cake", tokens, 8, 1, 1, 128, 128)
    problem = problems.Problem(shape, buffers=2)

    def bf16(qkv, table, lengths, indptr, pages, k_cache, v_cache, *, out_q, q_norm_weight, k_norm_weight, **options):
        assert options["clear_unused_last_page_rows"] is False and options["qk_norm_policy"] == 2
        return append(shape, qkv, table, lengths, indptr, pages, (k_cache, v_cache), out_q,
                      (q_norm_weight, k_norm_weight))  # fmt: skip

    def fp8(qkv, table, lengths, indptr, pages, caches, prefill, k_scale, v_scale, policy, longest, *, out_q,
            q_norm_weight, k_norm_weight, **options):  # fmt: skip
        assert prefill == (tokens > 256) and policy == 2 and longest == tokens // len(lengths)
        assert not (lengths % 16).any()  # nothing is left to clear
        made = append(shape, qkv, table, lengths, indptr, pages, caches, out_q, (q_norm_weight, k_norm_weight))
        return made, options["q_scale"], options["split_k_flag"]

    modules = {
        "cake_fused_qk_rope_append": {"cake_fused_qk_rmsnorm_rope_append_paged_kv_cache": bf16},
        "cake_fused_qk_rope_fp8_append": {"cake_fused_qk_rmsnorm_rope_quantize_fp8_append_paged_kv_cache": fp8},
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, f"flashinfer.{name}", type(name, (), members))
    monkeypatch.setitem(sys.modules, "flashinfer", type("flashinfer", (), {}))
    contenders = makers.cake(problem)
    assert [c.op for c in contenders] == ["norm+rope+kv bf16, k only", "norm+rope+kv fp8, q fp8"]
    for contender in contenders:
        timing.check(problem, contender, {})
        assert not contender.failure, contender.failure
    assert makers.cake(problems.Problem(problems.Shape("other", 8, 8, 2, 2, 128, 128), buffers=2)) == []


def test_a_workload_of_sol_as_it_is_defined(monkeypatch):
    monkeypatch.setattr(makers, "PEERS", {})
    monkeypatch.setattr(problems, "SOL_CACHE", 40)
    monkeypatch.setattr(problems, "SOL_WORKLOADS", [(2, 5, 3)])
    shape = problems.Shape("sol", 10, 4, 2, 2, 64, 64)
    monkeypatch.setattr(problems, "SOL", {"sol": shape})
    options = type("Options", (), {"quick": True})
    rows = compare.compare(shape, options, {}, False, gpu_floor.Compiler("sm_90a", 2))
    assert not [row for row in rows if "failure" in row]
    (ours,) = (row for row in rows if row["op"] == problems.SOL_OP and row["contender"] == "ropewalk")
    (floor,) = (row for row in rows if row["op"] == problems.SOL_OP and row["contender"] == "floor")
    assert ours["of_floor"] == pytest.approx(1) and ours["bytes"] == floor["bytes"]

    problem = problems.Problem(shape)
    problem.sol = makers.Sol(problem)
    contender = problem.sol.ours()
    make = contender.make
    for where, text in (("caches", "the caches do not hold"), ("packed", "was changed"), ("outs", "relative error")):

        def wrong(index: int, where: str = where) -> Any:
            def call() -> None:
                make(index)()
                tensors = {"caches": problem.sol.caches[1], "packed": problem.packed[0], "outs": problem.sol.outs[0]}
                tensors[where].view(-1)[64 * 3] += 9

            return call

        contender.make = wrong
        timing.check(problem, contender, {})
        assert text in contender.failure, where
