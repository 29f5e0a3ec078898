"""Every rotary embedding of the installed transformers against ours: by its default configuration, by each rule that it
accepts, in each spelling. Each is equal to the module's own frequencies, or refused in a sentence."""

# SPDX-License-Identifier: Apache-2.0
import copy
import glob
import importlib
import inspect
import os
import pathlib
import re

import pytest
import ropewalk

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "models.md"
# transformers computes in float32; in yarn's and llama3's blends, which some have by default, it subtracts near 1.
RELATIVE_BY_DEFAULT = 4.1e-7
RELATIVE = 1e-5
THETA = 12345.0
SPELLINGS = ("rope_parameters", "rope_theta", "rope_scaling", "compress_rope_theta")

# What a model needs so that it has a rotary embedding at all.
ROTARY = {
    "EsmRotaryEmbedding": {"position_embedding_type": "rotary"},
    "GraniteMoeHybridRotaryEmbedding": {"position_embedding_type": "rope"},
    "Zamba2RotaryEmbedding": {"use_mem_rope": True},
}
# Not built from a configuration with an annotation, or not by its defaults.
NOT_BUILT = {
    "BltRotaryEmbedding", "ClvpRotaryPositionalEmbedding", "CohereCompassRotaryEmbedding",
    "DeepseekOcr2VisionRotaryEmbedding", "EsmFold2RotaryEmbedding", "Nemotron3DiarizationRotaryEmbedding",
    "SeamlessM4TConformerRotaryPositionalEmbedding", "Wav2Vec2BertRotaryPositionalEmbedding",
    "Wav2Vec2ConformerRotaryPositionalEmbedding",
}  # fmt: skip
# (class, spelling) whose module is not the measure.
NOT_THE_MEASURE = {
    ("EvollaSaProtRotaryEmbedding", "old"),  # a part of Evolla, without a model type of its own, that reads
    ("EvollaSaProtRotaryEmbedding", "flat"),  # rope_theta in its default rotation and rope_parameters in no other
    ("Mistral4RotaryEmbedding", "old"),  # without a partial_rotary_factor its table is wider than the part that it
    ("Mistral4RotaryEmbedding", "flat"),  # rotates, and it does not run
    ("Olmo3RotaryEmbedding", "flat"),  # passed over there; here as meant (FrequenciesTest ModelTypes.Olmo3)
}


def rules(pairs):
    lengths = {"original_max_position_embeddings": 64}
    yield {"rope_type": "default"}
    yield {"rope_type": "default", "partial_rotary_factor": 0.5}  # which the code of most does not read
    yield {"rope_type": "linear", "factor": 4.0}
    yield {"rope_type": "dynamic", "factor": 2.0}
    yield {"rope_type": "yarn", "factor": 4.0, **lengths}
    yield {"rope_type": "yarn", "factor": 4.0, "truncate": False, **lengths}  # not read when nested
    yield {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **lengths}
    yield {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1 + 0.02 * i for i in range(pairs)],
        "long_factor": [1 + 1.3 * i for i in range(pairs)],
        **lengths,
    }
    yield {"rope_type": "proportional", "partial_rotary_factor": 0.5}


def rotary_classes():
    """(name, class, configuration class) of every rotary module of transformers; None where there is no annotation."""
    root = os.path.join(os.path.dirname(transformers.__file__), "models")
    for path in sorted(glob.glob(os.path.join(root, "*", "modeling_*.py"))):
        if "Rotary" not in pathlib.Path(path).read_text(encoding="utf-8"):
            continue
        folder, name = path.split(os.sep)[-2:]
        try:
            module = importlib.import_module(f"transformers.models.{folder}.{name[:-3]}")
        except ImportError:  # needs a package that is not here
            continue
        for class_name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__ or not issubclass(cls, torch.nn.Module) or "Rotary" not in class_name:
                continue
            parameter = inspect.signature(cls.__init__).parameters.get("config")
            annotation = getattr(parameter, "annotation", None)
            if isinstance(annotation, str):
                annotation = getattr(module, annotation, None)
            yield class_name, cls, annotation if inspect.isclass(annotation) else None


def built(cls, config_class, extra):
    """The whole configuration, that of the part that rotates, and the module; None if these do not build."""
    for part in (lambda whole: whole.get_text_config(), lambda whole: whole):
        try:
            whole = config_class(**extra)
            return whole, part(whole), cls(part(whole))
        except Exception:  # a default configuration that its own module cannot use
            continue
    return None


def buffers(module):
    return {k: v for k, v in module.named_buffers() if k.endswith("inv_freq") and "original" not in k}


def variants(config, pairs):
    """(what, spelling, configuration as a dict) in every spelling and with every rule."""
    given = {key: value for key, value in config.to_dict().items() if value is not None}
    bare = {key: value for key, value in given.items() if key not in SPELLINGS}
    labels = [key for key, value in (given.get("rope_parameters") or {}).items() if isinstance(value, dict)]
    yield "no rule", "bare", bare
    yield "no rule", "old", {**bare, "rope_theta": THETA}
    for rule in rules(pairs):
        kind = rule["rope_type"]
        if "partial_rotary_factor" in rule and kind == "default":
            yield f"{kind}, a part", "old", {**bare, "rope_theta": THETA, "partial_rotary_factor": 0.5}
        elif kind != "default":
            yield kind, "old", {**bare, "rope_theta": THETA, "rope_scaling": rule}
        yield kind, "flat", {**bare, "rope_parameters": {**rule, "rope_theta": THETA}}
        if labels:
            nested = {label: {**rule, "rope_theta": THETA + i} for i, label in enumerate(labels)}
            yield kind, "nested", {**bare, "rope_parameters": nested}


class Walk:
    def __init__(self):
        self.equal, self.refused, self.failures, self.not_built = 0, {}, [], set()
        self.served = set()  # classes with at least one equal configuration
        self.sines = self.other_sines = 0  # of the tables at position 1

    def compare(self, name, what, module, ours_of):
        for key, theirs in buffers(module).items():
            layer_type = None if key == "inv_freq" else key[: -len("_inv_freq")]
            attention = getattr(module, f"{layer_type}_attention_scaling" if layer_type else "attention_scaling", 1.0)
            try:
                ours = ours_of(layer_type)
            except ValueError as error:
                assert str(error).strip(), (name, what)
                self.refused.setdefault(name, set()).add(str(error))
                continue
            values = whole = ours.inv_freq
            if name.startswith("Ernie4_5_VL"):  # theirs are stored as height, width, time; used in the natural order
                values = np.concatenate([values[:44:2], values[1:44:2], values[44:]])
            limit = RELATIVE_BY_DEFAULT if what == "default" else RELATIVE
            if what == "default" and values is whole:
                # The table's row of position 1 tells whether the float32 frequencies are theirs to the bit.
                expected = torch.sin(theirs.double()).float() * attention
                self.other_sines += int((ours.table(2, torch.float32)[1][1] != expected).sum())
                self.sines += theirs.numel()
            theirs = theirs.double().numpy()
            if not (
                values.shape == theirs.shape
                and np.array_equal(values == 0, theirs == 0)
                and np.allclose(values, theirs, rtol=limit, atol=0)
                and abs(ours.attention_scaling - attention) < 1e-12
            ):
                self.failures.append(
                    (name, what, layer_type, values[:3], theirs[:3], ours.attention_scaling, attention)
                )
                continue
            self.equal += 1
            self.served.add(name)

    def go(self, name, cls, config_class):
        made = built(cls, config_class, ROTARY.get(name, {})) if config_class else None
        if made is None:
            self.not_built.add(name)
            return
        whole, part, module = made
        from_config = ropewalk.Frequencies.from_config
        self.compare(name, "default", module, lambda layer_type: from_config(whole, layer_type))
        self.compare(name, "default part", module, lambda layer_type: from_config(part, layer_type))
        pairs = max((buffer.numel() for buffer in buffers(module).values()), default=0)
        for kind, spelling, given in variants(part, pairs):
            if (name, spelling) in NOT_THE_MEASURE:
                continue
            try:
                config = type(part)(**copy.deepcopy(given))
                module = cls(config)
            except Exception:  # a rule that its own module cannot use
                continue
            what = f"{kind}, {spelling}"
            self.compare(name, what, module, lambda layer_type, given=given: from_config(given, layer_type))
            self.compare(
                name, f"{what}, class", module, lambda layer_type, config=config: from_config(config, layer_type)
            )


@pytest.fixture(scope="module")
def walk():
    transformers.utils.logging.set_verbosity_error()
    made = Walk()
    for name, cls, config_class in rotary_classes():
        made.go(name, cls, config_class)
    return made


def test_every_rotary_module_is_equal_or_refused(walk):
    print(f"{walk.equal} equal, of {len(walk.served)} classes; {len(walk.refused)} classes with a refusal")
    assert not walk.failures, "\n".join(map(str, walk.failures))
    assert walk.not_built <= NOT_BUILT
    assert len(walk.served) >= 150
    assert walk.equal >= 4000
    # Those that differ come from frequencies one unit off, on CPUs whose torch takes other blocks through its vector
    # power; on x86-64 with AVX-512 there are none.
    assert walk.sines >= 10000 and walk.other_sines <= walk.sines // 100


def test_text_models_are_served(walk):
    """Those refused altogether are vision towers, codecs, or contradict themselves by default."""
    never = set(walk.refused) - walk.served
    sentences = {name: min(walk.refused[name], key=len) for name in never}
    by_reason = re.compile(
        r"rotates by the rows and columns|not by one rule for all|is missing|not a multiple of num_attention_heads|"
        r"is not a field that Ropewalk knows|but the code of model_type"
    )
    assert not {name: text for name, text in sentences.items() if not by_reason.search(text)}
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Gemma4Text", "DeepseekV3", "DeepseekV4", "GptOss",
                 "Glm4", "Phi3", "Olmo3", "Cohere2", "Falcon", "Dbrx", "Llama4Text", "Qwen3_5Text"):  # fmt: skip
        assert f"{name}RotaryEmbedding" in walk.served or name == "Llama4Text", name


def page_rows():
    rows = re.findall(r"^\| `([^`]+)` \| (\S+(?: \S+)?) \| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (pairing, norm.strip()) for name, pairing, norm in rows}


def test_pairing_is_that_of_the_model():
    """The pairing that docs/models.md has for each type, against what the model's own function does."""
    rows, compared = page_rows(), 0
    for name, cls, config_class in rotary_classes():
        made = built(cls, config_class, ROTARY.get(name, {})) if config_class else None
        pairing = rows.get(made[1].model_type, ("not told",))[0] if made else "not told"
        if pairing == "not told":
            continue
        module = importlib.import_module(cls.__module__)
        functions = [f for f in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave") if hasattr(module, f)]
        found = {kind for f in functions for kind in [tried(getattr(module, f), made[2])] if kind}
        if found:
            compared += 1
            assert pairing in found, (made[1].model_type, pairing, found)
    assert compared >= 110


def tried(function, module):
    """neox or interleaved, as a function of a modeling file turns; None for one of another kind."""
    names = list(inspect.signature(inspect.unwrap(function)).parameters)
    key, inv_freq = next(iter(buffers(module).items()), (None, None))
    if key is None:
        return None
    layer_type = [] if key == "inv_freq" else [key[: -len("_inv_freq")]]
    positions = torch.arange(3, 9)[None]
    try:
        cos, sin = module(torch.zeros(1, 6, 8), positions, *layer_type)
    except Exception:
        return None
    pairs = inv_freq.numel()
    angle = positions[0][:, None].double() * inv_freq.double()
    scaling = getattr(module, f"{layer_type[0]}_attention_scaling" if layer_type else "attention_scaling", 1.0)
    c, s = angle.cos() * scaling, angle.sin() * scaling
    for head_dim in (cos.shape[-1], 2 * cos.shape[-1]):
        q = torch.randn(1, 2, 6, head_dim, generator=torch.Generator().manual_seed(5))
        if 2 * pairs > head_dim:
            continue
        try:
            got = function(q, q.clone(), cos, sin)[0] if names[:2] == ["q", "k"] else function(q, cos, sin)
        except Exception:  # whole heads, or only the rotated part, are wanted
            continue
        x = q.double()
        halves, neighbours = x[..., :pairs], x[..., 0 : 2 * pairs : 2]
        others, next_ones = x[..., pairs : 2 * pairs], x[..., 1 : 2 * pairs : 2]
        neox = torch.cat([halves * c - others * s, others * c + halves * s], -1)
        first, second = neighbours * c - next_ones * s, next_ones * c + neighbours * s
        for kind, want in (
            ("neox", neox),
            ("interleaved", torch.stack([first, second], -1).flatten(-2)),
            ("interleaved", torch.cat([first, second], -1)),  # and written back as halves
        ):
            if got.shape == x.shape and torch.allclose(got[..., : 2 * pairs].double(), want, atol=1e-4):
                return kind
    return None
