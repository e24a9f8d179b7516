"""`fgpt tokenizer`."""

from collections.abc import Sequence

from fgpt_hf.config.parser import parse_options
from fgpt_hf.config.runs import TokenizerTraining
from fgpt_hf.data.tokenizer_training import train_tokenizer


def main(arguments: Sequence[str]) -> None:
    """Train a tokenizer, and print how it compares with GPT-2's."""
    print(train_tokenizer(parse_options(TokenizerTraining, arguments)))
