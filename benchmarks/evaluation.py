"""Compare the speed of multiple-choice scoring with the original FGPT's loop and lm-evaluation-harness.

    python benchmarks/evaluation.py [--task hellaswag=FILE.jsonl]

prints the ratio of examples per second for float32 and bfloat16 weights of the 124M shape, and the number of equal
verdicts. All take turns on the same questions, the harness (the extra `harness`) with several batch sizes. Models and
data are loaded before the clock starts. Time is measured as processor time of all threads, which other programs disturb
less than wall time; the ratio of wall times is printed after it.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.evaluation.benchmark import Benchmark
from fgpt_hf.runtime.hardware import keep_freed_memory, supports_bf16
from fgpt_hf.tokenizer.tokenizer import build_tokenizer

Verdicts = Mapping[str, list[float]]  # for each convention, 1.0 for each example answered correctly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="pydocs-choice", help="TASK or TASK=FILE (default: pydocs-choice).")
    parser.add_argument("--examples", type=int, default=32, help="Number of examples (default: 32).")
    parser.add_argument("--repeats", type=int, default=3, help="Number of rounds (default: 3).")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[4, 8, 16], help="Batch sizes of the harness (default: 4 8 16)."
    )
    options = parser.parse_args()
    keep_freed_memory()
    tokenizer = build_tokenizer()
    benchmark = Benchmark(options.task, tokenizer, options.examples)
    if not importlib.util.find_spec("lm_eval"):
        print("lm_eval is not installed (pip install '.[harness]'): the harness is left out")
        options.batch_sizes = []
    for dtype in (torch.float32, torch.bfloat16) if supports_bf16(torch.device("cpu")) else (torch.float32,):
        model = new_model(dtype)
        scorers: dict[str, Callable[[], Verdicts]] = {"this project": partial(ours, benchmark, model)}
        scorers["the loop"] = partial(loop, benchmark, model, tokenizer)
        for size in options.batch_sizes:
            scorers[f"the harness in batches of {size}"] = partial(harness, benchmark, model, tokenizer, size)
        compare(str(dtype).removeprefix("torch."), scorers, len(benchmark.examples), options.repeats)


def compare(dtype: str, scorers: Mapping[str, Callable[[], Verdicts]], examples: int, repeats: int) -> None:
    """Let the scorers take turns, and print the median ratio of each one's time to that of the first."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in scorers}
    verdicts = {}
    for _ in range(repeats):
        for name, judge in scorers.items():
            began = (time.process_time(), time.perf_counter())
            verdicts[name] = judge()
            seconds[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in seconds.items()
    }
    first, *others = medians
    print(f"{dtype}, {examples} examples: {first} {examples / medians[first][0]:.2f} per processor second", flush=True)
    for name in others:
        processor, wall = (other / own for own, other in zip(medians[first], medians[name], strict=True))
        pairs = [
            (one, other)
            for convention, values in verdicts[name].items()
            for one, other in zip(verdicts[first][convention], values, strict=True)
        ]
        same = f"{sum(one == other for one, other in pairs)} of {len(pairs)} verdicts equal"
        print(f"  {processor:.2f} times {name} (wall time: {wall:.2f}); {same}", flush=True)


def new_model(dtype: torch.dtype) -> FGPTForCausalLM:
    torch.manual_seed(0)
    config = FGPTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, dtype=dtype)
    create: Any = FGPTForCausalLM._from_config
    model: FGPTForCausalLM = create(config, dtype=dtype).eval()
    return model


def ours(benchmark: Benchmark, model: PreTrainedModel) -> Verdicts:
    return benchmark.run(Accelerator(cpu=True), model).scores


@torch.no_grad()
def loop(benchmark: Benchmark, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Verdicts:
    """Score as the original did: one batch of four rows per example, all logits, the mean loss per token."""
    hits = []
    for example in benchmark.examples:
        context = tokenizer.encode(example.contexts[0])
        endings = [tokenizer.encode(f" {ending}") for ending in example.endings]
        ids, mask = torch.zeros(2, len(endings), len(context) + max(map(len, endings)), dtype=torch.long)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            ids[row, :end] = torch.tensor(context + ending)
            mask[row, len(context) : end] = 1
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(endings), -1) * mask[:, 1:]
        hits.append(float((losses.sum(dim=1) / mask[:, 1:].sum(dim=1)).argmin() == example.label))
    return {"acc_token": hits}


def harness(
    benchmark: Benchmark, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Verdicts:
    """Score with lm-evaluation-harness' model class, and compute the two accuracies of its multiple-choice tasks."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    requests = [Instance("loglikelihood", {}, pair, 0) for example in benchmark.examples for pair in example.pairs]
    answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
    verdicts: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for example in benchmark.examples:
        sums = [next(answers)[0] for _ in example.endings]
        per_character = [value / len(ending) for value, ending in zip(sums, example.endings, strict=True)]
        for convention, scores in (("acc", sums), ("acc_norm", per_character)):
            verdicts[convention].append(float(scores.index(max(scores)) == example.label))
    return verdicts


if __name__ == "__main__":
    main()
