"""What a model is worth: its results on benchmarks, its loss on held-out text, and what it writes."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.data.batches import Rows, as_batch
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import Benchmark, TaskResult
from fgpt_hf.losses.linear_cross_entropy import token_losses
from fgpt_hf.losses.objectives import Batch, Objective, next_token_prediction
from fgpt_hf.runtime.distributed import all_reduce_sum

DECODINGS: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 50}}


class BenchmarkCheck:
    """What `training.fit` can call on a period: the results of all benchmarks, by `task/measure`.

    Attributes:
        latest: the results of the last call.

    Raises:
        UserError: two benchmarks are of one task, so their results would have one name.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, benchmarks: Sequence[Benchmark]) -> None:
        tasks = [benchmark.name.partition("=")[0] for benchmark in benchmarks]
        if twice := next((task for task in tasks if tasks.count(task) > 1), None):
            raise UserError(f"eval_tasks names {twice} twice: a run is measured by each task once")
        self.accelerator, self.model, self.benchmarks = accelerator, model, benchmarks
        self.latest: list[TaskResult] = []

    def __call__(self, step: int) -> dict[str, float]:
        self.latest = [benchmark.run(self.accelerator, self.model) for benchmark in self.benchmarks]
        return {
            f"{result.task.partition('=')[0]}/{name}": value
            for result in self.latest
            for name, value in result.metrics.items()
        }


@torch.no_grad()
def validation_loss(
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
    nats, tokens, nats_of_text, bytes_of_text = all_reduce_sum(accelerator, *totals.tolist())
    return {"eval_loss": nats / tokens, "eval_bits_per_byte": nats_of_text / math.log(2) / bytes_of_text}


@torch.no_grad()
def validation_means(accelerator: Accelerator, objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """The means of what an objective sums over held-out batches, shared among all processes: `eval_loss` and so on."""
    totals = torch.zeros(2 + len(objective.metric_names), dtype=torch.float64)  # the weight, then the sums
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            sums = objective.forward(send_to_device(batch, accelerator.device)).reshape(-1)
        totals += torch.cat([objective.num_items(batch).reshape(1).cpu().double(), sums.cpu().double()])
    weight, *sums_of_all = all_reduce_sum(accelerator, *totals.tolist())
    names = ("loss", *objective.metric_names)
    return {f"eval_{name}": value / weight for name, value in zip(names, sums_of_all, strict=True)}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """How many bytes of text each id stands for, `(vocabulary,)`: none for control tokens and unused ids."""
    lengths, control = torch.zeros(vocabulary, dtype=torch.int64), set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index not in control:
            lengths[index] = len(token)  # byte-level BPE writes each byte as one character
    return lengths


def generate_samples(
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


Prompt = list[dict[str, Any]]

PROMPTS_PER_BATCH = 16
# Those of the original FGPT.
FIXED_PROMPTS: Sequence[Prompt] = [
    [{"role": "user", "content": question}]
    for question in ("What is the capital of France?", "What is 2 + 2?", "Define 'cat'.")
]


def prompts_that_fit(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], context: int, max_new_tokens: int
) -> list[Prompt]:
    """The prompts that leave a model of this context room for an answer.

    Raises:
        UserError: there is none.
    """
    encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True)
    room = context - max_new_tokens
    found = [prompt for prompt, ids in zip(prompts, encoded["input_ids"], strict=True) if len(ids) <= room]
    if not found:
        raise UserError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context}")
    return found


def generate_answers(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int,
    max_new_tokens: int,
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """A line for each prompt, `prompt`, `greedy` (likeliest tokens) and `sampled` (top-k 50), and what to measure.

    `answers_ended` is the share of the greedy answers that end by themselves, `answer_tokens` their mean length.
    """
    lines = [{"prompt": "\n".join(map(_said, prompt))} for prompt in prompts]
    measured: dict[str, float] = {}
    for name, decoding in DECODINGS.items():
        torch.manual_seed(seed)
        options = {**decoding, "max_new_tokens": max_new_tokens}
        answers = [
            ids
            for start in range(0, len(prompts), PROMPTS_PER_BATCH)
            for ids in _generate(accelerator, model, tokenizer, prompts[start : start + PROMPTS_PER_BATCH], options)
        ]
        for line, ids in zip(lines, answers, strict=True):
            line[name] = str(tokenizer.decode(ids, skip_special_tokens=True))
        if name == "greedy":
            ended = [len(ids) < max_new_tokens for ids in answers]
            measured = {"answers_ended": fmean(ended), "answer_tokens": fmean(map(len, answers))}
    return lines, measured


def _said(message: Mapping[str, Any]) -> str:
    """A message's text, which may be in parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _generate(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
) -> list[list[int]]:
    """The ids of each answer, without the token that ends it."""
    inputs: Any = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    with accelerator.autocast():
        output = model.generate(**inputs.to(accelerator.device), **options)  # type: ignore[operator]
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))] for ids in answers]
