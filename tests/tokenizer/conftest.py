"""The project's tokenizer, which no test changes."""

from typing import Any

import pytest

from fgpt_hf.tokenizer.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()
