"""Who is timed by bench/gpu_compare.py and bench/gpu_sweep.py: Ropewalk, the floor, torch, and the peers installed.
Each makes, of a buffer's number, a call on that buffer."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gpu_floor
import gpu_problem
import ropewalk
import torch
from gpu_problem import (
    EPS,
    OPS,
    PAIRINGS,
    SOL_OP,
    SOL_THETA,
    THETA,
    Problem,
    Shape,
    cache_dtype,
    exact_angles,
    reference,
    relative_error,
)

OUR_BOUND = 2.0**-8 * 1.02


@dataclass(eq=False)
class Contender:
    name: str
    op: str
    pairing: str  # "" for floors
    make: Callable[[int], Callable[[], Any]]  # of a buffer's number
    angles: str = ""
    bound: float = 6 * 2.0**-8  # of the error; peers round tables and products to bfloat16
    checked: bool = True
    cheap: bool = True  # one kernel, that is: may be captured often
    bytes: int = 0
    detail: str = ""
    shape: str = ""  # of our kernel
    error: float | None = None
    us: float | None = None
    failure: str = ""
    result: Callable[[Any], tuple[torch.Tensor, ...]] | None = None  # q, k and maybe v, of what the call returns
    verify: Callable[[], tuple[float, str]] | None = None  # instead: the error, and what else is wrong
    graph: Any = None
    calls: int = 0
    samples: list[float] = field(default_factory=list)


def our_arguments(
    problem: Problem, op: str, pairing: str, angles: str, index: int = 0, positions: torch.dtype = torch.int32
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """q and k and the options of `ropewalk.rope_`."""
    q, k, v = problem.heads(problem.packed[index])
    options: dict[str, Any] = {"positions": problem.positions_of(positions), "pairing": pairing}
    if angles == "frequencies":
        options["frequencies"] = problem.frequencies
    else:
        options["cos_sin"] = problem.cos_sin
    if op.startswith("norm"):
        options |= {"q_weight": problem.weights[0], "k_weight": problem.weights[1], "eps": EPS}
    if "+kv" in op:
        k_cache, v_cache = problem.cache(index, cache_dtype(op))
        options |= {"v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": problem.slots}
        if "fp8" in op:
            options |= {"k_scale": 1.0, "v_scale": 1.0}
        if "k only" in op:
            options["k_store_only"] = True
    return (q, k), options


def ours(problem: Problem, op: str, pairing: str, angles: str, positions: torch.dtype = torch.int32) -> Contender:
    def make(index: int) -> Callable[[], Any]:
        (q, k), options = our_arguments(problem, op, pairing, angles, index, positions)

        def call() -> None:
            ropewalk.rope_(q, k, **options)

        return call

    told: dict[str, str] = {}
    try:
        tensors, options = our_arguments(problem, op, pairing, angles, positions=positions)
        told = ropewalk.explain(*tensors, **options)
    except (RuntimeError, ValueError) as error:
        told["kernel"] = str(error)
    return Contender("ropewalk", op, pairing, make, angles, OUR_BOUND, bytes=problem.bytes(op),
                     detail=told.get("kernel", ""), shape=told.get("shape", ""))  # fmt: skip


class Sol:
    """The tensors of SOL-ExecBench L1_018 in the memory of a problem: q, k and v [batch, heads, tokens, 128], q and k
    written to tensors of their own, caches [batch, 8, 262144, 128], each buffer's tokens at another place there."""

    def __init__(self, problem: Problem) -> None:
        s = problem.shape
        self.problem = problem
        self.batch, self.tokens, self.past = gpu_problem.SOL_WORKLOADS[list(gpu_problem.SOL).index(s.name)]
        self.outs = torch.empty_like(problem.packed)
        self.caches = [
            torch.zeros(
                self.batch,
                s.k_heads,
                gpu_problem.SOL_CACHE,
                s.head_dim,
                dtype=torch.bfloat16,
                device=gpu_problem.DEVICE,
            )
            for _ in range(2)
        ]
        self.frequencies = ropewalk.Frequencies(theta=SOL_THETA, rotary_dim=s.rotary_dim)
        self.floor_slots = torch.arange(s.tokens, device=gpu_problem.DEVICE)

    def heads(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v [batch, heads, tokens, head_dim], one behind the other."""
        s = self.problem.shape
        parts = memory.view(-1).split([s.tokens * n * s.head_dim for n in (s.q_heads, s.k_heads, s.v_heads)])
        return [part.view(self.batch, -1, self.tokens, s.head_dim) for part in parts]

    def first_position(self, index: int) -> int:
        return (self.past + index * self.tokens) % (gpu_problem.SOL_CACHE - self.tokens)

    def ours(self) -> Contender:
        def make(index: int) -> Callable[[], Any]:
            q, k, v = (x.transpose(1, 2) for x in self.heads(self.problem.packed[index]))
            q_out, k_out, _ = (x.transpose(1, 2) for x in self.heads(self.outs[index]))
            k_cache, v_cache = (cache.transpose(1, 2) for cache in self.caches)
            first = self.first_position(index)
            positions = torch.arange(first, first + self.tokens, device=gpu_problem.DEVICE)
            slots = torch.arange(self.batch, device=gpu_problem.DEVICE)[:, None] * gpu_problem.SOL_CACHE + positions
            options = {
                "positions": positions, "frequencies": self.frequencies, "q_weight": self.problem.weights[0],
                "k_weight": self.problem.weights[1], "eps": EPS, "q_out": q_out, "k_out": k_out, "v": v,
                "k_cache": k_cache, "v_cache": v_cache, "slots": slots,
            }  # fmt: skip

            def call() -> None:
                ropewalk.rope_(q, k, **options)

            return call

        moved = self.problem.bytes("norm+rope+kv bf16")
        return Contender("ropewalk", SOL_OP, "neox", make, "frequencies", OUR_BOUND, bytes=moved, verify=self.verify)

    def verify(self) -> tuple[float, str]:
        """After a call on the first buffer: the largest error, and what else is wrong."""
        first = self.first_position(0)
        angles = exact_angles(range(first, first + self.tokens), self.problem.shape.rotary_dim, SOL_THETA).to(
            gpu_problem.DEVICE
        )
        original, written, worst = self.heads(self.problem.first), self.heads(self.outs[0]), 0.0
        for b in range(self.batch):
            for x, out, weight in zip(original, written, self.problem.weights, strict=False):
                want = reference(x[b].transpose(0, 1), angles, "neox", weight, self.problem.exact)
                worst = max(worst, relative_error(out[b].transpose(0, 1), want))
        stored = [cache[:, :, first : first + self.tokens] for cache in self.caches]
        if not (torch.equal(stored[0], written[1]) and torch.equal(stored[1], original[2])):
            return worst, "wrong: the caches do not hold k and v"
        if not torch.equal(self.problem.packed[0], self.problem.first):
            return worst, "wrong: q, k or v was changed"
        return worst, ""

    def floor_pointers(self, index: int) -> dict[str, int]:
        """The same memory, a row for each token."""
        s = self.problem.shape
        place = index * s.tokens % (self.batch * gpu_problem.SOL_CACHE - s.tokens + 1)
        k_cache, v_cache = (cache.view(-1)[place * s.k_heads * s.head_dim :] for cache in self.caches)
        named = {"slots": self.floor_slots, "cache1": k_cache, "cache2": v_cache}
        for i in range(3):
            named[f"rows{i}"] = self.heads(self.problem.packed[index])[i]
            named[f"out{i}"] = self.heads(self.outs[index])[i]
        return {name: tensor.data_ptr() for name, tensor in named.items()}

    def floor_right(self) -> bool:
        flipped = [x.view(torch.int16) ^ -0x8000 for x in self.heads(self.problem.first)]
        outs = [x.view(torch.int16) for x in self.heads(self.outs[0])]
        caches = [cache.view(-1)[: flipped[1].numel()].view(torch.int16) for cache in self.caches]
        return all(
            torch.equal(got, want.view(got.shape))
            for got, want in zip([*outs[:2], *caches], [*flipped[:2], *flipped[1:]], strict=True)
        )


def floor_rows(s: Shape, op: str) -> gpu_floor.Rows:
    if op == SOL_OP:
        return gpu_floor.Rows(tokens=s.tokens, heads=(s.q_heads, s.k_heads, s.v_heads), head_dim=s.head_dim,
                              few=not s.cold, cache="same", slots=s.tokens, apart=True, out_of_place=True)  # fmt: skip
    store = "+kv" in op
    return gpu_floor.Rows(
        tokens=s.tokens, heads=(s.q_heads, s.k_heads, s.v_heads), head_dim=s.head_dim, few=not s.cold,
        rotary_dim=s.rotary_dim if op == "rope" and s.rotary_dim != s.head_dim else 0,
        cache=("fp8" if "fp8" in op else "same") if store else "", slots=s.slots if store else 0,
        k_store_only="k only" in op)  # fmt: skip


def floors(problem: Problem, op: str, floor: gpu_floor.Floor) -> list[Contender]:
    """The floor's shapes for the bytes of an operation."""
    found = []
    for shape in floor.shapes:

        def make(index: int, shape: dict[str, Any] = shape) -> Callable[[], Any]:
            pointers = {"rows0": problem.packed[index].data_ptr(), "slots": problem.slots.data_ptr(),
                        "positions": problem.floor_positions.data_ptr(),
                        "weight": problem.floor_weight.data_ptr()}  # fmt: skip
            if op == SOL_OP:
                pointers |= problem.sol.floor_pointers(index)
            elif "+kv" in op:
                k_cache, v_cache = problem.cache(index, cache_dtype(op))
                pointers |= {"cache1": k_cache.data_ptr(), "cache2": v_cache.data_ptr()}
            return floor.call(shape, pointers, lambda: torch.cuda.current_stream().cuda_stream)

        found.append(Contender("floor", op, "", make, checked=False, bytes=floor.bytes, detail=shape["name"]))
    return found


def check_floor(problem: Problem, contender: Contender) -> None:
    """Runs the floor once: it must flip the sign of what is written back, and put the same into the caches."""
    s, op = problem.shape, contender.op
    try:
        problem.packed[0].copy_(problem.first)
        caches = problem.cache(0, cache_dtype(op)) if "+kv" in op and op != SOL_OP else ()
        for cache in caches:
            cache.zero_()
        contender.make(0)()
        torch.cuda.synchronize()
        if op == SOL_OP:
            if not problem.sol.floor_right():
                contender.failure = "wrong: it does not move the bytes of the operation"
            return
        flipped = problem.first.view(torch.int16) ^ -0x8000
        want = problem.first.view(torch.int16).clone()
        wanted, parts = problem.heads(want), problem.heads(flipped)
        dim = s.rotary_dim if op == "rope" else s.head_dim
        wanted[0][..., :dim] = parts[0][..., :dim]
        if "k only" not in op:
            wanted[1][..., :dim] = parts[1][..., :dim]
        right = torch.equal(problem.packed[0].view(torch.int16), want)
        for cache, part in zip(caches, parts[1:], strict=False):
            stored = (part >> 8).to(torch.int8) if "fp8" in op else part
            all_rows = torch.zeros(cache.shape, dtype=stored.dtype, device=gpu_problem.DEVICE)
            all_rows[problem.slots] = stored
            right = right and torch.equal(cache.view(stored.dtype), all_rows)
        if not right:
            contender.failure = "wrong: it does not move the bytes of the operation"
    except Exception as error:
        contender.failure = f"{type(error).__name__}: {error}"[:300]


def chain(op: str, pairing: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What a transformers model does between its projections and attention. q and k [tokens, heads, head_dim]; cos and
    sin [tokens, 1, rotary_dim], each there for both elements of its pair."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * wide.to(x.dtype)

    def other(x: torch.Tensor) -> torch.Tensor:
        if pairing == "neox":
            half = x.shape[-1] // 2
            return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = cos.shape[-1]
        if width == x.shape[-1]:
            return x * cos + other(x) * sin
        part = x[..., :width]
        return torch.cat((part * cos + other(part) * sin, x[..., width:]), dim=-1)

    def call(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if op == "norm+rope":
            q, k = norm(q, weights[0]), norm(k, weights[1])
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return call


def torchs(problem: Problem, compiled: bool) -> list[Contender]:
    found = []
    for op in OPS:
        for pairing in PAIRINGS:
            tables = [problem.angles.cos(), problem.angles.sin()]
            wide = [
                (torch.cat([t, t], -1) if pairing == "neox" else t.repeat_interleave(2, -1)).to(torch.bfloat16)[:, None]
                for t in tables
            ]
            body = chain(op, pairing)
            if compiled:
                body = torch.compile(body, dynamic=False, fullgraph=True)

            def make(index: int, body: Any = body, wide: Any = wide) -> Callable[[], Any]:
                q, k, _ = problem.heads(problem.packed[index])
                return lambda: body(q, k, *wide, *problem.weights)

            name = "torch.compile" if compiled else "torch eager"
            found.append(Contender(name, op, pairing, make, "table", cheap=compiled, result=lambda made: made))
    return found


def flashinfer(problem: Problem) -> list[Contender]:
    rope, found, s = importlib.import_module("flashinfer.rope"), [], problem.shape
    if s.rotary_dim // 2 % 8:  # it loads 16 bytes from each half, aligned or not, and the device faults
        print(f"FlashInfer: left out for {s.name}: halves of {s.rotary_dim // 2} elements", file=sys.stderr)
        return []
    for pairing in PAIRINGS:

        def with_positions(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = problem.heads(problem.packed[index])
            return lambda: rope.apply_rope_pos_ids_inplace(
                q, k, problem.positions, rotary_dim=s.rotary_dim, interleave=pairing == "interleaved", rope_theta=THETA
            )

        def with_table(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = (x.flatten(1) for x in problem.heads(problem.packed[index]))
            assert q.data_ptr() == problem.packed[index].data_ptr()
            return lambda: rope.apply_rope_with_cos_sin_cache_inplace(
                problem.positions, q, k, s.head_dim, problem.cos_sin, is_neox=pairing == "neox"
            )

        found.append(Contender("FlashInfer", "rope", pairing, with_positions, "frequencies"))
        found.append(Contender("FlashInfer", "rope", pairing, with_table, "table"))
    return found


def liger(problem: Problem) -> list[Contender]:
    """On q and k of their own, [1, tokens, heads, head_dim], as it would copy slices of packed rows."""
    function = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
    s = problem.shape
    if s.rotary_dim != s.head_dim:
        return []
    cos, sin = (torch.cat([t, t], -1).to(torch.bfloat16)[None] for t in (problem.angles.cos(), problem.angles.sin()))

    def make(index: int) -> Callable[[], Any]:
        flat, sizes = problem.packed[index].view(-1), [s.tokens * n * s.head_dim for n in (s.q_heads, s.k_heads)]
        first = [x.contiguous().view(1, s.tokens, -1, s.head_dim) for x in problem.heads(problem.first)[:2]]
        q, k = (x.view(1, s.tokens, -1, s.head_dim) for x in flat[: sum(sizes)].split(sizes))
        q.copy_(first[0])
        k.copy_(first[1])

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            new_q, new_k = function.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return new_q[0].transpose(0, 1), new_k[0].transpose(0, 1)

        return call

    return [Contender("Liger", "rope", "neox", make, "table", result=lambda made: made)]


def flash_attn(problem: Problem) -> list[Contender]:
    apply, found = importlib.import_module("flash_attn.ops.triton.rotary").apply_rotary, []
    cos, sin = problem.cos_sin.to(torch.bfloat16).chunk(2, -1)
    cos, sin = cos.contiguous(), sin.contiguous()
    for pairing in PAIRINGS:

        def make(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = (x[None] for x in problem.heads(problem.packed[index]))

            def call() -> None:
                apply(q, cos, sin, interleaved=pairing == "interleaved", inplace=True)
                apply(k, cos, sin, interleaved=pairing == "interleaved", inplace=True)

            return call

        found.append(Contender("flash-attn", "rope", pairing, make, "table"))
    return found


def sgl_kernel(problem: Problem) -> list[Contender]:
    module, found, s = importlib.import_module("sgl_kernel"), [], problem.shape
    for pairing in PAIRINGS:
        neox = pairing == "neox"

        def norm_rope(index: int, neox: bool = neox) -> Callable[[], Any]:
            packed = problem.packed[index]
            return lambda: module.fused_qk_norm_rope(
                packed, s.q_heads, s.k_heads, s.v_heads, s.head_dim, EPS, *problem.weights, THETA, neox,
                problem.positions, 1.0, 0.0, 0.0, 1.0, s.rotary_dim)  # fmt: skip

        def rope(index: int, neox: bool = neox) -> Callable[[], Any]:
            q, k, _ = (x.flatten(1) for x in problem.heads(problem.packed[index]))
            positions = problem.wide_positions
            return lambda: module.apply_rope_with_cos_sin_cache_inplace(
                positions, q, k, s.head_dim, problem.cos_sin, is_neox=neox)  # fmt: skip

        found.append(Contender("sgl_kernel", "norm+rope", pairing, norm_rope, "frequencies"))
        found.append(Contender("sgl_kernel", "rope", pairing, rope, "table"))
    return found


def vllm(problem: Problem) -> list[Contender]:
    operators, found, s = importlib.import_module("vllm._custom_ops"), [], problem.shape
    cache, positions = problem.cos_sin.to(torch.bfloat16), problem.wide_positions
    for pairing in PAIRINGS:

        def make(index: int, pairing: str = pairing) -> Callable[[], Any]:
            q, k, _ = problem.heads(problem.packed[index])
            return lambda: operators.rotary_embedding(positions, q, k, s.head_dim, cache, pairing == "neox")

        found.append(Contender("vLLM", "rope", pairing, make, "table"))
    return found


def cake(problem: Problem) -> list[Contender]:
    """FlashInfer's generated kernels for norm, rotation with a table and append to a paged cache. q goes to a tensor of
    its own, k to its cache alone; in the fp8 one q leaves as fp8 too, which moves fewer bytes than any call of ours."""
    s = problem.shape
    if (s.q_heads, s.k_heads) not in ((64, 8), (8, 1)) or s.head_dim != 128 or s.rotary_dim != 128:
        return []
    decode = s.tokens <= 256
    if not decode and s.tokens % 64:
        return []
    requests = s.tokens if decode else 4
    lengths = torch.arange(1, requests + 1, dtype=torch.int32, device=gpu_problem.DEVICE) * (s.tokens // requests)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32, device=gpu_problem.DEVICE), lengths])
    table, slots = problem.cos_sin, problem.slots
    pages = (slots[::16] // 16).to(torch.int32).expand(requests, -1).contiguous()
    if decode:
        # Each request writes the last row of a page of its own, so that nothing is left to clear. Row 16 i + 15 of the
        # table has the angles of position i.
        lengths = lengths * 16
        table = torch.zeros(16 * s.tokens, 128, device=gpu_problem.DEVICE)
        table[15::16] = problem.cos_sin
        pages = (
            torch.arange(requests, dtype=torch.int32, device=gpu_problem.DEVICE)[:, None]
            .expand(-1, requests)
            .contiguous()
        )
        slots = problem.wide_positions * 16 + 15
    weights = [weight.float() for weight in problem.weights]
    norm: dict[str, Any] = {"qk_norm_policy": 2, "q_norm_weight": weights[0], "k_norm_weight": weights[1], "eps": EPS}
    one, found = torch.ones(1, device=gpu_problem.DEVICE), []
    for fp8 in (False, True):
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        name = "cake_fused_qk_rope_fp8_append" if fp8 else "cake_fused_qk_rope_append"
        module = importlib.import_module(f"flashinfer.{name}")
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # caches by the buffer's number

        def make(index: int, fp8: bool = fp8, dtype: Any = dtype, module: Any = module, made: Any = made) -> Any:
            q_out = torch.empty(s.tokens, s.q_heads, 128, dtype=dtype, device=gpu_problem.DEVICE)
            if index not in made:
                shape = (max(s.slots // 16, requests), 16, s.k_heads, 128)
                made[index] = tuple(torch.zeros(shape, device=gpu_problem.DEVICE).to(dtype) for _ in range(2))
            caches, packed = made[index], problem.packed[index]
            if not fp8:
                return lambda: module.cake_fused_qk_rmsnorm_rope_append_paged_kv_cache(
                    packed, table, lengths, indptr, pages, *caches, num_q_heads=s.q_heads, num_kv_heads=s.k_heads,
                    out_q=q_out, clear_unused_last_page_rows=False, **norm)  # fmt: skip
            scale = torch.empty(0, device=gpu_problem.DEVICE)
            flag = torch.empty(requests, s.k_heads, dtype=torch.int32, device=gpu_problem.DEVICE)
            options = {key: value for key, value in norm.items() if key != "eps"}
            return lambda: module.cake_fused_qk_rmsnorm_rope_quantize_fp8_append_paged_kv_cache(
                packed, table, lengths, indptr, pages, caches, not decode, one, one, 2, s.tokens // requests,
                q_scale_inv=one, out_q=q_out, q_scale=scale, split_k_flag=flag, **options)[0]  # fmt: skip

        def result(q: torch.Tensor, made: Any = made) -> tuple[torch.Tensor, ...]:
            return q, *(cache.view(-1, s.k_heads, 128)[slots] for cache in made[0])

        op = "norm+rope+kv fp8, q fp8" if fp8 else "norm+rope+kv bf16, k only"
        bound = 2.0**-3 if fp8 else 6 * 2.0**-8
        moved = problem.bytes("norm+rope+kv fp8, k only") - s.tokens * s.q_heads * 128 if fp8 else 0
        found.append(Contender("FlashInfer cake", op, "neox", make, "table", bound, result=result, bytes=moved))
    return found


PEERS: dict[str, tuple[str, Callable[[Problem], list[Contender]]]] = {
    "FlashInfer": ("flashinfer-python", flashinfer),
    "FlashInfer cake": ("flashinfer-python", cake),
    "Liger": ("liger-kernel", liger),
    "flash-attn": ("flash-attn", flash_attn),
    "sgl_kernel": ("sgl-kernel", sgl_kernel),
    "vLLM": ("vllm", vllm),
}
MODULES = {"FlashInfer": "flashinfer.rope", "FlashInfer cake": "flashinfer.cake_fused_qk_rope_append",
           "Liger": "liger_kernel.ops.rope", "vLLM": "vllm._custom_ops",
           "flash-attn": "flash_attn.ops.triton.rotary", "sgl_kernel": "sgl_kernel"}  # fmt: skip


def peers_here() -> dict[str, str]:
    """Name, to its version or why it is absent."""
    found = {"torch": torch.__version__}
    for name, (package, _) in PEERS.items():
        try:
            importlib.import_module(MODULES[name])
            found[name] = importlib.metadata.version(package)
        except Exception as error:  # whatever a foreign package does
            found[name] = f"absent: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found
