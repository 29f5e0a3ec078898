"""jax arrays on the CPU: `rope` gives new ones, and says by name what it cannot do. cupy by a stand-in."""

# SPDX-License-Identifier: Apache-2.0
import os
import sys
import types

import pytest
import ropewalk

np = pytest.importorskip("numpy")

FREQUENCIES = ropewalk.Frequencies(1e4, 32)


def turned(x, positions, pairing="neox", scaling=1.0):
    """x [tokens, heads, 32] in float64, plainly."""
    x = np.asarray(x, dtype=np.float64)
    angle = np.asarray(positions)[:, None] * 1e4 ** (-np.arange(0, 32, 2) / 32)
    c, s = np.cos(angle)[:, None] * scaling, np.sin(angle)[:, None] * scaling
    a, b = (x[..., :16], x[..., 16:]) if pairing == "neox" else (x[..., ::2], x[..., 1::2])
    first, second = a * c - b * s, b * c + a * s
    return np.concatenate([first, second], -1) if pairing == "neox" else np.stack([first, second], -1).reshape(x.shape)


@pytest.fixture(scope="module")
def jax():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return pytest.importorskip("jax")


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
def test_new_arrays(jax, dtype, error, pairing):
    jnp = jax.numpy
    q, k = (jnp.asarray(np.random.default_rng(seed).normal(size=(5, 2, 32)), dtype=dtype) for seed in (1, 2))
    before = np.array(q, dtype=np.float64), np.array(k, dtype=np.float64)
    positions = jnp.array([0, 3, 7, 9000, -5], dtype=jnp.int32)
    got = ropewalk.rope(q, k, positions=positions, frequencies=FREQUENCIES, pairing=pairing)
    for new, old, like in zip(got, before, (q, k), strict=True):
        assert isinstance(new, jax.Array) and new.dtype == like.dtype and new.shape == like.shape
        assert new.devices() == like.devices()
        assert np.abs(np.asarray(new, dtype=np.float64) - turned(old, positions, pairing)).max() <= error * 4
        assert np.array_equal(np.asarray(like, dtype=np.float64), old)  # left as it was
    assert (got[0] + 1).shape == q.shape  # as any other array


def test_every_argument(jax):
    """Tables, weights, offsets and a batch of jax arrays; numpy among them; no k."""
    jnp = jax.numpy
    generator = np.random.default_rng(3)
    q = jnp.asarray(generator.normal(size=(2, 3, 4, 32)), dtype=jnp.float32)
    cos, sin = (jnp.asarray(table) for table in FREQUENCIES.table(64))
    weight = jnp.asarray(generator.normal(size=32), dtype=jnp.float32)
    offsets = np.array([[5, 5, 5], [9, 9, 9]], dtype=np.int64)
    got, none = ropewalk.rope(q, cos=cos, sin=sin, q_weight=weight, offsets=offsets, positions=jnp.arange(3)[None])
    assert none is None and isinstance(got, jax.Array)
    x = np.asarray(q, dtype=np.float64)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, dtype=np.float64)
    for batch, first in enumerate((5, 9)):
        assert np.abs(np.asarray(got)[batch] - turned(x[batch], first + np.arange(3))).max() < 1e-4
    mixed = ropewalk.rope(q, np.asarray(q), frequencies=FREQUENCIES)  # each like its own
    assert isinstance(mixed[0], jax.Array) and isinstance(mixed[1], np.ndarray)
    # A cache is written, so it cannot be jax's; numpy's can.
    cache = np.zeros((6, 4, 32), np.float32)
    slots = np.array([[0, 1, 2], [3, 4, 5]])
    new = ropewalk.rope(q, q, frequencies=FREQUENCIES, k_cache=cache, v_cache=cache.copy(), v=q, slots=slots)
    assert np.array_equal(cache.reshape(2, 3, 4, 32), np.asarray(new[1]))


def test_refused_by_name(jax):
    jnp = jax.numpy
    q = jnp.ones((3, 2, 32))
    with pytest.raises(ValueError, match=r"rope: q would be written, but jax arrays are immutable: use torch"):
        ropewalk.rope_(q, frequencies=FREQUENCIES)
    with pytest.raises(ValueError, match=r"rope: k_cache would be written, but jax arrays are immutable"):
        ropewalk.rope(q, q, v=q, frequencies=FREQUENCIES, k_cache=q, v_cache=q, slots=jnp.arange(3))
    traced = r"rope: {} is traced by jax \(jit, grad, vmap\), and has no data: call it outside, on arrays"
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(ValueError, match=traced.format("q")):
            transform(lambda x: ropewalk.rope(x, frequencies=FREQUENCIES)[0].sum())(jnp.ones((4, 3, 2, 32)))
    with pytest.raises(ValueError, match=traced.format("cos")):
        jax.jit(lambda c: ropewalk.rope(np.ones((3, 2, 32), np.float32), cos=c, sin=c)[0])(jnp.ones((3, 16)))


def test_arrays_elsewhere_are_refused(monkeypatch):
    """A jax array on a GPU, or on several devices, by a stand-in: jax's streams are not ours to wait for."""

    class Device:
        platform = "gpu"

    class Array:
        def __init__(self, count):
            self.count = count

        def devices(self):
            return {Device() for _ in range(self.count)}

        def __dlpack__(self, **options):
            raise AssertionError("looked at")

    Array.__module__ = "jaxlib._jax"
    stand_in = types.ModuleType("jax")
    stand_in.core = types.SimpleNamespace(Tracer=type(None))
    monkeypatch.setitem(sys.modules, "jax", stand_in)
    monkeypatch.setitem(sys.modules, "jaxlib", types.ModuleType("jaxlib"))
    for count in (1, 2):
        with pytest.raises(ValueError, match=rf"rope: q must be on one CPU device .* but is on {count} of gpu: give"):
            ropewalk.rope(Array(count), frequencies=FREQUENCIES)


class Cupy:
    """cupy's array: memory behind DLPack, and `empty_like` in its module."""

    def __init__(self, memory):
        self.memory, self.shape, self.dtype = memory, memory.shape, memory.dtype

    def __dlpack__(self, **options):
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.memory.__dlpack_device__()


Cupy.__module__ = "cupy._core.core"


def test_cupy_by_its_stand_in(monkeypatch):
    module = types.ModuleType("cupy")
    module.empty_like = lambda array: Cupy(np.empty_like(array.memory))
    monkeypatch.setitem(sys.modules, "cupy", module)
    x = np.random.default_rng(4).normal(size=(3, 2, 32)).astype(np.float32)
    q, k = Cupy(x.copy()), Cupy(2 * x)
    want = turned(x, np.arange(3))
    for new, times in zip(ropewalk.rope(q, k, frequencies=FREQUENCIES), (1, 2), strict=True):
        assert isinstance(new, Cupy)
        assert np.abs(new.memory - times * want).max() < 1e-5
    assert np.array_equal(q.memory, x)
    assert ropewalk.rope_(q, k, frequencies=FREQUENCIES) == (q, k)  # in place, as its arrays can be written
    assert np.abs(q.memory - want).max() < 1e-5
