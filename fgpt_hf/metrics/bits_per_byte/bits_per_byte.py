"""Loss, perplexity and bits per byte of a corpus, from each document's negative log-likelihood."""

import math
from collections.abc import Sequence

import datasets
import evaluate

LARGEST_EXPONENT = 700  # nats: text without spaces has more a word, broken weights have more a token

_DESCRIPTION = """
How well a language model predicts a corpus: loss per token, perplexity, bits per byte and perplexity per word, each of
the corpus as a whole (sums over all documents divided by each other, not means of the documents' values) and with its
standard error. Bits per byte and word perplexity compare models whose tokenizers differ.
"""

_INPUTS = """
Each argument has an entry for every document.
Args:
    negative_log_likelihoods: the sum over the document's tokens, in nats.
    tokens: the number of tokens in that sum.
    bytes: the document's length in UTF-8 bytes.
    words: its number of words, separated by white space.
Returns:
    loss: nats per token.
    perplexity: its exponential; missing where that is no number.
    bits_per_byte: nats over ln 2, per byte.
    word_perplexity: the exponential of the nats per word; missing where that is no number, in text without spaces.
    loss_stderr, perplexity_stderr, bits_per_byte_stderr, word_perplexity_stderr: standard errors of these ratios, to
        first order, with documents drawn independently.
Examples:
    >>> metric = evaluate.load("fgpt_hf/metrics/bits_per_byte")
    >>> metric.compute(negative_log_likelihoods=[6.0, 2.0], tokens=[3, 1], bytes=[12, 4], words=[3, 1])["loss"]
    2.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class BitsPerByte(evaluate.Metric):
    """The metric as `evaluate.load` finds it."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "negative_log_likelihoods": datasets.Value("float64"),
            "tokens": datasets.Value("int64"),
            "bytes": datasets.Value("int64"),
            "words": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(
        self,
        negative_log_likelihoods: Sequence[float],
        tokens: Sequence[int],
        bytes: Sequence[int],
        words: Sequence[int],
    ) -> dict[str, float]:
        scores = document_scores(negative_log_likelihoods, tokens, bytes, words)
        return {name: value for metric, values in scores.items() for name, value in mean(metric, values).items()}


def document_scores(
    negative_log_likelihoods: Sequence[float], tokens: Sequence[int], bytes: Sequence[int], words: Sequence[int]
) -> dict[str, list[float]]:
    """Return, by metric, a value for each document; their mean is the corpus's, their spread its uncertainty.

    To first order a document moves the ratio r = sum(x) / sum(n) by (x - r n) / sum(n); the exponential of a ratio
    moves by as much times itself (the delta method).

    Raises:
        ValueError: no documents; a corpus without tokens, bytes or words; a number that is not finite.
    """
    nats = negative_log_likelihoods
    if not nats:
        raise ValueError("there are no documents")
    if not all(math.isfinite(value) for value in nats):
        raise ValueError("negative log-likelihoods must be finite numbers, and one is NaN or infinite")
    loss, per_byte, per_word = (_ratio_scores(nats, units) for units in (tokens, bytes, words))
    scores = {"loss": loss}
    if sum(nats) / sum(tokens) < LARGEST_EXPONENT:
        scores["perplexity"] = _exponential_scores(loss)
    scores["bits_per_byte"] = [value / math.log(2) for value in per_byte]
    if sum(nats) / sum(words) < LARGEST_EXPONENT:
        scores["word_perplexity"] = _exponential_scores(per_word)
    return scores


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean as `name` and, of two values or more, its standard error as `name_stderr`."""
    average = sum(values) / len(values)
    if len(values) < 2:
        return {name: average}
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    return {name: average, f"{name}_stderr": math.sqrt(variance / len(values))}


def _ratio_scores(nats: Sequence[float], units: Sequence[int]) -> list[float]:
    total = sum(units)
    if total < 1:
        raise ValueError("the corpus has no tokens, bytes or words to divide by")
    ratio = sum(nats) / total
    return [ratio + len(nats) * (value - ratio * count) / total for value, count in zip(nats, units, strict=True)]


def _exponential_scores(scores: Sequence[float]) -> list[float]:
    average = sum(scores) / len(scores)
    return [math.exp(average) * (1 + score - average) for score in scores]
