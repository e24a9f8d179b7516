"""What a model answers to a task's examples: for each measure, a value for every example.

The mean of the values is the result, and their spread its uncertainty.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from fgpt_hf.boundaries import Encoder
from fgpt_hf.metrics.bits_per_byte.bits_per_byte import document_shares
from fgpt_hf.metrics.hellaswag.hellaswag import right_choices
from fgpt_hf.scoring import Scorer
from fgpt_hf.tasks import LETTERS, Example

Shares = Mapping[str, list[float]]

PROMPTS_PER_BATCH = 16
MAX_LETTER_TOKENS = 8  # "The answer is B."


def choice_shares(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> Shares:
    """Whether the right ending was chosen, in four conventions; `acc_token` as its origin encodes, the others together.

    The two encodings seldom differ, and what they share is scored once.
    """
    pairs = [pair for example in examples for pair in example.pairs]
    all_together, all_apart = iter(encoder.encode_together(pairs)), iter(encoder.encode_apart(pairs))
    together = [list(islice(all_together, len(example.endings))) for example in examples]
    apart = [list(islice(all_apart, len(example.endings))) for example in examples]
    groups = [list(dict.fromkeys([*rows, *others])) for rows, others in zip(together, apart, strict=True)]
    scores = [
        {row: score.log_likelihood for row, score in zip(group, found, strict=True)}
        for group, found in zip(groups, scorer.score(groups, title), strict=True)
    ]

    def hits(encoded: Sequence[Sequence[Any]]) -> Shares:
        return right_choices(
            [[found[row] for row in rows] for rows, found in zip(encoded, scores, strict=True)],
            [[row.scored for row in rows] for rows in encoded],
            [[len(ending) for ending in example.endings] for example in examples],
            [[len(ending.encode()) for ending in example.endings] for example in examples],
            [example.label for example in examples],
        )

    return {**hits(together), "acc_token": hits(apart)["acc_token"]}


def last_word_shares(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> Shares:
    """Whether greedy decoding would write the last word, and the perplexity of it."""
    rows = encoder.encode_together([example.pairs[0] for example in examples])
    scores = [score for (score,) in scorer.score([[row] for row in rows], title)]
    ones = [1] * len(scores)
    shares = document_shares([-score.log_likelihood for score in scores], ones, ones, ones)
    perplexity = {name: values for name, values in shares.items() if name == "perplexity"}  # none of a broken model
    return {"acc": [float(score.likeliest) for score in scores], **perplexity}


def text_shares(examples: Sequence[Example], encoder: Encoder, scorer: Scorer, title: str) -> Shares:
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


def letter_shares(
    examples: Sequence[Example], encoder: Encoder, accelerator: Accelerator, model: PreTrainedModel
) -> Shares:
    """Whether the model writes the letter of the right choice, and whether it writes any of the letters at all.

    It writes greedily; the first letter of a choice that stands alone is its answer.
    """
    prompts = encoder.prompts([example.contexts[0] for example in examples], MAX_LETTER_TOKENS)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = [order[start : start + PROMPTS_PER_BATCH] for start in range(0, len(order), PROMPTS_PER_BATCH)]
    own: dict[int, str] = {}
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        texts = _written(accelerator, model, encoder, [prompts[number] for number in batch])
        own |= zip(batch, texts, strict=True)
    written = {number: text for part in gather_object([own]) for number, text in part.items()}
    answers = [_letter(written[number], len(example.endings)) for number, example in enumerate(examples)]
    return {
        "acc": [float(answer == example.label) for answer, example in zip(answers, examples, strict=True)],
        "answered": [float(answer is not None) for answer in answers],
    }


@torch.no_grad()
def _written(
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
