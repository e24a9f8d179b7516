"""Run a benchmark on a model: a value for each example and metric, whose mean is the result."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.encoding import Encoder
from fgpt_hf.evaluation.generation import PROMPTS_PER_BATCH, generate
from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.evaluation.tasks import LETTERS, Example, find_task, load_examples
from fgpt_hf.metrics.bits_per_byte.bits_per_byte import document_scores
from fgpt_hf.metrics.hellaswag.hellaswag import right_choices
from fgpt_hf.model.io import context_length

ExampleScores = Mapping[str, list[float]]  # by metric, a value for each example

MAX_LETTER_TOKENS = 8  # "The answer is B."
MAX_REPLY_TOKENS = 24  # of a short sentence, with room to see that it ends
REPLY_TOKENS = {"letter": MAX_LETTER_TOKENS, "reply": MAX_REPLY_TOKENS}  # by the kind of tasks that generate


@dataclass(frozen=True)
class TaskResult:
    """The result of a model on one task.

    Attributes:
        task: the task's name, with `=FILE` if the examples came from a file.
        headline_metric: the metric that the task is usually quoted by.
        scores: by metric, a value for each example (or document), whose mean is the result.
        contexts_cut: contexts that were longer than the model reads, counted once for each ending.
        seconds: duration of the evaluation.
    """

    task: str
    headline_metric: str
    scores: ExampleScores
    contexts_cut: int
    seconds: float

    @property
    def examples(self) -> int:
        """The number of examples, or of documents."""
        return len(self.scores[self.headline_metric])

    @property
    def metrics(self) -> dict[str, float]:
        """Each metric, followed by its standard error as `…_stderr` if there are at least two examples."""
        found = {}
        for name, values in self.scores.items():
            found[name], error = mean_and_stderr(values)
            if error is not None:
                found[f"{name}_stderr"] = error
        return found


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and its standard error if there are at least two values.

    Example:
        >>> mean_and_stderr([1.0, 0.0, 1.0, 0.0])
        (0.5, 0.28867513459481287)
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


class Benchmark:
    """The examples of a task, loaded once, to evaluate any number of models that share a tokenizer.

    Args:
        name: one of `tasks.TASKS`, or `TASK=FILE` for examples from a file.
        limit: take only the first `limit` examples.

    Raises:
        UserError: as `tasks.load_examples`.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> benchmark = Benchmark("pydocs-choice", build_tokenizer(), limit=4)
        >>> benchmark.run(Accelerator(cpu=True), model).examples
        4
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
        task, equals, file = name.partition("=")
        if equals and not file:
            raise UserError(f"{name} names no file: {task} alone takes its own examples, {task}=FILE those of a file")
        self.name, self.tokenizer, self.task = name, tokenizer, find_task(task)
        self.examples = load_examples(task, tokenizer, file or None, limit)

    def require_context(self, context: int) -> None:
        """Raise UserError if a model that reads `context` tokens cannot be asked, because an example is too long."""
        encoder = Encoder(self.tokenizer, context)
        if self.task.kind in REPLY_TOKENS:
            if context <= REPLY_TOKENS[self.task.kind]:
                raise UserError(f"{self.name}: a context of {context} tokens has no room for an answer")
        elif self.task.kind != "text":
            pairs = [pair for example in self.examples for pair in example.pairs]
            # A token is a byte at least. The space before an ending may move to it.
            long = [pair for pair in pairs if len(pair[1].encode()) + len(pair[0]) - len(pair[0].rstrip()) >= context]
            encoder.encode_joint(long)
            encoder.encode_separately(long)

    def run(self, accelerator: Accelerator, model: PreTrainedModel, tokens_per_batch: int | None = None) -> TaskResult:
        """Return the model's result, the same on every process; every process must call it.

        Raises:
            UserError: an ending is longer than what the model reads, or a log-likelihood is not a finite number.
        """
        start = time.perf_counter()
        encoder = Encoder(self.tokenizer, context_length(model, self.tokenizer))
        if self.task.kind in REPLY_TOKENS:
            ask = {"letter": letter_scores, "reply": reply_scores}[self.task.kind]
            scores = ask(self.examples, encoder, accelerator, model)
        else:
            score = {"choice": choice_scores, "last_word": last_word_scores, "text": text_scores}[self.task.kind]
            scores = score(self.examples, encoder, Scorer(accelerator, model, tokens_per_batch), self.name)
        return TaskResult(
            self.name, self.task.headline_metric, scores, encoder.contexts_cut, time.perf_counter() - start
        )


def load_benchmarks(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int, limit: int | None = None
) -> list[Benchmark]:
    """Return the benchmarks that a run is measured by, for a model that reads `context` tokens.

    Raises:
        UserError: a name is unknown, or names a task twice, which is said before any examples are loaded; or as
            `Benchmark` and `Benchmark.require_context`.
    """
    tasks = [name.partition("=")[0] for name in names]
    for task in tasks:
        find_task(task)
    if twice := next((task for task in tasks if tasks.count(task) > 1), None):
        raise UserError(f"eval_tasks names {twice} twice: a run is measured by each task once")
    benchmarks = [Benchmark(name, tokenizer, limit) for name in names]
    for benchmark in benchmarks:
        benchmark.require_context(context)
    return benchmarks


def choice_scores(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> ExampleScores:
    """Score whether the right ending is the likeliest, in four conventions (`metrics/hellaswag`).

    `acc_token` encodes context and ending separately, as its origin does; the others jointly. Rows that both encodings
    have in common, nearly all, are scored once.
    """
    pairs = [pair for example in examples for pair in example.pairs]
    all_joint, all_separate = iter(encoder.encode_joint(pairs)), iter(encoder.encode_separately(pairs))
    joint = [list(islice(all_joint, len(example.endings))) for example in examples]
    separate = [list(islice(all_separate, len(example.endings))) for example in examples]
    groups = [list(dict.fromkeys([*rows, *others])) for rows, others in zip(joint, separate, strict=True)]
    likelihoods = [
        {row: score.log_likelihood for row, score in zip(group, found, strict=True)}
        for group, found in zip(groups, scorer.score(groups, title), strict=True)
    ]

    def hits(encoded: Sequence[Sequence[Row]]) -> ExampleScores:
        return right_choices(
            [[found[row] for row in rows] for rows, found in zip(encoded, likelihoods, strict=True)],
            [[row.scored for row in rows] for rows in encoded],
            [[len(ending) for ending in example.endings] for example in examples],
            [[len(ending.encode()) for ending in example.endings] for example in examples],
            [example.label for example in examples],
        )

    return {**hits(joint), "acc_token": hits(separate)["acc_token"]}


def last_word_scores(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> ExampleScores:
    """Score whether greedy decoding would write the last word, and the perplexity of that word."""
    rows = encoder.encode_joint([example.pairs[0] for example in examples])
    scores = [score for (score,) in scorer.score([[row] for row in rows], title)]
    ones = [1] * len(scores)
    found = document_scores([-score.log_likelihood for score in scores], ones, ones, ones)
    perplexity = {name: values for name, values in found.items() if name == "perplexity"}  # a broken model has none
    return {"acc": [float(score.likeliest) for score in scores], **perplexity}


def text_scores(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> ExampleScores:
    """Score loss, perplexity and bits per byte of whole texts, window by window (`metrics/bits_per_byte`)."""
    texts = [example.endings[0] for example in examples]
    windows = [encoder.windows(text) for text in texts]
    scores = iter(scorer.score([[window] for rows in windows for window in rows], title))
    nats = [-sum(score.log_likelihood for (score,) in islice(scores, len(rows))) for rows in windows]
    return document_scores(
        nats,
        [sum(window.scored for window in rows) for rows in windows],
        [len(text.encode()) for text in texts],
        [len(text.split()) for text in texts],
    )


def letter_scores(
    examples: Sequence[Example], encoder: Encoder, accelerator: Accelerator, model: PreTrainedModel
) -> ExampleScores:
    """Score whether the model writes the letter of the right choice, and whether it writes any of the letters.

    Decoding is greedy. The first letter of a choice that stands alone is the answer.
    """
    texts = _greedy_replies(examples, encoder, accelerator, model, MAX_LETTER_TOKENS)
    answers = [_find_letter(text, len(example.endings)) for text, example in zip(texts, examples, strict=True)]
    return {
        "acc": [float(answer == example.label) for answer, example in zip(answers, examples, strict=True)],
        "answered": [float(answer is not None) for answer in answers],
    }


def reply_scores(
    examples: Sequence[Example], encoder: Encoder, accelerator: Accelerator, model: PreTrainedModel
) -> ExampleScores:
    """Score whether the greedy reply is the answer, apart from white space around it."""
    texts = _greedy_replies(examples, encoder, accelerator, model, MAX_REPLY_TOKENS)
    answers = [example.endings[example.label].strip() for example in examples]
    return {"exact_match": [float(text.strip() == answer) for text, answer in zip(texts, answers, strict=True)]}


def _greedy_replies(
    examples: Sequence[Example],
    encoder: Encoder,
    accelerator: Accelerator,
    model: PreTrainedModel,
    max_new_tokens: int,
) -> list[str]:
    """Return the likeliest reply to each example's context, the same on every process."""
    prompts = encoder.prompts([example.contexts[0] for example in examples], max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + PROMPTS_PER_BATCH] for start in range(0, len(order), PROMPTS_PER_BATCH)]
    own = [index for batch in batches[accelerator.process_index :: accelerator.num_processes] for index in batch]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    written = generate(accelerator, model, [prompts[index] for index in own], encoder.prefix, **options)
    texts = encoder.tokenizer.batch_decode(written, skip_special_tokens=True)
    text_of = dict(gather_object(list(zip(own, texts, strict=True))))
    return [text_of[index] for index in range(len(examples))]


def _find_letter(text: str, choices: int) -> int | None:
    """Return the number of the first choice whose letter stands alone in the text."""
    found = re.search(rf"\b[{LETTERS[:choices]}]\b", text)
    return LETTERS.index(found[0]) if found else None
