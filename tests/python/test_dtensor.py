"""DTensors: two processes, each with its part, rotate as one does the whole, to the bit and without a message sent.

With gloo on the CPU. ROPEWALK_TEST_DTENSORS=cuda: with NCCL, on two GPUs.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

RANKS = 2
DEVICE = os.environ.get("ROPEWALK_TEST_DTENSORS", "cpu")
CHECKS: dict[str, object] = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------------------------
# What each rank does.


class Ranks:
    """What the checks below share."""

    def __init__(self) -> None:
        import ropewalk  # noqa: PLC0415
        import torch.distributed.tensor as dtensor  # noqa: PLC0415
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

        self.ropewalk, self.dtensor = ropewalk, dtensor
        self.mesh = init_device_mesh(DEVICE, (RANKS,))
        self.frequencies = ropewalk.Frequencies(theta=1e4, rotary_dim=32)
        self.table = dict(
            zip(("cos", "sin"), (x.to(DEVICE) for x in self.frequencies.table(1000, torch.float32)), strict=True)
        )
        self.rank = self.mesh.get_rank()

    def lay(self, x, dim=None):
        """One tensor over the ranks: a dimension of it, or the whole on each."""
        places = [self.dtensor.Replicate() if dim is None else self.dtensor.Shard(dim)]
        return self.dtensor.distribute_tensor(x.clone(), self.mesh, places)

    def refused(self, sentence, call, *args, **options):
        with pytest.raises(ValueError, match=sentence):
            call(*args, **options)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def heads(tokens=7, q_heads=4, k_heads=2, batch=2):
    return draw(batch, tokens, q_heads, 32), draw(batch, tokens, k_heads, 32, seed=1)


def places(batch=2, tokens=7):
    drawn = torch.randint(0, 1000 - tokens, (batch, tokens), generator=torch.Generator().manual_seed(2), device="cpu")
    return drawn.to(DEVICE)


def equal(got, want):
    return all(torch.equal(a.full_tensor(), b) for a, b in zip(got, want, strict=True))


@check
def compiled_before_any_call(r):
    """Also: the rules are there though ropewalk was imported before torch's DTensor."""
    q, k = heads()
    want = r.ropewalk.rope(q, k, frequencies=r.frequencies, positions=places())
    for dim, of_positions in ((1, 1), (2, None)):
        positions = r.lay(places(), of_positions)
        laid = r.lay(q, dim), r.lay(k, dim)
        for function in (r.ropewalk.rope, r.ropewalk.rope_):
            compiled = torch.compile(
                lambda q, k, positions, f=function: f(q, k, frequencies=r.frequencies, positions=positions),
                backend="aot_eager",
                fullgraph=True,
            )
            assert equal(compiled(*laid, positions), want), (dim, function)
        assert equal(laid, want)


@check
def by_batch_tokens_and_heads(r):
    q, k = heads()
    weights = {"q_weight": draw(32, seed=3), "k_weight": draw(32, seed=4)}
    for dim in (0, 1, 2):
        of_positions = dim if dim < 2 else None
        for options in (
            {"positions": places()},
            {"positions": places()[:1]},  # one for the whole batch
            {"positions": places()[0]},
            {},
            {"offsets": places()[:, :1] % 100},
            {"offsets": places()},
            {"positions": places(), **weights},
        ):
            laid = {}
            for name, x in options.items():
                own = of_positions
                if name in weights or own is None or x.ndim == 1 and own == 0 or x.shape[own - 2] == 1:
                    own = None
                laid[name] = r.lay(x, own - 2 + x.ndim if own is not None and x.ndim < 2 else own)
            for angles in ({"frequencies": r.frequencies}, r.table):
                want = r.ropewalk.rope(q, k, **options, **angles)
                assert equal(r.ropewalk.rope(r.lay(q, dim), r.lay(k, dim), **laid, **angles), want), (dim, options)
                new = r.lay(q, dim), r.lay(k, dim)
                version = new[0]._version
                got = r.ropewalk.rope_(*new, **laid, **angles)
                assert got[0] is new[0] and got[1] is new[1] and new[0]._version > version
                assert equal(new, want), (dim, options)
    alone = r.ropewalk.rope(r.lay(q[0], 0), frequencies=r.frequencies)  # no batch, no k
    assert equal(alone[:1], r.ropewalk.rope(q[0], frequencies=r.frequencies)[:1]) and alone[1] is None


@check
def nothing_is_sent(r):
    from torch.distributed.tensor.debug import CommDebugMode  # noqa: PLC0415

    q, k = heads()
    for dim, of_positions in ((0, 0), (1, 1), (2, None)):
        laid = r.lay(q, dim), r.lay(k, dim)
        for positions in (r.lay(places(), of_positions), r.lay(places()), None):  # the last two cut, each rank its own
            with CommDebugMode() as messages:
                r.ropewalk.rope(*laid, frequencies=r.frequencies, positions=positions)
            assert messages.get_total_counts() == 0


@check
def each_rank_makes_its_own_positions(r):
    """DTensor.from_local: what each rank has is a part of the whole."""
    q, k = heads(tokens=8)
    own = torch.arange(4)[None] + 4 * r.rank
    positions = r.dtensor.DTensor.from_local(own.expand(2, 4), r.mesh, [r.dtensor.Shard(1)])
    got = r.ropewalk.rope(r.lay(q, 1), r.lay(k, 1), frequencies=r.frequencies, positions=positions)
    assert equal(got, r.ropewalk.rope(q, k, frequencies=r.frequencies))


@check
def tables_of_the_tokens_go_with_them(r):
    q, k = heads()
    cos, sin = (x[places()] for x in r.table.values())  # a row for each token of each batch, as transformers has them
    want = r.ropewalk.rope(q, k, cos=cos, sin=sin)
    for dim in (0, 1):
        got = r.ropewalk.rope(r.lay(q, dim), r.lay(k, dim), cos=r.lay(cos, dim), sin=r.lay(sin, dim))
        assert equal(got, want)
    assert equal(r.ropewalk.rope(r.lay(q, 1), r.lay(k, 1), cos=r.lay(cos), sin=r.lay(sin, 1)), want)
    assert equal(r.ropewalk.rope(r.lay(q, 2), r.lay(k, 2), cos=cos, sin=sin), want)
    cos_sin = torch.cat((cos[0], sin[0]), -1)
    want = r.ropewalk.rope(q, k, cos_sin=cos_sin)
    assert equal(r.ropewalk.rope(r.lay(q, 1), r.lay(k, 1), cos_sin=r.lay(cos_sin, 0)), want)
    assert equal(r.ropewalk.rope(r.lay(q, 1), r.lay(k, 1), cos_sin=cos_sin), want)  # the whole table on each rank


@check
def heads_that_do_not_divide(r):
    for q_heads, k_heads in ((5, 3), (2, 1), (1, 1)):  # one rank without a head of k, or without any
        q, k = heads(q_heads=q_heads, k_heads=k_heads)
        want = r.ropewalk.rope(q, k, frequencies=r.frequencies, norm="rms")
        assert equal(r.ropewalk.rope(r.lay(q, 2), r.lay(k, 2), frequencies=r.frequencies, norm="rms"), want)
    q, k = heads(q_heads=4, k_heads=1)  # fewer heads of k than ranks: each has all
    want = r.ropewalk.rope(q, k, frequencies=r.frequencies)
    assert equal(r.ropewalk.rope(r.lay(q, 2), r.lay(k), frequencies=r.frequencies), want)
    q, k = heads(tokens=1)
    want = r.ropewalk.rope(q, k, frequencies=r.frequencies, positions=places(tokens=1))
    laid = r.lay(places(tokens=1), 1)
    assert equal(r.ropewalk.rope(r.lay(q, 1), r.lay(k, 1), frequencies=r.frequencies, positions=laid), want)


@check
def a_mesh_of_two_dimensions(r):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    q, k = heads(tokens=8)
    want = r.ropewalk.rope(q, k, frequencies=r.frequencies, positions=places(tokens=8))
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh(DEVICE, shape)
        for dims in ((1, 2), (0, 1), (0, 2), (1, 1)):
            lay = [r.dtensor.Shard(dim) for dim in dims]
            own = [r.dtensor.Shard(dim) if dim < 2 else r.dtensor.Replicate() for dim in dims]
            laid = [r.dtensor.distribute_tensor(x.clone(), mesh, lay) for x in (q, k)]
            positions = r.dtensor.distribute_tensor(places(tokens=8), mesh, own)
            assert equal(r.ropewalk.rope(*laid, frequencies=r.frequencies, positions=positions), want), (shape, dims)


@check
def axes_of_positions(r):
    q, k = heads()
    positions = torch.stack([places(), places() // 2, places() // 3])
    axes = torch.arange(16, dtype=torch.int32) % 3
    want = r.ropewalk.rope(q, k, frequencies=r.frequencies, positions=positions, axes=axes)
    for dim, own in ((0, 1), (1, 2), (2, None)):
        laid = r.lay(q, dim), r.lay(k, dim)
        got = r.ropewalk.rope(*laid, frequencies=r.frequencies, positions=r.lay(positions, own), axes=axes)
        assert equal(got, want)


@check
def caches_go_with_their_heads(r):
    q, k = heads()
    slots = torch.randperm(14, generator=torch.Generator().manual_seed(5), device="cpu").view(2, 7).to(DEVICE)
    options = {"frequencies": r.frequencies, "v": draw(2, 7, 2, 16, seed=6), "slots": slots}
    k_cache, v_cache = torch.zeros(16, 2, 32), torch.zeros(16, 2, 16)
    laid = {"k_cache": r.lay(k_cache, 1), "v_cache": r.lay(v_cache, 1)}
    want = r.ropewalk.rope(q, k, k_cache=k_cache, v_cache=v_cache, **options)
    here = {**options, "v": r.lay(options["v"], 2)}
    assert equal(r.ropewalk.rope(r.lay(q, 2), r.lay(k, 2), **laid, **here), want)
    assert equal(laid.values(), (k_cache, v_cache)) and k_cache.any()
    kept = {**here, **laid, "k_store_only": True}
    assert r.ropewalk.rope(r.lay(q, 2), r.lay(k, 2), **kept)[1] is None
    refused = [
        ("v_cache must be a DTensor where q is one", {**here, "k_cache": laid["k_cache"], "v_cache": v_cache}, 2),
        (r"k_cache must be \[Shard\(dim=1\)\] to go with q and k", {**here, **laid, "k_cache": r.lay(k_cache)}, 2),
        ("q must not be sharded by tokens where k_cache is given", {**here, **laid, "slots": r.lay(slots, 1)}, 1),
    ]
    for sentence, more, dim in refused:
        r.refused(sentence, r.ropewalk.rope_, r.lay(q, dim), r.lay(k, dim), **more)


@check
def what_cannot_be_is_refused_and_nothing_written(r):
    q, k = heads()
    options = {"frequencies": r.frequencies}
    refused = [
        ("q must not be sharded in head_dim", r.lay(q, 3), r.lay(k, 3), {}),
        ("k must not be sharded in head_dim", r.lay(q, 2), r.lay(k, 3), {}),
        ("k must be sharded by tokens as q is", r.lay(q, 1), r.lay(k), {}),
        ("k must be sharded by batch as q is", r.lay(q, 0), r.lay(k, 2), {}),
        ("k must be sharded by heads as q is", r.lay(q, 2), r.lay(k, 1), {}),
        ("k must be a DTensor where q is one", r.lay(q, 2), k, {}),
        ("q must be a DTensor where k is one", q, r.lay(k, 2), {}),
        ("q must be a DTensor where q_weight is one", q, k, {"q_weight": r.lay(draw(32)), "k_weight": draw(32)}),
        ("positions must be a DTensor, .*Shard", r.lay(q, 1), r.lay(k, 1), {"positions": places()}),
        ("positions has 5 tokens, but q has 7", r.lay(q, 1), r.lay(k, 1), {"positions": r.lay(places()[:, :5], 1)}),
        ("q_out must be .*Shard", r.lay(q, 2), r.lay(k, 2), {"q_out": r.lay(q), "k_out": r.lay(k, 2)}),
    ]
    for sentence, x, y, more in refused:
        r.refused(sentence, r.ropewalk.rope_, x, y, **options, **more)
        for now, before in ((x, q), (y, k)):
            assert torch.equal(getattr(now, "full_tensor", lambda now=now: now)(), before)
    partial = r.dtensor.DTensor.from_local(q, r.mesh, [r.dtensor.Partial()])
    r.refused("q must be Shard or Replicate", r.ropewalk.rope_, partial, **options)
    r.refused("q must not be a DTensor but in rope and rope_", r.ropewalk.prepare, r.lay(q, 2), **options)
    assert not r.ropewalk.can_use(r.lay(q, 2), **options)
    # What is only read may lie as it likes.
    weights = {"q_weight": draw(32, seed=3), "k_weight": draw(32, seed=4)}
    laid = {"q_weight": r.lay(weights["q_weight"], 0), "k_weight": r.lay(weights["k_weight"])}
    want = r.ropewalk.rope(q, k, **options, **weights)
    assert equal(r.ropewalk.rope(r.lay(q, 2), r.lay(k, 2), **options, **laid), want)


@check
def gradients(r):
    """As torch's autograd goes through DTensors: the functions of compat that have gradients keep them."""
    from ropewalk.compat.transformers import apply_rotary_pos_emb  # noqa: PLC0415

    q, k = (x.transpose(1, 2).contiguous() for x in heads())
    cos, sin = (torch.cat((x[places()],) * 2, -1) for x in r.table.values())

    def gradient(q, k, cos, sin):
        q, k = q.requires_grad_(), k.requires_grad_()
        new = apply_rotary_pos_emb(q, k, cos, sin)
        return torch.autograd.grad(((new[0] * new[0]).sum() + (new[1] * new[1]).sum()), (q, k))

    want = gradient(q.clone(), k.clone(), cos, sin)
    for dim, of_table in ((2, 1), (1, None)):  # tokens, heads
        got = gradient(r.lay(q, dim), r.lay(k, dim), r.lay(cos, of_table), r.lay(sin, of_table))
        assert equal(got, want), dim


@check
def gradients_of_norm_and_rotation(r):
    """q's and k's to the bit; a weight's is a sum over ranks."""
    q, k = heads()
    weights = {"q_weight": draw(32, seed=3), "k_weight": draw(32, seed=4)}
    factors = draw(2, 7, 4, 32, seed=8), draw(2, 7, 2, 32, seed=9)

    def gradient(q, k, factors, options, leaves, only_q):
        new = r.ropewalk.rope(q, k, frequencies=r.frequencies, **options)
        loss = (new[0] * factors[0]).sum() + (0 if only_q else (new[1] * factors[1]).sum())
        return torch.autograd.grad(loss, leaves)

    def leaf(x):
        return x.clone().requires_grad_()

    for with_weights, only_q in ((False, False), (True, False), (False, True), (True, True)):
        more = {name: leaf(x) for name, x in weights.items()} if with_weights else {}
        here = leaf(q), leaf(k)
        of = [*here, *more.values()]
        want = gradient(*here, factors, {"positions": places(), **more}, of, only_q)
        for dim, of_positions in ((0, 0), (1, 1), (2, None)):
            laid = r.lay(q, dim).requires_grad_(), r.lay(k, dim).requires_grad_()
            more_laid = {name: r.lay(x).requires_grad_() for name, x in weights.items()} if with_weights else {}
            parts = [r.lay(x, dim) for x in factors]
            positions = r.lay(places(), of_positions)
            got = gradient(*laid, parts, {"positions": positions, **more_laid}, [*laid, *more_laid.values()], only_q)
            assert equal(got[:2], want[:2]), (with_weights, only_q, dim)
            for a, b in zip(got[2:], want[2:], strict=True):
                assert torch.allclose(a.full_tensor(), b, atol=1e-5), (only_q, dim)


@check
def gradients_of_heads_that_do_not_divide(r):
    q, k = heads(q_heads=5, k_heads=1)
    laid = r.lay(q, 2).requires_grad_(), r.lay(k).requires_grad_()
    here = q.clone().requires_grad_(), k.clone().requires_grad_()
    found = []
    for pair in (here, laid):
        new = r.ropewalk.rope(*pair, frequencies=r.frequencies, norm="rms")
        found.append(torch.autograd.grad((new[0] * new[0]).sum() + (new[1] * new[1]).sum(), pair))
    assert equal(found[1], found[0])


class Attention(torch.nn.Module):
    """As in transformers and torchtitan: projections, norm and rotation, attention, projection."""

    def __init__(self, ropewalk, width=64, q_heads=4, k_heads=2, head_dim=32):
        super().__init__()
        self.rope, self.head_dim = ropewalk.rope_, head_dim
        self.frequencies = ropewalk.Frequencies(theta=1e4, rotary_dim=head_dim)
        self.q, self.k, self.v = (torch.nn.Linear(width, n * head_dim, bias=False) for n in (q_heads, k_heads, k_heads))
        self.o = torch.nn.Linear(q_heads * head_dim, width, bias=False)
        self.q_norm, self.k_norm = (torch.nn.Parameter(draw(head_dim, seed=7 + i)) for i in range(2))

    def forward(self, x, positions):
        q, k, v = (each(x).unflatten(-1, (-1, self.head_dim)) for each in (self.q, self.k, self.v))
        q, k = self.rope(
            q, k, frequencies=self.frequencies, positions=positions, q_weight=self.q_norm, k_weight=self.k_norm
        )
        # Attention itself by each rank's own heads, as tensor-parallel models have it.
        own = [getattr(each, "to_local", lambda each=each: each)().transpose(1, 2) for each in (q, k, v)]
        y = torch.nn.functional.scaled_dot_product_attention(*own, enable_gqa=True).transpose(1, 2).flatten(2)
        if hasattr(q, "from_local"):
            y = q.from_local(y, q.device_mesh, q.placements)
        return self.o(y)


@check
def tensor_and_sequence_parallel_attention(r):
    from torch.distributed.tensor.debug import CommDebugMode  # noqa: PLC0415
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    shard, whole = r.dtensor.Shard, r.dtensor.Replicate
    torch.manual_seed(0)
    block = Attention(r.ropewalk)
    x, positions = draw(2, 8, 64, seed=9), places(tokens=8)
    with torch.no_grad():
        want = block(x, positions)
        column = {name: ColwiseParallel(use_local_output=False) for name in "qkv"}
        # Tokens are spread outside of the attention, heads inside of it.
        plan = {**column, "o": RowwiseParallel(output_layouts=shard(1), use_local_output=False)}
        parallel = parallelize_module(block, r.mesh, plan)
        for name in ("q_norm", "k_norm"):
            weight = torch.nn.Parameter(r.lay(getattr(block, name).data), requires_grad=False)
            setattr(parallel, name, weight)
        gather = PrepareModuleInput(
            input_layouts=(shard(1), None), desired_input_layouts=(whole(), None), use_local_output=False
        )
        parallel = parallelize_module(parallel, r.mesh, gather)
        own, positions = r.lay(x, 1).to_local(), r.lay(positions)
        with CommDebugMode() as messages:
            got = parallel(own, positions)
        assert messages.get_total_counts() == 2  # those of the plan: tokens together, sums apart
        assert torch.allclose(got.full_tensor(), want, atol=1e-5)
        assert list(got.placements) == [shard(1)]


@check
def layers_under_fully_shard_are_refused_with_the_remedy(r):
    transformers = pytest.importorskip("transformers")
    from ropewalk.transformers import patch  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    def model():
        torch.manual_seed(0)
        made = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
        ).eval()  # fmt: skip
        return made

    def sharded(made):
        for layer in made.model.layers:
            fully_shard(layer, mesh=r.mesh)
        return fully_shard(made, mesh=r.mesh)

    tokens = torch.arange(10)[None]
    with torch.no_grad():
        want = model()(tokens).logits
        made = model()
        assert patch(made).fused_norms == 2
        assert torch.allclose(sharded(made)(tokens).logits, want, atol=1e-5)
        made = sharded(model())
        r.refused("call ropewalk.transformers.patch before fully_shard", patch, made)
        assert torch.allclose(made(tokens).logits, want, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran():
    """What both ranks said of each check: one pair of processes for all, as importing torch is most of the time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": path, "RANK": str(rank), "WORLD_SIZE": str(RANKS),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        return [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("name", CHECKS)
def test_dtensors(ran, name):
    for output in ran:
        assert f"\nheld: {name}\n" in output, output


def main() -> None:
    import ropewalk  # noqa: F401, PLC0415

    assert "torch.distributed.tensor" not in sys.modules
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["RANK"]))
        torch.set_default_device("cuda")
    torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    ranks = Ranks()
    for name, function in CHECKS.items():
        function(ranks)
        print(f"\nheld: {name}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
