"""The gradient: `rope_backward`, and `rope` through torch's autograd, against float64; models trained through it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import ropewalk
import ropewalk.transformers
import torch
from torch.utils.checkpoint import checkpoint

TOKENS, DIM = 7, 24
ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place


def turned(x: Any, cos: Any, sin: Any, pairing: str, offset: int, inverse: bool) -> Any:
    """R x in the tensors' own dtype; cos and sin: [.., tokens, pairs]."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), -sin.unsqueeze(-2) if inverse else sin.unsqueeze(-2)
    part = x[..., offset : offset + 2 * pairs]
    a, b = (part[..., :pairs], part[..., pairs:]) if pairing == "neox" else (part[..., 0::2], part[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    new = torch.cat((a, b), -1) if pairing == "neox" else torch.stack((a, b), -1).flatten(-2)
    return torch.cat((x[..., :offset], new, x[..., offset + 2 * pairs :]), -1)


def exact(x: Any, weight: Any, angles: Any, pairing: str, offset: int, inverse: bool, norm: bool, zero: bool) -> Any:
    """The operation in float64."""
    if norm:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x if weight is None else x * (weight + 1 if zero else weight)
    return turned(x, *angles, pairing, offset, inverse)


def tables(f: Any, positions: Any) -> tuple[Any, Any]:
    angle = positions.double()[..., None] * torch.from_numpy(f.inv_freq)
    return angle.cos() * f.attention_scaling, angle.sin() * f.attention_scaling


def random(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(got: Any, want: Any, dtype: Any = torch.float32) -> None:
    """Within half a unit in the last place and 2^-18 of the head's largest element."""
    want = want.double()
    largest = want.abs().amax(-1, keepdim=True) if want.dim() > 1 else want.abs().max()
    bound = ULP[dtype] * 1.01 * want.abs() + 2.0**-18 * largest
    error = (got.double() - want).abs()
    assert (error <= bound).all(), (error / bound).max()


OPTIONS = list(
    itertools.product(
        [torch.float32, torch.bfloat16, torch.float16],
        ["neox", "interleaved"],
        [(DIM, 0), (16, 0), (10, 6)],  # rotary_dim, rotary_offset
        ["none", "rms", "weight", "1 + weight"],
        ["frequencies", "table", "yarn inverse", "axes"],
    )
)


@pytest.mark.parametrize(("dtype", "pairing", "part", "norm", "angles"), OPTIONS)
def test_gradients_are_those_of_float64(dtype: Any, pairing: str, part: Any, norm: str, angles: str) -> None:
    rotary_dim, offset = part
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} if "yarn" in angles else None
    f = ropewalk.Frequencies(theta=1e4, rotary_dim=rotary_dim, scaling=scaling)
    positions = torch.arange(TOKENS)[None] * 3 + torch.tensor([[0], [5]])
    options: dict[str, Any] = {"pairing": pairing, "rotary_offset": offset, "inverse": "inverse" in angles}
    if angles == "table":
        cos, sin = (x.to(dtype) for x in tables(f, torch.arange(64)))
        options.update(cos=cos, sin=sin, positions=positions)
        found = cos[positions].double(), sin[positions].double()
    elif angles == "axes":
        rows = torch.stack((positions, positions // 2, positions % 5))
        axis = torch.arange(rotary_dim // 2) % 3
        options.update(frequencies=f, positions=rows, axes=axis.int())
        found = tuple(torch.stack([x[axis[i], ..., i] for i in range(len(axis))], -1) for x in tables(f, rows))
    else:
        options.update(frequencies=f, positions=positions)
        found = tables(f, positions)
    if norm == "rms":
        options["norm"] = "rms"
    zero = norm.startswith("1")
    heads = {"q": 3, "k": 2}
    x = {name: random(2, TOKENS, n, DIM, dtype=dtype).requires_grad_() for name, n in heads.items()}
    weights: dict[str, Any] = {"q": None, "k": None}
    if "weight" in norm:
        weights = {name: (random(DIM, seed=9 + n) * 0.3 + (not zero)).requires_grad_() for name, n in heads.items()}
        options.update(q_weight=weights["q"], k_weight=weights["k"], zero_centered_weight=zero)
    new = ropewalk.rope(x["q"], x["k"], **options)
    grads = [random(*y.shape, dtype=dtype, seed=5) for y in new]
    torch.autograd.backward(new, grads)
    for (name, value), y, grad in zip(x.items(), new, grads, strict=True):
        wide = value.detach().double().requires_grad_()
        weight = None if weights[name] is None else weights[name].detach().double().requires_grad_()
        want = exact(wide, weight, found, pairing, offset, options["inverse"], norm != "none", zero)
        close(y, want.detach(), dtype)
        want.backward(grad.double())
        close(value.grad, wide.grad, dtype)
        if weight is not None:
            assert weights[name].grad.dtype == torch.float32
            close(weights[name].grad, weight.grad)


# ---------------------------------------------------------------------------------------------------------------------
# rope_backward


def call(tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    return {"frequencies": ropewalk.Frequencies(theta=1e4, rotary_dim=DIM), "q_weight": random(DIM) + 1,
            "k_weight": random(DIM, seed=3) + 1, "positions": torch.arange(tokens), **more}  # fmt: skip


def test_from_a_packed_row_into_a_packed_row() -> None:
    options = call()
    qkv = random(TOKENS, 3 * DIM + 2 * DIM + 2 * DIM).requires_grad_()
    q, k, v = (x.unflatten(-1, (-1, DIM)) for x in qkv.split((3 * DIM, 2 * DIM, 2 * DIM), -1))
    new = ropewalk.rope(q, k, **options)
    grads = [random(*y.shape, seed=4) for y in new]
    torch.autograd.backward([*new, v], [*grads, torch.ones_like(v)])
    d_qkv = torch.full((TOKENS, qkv.shape[-1]), 7.0)
    parts = [x.unflatten(-1, (-1, DIM)) for x in d_qkv.split((3 * DIM, 2 * DIM, 2 * DIM), -1)]
    sums = torch.empty(DIM), torch.empty(DIM)
    with torch.no_grad():
        got = ropewalk.rope_backward(*grads, q=q, k=k, q_grad_out=parts[0], k_grad_out=parts[1], q_weight_grad=sums[0],
                                     k_weight_grad=sums[1], **options)  # fmt: skip
    assert got[0] is parts[0]
    assert torch.equal(d_qkv[:, : 5 * DIM], qkv.grad[:, : 5 * DIM])
    assert (parts[2] == 7.0).all()


def test_in_place_with_numpy() -> None:
    options = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in call().items()}
    q, grad = random(TOKENS, 3, DIM).numpy(), random(TOKENS, 3, DIM, seed=1).numpy()
    del options["k_weight"]
    before, sums = grad.copy(), numpy.empty(DIM, "float32")
    q.flags.writeable = False
    assert ropewalk.rope_backward(grad, q=q, q_weight_grad=sums, **options)[0] is grad
    wide = torch.from_numpy(q.copy()).double().requires_grad_()
    weight = torch.from_numpy(options["q_weight"]).double().requires_grad_()
    angles = tables(options["frequencies"], torch.arange(TOKENS))
    exact(wide, weight, angles, "neox", 0, False, True, False).backward(torch.from_numpy(before).double())
    close(torch.from_numpy(grad), wide.grad)
    close(torch.from_numpy(sums), weight.grad)


def test_a_row_does_not_depend_on_the_others_and_sums_not_on_threads() -> None:
    tokens = 3000
    options = call(tokens)
    q, k = random(tokens, 3, DIM), random(tokens, 2, DIM)
    grads = random(tokens, 3, DIM, seed=1), random(tokens, 2, DIM, seed=1)

    def run(rows: slice) -> list[Any]:
        own = [x[rows].clone() for x in grads]
        sums = torch.empty(DIM), torch.empty(DIM)
        ropewalk.rope_backward(*own, q=q[rows], k=k[rows], q_weight_grad=sums[0], k_weight_grad=sums[1],
                               **{**options, "positions": options["positions"][rows]})  # fmt: skip
        return [*own, *sums]

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(17, 1100), slice(2999, 3000)):
        assert all(torch.equal(x, y[rows]) for x, y in zip(run(rows)[:2], whole, strict=False))
    for threads in (1, 2, 5):
        try:
            ropewalk.set_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(run(slice(None)), whole, strict=True))
        finally:
            ropewalk.set_threads(None)


BAD = {
    "no q": ({"q": None}, ValueError, "q is missing: the gradient of the norm needs it"),
    "tokens": ({"q": random(TOKENS + 1, 3, DIM)}, ValueError, "q has 8 tokens, but q_grad has 7"),
    "dtype": ({"k": random(TOKENS, 2, DIM, dtype=torch.float16)}, ValueError, "k must be float32, but is float16"),
    "sum": ({"q_weight_grad": torch.empty(DIM, dtype=torch.bfloat16)}, ValueError, "q_weight_grad must be float32"),
    "sum's size": ({"k_weight_grad": torch.empty(DIM + 2)}, ValueError, "k_weight_grad has head_dim 26"),
    "cache": ({"k_cache": torch.empty(9, 2, DIM), "slots": torch.arange(TOKENS)}, ValueError, "k_cache is given, but"),
    "grad": ({"q_weight_grad": torch.ones(DIM, requires_grad=True)}, ValueError, "q_weight_grad requires grad"),
    "no tensor": ({"q": 3}, TypeError, "q must be a tensor"),
    "unknown": ({"qq": 3}, TypeError, "unexpected keyword argument 'qq'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_writes_nothing(name: str) -> None:
    change, kind, words = BAD[name]
    grads = random(TOKENS, 3, DIM), random(TOKENS, 2, DIM)
    before = [x.clone() for x in grads]
    arguments = {**call(), "q": random(TOKENS, 3, DIM), "k": random(TOKENS, 2, DIM), **change}
    with pytest.raises(kind, match=words):
        ropewalk.rope_backward(*grads, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(grads, before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def leaves(norm: bool = True) -> tuple[list[Any], dict[str, Any]]:
    options = call()
    given = [random(TOKENS, 3, DIM), random(TOKENS, 2, DIM), options.pop("q_weight"), options.pop("k_weight")]
    return [x.clone().requires_grad_() for x in given[: 4 if norm else 2]], options


def loss_of(options: dict[str, Any]) -> Any:
    def loss(q: Any, k: Any, q_weight: Any = None, k_weight: Any = None) -> Any:
        new = ropewalk.rope(q, k, q_weight=q_weight, k_weight=k_weight, **options)
        return sum((x * x * (i + 1)).sin().sum() for i, x in enumerate(new))

    return loss


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(norm: bool, backend: str) -> None:
    given, options = leaves(norm)
    loss = loss_of(options)
    want = torch.autograd.grad(loss(*given), given)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*given), given)
    torch._dynamo.reset()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


# With the package, and with one whose gradient's operator has another name: torch's cache on disk knows neither.
KEPT_GRAPHS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import ropewalk
assert ropewalk.__file__.startswith(sys.argv[1])
from torch._dynamo.utils import counters
f = ropewalk.Frequencies(1e4, 8)
q = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
w = torch.ones(8, requires_grad=True)
angles = torch.arange(3.0)[:, None] * torch.from_numpy(f.inv_freq).float()
for options in ({"frequencies": f}, {"cos": angles.cos(), "sin": angles.sin()}):
    rotate = lambda q, w: ropewalk.rope(q, q_weight=w, **options)[0]
    want = torch.autograd.grad(rotate(q, w), (q, w), torch.ones_like(q))
    got = torch.autograd.grad(torch.compile(rotate, fullgraph=True)(q, w), (q, w), torch.ones_like(q))
    torch.testing.assert_close(got, want)
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_saved"])
"""


def test_kept_graphs_are_of_these_operators(tmp_path: Path) -> None:
    package = Path(ropewalk.__file__).parent
    for name in ("same", "other"):
        shutil.copytree(package, tmp_path / name / "ropewalk", copy_function=os.symlink)
    changed = tmp_path / "other" / "ropewalk" / "_torch.py"
    pattern = r'(torch\.ops\.ropewalk\.|ropewalk::|^    ")rope_backward\b'
    text = re.sub(pattern, r"\1another", changed.read_text(), flags=re.M)
    changed.unlink()  # the link
    changed.write_text(text)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for name, want in (("same", "0 2"), ("same", "2 0"), ("other", "0 2")):
        command = [sys.executable, "-c", KEPT_GRAPHS, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == want, name


@pytest.mark.parametrize("norm", [False, True])
def test_transforms_and_checkpoints(norm: bool) -> None:
    given, options = leaves(norm)
    loss = loss_of(options)
    want = torch.autograd.grad(loss(*given), given)
    plain = [x.detach() for x in given]
    gradient = torch.func.grad(loss, argnums=tuple(range(len(given))))
    for x, y in zip(gradient(*plain), want, strict=True):
        assert torch.equal(x, y)
    two = [torch.stack((x, x)) for x in plain[:2]]
    batched = torch.func.vmap(gradient, in_dims=(0, 0, *(None for _ in plain[2:])))(*two, *plain[2:])
    for x, y in zip(batched, want, strict=True):
        assert torch.equal(x[0], y)
        assert torch.equal(x[1], y)
    for reentrant in (False, True):
        got = checkpoint(loss, *given, use_reentrant=reentrant)
        for x in given:
            x.grad = None
        got.backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(given, want, strict=True))


def test_the_operators_are_registered_as_torch_wants() -> None:
    given, options = leaves()
    q, k, q_weight, k_weight = given
    content = options["frequencies"]._content
    values = (q, k, options["positions"], None, content, None, None, None, None, 0, 0, 0, 0, 1, q_weight, k_weight)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ropewalk.rope.default, values, test_utils=tests)


def saved_by(function: Any) -> list[Any]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function()
    return kept


def test_plain_tensors_and_watched_ones_have_the_same_gradient() -> None:
    """Plain ones go by a quicker way: without it a call takes three times as long on the host."""

    class Passes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    f = ropewalk.Frequencies(1e4, DIM)
    weight, gradient = random(DIM), random(TOKENS, 2, DIM)

    def run() -> tuple[Any, str]:
        x, w = random(TOKENS, 2, DIM, seed=1).requires_grad_(), weight.clone().requires_grad_()
        y, _ = ropewalk.rope(x, frequencies=f, q_weight=w)
        return (y, *torch.autograd.grad(y, (x, w), gradient)), y.grad_fn.name()

    plain, node = run()
    with Passes():
        watched, watched_node = run()
    assert "PlainRope" in node and "PlainRope" not in watched_node
    assert "ropewalk.rope.default" in seen and "ropewalk.rope_backward.default" in seen
    for got, want in zip(plain, watched, strict=True):
        assert torch.equal(got, want)


def test_a_gradient_with_a_tangent_is_refused() -> None:
    """The second derivative would be lost without a word."""
    f = ropewalk.Frequencies(1e4, DIM)
    x, w = random(TOKENS, 2, DIM).requires_grad_(), random(TOKENS, 2, DIM, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, torch.ones_like(w))
        for norm in (None, "rms"):
            y, _ = ropewalk.rope(x, frequencies=f, norm=norm)
            with pytest.raises(ValueError, match="q_grad has a tangent"):
                torch.autograd.grad((y * dual).sum(), x)


def test_what_is_saved() -> None:
    given, options = leaves()
    kept = saved_by(lambda: ropewalk.rope(given[0], given[1], q_weight=given[2], k_weight=given[3], **options))
    memory = {x.data_ptr() for x in (*given, options["positions"])}
    assert {x.data_ptr() for x in kept if x is not None} == memory
    kept = saved_by(lambda: ropewalk.rope(given[0], given[1], **options))  # without a norm not even x
    assert {x.data_ptr() for x in kept if x is not None} == {options["positions"].data_ptr()}


@pytest.mark.parametrize("frozen", [(2,), (3,), (2, 3), (0, 1), (0, 1, 2)])
def test_frozen(frozen: tuple[int, ...]) -> None:
    given, options = leaves()
    loss = loss_of(options)
    want = torch.autograd.grad(loss(*given), given)
    given = [x.detach() if i in frozen else x.detach().requires_grad_() for i, x in enumerate(given)]
    loss(*given).backward()
    for i, (x, y) in enumerate(zip(given, want, strict=True)):
        assert x.grad is None if i in frozen else torch.equal(x.grad, y)


def test_one_output_alone_and_gradients_of_any_strides() -> None:
    given, options = leaves()
    q, k, q_weight, k_weight = given
    new = ropewalk.rope(q, k, q_weight=q_weight, k_weight=k_weight, **options)
    grad = torch.autograd.grad(new[1].sum(), [q, k], allow_unused=True)  # an expanded gradient
    assert grad[0] is None or not grad[0].any()
    angles = tables(options["frequencies"], options["positions"])
    turned = exact(k.double(), k_weight.double(), angles, "neox", 0, False, True, False)
    want = torch.autograd.grad(turned.sum(), k)
    close(grad[1], want[0])
    new = ropewalk.rope(q, k, q_weight=q_weight, k_weight=k_weight, **options)
    turned_grad = random(DIM, 3, TOKENS).permute(2, 1, 0)
    got = torch.autograd.grad(new[0], q, turned_grad)[0]
    new = ropewalk.rope(q, k, q_weight=q_weight, k_weight=k_weight, **options)
    assert torch.equal(got, torch.autograd.grad(new[0], q, turned_grad.contiguous())[0])


def test_in_place() -> None:
    given, options = leaves(norm=False)
    q, k = given
    want = torch.autograd.grad(sum(x.pow(3).sum() for x in ropewalk.rope(q, k, **options)), given)
    a, b = q * 1, k * 1
    assert ropewalk.rope_(a, b, **options)[0] is a
    for x, y in zip(torch.autograd.grad(sum(x.pow(3).sum() for x in (a, b)), given), want, strict=True):
        torch.testing.assert_close(x, y)
    packed = torch.cat((q, k), 1).detach().requires_grad_()
    both = packed * 1  # views of one tensor
    ropewalk.rope_(both[:, :3], both[:, 3:], **options)
    got = torch.autograd.grad(both.pow(3).sum(), packed)[0]
    torch.testing.assert_close(got, torch.cat(want, 1))


def test_every_derivative_of_a_rotation_and_one_of_a_norm() -> None:
    (q, k), options = leaves(norm=False)
    first = torch.autograd.grad(loss_of(options)(q, k), q, create_graph=True)[0]
    got = torch.autograd.grad(first.sum(), q)[0]
    angles = [x.float() for x in tables(options["frequencies"], options["positions"])]
    y = turned(q, *angles, "neox", 0, False)
    first = torch.autograd.grad((y * y).sin().sum(), q, create_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(first.sum(), q)[0], rtol=1e-4, atol=1e-4)
    given, options = leaves()
    first = torch.autograd.grad(loss_of(options)(*given), given[0], create_graph=True)[0]
    with pytest.raises(ValueError, match="rope: a second derivative was asked for"):
        first.sum().backward()


REFUSED = {
    "a leaf in place": (ropewalk.rope_, {}, "q requires grad and is a leaf"),
    "a norm in place": (lambda q, k, **o: ropewalk.rope_(q * 1, k * 1, **o), {"norm": "rms"},
                        "q requires grad, and the gradient of a norm needs what would be overwritten"),
    "a table": (ropewalk.rope, {"frequencies": None, "cos_sin": torch.ones(9, DIM, requires_grad=True)},
                "cos_sin requires grad, and Ropewalk calculates no gradient of tables"),
    "a store": (ropewalk.rope, {"k_cache": torch.empty(9, 2, DIM), "slots": torch.arange(TOKENS)}, "k_cache is given"),
    "an output": (ropewalk.rope_, {"q_out": torch.empty(TOKENS, 3, DIM)}, "q requires grad, and q_out is given"),
    "only an output": (lambda q, k, **o: ropewalk.rope_(q.detach(), **o),
                       {"q_out": torch.empty(TOKENS, 3, DIM, requires_grad=True)}, "q_out requires grad, and it is"),
    "a view of a leaf": (lambda q, k, **o: ropewalk.rope_(q * 1, k[:], **o), {},
                         "k requires grad and is a leaf or a view of one"),
    "one of many views": (lambda q, k, **o: ropewalk.rope_(q * 1, (k * 1).split(1, 1)[0], **o), {},
                          "k requires grad and is one of the views that split, chunk or unbind made"),
    "no such keyword": (ropewalk.rope, {"qq": 1}, "unexpected keyword"),
    "no torch tensor": (ropewalk.rope, {"positions": numpy.arange(TOKENS)}, "positions must be a torch.Tensor"),
}  # fmt: skip


def test_what_cannot_be_overwritten_is_refused_before_anything_is_written() -> None:
    (q, k), options = leaves(norm=False)
    of_nobody = torch.randn(TOKENS, 4, DIM)
    with torch.no_grad():
        hidden = of_nobody[:, :2]
    cases = {
        "k requires grad and is a leaf or a view of one": k[:],
        "k requires grad and is one of the views": (k * 1).split(1, 1)[0],
        "k is one of the views": of_nobody.split(2, 1)[1],
        "rope: k is .* or a view made under": hidden,
    }
    for words, x in cases.items():
        given = q * 1
        before = given.detach().clone(), x.detach().clone()
        with pytest.raises(ValueError, match=words):
            ropewalk.rope_(given, x, **options)
        assert torch.equal(given, before[0])
        assert torch.equal(x, before[1])
        with torch.no_grad():
            ropewalk.rope_(given, x.detach(), **options)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    function, change, words = REFUSED[name]
    (q, k), options = leaves(norm=False)
    before = q.detach().clone(), k.detach().clone()
    with pytest.raises((ValueError, TypeError), match=words):
        function(q, k, **{**options, **change})
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


# ---------------------------------------------------------------------------------------------------------------------
# Models

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
KINDS = {"qwen3": {"head_dim": 16}, "llama": {}}


def train(kind: str, patched: bool, steps: int = 50) -> tuple[float, dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **KINDS[kind]})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(3, 128, (steps, 2, 32), generator=torch.Generator().manual_seed(2))
    patch = ropewalk.transformers.patch(model) if patched else None
    before = ropewalk.counters()
    for batch in data:
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    after = ropewalk.counters()
    launched = sum(after.values()) - sum(before.values())
    assert launched == (2 * 2 * steps if patched else 0)  # forward and backward of each layer
    if patch:
        patch.unpatch()
    return loss.item(), model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_model_trains_as_the_stock_one(kind: str) -> None:
    stock, _ = train(kind, patched=False)
    first, weights = train(kind, patched=True)
    again, others = train(kind, patched=True)
    print(f"{kind}: stock {stock:.9f}, patched {first:.9f}")
    assert abs(first - stock) <= 1e-5
    assert first == again
    assert all(torch.equal(x, others[name]) for name, x in weights.items())


def test_master_weights_in_float32() -> None:
    given, options = leaves()
    q, k, q_weight, k_weight = given
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k)]
    new = ropewalk.rope(*half, q_weight=q_weight, k_weight=k_weight, **options)
    assert new[0].dtype == torch.bfloat16
    (new[0].float().sum() + new[1].float().sum()).backward()
    assert half[0].grad.dtype == torch.bfloat16
    assert q_weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ropewalk.rope(*half, q_weight=q_weight, k_weight=k_weight, **options)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_in_place_refuse_with_gradients_what_they_refuse_without(compiled):
    def check(call, match):
        call = torch.compile(call, backend="eager") if compiled else call
        for grad in (True, False):
            q = torch.randn(6, 2, 16, requires_grad=grad) * 1
            with pytest.raises(ValueError, match=match):
                call(q)

    f = ropewalk.Frequencies(1e4, 16)
    check(lambda q: ropewalk.rope_(q, q * 1, frequencies=f, k_store_only=True), "k_cache is missing")
    check(lambda q: ropewalk.rope(q, q * 1, frequencies=f, k_store_only=True), "k_cache is missing")
    check(lambda q: ropewalk.rope_(q, q, frequencies=f), "k must not share memory with q")
    check(lambda q: ropewalk.rope_(q[:1].expand(6, 2, 16), None, frequencies=f), "overlapping strides")
    if not compiled:
        check(lambda q: ropewalk.rope_(q, q[:, :1], frequencies=f), "k must not share memory with q")


def test_q_and_k_of_packed_rows_in_place_have_gradients():
    f = ropewalk.Frequencies(1e4, 16)
    rows = torch.randn(6, 5, 16, requires_grad=True) * 1
    want = ropewalk.rope(rows.detach(), None, frequencies=f)[0]
    ropewalk.rope_(rows[:, :3], rows[:, 3:], frequencies=f)
    assert torch.equal(rows, want)


@pytest.mark.parametrize("scale", [1e-3, 1e-8, 1e-15, 0.0])
def test_a_small_head_beside_others(scale):
    """A head whose squares are tiny has its gradient as others do, and those beside it theirs, to the bit."""
    frequencies, eps = ropewalk.Frequencies(theta=1e4, rotary_dim=64), 1e-30
    draw = torch.Generator().manual_seed(1)
    q, grad = (torch.randn(3, 9, 64, generator=draw) for _ in range(2))
    weight = torch.rand(64, generator=draw) + 0.5
    small = q.clone()
    small[1, 4] *= scale

    def gradient(x):
        out, sums = torch.empty_like(x), torch.empty(64)
        ropewalk.rope_backward(grad, q=x, q_grad_out=out, q_weight_grad=sums, frequencies=frequencies, q_weight=weight,
                               eps=eps)  # fmt: skip
        return out, sums

    (plain, _), (out, sums) = gradient(q), gradient(small)
    others = torch.ones(3, 9, dtype=torch.bool)
    others[1, 4] = False
    assert torch.equal(out[others], plain[others])
    x, w = small.double().requires_grad_(), weight.double().requires_grad_()
    angle = torch.arange(3).double()[:, None, None] * torch.from_numpy(frequencies.inv_freq).double()
    a, b = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w).chunk(2, -1)
    rotated = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    rotated.backward(grad.double())
    assert ((out - x.grad).abs().amax(-1) <= 1e-6 * x.grad.abs().amax(-1)).all()
    assert ((sums - w.grad).abs() <= 1e-6 * w.grad.abs().max()).all()
