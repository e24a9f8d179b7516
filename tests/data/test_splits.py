"""Which documents are held out follows from their text alone, and tokenizing processes import little to find out."""

import subprocess
import sys
from pathlib import Path

import pytest

from fgpt_hf.data.splits import document_hash, is_validation
from tests.support.fineweb import documents

HEAVY = ("torch", "transformers", "datasets", "pyarrow")


def test_the_hash_of_a_document_is_the_same_for_ever() -> None:
    assert document_hash("Once upon a time") == 0.1461806604011393
    assert 0 <= document_hash("\ud800") < 1  # a lone surrogate


def test_the_validation_fraction_is_a_fraction_of_the_documents() -> None:
    texts = documents(20_000, most_words=4)
    validation = {text for text in texts if is_validation(text, 0.05)}
    assert len(validation) == pytest.approx(1000, abs=150)
    assert validation < {text for text in texts if is_validation(text, 0.1)}  # a larger share keeps what was held out


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("fgpt_hf.data.splits", HEAVY), ("fgpt_hf.data.pydocs", HEAVY), ("fgpt_hf.data.prepare", HEAVY[:1])],
)
def test_what_a_process_imports_to_tokenize_or_to_prepare(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
