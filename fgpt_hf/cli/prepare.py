"""`fgpt prepare`."""

from collections.abc import Sequence

from fgpt_hf.config.parser import parse_options
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data.prepare import prepare_documents


def main(arguments: Sequence[str]) -> None:
    """Tokenize and pack documents into a folder, and print what it holds."""
    print(prepare_documents(parse_options(Preparation, arguments)))
