"""All model classes of the installed transformers that rotate, one for each modeling file, tiny, with random weights:
each is equal to its stock self with Ropewalk, in float32 and in bfloat16, or refused in a sentence with the cause.
`make test` runs a sample, `--all-models` (make test-transformers) all, with the counts at its end."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import collections
import os
import re
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import ropewalk.transformers  # noqa: E402
import tiny_models  # noqa: E402

# Refused, by cause. Everything else that builds and rotates is served, and right.
REFUSED = {
    "clvp/clvp": "rotates nothing in a first pass",
    # Its audio layers have as many heads of k as of q, this small configuration has not: no run reaches them.
    "nemotron3_5_transcribe/nemotron3_5_transcribe": "Nemotron3_5TranscribeAttention alone ends in RuntimeError",
    "roformer/roformer": "has its own apply_rotary_position_embeddings",
    "seamless_m4t/seamless_m4t": "has its own _apply_rotary_embedding",
    "vjepa2/vjepa2": "has its own apply_rotary_embeddings",
}
# Not built from a small default configuration, or not run by plain texts, images or patches: nothing is said of them.
NOT_BUILT = {
    "auto/auto", "autoformer/autoformer", "blt/blt", "cohere_asr/cohere_asr", "deimv2/deimv2",
    "dots3_note/dots3_note", "edgetam_video/edgetam_video", "efficientloftr/efficientloftr", "esm/esmfold",
    "esmfold2/esmfold2", "flaubert/flaubert", "gradium_phonon_tts/gradium_phonon_tts", "idefics/idefics",
    "informer/informer", "kyutai_speech_to_text/kyutai_speech_to_text", "layoutlmv2/layoutlmv2",
    "lightglue/lightglue", "mimi/mimi", "moonshine_streaming/moonshine_streaming",
    "muse_glimmer_assistant/muse_glimmer_assistant", "nemotron_asr_streaming/nemotron_asr_streaming",
    "neucodec/neucodec", "pe_audio/pe_audio", "pe_audio_video/pe_audio_video", "pe_video/pe_video",
    "perceiver/perceiver", "pix2struct/pix2struct", "pocket_tts/pocket_tts",
    "pocket_tts_audio_tokenizer/pocket_tts_audio_tokenizer", "pp_doclayout_v2/pp_doclayout_v2",
    "qwen4_exp/qwen4_exp", "rag/rag", "reformer/reformer", "sam2_video/sam2_video",
    "sam3_tracker_video/sam3_tracker_video", "sam3_video/sam3_video", "sapiens2/sapiens2", "sew_d/sew_d",
    "shieldgemma2/shieldgemma2", "time_series_transformer/time_series_transformer", "timesfm2_5/timesfm2_5",
    "timm_wrapper/timm_wrapper", "vits/vits", "voxtral_realtime/voxtral_realtime", "wav2vec2_bert/wav2vec2_bert",
    "wav2vec2_conformer/wav2vec2_conformer", "xcodec2/xcodec2", "xlm/xlm", "zamba2/zamba2",
}  # fmt: skip
# Layers that stay stock beside others that are served.
SKIPPED = {  # these rotate where there are more tokens than a trial has
    "deepseek_v4/deepseek_v4": ["DeepseekV4CSACompressor", "DeepseekV4HCACompressor"],
}
OFTEN = ("llama", "qwen3", "gemma4", "deepseek_v3", "llama4", "qwen2_5_vl", "olmo2", "gpt_oss")  # always in the sample
EVERY = 8
COUNTS: collections.Counter[str] = collections.Counter()


def names(config: Any) -> list[str]:
    files = tiny_models.modeling_files()
    if config.getoption("--all-models"):
        return files
    return [name for i, name in enumerate(files) if i % EVERY == 0 or name.split("/")[0] in OFTEN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names(metafunc.config))


def error_of(got: Any, want: Any) -> float:
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def test_right_or_refused(name: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    try:
        model, given, want = tiny_models.built(name)
    except (ValueError, ImportError) as error:
        COUNTS["not built"] += 1
        assert name in NOT_BUILT, error
        pytest.skip(f"not built: {str(error)[:200]}")
    assert name not in NOT_BUILT, "it is built now"
    if not tiny_models.rotates(model):
        COUNTS["without a rotation"] += 1
        pytest.skip("no rotation")
    if name in REFUSED:
        COUNTS[f"refused: {REFUSED[name]}"] += 1
        with pytest.raises(ValueError, match=REFUSED[name]):
            ropewalk.transformers.patch(model)
        assert torch.equal(tiny_models.output(model, given), want)
        return
    before = sum(ropewalk.counters().values())
    with ropewalk.transformers.patch(model) as patch:
        got = tiny_models.output(model, given)
        with torch.enable_grad():
            frozen = tiny_models.output(model.requires_grad_(False), given)
    assert error_of(frozen, want) < 3e-6, patch
    assert patch.layers > 0 and sum(ropewalk.counters().values()) > before
    assert error_of(got, want) < 3e-6, patch
    norms = {what: why for what, why in patch.skipped.items() if what.startswith("q_norm and k_norm of ")}
    assert sorted(patch.skipped.keys() - norms) == SKIPPED.get(name, []), patch.skipped
    assert all(why.endswith(": they stay the model's own") for why in norms.values())
    assert torch.equal(tiny_models.output(model, given), want), "unpatching did not restore the model"

    model, given = model.to(torch.bfloat16), {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()
    }  # fmt: skip
    stock = tiny_models.output(model, given)
    # The model's own tables, rounded where it rounds: where one rotation is written otherwise, a bit may differ.
    with ropewalk.transformers.patch(model, angles="table", rounding="reference", fuse_norm=False):
        assert error_of(tiny_models.output(model, given), stock) < 1e-2
    with ropewalk.transformers.patch(model):
        ours = error_of(tiny_models.output(model, given), want)
    # A router of experts may choose others for an input: then the whole differs by more.
    routed = any(re.search(r"router|gate$|experts", part) for part, _ in model.named_modules())
    assert ours < (0.3 if routed else 1.5 * error_of(stock, want) + 1e-3)
    COUNTS["right"] += 1
    COUNTS["right, by the model's own tables in part or whole"] += bool(patch.by_table)
    COUNTS["right, with the norm"] += patch.fused_norms > 0
    COUNTS["right, with a norm that stays the model's own"] += bool(norms)


def test_counts(request: pytest.FixtureRequest) -> None:
    for what, count in sorted(COUNTS.items()):
        print(f"{count:4d} {what}")
    if request.config.getoption("--all-models") and not request.config.getoption("--shard"):
        assert COUNTS["right"] >= 160
