"""Accuracy on multiple choice by likelihood, in the four conventions in use, from sums of log-likelihoods."""

import math
from collections.abc import Sequence

import datasets
import evaluate

Sums = Sequence[Sequence[float]]  # of every ending of every example
Lengths = Sequence[Sequence[int]]

_DESCRIPTION = """
Accuracy on HellaSwag, or on any multiple choice, of a language model that picks the ending which it finds likeliest.
Published figures differ by how an ending's log-likelihood is divided by its length before endings are compared; this
metric gives all four conventions at once, each with its standard error, from the model's sums alone.
"""

_INPUTS = """
Each argument has an entry for every example.
Args:
    log_likelihoods: for each ending, the sum of its tokens' log-likelihoods in nats.
    tokens: for each ending, the number of tokens in that sum.
    characters: for each ending, its length in characters, without the space before it.
    bytes: for each ending, its length in UTF-8 bytes, without the space before it.
    labels: the number of the right ending, from 0.
Returns:
    acc: the share of examples whose right ending has the greatest sum.
    acc_norm: the same, sums divided by characters, as lm-evaluation-harness does.
    acc_bytes: the same, sums divided by bytes.
    acc_token: the same, sums divided by tokens, as Karpathy's scripts do.
    acc_stderr, acc_norm_stderr, acc_bytes_stderr, acc_token_stderr: their standard errors.
Examples:
    >>> metric = evaluate.load("fgpt_hf/metrics/hellaswag")
    >>> metric.compute(log_likelihoods=[[-4.0, -6.0]], tokens=[[1, 3]], characters=[[4, 7]], bytes=[[4, 7]], labels=[1])
    {'acc': 0.0, 'acc_norm': 1.0, 'acc_bytes': 1.0, 'acc_token': 1.0}
"""

_CITATION = """
@inproceedings{zellers2019hellaswag,
    title={HellaSwag: Can a Machine Really Finish Your Sentence?},
    author={Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
    booktitle={Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year={2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class HellaSwag(evaluate.Metric):
    """The metric as `evaluate.load` finds it."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "log_likelihoods": datasets.Sequence(datasets.Value("float64")),
            "tokens": datasets.Sequence(datasets.Value("int64")),
            "characters": datasets.Sequence(datasets.Value("int64")),
            "bytes": datasets.Sequence(datasets.Value("int64")),
            "labels": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/1905.07830"],
        )

    def _compute(
        self, log_likelihoods: Sums, tokens: Lengths, characters: Lengths, bytes: Lengths, labels: Sequence[int]
    ) -> dict[str, float]:
        hits = right_choices(log_likelihoods, tokens, characters, bytes, labels)
        return {name: value for convention, values in hits.items() for name, value in mean(convention, values).items()}


def right_choices(
    log_likelihoods: Sums, tokens: Lengths, characters: Lengths, bytes: Lengths, labels: Sequence[int]
) -> dict[str, list[float]]:
    """Return, by convention, 1.0 where the right ending is chosen and 0.0 elsewhere; of equal scores the first wins.

    Raises:
        ValueError: no examples; numbers of endings that differ; a label out of range; a length below 1; a NaN.
    """
    if not labels:
        raise ValueError("there are no examples")
    ones = [[1] * len(sums) for sums in log_likelihoods]
    lengths = {"acc": ones, "acc_norm": characters, "acc_bytes": bytes, "acc_token": tokens}
    return {
        convention: [
            float(_choice(*example) == example[2]) for example in zip(log_likelihoods, divisors, labels, strict=True)
        ]
        for convention, divisors in lengths.items()
    }


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean as `name` and, of two values or more, its standard error as `name_stderr`."""
    average = sum(values) / len(values)
    if len(values) < 2:
        return {name: average}
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    return {name: average, f"{name}_stderr": math.sqrt(variance / len(values))}


def _choice(sums: Sequence[float], divisors: Sequence[int], label: int) -> int:
    if len(sums) != len(divisors):
        raise ValueError(f"an example has {len(sums)} log-likelihoods and {len(divisors)} lengths")
    if not 0 <= label < len(sums):
        raise ValueError(f"the label {label} is not one of 0 to {len(sums) - 1}")
    if any(divisor < 1 for divisor in divisors):
        raise ValueError(f"lengths must be 1 or more, not {list(divisors)}")
    if any(math.isnan(value) for value in sums):
        raise ValueError(f"log-likelihoods must be numbers, not {list(sums)}")
    scores = [value / divisor for value, divisor in zip(sums, divisors, strict=True)]
    return scores.index(max(scores))
