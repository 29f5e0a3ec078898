"""Each rule broken once from Python: the message names the argument, its value and what is accepted, and nothing is
written."""

# SPDX-License-Identifier: Apache-2.0
import inspect
import warnings

import numpy as np
import pytest
import ropewalk
import torch

F64 = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
COS, SIN = F64.table(8, torch.float32)


def good():
    """Arguments that are accepted, with every tensor there is."""
    return {
        "q": torch.ones(4, 2, 64),
        "k": torch.ones(4, 1, 64),
        "positions": torch.arange(4),
        "offsets": torch.zeros(4, dtype=torch.int64),
        "frequencies": F64,
        "q_weight": torch.ones(64),
        "k_weight": torch.ones(64),
        "v": torch.ones(4, 1, 32),
        "k_cache": torch.ones(8, 1, 64),
        "v_cache": torch.ones(8, 1, 32),
        "slots": torch.arange(4),
    }


def table():
    return {"frequencies": None, "cos": COS, "sin": SIN}


def strided(*shape):
    return torch.ones(*shape[:-1], 2 * shape[-1])[..., ::2]


def nested(**options):
    return torch.nested.nested_tensor([torch.ones(2, 1, 64), torch.ones(2, 1, 64)], **options)


def jagged():
    return nested(layout=torch.jagged)


def quantized(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will not have these for ever
        return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)


# What is changed in the good arguments, the error, and what its message must hold.
CASES = {
    "q rank": ({"q": torch.ones(4, 64)}, ValueError, ["q must be [batch?, tokens, q_heads, head_dim]", "[4, 64]"]),
    "k rank": ({"k": torch.ones(4, 64)}, ValueError, ["k must be", "[4, 64]"]),
    "positions rank": ({"positions": torch.zeros(1, 1, 4, dtype=torch.int64)}, ValueError, ["positions must be"]),
    "k tokens": ({"k": torch.ones(5, 1, 64)}, ValueError, ["k has 5 tokens", "q has 4"]),
    "positions tokens": ({"positions": torch.arange(5)}, ValueError, ["positions has 5 tokens", "q has 4"]),
    "offsets tokens": ({"offsets": torch.arange(3)}, ValueError, ["offsets has 3 tokens", "4"]),
    "slots tokens": ({"slots": torch.arange(3)}, ValueError, ["slots has 3 tokens", "4"]),
    "v tokens": ({"v": torch.ones(3, 1, 32)}, ValueError, ["v has 3 tokens", "4"]),
    "v heads": ({"v": torch.ones(4, 2, 32)}, ValueError, ["v has 2 k_heads", "1"]),
    "k_cache heads": ({"k_cache": torch.ones(8, 2, 64)}, ValueError, ["k_cache has 2 k_heads", "1"]),
    "v_cache dim": ({"v_cache": torch.ones(8, 1, 16)}, ValueError, ["v_cache has v_dim 16", "v has 32"]),
    "caches differ": ({"v_cache": torch.ones(9, 1, 32)}, ValueError, ["v_cache has", "9", "k_cache has 8"]),
    "head_dim": ({"k": torch.ones(4, 1, 32)}, ValueError, ["k has head_dim 32", "q has 64"]),
    "weight dim": ({"q_weight": torch.ones(32)}, ValueError, ["q_weight has head_dim 32", "64"]),
    "q dtype": ({"q": torch.ones(4, 2, 64, dtype=torch.float64)}, ValueError,
                ["q must be float32, float16 or bfloat16", "float64"]),
    "k dtype": ({"k": torch.ones(4, 1, 64, dtype=torch.float16)}, ValueError, ["k must be float32", "float16"]),
    "positions dtype": ({"positions": torch.arange(4).float()}, ValueError,
                        ["positions must be int32 or int64", "float32"]),
    "slots dtype": ({"slots": torch.arange(4).to(torch.int16)}, ValueError, ["slots must be int32 or int64", "int16"]),
    "weights differ": ({"k_weight": torch.ones(64, dtype=torch.bfloat16)}, ValueError,
                       ["k_weight must be float32", "bfloat16"]),
    "cache dtype": ({"k_cache": torch.ones(8, 1, 64, dtype=torch.float16)}, ValueError, ["k_cache must be", "float16"]),
    "q last stride": ({"q": strided(4, 2, 64)}, ValueError, ["q must be contiguous in its last dimension", "2"]),
    "v last stride": ({"v": strided(4, 1, 32)}, ValueError, ["v must be contiguous in its last dimension", "2"]),
    "cache last stride": ({"k_cache": strided(8, 1, 64)}, ValueError, ["k_cache must be contiguous"]),
    "device": ({"q": torch.ones(4, 2, 64, device="meta")}, ValueError, ["q", "meta"]),
    "k device": ({"k": torch.ones(4, 1, 64, device="meta")}, ValueError, ["k", "meta"]),
    "rotary_dim odd": ({"rotary_dim": 63}, ValueError, ["rotary_dim must be even", "63"]),
    "rotary_dim and frequencies": ({"rotary_dim": 32}, ValueError, ["rotary_dim is 32", "64"]),
    "rotary_dim too large": ({"frequencies": ropewalk.Frequencies(1e4, 128)}, ValueError,
                             ["rotary_dim must be at most head_dim 64", "128"]),
    "rotary_dim negative": ({"rotary_dim": -2}, ValueError, ["rotary_dim must be >= 0", "-2"]),
    "rotary_offset": ({"rotary_offset": 2}, ValueError, ["rotary_offset 2", "head_dim 64"]),
    "eps negative": ({"eps": -1.0}, ValueError, ["eps must be a finite number >= 0", "-1"]),
    "eps nan": ({"eps": float("nan")}, ValueError, ["eps must be a finite number"]),
    "pairing": ({"pairing": "llama"}, ValueError, ["pairing must be 'neox' or 'interleaved'", "'llama'"]),
    "norm": ({"norm": "layer"}, ValueError, ["norm must be None or 'rms'", "'layer'"]),
    "rounding": ({"rounding": "up"}, ValueError, ["rounding must be 'fused' or 'reference'", "'up'"]),
    "no angles": ({"frequencies": None}, ValueError, ["frequencies are missing", "cos_sin"]),
    "both angles": ({"cos": COS, "sin": SIN}, ValueError, ["frequencies and cos are both given"]),
    "cos alone": ({"frequencies": None, "cos": COS}, ValueError, ["sin is missing"]),
    "cos and cos_sin": ({**table(), "cos_sin": torch.cat([COS, SIN], -1)}, ValueError, ["cos_sin is given together"]),
    "table narrow": ({"frequencies": None, "cos": COS[:, :16], "sin": SIN[:, :16], "rotary_dim": 64}, ValueError,
                     ["cos must be 32 wide", "16"]),
    "table short": ({**table(), "cos": COS[:3], "sin": SIN[:3], "positions": None, "offsets": None}, ValueError,
                    ["positions run from 0 to 3", "3 rows"]),
    "table dtype": ({**table(), "cos": COS.double(), "sin": SIN.double()}, ValueError, ["cos must be", "float64"]),
    "weight alone": ({"k_weight": None}, ValueError, ["k_weight is missing"]),
    "zero centered": ({"q_weight": None, "k_weight": None, "zero_centered_weight": True}, ValueError,
                      ["zero_centered_weight", "q_weight is missing"]),
    "slots missing": ({"slots": None}, ValueError, ["slots are missing"]),
    "cache missing": ({"k_cache": None, "v_cache": None, "v": None}, ValueError, ["slots are given", "k_cache"]),
    "v missing": ({"v": None}, ValueError, ["v is missing"]),
    "v_cache missing": ({"v_cache": None}, ValueError, ["v_cache is missing"]),
    "scale without fp8": ({"k_scale": 2.0}, ValueError, ["k_scale is given", "fp8"]),
    "scale zero": ({"k_cache": torch.ones(8, 1, 64).to(torch.float8_e4m3fn),
                    "v_cache": torch.ones(8, 1, 32).to(torch.float8_e4m3fn), "k_scale": 0.0}, ValueError,
                   ["k_scale must be a finite number > 0", "0"]),
    "k_store_only without k_cache": ({"k_store_only": True, "k_cache": None}, ValueError,
                                     ["k_store_only is 1", "k_cache is missing"]),
    "k_store_only without a store": ({"k_store_only": True, "k_cache": None, "v_cache": None, "v": None, "slots": None},
                                     ValueError, ["k_store_only is 1", "k_cache is missing"]),
    "k_store_only without k": ({"k_store_only": True, "k": None, "k_cache": None, "k_weight": None}, ValueError,
                               ["k_store_only is 1", "k is missing"]),
    "k_store_only with k_out": ({"k_store_only": True, "k_out": torch.ones(4, 1, 64)}, ValueError,
                                ["k_store_only is 1", "k_out is given"]),
    "k_store_only type": ({"k_store_only": "yes"}, TypeError, ["k_store_only must be a bool", "str"]),
    "k_store_only grad": ({"k_store_only": True, "k": torch.ones(4, 1, 64, requires_grad=True)}, ValueError,
                          ["k requires grad", "no_grad"]),
    "axes dtype": ({"axes": torch.zeros(32, dtype=torch.int64)}, ValueError, ["axes must be int32", "int64"]),
    "axes length": ({"axes": torch.zeros(16, dtype=torch.int32)}, ValueError, ["axes", "32", "16"]),
    "q grad": ({"q": torch.ones(4, 2, 64, requires_grad=True)}, ValueError, ["q requires grad", "no_grad"]),
    "weight grad": ({"q_weight": torch.ones(64, requires_grad=True)}, ValueError, ["q_weight requires grad"]),
    "sparse": ({"k": torch.ones(4, 1, 64).to_sparse()}, ValueError, ["k must be a strided tensor"]),
    "nested": ({"positions": nested()}, ValueError, ["positions must be one array", "packed_positions"]),
    "jagged": ({"k": jagged()}, ValueError, ["k must be one array", "nested tensor", "packed_positions"]),
    "quantized": ({"q": quantized(4, 2, 64)}, ValueError, ["q must hold numbers", "qint8", "q.dequantize()"]),
    "quantized weight": ({"q_weight": quantized(64)}, ValueError, ["q_weight must hold numbers"]),
    "negated view": ({"q": torch.ones(4, 2, 64, dtype=torch.complex64).conj().imag}, ValueError,
                     ["q is a lazily negated view"]),
    "q list": ({"q": [1.0]}, TypeError, ["q must be a tensor with DLPack", "list"]),
    "k text": ({"k": "k"}, TypeError, ["k must be a tensor with DLPack", "str"]),
    "positions list": ({"positions": [0, 1, 2, 3]}, TypeError, ["positions must be a tensor", "list"]),
    "q none": ({"q": None}, ValueError, ["q is missing"]),
    "frequencies type": ({"frequencies": 1e4}, TypeError, ["frequencies must be a ropewalk.Frequencies", "float"]),
    "rotary_dim type": ({"rotary_dim": 64.0}, TypeError, ["rotary_dim must be an int", "float"]),
    "eps type": ({"eps": "small"}, TypeError, ["eps must be a number", "str"]),
    "pairing type": ({"pairing": 1}, TypeError, ["pairing must be 'neox' or 'interleaved'", "1"]),
    "rotary_dim huge": ({"rotary_dim": 2**40}, ValueError, ["rotary_dim"]),
}  # fmt: skip


@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.prepare, ropewalk.explain])
@pytest.mark.parametrize("case", CASES)
def test_message_names_the_argument(case, function):
    change, error, parts = CASES[case]
    arguments = {**good(), **change}
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    tensors = {
        n: t.detach()
        for n, t in tensors.items()
        if t.layout is torch.strided and not t.is_quantized and not t.is_nested
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    if function is ropewalk.rope_ and case == "q none":
        arguments.pop("q")
        arguments["q"] = None
    with pytest.raises(error) as caught:
        function(arguments.pop("q"), arguments.pop("k"), **arguments)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), before[name].float()), f"{name} was written"


def test_good_is_good():
    arguments = good()
    ropewalk.rope_(arguments.pop("q"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize("name", ["q", "k", "k_cache", "v_cache", "q_out", "k_out"])
@pytest.mark.parametrize("all_numpy", [True, False])
def test_read_only_numpy_is_never_written(name, all_numpy):
    arguments = {n: t.numpy() if isinstance(t, torch.Tensor) and all_numpy else t for n, t in good().items()}
    shape = {"q_out": (4, 2, 64), "k_out": (4, 1, 64)}.get(name)
    array = np.ones(shape, dtype=np.float32) if shape else np.ones(good()[name].shape, dtype=np.float32)
    array.flags.writeable = False
    arguments[name] = array
    with pytest.raises(ValueError, match=f"{name} must be writeable"):
        ropewalk.rope_(arguments.pop("q"), arguments.pop("k"), **arguments)
    assert (array == 1).all()


def test_read_only_numpy_may_be_read():
    q = np.ones((4, 2, 64), dtype=np.float32)
    q.flags.writeable = False
    new, _ = ropewalk.rope(q, frequencies=F64)
    assert (q == 1).all() and not (new == 1).all()


def test_read_only_k_may_be_stored():
    """With k_store_only k is only read."""
    arguments = {n: t.numpy() if isinstance(t, torch.Tensor) else t for n, t in good().items()}
    arguments["k"].flags.writeable = False
    q, none = ropewalk.rope_(arguments.pop("q"), arguments.pop("k"), k_store_only=True, **arguments)
    assert none is None and not (q == 1).all() and not (arguments["k_cache"] == 1).all()


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.ones((4, 2, 64), dtype=">f4"), "byte order"),
        (np.ones((4, 2, 64), dtype=[("a", "f4")]), "array of numbers"),
        (np.ones((4, 2, 64), dtype="datetime64[s]"), "array of numbers"),
        (np.ones((4, 2, 64), dtype=object), "array of numbers"),
        (np.ones((4, 2, 64), dtype="complex64"), "float32, float16 or bfloat16"),
        (np.ones((4, 2, 64), dtype=bool), "float32, float16 or bfloat16"),
        (np.ones((4, 2, 64), dtype="longdouble"), "q"),
    ],
)
def test_foreign_numpy_dtypes(array, part):
    with pytest.raises(ValueError, match=part) as caught:
        ropewalk.rope_(array, frequencies=F64)
    assert "q" in str(caught.value)


def test_shared_memory():
    row = torch.ones(4, 6, 64)
    with pytest.raises(ValueError, match="k must not share memory with q"):
        ropewalk.rope_(row[:, :4], row[:, 3:5], frequencies=F64)
    with pytest.raises(ValueError, match="q is written, but some of its elements share memory"):
        ropewalk.rope_(torch.ones(1, 2, 64).expand(4, 2, 64), frequencies=F64)
    assert (row == 1).all()
    ropewalk.rope_(row[:, :4], row[:, 4:], frequencies=F64)


def test_all_but_q_and_k_are_given_by_name():
    kinds = [each.kind for each in inspect.signature(ropewalk.rope_).parameters.values()]
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY} and len(kinds) > 20
    given = good()
    q, k, positions = (given.pop(name) for name in ("q", "k", "positions"))
    before = q.clone(), k.clone()
    for function in (ropewalk.rope_, ropewalk.rope):
        for third in (positions, None):
            with pytest.raises(TypeError, match=r"rope_?\(\) takes .*position"):
                function(q, k, third, **given)
    with pytest.raises(TypeError, match="position"):
        ropewalk.rope_(q, k, unnamed=None, **given)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_unknown_keywords():
    q = torch.ones(4, 2, 64)
    for function in (ropewalk.rope_, ropewalk.rope, ropewalk.prepare, ropewalk.explain):
        with pytest.raises(TypeError, match="thetas"):
            function(q, thetas=1.0)


def test_frequencies():
    with pytest.raises(ValueError, match="rotary_dim"):
        ropewalk.Frequencies(1e4, 63)
    with pytest.raises(ValueError, match="theta"):
        ropewalk.Frequencies(-1.0, 64)
    with pytest.raises(ValueError, match="shrink"):
        ropewalk.Frequencies(1e4, 64, {"rope_type": "linear", "factor": 2.0, "shrink": 1})
    with pytest.raises(ValueError, match="sequence_length"):
        ropewalk.Frequencies(1e4, 64, sequence_length=-1)
    with pytest.raises(ValueError, match="axes must have 2 entries"):
        ropewalk.Frequencies.from_array([1.0, 0.5], axes=[0])
    with pytest.raises(ValueError):
        ropewalk.Frequencies.from_array([])
    with pytest.raises(ValueError):
        ropewalk.Frequencies.from_array([float("nan")])
    with pytest.raises(TypeError, match="config must be a path"):
        ropewalk.Frequencies.from_config(7)
    with pytest.raises(OSError):
        ropewalk.Frequencies.from_config("/nowhere/config.json")
    with pytest.raises((ValueError, TypeError), match="float32, float16 or bfloat16"):
        F64.table(4, torch.float64)
    with pytest.raises(ValueError, match="max_position"):
        F64.table(-1, torch.float32)


def test_others():
    with pytest.raises(TypeError, match="name must be a str"):
        ropewalk.force_backend(3)
    with pytest.raises(TypeError, match="threads must be an int"):
        ropewalk.set_threads("two")
    with pytest.raises(ValueError, match="threads"):
        ropewalk.set_threads(-1)
    ropewalk.set_threads(None)


@pytest.mark.parametrize("name", ["pairing", "rotary_dim", "rotary_offset", "inverse", "norm", "zero_centered_weight",
                                  "eps", "rounding", "disable_pdl", "k_store_only"])  # fmt: skip
@pytest.mark.parametrize("value", [np.zeros(2), torch.zeros(2), np.zeros((0,))], ids=["numpy", "torch", "empty"])
@pytest.mark.parametrize("q", [np.ones((2, 2, 64), "f4"), torch.ones(2, 2, 64)], ids=["numpy", "torch"])
def test_arrays_where_one_value_belongs_are_refused_by_name(name, value, q):
    with pytest.raises(TypeError, match=f"rope: {name} must be "):
        ropewalk.rope_(q, frequencies=F64, **{name: value})
    assert (q == 1).all()


def test_every_tensor_with_a_gradient_or_a_lazy_minus_is_refused_by_name():
    """Those of the description, so that a new one is not forgotten."""
    from ropewalk import _module

    cache = {"k_cache": torch.zeros(8, 1, 64).to(torch.float8_e4m3fn),
             "v_cache": torch.zeros(8, 1, 32).to(torch.float8_e4m3fn),
             "k_scale": torch.ones(1), "v_scale": torch.ones(1)}  # fmt: skip
    tables = {"frequencies": None, "cos_sin": torch.cat([COS, SIN], -1)}
    out = {"q_out": torch.zeros(4, 2, 64), "k_out": torch.zeros(4, 1, 64)}
    seen = set()
    for arg in _module.description():
        name = arg["name"]
        more = cache if name in cache else tables if name == "cos_sin" else table() if name in ("cos", "sin") else {}
        arguments = {**good(), **more, **(out if name in out else {})}
        value = arguments.get(name)
        if arg["kind"] != "tensor" or not torch.is_tensor(value) or value.dtype != torch.float32:
            continue
        seen.add(name)
        kept = {key: x.clone() for key, x in arguments.items() if torch.is_tensor(x)}
        negated = torch._neg_view(value.clone())
        with pytest.raises(ValueError, match=f"rope: {name} is a lazily negated view"):
            ropewalk.rope_(**{**arguments, name: negated})
        with pytest.raises(ValueError, match=f"rope: {name} requires grad"):
            ropewalk.rope_(**{**arguments, name: value.clone().requires_grad_()})
        for key, x in kept.items():
            assert torch.equal(x.float(), arguments[key].float()), (name, key)
    assert seen >= {
        "q",
        "k",
        "cos",
        "sin",
        "cos_sin",
        "q_weight",
        "k_weight",
        "q_out",
        "k_out",
        "v",
        "k_scale",
        "v_scale",
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"q": np.ones((2, 8, 5, 64), "f4"), "k": np.ones((2, 2, 5, 64), "f4")}, "k has 2 tokens, but q has 8"),
        (
            {"q": np.ones((2, 8, 5, 64), "f4"), "positions": np.zeros((2, 5), "i8")},
            "positions has 5 tokens, but q has 8",
        ),
    ],
)
def test_heads_before_tokens_are_told(options, expected):
    layout = r"; q is read as \[batch, tokens, heads, head_dim\]: if it is \[batch, heads, tokens, "
    with pytest.raises(ValueError, match=expected + layout):
        ropewalk.rope_(frequencies=ropewalk.Frequencies(1e4, 64), **options)
    swapped = {name: array.swapaxes(1, 2) if array.ndim == 4 else array for name, array in options.items()}
    ropewalk.rope_(frequencies=ropewalk.Frequencies(1e4, 64), **swapped)


@pytest.mark.parametrize(
    ("q", "k", "options"),
    [
        ((2, 5, 8), (2, 4, 2), {}),
        ((2, 5, 8), (2, 4, 8), {}),
        ((2, 5, 8), (2, 6, 8), {}),
        ((2, 5, 8), (2, 5, 2), {"q_out": np.zeros((2, 1, 8, 64), "f4")}),
        ((2, 5, 8), (2, 5, 2), {"positions": np.zeros((2, 6), "i8")}),
    ],
)
def test_other_token_counts_are_no_transposed_tensors(q, k, options):
    with pytest.raises(ValueError, match=r"has \d tokens, but q has 5$"):
        ropewalk.rope_(
            np.ones((*q, 64), "f4"), np.ones((*k, 64), "f4"), frequencies=ropewalk.Frequencies(1e4, 64), **options
        )


def test_tables_of_both_halves_are_told():
    table = np.ones((10, 64), "f4")
    with pytest.raises(ValueError, match="but is 128 .from cos.: cos and sin have one column for each pair"):
        ropewalk.rope_(np.ones((5, 8, 64), "f4"), cos=table, sin=table)
    ropewalk.rope_(np.ones((5, 8, 64), "f4"), cos=table[:, :32], sin=table[:, :32])


def test_caches_of_bytes_are_told():
    cache = np.zeros((8, 2, 64), "u1")
    with pytest.raises(
        ValueError, match="k_cache must be .*, but is uint8: give a view of the same bytes as one of these"
    ):
        ropewalk.rope_(
            np.ones((5, 8, 64), "f4"),
            np.ones((5, 2, 64), "f4"),
            frequencies=ropewalk.Frequencies(1e4, 64),
            k_cache=cache,
            slots=np.arange(5),
        )


def test_explain_says_how_tensors_were_read():
    frequencies = ropewalk.Frequencies(1e4, 32)
    q, k = np.ones((2, 5, 8, 64), "f4"), np.ones((2, 5, 1, 64), "f4")
    read = ropewalk.explain(q, k, frequencies=frequencies)["tensors"]
    assert read == "a batch of 2, 5 tokens, 8 heads of q and 1 of k, each of 64, of which 32 are rotated"
    read = ropewalk.explain(np.ones((1, 1, 64), "f4"), frequencies=frequencies)["tensors"]
    assert read == "1 token, 1 head of q, each of 64, of which 32 are rotated"


def test_an_output_that_is_its_input_in_another_order_is_refused():
    """Heads would be overwritten before they are read."""
    turn = ropewalk.Frequencies(theta=1e4, rotary_dim=16)
    x = torch.randn(3, 3, 16)
    array = x.numpy().copy()
    before = x.clone()
    with pytest.raises(ValueError, match="q_out"):
        ropewalk.rope_(x, q_out=x.transpose(0, 1), frequencies=turn)
    with pytest.raises(ValueError, match="q_out"):
        ropewalk.rope_(array, q_out=array[::-1], frequencies=turn)
    with pytest.raises(ValueError, match="q_grad"):
        ropewalk.rope_backward(x, q=x.clone(), q_grad_out=x.transpose(0, 1), norm="rms", frequencies=turn)
    assert torch.equal(x, before) and np.array_equal(array, before.numpy())
    ropewalk.rope_(x, q_out=x.view(3, 3, 16), frequencies=turn)
    assert not torch.equal(x, before)
