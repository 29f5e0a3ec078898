"""A decode loop: each step norms and rotates q and k of a new token and stores k and v in a paged cache, in one call.

    python examples/decode.py [--steps N] [--requests N]

On an NVIDIA GPU the step is captured in a CUDA graph once and replayed; what changes from step to step lies in tensors
that the graph reads: the row of q, k and v, positions and slots. `prepare` before the capture compiles the kernel, as
nothing may be compiled or loaded within one. Without a GPU the same loop runs on the CPU. At the end the cache is
compared with keys that torch normed and rotated.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import time

import ropewalk
import torch

Q_HEADS, K_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
EPS, THETA = 1e-6, 1e6


def reference(k: torch.Tensor, weight: torch.Tensor, position: int) -> torch.Tensor:
    """k [requests, heads, head_dim] normed and rotated, in float64."""
    x = k.double()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
    angle = position * THETA ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=k.device) / (HEAD_DIM // 2))
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    pages = -(-options.steps // PAGE)  # of a request, which has its own
    kept = {"dtype": torch.bfloat16, "device": device}
    row = torch.empty(options.requests, (Q_HEADS + 2 * K_HEADS) * HEAD_DIM, **kept)
    q, k, v = (
        x.unflatten(-1, (-1, HEAD_DIM)) for x in row.split([n * HEAD_DIM for n in (Q_HEADS, K_HEADS, K_HEADS)], -1)
    )
    k_cache, v_cache = (torch.zeros(options.requests * pages, PAGE, K_HEADS, HEAD_DIM, **kept) for _ in range(2))
    weight = 1 + torch.randn(HEAD_DIM, **kept) / 16
    first = torch.arange(options.requests, device=device) * pages * PAGE  # slot of each request's first token
    positions, slots = torch.zeros_like(first), first.clone()
    arguments = {
        "positions": positions, "frequencies": ropewalk.Frequencies(theta=THETA, rotary_dim=HEAD_DIM),
        "q_weight": weight, "k_weight": weight, "eps": EPS,
        "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots,
    }  # fmt: skip

    def step() -> None:
        ropewalk.rope_(q, k, **arguments)

    run = step
    if device == "cuda":
        ropewalk.prepare(q, k, **arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay

    rows = torch.randn(options.steps, *row.shape, **kept)  # what a model's projections would give
    start = time.perf_counter()
    for number in range(options.steps):
        row.copy_(rows[number])
        positions.fill_(number)
        torch.add(first, number, out=slots)
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - start

    worst = 0.0
    flat = k_cache.view(-1, K_HEADS, HEAD_DIM)
    for number in range(options.steps):
        keys = rows[number, :, Q_HEADS * HEAD_DIM : (Q_HEADS + K_HEADS) * HEAD_DIM].unflatten(-1, (-1, HEAD_DIM))
        wanted = reference(keys, weight, number)
        worst = max(worst, float(((flat[first + number].double() - wanted).abs() / wanted.abs().clamp(min=0.5)).max()))
    how = "a CUDA graph" if device == "cuda" else "calls on the CPU"
    print(f"{options.steps} steps of {options.requests} requests by {how}: {spent / options.steps * 1e6:.0f} us a step")
    print(f"largest difference of the stored keys: {worst:.1e}; rounding alone makes {2**-8:.1e}")
    if worst > 2**-8 * 1.02:
        raise SystemExit("decode: the stored keys differ")


if __name__ == "__main__":
    main()
