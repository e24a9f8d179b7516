"""What a model answers: the choices of the harness and of the original, letters that it writes, whole texts."""

import math
import statistics

import pytest
import torch
from accelerate import Accelerator

from fgpt_hf.evaluation.benchmark import choice_scores, last_word_scores, letter_scores, reply_scores, text_scores
from fgpt_hf.evaluation.encoding import Encoder
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.evaluation.tasks import Example
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from tests.support.harness import harness_score, original_choice
from tests.support.tiny import CONTEXT, random_model, tokenizer

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of
a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this
truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of some
one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield
Park is let at last?" Größe — naïve café, 東京 🙂."""


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def model() -> FGPTForCausalLM:
    return random_model()


def examples(count: int = 40) -> list[Example]:
    """Four pieces of text as endings of a fifth; some contexts are too long, empty, or end in white space."""
    words = TEXT.split(" ")
    found = []
    for number in range(count):
        pieces = [" ".join(words[(number * 7 + start) % 60 :][: 3 + (number + start) % 5]) for start in range(4)]
        context = ["", "It is ", TEXT, " ".join(words[number : number + 9])][min(number, 3)]
        found.append(Example([context] * 4, pieces, number % 4))
    return found


def scores(model: FGPTForCausalLM, accelerator: Accelerator) -> dict[str, list[float]]:
    return dict(choice_scores(examples(), Encoder(tokenizer(), CONTEXT), Scorer(accelerator, model), ""))


def test_choices_equal_the_harness_example_by_example(accelerator: Accelerator, model: FGPTForCausalLM) -> None:
    found = scores(model, accelerator)
    for number, example in enumerate(examples()):
        sums = [harness_score(model, tokenizer(), *pair)[0] for pair in example.pairs]
        lengths = {"acc": [1] * 4, "acc_norm": list(map(len, example.endings))}
        lengths["acc_bytes"] = [len(ending.encode()) for ending in example.endings]
        for metric, divisors in lengths.items():
            normed = [value / divisor for value, divisor in zip(sums, divisors, strict=True)]
            assert found[metric][number] == float(normed.index(max(normed)) == example.label), (number, metric)


def test_choices_per_token_equal_the_original_example_by_example(
    accelerator: Accelerator, model: FGPTForCausalLM
) -> None:
    found = scores(model, accelerator)["acc_token"]
    for number, example in list(enumerate(examples()))[3:]:  # it can take neither empty nor long contexts
        choice = original_choice(model, tokenizer(), example.contexts[0], example.endings)
        assert found[number] == float(choice == example.label), number


def test_contexts_that_were_cut_are_counted(accelerator: Accelerator, model: FGPTForCausalLM) -> None:
    encoder = Encoder(tokenizer(), CONTEXT)
    choice_scores(examples(5), encoder, Scorer(accelerator, model), "")
    assert encoder.contexts_cut == 4


def test_the_side_of_padding_changes_nothing(accelerator: Accelerator, model: FGPTForCausalLM) -> None:
    expected = scores(model, accelerator)
    side, tokenizer().padding_side = tokenizer().padding_side, "right"
    try:
        assert scores(model, accelerator) == expected
    finally:
        tokenizer().padding_side = side


def test_a_model_that_knows_the_answers_scores_one(accelerator: Accelerator) -> None:
    """Its output weights are moved towards the first tokens of the right endings, after each context."""
    model = random_model()
    known = [Example(example.contexts, [f"{letter}." for letter in "WXYZ"], 2) for example in examples()]
    answer = tokenizer().encode(" Y")[0]
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.bias.copy_(model.lm_head.weight[answer] * 100)
    found = choice_scores(known, Encoder(tokenizer(), CONTEXT), Scorer(accelerator, model), "")
    assert {metric: set(values) for metric, values in found.items()} == dict.fromkeys(found, {1.0})


def test_a_random_model_scores_chance(accelerator: Accelerator, model: FGPTForCausalLM) -> None:
    for values in choice_scores(examples(200), Encoder(tokenizer(), CONTEXT), Scorer(accelerator, model), "").values():
        assert abs(statistics.fmean(values) - 0.25) < 3 * statistics.stdev(values) / math.sqrt(len(values))


def test_a_last_word_is_scored_as_the_harness_does(accelerator: Accelerator, model: FGPTForCausalLM) -> None:
    asked = [Example([" ".join(TEXT.split()[:count])], [TEXT.split()[count]], 0) for count in range(3, 30)]
    found = last_word_scores(asked, Encoder(tokenizer(), CONTEXT), Scorer(accelerator, model), "")
    expected = [harness_score(model, tokenizer(), *example.pairs[0]) for example in asked]
    assert found["acc"] == [float(greedy) for _, greedy in expected]
    perplexity = math.exp(-statistics.fmean(likelihood for likelihood, _ in expected))
    assert statistics.fmean(found["perplexity"]) == pytest.approx(perplexity, rel=1e-4)


def test_a_text_longer_than_the_context_is_scored_window_by_window(
    accelerator: Accelerator, model: FGPTForCausalLM
) -> None:
    asked = [Example([""], [text], 0) for text in (TEXT, TEXT[:50])]
    found = text_scores(asked, Encoder(tokenizer(), CONTEXT), Scorer(accelerator, model), "")
    nats = 0.0
    for text in (TEXT, TEXT[:50]):
        ids = tokenizer().encode(text)
        for start in range(0, len(ids), CONTEXT):
            end = min(start + CONTEXT, len(ids))
            read = [tokenizer().bos_token_id, *ids][max(0, end - CONTEXT) : end]
            with torch.no_grad():
                predicted = model(torch.tensor([read])).logits[0, start - end :].log_softmax(dim=1)
            nats -= float(predicted.gather(1, torch.tensor(ids[start:end])[:, None]).sum())
    octets = len((TEXT + TEXT[:50]).encode())
    assert statistics.fmean(found["bits_per_byte"]) == pytest.approx(nats / math.log(2) / octets, rel=1e-5)


class Parrot:
    """Stands in for a model's `generate`: it answers with the same words to everyone."""

    generation_config = None

    def __init__(self, reply: str) -> None:
        self.reply = tokenizer().encode(reply)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> torch.Tensor:
        assert (attention_mask.sum(dim=1) > 0).all() and input_ids.shape == attention_mask.shape
        return torch.cat([input_ids, torch.tensor([self.reply] * len(input_ids))], dim=1)


@pytest.mark.parametrize(
    ("reply", "acc", "answered"),
    [("B", 0.25, 1.0), (" The answer is C.", 0.25, 1.0), ("An apple", 0.0, 0.0), ("E", 0.0, 0.0), ("", 0.0, 0.0)],
)
def test_the_letter_that_is_written_counts(accelerator: Accelerator, reply: str, acc: float, answered: float) -> None:
    asked = [Example(["Which one?"] * 4, list("ABCD"), label) for label in range(4)]
    found = letter_scores(asked, Encoder(tokenizer(), CONTEXT), accelerator, Parrot(reply))
    assert {name: statistics.fmean(values) for name, values in found.items()} == {"acc": acc, "answered": answered}


@pytest.mark.parametrize(("reply", "matches"), [("Paris.", 0.5), (" Paris. ", 0.5), ("Paris", 0.0), ("Paris. It", 0.0)])
def test_a_reply_counts_if_it_is_the_whole_answer(accelerator: Accelerator, reply: str, matches: float) -> None:
    asked = [Example(["Which city?"], [answer], 0) for answer in ("Paris.", "Rome.")]
    found = reply_scores(asked, Encoder(tokenizer(), CONTEXT), accelerator, Parrot(reply))
    assert {name: statistics.fmean(values) for name, values in found.items()} == {"exact_match": matches}


def test_a_model_writes_its_letters_itself(accelerator: Accelerator, model: FGPTForCausalLM) -> None:
    """Prompts of many lengths, in batches, of which some are longer than what the model reads."""
    asked = [Example([example.contexts[0] or "x"] * 4, list("ABCD"), example.label) for example in examples(20)]
    found = letter_scores(asked, Encoder(tokenizer(), CONTEXT), accelerator, model)
    assert len(found["acc"]) == len(found["answered"]) == 20
