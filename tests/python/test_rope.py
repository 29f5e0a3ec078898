"""Every stage of the operation from Python against the float64 oracle."""

# SPDX-License-Identifier: Apache-2.0

import numpy as np
import oracle
import pytest
import ropewalk
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FREQUENCIES = ropewalk.Frequencies(theta=1e4, rotary_dim=64)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(positions, frequencies=FREQUENCIES):
    return oracle.exact_angles(frequencies.inv_freq, positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
@pytest.mark.parametrize("inverse", [False, True])
def test_plain(dtype, pairing, inverse):
    q, k = draw(7, 4, 64, dtype=dtype), draw(7, 2, 64, dtype=dtype, seed=1)
    positions = torch.tensor([0, 1, 2047, 131_071, 2**31 - 1, -5, -(2**24) - 1])
    want = [oracle.rope(x, angles(positions), pairing, inverse=inverse) for x in (q, k)]
    got = ropewalk.rope_(q, k, positions=positions, frequencies=FREQUENCIES, pairing=pairing, inverse=inverse)
    assert got[0] is q and got[1] is k
    for x, (value, length) in zip(got, want, strict=True):
        oracle.assert_close(x, value, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
@pytest.mark.parametrize("weights", ["none", "one", "zero"])
def test_norm(dtype, pairing, weights):
    q, k = draw(5, 3, 64, dtype=dtype), draw(5, 1, 64, dtype=dtype, seed=1)
    q_weight, k_weight = draw(64, seed=2), draw(64, seed=3)
    zero = weights == "zero"
    options = {} if weights == "none" else {"q_weight": q_weight, "k_weight": k_weight, "zero_centered_weight": zero}
    want = [
        oracle.rope(x, angles(range(5)), pairing, norm=True, eps=1e-5, zero_centered_weight=zero,
                    weight=None if weights == "none" else w)
        for x, w in ((q, q_weight), (k, k_weight))
    ]  # fmt: skip
    got = ropewalk.rope_(q, k, frequencies=FREQUENCIES, pairing=pairing, norm="rms", eps=1e-5, **options)
    for x, (value, length) in zip(got, want, strict=True):
        oracle.assert_close(x, value, length)


def test_partial_and_offset():
    for offset, dim in ((0, 96), (32, 96), (64, 128)):
        q = draw(4, 2, dim)
        before = q.clone()
        want, length = oracle.rope(q, angles(range(4)), rotary_offset=offset)
        ropewalk.rope_(q, frequencies=FREQUENCIES, rotary_dim=64, rotary_offset=offset)
        oracle.assert_close(q, want, length)
        outside = [i for i in range(dim) if not offset <= i < offset + 64]
        assert torch.equal(q[..., outside], before[..., outside])


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_table(table_dtype, packed):
    q = draw(6, 2, 64)
    positions = torch.tensor([5, 0, 31, 31, 2, 7], dtype=torch.int32)
    cos, sin = FREQUENCIES.table(32, table_dtype)
    table = {"cos_sin": torch.cat([cos, sin], -1)} if packed else {"cos": cos, "sin": sin}
    rows = [t[positions.long()].float() for t in (cos, sin)]
    want, length = oracle.rope(q, None, tables=rows)
    ropewalk.rope_(q, positions=positions, **table)
    oracle.assert_close(q, want, length)


def test_tables_as_models_hold_them():
    """Full width of Hugging Face, and diffusers' repeated pair, are views without a copy."""
    q = draw(6, 2, 64)
    cos, sin = FREQUENCIES.table(6, torch.float32)
    want = ropewalk.rope(q, cos=cos, sin=sin)[0]
    full = [torch.cat([t, t], -1) for t in (cos, sin)]
    assert torch.equal(want, ropewalk.rope(q, cos=full[0][:, :32], sin=full[1][:, :32])[0])
    repeated = [t.repeat_interleave(2, -1) for t in (cos, sin)]
    assert torch.equal(want, ropewalk.rope(q, cos=repeated[0][:, ::2], sin=repeated[1][:, ::2])[0])


def test_packed_row():
    """q, k and v as slices of one packed row, in place; v and the rest of the row keep their bytes."""
    row = draw(5, (4 + 2 + 2) * 64 + 3, dtype=torch.bfloat16)
    before = row.clone()
    q, k = row[:, : 4 * 64].view(5, 4, 64), row[:, 4 * 64 : 6 * 64].view(5, 2, 64)
    want = [oracle.rope(x, angles(range(5))) for x in (q, k)]
    ropewalk.rope_(q, k, frequencies=FREQUENCIES)
    for x, (value, length) in zip((q, k), want, strict=True):
        oracle.assert_close(x, value, length)
    assert torch.equal(row[:, 6 * 64 :], before[:, 6 * 64 :])


def test_transposed_views():
    """Hugging Face's [batch, heads, tokens, head_dim]."""
    q, k = draw(2, 4, 9, 64), draw(2, 2, 9, 64, seed=1)
    positions = torch.stack([torch.arange(9), torch.arange(9) + 100])
    want = [oracle.rope(x.transpose(1, 2), angles(positions)) for x in (q, k)]
    ropewalk.rope_(q.transpose(1, 2), k.transpose(1, 2), positions=positions, frequencies=FREQUENCIES)
    for x, (value, length) in zip((q, k), want, strict=True):
        oracle.assert_close(x.transpose(1, 2), value, length)


def test_batch_broadcasts_positions():
    q = draw(3, 5, 2, 64)
    shared = ropewalk.rope(q, positions=torch.arange(5)[None], frequencies=FREQUENCIES)[0]
    each = ropewalk.rope(q, positions=torch.arange(5).expand(3, 5), frequencies=FREQUENCIES)[0]
    none = ropewalk.rope(q, frequencies=FREQUENCIES)[0]
    assert torch.equal(shared, each) and torch.equal(shared, none)


def test_offsets():
    q = draw(5, 2, 64)
    positions, offsets = torch.arange(5), torch.tensor([10, -3, 0, 7, 2**40])
    want = ropewalk.rope(q, positions=positions + offsets, frequencies=FREQUENCIES)[0]
    assert torch.equal(ropewalk.rope(q, positions=positions, offsets=offsets, frequencies=FREQUENCIES)[0], want)


def test_axes():
    """Pairs mapped to rows of positions: sections, as in Qwen2-VL."""
    rows = np.repeat([0, 1, 2], [16, 8, 8]).astype(np.int32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 8, 8, 9], [1, 2, 1, 2, 1]])
    q = draw(5, 2, 64)
    by_row = np.stack([angles(row) for row in positions.numpy()])
    want, length = oracle.rope(q, by_row[rows, :, np.arange(32)].T)
    with_tensor = ropewalk.rope(q, positions=positions, frequencies=FREQUENCIES, axes=torch.from_numpy(rows))[0]
    oracle.assert_close(with_tensor, want, length)
    mapped = ropewalk.Frequencies.from_array(FREQUENCIES.inv_freq, axes=rows)
    assert mapped.axes.tolist() == rows.tolist()
    assert torch.equal(ropewalk.rope(q, positions=positions, frequencies=mapped)[0], with_tensor)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["flat", "NHD", "HND"])
def test_store(cache_dtype, layout):
    q, k, v = draw(6, 4, 64), draw(6, 2, 64, seed=1), draw(6, 2, 48, seed=2)
    dtype = cache_dtype or torch.float32

    def cache(dim):
        shape = {"flat": (32, 2, dim), "NHD": (4, 8, 2, dim), "HND": (4, 2, 8, dim)}[layout]
        raw = torch.full(shape, 3.0).to(dtype)
        return raw.transpose(1, 2) if layout == "HND" else raw

    k_cache, v_cache = cache(64), cache(48)
    k_before, v_before = k_cache.float(), v_cache.float()
    slots = torch.tensor([31, 0, -1, 9, 17, 8])
    scales = {"k_scale": 0.5, "v_scale": torch.tensor([0.25, 2.0])} if cache_dtype else {}
    want, length = oracle.rope(k, angles(range(6)))
    ropewalk.rope_(q, k, frequencies=FREQUENCIES, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots, **scales)
    oracle.assert_close(k, want, length)

    k_flat, v_flat = k_cache.reshape(32, 2, 64), v_cache.reshape(32, 2, 48)
    used = [i for i, slot in enumerate(slots.tolist()) if slot >= 0]
    rows = slots[used]
    k_want, v_want = want[used], oracle.float64(v)[used]
    if cache_dtype:
        k_want, v_want, length = k_want / 0.5, v_want / np.array([0.25, 2.0])[None, :, None], length * 2
        limit = torch.finfo(cache_dtype).max
        v_want = np.clip(v_want, -limit, limit)
        oracle.assert_close(v_flat.float()[rows].to(cache_dtype), v_want)
    else:
        assert torch.equal(v_flat[rows], v[used])
    oracle.assert_close(k_flat.float()[rows].to(dtype), k_want, length[used])
    rest = [i for i in range(32) if i not in rows.tolist()]
    assert torch.equal(k_flat.float()[rest], k_before.reshape(32, 2, 64)[rest])
    assert torch.equal(v_flat.float()[rest], v_before.reshape(32, 2, 48)[rest])


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("function", [ropewalk.rope_, ropewalk.rope])
def test_k_store_only(function, cache_dtype):
    """The cache is as without it; k keeps its bits, and is not handed out as if it were rotated."""
    q, k, v = draw(6, 4, 64), draw(6, 2, 64, seed=1), draw(6, 2, 48, seed=2)
    dtype = cache_dtype or torch.float32
    slots = torch.tensor([31, 0, -1, 9, 17, 8])
    caches = [torch.full((32, 2, dim), 3.0).to(dtype) for dim in (64, 48, 64, 48)]
    new_q, new_k = ropewalk.rope(q, k, frequencies=FREQUENCIES, v=v, k_cache=caches[0], v_cache=caches[1], slots=slots)
    before, k_before = q.clone(), k.clone()
    options = {"frequencies": FREQUENCIES, "v": v, "k_cache": caches[2], "v_cache": caches[3], "slots": slots}
    assert ropewalk.can_use(q, k, k_store_only=True, **options)
    assert ropewalk.explain(q, k, k_store_only=True, **options)["backend"] == "cpu"
    got_q, got_k = function(q, k, k_store_only=True, **options)
    assert got_k is None
    assert torch.equal(got_q, new_q) and not torch.equal(new_k, k)
    assert torch.equal(k, k_before)
    assert (got_q is q) if function is ropewalk.rope_ else torch.equal(q, before)
    for got, want in zip(caches[2:], caches[:2], strict=True):
        assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy(dtype):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((5, heads, 64)).astype(dtype) for heads in (4, 2))
    positions = np.arange(5, dtype=np.int32) * 1000
    want = ropewalk.rope(
        torch.from_numpy(q), torch.from_numpy(k), positions=torch.from_numpy(positions), frequencies=FREQUENCIES
    )
    new = ropewalk.rope(q, k, positions=positions, frequencies=FREQUENCIES)
    assert all(isinstance(x, np.ndarray) for x in new)
    assert ropewalk.rope_(q, k, positions=positions, frequencies=FREQUENCIES)[0] is q
    for got, torchs, inplace in zip(new, want, (q, k), strict=True):
        assert np.array_equal(got, torchs.numpy()) and np.array_equal(got, inplace)


def test_numpy_strided_and_read_only_inputs():
    base = np.zeros((5, 4, 130), dtype=np.float32)
    base[:] = np.random.default_rng(0).standard_normal(base.shape)
    want = ropewalk.rope(torch.from_numpy(base[:, ::2, 2:66].copy()), frequencies=FREQUENCIES)[0]
    positions = np.arange(5)
    positions.flags.writeable = False  # only read: accepted
    ropewalk.rope_(base[:, ::2, 2:66], positions=positions, frequencies=FREQUENCIES)
    assert np.array_equal(base[:, ::2, 2:66], want.numpy())


def test_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q = np.random.default_rng(0).standard_normal((5, 4, 64)).astype(ml_dtypes.bfloat16)
    want = ropewalk.rope(torch.from_numpy(q.view(np.int16).copy()).view(torch.bfloat16), frequencies=FREQUENCIES)[0]
    ropewalk.rope_(q, frequencies=FREQUENCIES)
    assert np.array_equal(q.view(np.int16), want.view(torch.int16).numpy())


def test_any_dlpack():
    class Wrapped:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    q = draw(5, 4, 64)
    want = ropewalk.rope(q, frequencies=FREQUENCIES)[0]
    ropewalk.rope_(Wrapped(q), frequencies=FREQUENCIES)
    assert torch.equal(q, want)


def test_out_of_place_leaves_the_inputs():
    q, k = draw(5, 4, 64, dtype=torch.bfloat16), draw(5, 2, 64, dtype=torch.bfloat16)
    before = q.clone(), k.clone()
    new = ropewalk.rope(q, k, frequencies=FREQUENCIES)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert ropewalk.rope(q, frequencies=FREQUENCIES)[1] is None
    outs = torch.empty_like(q), torch.empty_like(k)
    given = ropewalk.rope_(q, k, frequencies=FREQUENCIES, q_out=outs[0], k_out=outs[1])
    assert given[0] is outs[0] and given[1] is outs[1]
    for x, y, z in zip(new, outs, ropewalk.rope_(q, k, frequencies=FREQUENCIES), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_inverse_undoes():
    q = draw(9, 4, 64)
    there = ropewalk.rope(q, frequencies=FREQUENCIES)[0]
    back = ropewalk.rope(there, frequencies=FREQUENCIES, inverse=True)[0]
    assert torch.allclose(back, q, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 64), (3, 0, 64), (1, 1, 64), (2, 0, 4, 64)])
def test_little_or_nothing(shape):
    q = torch.ones(shape)
    assert ropewalk.rope_(q, frequencies=FREQUENCIES)[0] is q
    k = torch.ones((*shape[:-2], 0, 64))
    ropewalk.rope_(torch.ones((*shape[:-2], 2, 64)), k, frequencies=FREQUENCIES)


def test_faults():
    q, k = draw(4, 2, 64), draw(4, 1, 64)
    clean = q.clone()
    cos, sin = FREQUENCIES.table(8, torch.float32)
    cache = torch.zeros(4, 1, 64)
    ropewalk.check_faults()
    ropewalk.rope_(q, k, positions=torch.tensor([0, 8, 2, -1]), cos=cos, sin=sin, k_cache=cache,
                   slots=torch.tensor([0, 1, 9, 3]))  # fmt: skip
    assert q[[1, 3]].isnan().all()
    assert torch.equal(q[[0, 2]], ropewalk.rope(clean[[0, 2]], positions=torch.tensor([0, 2]), cos=cos, sin=sin)[0])
    with pytest.raises(RuntimeError, match=r"positions\[1\] is 8"):
        ropewalk.check_faults()
    ropewalk.check_faults()


def test_explain_prepare_and_the_rest():
    q = draw(4, 2, 64)
    before = q.clone()
    ropewalk.prepare(q, frequencies=FREQUENCIES)
    explanation = ropewalk.explain(q, frequencies=FREQUENCIES)
    assert explanation["backend"] == "cpu"
    assert torch.equal(q, before)
    names = {backend["name"]: backend for backend in ropewalk.backends()}
    assert names["cpu"]["available"]
    for backend in names.values():
        assert backend["detail"]


def test_force_backend_is_proved():
    q = draw(4, 2, 64)
    total = sum(ropewalk.counters().values())
    try:
        ropewalk.force_backend("cpu")
        ropewalk.rope_(q, frequencies=FREQUENCIES)
    finally:
        ropewalk.force_backend(None)
    after = ropewalk.counters()
    assert sum(after.values()) == total + 1
    assert any(name.startswith("cpu") for name in after)
    with pytest.raises(ValueError, match="nonsense"):
        ropewalk.force_backend("nonsense")


def test_frequencies_object():
    import copy
    import pickle

    f = ropewalk.Frequencies(theta=1e6, rotary_dim=128, scaling={"rope_type": "linear", "factor": 4.0})
    assert f.rotary_dim == 128 and f.attention_scaling == 1.0 and f.axes is None
    assert f.inv_freq.dtype == np.float64 and f.inv_freq.shape == (64,)
    assert f.inv_freq[0] == 0.25
    again = pickle.loads(pickle.dumps(f))
    assert np.array_equal(again.inv_freq, f.inv_freq)
    assert copy.deepcopy(f) is f
    mapped = ropewalk.Frequencies.from_array([1.0, 0.5], attention_scaling=1.5, axes=[0, 1])
    again = pickle.loads(pickle.dumps(mapped))
    assert again.axes.tolist() == [0, 1] and again.attention_scaling == 1.5


@pytest.mark.parametrize("dtype", ["float32", "float16", *DTYPES])
def test_table_dtypes(dtype):
    cos, sin = FREQUENCIES.table(10, dtype)
    assert cos.shape == sin.shape == (10, 32)
    want = angles(range(10))
    assert np.abs(oracle.float64(cos) - np.cos(want)).max() < 5e-3
    assert np.abs(oracle.float64(sin) - np.sin(want)).max() < 5e-3


def test_order_of_the_description():
    """rope_ hands its arguments over by position: the order must be the core's."""
    import inspect
    import re

    from ropewalk import _module

    names = [arg["name"] for arg in _module.description()]
    assert names == list(inspect.signature(ropewalk.rope_).parameters)
    code = ropewalk.rope_.__code__  # of what serves the documented function
    assert (*names[:2], "unnamed", *names[2:]) == code.co_varnames[: code.co_argcount]
    source = inspect.getsource(code)
    calls = [part.split(")")[0] for part in source.split(" launch(")[1:4]]
    for name in ("PAIRING", "NORM", "ROUNDING"):
        calls = [call.replace(f"{name}[", "").replace("]", "") for call in calls]
    handed = [[part.strip() for part in call.replace("handle", "frequencies").split(",")] for call in calls]
    assert all(parts[:2] == ["q_own", "k_own"] for parts in handed)
    shortest, short, whole = (parts[2:] for parts in handed)
    assert whole == names
    for shorter in (shortest, short):  # without what is left out at the end
        assert shorter == names[: len(shorter)]
    by_name = re.findall(r'"(\w+)": (\w+)', source.split("_call.slow(")[1])
    assert by_name == [(name, name) for name in names]
