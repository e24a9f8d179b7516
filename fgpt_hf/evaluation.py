"""What a model is worth: its results on benchmarks, its loss on held-out text, and what it writes."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.answers import Shares, choice_shares, last_word_shares, letter_shares, text_shares
from fgpt_hf.batches import Rows, as_batch
from fgpt_hf.boundaries import Encoder, context_length
from fgpt_hf.metrics.hellaswag.hellaswag import mean
from fgpt_hf.objectives import Batch, Objective, next_token_prediction, token_losses
from fgpt_hf.processes import summed
from fgpt_hf.scoring import Scorer
from fgpt_hf.tasks import find_task, load_examples

DECODINGS: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 50}}


class TaskResult(NamedTuple):
    """What a model is worth at one task.

    Attributes:
        task: the name, with `=FILE` where the rows are a file's.
        metric: the measure by which the task is known.
        shares: by measure, a value for each example, whose mean is the result.
        cut: how many contexts were cut from the left to what the model reads, each counted once for each ending.
        seconds: what the answers took.
    """

    task: str
    metric: str
    shares: Shares
    cut: int
    seconds: float

    @property
    def examples(self) -> int:
        """The number of examples, or of documents."""
        return len(self.shares[self.metric])

    @property
    def values(self) -> dict[str, float]:
        """Each measure, followed by its standard error as `…_stderr` where there are two examples or more."""
        return {name: value for measure, shares in self.shares.items() for name, value in mean(measure, shares).items()}


class Benchmark:
    """A task's examples, loaded once, to be put to any number of models that share a tokenizer.

    Args:
        name: one of `tasks.TASKS`, or `TASK=FILE` for the rows of a file.
        limit: take the first so many examples only.

    Raises:
        ValueError, OSError: as `tasks.load_examples`.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
        task, equals, file = name.partition("=")
        if equals and not file:
            raise ValueError(f"{name} names no file: {task} alone takes its own examples, {task}=FILE those of a file")
        self.name, self.tokenizer, self.task = name, tokenizer, find_task(task)
        self.examples = load_examples(task, tokenizer, file or None, limit)

    def run(self, accelerator: Accelerator, model: PreTrainedModel, tokens_per_batch: int | None = None) -> TaskResult:
        """The model's result, the same on every process; every process must call it.

        Raises:
            ValueError: an ending is longer than what the model reads; a log-likelihood is not a number.
        """
        began = time.perf_counter()
        encoder = Encoder(self.tokenizer, context_length(model, self.tokenizer))
        if self.task.kind == "letter":
            shares = letter_shares(self.examples, encoder, accelerator, model)
        else:
            answer = {"choice": choice_shares, "last_word": last_word_shares, "text": text_shares}[self.task.kind]
            shares = answer(self.examples, encoder, Scorer(accelerator, model, tokens_per_batch), self.name)
        return TaskResult(self.name, self.task.metric, shares, encoder.cut, time.perf_counter() - began)


class BenchmarkCheck:
    """What `training.fit` can call on a period: the results of all benchmarks, by `task/measure`.

    Attributes:
        latest: the results of the last call.

    Raises:
        ValueError: two benchmarks are of one task, so their results would have one name.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, benchmarks: Sequence[Benchmark]) -> None:
        tasks = [benchmark.name.partition("=")[0] for benchmark in benchmarks]
        if twice := next((task for task in tasks if tasks.count(task) > 1), None):
            raise ValueError(f"eval_tasks names {twice} twice: a run is measured by each task once")
        self.accelerator, self.model, self.benchmarks = accelerator, model, benchmarks
        self.latest: list[TaskResult] = []

    def __call__(self, step: int) -> dict[str, float]:
        self.latest = [benchmark.run(self.accelerator, self.model) for benchmark in self.benchmarks]
        return {
            f"{result.task.partition('=')[0]}/{name}": value
            for result in self.latest
            for name, value in result.values.items()
        }


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    model: PreTrainedModel,
    rows: Rows,
    bytes_of_token: Tensor,
    batch_size: int,
    collate: Callable[[Any], dict[str, Tensor]] = as_batch,
) -> dict[str, float]:
    """Mean loss per token and bits per byte of text on packed rows, `(N, T)`, shared among all processes.

    `eval_loss` is in nats and counts every scored token, the `<|endoftext|>` that ends a document included.
    `eval_bits_per_byte` is the loss of the tokens that stand for text, in bits, over the bytes that they stand for.
    """
    totals = torch.zeros(4, dtype=torch.float64)  # nats, tokens, nats of text, bytes
    own = range(accelerator.process_index, len(rows), accelerator.num_processes)
    for start in range(0, len(own), batch_size):
        batch = {
            name: tensor.to(accelerator.device)
            for name, tensor in collate(rows[own[start : start + batch_size]]).items()
        }
        with accelerator.autocast():
            states, embeddings, labels = next_token_prediction(model, batch)
            losses = token_losses(states, embeddings, labels).cpu().double()  # Apple's GPUs have no float64
        labels = labels.cpu()
        text_bytes = torch.where(labels < 0, 0, bytes_of_token[labels.clamp(min=0)])
        totals += torch.stack([losses.sum(), (labels >= 0).sum(), losses[text_bytes > 0].sum(), text_bytes.sum()])
    nats, tokens, nats_of_text, bytes_of_text = summed(accelerator, *totals.tolist())
    return {"eval_loss": nats / tokens, "eval_bits_per_byte": nats_of_text / math.log(2) / bytes_of_text}


@torch.no_grad()
def held_out_means(accelerator: Accelerator, objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """The means of what an objective sums over held-out batches, shared among all processes: `eval_loss` and so on."""
    totals = torch.zeros(2 + len(objective.observed), dtype=torch.float64)  # the weight, then the sums
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            sums = objective.forward(send_to_device(batch, accelerator.device)).reshape(-1)
        totals += torch.cat([objective.weight(batch).reshape(1).cpu().double(), sums.cpu().double()])
    weight, *sums_of_all = summed(accelerator, *totals.tolist())
    names = ("loss", *objective.observed)
    return {f"eval_{name}": value / weight for name, value in zip(names, sums_of_all, strict=True)}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """How many bytes of text each id stands for, `(vocabulary,)`: none for control tokens and unused ids."""
    lengths, control = torch.zeros(vocabulary, dtype=torch.int64), set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index not in control:
            lengths[index] = len(token)  # byte-level BPE writes each byte as one character
    return lengths


def sample(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int,
    max_new_tokens: int = 48,
) -> list[dict[str, str]]:
    """What the model writes after each prompt: `prompt`, `greedy` (likeliest tokens) and `sampled` (top-k 50)."""
    samples = []
    for prompt in prompts:
        inputs = tokenizer([tokenizer.eos_token + prompt], return_tensors="pt").to(accelerator.device)
        line = {"prompt": prompt}
        for name, decoding in DECODINGS.items():
            torch.manual_seed(seed)
            with accelerator.autocast():
                output = model.generate(**inputs, **decoding, max_new_tokens=max_new_tokens)  # type: ignore[operator]
            written = output[0, inputs["input_ids"].shape[1] :]
            line[name] = str(tokenizer.decode(written, skip_special_tokens=True))
        samples.append(line)
    return samples
