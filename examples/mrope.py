"""Positions with three axes, as Qwen2.5-VL has them for text, images and video (mrope).

    python examples/mrope.py

A token has a position in time, in height and in width; a text token has the same in all three. Each pair of a head
turns by the position of its axis: of 64 pairs the first 16 by time, 24 by height, 24 by width. The configuration says
so, and `Frequencies.from_config` reads it. The last line is the largest difference to the plain formula.
"""

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import ropewalk

CONFIG = {
    "model_type": "qwen2_5_vl", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip


def positions_of(text_before: int, height: int, width: int, text_behind: int) -> np.ndarray:
    """[3, tokens]: text, one image of height x width patches, text that goes on behind the largest position."""
    before = np.tile(np.arange(text_before), (3, 1))
    rows, columns = np.divmod(np.arange(height * width), width)
    image = text_before + np.stack([np.zeros_like(rows), rows, columns])
    behind = np.tile(image.max() + 1 + np.arange(text_behind), (3, 1))
    return np.concatenate([before, image, behind], axis=1)


def main() -> None:
    frequencies = ropewalk.Frequencies.from_config(CONFIG)
    positions = positions_of(5, 4, 6, 3)
    tokens = positions.shape[1]
    generator = np.random.default_rng(0)
    q = generator.standard_normal((tokens, 28, 128), dtype=np.float32)
    k = generator.standard_normal((tokens, 4, 128), dtype=np.float32)
    q_out, k_out = ropewalk.rope(q, k, positions=positions, frequencies=frequencies)

    axis = np.repeat([0, 1, 2], CONFIG["rope_scaling"]["mrope_section"])  # of each pair
    angles = positions[axis].T * 1e6 ** (-np.arange(64) / 64)  # [tokens, pairs]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    worst = 0.0
    for x, out in ((q, q_out), (k, k_out)):
        first, second = x[..., :64].astype(np.float64), x[..., 64:].astype(np.float64)
        wanted = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        worst = max(worst, float(abs(out - wanted).max()))
    print(f"{tokens} tokens, positions of the last: {positions[:, -1].tolist()}")
    print(f"largest difference to the formula: {worst:.1e}")
    if worst > 1e-5:
        raise SystemExit("mrope: the results differ")


if __name__ == "__main__":
    main()
