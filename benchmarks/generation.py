"""Compare ways to write a reply on a CPU: `generate` of transformers' GPT-2, and this project's formats of weights.

    python benchmarks/generation.py [--shape 124m|712m] [--rounds 5] [--threads N]
    python benchmarks/generation.py --model FOLDER

The first prints for each way the tokens per second after a prompt of 64 tokens, as a ratio to GPT-2's in float32 and in
the same format, as a share of the rate at which these cores read memory, and the peak memory of loading and writing.
Each measurement runs in its own process; the ways take turns, and medians are compared. The second prints the loss of a
trained model on 40 docstrings in each format, and how many of 20 greedy replies are those of float32.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.model.cpu_generation import BYTES, available_formats, cache_options, loaded_dtype, prepare, text_loss
from fgpt_hf.model.io import load_model
from fgpt_hf.runtime.hardware import device_name, peak_memory_bytes

CPU = torch.device("cpu")
SHAPES = {"124m": (768, 12, 12), "712m": (1296, 32, 24)}  # width, layers and heads
PROMPT, WARM_UP = 64, 4  # tokens
DOCUMENTS, REPLIES, BEGINNING, REPLY = 40, 20, 12, 48
WAYS = ("gpt2 float32", "gpt2 bfloat16", *(f"ours {name}" for name in available_formats()))


@dataclass(frozen=True)
class Speed:
    """Medians of a way: tokens per second, and the peak of its memory in bytes."""

    tokens_per_second: float
    peak_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124m", help="Shape of the model (default: 124m).")
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds (default: 5).")
    parser.add_argument("--tokens", type=int, default=32, help="Tokens of a reply (default: 32).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Threads (default: all cores).")
    parser.add_argument("--model", help="A trained model, whose loss and replies are compared instead.")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help="Make one measurement in this process.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        way, folder = options.measure
        print(*measure(way, Path(folder), options.shape, options.tokens))
    elif options.model:
        compare_texts(options.model)
    else:
        with TemporaryDirectory() as folder:
            ours(options.shape).save_pretrained(folder)
            compare_speeds(Path(folder), options)


def compare_speeds(folder: Path, options: argparse.Namespace) -> None:
    """Print a table of all ways, each measured in turn, in its own process."""
    rate = reading_rate()
    print(f"{device_name(CPU)}, {options.threads} threads: {rate / 1e9:,.1f} GB/s read from memory\n", flush=True)
    given = ["--shape", options.shape, "--tokens", str(options.tokens), "--threads", str(options.threads)]
    measured: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, pairs in measured.items():
            command = [sys.executable, __file__, *given, "--measure", way, str(folder)]
            speed, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            pairs.append((float(speed), float(peak)))
    speeds = {
        way: Speed(statistics.median(speed for speed, _ in pairs), statistics.median(peak for _, peak in pairs))
        for way, pairs in measured.items()
    }
    print("| | tokens/s | of GPT-2's in float32 | in the same format | of the memory's limit | peak memory |")
    print("|---|---|---|---|---|---|")
    for way, median in speeds.items():
        number_format = way.split()[1]
        same = speeds.get(f"gpt2 {number_format}", speeds["gpt2 float32"])
        limit = rate / (weights(options.shape) * BYTES[number_format])
        print(
            f"| {way} | {median.tokens_per_second:.1f} "
            f"| {median.tokens_per_second / speeds['gpt2 float32'].tokens_per_second:.2f} "
            f"| {median.tokens_per_second / same.tokens_per_second:.2f} "
            f"| {median.tokens_per_second / limit:.2f} | {median.peak_bytes / 2**20:,.0f} MiB |"
        )


def measure(way: str, folder: Path, shape: str, tokens: int) -> tuple[float, int]:
    """Return the tokens per second of a way after its prompt, and the peak memory of this process in bytes."""
    whose, number_format = way.split()
    model: PreTrainedModel
    if whose == "gpt2":
        width, layers, heads = SHAPES[shape]
        with torch.device("meta"):
            empty = GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_embd=width, n_layer=layers, n_head=heads))
        model = empty.to(getattr(torch, number_format)).to_empty(device="cpu").eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.tie_weights()
    else:
        model = FGPTForCausalLM.from_pretrained(folder, dtype=loaded_dtype(number_format)).eval()
        prepare(model, number_format)
    write(model, whose, WARM_UP)
    first, whole = write(model, whose, 1), write(model, whose, 1 + tokens)
    return tokens / (whole - first), peak_memory_bytes(CPU)


@torch.inference_mode()
def write(model: PreTrainedModel, whose: str, tokens: int) -> float:
    """Return the seconds of a greedy reply of so many tokens."""
    prompt = torch.arange(100, 100 + PROMPT)[None]
    length: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    began = time.perf_counter()
    cache = cache_options(model) if whose == "ours" else {}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **length, **cache)  # type: ignore[operator]  # a Tensor or a Module, says torch
    return time.perf_counter() - began


def ours(shape: str) -> FGPTForCausalLM:
    width, layers, heads = SHAPES[shape]
    config = FGPTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    return FGPTForCausalLM(config).bfloat16()


def weights(shape: str) -> int:
    """Return the number of weights that a token reads: those of the layers and the head."""
    width, layers, _ = SHAPES[shape]
    return 12 * layers * width**2 + 50304 * width


def reading_rate() -> float:
    """Return the bytes per second at which all threads sum numbers that no cache holds."""
    numbers = torch.ones(2**27)

    def seconds() -> float:
        began = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - began

    return 4 * numbers.numel() / min(seconds() for _ in range(7))


def compare_texts(name: str) -> None:
    """Print the loss and the greedy replies of a trained model in each format."""
    texts: list[str] = load_pydocs()[: DOCUMENTS + REPLIES]["text"]
    losses: dict[str, float] = {}
    replies: dict[str, list[list[int]]] = {}
    for number_format in available_formats():
        model, tokenizer = load_model(name, loaded_dtype(number_format))
        prepare(model, number_format)
        context = model.config.max_position_embeddings
        ids: list[list[int]] = [tokenizer(text)["input_ids"][:context] for text in texts]
        losses[number_format] = statistics.fmean(text_loss(model, text) for text in ids[:DOCUMENTS])
        replies[number_format] = [greedy(model, text[:BEGINNING]) for text in ids[DOCUMENTS:]]
    print(f"| | loss of {DOCUMENTS} docstrings | rise | of {REPLIES} greedy replies the same | tokens the same |")
    print("|---|---|---|---|---|")
    plain, expected = losses["float32"], replies["float32"]
    for number_format, written in replies.items():
        same = sum(one == other for one, other in zip(written, expected, strict=True))
        tokens = statistics.fmean(common(one, other) for one, other in zip(written, expected, strict=True))
        rise = losses[number_format] / plain - 1
        print(f"| {number_format} | {losses[number_format]:.4f} | {rise:+.2%} | {same} | {tokens:.0%} |")


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Return the ids of a reply."""
    ids = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]  # a Tensor or a Module, says torch
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=REPLY, do_sample=False, pad_token_id=0
    )
    reply: list[int] = output[0, len(prompt) :].tolist()
    return reply


def common(one: list[int], other: list[int]) -> float:
    """Return the fraction of two replies before their first different token."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same / max(len(one), len(other))


if __name__ == "__main__":
    main()
