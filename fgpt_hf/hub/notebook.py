"""The notebook in a model's repo: where there is one, the Hub has buttons that open it on Colab and Kaggle."""

import hashlib
import json
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from jinja2 import Template

from fgpt_hf.errors import UserError
from fgpt_hf.hub.card import template_values
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.run_record import RunRecord
from fgpt_hf.parsing import parse_json

NOTEBOOK = "notebook.ipynb"  # the name that the Hub looks for
TEMPLATE = Path(__file__).with_name("notebook.py.jinja")  # its cells begin with "# %%"
_DIGEST = "fgpt_cells_sha256"


def build_notebook(record: RunRecord, options: CardOptions) -> bytes:
    """Return a notebook, of format 4.5 and without outputs, that loads the model from the Hub and talks to it.

    Example:
        >>> build_notebook(read_run_record(Path("runs/quickstart/base/model")), CardOptions())  # doctest: +SKIP
    """
    (transformers,) = (needed for needed in requires("fgpt-hf") or () if needed.startswith("transformers>"))
    text = Template(TEMPLATE.read_text("utf-8")).render(**template_values(record, options), transformers=transformers)
    cells = [_cell(number, part) for number, part in enumerate(re.split(r"^# %%", text, flags=re.MULTILINE)[1:])]
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        _DIGEST: _digest(cells),
    }
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return f"{json.dumps(notebook, indent=1, ensure_ascii=False)}\n".encode()


def is_edited(notebook: bytes) -> bool:
    """Return whether a person has written or changed the cells of a notebook.

    Example:
        >>> is_edited(b'{"cells": [{"source": "print(1)"}], "metadata": {}}')
        True
    """
    try:
        found = parse_json(notebook)
        return bool(found["metadata"].get(_DIGEST) != _digest(found["cells"]))
    except (UserError, KeyError, TypeError, AttributeError):
        return True


def _cell(number: int, part: str) -> dict[str, Any]:
    kind, _, source = part.partition("\n")
    if kind.strip() == "[markdown]":
        lines = re.sub(r"^# ?", "", source.strip(), flags=re.MULTILINE)
        return {"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}, "source": lines.splitlines(True)}
    return {
        "cell_type": "code",
        "id": f"cell-{number}",
        "metadata": {},
        "source": source.strip().splitlines(True),
        "execution_count": None,
        "outputs": [],
    }


def _digest(cells: list[dict[str, Any]]) -> str:
    """Return a hash of the source of the cells, which running or saving them does not change."""
    sources = ["".join(cell["source"]) for cell in cells]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()
