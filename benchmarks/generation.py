"""Compare ways to write a reply on a CPU: `generate` of transformers' GPT-2, this project's formats, and llama.cpp.

    python benchmarks/generation.py [--shape 124m|712m] [--rounds 5] [--threads N]
    python benchmarks/generation.py --model FOLDER

The first prints for each way the tokens per second after a prompt of 64 tokens, as a ratio to GPT-2's in float32 and in
the same format, as a share of the rate at which these cores read memory, the peak memory of loading and writing, and
what of it stays. llama.cpp (if `xllamacpp` is installed) reads what `fgpt export --outtype Q8_0` writes.
Each measurement runs in its own process; the ways take turns, and medians are compared. The second prints the loss of a
trained model on 40 docstrings in each format, and how many of 20 greedy replies are those of float32.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.convert.export import write_gguf
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.model.cpu_generation import BYTES, available_formats, cache_options, loaded_dtype, prepare, text_loss
from fgpt_hf.model.io import load_model
from fgpt_hf.runtime.hardware import device_name, peak_memory_bytes
from fgpt_hf.tokenizer.tokenizer import build_tokenizer

CPU = torch.device("cpu")
SHAPES = {"124m": (768, 12, 12), "712m": (1296, 32, 24)}  # width, layers and heads
PROMPT, WARM_UP = 64, 4  # tokens
REPEATS = 3  # replies of a process, of which the median counts
DOCUMENTS, REPLIES, BEGINNING, REPLY = 40, 20, 12, 48
WAYS = ("gpt2 float32", "gpt2 bfloat16", *(f"ours {name}" for name in available_formats()))
GGUF_BYTES = {"Q8_0": 34 / 32, "F16": 2.0}  # of a weight
WEIGHTS = "weights.gguf"


class Measured(NamedTuple):
    """Tokens per second of a way, and the bytes of its process at their peak and after the reply."""

    tokens_per_second: float
    peak_bytes: float
    held_bytes: float


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
            compare_speeds(Path(folder), options, write_models(Path(folder), options.shape))


def write_models(folder: Path, shape: str) -> list[str]:
    """Write a model of random weights as the ways read it, and return their names."""
    model = ours(shape)
    model.save_pretrained(folder)
    if not importlib.util.find_spec("xllamacpp"):
        return list(WAYS)
    written = write_gguf(model.float(), build_tokenizer(), folder / WEIGHTS, "Q8_0")  # F16 if rows have no blocks of 32
    return [*WAYS, f"llama.cpp {written.rpartition(' ')[2]}"]


def compare_speeds(folder: Path, options: argparse.Namespace, ways: list[str]) -> None:
    """Print a table of all ways, each measured in turn, in its own process."""
    rate = reading_rate()
    print(f"{device_name(CPU)}, {options.threads} threads: {rate / 1e9:,.1f} GB/s read from memory\n", flush=True)
    given = ["--shape", options.shape, "--tokens", str(options.tokens), "--threads", str(options.threads)]
    measured: dict[str, list[Measured]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, rounds in measured.items():
            command = [sys.executable, __file__, *given, "--measure", way, str(folder)]
            numbers = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
            rounds.append(Measured(*map(float, numbers)))
    medians = {way: Measured(*map(statistics.median, zip(*rounds, strict=True))) for way, rounds in measured.items()}
    print("| | tokens/s | of GPT-2's in float32 | in the same format | of the memory's limit | memory, peak | held |")
    print("|---|---|---|---|---|---|---|")
    plain = medians["gpt2 float32"].tokens_per_second
    for way, (speed, peak, held) in medians.items():
        number_format = way.split()[1]
        same = medians.get(f"gpt2 {number_format}")
        limit = rate / (weights(options.shape) * {**BYTES, **GGUF_BYTES}[number_format])
        print(
            f"| {way} | {speed:.1f} | {speed / plain:.2f} | {f'{speed / same.tokens_per_second:.2f}' if same else '–'} "
            f"| {speed / limit:.2f} | {peak / 2**20:,.0f} MiB | {held / 2**20:,.0f} MiB |"
        )


def measure(way: str, folder: Path, shape: str, tokens: int) -> Measured:
    """Measure a way in this process."""
    whose, number_format = way.split()
    if whose == "llama.cpp":
        speed = llama_cpp_speed(folder / WEIGHTS, tokens)
    else:
        model = gpt2(shape, number_format) if whose == "gpt2" else prepared(folder, number_format)
        write(model, whose, WARM_UP)
        speed = statistics.median(write(model, whose, tokens) for _ in range(REPEATS))
    return Measured(speed, peak_memory_bytes(CPU), psutil.Process().memory_info().rss)


def gpt2(shape: str, number_format: str) -> GPT2LMHeadModel:
    width, layers, heads = SHAPES[shape]
    with torch.device("meta"):
        empty = GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_embd=width, n_layer=layers, n_head=heads))
    model: GPT2LMHeadModel = empty.to(getattr(torch, number_format)).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    return model


def prepared(folder: Path, number_format: str) -> PreTrainedModel:
    model: PreTrainedModel = FGPTForCausalLM.from_pretrained(folder, dtype=loaded_dtype(number_format)).eval()
    prepare(model, number_format)
    return model


def llama_cpp_speed(file: Path, tokens: int) -> float:
    """Return llama.cpp's own count of the tokens per second after the prompt."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(file), 1024, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    prompt = {"prompt": list(range(100, 100 + PROMPT)), "temperature": 0, "ignore_eos": True}
    server = xllamacpp.Server(options)
    answers = [server.handle_completions({**prompt, "n_predict": 1 + tokens}) for _ in range(REPEATS)]
    return statistics.median(float(answer["timings"]["predicted_per_second"]) for answer in answers)


@torch.inference_mode()
def write(model: PreTrainedModel, whose: str, tokens: int) -> float:
    """Write a greedy reply; return its tokens per second after the first one, which the prompt belongs to."""
    prompt, clock = torch.arange(100, 100 + PROMPT)[None], Clock()
    length: dict[str, Any] = {"max_new_tokens": 1 + tokens, "min_new_tokens": 1 + tokens, "do_sample": False}
    cache = cache_options(model) if whose == "ours" else {}
    model.generate(  # type: ignore[operator]  # a Tensor or a Module, says torch
        prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, streamer=clock, **length, **cache
    )
    _, first, *_, last = clock.times
    return tokens / (last - first)


class Clock(BaseStreamer):
    """Notes the time of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time of a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


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
