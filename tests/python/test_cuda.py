"""The operation on CUDA tensors: results, streams, graphs, threads, devices, faults, bad input, torch.compile."""

# SPDX-License-Identifier: Apache-2.0
import threading

import numpy as np
import oracle
import pytest
import ropewalk
import torch

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)
_cuda = next((b for b in ropewalk.backends() if b["name"] == "cuda"), {"available": False, "detail": "absent"})
if not _cuda["available"]:
    pytest.fail(f"there is a CUDA device, but Ropewalk cannot serve it: {_cuda['detail']}", pytrace=False)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POSITIONS = [0, 1, 2047, 131_071, 2**31 - 1, -5, -(2**24) - 1]
FREQUENCIES = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")


def draw(*shape, dtype=torch.float32, seed=0, device="cuda"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def angles(positions, frequencies=FREQUENCIES):
    return oracle.exact_angles(frequencies.inv_freq, positions)


def expected(x, *arguments, **options):
    options = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return oracle.rope(x.cpu(), *arguments, **options)


def close(got, want):
    assert got.is_cuda
    oracle.assert_close(got.cpu(), *want)


# ---- results


def test_pdl_can_be_switched_off():
    q = torch.randn(4, 2, 64, device="cuda").bfloat16()
    frequencies = ropewalk.Frequencies(theta=1e4, rotary_dim=64)
    name = ropewalk.explain(q, frequencies=frequencies, disable_pdl=True)["kernel"]
    assert not name.endswith(" pdl")
    want = ropewalk.rope(q, frequencies=frequencies)[0]
    assert torch.equal(ropewalk.rope(q, frequencies=frequencies, disable_pdl=True)[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tokens", [7, 3000])
def test_plain(dtype, pairing, inverse, tokens):
    q, k = draw(tokens, 4, 64, dtype=dtype), draw(tokens, 2, 64, dtype=dtype, seed=1)
    positions = torch.tensor(POSITIONS).repeat(tokens // 7 + 1)[:tokens]
    want = [expected(x, angles(positions), pairing, inverse=inverse) for x in (q, k)]
    got = ropewalk.rope_(q, k, positions=positions.cuda(), frequencies=FREQUENCIES, pairing=pairing, inverse=inverse)
    assert got[0] is q and got[1] is k
    for x, value in zip((q, k), want, strict=True):
        close(x, value)


@pytest.mark.parametrize("head_dim", [6, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 129, 3100])
def test_norm_of_many_head_sizes(head_dim, dtype, tokens):
    frequencies = ropewalk.Frequencies(theta=1e6, rotary_dim=head_dim)
    for pairing in ("neox", "interleaved"):
        q, k = draw(tokens, 3, head_dim, dtype=dtype), draw(tokens, 1, head_dim, dtype=dtype, seed=1)
        weights = [1 + draw(head_dim, dtype=dtype, seed=s) / 4 for s in (2, 3)]
        want = [
            expected(x, angles(range(tokens), frequencies), pairing, norm=True, weight=w, eps=1e-5)
            for x, w in zip((q, k), weights, strict=True)
        ]
        ropewalk.rope_(q, k, frequencies=frequencies, pairing=pairing, q_weight=weights[0], k_weight=weights[1],
                       eps=1e-5)  # fmt: skip
        for x, value in zip((q, k), want, strict=True):
            close(x, value)


# So many heads that a warp takes several turns, with a vector of 6 or 10 elements a thread where that fits.
@pytest.mark.parametrize("head_dim", [40, 48, 72, 80, 96, 112, 120, 160, 192, 384])
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
@pytest.mark.parametrize(
    ("tokens", "cache_dtype"), [(1100, None), (3100, None), (3100, torch.bfloat16), (3100, torch.float8_e4m3fn)]
)
@pytest.mark.parametrize("with_table", [False, True])
def test_norm_of_many_heads_in_packed_rows(head_dim, pairing, tokens, with_table, cache_dtype):
    frequencies = ropewalk.Frequencies(theta=1e6, rotary_dim=head_dim)
    q_heads, k_heads = 27, 5
    rows = draw(tokens, (q_heads + 2 * k_heads) * head_dim, dtype=torch.bfloat16)
    before = rows.clone()
    q, k, v = (
        x.unflatten(1, (-1, head_dim)) for x in rows.split([h * head_dim for h in (q_heads, k_heads, k_heads)], 1)
    )
    weights = [1 + draw(head_dim, dtype=torch.bfloat16, seed=s) / 4 for s in (2, 3)]
    cos, sin = frequencies.table(tokens, torch.float32)
    angle = {"cos_sin": torch.cat([cos, sin], -1).cuda()} if with_table else {"frequencies": frequencies}
    tables = {"tables": [cos, sin]} if with_table else {}
    want = [
        expected(x, None if with_table else angles(range(tokens), frequencies), pairing, norm=True, weight=w, **tables)
        for x, w in zip((q, k), weights, strict=True)
    ]
    store, slots = {}, None
    if cache_dtype:  # every fifth token is padding
        slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(4)).cuda()
        slots[::5] = -1
        caches = [torch.zeros(tokens, k_heads, head_dim, device="cuda").to(cache_dtype) for _ in range(2)]
        store = {"v": v, "k_cache": caches[0], "v_cache": caches[1], "slots": slots}
    positions = torch.arange(tokens, device="cuda")
    ropewalk.rope_(
        q, k, positions=positions, pairing=pairing, q_weight=weights[0], k_weight=weights[1], **angle, **store
    )
    for x, value in zip((q, k), want, strict=True):
        close(x, value)
    assert torch.equal(v, before[:, -k_heads * head_dim :].unflatten(1, (-1, head_dim)))
    if cache_dtype:
        stored = slots >= 0
        k_cache, v_cache = (c[slots[stored]] for c in caches)
        close(k_cache, tuple(x[stored.cpu().numpy()] for x in want[1]))
        assert torch.equal(v_cache.float(), v[stored].to(cache_dtype).float())
        others = torch.ones(tokens, dtype=torch.bool, device="cuda")
        others[slots[stored]] = False
        assert not any(c[others].float().any() for c in caches)


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["neox", "interleaved"])
def test_table(table_dtype, pairing):
    q = draw(6, 2, 64)
    positions = torch.tensor([5, 0, 31, 31, 2, 7], dtype=torch.int32)
    cos, sin = FREQUENCIES.table(32, table_dtype)
    want = expected(q, None, pairing, tables=[t[positions.long()].float() for t in (cos, sin)])
    for table in ({"cos": cos.cuda(), "sin": sin.cuda()}, {"cos_sin": torch.cat([cos, sin], -1).cuda()}):
        got = ropewalk.rope(q, positions=positions.cuda(), pairing=pairing, **table)[0]
        close(got, want)


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_however_aligned(shift, dtype):
    """q and k as slices of one row that begins anywhere; everything else keeps its bytes."""
    row = draw(5, shift + (4 + 2 + 2) * 64 + 3, dtype=dtype)
    before = row.clone()
    q, k = (x.unflatten(1, (-1, 64)) for x in row[:, shift : shift + 6 * 64].split([4 * 64, 2 * 64], 1))
    want = [expected(x, angles(range(5))) for x in (q, k)]
    ropewalk.rope_(q, k, frequencies=FREQUENCIES)
    for x, value in zip((q, k), want, strict=True):
        close(x, value)
    assert torch.equal(row[:, :shift], before[:, :shift])
    assert torch.equal(row[:, shift + 6 * 64 :], before[:, shift + 6 * 64 :])


def test_batch_transposed_partial_and_offset():
    q, k = draw(2, 4, 9, 96), draw(2, 2, 9, 96, seed=1)
    positions = torch.stack([torch.arange(9), torch.arange(9) + 100])
    want = [expected(x.transpose(1, 2), angles(positions), rotary_offset=32) for x in (q, k)]
    ropewalk.rope_(q.transpose(1, 2), k.transpose(1, 2), positions=positions.cuda(), frequencies=FREQUENCIES,
                   rotary_offset=32)  # fmt: skip
    for x, value in zip((q, k), want, strict=True):
        close(x.transpose(1, 2), value)


def test_axes_and_offsets():
    rows = torch.arange(3, dtype=torch.int32).repeat_interleave(torch.tensor([16, 8, 8]))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 8, 8, 9], [1, 2, 1, 2, 1]])
    q = draw(5, 2, 64)
    by_row = np.stack([angles(row) for row in positions.numpy()])
    want = expected(q, by_row[rows.numpy(), :, np.arange(32)].T)
    close(ropewalk.rope(q, positions=positions.cuda(), frequencies=FREQUENCIES, axes=rows.cuda())[0], want)
    offsets = torch.tensor([10, -3, 0, 7, 2**24])
    shifted = ropewalk.rope(q, positions=positions[0].cuda(), offsets=offsets.cuda(), frequencies=FREQUENCIES)[0]
    close(shifted, expected(q, angles(positions[0] + offsets)))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["flat", "NHD", "HND"])
def test_store(cache_dtype, layout):
    """As on the CPU, byte by byte."""
    shape = {"flat": (32, 2, 64), "NHD": (4, 8, 2, 64), "HND": (4, 2, 8, 64)}[layout]
    results = []
    for device in ("cpu", "cuda"):
        q, k, v = (draw(6, heads, 64, dtype=torch.bfloat16, seed=heads, device=device) for heads in (4, 2, 2))
        raw = [torch.full(shape, 3.0).to(cache_dtype or torch.bfloat16).to(device) for _ in range(2)]
        caches = [x.transpose(1, 2) if layout == "HND" else x for x in raw]
        slots = torch.tensor([31, 0, -1, 9, 17, 8], device=device)
        scales = {"k_scale": 0.5, "v_scale": torch.tensor([0.25, 2.0], device=device)} if cache_dtype else {}
        ropewalk.rope_(q, k, frequencies=FREQUENCIES, v=v, k_cache=caches[0], v_cache=caches[1], slots=slots, **scales)
        results.append([x.float().cpu() for x in (q, k, *raw)])
    for name, cpu, cuda in zip(("q", "k", "k_cache", "v_cache"), *results, strict=True):
        untouched = cpu == 3.0
        assert torch.equal(cuda[untouched], cpu[untouched]), name
        # Angles may differ in the last bit of float32, and so a result by one unit of its dtype.
        unit = 2.0**-2 if cache_dtype and "cache" in name else 2.0**-7
        assert ((cuda - cpu).abs() <= unit * cpu.abs() + 1e-4).all(), name
        assert (cuda != cpu).float().mean() < 0.01, name


@pytest.mark.parametrize("shape", [(0, 4, 64), (3, 0, 64), (1, 1, 64), (2, 0, 4, 64)])
def test_little_or_nothing(shape):
    q = torch.ones(shape, device="cuda")
    assert ropewalk.rope_(q, frequencies=FREQUENCIES)[0] is q


def test_out_of_place_leaves_the_inputs():
    q, k = draw(5, 4, 64, dtype=torch.bfloat16), draw(5, 2, 64, dtype=torch.bfloat16)
    before = q.clone(), k.clone()
    new = ropewalk.rope(q, k, frequencies=FREQUENCIES)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    for x, y in zip(new, ropewalk.rope_(q, k, frequencies=FREQUENCIES), strict=True):
        assert torch.equal(x, y)


def test_the_backend_is_proved():
    q = draw(4, 2, 64)
    explanation = ropewalk.explain(q, frequencies=FREQUENCIES)
    assert explanation["backend"] == "cuda" and explanation["kernel"]
    assert ropewalk.can_use(q, frequencies=FREQUENCIES)

    def launches():
        return sum(count for name, count in ropewalk.counters().items() if name.startswith("cuda"))

    before = launches()
    try:
        ropewalk.force_backend("cuda")
        ropewalk.rope_(q, frequencies=FREQUENCIES)
        assert launches() == before + 1
        with pytest.raises((ValueError, RuntimeError)):
            ropewalk.rope_(q.cpu(), frequencies=FREQUENCIES)
        ropewalk.force_backend("cpu")
        with pytest.raises((ValueError, RuntimeError)):
            ropewalk.rope_(q, frequencies=FREQUENCIES)
    finally:
        ropewalk.force_backend(None)
    assert launches() == before + 1


# ---- streams and graphs


@pytest.mark.parametrize("rotate", ["call", "operator", "short operator"])
def test_the_current_stream_is_used(rotate):
    source = draw(1000, 8, 64)
    want = ropewalk.rope(source, frequencies=FREQUENCIES)[0]
    of, content = torch.ops.ropewalk, FREQUENCIES._content
    served = {
        "call": lambda q: ropewalk.rope_(q, frequencies=FREQUENCIES),
        "operator": lambda q: of.rope_(q, frequencies=content),
        "short operator": lambda q: of.rope_short_(q, frequencies=content),
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        q = torch.zeros_like(source)
        torch.cuda._sleep(20_000_000)
        q.copy_(source)  # on the default stream the call would not see this
        served[rotate](q)
        result = q.clone()
    stream.synchronize()
    assert torch.equal(result, want)


def capture(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("tokens", [3, 4000])
def test_capture_after_prepare_and_replay(tokens):
    """Replays read new data, positions and slots."""
    frequencies = ropewalk.Frequencies(theta=31.0, rotary_dim=64)  # not on the device yet
    q, k, v = (torch.zeros(tokens, heads, 64, device="cuda") for heads in (4, 2, 2))
    positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    slots = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    k_cache, v_cache = (torch.zeros(tokens + 8, 2, 64, device="cuda") for _ in range(2))
    weight = torch.ones(64, device="cuda")
    options = {"positions": positions, "frequencies": frequencies, "q_weight": weight, "k_weight": weight,
               "eps": 1.7e-6, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots}  # fmt: skip
    ropewalk.prepare(q, k, **options)
    assert not q.any()
    graph = capture(lambda: ropewalk.rope_(q, k, **options))
    assert not q.any() and not k_cache.any()
    for seed in range(3):
        for x in (q, k, v):
            x.copy_(draw(*x.shape, seed=seed))
        new = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        positions.copy_(new * 1000)
        slots.copy_(new + seed)
        want = [expected(x, angles(new * 1000, frequencies), norm=True, eps=1.7e-6) for x in (q, k)]
        graph.replay()
        torch.cuda.synchronize()
        for x, value in zip((q, k), want, strict=True):
            close(x, value)
        assert torch.equal(k_cache[slots], k) and torch.equal(v_cache[slots], v)


@pytest.mark.parametrize("cold", ["kernel", "frequencies"])
def test_cold_under_capture_is_an_error(cold):
    q = torch.ones(5, 2, 64, device="cuda")
    if cold == "kernel":
        options = {"frequencies": FREQUENCIES, "norm": "rms", "eps": 4.56e-6}
        ropewalk.rope_(q.clone(), frequencies=FREQUENCIES)
    else:
        options = {"frequencies": ropewalk.Frequencies(theta=47.0, rotary_dim=64)}
        ropewalk.rope_(q.clone(), frequencies=FREQUENCIES)
    graph, messages = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        try:
            ropewalk.rope_(q, **options)
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
        q.add_(1)
    assert len(messages) == 1 and "captured" in messages[0] and "prepare()" in messages[0], messages
    assert (q == 1).all()
    graph.replay()  # the capture went on unharmed
    torch.cuda.synchronize()
    assert (q == 2).all()
    ropewalk.prepare(q, **options)
    graph = capture(lambda: ropewalk.rope_(q, **options))
    graph.replay()
    close(q, expected(torch.full((5, 2, 64), 2.0), angles(range(5), options["frequencies"]), norm=cold == "kernel",
                      eps=4.56e-6))  # fmt: skip


def test_preparing_while_another_stream_captures():
    q, other = torch.ones(5, 2, 64, device="cuda"), torch.zeros(1, device="cuda")
    failures = []

    def prepare():
        try:
            ropewalk.prepare(q, frequencies=ropewalk.Frequencies(theta=53.0, rotary_dim=64), norm="rms", eps=7.89e-6)
        except Exception as error:  # told below
            failures.append(error)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        other.add_(1)
        thread = threading.Thread(target=prepare)
        thread.start()
        thread.join()
        other.add_(1)
    assert failures == []
    graph.replay()
    assert other.item() == 2


# ---- threads and devices


def test_threads_compile_and_launch_at_once():
    wrong, q = [], draw(300, 4, 64)
    torch.cuda.synchronize()

    def caller(index):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i in range(20):
                    frequencies = ropewalk.Frequencies(theta=100.0 + index, rotary_dim=64)
                    eps = 1e-6 * (1 + (index + i) % 5)  # each is a kernel of its own
                    got = ropewalk.rope(q, frequencies=frequencies, norm="rms", eps=eps)[0]
                    stream.synchronize()
                    close(got, expected(q, angles(range(300), frequencies), norm=True, eps=eps))
        except BaseException as error:  # told below
            wrong.append(f"{index}: {error}")

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@several
def test_two_devices():
    for current in (0, 1):
        with torch.cuda.device(current):
            for device in ("cuda:0", "cuda:1"):
                q = draw(40, 2, 64, device=device)
                want = expected(q, angles(range(40)))
                ropewalk.rope_(q, frequencies=FREQUENCIES)
                close(q, want)
            assert torch.cuda.current_device() == current


@several
def test_two_devices_in_one_call():
    q, k = torch.ones(4, 2, 64, device="cuda:0"), torch.ones(4, 1, 64, device="cuda:1")
    with pytest.raises(ValueError, match=r"k must be on the device of q \(cuda:0\), but is on cuda:1"):
        ropewalk.rope_(q, k, frequencies=FREQUENCIES)
    assert (q == 1).all() and (k == 1).all()


@several
@pytest.mark.parametrize("angles", ["exact", "table"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_model_over_two_devices(kind, angles):
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    import ropewalk.transformers  # noqa: PLC0415

    config = transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places.update({f"model.layers.{i}": i // 2 for i in range(4)})
    accelerate.dispatch_model(model, places, main_device=0, force_hooks=True)
    tokens = torch.arange(10, device="cuda:0")[None]
    with torch.no_grad():
        want = model(tokens).logits
        began = sum(ropewalk.counters().values())
        with ropewalk.transformers.patch(model, angles=angles) as patch:
            # accelerate's hooks are on the norms, too, which stay the model's own
            assert patch.fused_norms == 0 and all(name.startswith("q_norm and k_norm") for name in patch.skipped)
            got = model(tokens).logits
            assert torch.allclose(got, want, atol=1e-5)
            written = model.generate(tokens, max_new_tokens=8, do_sample=False)
        assert sum(ropewalk.counters().values()) > began
        assert torch.equal(model(tokens).logits, want)
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), written)


# ---- faults and bad input


def test_faults():
    q, k = draw(4, 2, 64), draw(4, 1, 64)
    clean = q.clone()
    cos, sin = (t.cuda() for t in FREQUENCIES.table(8, torch.float32))
    cache = torch.zeros(6, 1, 64, device="cuda")
    ropewalk.check_faults()
    ropewalk.rope_(q, k, positions=torch.tensor([0, 8, 2, -1], device="cuda"), cos=cos, sin=sin, k_cache=cache[:4],
                   slots=torch.tensor([0, 1, 4, 3], device="cuda"))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"positions\[1\] is 8"):
        ropewalk.check_faults()
    ropewalk.check_faults()
    assert q[[1, 3]].isnan().all()
    positions = torch.tensor([0, 2], device="cuda")
    assert torch.equal(q[[0, 2]], ropewalk.rope(clean[[0, 2]], positions=positions, cos=cos, sin=sin)[0])
    assert torch.equal(cache[0], k[0]) and not cache[4:].any() and not cache[2].any()
    ropewalk.rope_(q, k, frequencies=FREQUENCIES, k_cache=cache[:4], slots=torch.tensor([0, 1, 4, -1], device="cuda"))
    with pytest.raises(RuntimeError, match=r"slots\[2\] is 4"):
        ropewalk.check_faults()
    assert not cache[4:].any()


@pytest.mark.parametrize("name", ["k", "positions", "q_weight", "k_cache", "slots", "v_scale"])
def test_mixed_devices(name):
    arguments = {
        "q": torch.ones(4, 2, 64), "k": torch.ones(4, 2, 64), "positions": torch.arange(4), "q_weight": torch.ones(64),
        "k_weight": torch.ones(64), "v": torch.ones(4, 2, 64), "slots": torch.arange(4),
        "k_cache": torch.ones(8, 2, 64).to(torch.float8_e4m3fn),
        "v_cache": torch.ones(8, 2, 64).to(torch.float8_e4m3fn), "v_scale": torch.ones(2),
    }  # fmt: skip
    arguments = {n: x if n == name else x.cuda() for n, x in arguments.items()}
    before = {n: x.float().clone() for n, x in arguments.items()}
    with pytest.raises(ValueError, match=rf"{name} must be on the device of q \(cuda:0\), but is on cpu"):
        ropewalk.rope_(arguments.pop("q"), arguments.pop("k"), frequencies=FREQUENCIES, **arguments)
    for n, x in arguments.items():
        assert torch.equal(x.float(), before[n]), n


def test_bad_input_as_on_the_cpu():
    for change in ({"rotary_dim": 63}, {"positions": torch.arange(5)}, {"k": torch.ones(4, 1, 32)}, {"eps": -1.0},
                   {"q_weight": torch.ones(32)}, {"frequencies": None}):  # fmt: skip
        messages = []
        for device in ("cpu", "cuda"):
            arguments = {"q": torch.ones(4, 2, 64), "k": torch.ones(4, 1, 64), "frequencies": FREQUENCIES, **change}
            arguments = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
            with pytest.raises(ValueError) as caught:
                ropewalk.rope_(arguments.pop("q"), arguments.pop("k"), **arguments)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_grad_is_refused():
    with pytest.raises(ValueError, match="q requires grad"):
        ropewalk.rope_(torch.ones(4, 2, 64, device="cuda", requires_grad=True), frequencies=FREQUENCIES)


# ---- torch.compile


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles(backend, mode):
    if mode != "default" and backend != "inductor":
        pytest.skip("a mode of inductor")
    weight = torch.linspace(0.5, 1.5, 64, device="cuda")

    def step(q, k, positions):
        q = q * 2
        ropewalk.rope_(q, k, positions=positions, frequencies=FREQUENCIES, q_weight=weight, k_weight=weight)
        return q + 1

    torch._dynamo.reset()
    options = {"mode": mode} if backend == "inductor" else {}
    compiled = torch.compile(step, fullgraph=True, backend=backend, **options)
    for seed in range(4):  # the graphs of reduce-overhead are replayed from the third call on
        q, k, positions = draw(5, 4, 64, seed=seed), draw(5, 2, 64, seed=9), torch.arange(5, device="cuda") * seed
        k_eager = k.clone()
        want = step(q.clone(), k_eager, positions)
        assert torch.equal(compiled(q, k, positions), want)
        assert torch.equal(k, k_eager)
    torch._dynamo.reset()
