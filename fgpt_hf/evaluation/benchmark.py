"""What a model answers to a task's examples: for each measure, a value for every example.

The mean of the values is the result, and their spread its uncertainty.
"""

import re
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.encoding import Encoder, context_length
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.evaluation.tasks import LETTERS, Example, find_task, load_examples
from fgpt_hf.metrics.bits_per_byte.bits_per_byte import document_shares
from fgpt_hf.metrics.hellaswag.hellaswag import mean, right_choices

ExampleScores = Mapping[str, list[float]]

PROMPTS_PER_BATCH = 16
MAX_LETTER_TOKENS = 8  # "The answer is B."


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
    shares: ExampleScores
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
        UserError, OSError: as `tasks.load_examples`.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
        task, equals, file = name.partition("=")
        if equals and not file:
            raise UserError(f"{name} names no file: {task} alone takes its own examples, {task}=FILE those of a file")
        self.name, self.tokenizer, self.task = name, tokenizer, find_task(task)
        self.examples = load_examples(task, tokenizer, file or None, limit)

    def run(self, accelerator: Accelerator, model: PreTrainedModel, tokens_per_batch: int | None = None) -> TaskResult:
        """The model's result, the same on every process; every process must call it.

        Raises:
            UserError: an ending is longer than what the model reads; a log-likelihood is not a number.
        """
        began = time.perf_counter()
        encoder = Encoder(self.tokenizer, context_length(model, self.tokenizer))
        if self.task.kind == "letter":
            shares = letter_scores(self.examples, encoder, accelerator, model)
        else:
            answer = {"choice": choice_scores, "last_word": last_word_scores, "text": text_scores}[self.task.kind]
            shares = answer(self.examples, encoder, Scorer(accelerator, model, tokens_per_batch), self.name)
        return TaskResult(self.name, self.task.metric, shares, encoder.cut, time.perf_counter() - began)


def choice_scores(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> ExampleScores:
    """Whether the right ending was chosen, in four conventions; `acc_token` as its origin encodes, the others together.

    The two encodings seldom differ, and what they share is scored once.
    """
    pairs = [pair for example in examples for pair in example.pairs]
    all_together, all_apart = iter(encoder.encode_joint(pairs)), iter(encoder.encode_separately(pairs))
    together = [list(islice(all_together, len(example.endings))) for example in examples]
    apart = [list(islice(all_apart, len(example.endings))) for example in examples]
    groups = [list(dict.fromkeys([*rows, *others])) for rows, others in zip(together, apart, strict=True)]
    scores = [
        {row: score.log_likelihood for row, score in zip(group, found, strict=True)}
        for group, found in zip(groups, scorer.score(groups, title), strict=True)
    ]

    def hits(encoded: Sequence[Sequence[Any]]) -> ExampleScores:
        return right_choices(
            [[found[row] for row in rows] for rows, found in zip(encoded, scores, strict=True)],
            [[row.scored for row in rows] for rows in encoded],
            [[len(ending) for ending in example.endings] for example in examples],
            [[len(ending.encode()) for ending in example.endings] for example in examples],
            [example.label for example in examples],
        )

    return {**hits(together), "acc_token": hits(apart)["acc_token"]}


def last_word_scores(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> ExampleScores:
    """Whether greedy decoding would write the last word, and the perplexity of it."""
    rows = encoder.encode_joint([example.pairs[0] for example in examples])
    scores = [score for (score,) in scorer.score([[row] for row in rows], title)]
    ones = [1] * len(scores)
    shares = document_shares([-score.log_likelihood for score in scores], ones, ones, ones)
    perplexity = {name: values for name, values in shares.items() if name == "perplexity"}  # none of a broken model
    return {"acc": [float(score.likeliest) for score in scores], **perplexity}


def text_scores(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> ExampleScores:
    """Loss, perplexity and bits per byte of whole texts, read window by window."""
    texts = [example.endings[0] for example in examples]
    windows = [encoder.windows(text) for text in texts]
    scores = iter(scorer.score([[window] for rows in windows for window in rows], title))
    nats = [-sum(score.log_likelihood for (score,) in islice(scores, len(rows))) for rows in windows]
    return document_shares(
        nats,
        [sum(window.scored for window in rows) for rows in windows],
        [len(text.encode()) for text in texts],
        [len(text.split()) for text in texts],
    )


def letter_scores(
    examples: Sequence[Example], encoder: Encoder, accelerator: Accelerator, model: PreTrainedModel
) -> ExampleScores:
    """Whether the model writes the letter of the right choice, and whether it writes any of the letters at all.

    It writes greedily; the first letter of a choice that stands alone is its answer.
    """
    prompts = encoder.prompts([example.contexts[0] for example in examples], MAX_LETTER_TOKENS)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = [order[start : start + PROMPTS_PER_BATCH] for start in range(0, len(order), PROMPTS_PER_BATCH)]
    own: dict[int, str] = {}
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        texts = _generate_letters(accelerator, model, encoder, [prompts[number] for number in batch])
        own |= zip(batch, texts, strict=True)
    written = {number: text for part in gather_object([own]) for number, text in part.items()}
    answers = [_letter(written[number], len(example.endings)) for number, example in enumerate(examples)]
    return {
        "acc": [float(answer == example.label) for answer, example in zip(answers, examples, strict=True)],
        "answered": [float(answer is not None) for answer in answers],
    }


@torch.no_grad()
def _generate_letters(
    accelerator: Accelerator, model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """What the model writes after each prompt, at most `MAX_LETTER_TOKENS` tokens."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[encoder.prefix] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with accelerator.autocast():
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(accelerator.device),
            attention_mask=mask.to(accelerator.device),
            max_new_tokens=MAX_LETTER_TOKENS,
            do_sample=False,
            pad_token_id=encoder.prefix,
        )
    return encoder.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def _letter(text: str, choices: int) -> int | None:
    found = re.search(rf"\b[{LETTERS[:choices]}]\b", text)
    return LETTERS.index(found[0]) if found else None
