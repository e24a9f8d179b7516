"""The notebook of a model's repo: a stranger runs it on any machine, and what people wrote in it stays."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.notebook import NOTEBOOK, build_notebook, is_edited
from fgpt_hf.hub.publish import publish
from fgpt_hf.hub.run_record import read_run_record
from fgpt_hf.hub.upload import Destination
from tests.support.loopback_hub import LoopbackHub, hub_environment
from tests.support.run_folders import write_run

REPO = "tester/tiny"
STAGES = {"base": {}, "instruct": {"model_name_or_path": "runs/quickstart/base"}}


@pytest.mark.slow
def test_a_stranger_runs_the_notebooks_of_published_models(server: LoopbackHub, tmp_path: Path) -> None:
    """One after the other in one kernel, where FGPT cannot be imported."""
    cells = [nbformat.v4.new_code_cell("import sys; sys.modules['fgpt_hf'] = None")]
    for stage, fields in STAGES.items():
        publish(write_run(tmp_path / stage, **fields), Destination(repo_id=f"tester/{stage}"), CardOptions())
        content = server.repo("model", f"tester/{stage}").files()[NOTEBOOK].decode()
        cells += nbformat.reads(content, as_version=4).cells
    notebook = nbformat.v4.new_notebook(cells=cells)
    environment = {**os.environ, **hub_environment(server, tmp_path), "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, timeout=300).execute(cwd=str(tmp_path), env=environment)
    base, reply = (printed(cell) for cell in cells if cell.source.startswith(("def complete", "messages")))
    assert base.startswith("Once upon a time") and len(base) > 20 and reply.strip()


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.parametrize(
    ("stage", "architecture", "loads"),
    [
        ("base", "fgpt", ["transformers>=", "from_pretrained(model_id, trust_remote_code=True)", "complete("]),
        ("base", "gpt2", ["from_pretrained(model_id)", "complete("]),
        ("instruct", "fgpt", ["trust_remote_code=True", "chat(", "64 - inputs"]),
    ],
)
def test_a_notebook_is_valid_without_outputs_and_fits_the_model(
    tmp_path: Path, stage: str, architecture: str, loads: list[str]
) -> None:
    record = read_run_record(write_run(tmp_path / stage, **STAGES[stage]) / "model")
    content = build_notebook(record, CardOptions(repo_id=REPO, architecture=architecture))
    notebook = nbformat.reads(content.decode(), as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert all(part in text for part in [*loads, f'model_id = "{REPO}"'])


def test_a_notebook_that_people_edited_stays_and_another_one_is_replaced(server: LoopbackHub, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    publish(run, Destination(repo_id=REPO), CardOptions())
    written = json.loads(server.repo("model", REPO).files()[NOTEBOOK])
    written["cells"][-1] |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "run"}]}
    for edit, kept in (("", False), ("# mine", True)):
        written["cells"][-1]["source"] += [edit] if edit else []
        content = json.dumps(written).encode()
        server.damage(REPO, "main", {NOTEBOOK: content})
        publish(run, Destination(repo_id=REPO), CardOptions())
        assert (server.repo("model", REPO).files()[NOTEBOOK] == content) is kept


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"metadata": [], "cells": 7}', b"[" * 100_000])
def test_what_is_no_notebook_of_ours_is_a_persons(content: bytes) -> None:
    assert is_edited(content)
