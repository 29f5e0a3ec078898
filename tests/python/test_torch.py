"""torch: compiling, views, inference mode, threads; its operators, as the module serves them."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import gc
import inspect
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import ropewalk
import torch
from ropewalk import _face, _torch

F = ropewalk.Frequencies(theta=1e4, rotary_dim=64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_in_place(backend):
    def step(q, k, positions):
        q = q * 2
        ropewalk.rope_(q, k, positions=positions, frequencies=F, pairing="interleaved")
        return q + 1

    q, k, positions = draw(5, 4, 64), draw(5, 2, 64, seed=1), torch.arange(5)
    k_eager = k.clone()
    want = step(q.clone(), k_eager, positions)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(q.clone(), k, positions), want)
    assert torch.equal(k, k_eager)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_out_of_place_with_norm_and_store(backend):
    weight, table = torch.linspace(0.5, 1.5, 64), F.table(16, torch.float32)
    slots = torch.tensor([3, 0, -1, 7, 5])

    def step(q, k, v, k_cache, v_cache):
        return ropewalk.rope(q, k, cos=table[0], sin=table[1], q_weight=weight, k_weight=weight, eps=1e-5, v=v,
                             k_cache=k_cache, v_cache=v_cache, slots=slots, k_scale=0.5)  # fmt: skip

    q, k, v = draw(5, 4, 64), draw(5, 2, 64, seed=1), draw(5, 2, 64, seed=2)
    caches = [torch.zeros(8, 2, 64).to(torch.float8_e4m3fn) for _ in range(4)]
    want = step(q, k, v, *caches[:2])
    before = q.clone()
    got = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, *caches[2:])
    assert torch.equal(q, before)
    for x, y in zip((*got, *caches[2:]), (*want, *caches[:2]), strict=True):
        assert torch.equal(x.float(), y.float())


@torch.no_grad()
@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_k_store_only(function, backend):
    slots = torch.tensor([3, 0, -1, 7, 5])

    def step(q, k, k_cache):
        new_q, none = function(q * 2, k, frequencies=F, k_cache=k_cache, slots=slots, k_store_only=True)
        assert none is None
        return new_q

    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    caches = [torch.zeros(8, 2, 64) for _ in range(2)]
    want, k_before = step(q, k, caches[0]), k.clone()
    got = torch.compile(step, fullgraph=True, backend=backend)(q, k, caches[1])
    assert torch.equal(got, want) and torch.equal(k, k_before) and torch.equal(*caches)
    assert caches[0][[3, 0, 7, 5]].abs().sum() > 0


@torch.no_grad()
def test_compile_notices_other_frequencies():
    other = ropewalk.Frequencies(theta=1e6, rotary_dim=64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, f):
        return ropewalk.rope(q, frequencies=f)[0]

    q = draw(5, 4, 64)
    for f in (F, other, F):
        assert torch.equal(step(q, f), ropewalk.rope(q, frequencies=f)[0])


def test_a_graph_outlives_its_frequencies():
    f = ropewalk.Frequencies(theta=3e4, rotary_dim=64)
    content, q = f._content, draw(2, 1, 64)
    want = ropewalk.rope(q, frequencies=f)[0]
    del f
    gc.collect()
    torch.ops.ropewalk.rope_(q, frequencies=content)
    assert torch.equal(q, want)


@torch.no_grad()
def test_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(q):
        return ropewalk.rope(q, frequencies=F)[0]

    for tokens in (3, 4, 9):
        q = draw(tokens, 4, 64)
        assert torch.equal(step(q), ropewalk.rope(q, frequencies=F)[0])


def test_operator_is_registered_well():
    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    torch.library.opcheck(torch.ops.ropewalk.rope_.default, (q, k), {"frequencies": F._content})
    out = torch.empty_like(q)
    torch.library.opcheck(torch.ops.ropewalk.rope_out.default, (q,), {"frequencies": F._content, "q_out": out})
    torch.library.opcheck(torch.ops.ropewalk.rope_short_.default, (q, k), {"frequencies": F._content, "pairing": 1})
    torch.library.opcheck(torch.ops.ropewalk.rope_short_out.default, (q,), {"frequencies": F._content, "q_out": out})


def test_errors_cross_the_operator():
    with pytest.raises(ValueError, match="k has 4 tokens, but q has 5"):
        torch.ops.ropewalk.rope_(draw(5, 4, 64), draw(4, 2, 64), frequencies=F._content)


def test_inference_mode_and_parameters():
    weight = torch.nn.Parameter(torch.ones(64))
    with torch.inference_mode():
        q = draw(5, 4, 64)
        ropewalk.rope_(q, frequencies=F, q_weight=weight)
    with torch.no_grad():
        other = draw(5, 4, 64)
        ropewalk.rope_(other, frequencies=F, q_weight=weight)
        assert torch.equal(q, other)
        leaf = torch.nn.Parameter(draw(5, 4, 64))
        ropewalk.rope_(leaf, frequencies=F)
    with pytest.raises(ValueError, match="q requires grad"):
        ropewalk.rope_(leaf, frequencies=F)


def test_views():
    base = draw(3, 8, 7, 130)
    view = base[::2, 1::3, :, 1:65].permute(0, 2, 1, 3)  # [2, 7, 3, 64], every stride odd
    want = ropewalk.rope(view.contiguous(), frequencies=F)[0]
    before = base.clone()
    ropewalk.rope_(view, frequencies=F)
    assert torch.equal(view, want)
    mask = torch.zeros_like(base, dtype=torch.bool)
    mask[::2, 1::3, :, 1:65] = True
    assert torch.equal(base[~mask], before[~mask])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_torch(threads):
    q = draw(3000, 8, 64)
    want = torch.cat([ropewalk.rope(q[i : i + 1], positions=torch.tensor([i]), frequencies=F)[0] for i in range(3000)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ropewalk.rope(q, frequencies=F)[0], want)
    finally:
        torch.set_num_threads(before)


def test_own_pool():
    q = draw(3000, 8, 64)
    want = ropewalk.rope(q, frequencies=F)[0]
    try:
        for threads in (1, 2, 3):
            ropewalk.set_threads(threads)
            assert torch.equal(ropewalk.rope(q, frequencies=F)[0], want)
    finally:
        ropewalk.set_threads(None)


# ---------------------------------------------------------------------------------------------------------------------
# torch.ops.ropewalk, which the module serves itself from torch 2.10 on


def test_the_module_serves_the_operators():
    assert _torch.served_by_module == (tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10))


def calls():
    """Arguments of the operators by name, but for q, k and the positions."""
    cos, sin = F.table(3000, torch.float32)
    weight = torch.linspace(0.5, 1.5, 64, dtype=torch.bfloat16)
    fp8 = torch.zeros(8, 2, 64).to(torch.float8_e4m3fn)
    store = {
        "v": draw(5, 2, 64, seed=2),
        "k_cache": fp8,
        "v_cache": fp8.clone(),
        "slots": torch.tensor([3, 0, -1, 7, 5]),
    }
    return {
        "plain": {"frequencies": F},
        "short": {"cos_sin": torch.cat((cos, sin), -1), "pairing": 1, "offsets": torch.arange(5) - 1},
        "choices": {"frequencies": F, "pairing": 1, "inverse": 1, "rounding": 1, "offsets": torch.arange(5)},
        "table": {"cos": cos, "sin": sin, "rotary_offset": 0, "rotary_dim": 64},
        "norm": {"frequencies": F, "q_weight": weight, "k_weight": weight, "zero_centered_weight": 1, "eps": 0.25},
        "store": {"frequencies": F, **store, "k_scale": torch.tensor(0.5), "v_scale": torch.tensor([0.25, 2.0])},
        "only stored": {"frequencies": F, **store, "k_scale": torch.tensor(0.5), "k_store_only": 1},
        "parameters": {"frequencies": F, **{f"{x}_weight": torch.nn.Parameter(torch.ones(64)) for x in "qk"}},
    }


def run_both(name, served, dtype=torch.float32, **others):
    """What the operator and the core make of the same arguments; those of the operator."""
    q, k, positions = draw(5, 4, 64).to(dtype), draw(5, 2, 64, seed=1).to(dtype), torch.tensor([0, 7, 2989, 1, 5])
    given = {**calls()[name], **others}
    kinds = {arg["name"]: arg for arg in ropewalk._module.description()}
    clones = [
        {x: y.detach().clone() if isinstance(y, torch.Tensor) else y
         for x, y in {"q": q, "k": k, "positions": positions + 1, **given}.items()}
        for _ in range(2)
    ]  # fmt: skip
    named = {x: kinds[x]["choices"][y] if kinds[x]["kind"] == "choice" else bool(y) if kinds[x]["kind"] == "bool" else y
             for x, y in clones[1].items()}  # fmt: skip
    if "v" in named and dtype != torch.float32:
        clones[0]["v"] = named["v"] = named["v"].to(dtype)
    ropewalk.rope_(**named)
    clones[0]["frequencies"] = F._content if "frequencies" in given else ""
    assert served(**clones[0]) is None
    for x, y in clones[0].items():
        if isinstance(y, torch.Tensor):
            assert torch.equal(y.float(), named[x].float()), x
    return clones[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", calls())
def test_the_operator_is_the_call(name, dtype):
    written = {"q", "k"} - ({"k"} if name == "only stored" else set())
    written |= {"k_cache", "v_cache"} if "store" in name else set()
    given = run_both(name, torch.ops.ropewalk.rope_, dtype)
    assert {x for x, y in given.items() if isinstance(y, torch.Tensor) and y._version} == written
    outputs = {"q_out": torch.zeros(5, 4, 64, dtype=dtype)}
    if name != "only stored":
        outputs["k_out"] = torch.zeros(5, 2, 64, dtype=dtype)
    given = run_both(name, torch.ops.ropewalk.rope_out, dtype, **outputs)
    versions = {x for x, y in given.items() if isinstance(y, torch.Tensor) and y._version}
    assert versions == written - {"q", "k"} | set(outputs)
    if name in ("plain", "short"):
        given = run_both(name, torch.ops.ropewalk.rope_short_, dtype)
        assert {x for x, y in given.items() if isinstance(y, torch.Tensor) and y._version} == {"q", "k"}
        given = run_both(name, torch.ops.ropewalk.rope_short_out, dtype, **outputs)
        assert {x for x, y in given.items() if isinstance(y, torch.Tensor) and y._version} == set(outputs)


BAD = {
    "shape": lambda: ((draw(5, 4, 64), draw(4, 2, 64), None, None, F._content), {}),
    "no frequencies": lambda: ((draw(5, 4, 64),), {}),
    "beyond 32 bits": lambda: ((draw(5, 4, 64), None, None, None, F._content), {"rotary_dim": 2**40}),
    "choice": lambda: ((draw(5, 4, 64), None, None, None, F._content), {"pairing": 7}),
    "number": lambda: ((draw(5, 4, 64), None, None, None, F._content), {"eps": -1.0, "norm": 1}),
    "q's dtype": lambda: ((draw(5, 4, 64).double(), None, None, None, F._content), {}),
    "8 bits": lambda: ((draw(5, 4, 64).to(torch.float8_e5m2fnuz), None, None, None, F._content), {}),
    "complex": lambda: ((draw(5, 4, 64).to(torch.complex64), None, None, None, F._content), {}),
    "bool": lambda: ((draw(5, 4, 64) > 0, None, None, None, F._content), {}),
    "positions' dtype": lambda: ((draw(5, 4, 64), None, torch.zeros(5), None, F._content), {}),
    "strides": lambda: ((draw(5, 4, 128)[..., ::2], None, None, None, F._content), {}),
    "overlap": lambda: ((draw(5, 1, 64).expand(5, 4, 64), None, None, None, F._content), {}),
    "dimensions": lambda: ((draw(*[1] * 66), None, None, None, F._content), {}),
    "scalar": lambda: ((torch.tensor(1.0), None, None, None, F._content), {}),
    "queue": lambda: ((draw(5, 4, 64), None, None, None, F._content), {"sycl_queue": 5}),
    "scale": lambda: ((draw(5, 4, 64), draw(5, 2, 64), None, None, F._content), {"k_scale": torch.tensor(0.5)}),
    "frequencies": lambda: ((draw(5, 4, 64), None, None, None, "x\0y é"), {}),
}


@pytest.mark.parametrize("name", BAD)
def test_the_operator_refuses_in_the_same_words(name):
    args, options = BAD[name]()
    defaults = {
        argument.name: argument.default_value for argument in torch.ops.ropewalk.rope_.default._schema.arguments
    }
    values = [*args, *({**defaults, **options}[x] for x in list(defaults)[len(args) :])]
    with pytest.raises(ValueError, match="rope: ") as want:
        _torch._run(*values)
    of = torch.ops.ropewalk
    operators = [of.rope_, of.rope_out, *((of.rope_short_, of.rope_short_out) if options.keys() <= {"pairing"} else ())]
    for operator in operators:
        before = [(x, x._version) for x in values if isinstance(x, torch.Tensor)]
        with pytest.raises(ValueError) as got:
            operator(*args, **options)
        assert str(got.value) == str(want.value) and type(got.value) is ValueError
        assert before == [(x, x._version) for x, _ in before]


@pytest.mark.skipif(not _torch.served_by_module, reason="by Python, whose conversion refuses them in torch's words")
def test_what_is_no_array_is_refused_by_name():
    sparse, quantized = draw(5, 4, 64).to_sparse(), torch.quantize_per_tensor(draw(5, 4, 64), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match="rope: k must be a strided tensor, but has another layout"):
        torch.ops.ropewalk.rope_(draw(5, 4, 64), sparse, frequencies=F._content)
    with pytest.raises(
        ValueError, match="rope: q must be float32, float16 or bfloat16, but is dtype of an unknown kind"
    ):
        torch.ops.ropewalk.rope_(quantized, frequencies=F._content)


def test_no_exception_is_counted_for_ever():
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime._ZSt18uncaught_exceptionv.restype = ctypes.c_bool
    for _ in range(3):
        with pytest.raises(ValueError, match="k has 4 tokens"):
            torch.ops.ropewalk.rope_(draw(5, 4, 64), draw(4, 2, 64), frequencies=F._content)
        assert not runtime._ZSt18uncaught_exceptionv()
        with pytest.raises(ValueError, match="inv_freq"):  # one that our own code throws and catches, if any
            ropewalk.Frequencies.from_array([float("nan")])


def test_the_operator_takes_inference_tensors():
    with torch.inference_mode():
        q, k = draw(5, 4, 64), draw(5, 2, 64)
    weight = draw(5, 4, 64)
    want = ropewalk.rope(weight, frequencies=F)[0]
    for mode in (True, False):
        with torch.inference_mode(mode):
            mine = weight.clone()
            torch.ops.ropewalk.rope_(q.copy_(weight) if mode else q, k, frequencies=F._content)
            torch.ops.ropewalk.rope_(mine, k, frequencies=F._content)
        assert torch.equal(mine, want)
    normal = weight.clone()
    torch.ops.ropewalk.rope_(normal, k, frequencies=F._content)  # one of each
    assert normal._version == 1


# Many times over: torch's own way with such views would release what it does not own.
LAZY = """
import torch, ropewalk
of, f = torch.ops.ropewalk, ropewalk.Frequencies(1e4, 64)
q, k, negated = torch.randn(5, 4, 64), torch.randn(5, 2, 64), torch._neg_view(torch.randn(5, 4, 64))
conjugated = torch.randn(5, 4, 64, dtype=torch.complex64).conj()
table = [x.contiguous() for x in f.table(16, torch.float32)]
calls = {
    "q is a lazily negated": lambda: of.rope_short_(negated, k, frequencies=f._content),
    "k is a lazily negated": lambda: of.rope_(q, negated, frequencies=f._content),
    "q_out is a lazily negated": lambda: of.rope_short_out(q, frequencies=f._content, q_out=negated),
    "k_cache is a lazily negated": lambda: of.rope_out(q, k, frequencies=f._content, k_cache=negated),
    "q is a lazily conjugated": lambda: of.rope_short_(conjugated, frequencies=f._content),
}
before = [x.clone() for x in (q, k, negated)]
for _ in range(200):
    for message, call in calls.items():
        try: call()
        except ValueError as error: assert message in str(error), error
        else: assert False, message
assert all(torch.equal(x, y) for x, y in zip((q, k, negated), before)) and q._version == k._version == 0
want = ropewalk.rope(q, cos=table[0], sin=table[1])[0]
for _ in range(200):  # what is only read is resolved
    mine, out = q.clone(), torch.empty_like(q)
    of.rope_short_(mine, cos=torch._neg_view(-table[0]), sin=table[1])
    of.rope_short_out(torch._neg_view(-q), cos=table[0], sin=table[1], q_out=out)
    assert torch.equal(mine, want) and torch.equal(out, want) and mine._version == out._version == 1
with torch.no_grad():
    class Turn(torch.nn.Module):
        def forward(self, q, k): return ropewalk.rope_(q, k, frequencies=f)
    exported = torch.export.export(Turn(), (q.clone(), k.clone())).module()
    try: exported(q, torch._neg_view(k))
    except ValueError as error: print(error)
print(len({torch.randn(5, 4, 64).data_ptr(), q.data_ptr(), k.data_ptr(), negated.data_ptr()}))
"""


@pytest.mark.parametrize("served", ["by the module", "by Python"])
def test_the_operators_refuse_to_write_lazy_views(served):
    hide = FALLBACK.partition("import ropewalk")[0] if served == "by Python" else ""
    done = subprocess.run(
        [sys.executable, "-c", hide + LAZY, "not served"], capture_output=True, text=True, timeout=120, check=False
    )
    want = "rope: k is a lazily negated view: call k.resolve_neg() first\n4\n"
    assert (done.returncode, done.stdout) == (0, want), done.stderr


def test_threads_at_once_make_frequencies_of_their_own():
    def trace(frame, event, arg):
        if frame.f_code.co_name == "__missing__":
            time.sleep(0.01)  # between its lines, where others may run
            return trace
        return None

    handles, got = _torch._Handles(), {}
    contents = [ropewalk.Frequencies(1e4, 2 * (i + 1))._content for i in range(8)]
    threads = [
        threading.Thread(target=lambda content=content: got.update({content: handles[content]})) for content in contents
    ]
    before = threading.gettrace()
    threading.settrace(trace)
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.settrace(before)
    for thread in threads:
        thread.join()
    rotary_dim = ropewalk._module.function("frequencies_rotary_dim")
    assert [rotary_dim(got[content]) for content in contents] == [2 * (i + 1) for i in range(8)]


RELOADED = """
import gc, importlib, torch, ropewalk
f = ropewalk.Frequencies(1e4, 64)
q = torch.randn(5, 4, 64)
want = ropewalk.rope(q, frequencies=f)[0]
for _ in range(2):
    mine = q.clone()
    torch.ops.ropewalk.rope_(mine, frequencies=f._content)
    print(torch.equal(mine, want))
    try: importlib.reload(ropewalk._torch)
    except RuntimeError: pass  # torch lets nobody define the operators twice
    gc.collect()
    others = [ropewalk.Frequencies(1e3 + i, 64) for i in range(50)]
"""


def test_frequencies_of_graphs_outlive_the_file_that_made_them():
    done = subprocess.run([sys.executable, "-c", RELOADED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr


def test_many_threads_with_frequencies_of_their_own():
    q = draw(64, 4, 64)
    wrong = []

    def caller(index):
        for i in range(40):
            theta = 1e4 + (index % 3) * 41 + i  # three at once have each
            f = ropewalk.Frequencies(theta, 64)
            want, content = ropewalk.rope(q, frequencies=f)[0], f._content
            for _ in range(3):
                mine = q.clone()
                torch.ops.ropewalk.rope_(mine, frequencies=content)
                if not torch.equal(mine, want):
                    wrong.append((index, theta))
            try:
                torch.ops.ropewalk.rope_(mine, mine[:1], frequencies=content)
            except ValueError as error:
                if "k has 1 tokens, but q has 64" not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_operator_keeps_nothing():
    def once():
        q, k, weight, positions = draw(2, 4, 64), draw(2, 2, 64), torch.ones(64), torch.arange(2)
        options = {"positions": positions, "frequencies": F._content, "q_weight": weight}
        torch.ops.ropewalk.rope_(q, k, **options, k_weight=weight, q_out=torch.empty_like(q))
        with pytest.raises(ValueError, match="k_weight is missing"):
            torch.ops.ropewalk.rope_(q, k, **options)
        with pytest.raises(ValueError, match="must be what a graph holds"):
            torch.ops.ropewalk.rope_(q, k, **{**options, "frequencies": "no content"})
        return [weakref.ref(x) for x in (q, k, weight, positions)]

    assert [ref() for ref in once()] == [None] * 4
    q, k = draw(1, 1, 64), draw(1, 1, 64)
    operator, content = torch.ops.ropewalk.rope_.default, F._content

    def memory():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(1000):
        operator(q, k, None, None, content)
    before = memory()
    for _ in range(100_000):  # of which each hands over two tensors, a box and a text
        operator(q, k, None, None, content)
    assert memory() - before < 4 << 20


@pytest.mark.parametrize("around", ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')",
                                    "torch.inference_mode().__enter__()"])  # fmt: skip
def test_the_module_serves_wherever_it_is_imported(around):
    code = f"import torch; {around}; import ropewalk as r; print(r._torch.served_by_module, r.counters())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{_torch.served_by_module} {{}}\n"), done.stderr


FALLBACK = """
import sys, torch, tvm_ffi
load = tvm_ffi.load_module
class Module:
    def __init__(self, *args): self.module = load(*args)
    def get_function(self, name):
        function = self.module.get_function(name)
        if name == "serve_torch" and sys.argv[1] == "not served": return lambda: False
        if name == "set_find_frequencies" and sys.argv[1] == "wrong": return lambda f: function(lambda content: 0)
        if name == "leave_torch": return lambda: (print("left"), function())[0]
        return function
tvm_ffi.load_module = Module
import ropewalk
from ropewalk import _face, _torch
f = ropewalk.Frequencies(1e4, 64)
q, k = torch.randn(5, 4, 64), torch.randn(5, 2, 64)
want = ropewalk.rope(q, k, frequencies=f)
torch.ops.ropewalk.rope_(q, k, frequencies=f._content)
assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and q._version == k._version == 1
for out in (torch.ops.ropewalk.rope_out, torch.ops.ropewalk.rope_short_out):
    new = torch.empty(5, 4, 64)
    out(q, frequencies=f._content, q_out=new)
    assert q._version == 1 and new._version == 1 and torch.equal(new, ropewalk.rope(q, frequencies=f)[0])
torch.ops.ropewalk.rope_short_(q, k, frequencies=f._content)
assert q._version == k._version == 2
try: torch.ops.ropewalk.rope_(q, k[:4], frequencies=f._content)
except ValueError as error: print(error)
print(_torch.served_by_module)
"""


@pytest.mark.parametrize("why", ["not served", "wrong"])
def test_python_serves_where_the_module_cannot(why):
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, why], capture_output=True, text=True, timeout=120, check=False
    )
    left = "left\n" if why == "wrong" and _torch.served_by_module else ""
    want = f"{left}rope: k has 4 tokens, but q has 5\nFalse\n"
    assert (done.returncode, done.stdout) == (0, want), done.stderr


@pytest.mark.parametrize("asked", ["directly", "by the module", "by Python"])
def test_a_call_asks_torch_and_tells_autograd(asked, monkeypatch):
    if asked != "directly":
        monkeypatch.setattr(_face, "direct", lambda *values: None)
    if asked == "by Python":  # where the module does not find in torch what it asks
        monkeypatch.setattr(_face, "launch", _torch._asked_here)
    q, k = draw(5, 4, 64), draw(5, 2, 64)
    want = ropewalk.rope(q, k, frequencies=F)
    ropewalk.rope_(q, k, frequencies=F)
    assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and q._version == k._version == 1
    ropewalk.rope_(q, frequencies=F, q_weight=torch.ones(64))
    assert (q._version, k._version) == (2, 1)
    with pytest.raises(ValueError, match="k has 4 tokens"):
        ropewalk.rope_(q, k[:4], frequencies=F)
    with pytest.raises(ValueError, match="k is a lazily negated view"):
        ropewalk.rope_(q, torch._neg_view(k), frequencies=F)
    leaf = draw(5, 4, 64).requires_grad_()
    with pytest.raises(ValueError, match="q requires grad and is a leaf"):
        ropewalk.rope_(leaf, k, frequencies=F)
    assert (q._version, k._version, leaf._version) == (2, 1, 0)
    with torch.no_grad():
        ropewalk.rope_(leaf, k, frequencies=F)
    assert (leaf._version, k._version) == (1, 2)
    x = draw(5, 4, 64).requires_grad_()
    turned = x * 1
    ropewalk.rope_(turned, frequencies=F)  # autograd goes through it
    (turned**2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        inference = draw(5, 4, 64)
    ropewalk.rope_(inference, frequencies=F)
    assert torch.equal(inference, ropewalk.rope(draw(5, 4, 64), frequencies=F)[0])


# bindings/python/direct.h, which serves plain tensors without tvm-ffi between

has_direct = pytest.mark.skipif(
    not _torch.served_by_module or "t" in sys.abiflags, reason="there is no direct call here"
)


@has_direct
def test_there_is_no_direct_call_where_the_description_is_another():
    assert _torch.direct((None,), (None,)) is None


def by_place(**given):
    keywords = inspect.signature(ropewalk.rope_).parameters
    defaults = {name: None if of.default is of.empty else of.default for name, of in keywords.items()}
    assert given.keys() <= defaults.keys()
    return list((defaults | given).values())


def whole_call():
    """With every argument but the few that exclude others."""
    q, k, v = (draw(5, n, 64, seed=n) for n in (4, 2, 1))
    v = draw(5, 2, 32)
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))
    return {
        "q": q, "k": k, "positions": torch.arange(5), "offsets": torch.arange(5, dtype=torch.int32), "frequencies": F,
        "pairing": "interleaved", "rotary_dim": 64, "rotary_offset": 0, "inverse": True, "norm": "rms",
        "q_weight": weight, "k_weight": weight, "zero_centered_weight": True, "eps": 1e-5, "rounding": "reference",
        "q_out": torch.empty(5, 4, 64), "k_out": torch.empty(5, 2, 64), "v": v,
        "k_cache": torch.zeros(8, 2, 64).to(torch.float8_e5m2), "v_cache": torch.zeros(8, 2, 32).to(torch.float8_e5m2),
        "slots": torch.tensor([3, 0, -1, 7, 5]), "k_scale": 0.5, "v_scale": torch.tensor([0.5, 2.0]),
        "disable_pdl": True,
    }  # fmt: skip


@has_direct
@torch.no_grad()
@pytest.mark.parametrize("without", ["", "k_out", "q_out", "k_scale", "table", "norm"])
def test_a_direct_call_is_the_call(without, monkeypatch):
    given = {name: value for name, value in whole_call().items() if name != without}
    if without == "table":
        del given["frequencies"]
        given["cos"], given["sin"] = F.table(16, torch.float32)
    if without == "norm":
        given = {name: given[name] for name in ("q", "k", "positions", "frequencies")}
    if without == "k_out":
        given["k_store_only"] = True
    own = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    versions = {name: x._version for name, x in own.items() if isinstance(x, torch.Tensor)}
    got = _face.direct(*by_place(**own))
    monkeypatch.setattr(_face, "direct", lambda *values: None)
    want = ropewalk.rope_(**given)
    assert got[0] is own["q_out" if "q_out" in own else "q"]
    assert got[1] is None if without == "k_out" else got[1] is own["k_out" if "k_out" in own else "k"]
    for x, y in zip(got, want, strict=True):
        assert x is y is None or torch.equal(x, y)
    written = {"q_out" if "q_out" in own else "q", "k_cache", "v_cache"}
    written |= set() if without == "k_out" else {"k_out" if "k_out" in own else "k"}
    for name, version in versions.items():
        assert own[name]._version == version + (name in written), name
        assert torch.equal(own[name].view(torch.uint8), given[name].view(torch.uint8)), name


class Like(torch.Tensor):
    pass


class Text(str):
    __slots__ = ()


NOT_DIRECT = {
    "none": lambda: {"q": None},
    "numpy": lambda: {"q": draw(5, 4, 64).numpy()},
    "subclass": lambda: {"q": draw(5, 4, 64).as_subclass(Like)},
    "k of a subclass": lambda: {"k": draw(5, 2, 64).as_subclass(Like)},
    "positions of a subclass": lambda: {"positions": torch.arange(5).as_subclass(Like)},
    "negated": lambda: {"q": torch._neg_view(draw(5, 4, 64))},
    "negated weight": lambda: {"q_weight": torch._neg_view(draw(64))},
    "wants a gradient": lambda: {"q": draw(5, 4, 64).requires_grad_()},
    "weight wants a gradient": lambda: {"q_weight": draw(64).requires_grad_()},
    "scale wants a gradient": lambda: {"k_scale": torch.tensor(1.0).requires_grad_()},
    "sparse": lambda: {"q": torch.eye(4).to_sparse()},
    "meta": lambda: {"q": torch.empty(5, 4, 64, device="meta")},
    "shape": lambda: {"k": draw(4, 2, 64)},
    "frequencies": lambda: {"frequencies": F._handle},
    "choice": lambda: {"pairing": "gptj"},
    "choice of a list": lambda: {"pairing": []},
    "choice of a text's kind": lambda: {"pairing": Text("neox")},
    "no pairing": lambda: {"pairing": None},
    "no rounding": lambda: {"rounding": None},
    "nested": lambda: {"q": torch.nested.nested_tensor([torch.ones(4, 64), torch.ones(2, 64)])},
    "nested weight": lambda: {"q_weight": torch.nested.nested_tensor([torch.ones(4), torch.ones(2)])},
    "a weight's text": lambda: {"q_weight": "rms"},
    "flag": lambda: {"inverse": 1},
    "big": lambda: {"rotary_dim": 2**70},
    "beyond 32 bits": lambda: {"rotary_dim": 2**40},
    "float": lambda: {"rotary_dim": 64.0},
    "eps": lambda: {"eps": "1"},
    "queue": lambda: {"sycl_queue": 5},
    "too few": lambda: None,
}


@has_direct
@pytest.mark.parametrize("name", NOT_DIRECT)
def test_what_is_not_plain_is_left_to_others(name):
    given = {"q": draw(5, 4, 64), "k": draw(5, 2, 64), "frequencies": F}
    changed = NOT_DIRECT[name]()
    values = by_place(**{**given, **changed}) if changed is not None else [given["q"]]
    counted = ropewalk.counters()
    assert _face.direct(*values) is None and ropewalk.counters() == counted
    assert [given[x]._version for x in "qk"] == [0, 0]
    assert _face.direct(*by_place(**given))[0] is given["q"]  # no error was left behind


def gradient_call(kind, out):
    """Of the gradient: (its own arguments, the call's)."""
    q, k = (draw(5, n, 64, seed=n) for n in (4, 2))
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))
    own = {"q_grad": draw(5, 4, 64, seed=7), "k_grad": draw(5, 2, 64, seed=8)}
    if out:
        own |= {"q_grad_out": torch.zeros(5, 4, 64), "k_grad_out": torch.zeros(5, 2, 64)}
    options = {"frequencies": F, "positions": torch.arange(5), "pairing": "interleaved", "inverse": True}
    if kind != "rotation":
        options |= {"q": q, "k": k, "q_weight": weight, "k_weight": weight, "eps": 1e-5, "rounding": "reference"}
        own["q_weight_grad"] = torch.zeros(64)
    if kind == "table":
        del options["frequencies"]
        options["cos"], options["sin"] = F.table(16, torch.float32)
        own["k_weight_grad"] = torch.zeros(64)
    if kind == "one head alone":
        own = {name: x for name, x in own.items() if not name.startswith("k")}
        options = {name: x for name, x in options.items() if not name.startswith("k")}
    return own, options


@has_direct
@torch.no_grad()
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("kind", ["rotation", "norm", "table", "one head alone"])
def test_a_direct_gradient_is_the_gradient(kind, out, monkeypatch):
    own, options = gradient_call(kind, out)
    copies = {name: x.clone() for name, x in own.items()}
    served = []
    direct = _face.direct_backward

    def counts(*values):
        served.append(direct(*values))
        return served[-1]

    monkeypatch.setattr(_face, "direct_backward", counts)
    got = ropewalk.rope_backward(**own, **options)
    assert served[-1] is True and len(served) == (
        1 if kind == "rotation" else 2
    )  # with a norm, asked for its workspace
    monkeypatch.setattr(_face, "direct_backward", lambda *values: None)
    want = ropewalk.rope_backward(**copies, **options)
    for name, x in own.items():
        assert torch.equal(x, copies[name]), name
        assert x._version == copies[name]._version, name
    assert got[0] is own["q_grad_out" if out else "q_grad"] and want[0] is copies["q_grad_out" if out else "q_grad"]
    assert got[1] is own.get("k_grad_out" if out else "k_grad")


@has_direct
def test_a_gradient_that_is_not_plain_is_left_to_others():
    own, options = gradient_call("norm", False)
    values = [*(own.get(name) for name in ropewalk._backward._OWN), options["q"], options["k"], *_face.DEFAULTS[2:]]
    for name, value in options.items():
        values[ropewalk._backward._PLACES[name]] = value
    own["q_weight_grad"].fill_(3.0)
    before = {name: x.clone() for name, x in own.items()}
    places = {"q_grad": 0, **ropewalk._backward._PLACES}
    changes = {"q_grad": draw(5, 4, 64).requires_grad_(), "q": torch._neg_view(draw(5, 4, 64)), "k": draw(4, 2, 64),
               "q_weight": draw(64).requires_grad_(), "positions": torch.arange(5).as_subclass(Like), "eps": "1",
               "k_cache": torch.zeros(8, 2, 64), "k_store_only": True, "pairing": "gptj"}  # fmt: skip
    with torch.no_grad():
        plain = {"q_grad", "q_weight"}  # only autograd would mind
        for name, value in changes.items():
            changed = [*values]
            changed[places[name]] = value
            assert name in plain or _face.direct_backward(*changed) is None, name
    for name in plain:
        changed = [*values]
        changed[places[name]] = changes[name]
        assert _face.direct_backward(*changed) is None, name
    assert _face.direct_backward(*values[:-1]) is None and _face.direct_backward() is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert _face.direct_backward(*values) is None
    for name, x in own.items():
        assert torch.equal(x, before[name]) and x._version == (name == "q_weight_grad"), name


@has_direct
def test_who_watches_sees_the_call():
    given = by_place(q=draw(5, 4, 64), frequencies=F)
    assert _face.direct(*given) is not None
    with torch.autograd.forward_ad.dual_level():
        assert _face.direct(*given) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert _face.direct(*given) is None
    with torch.overrides.TorchFunctionMode():
        assert _face.direct(*given) is None
    seen = []

    def inside(q):
        seen.append(_face.direct(*by_place(q=q, frequencies=F)))
        return q

    torch.func.vmap(inside)(draw(2, 5, 4, 64))
    torch.jit.trace(inside, draw(5, 4, 64), check_trace=False)
    assert seen == [None, None] and given[0]._version == 1


@has_direct
def test_a_direct_call_keeps_nothing():
    given = by_place(**whole_call())
    refused = by_place(**{**whole_call(), "k": draw(4, 2, 64)})
    with torch.no_grad():
        counts = [sys.getrefcount(x) for x in (*given, *refused)]
        for _ in range(1000):
            assert _face.direct(*given) is not None and _face.direct(*refused) is None
        kept = [sys.getrefcount(x) - count for x, count in zip((*given, *refused), counts, strict=True)]
    assert max(map(abs, kept)) < 100, kept
