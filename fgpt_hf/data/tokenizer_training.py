"""Train a tokenizer on the documents of a corpus: byte-level BPE, as GPT-2's, with FGPT's control tokens.

A vocabulary that was made for the text needs fewer tokens for it, above all in another language than English; a small
one leaves a small network more of its weights. Losses per token cannot be compared between two vocabularies, but bits
per byte can. The result follows from the documents and the size alone, on any machine and with any number of cores.
"""

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import TokenizerTraining
from fgpt_hf.data.corpora import open_corpus
from fgpt_hf.data.splits import ALL_HELD_OUT, TRAIN, VALIDATION, ValidationRule, empty_split_error, split_texts
from fgpt_hf.data.stream import EpochPosition, read_buffers
from fgpt_hf.data.validation_rule import validation_rule
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory, refuse_existing
from fgpt_hf.tokenizer.document_encoder import encode_documents
from fgpt_hf.tokenizer.surrogates import repair_surrogates
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, add_control_tokens

logger = logging.getLogger(__name__)

BYTES = 256
HELD_OUT_CHARACTERS = 10_000_000  # that are encoded for the report


def train_tokenizer(training: TokenizerTraining) -> str:
    """Train a tokenizer as the flags of `fgpt tokenizer` say, write its folder, and return a report.

    Raises:
        UserError: the vocabulary has no room for its fixed tokens, the folder exists, the corpus cannot be read or
            holds no text.
        OSError: the folder cannot be written.
    """
    folder = Path(training.output_dir)
    if training.vocab_size < BYTES + len(CONTROL_TOKENS):
        raise UserError(
            f"vocab_size={training.vocab_size} has no room for the {BYTES} bytes and {len(CONTROL_TOKENS)} control "
            f"tokens: give {BYTES + len(CONTROL_TOKENS)} or more, such as 8192"
        )
    refuse_existing(folder)
    with atomic_directory(folder) as partial:  # from the start: where it cannot be written, nothing is trained
        documents = _Documents(training)
        tokenizer = _trained(documents, training.vocab_size)
        tokenizer.save_pretrained(partial)
    lines = [
        f"{folder}: {len(tokenizer):,} tokens, from {documents.characters:,} characters",
        *([compression_report(tokenizer, documents.held_out)] if documents.held_out else []),
        f"train with --tokenizer {shlex.quote(str(folder))}",
    ]
    return "\n".join(lines)


def compression_report(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str:
    """Return a line on the bytes that a token stands for in `texts`, next to those of GPT-2's tokenizer.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> compression_report(build_tokenizer(), ["Once upon a time"])
        'bytes per token of 16 bytes held out: 4.00, of GPT-2 with 50,257 tokens 4.00 (0 % fewer tokens)'
    """
    texts = repair_surrogates(texts)
    size = sum(len(text.encode()) for text in texts)
    encoded: Any = tokenizer(texts, split_special_tokens=True, verbose=False)
    own = sum(map(len, encoded["input_ids"]))
    gpt2 = sum(map(len, encode_documents(texts)))
    change = f"{abs(own / gpt2 - 1):.0%}".replace("%", f" % {'more' if own > gpt2 else 'fewer'} tokens")
    return (
        f"bytes per token of {size:,} bytes held out: {size / own:.2f}, of GPT-2 with 50,257 tokens "
        f"{size / gpt2:.2f} ({change})"
    )


class _Documents:
    """The documents of a corpus up to a number of characters, divided into what is trained on and what is held out.

    Attributes:
        characters: those read so far to train on.
        held_out: held-out texts met along the way, for the report.
    """

    def __init__(self, training: TokenizerTraining) -> None:
        self.shards = open_corpus(training.source)
        self.rule: ValidationRule = validation_rule(training.source, self.shards)
        self.limit, self.fraction = training.max_characters, training.validation_fraction
        self.characters = 0
        self.held_out: list[str] = []

    def __iter__(self) -> Iterator[str]:
        """Yield the texts to train on, of all shards by turns."""
        with tqdm(desc="reading", unit=" characters", unit_scale=True, leave=False) as bar:
            for block in (block for buffer in read_buffers(self.shards, EpochPosition()) for block in buffer.blocks):
                rule = ALL_HELD_OUT if block.is_validation else self.rule
                texts = split_texts(block.texts, rule, repeats=block.repeats)
                self._hold_out(texts[VALIDATION])
                for text in texts[TRAIN]:
                    if self.characters >= self.limit:
                        return
                    self.characters += len(text)
                    bar.update(len(text))
                    yield repair_surrogates(text)
        if not self.characters:
            raise empty_split_error(self.fraction, TRAIN)

    def _hold_out(self, texts: Sequence[str]) -> None:
        if sum(map(len, self.held_out)) < HELD_OUT_CHARACTERS:
            self.held_out += texts


def _trained(documents: _Documents, vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of `vocab_size` tokens, or fewer where the text has no more that occur twice."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        min_frequency=2,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(iter(documents), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    trained = add_control_tokens(model["vocab"], [tuple(merge) for merge in model["merges"]])
    if len(trained) < vocab_size:
        logger.warning(
            "the text has no more than %s tokens that occur twice: give more text, or a smaller vocab_size",
            f"{len(trained):,}",
        )
    return trained
