"""What newcomers do wrong gets the sentence that mends it; what they look at says what it is."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import pickle
import traceback
import typing

import pytest
import ropewalk
from ropewalk import _module
from ropewalk._arrays import SupportsDLPack

numpy = pytest.importorskip("numpy")
F = ropewalk.Frequencies(theta=1e6, rotary_dim=128)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def heads(*shape: int):
    return numpy.ones(shape, "f")


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: ropewalk.Frequencies(1e4, 128, scaling={"factor": 2.0}), ValueError, "scaling has no rope_type"),
        (lambda: ropewalk.Frequencies(1e4, 128, scaling="yarn"), TypeError, "scaling must be a dict"),
        (lambda: ropewalk.Frequencies.from_array(numpy.ones((2, 3))), ValueError, "1 dimension, but has 2: [2, 3]"),
        (lambda: F.table(4, "float64"), ValueError, "float32, float16 or bfloat16, but is float64"),
        (lambda: ropewalk.rope_(heads(2, 2, 128), frequencies=F, pairing="gptj"), ValueError, "'interleaved' here"),
        (lambda: ropewalk.rope_(heads(2, 2, 128), frequencies=F, pairing="what"), ValueError, "but is 'what'"),
        (lambda: ropewalk.rope_(heads(1, 32, 7, 128), heads(1, 8, 7, 128), frequencies=F), ValueError, "transposed"),
    ],
)
def test_the_sentence_that_mends_it(call, kind, words) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)


def test_a_model_is_not_a_name() -> None:
    pytest.importorskip("torch")
    from ropewalk.transformers import patch  # noqa: PLC0415

    with pytest.raises(TypeError, match="model must be a transformers model"):
        patch("meta-llama/Llama-3.1-8B")


def test_numpys_bools_are_bools() -> None:
    want = ropewalk.rope(heads(2, 2, 128), frequencies=F, inverse=True)[0]
    assert (ropewalk.rope(heads(2, 2, 128), frequencies=F, inverse=numpy.bool_(True))[0] == want).all()


def test_frequencies_say_what_they_are() -> None:
    assert repr(F) == "<ropewalk.Frequencies of rotary_dim 128, theta 1e+06>"
    assert "theta 10000, yarn, attention_scaling=1.13" in repr(ropewalk.Frequencies(1e4, 128, YARN))
    assert repr(ropewalk.Frequencies.from_array([1.0, 0.5], axes=[0, 2])).endswith("rotary_dim 4, 3 axes>")
    config = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4}
    assert "rotary_dim 64, from " in repr(ropewalk.Frequencies.from_config(config))


def test_equal_frequencies_are_equal() -> None:
    again = pickle.loads(pickle.dumps(F))
    assert again == F
    assert hash(again) == hash(F)
    assert F != ropewalk.Frequencies(1e4, 128)
    assert F != ropewalk.Frequencies(1e6, 128, YARN)
    assert F != 128


def test_completion_offers_what_is_meant_to_be_used() -> None:
    assert set(ropewalk.__all__) <= set(dir(ropewalk))
    assert not {"Any", "TYPE_CHECKING", "annotations", "json", "inspect"} & set(dir(ropewalk))


@pytest.mark.parametrize("name", ["rope", "prepare", "can_use", "explain"])
def test_help_shows_the_keywords(name: str) -> None:
    shown = inspect.signature(getattr(ropewalk, name))
    assert list(shown.parameters) == list(inspect.signature(ropewalk.rope_).parameters)


def test_tensors_have_a_type_and_choices_are_named() -> None:
    hints = typing.get_type_hints(ropewalk.rope_)
    for arg in _module.description():
        hint = hints[arg["name"]]
        parts = set(typing.get_args(hint)) or {hint}
        if arg["kind"] == "tensor":
            optional = {type(None)} if arg["default"] == "None" else set()
            assert parts == {SupportsDLPack} | optional | ({float} if arg["host_scalar"] else set()), arg["name"]
        elif arg["kind"] == "choice":
            literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
            assert set(typing.get_args(literals[0]) if literals else parts) == set(arg["choices"])
    for name in ("rope", "prepare", "can_use", "explain"):
        assert getattr(ropewalk, name).__annotations__["q"] == "SupportsDLPack"


def test_what_has_dlpack_is_a_tensor() -> None:
    assert isinstance(heads(2, 2), SupportsDLPack)
    assert not isinstance([1.0], SupportsDLPack)


def test_refusals_read_no_symbols() -> None:
    # For its first backtrace tvm-ffi reads the symbols of every library of the process.
    with pytest.raises(ValueError, match="abacus") as caught:
        ropewalk.force_backend("abacus")
    assert not [frame for frame in traceback.extract_tb(caught.tb) if frame.name.startswith("__tvm_ffi_")]
