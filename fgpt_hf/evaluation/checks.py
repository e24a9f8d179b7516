"""Checks: what is measured while a run trains. Each is called with the step and returns what to log, by name.

Legend: N rows, T tokens of a row, V vocabulary.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.data.batches import Rows, as_batch
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import Benchmark, TaskResult
from fgpt_hf.evaluation.generation import generate
from fgpt_hf.losses.objectives import Batch, Objective, next_token_prediction
from fgpt_hf.model.io import context_length
from fgpt_hf.runtime.distributed import all_reduce_sum
from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.document_encoder import rules_of

Prompt = list[dict[str, Any]]

DECODINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 50},
}
# Those of the original FGPT.
FIXED_PROMPTS: Sequence[Prompt] = [
    [{"role": "user", "content": question}]
    for question in ("What is the capital of France?", "What is 2 + 2?", "Define 'cat'.")
]


@dataclass(frozen=True)
class ValidationLoss:
    """Mean loss per token and bits per byte of text on packed rows, shared among all processes.

    `eval_loss` is in nats and counts every scored token, the `<|endoftext|>` that ends a document included.
    `eval_bits_per_byte` is the loss of the tokens that stand for text, in bits, over the bytes that they stand for.

    Attributes:
        rows: the validation set, `(N, T)`, as `collate` takes it.
        bytes_of_token: the bytes of text that each id stands for, `(V,)`, from `bytes_of_tokens`.
        batch_size: rows that go through the model at once.
    """

    every_steps: int
    accelerator: Accelerator
    model: PreTrainedModel
    rows: Rows[Any]
    bytes_of_token: Tensor
    batch_size: int
    collate: Callable[[Any], dict[str, Tensor]] = as_batch

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Return `eval_loss` and `eval_bits_per_byte`, or nothing if no row is held out."""
        if not len(self.rows):
            return {}
        accelerator = self.accelerator
        totals = torch.zeros(4, dtype=torch.float64)  # nats, tokens, nats of text, bytes
        own = range(accelerator.process_index, len(self.rows), accelerator.num_processes)
        for start in range(0, len(own), self.batch_size):
            batch = send_to_device(self.collate(self.rows[own[start : start + self.batch_size]]), accelerator.device)
            with accelerator.autocast():
                prediction = next_token_prediction(self.model, batch)
                losses = prediction.token_losses().cpu().double()  # Apple's GPUs have no float64
            labels = prediction.labels.cpu()
            text_bytes = torch.where(labels < 0, 0, self.bytes_of_token[labels.clamp(min=0)])
            totals += torch.stack([losses.sum(), (labels >= 0).sum(), losses[text_bytes > 0].sum(), text_bytes.sum()])
        nats, tokens, nats_of_text, bytes_of_text = all_reduce_sum(accelerator, *totals.tolist())
        return {"eval_loss": nats / tokens, "eval_bits_per_byte": nats_of_text / math.log(2) / bytes_of_text}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Return the bytes of text that each id stands for, `(V,)`: 0 for control tokens and unused ids.

    A byte-level vocabulary writes each byte as one character; others hold text.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> bytes_of_tokens(tokenizer, 50304)[tokenizer("naïve").input_ids].sum()
        tensor(6)
    """
    lengths, control = torch.zeros(vocabulary, dtype=torch.int64), set(tokenizer.all_special_ids)
    is_byte_level = '"ByteLevel"' in json.dumps(rules_of(tokenizer)["decoder"])
    for token, index in tokenizer.get_vocab().items():
        if index not in control:
            lengths[index] = len(token) if is_byte_level else _bytes_in_words(token)
    return lengths


def _bytes_in_words(token: str) -> int:
    """Return the bytes of a token of SentencePiece, which writes spaces as U+2581 and single bytes as `<0x0A>`."""
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("\u2581", " ").encode())


@dataclass(frozen=True)
class ValidationMeans:
    """Means over validation batches of the loss and the metrics of an objective, shared among all processes."""

    every_steps: int
    accelerator: Accelerator
    objective: Objective
    batches: Sequence[Batch]

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Return `eval_loss`, and `eval_…` for each of the objective's metrics; nothing if no pair is held out."""
        if not self.batches:
            return {}
        accelerator, objective = self.accelerator, self.objective
        totals = torch.zeros(2 + len(objective.metric_names), dtype=torch.float64)  # the number of items, then the sums
        for batch in self.batches[accelerator.process_index :: accelerator.num_processes]:
            with accelerator.autocast():
                sums = objective.forward(send_to_device(batch, accelerator.device)).reshape(-1)
            totals += torch.cat([objective.num_items(batch).reshape(1).cpu().double(), sums.cpu().double()])
        items, *sums_of_all = all_reduce_sum(accelerator, *totals.tolist())
        names = ("loss", *objective.metric_names)
        return {f"eval_{name}": total / items for name, total in zip(names, sums_of_all, strict=True)}


@dataclass
class Benchmarks:
    """Results on benchmarks, as `task/measure`.

    Attributes:
        record: receives the results of each call at once, so that a process killed later does not lose them.
        latest: the results of the last call.
    """

    every_steps: int
    accelerator: Accelerator
    model: PreTrainedModel
    benchmarks: Sequence[Benchmark]
    record: Callable[[Sequence[TaskResult]], None]
    latest: list[TaskResult] = field(default_factory=list)

    def __call__(self, step: int) -> dict[str, float]:
        """Run all benchmarks and return their measures."""
        self.latest = [benchmark.run(self.accelerator, self.model) for benchmark in self.benchmarks]
        self.record(self.latest)
        return {
            f"{result.task.partition('=')[0]}/{name}": value
            for result in self.latest
            for name, value in result.metrics.items()
        }


@dataclass(frozen=True)
class Samples:
    """Continuations of fixed prompts: `prompt`, `greedy` (likeliest tokens) and `sampled` (top-k 50).

    A continuation has `max_new_tokens` or as many as the model's context has room for.

    Attributes:
        prompts: texts, each read as the beginning of a document, of which `require_room` is true.
        write: receives a line for each prompt.
        seed: set again for each continuation, so that it does not depend on the others.
    """

    every_steps: int
    accelerator: Accelerator
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    write: Callable[[Mapping[str, str | int]], None]
    seed: int
    max_new_tokens: int = 48

    def __call__(self, step: int) -> dict[str, float]:
        """Write a line for each prompt; measure nothing."""
        for prompt in self.prompts:
            line: dict[str, str | int] = {"step": step, "prompt": prompt}
            for name, decoding in DECODINGS.items():
                line[name] = self._continuation(prompt, decoding)
            self.write(line)
        return {}

    def _continuation(self, prompt: str, decoding: Mapping[str, Any]) -> str:
        torch.manual_seed(self.seed)
        prompt_ids = _as_document(self.tokenizer, prompt)
        room = context_length(self.model, self.tokenizer) - len(prompt_ids)
        options = {**decoding, "max_new_tokens": min(self.max_new_tokens, room)}
        (ids,) = generate(self.accelerator, self.model, [prompt_ids], _pad_id(self.tokenizer), **options)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class ChatSamples:
    """Replies to fixed prompts: `prompt`, `greedy` (likeliest tokens) and `sampled` (top-k 50).

    Attributes:
        prompts: conversations that the assistant is to continue.
        write: receives a line for each prompt.
        seed: set again for each way of decoding.
    """

    every_steps: int
    accelerator: Accelerator
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    write: Callable[[Mapping[str, str | int]], None]
    seed: int
    max_new_tokens: int

    def __call__(self, step: int) -> dict[str, float]:
        """Write a line for each prompt, and measure the greedy replies.

        `answers_ended` is the fraction of them that end before `max_new_tokens`, `answer_tokens` their mean length.
        """
        replies = {name: self._replies(decoding) for name, decoding in DECODINGS.items()}
        for index, prompt in enumerate(self.prompts):
            texts = {
                name: str(self.tokenizer.decode(ids[index], skip_special_tokens=True)) for name, ids in replies.items()
            }
            self.write({"step": step, "prompt": "\n".join(map(_text_of, prompt)), **texts})
        lengths = [len(ids) for ids in replies["greedy"]]
        ended = fmean(length < self.max_new_tokens for length in lengths)
        return {"answers_ended": ended, "answer_tokens": fmean(lengths)}

    def _replies(self, decoding: Mapping[str, Any]) -> list[list[int]]:
        torch.manual_seed(self.seed)
        encoded: Any = self.tokenizer.apply_chat_template(list(self.prompts), add_generation_prompt=True)
        options = {**decoding, "max_new_tokens": self.max_new_tokens}
        return generate(self.accelerator, self.model, encoded["input_ids"], _pad_id(self.tokenizer), **options)


def require_room(tokenizer: PreTrainedTokenizerBase, prompt: str, context: int) -> str:
    """Return the prompt if it leaves room for a continuation in the model's context; raise UserError if not.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> require_room(build_tokenizer(), "Once upon a time", context=5)
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: sample_prompt has 5 tokens, which leaves no room in a context of 5: shorten it
    """
    tokens = len(_as_document(tokenizer, prompt))
    if tokens >= context:
        raise UserError(
            f"sample_prompt has {tokens} tokens, which leaves no room in a context of {context}: shorten it"
        )
    return prompt


def beginning_of(tokenizer: PreTrainedTokenizerBase, ids: npt.NDArray[np.uint16], context: int) -> str:
    """Return the first tokens of a text, eight at most, that leave room for a continuation in the model's context."""
    texts = (str(tokenizer.decode(ids[:length], skip_special_tokens=True)) for length in range(8, 0, -1))
    return next((text for text in texts if len(_as_document(tokenizer, text)) < context), "")


def prompts_that_fit(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], context: int, max_new_tokens: int
) -> list[Prompt]:
    """Return the prompts that leave room for a reply of `max_new_tokens` in the model's context."""
    if not prompts:
        return []
    with rendering("the chat template refuses a prompt"):
        encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True)
    room = context - max_new_tokens
    return [prompt for prompt, ids in zip(prompts, encoded["input_ids"], strict=True) if len(ids) <= room]


def fixed_prompts_that_fit(tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int) -> list[Prompt]:
    """Return those of `FIXED_PROMPTS` that leave room for a reply of `max_new_tokens` in the model's context.

    Raises:
        UserError: none of them does.
    """
    fitting = prompts_that_fit(tokenizer, FIXED_PROMPTS, context, max_new_tokens)
    if not fitting:
        raise UserError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context} tokens")
    return fitting


def _as_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that begins a document."""
    encoded: Any = tokenizer([f"{tokenizer.eos_token}{text}"])
    ids: list[int] = encoded["input_ids"][0]
    return ids


def _text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message, which may come in parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(pad, int)  # training has refused a tokenizer without an end of text
    return pad
