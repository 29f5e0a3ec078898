"""torch's watchers see `rope_` and `rope`: version counters, torch.jit.trace, modes, subclasses, torch.func; and what
graphs hold."""

# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import numpy as np
import pytest
import ropewalk
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

F = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
COS, SIN = F.table(16, torch.float32)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def store():
    """Arguments of a call that writes all that a call can write."""
    return {"q": draw(4, 2, 64), "k": draw(4, 1, 64, seed=1), "q_out": draw(4, 2, 64), "k_out": draw(4, 1, 64),
            "v": draw(4, 1, 32), "k_cache": torch.zeros(8, 1, 64), "v_cache": torch.zeros(8, 1, 32),
            "slots": torch.arange(4)}  # fmt: skip


def by_operator(q, k=None, **options):
    """The call as a graph makes it."""
    with BaseTorchFunctionMode():
        return ropewalk.rope_(q, k, **options)


CALLS = [ropewalk.rope_, by_operator]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# ---- what is written has another version


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("written", ["q", "k", "q_out", "k_out", "k_cache", "v_cache"])
def test_autograd_notices_what_is_written(call, written):
    arguments = store()
    if not written.endswith("_out"):
        del arguments["q_out"], arguments["k_out"]
    saved = arguments[written]
    w = torch.ones_like(saved, requires_grad=True)
    loss = (w * saved).sum()
    call(**arguments, frequencies=F)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("call", CALLS)
def test_what_is_read_keeps_its_version(call):
    arguments = store()
    call(**arguments, cos=COS, sin=SIN, positions=(positions := torch.arange(4)))
    for tensor in (arguments["q"], arguments["k"], arguments["v"], arguments["slots"], COS, SIN, positions):
        assert tensor._version == 0
    for name in ("q_out", "k_out", "k_cache", "v_cache"):
        assert arguments[name]._version == 1
    arguments.update(k=torch.zeros(5, 1, 64))
    with pytest.raises(ValueError, match="k has 5 tokens"):
        call(**arguments, frequencies=F)
    assert arguments["q_out"]._version == arguments["k_cache"]._version == 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_of_it_and_parameters_without_gradients(call, mode):
    row, leaf = draw(4, 6, 64), torch.nn.Parameter(draw(4, 2, 64))
    view = row[:, :2]
    with mode():
        call(row[:, 3:5], None, frequencies=F)
        call(leaf, None, frequencies=F)
    assert view._version == row._version == leaf._version == 1


@pytest.mark.parametrize("call", CALLS)
def test_tensors_of_inference_mode(call):
    """They have no version; autograd keeps none of them."""
    with torch.inference_mode():
        arguments = store()
        call(**arguments, frequencies=F)
        want = arguments["q_out"].clone()
    plain = draw(4, 1, 64, seed=1)
    arguments.update(q_out=torch.zeros(4, 2, 64), k=plain, k_out=None)
    for inside in (True, False):
        with torch.inference_mode(inside), torch.no_grad():
            call(**arguments, frequencies=F)  # tensors of both kinds
        assert torch.equal(arguments["q_out"], want) and plain._version > 0
        assert torch.equal(arguments["k_cache"][:4], plain)
        plain = arguments["k"] = draw(4, 1, 64, seed=1)


def test_numpy_beside_torch():
    q, k = draw(4, 2, 64), draw(4, 1, 64)
    ropewalk.rope_(q, k.numpy(), positions=np.arange(4), frequencies=F)
    assert q._version == 1
    assert torch.equal(q, ropewalk.rope(draw(4, 2, 64), frequencies=F)[0])


# ---- torch.jit.trace


class Traced(torch.nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, q, k, positions):
        if not self.inplace:
            return ropewalk.rope(q, k, positions=positions, frequencies=F, norm="rms", eps=1e-3)
        q, k = q * 2, k + 1
        ropewalk.rope_(q, k, positions=positions, frequencies=F, pairing="interleaved", rounding="reference")
        return q, k


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
def test_traced_by_jit(inplace, tmp_path):
    inputs = draw(5, 4, 64), draw(5, 2, 64, seed=1), torch.arange(5)
    others = draw(7, 4, 64, seed=2), draw(7, 2, 64, seed=3), torch.arange(7) + 99
    model = Traced(inplace)
    traced = torch.jit.trace(model, inputs)
    for x in (inputs, others):
        for got, want in zip(traced(*x), model(*x), strict=True):
            assert torch.equal(got, want)
    traced.save(str(tmp_path / "traced.pt"))
    torch.save((others, model(*others)), tmp_path / "want.pt")
    in_another_process(
        tmp_path,
        "others, want = torch.load('want.pt')\n"
        "for got, x in zip(torch.jit.load('traced.pt')(*others), want, strict=True):\n"
        "    assert torch.equal(got, x)\n",
    )


def in_another_process(folder, code):
    """Where other Frequencies were made first, so that no number of this process is that of the same ones there."""
    before = "import torch, ropewalk\nothers = [ropewalk.Frequencies(float(i + 3), 64) for i in range(9)]\n"
    result = subprocess.run(
        [sys.executable, "-c", before + code], capture_output=True, text=True, cwd=folder, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# ---- modes and subclasses


@torch.no_grad()
@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_the_operator(function, mode):
    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    want = ropewalk.rope(q, k, frequencies=F)
    with mode() as seen:
        got = function(q, k, frequencies=F)
    name = "ropewalk.rope_short_" if function is ropewalk.rope_ else "ropewalk.rope_short_out"
    assert any(name in x for x in seen.names)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@torch.no_grad()
def test_a_default_device_leaves_scales_on_the_host():
    arguments = {**store(), "k_cache": torch.zeros(8, 1, 64).to(torch.float8_e4m3fn), "k_scale": 0.5,
                 "v_cache": torch.zeros(8, 1, 32).to(torch.float8_e4m3fn), "v_scale": 2.0}  # fmt: skip
    with torch.device("meta"):
        ropewalk.rope_(**arguments, frequencies=F)
    assert arguments["k_cache"].float().abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
def test_fake_tensors(function):
    with FakeTensorMode():
        q, k = function(torch.randn(6, 2, 64), torch.randn(6, 1, 64), positions=torch.arange(6), frequencies=F)
        assert q.shape == (6, 2, 64) and k.shape == (6, 1, 64) and type(q) is not torch.Tensor


@torch.no_grad()
def test_make_fx():
    def step(q, k):
        q = q * 2
        ropewalk.rope_(q, k, frequencies=F)
        return q + ropewalk.rope(q, positions=torch.arange(5), frequencies=F)[0]

    q, k = draw(5, 4, 64), draw(5, 2, 64, seed=1)
    graph = make_fx(step)(q.clone(), k.clone())
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "ropewalk.rope_short_.default" in targets and "ropewalk.rope_short_out.default" in targets
    k_graph, k_eager = k.clone(), k.clone()
    assert torch.equal(graph(q, k_graph), step(q, k_eager)) and torch.equal(k_graph, k_eager)


class Counting(torch.Tensor):
    """A subclass with data of its own that sees operators."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A subclass round a tensor, whose own memory nobody must write."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def inner(x):
            return x.inner if isinstance(x, Wrapped) else x

        out = function(*map(inner, args), **{name: inner(x) for name, x in (kwargs or {}).items()})
        return Wrapped(out) if isinstance(out, torch.Tensor) else out


@torch.no_grad()
@pytest.mark.parametrize("which", ["q", "k", "positions", "cos", "q_weight", "k_cache", "slots", "q_out"])
@pytest.mark.parametrize("subclass", [lambda x: x.as_subclass(Counting), Wrapped])
def test_subclasses(which, subclass):
    def arguments():
        weights = {"q_weight": draw(64), "k_weight": draw(64, seed=1)}
        out = {**store(), **weights, "positions": torch.arange(4) + 5, "cos": COS, "sin": SIN}
        return {name: x.clone() for name, x in out.items()}

    want, got = arguments(), arguments()
    ropewalk.rope_(**want)
    Counting.seen.clear()
    got[which] = subclass(got[which])
    kind = type(got[which])
    ropewalk.rope_(**got)
    if kind is Counting:
        assert any("rope_out" in name for name in Counting.seen)
    for name in ("q_out", "k_out", "k_cache", "v_cache"):
        assert torch.equal(got[name].inner if isinstance(got[name], Wrapped) else got[name], want[name])


@torch.no_grad()
@pytest.mark.parametrize(
    ("names", "reads_alone"),
    [
        ("q k q_out k_out", True),
        ("q k q_out", False),  # k is written in place: a graph that takes it for read would use it before or after
        ("q k k_out", False),
        ("q q_out", True),
        ("q k q_out k_cache slots k_store_only", True),
        ("q k k_cache slots k_store_only", False),
        ("q k", False),
    ],
)
def test_an_operator_is_said_to_write_what_it_writes(names, reads_alone):
    given = {**store(), "k_store_only": True}
    given = {name: given[name] for name in names.split()}
    with Seen() as seen:
        ropewalk.rope_(**given, frequencies=F)
    short = "short_" if names in ("q k q_out k_out", "q q_out", "q k") else ""
    assert seen.names == [f"ropewalk.rope_{short}{'out' if reads_alone else ''}.default"]


# ---- torch.func and dual numbers


@torch.no_grad()
@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (2, 1)])
def test_vmap(dims):
    q, positions = draw(3, 5, 4, 64), torch.arange(15).reshape(3, 5)
    want = torch.stack([ropewalk.rope(q[i], positions=positions[i], frequencies=F)[0] for i in range(3)])

    def out_of_place(q, positions):
        return ropewalk.rope(q, positions=positions, frequencies=F)[0]

    def in_place(q, positions):
        ropewalk.rope_(q, positions=positions, frequencies=F)
        return q

    for function in (out_of_place, in_place):
        x = q.movedim(0, dims[0]).clone()
        got = torch.vmap(function, in_dims=dims)(x, positions.movedim(0, dims[1]))
        assert torch.equal(got, want)
    assert torch.equal(x.movedim(dims[0], 0), want)  # in place
    nested = torch.vmap(torch.vmap(out_of_place, in_dims=(0, None)), in_dims=(0, 0))
    twice = torch.stack([q, q + 1], 1)
    got = nested(twice, positions)
    assert torch.equal(got[:, 0], want)


@torch.no_grad()
def test_vmap_refuses_one_tensor_for_all():
    q, k = draw(3, 5, 4, 64), draw(5, 2, 64)
    with pytest.raises(ValueError, match="k would be written by each of the 3 calls of vmap, but is one for all"):
        torch.vmap(lambda q: ropewalk.rope_(q, k, frequencies=F)[0])(q)
    with pytest.raises(ValueError, match="k_out would be written by each of the 3 calls of vmap"):
        torch.vmap(lambda q: ropewalk.rope(q, k, frequencies=F)[0])(q)
    assert torch.equal(k, draw(5, 2, 64)) and torch.equal(q, draw(3, 5, 4, 64))


@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vjp])
def test_transforms_with_a_gradient(function, transform):
    q = draw(5, 4, 64)
    scale = torch.arange(64.0)

    def loss(q):
        q = q * 1
        return (function(q, None, frequencies=F)[0] ** 2 * scale).sum()

    def stock(q):
        x, y = q.double().chunk(2, -1)
        c, s = (table.double()[:5, None] for table in (COS, SIN))
        return (torch.cat((x * c - y * s, y * c + x * s), -1) ** 2 * scale).sum()

    want = torch.func.grad(stock)(q)
    got = transform(loss)(q) if transform is not torch.func.vjp else transform(loss, q)[1](torch.ones(()))[0]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(q, draw(5, 4, 64))


@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
@pytest.mark.parametrize("tangent", ["q", "k", "cos", "v", "q_weight"])
@pytest.mark.parametrize("func", [False, True])
def test_tangents_are_refused(function, tangent, func):
    def arguments():
        weights = {"q_weight": draw(64), "k_weight": draw(64, seed=1)}
        out = {**store(), **weights, "cos": COS.clone(), "sin": SIN}
        del out["q_out"], out["k_out"]
        return out

    values, x = arguments(), arguments()[tangent]
    with pytest.raises(ValueError, match=f"rope: {tangent} has a tangent"):
        if func:
            torch.func.jvp(lambda x: function(**{**values, tangent: x})[0], (x,), (x,))
        else:
            with forward_ad.dual_level():
                function(**{**values, tangent: forward_ad.make_dual(x, torch.ones_like(x))})
    assert torch.equal(values["q"], arguments()["q"]) and not values["k_cache"].any()
    with forward_ad.dual_level():  # nothing to lose here
        function(**values)


@torch.no_grad()
@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
def test_functionalize(function):
    q = draw(5, 4, 64)
    with pytest.raises(ValueError, match="rope: .* torch.func.functionalize"):
        torch.func.functionalize(lambda q: function(q, None, frequencies=F)[0] + 1)(q)
    assert torch.equal(q, draw(5, 4, 64))


# ---- what graphs hold


class Model(torch.nn.Module):
    def __init__(self, frequencies, options):
        super().__init__()
        self.frequencies, self.options = frequencies, options

    def forward(self, q, positions):
        return ropewalk.rope(q, positions=positions, frequencies=self.frequencies, **self.options)[0]


def kinds():
    """Frequencies of every make."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 5e5}
    return {
        "theta": ropewalk.Frequencies(1e6, 64),
        "yarn": ropewalk.Frequencies(1e4, 64, scaling=yarn),
        "config": ropewalk.Frequencies.from_config({**config, "rope_scaling": yarn}),
        "array": ropewalk.Frequencies.from_array([3.0 / (i + 1) for i in range(32)], 1.5),
        "axes": ropewalk.Frequencies.from_array([1.0 / (i + 1) for i in range(32)], axes=[i % 2 for i in range(32)]),
    }


@pytest.mark.parametrize("name", kinds())
def test_content_gives_the_same_bits(name):
    f = kinds()[name]
    again = ropewalk.Frequencies._of_content(f._content)
    assert again._content == f._content and again.rotary_dim == f.rotary_dim
    assert again.attention_scaling == f.attention_scaling
    q, positions = draw(6, 2, 64), torch.tensor([0, 1, 77, 2**40 + 3, -5, 2**62])
    positions = torch.stack([positions, positions.flip(0)]) if f.axes is not None else positions
    want = ropewalk.rope(q, positions=positions, frequencies=f)[0]
    assert torch.equal(ropewalk.rope(q, positions=positions, frequencies=again)[0], want)
    np.testing.assert_allclose(again.inv_freq, f.inv_freq, rtol=1e-14, atol=1e-18)  # 2^-64 of a turn


def test_content_is_that_of_equal_frequencies_only():
    contents = [f._content for f in kinds().values()]
    assert contents == [f._content for f in kinds().values()] and len(set(contents)) == len(contents)
    config = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e6}
    assert ropewalk.Frequencies.from_config(config)._content == ropewalk.Frequencies(1e6, 64)._content


@pytest.mark.parametrize("content", ["x", "0x1p+0", "0x1p+0 AAAA", "nan AAAAAAAAAAA=", "0x1p+0 AAAAAAAAAAA= AAAA", "7"])
def test_no_content_is_refused(content):
    with pytest.raises(ValueError, match="rope: frequencies must be what a graph holds of ropewalk.Frequencies"):
        torch.ops.ropewalk.rope_(draw(2, 1, 64), frequencies=content)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", kinds())
def test_exported_program_in_another_process(name, strict, tmp_path):
    f = kinds()[name]
    q, positions = draw(5, 2, 64), torch.arange(5) + 1000
    positions = torch.stack([positions, positions.flip(0)]) if f.axes is not None else positions
    model = Model(f, {"pairing": "interleaved"})
    program = torch.export.export(model, (q, positions), strict=strict)
    torch.export.save(program, tmp_path / "x.pt2")
    torch.save((q, positions, model(q, positions)), tmp_path / "want.pt")
    in_another_process(
        tmp_path,
        "q, positions, want = torch.load('want.pt')\n"
        "assert torch.equal(torch.export.load('x.pt2').module()(q, positions), want)\n",
    )


@torch.no_grad()
def test_pickled_graph_module_in_another_process(tmp_path):
    q, positions = draw(5, 2, 64), torch.arange(5) + 1000
    model = Model(ropewalk.Frequencies(1e6, 64), {})
    graph = make_fx(model)(q, positions)
    torch.save(graph, tmp_path / "graph.pt")
    torch.save((q, positions, model(q, positions)), tmp_path / "want.pt")
    in_another_process(
        tmp_path,
        "import torch._dynamo\n"  # without it torch 2.15 loads no such graph
        "q, positions, want = torch.load('want.pt')\n"
        "assert torch.equal(torch.load('graph.pt', weights_only=False)(q, positions), want)\n",
    )


@torch.no_grad()
def test_aot_inductor_package_in_another_process(tmp_path):
    q, positions = draw(5, 2, 64), torch.arange(5) + 1000
    model = Model(ropewalk.Frequencies(1e6, 64), {})
    program = torch.export.export(model, (q, positions))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "x.pt2"))
    torch.save((q, positions, model(q, positions)), tmp_path / "want.pt")
    in_another_process(
        tmp_path,
        "q, positions, want = torch.load('want.pt')\n"
        "got = torch._inductor.aoti_load_package('x.pt2')(q, positions)\n"
        "assert torch.equal(got, want)\n",
    )


@torch.no_grad()
@pytest.mark.parametrize("name", kinds())
def test_equal_blocks_are_one_graph(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    q, positions = draw(5, 2, 64), torch.arange(5)
    for _ in range(12):
        block = Model(kinds()[name], {})
        x = positions.expand(2, 5) if block.frequencies.axes is not None else positions
        got = torch.compile(block, fullgraph=True, backend=counter)(q, x)
        assert torch.equal(got, block(q, x))
    assert counter.frame_count == 1
    other = Model(ropewalk.Frequencies(7.0, 64), {})
    assert torch.equal(torch.compile(other, fullgraph=True, backend=counter)(q, positions), other(q, positions))
    torch._dynamo.reset()


# ---- "meta" among tensors with data

META = ["q", "k", "positions", "offsets", "cos", "sin", "q_weight", "k_weight", "q_out", "k_out", "v", "k_cache",
        "v_cache", "slots"]  # fmt: skip


def with_meta(name):
    weights = {"q_weight": draw(64), "k_weight": draw(64, seed=1)}
    out = {**store(), **weights, "positions": torch.arange(4), "offsets": torch.arange(4), "cos": COS, "sin": SIN}
    if name not in out:  # another kind of call
        out = {**{key: out[key] for key in ("q", "k", "positions")}, "cos_sin": torch.cat([COS, SIN], -1)}
    if name == "axes":
        out.update(axes=torch.zeros(32, dtype=torch.int32), positions=torch.zeros(2, 4, dtype=torch.int64))
    if name in ("k_scale", "v_scale"):
        out = {**store(), "frequencies": F, "k_scale": torch.ones(1), "v_scale": torch.ones(1)}
        out.update({key: out[key].to(torch.float8_e4m3fn) for key in ("k_cache", "v_cache")})
    return {**out, name: out[name].to("meta")}


@torch.no_grad()
@pytest.mark.parametrize("name", [*META, "cos_sin", "axes", "k_scale", "v_scale"])
@pytest.mark.parametrize("how", ["eager", "operator", "compiled"])
def test_meta_among_others_is_refused(name, how):
    torch._dynamo.reset()
    arguments = with_meta(name)
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    call = {"eager": ropewalk.rope_, "operator": by_operator,
            "compiled": torch.compile(ropewalk.rope_, fullgraph=True, backend="aot_eager")}[how]  # fmt: skip
    error = ValueError if how != "compiled" else Exception
    with pytest.raises(error, match=f"rope: {name} must hold data, but is on the meta device"):
        call(**arguments)
    for key, x in before.items():
        assert x.device.type == "meta" or torch.equal(arguments[key].float(), x.float())
    torch._dynamo.reset()


@torch.no_grad()
def test_moved_to_meta_after_compiling():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cos", COS.clone())
            self.register_buffer("sin", SIN.clone())

        def forward(self, q):
            return ropewalk.rope(q, cos=self.cos, sin=self.sin)[0]

    torch._dynamo.reset()
    block, q = Block(), draw(5, 4, 64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), block(q))
    block.to("meta")
    with pytest.raises(Exception, match="rope: cos must hold data, but is on the meta device"):
        compiled(q)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# vmap hides what is asked of the tensors in it


def chain(x):
    cos, sin = (torch.cat([t[: x.shape[0]]] * 2, -1)[:, None] for t in (COS, SIN))
    return x * cos + torch.cat([-x[..., 32:], x[..., :32]], -1) * sin


def in_place(x):
    x = x * 1
    ropewalk.rope_(x, None, frequencies=F)
    return x


UNDER_VMAP = {"rope": lambda x: ropewalk.rope(x, None, frequencies=F)[0], "rope_": in_place}


@pytest.mark.parametrize("name", UNDER_VMAP)
def test_grad_of_vmap(name):
    q, weight = draw(2, 6, 2, 64), draw(6, 2, 64, seed=1)
    orders = [
        lambda f: torch.func.grad(lambda z: (torch.vmap(f)(z) * weight).pow(2).sum())(q),
        lambda f: torch.vmap(torch.func.grad(lambda z: (f(z) * weight).pow(2).sum()))(q),
        lambda f: torch.func.jacrev(lambda z: (torch.vmap(f)(z) * weight).pow(2).sum())(q),
    ]
    for order in orders:
        torch.testing.assert_close(order(UNDER_VMAP[name]), order(chain), rtol=1e-4, atol=1e-4)
    given, z = (q.clone().requires_grad_() for _ in range(2))
    (given + torch.vmap(UNDER_VMAP[name])(given)).pow(2).sum().backward()
    (z + torch.vmap(chain)(z)).pow(2).sum().backward()
    torch.testing.assert_close(given.grad, z.grad, rtol=1e-4, atol=1e-4)


def test_backward_of_a_compiled_vmap():
    z, other = (draw(2, 6, 2, 64).requires_grad_() for _ in range(2))
    torch.compile(lambda x: torch.vmap(UNDER_VMAP["rope"])(x) * 2, backend="aot_eager")(z).pow(2).sum().backward()
    (torch.vmap(chain)(other) * 2).pow(2).sum().backward()
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_tangents_in_vmap_are_refused():
    x = draw(2, 6, 2, 64)
    with pytest.raises(ValueError, match="q has a tangent"):
        torch.func.jvp(torch.vmap(UNDER_VMAP["rope"]), (x,), (x,))
    with pytest.raises(ValueError, match="functionalize"):
        torch.func.functionalize(torch.vmap(UNDER_VMAP["rope"]))(x)


# ---------------------------------------------------------------------------------------------------------------------
# rope_backward


def gradient_of(x):
    return ropewalk.rope_backward(x.clone(), None, frequencies=F)[0]


def test_watchers_see_rope_backward():
    x, y = draw(6, 2, 64), draw(6, 2, 64, seed=1)
    with Seen() as seen:
        gradient_of(x)
    assert "ropewalk.rope_backward.default" in seen.names
    want = gradient_of(y)
    graphs = [torch.jit.trace(gradient_of, (x,), check_trace=False)]
    graphs += [make_fx(gradient_of, tracing_mode=mode)(x) for mode in ("real", "fake")]
    graphs.append(torch.compile(gradient_of, backend="aot_eager", fullgraph=True))
    for graph in graphs:
        assert torch.equal(graph(y), want)
    both = torch.stack([x, y])
    assert torch.equal(torch.vmap(gradient_of)(both)[1], want)


def test_watched_rope_backward_with_a_norm():
    def call(grad, q, weight, sums):
        ropewalk.rope_backward(grad, q=q, norm="rms", q_weight=weight, q_weight_grad=sums, frequencies=F)
        return grad, sums

    values = draw(6, 2, 64), draw(6, 2, 64, seed=1), draw(64, seed=2)
    want = call(values[0].clone(), *values[1:], torch.zeros(64))
    with Seen():
        new = call(values[0].clone(), *values[1:], torch.zeros(64))
        with pytest.raises(ValueError, match=r"q_weight_grad must be \[64\] float32"):
            call(values[0].clone(), *values[1:], torch.zeros(1))
        with pytest.raises(ValueError, match="q_out is given, but has no gradient"):
            ropewalk.rope_backward(values[0].clone(), frequencies=F, q_out=draw(6, 2, 64))
        with pytest.raises(ValueError, match="q_grad requires grad"):
            ropewalk.rope_backward(draw(6, 2, 64).requires_grad_(), frequencies=F)
    assert all(torch.equal(a, b) for a, b in zip(new, want, strict=True))
    with pytest.raises(ValueError, match="q_grad would be written by each"):
        one = draw(6, 2, 64)
        torch.vmap(lambda p: ropewalk.rope_backward(one, positions=p, frequencies=F)[0])(torch.zeros(2, 6).long())
