"""What norm and rotation cost inside whole layers, and what is left of that with Ropewalk.

    python bench/engines.py [--seconds 180] [--models NAME,..] [--modes eager,graph,compile] [--json F] [--markdown F]
    python bench/engines.py --device cpu --tiny        the same in small, to try the program

Layers of the shapes of Qwen3-8B, Llama-3.1-8B, Phi-4 and OLMo 2 7B (four, random weights, bfloat16): a decode step of
1, 16, 64 and 256 sequences, each with 1,024 tokens in its cache, and a prefill of 4,096 tokens. They are transformers'
own, if it can be imported, else (but OLMo's) the same in plain torch, written here; the results say which. Attention
blocks like Flux's (512 tokens of text, 4,096 of image) and Wan's (32,760 and 75,600 tokens) are always written here.

Contenders, which share their weights and take turns: "stock" is what transformers or diffusers does; "ropewalk" has
Ropewalk in its place (`ropewalk.transformers.patch`, or `rope_`); "store" stores k and v in the same launch, too (plain
torch, decode); "left out" has no norm of q and k and no rotation: the most that can be won. The share is what a
contender takes beyond that. Modes: eager, by the clock; graph: that captured in a CUDA graph; compile: one layer by
torch.compile, by the clock and captured. Each contender's output is compared with stock's before it is timed. A number
is the median of several rounds, in microseconds a layer; the peak of memory is that of a step beyond what was there
before.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import copy
import datetime
import gc
import inspect
import json
import statistics
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ropewalk
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

try:
    import transformers
except ImportError:
    transformers = None

MODES = ("eager", "graph", "compile")
TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}  # of the largest element, after a layer of rounding


class Shape(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    q_heads: int
    k_heads: int
    head_dim: int
    norm: bool
    theta: float
    kind: str  # transformers' class


SHAPES = [
    Shape("Qwen3-8B", 4096, 12288, 32, 8, 128, True, 1e6, "Qwen3"),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, False, 5e5, "Llama"),
    Shape("Phi-4", 5120, 17920, 40, 10, 128, False, 2.5e5, "Phi3"),
    Shape("OLMo-2-7B", 4096, 11008, 32, 32, 128, True, 5e5, "Olmo2"),  # its norms are over all heads
]


class Sizes(NamedTuple):
    layers: int
    sequences: tuple[int, ...]
    context: int
    prefill: int
    flux: tuple[int, int, int, int]  # heads, head_dim, tokens of text and of image
    wan: tuple[int, int, tuple[tuple[int, int, int], ...]]  # heads, head_dim, frames x rows x columns


WHOLE = Sizes(4, (1, 16, 64, 256), 1024, 4096, (24, 128, 512, 4096), (40, 128, ((21, 30, 52), (21, 45, 80))))
TINY = Sizes(2, (1, 3), 16, 12, (2, 32, 5, 8), (2, 36, ((2, 3, 4),)))


def tiny(shape: Shape) -> Shape:
    return shape._replace(hidden=64, intermediate=96, q_heads=4, k_heads=2, head_dim=32)


@dataclass
class Case:
    """One step of some layers, by several contenders."""

    model: str
    step: str
    source: str
    layers: int
    steps: dict[str, Callable[[], Any]]  # all layers
    singles: dict[str, Callable[[], Any]] = field(default_factory=dict)  # one of them, to be compiled


# ---------------------------------------------------------------------------------------------------------------------
# Layers of language models


class Cache:
    """Keys and values of one layer, all of its context full but for the last place, where the new token goes."""

    def __init__(self, shape: Shape, sequences: int, context: int, like: dict[str, Any]) -> None:
        size = (sequences, shape.k_heads, context, shape.head_dim)
        self.k, self.v = torch.randn(size, **like), torch.randn(size, **like)
        self.place = torch.tensor([context - 1], device=like["device"])
        self.slots = (torch.arange(sequences, device=like["device"]) * context + context - 1)[:, None]

    def update(self, k: Any, v: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.k.index_copy_(2, self.place, k)
        self.v.index_copy_(2, self.place, v)
        return self.k, self.v


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = eps

    def forward(self, x: Any) -> Any:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate_half(x: Any) -> Any:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Layer(nn.Module):
    """A decoder layer as transformers has it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q, k = shape.q_heads * shape.head_dim, shape.k_heads * shape.head_dim
        self.before, self.after = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.q, self.k, self.v = (nn.Linear(shape.hidden, width, bias=False) for width in (q, k, k))
        self.o = nn.Linear(q, shape.hidden, bias=False)
        self.gate, self.up = (nn.Linear(shape.hidden, shape.intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)
        if shape.norm:
            self.q_norm, self.k_norm = RMSNorm(shape.head_dim), RMSNorm(shape.head_dim)

    def forward(self, x: Any, way: str, positions: Any, tables: Any, frequencies: Any, cache: Any) -> Any:
        y = self.before(x)
        q, k, v = (each(y).unflatten(-1, (-1, self.shape.head_dim)) for each in (self.q, self.k, self.v))
        norms: dict[str, Any] = {}
        if self.shape.norm:
            norms = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps}
        if way == "stock":
            if norms:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            cos, sin = (table.unsqueeze(1) for table in tables)
            q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        else:
            if way == "ropewalk":
                ropewalk.rope_(q, k, positions=positions, frequencies=frequencies, **norms)
            elif way == "store":
                stores = {"v": v, "k_cache": cache.k.transpose(1, 2), "v_cache": cache.v.transpose(1, 2)}
                ropewalk.rope_(q, k, positions=positions, frequencies=frequencies, slots=cache.slots,
                               k_store_only=True, **stores, **norms)  # fmt: skip
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = v.transpose(1, 2)
        if way == "store":
            k, v = cache.k, cache.v
        elif cache is not None:
            k, v = cache.update(k, v)
        y = scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def of_plain_torch(shape: Shape, sizes: Sizes, like: dict[str, Any]) -> Callable[[Any, Any, Any], Any]:
    layers = [made(lambda: Layer(shape), like) for _ in range(sizes.layers)]
    frequencies = ropewalk.Frequencies(theta=shape.theta, rotary_dim=shape.head_dim)
    inv_freq = torch.tensor(list(frequencies.inv_freq), dtype=torch.float64, device=like["device"])

    def contenders(x: Any, positions: Any, caches: Any) -> dict[str, list[Callable[[Any], Any]]]:
        angles = torch.cat((positions[..., None] * inv_freq,) * 2, -1)
        tables = angles.cos().to(like["dtype"]), angles.sin().to(like["dtype"])

        def layer(i: int, way: str) -> Callable[[Any], Any]:
            return lambda x: layers[i](x, way, positions, tables, frequencies, caches and caches[i])

        ways = ("stock", "ropewalk", "store", "left out") if caches else ("stock", "ropewalk", "left out")
        return {way: [layer(i, way) for i in range(sizes.layers)] for way in ways}

    return contenders


def made(make: Callable[[], nn.Module], like: dict[str, Any]) -> Any:
    """With random weights, on the device. Buffers keep their dtype, as when a model is loaded."""
    with torch.device(like["device"]):
        module = make().eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        weight.data = weight.data.to(like["dtype"])
        if weight.ndim > 1:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
        elif "norm" in name:
            weight.uniform_(0.5, 1.5)
    return module


def of_transformers(shape: Shape, sizes: Sizes, like: dict[str, Any]) -> Callable[[Any, Any, Any], Any]:
    import ropewalk.transformers  # noqa: PLC0415

    config = getattr(transformers, f"{shape.kind}Config")(
        vocab_size=256, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=sizes.layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.k_heads, head_dim=shape.head_dim,
        max_position_embeddings=8192, pad_token_id=0, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    stock = made(lambda: getattr(transformers, f"{shape.kind}Model")(config), like)

    def another() -> Any:
        return copy.deepcopy(stock, {id(weight): weight for weight in stock.parameters()})

    ours, without = another(), another()
    served = ropewalk.transformers.patch(ours)
    if served.layers != sizes.layers or served.fused_norms != (sizes.layers if shape.norm else 0):
        raise SystemExit(f"{shape.name}: {served}")
    for each in without.layers:
        leave_out(each.self_attn, shape.norm)
    models = {"stock": stock, "ropewalk": ours, "left out": without}

    def contenders(x: Any, positions: Any, caches: Any) -> dict[str, list[Callable[[Any], Any]]]:
        def layer(way: str, i: int, tables: Any) -> Callable[[Any], Any]:
            options = {"position_embeddings": tables, "attention_mask": None, "position_ids": positions}

            def run(x: Any) -> Any:
                result = models[way].layers[i](x, past_key_values=caches and caches[i], **options)
                return result[0] if isinstance(result, tuple) else result

            return run

        # Once a step, for all layers.
        tables = {way: model.rotary_emb(x, positions) for way, model in models.items()}
        return {way: [layer(way, i, tables[way]) for i in range(sizes.layers)] for way in models}

    return contenders


def leave_out(attention: Any, norm: bool) -> None:
    """Has a layer of transformers do neither."""
    function = inspect.unwrap(type(attention).forward)
    nothing = {"apply_rotary_pos_emb": lambda q, k, *others, **options: (q, k)}
    forward = types.FunctionType(function.__code__, {**function.__globals__, **nothing}, function.__name__,
                                 function.__defaults__, function.__closure__)  # fmt: skip
    forward.__kwdefaults__ = function.__kwdefaults__
    attention.forward = types.MethodType(forward, attention)
    if norm:
        attention.q_norm = attention.k_norm = nn.Identity()


def language_models(sizes: Sizes, shapes: list[Shape], like: dict[str, Any]) -> Iterator[Case]:
    source = f"transformers {transformers.__version__}" if transformers else "plain torch"
    for shape in shapes:
        if shape.kind == "Olmo2" and not transformers:
            continue  # plain torch's layer has norms of heads
        contenders = (of_transformers if transformers else of_plain_torch)(shape, sizes, like)
        for sequences in (*sizes.sequences, 0):
            tokens = 1 if sequences else sizes.prefill
            x = torch.randn(sequences or 1, tokens, shape.hidden, **like)
            positions = torch.arange(tokens, device=like["device"]).expand(sequences or 1, tokens)
            caches = None
            if sequences:
                positions = positions + sizes.context - 1
                caches = [Cache(shape, sequences, sizes.context, like) for _ in range(sizes.layers)]
            ways = contenders(x, positions, caches)
            step = f"decode, {sequences} sequence{'s' * (sequences > 1)}" if sequences else f"prefill, {tokens} tokens"
            yield Case(
                shape.name, step, source, sizes.layers,
                {way: chain(layers, x) for way, layers in ways.items()},
                {way: chain(layers[:1], x) for way, layers in ways.items()},
            )  # fmt: skip


def chain(layers: list[Callable[[Any], Any]], x: Any) -> Callable[[], Any]:
    def step() -> Any:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Attention blocks of diffusion models


def even_rotated(x: Any, cos: Any, sin: Any) -> Any:
    """diffusers' rotation of neighbours, in float32; tables have each entry twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-imaginary, real), -1).flatten(-2)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def grid(*sizes: int, device: Any) -> Any:
    """The coordinates of each token, a row for each axis."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij")).flatten(1)


def axis_frequencies(widths: tuple[int, ...], copies: int = 1) -> Any:
    """One rule for each axis; of several heads side by side as one, if copies are asked for."""
    inv_freq = [1e4 ** (-2 * i / width) for width in widths for i in range(width // 2)]
    axes = [axis for axis, width in enumerate(widths) for _ in range(width // 2)]
    return inv_freq, axes, ropewalk.Frequencies.from_array(inv_freq * copies, axes=axes * copies)


def doubled_tables(inv_freq: list[float], axes: list[int], positions: Any) -> tuple[Any, Any]:
    like = {"device": positions.device}
    angles = positions[torch.tensor(axes, **like)].T * torch.tensor(inv_freq, dtype=torch.float64, **like)
    angles = angles.repeat_interleave(2, -1)
    return angles.cos().float(), angles.sin().float()


class Flux(nn.Module):
    """The joint attention of a double block: two streams, each with projections and norms of its own."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.width = heads, heads * head_dim
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(self.width, self.width) for _ in "qkv") for _ in range(2))
        self.norms = nn.ModuleList(nn.ModuleList(RMSNorm(head_dim) for _ in "qk") for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(2))

    def forward(self, way: str, streams: Any, positions: Any, tables: Any, frequencies: Any) -> Any:
        parts = [
            [each(x).unflatten(-1, (self.heads, -1)) for each in qkv] for x, qkv in zip(streams, self.qkv, strict=True)
        ]
        text = streams[0].shape[1]
        if way == "ropewalk":  # into the joint tensors: no cat of q and k
            batch, image = streams[1].shape[:2]
            q, k = (streams[0].new_empty(batch, text + image, self.heads, parts[0][0].shape[-1]) for _ in "qk")
            v = cat(parts, 2)
            for part, place, norms in zip(parts, (slice(text), slice(text, None)), self.norms, strict=True):
                ropewalk.rope_(
                    part[0], part[1], q_out=q[:, place], k_out=k[:, place], positions=positions[:, :, place],
                    frequencies=frequencies, pairing="interleaved", q_weight=norms[0].weight, k_weight=norms[1].weight,
                    eps=norms[0].eps,
                )  # fmt: skip
        else:
            if way == "stock":
                parts = [[n[0](p[0]), n[1](p[1]), p[2]] for n, p in zip(self.norms, parts, strict=True)]
            q, k, v = (cat(parts, i) for i in range(3))
            if way == "stock":
                cos, sin = (table[None, :, None] for table in tables)
                q, k = even_rotated(q, cos, sin), even_rotated(k, cos, sin)
        y = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = y.transpose(1, 2).flatten(2)
        return torch.cat([self.out[0](y[:, :text]), self.out[1](y[:, text:])], 1)


def cat(parts: Any, i: int) -> Any:
    return torch.cat([part[i] for part in parts], 1)


class Wan(nn.Module):
    """Self-attention with norms across all heads: for Ropewalk all heads of a token are one wide head."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.width = heads, heads * head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(self.width, self.width) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(self.width), RMSNorm(self.width)

    def forward(self, way: str, x: Any, positions: Any, tables: Any, frequencies: Any) -> Any:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if way == "stock":
            q, k = self.q_norm(q), self.k_norm(k)
        elif way == "ropewalk":
            ropewalk.rope_(q.unsqueeze(2), k.unsqueeze(2), positions=positions, frequencies=frequencies,
                           pairing="interleaved", q_weight=self.q_norm.weight, k_weight=self.k_norm.weight,
                           eps=self.q_norm.eps)  # fmt: skip
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in (q, k, v))
        if way == "stock":
            q, k = self.rotated(q, *tables), self.rotated(k, *tables)
        y = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(y.transpose(1, 2).flatten(2))

    @staticmethod
    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = first * cos - second * sin
        out[..., 1::2] = first * sin + second * cos
        return out


def diffusion_models(sizes: Sizes, names: set[str], like: dict[str, Any]) -> Iterator[Case]:
    device = like["device"]
    if "Flux" in names:
        heads, head_dim, text, image = sizes.flux
        side = int(image**0.5)
        first = head_dim // 8
        widths = (first, (head_dim - first) // 2, (head_dim - first) // 2)
        places = torch.cat((torch.zeros(1, image, dtype=torch.int64, device=device),
                            grid(side, image // side, device=device)))  # fmt: skip
        positions = torch.cat((torch.zeros(3, text, dtype=torch.int64, device=device), places), 1)
        inv_freq, axes, frequencies = axis_frequencies(widths)
        streams = [torch.randn(1, n, heads * head_dim, **like) for n in (text, image)]
        block = made(lambda: Flux(heads, head_dim), like)
        yield block_case("Flux", f"{text} + {image} tokens", block, streams, positions,
                         doubled_tables(inv_freq, axes, positions), frequencies)  # fmt: skip
    if "Wan" in names:
        heads, head_dim, videos = sizes.wan
        third = head_dim // 3 // 2 * 2
        block = made(lambda: Wan(heads, head_dim), like)
        inv_freq, axes, frequencies = axis_frequencies((head_dim - 2 * third, third, third), heads)
        for video in videos:
            positions = grid(*video, device=device)
            x = torch.randn(1, positions.shape[1], heads * head_dim, **like)
            yield block_case("Wan", f"{positions.shape[1]} tokens", block, x, positions,
                             doubled_tables(inv_freq, axes, positions), frequencies)  # fmt: skip


def block_case(name: str, step: str, block: Any, x: Any, positions: Any, tables: Any, frequencies: Any) -> Case:
    def way(name: str) -> Callable[[], Any]:
        return lambda: block(name, x, positions[:, None], tables, frequencies)

    steps = {name: way(name) for name in ("stock", "ropewalk", "left out")}
    return Case(name, step, "plain torch", 1, steps, steps)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(steps: dict[str, Callable[[], Any]], device: str, seconds: float, rounds: int = 7) -> dict[str, float]:
    """Microseconds of each, by the clock: they take turns."""
    counts = {}
    for name, step in steps.items():
        step()
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        once = time.perf_counter() - begin
        counts[name] = max(1, min(200, int(seconds / rounds / len(steps) / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(counts[name]):
                step()
            synchronize(device)
            found[name].append((time.perf_counter() - begin) / counts[name] * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def peaks(steps: dict[str, Callable[[], Any]], device: str) -> dict[str, float] | None:
    """MB that a step takes beyond what was there."""
    if device != "cuda":
        return None
    found = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


class WrongResultError(Exception):
    pass


def check(case: Case) -> float:
    """The largest difference from stock, as a share of the largest element."""
    want = case.steps["stock"]().float()
    apart = 0.0
    for name in case.steps.keys() - {"stock", "left out"}:
        got = case.steps[name]()
        apart = max(apart, float((got.float() - want).abs().max() / want.abs().max()))
        if not apart <= TOLERANCE[got.dtype]:
            raise WrongResultError(f"{name} differs from stock by {apart:.3g} of the largest element")
    return apart


def row(case: Case, mode: str, layers: int, times: dict[str, float], more: dict[str, Any]) -> dict[str, Any]:
    each = {name: time / layers for name, time in times.items()}
    share = {name: 1 - each["left out"] / value for name, value in each.items() if name != "left out"}
    return {
        "model": case.model,
        "step": case.step,
        "source": case.source,
        "mode": mode,
        "us": each,
        "share": share,
        **more,
    }


def measured(case: Case, modes: list[str], device: str, backend: str, seconds: float) -> Iterator[dict[str, Any]]:
    more = {"apart": check(case), "peak_mb": peaks(case.steps, device)}
    if "eager" in modes:
        yield row(case, "eager", case.layers, timed(case.steps, device, seconds), more)
    if "graph" in modes:
        graphs = {name: captured(step) for name, step in case.steps.items()}
        yield row(case, "graph", case.layers, timed(graphs, device, seconds), more)
        del graphs


def compiled(case: Case, modes: list[str], device: str, backend: str, seconds: float) -> Iterator[dict[str, Any]]:
    torch.compiler.reset()
    steps: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, step in case.singles.items():
        one = torch.compile(step, backend=backend, dynamic=False)
        try:
            one()
            steps[name] = one
        except RuntimeError as error:  # Dynamo's own: the others still count
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    yield row(case, "compile", 1, timed(steps, device, seconds), {"failed": failed})
    if "graph" in modes:
        graphs = {name: captured(step) for name, step in steps.items()}
        yield row(case, "compile + graph", 1, timed(graphs, device, seconds), {})
        del graphs


def cases(arguments: argparse.Namespace, like: dict[str, Any]) -> Iterator[Case]:
    sizes = TINY if arguments.tiny else WHOLE
    names = set(arguments.models.split(","))
    shapes = [tiny(shape) if arguments.tiny else shape for shape in SHAPES if shape.name in names]
    yield from language_models(sizes, shapes, like)
    yield from diffusion_models(sizes, names, like)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device, modes = arguments.device, arguments.modes.split(",")
    like: dict[str, Any] = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    until = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    wrong: list[str] = []
    # What takes long comes last: compiling.
    for function in (measured, compiled) if "compile" in modes else (measured,):
        if function is measured and not {"eager", "graph"} & set(modes):
            continue
        for case in cases(arguments, like):
            name = f"{case.model}, {case.step}, {'compile' if function is compiled else 'eager and graph'}"
            if time.monotonic() > until:
                left.append(name)
                print(f"no time for {name}", flush=True)
                continue
            try:
                for each in function(case, modes, device, arguments.backend, arguments.cell_seconds):
                    rows.append(each)
                    left += [f"{name}, {way}: {error}" for way, error in each.get("failed", {}).items()]
                    print(line(each), flush=True)
            except WrongResultError as error:
                wrong.append(f"{case.model}, {case.step}: {error}")
                print(wrong[-1], flush=True)
            except (RuntimeError, TypeError, ValueError) as error:  # of memory, of a capture: the others still count
                left.append(f"{name}: {type(error).__name__}: {str(error).strip()[:200]}")
                print(left[-1], flush=True)
            gc.collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers and transformers.__version__,
        "ropewalk": ropewalk.__version__,
        "dtype": str(like["dtype"]).removeprefix("torch."),
        "tiny": arguments.tiny,
        "rows": rows,
        "left": left,
        "wrong": wrong,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Telling

COLUMNS = ["model", "step", "mode", "stock us", "ropewalk us", "store us", "left out us", "share before", "share after",
           "stock / ropewalk", "peak MB, stock", "ropewalk"]  # fmt: skip


def texts(each: dict[str, Any]) -> list[str]:
    us, share, peak = each["us"], each["share"], each.get("peak_mb") or {}
    numbers = [f"{us[name]:.1f}" if name in us else "" for name in ("stock", "ropewalk", "store", "left out")]
    shares = [f"{100 * share[name]:.1f} %" if name in share else "" for name in ("stock", "ropewalk")]
    faster = f"{us['stock'] / us['ropewalk']:.2f}" if "ropewalk" in us else ""
    memory = [f"{peak[name]:.1f}" if peak else "" for name in ("stock", "ropewalk")]
    return [each["model"], each["step"], each["mode"], *numbers, *shares, faster, *memory]


def line(each: dict[str, Any]) -> str:
    return "  ".join(text for text in texts(each) if text)


def markdown(found: dict[str, Any]) -> str:
    sources = ", ".join(sorted({each["source"] for each in found["rows"]}))
    lines = [
        f"{found['device']}, {found['date']}, torch {found['torch']}, Ropewalk {found['ropewalk']}, {found['dtype']}; "
        f"layers of {sources}. Microseconds a layer; the share is what norm and rotation take of it.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(texts(each))} |" for each in found["rows"]),
    ]
    others = [f"Not measured: {name}." for name in found["left"]] + [f"Wrong: {name}." for name in found["wrong"]]
    return "\n".join([*lines, *([""] if others else []), *others]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES] + ["Flux", "Wan"]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small layers")
    parser.add_argument("--seconds", type=float, default=180.0, help="no step is begun after so many (180)")
    parser.add_argument("--cell-seconds", type=float, default=0.5, help="of each row (0.5)")
    parser.add_argument("--models", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--modes", help="some of eager, graph (CUDA), compile; all of them if not given")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--plain", action="store_true", help="plain torch's layers though transformers is there")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--markdown", type=Path, help="write a table there")
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or ",".join(
        mode for mode in MODES if arguments.device == "cuda" or mode != "graph"
    )
    for given, known in ((arguments.models, names), (arguments.modes, MODES)):
        wrong = set(given.split(",")) - set(known)
        if wrong:
            parser.error(f"must be some of {', '.join(known)}, but is {', '.join(sorted(wrong))}")
    if arguments.device == "cpu" and "graph" in arguments.modes.split(","):
        parser.error("graph needs CUDA")
    if arguments.plain:
        global transformers
        transformers = None
    with torch.no_grad():
        found = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found))
    if found["wrong"]:
        raise SystemExit(f"wrong results: {'; '.join(found['wrong'])}")
    if not found["rows"]:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
