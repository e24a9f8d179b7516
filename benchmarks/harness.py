"""Compare `fgpt lm-eval` with the `hf` model class of lm-evaluation-harness on a multiple-choice task with few-shot.

    pip install '.[harness]'
    python benchmarks/harness.py

The harness itself runs a task made from `pydocs-choice`, without a download, on the 124M shape: examples in front of
each question are drawn for it, as most tasks have it, or are the same ones for all, as in MMLU. The two classes take
turns in one process, `hf` with several batch sizes. Printed are the ratios of processor time, which other programs
disturb less than wall time, and of wall time, and whether each example got the same verdicts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.evaluation.benchmark import Benchmark
from fgpt_hf.evaluation.harness import FGPTHarnessModel
from fgpt_hf.runtime.hardware import keep_freed_memory, supports_bf16
from fgpt_hf.tokenizer.tokenizer import build_tokenizer

DRAWN, SAME = "examples drawn for each question", "the same examples for all"
TASK: Mapping[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "{{endings}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=12, help="Number of questions (default: 12).")
    parser.add_argument("--num_fewshot", type=int, default=5, help="Examples before a question (default: 5).")
    parser.add_argument("--repeats", type=int, default=2, help="Number of rounds (default: 2).")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8], help="Those of hf (default: 4 8).")
    options = parser.parse_args()
    keep_freed_memory()
    tokenizer, model = build_tokenizer(), new_model()
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{options.examples} questions with {options.num_fewshot} examples each, {dtype}")
    given: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "softmax_dtype": "float32"}
    classes: dict[str, Any] = {"fgpt": FGPTHarnessModel(**given)}
    classes |= {f"hf, batches of {size}": HFLM(**given, batch_size=size) for size in options.batch_sizes}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), tokenizer, options.examples, options.num_fewshot)
        for task in (DRAWN, SAME):
            compare(task, classes, Path(folder), options.repeats)


def new_model() -> FGPTForCausalLM:
    """Return a network of the 124M shape in bfloat16, or float32 where the processor has no bfloat16."""
    torch.manual_seed(0)
    model = FGPTForCausalLM(FGPTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
    model.eval()
    return model.bfloat16() if supports_bf16(torch.device("cpu")) else model


def write_tasks(folder: Path, tokenizer: PreTrainedTokenizerBase, examples: int, num_fewshot: int) -> None:
    """Write the questions, others to put in front of them, and the two tasks."""
    questions = Benchmark("pydocs-choice", tokenizer, 4 * examples).examples
    rows = [{"context": each.contexts[0], "endings": each.endings, "label": each.label} for each in questions]
    files = {"test": folder / "test.jsonl", "train": folder / "train.jsonl"}
    for split, part in (("test", rows[:examples]), ("train", rows[examples:])):
        files[split].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    source = {"data_files": {split: str(file) for split, file in files.items()}}
    for task, sampler in ((DRAWN, "default"), (SAME, "first_n")):
        own = {"task": task, "num_fewshot": num_fewshot, "fewshot_config": {"sampler": sampler}}
        (folder / f"{sampler}.yaml").write_text(json.dumps({**TASK, **own, "dataset_kwargs": source}))


def compare(task: str, classes: Mapping[str, Any], folder: Path, repeats: int) -> None:
    """Let the model classes take turns, and print the ratio of each one's time to that of the first."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in classes}
    verdicts = {}
    for _ in range(repeats):
        for name, model in classes.items():
            began = (time.process_time(), time.perf_counter())
            verdicts[name] = evaluate(task, model, folder)
            seconds[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    first, *others = classes
    for name in others:
        ratios = [
            [other / own for own, other in zip(one, pair, strict=True)]
            for one, pair in zip(seconds[first], seconds[name], strict=True)
        ]
        processor, wall = (statistics.median(column) for column in zip(*ratios, strict=True))
        same = sum(one == other for one, other in zip(verdicts[first], verdicts[name], strict=True))
        print(
            f"{task}: {processor:.2f} times as fast as {name} (wall time: {wall:.2f}); "
            f"{same} of {len(verdicts[first])} verdicts equal",
            flush=True,
        )


def evaluate(task: str, model: Any, folder: Path) -> list[float]:
    """Return acc and acc_norm of each question."""
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    return [sample[metric] for sample in results["samples"][task] for metric in ("acc", "acc_norm")]


if __name__ == "__main__":
    main()
