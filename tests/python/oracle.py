"""The operation once more, in float64 numpy, for the tests of the Python package. Slow and plain on purpose."""

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch

# Of each dtype: half a unit in the last place, relative; and what lies under the smallest normal number.
UNITS = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float8_e4m3fn: (2.0**-4, 2.0**-10),
    torch.float8_e5m2: (2.0**-3, 2.0**-17),
}


def float64(x) -> np.ndarray:
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)


def rope(
    x,  # [.., tokens, heads, head_dim]
    angles,  # [.., tokens, rotary_dim/2]
    pairing="neox",
    rotary_offset=0,
    inverse=False,
    weight=None,
    norm=False,
    zero_centered_weight=False,
    eps=1e-6,
    scaling=1.0,
    tables=None,
):
    """Returns the result, and the length of the pair that each element belongs to (0 where nothing is rotated)."""
    x = float64(x).copy()
    if norm or weight is not None:
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        if weight is not None:
            x *= float64(weight) + (1.0 if zero_centered_weight else 0.0)
    if tables is None:
        cos, sin = np.cos(angles) * scaling, np.sin(angles) * scaling
    else:
        cos, sin = (float64(table) for table in tables)
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]
    if inverse:
        sin = -sin
    pairs = cos.shape[-1]
    i = np.arange(pairs)
    first, second = (i, i + pairs) if pairing == "neox" else (2 * i, 2 * i + 1)
    first, second = first + rotary_offset, second + rotary_offset
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first] = a * cos - b * sin
    x[..., second] = a * sin + b * cos
    length = np.zeros_like(x)
    length[..., first] = length[..., second] = np.hypot(a, b) * np.hypot(cos, sin)
    return x, length


def exact_angles(inv_freq, positions):
    """position * frequency, reduced to one turn without losing digits."""
    turns = np.asarray(inv_freq, dtype=np.longdouble) / (2 * np.longdouble(np.pi))
    phase = np.asarray(positions).astype(np.longdouble)[..., None] * turns
    return ((phase - np.round(phase)) * 2 * np.longdouble(np.pi)).astype(np.float64)


def assert_close(got, want, length=0.0, units=1.0):
    """Half a unit in the last place of the dtype, and 2^-20 of the pair (2^-21 for float32), which has room for float32
    arithmetic in between."""
    relative, tiny = UNITS[got.dtype]
    angle = 2.0**-21 if got.dtype == torch.float32 else 2.0**-20
    bound = units * np.abs(want) * relative * (1 + 2.0**-9) + tiny + angle * np.maximum(length, np.abs(want) * 0.5)
    error = np.abs(float64(got) - want)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else None
    assert (error <= bound).all(), f"at {worst}: got {float64(got)[worst]}, want {want[worst]}, bound {bound[worst]}"
