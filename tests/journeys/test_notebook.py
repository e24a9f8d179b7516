"""The notebook trains, evaluates, chats and publishes from its first cell to its last, over two sessions."""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from tests.support.loopback_hub import LoopbackHub, hub_environment
from tests.support.messages import say

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "train_your_own.ipynb"
NETWORK = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --max_position_embeddings 64"
SMALL = "--per_device_train_batch_size 4 --bf16 false --eval_steps 4"
SETTINGS = f"""
NAME, PACKAGE = "tiny", ""
TEXT, CHATS, PAIRS, TASKS = "{{data}}/text.jsonl", "{{data}}/chats.jsonl", "{{data}}/pairs.jsonl", "capitals-unseen"
BASE = "{NETWORK} {SMALL} --max_steps 4 --preprocessing_num_workers 1"
INSTRUCT = "{SMALL} --max_steps 100 --save_steps 4 --max_new_tokens 4 --validation_prompts 1"
PREFERENCE = "{SMALL} --max_steps 4 --max_new_tokens 4 --validation_prompts 1"
"""


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def test_the_notebook_is_valid_and_committed_without_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert cells[0].metadata["tags"] == ["parameters"]
    assert all(len(cell.source.splitlines()) < 20 for cell in cells)


def write_data(folder: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": f"Document {n} says that {n} and {n + 1} make {2 * n + 1}."} for n in range(400)],
        "chats": [{"messages": say(f"What is {n}?", f"A number, {n}.")} for n in range(60)],
        "pairs": [{"prompt": f"Is {n} odd?", "chosen": f"Ask {n}.", "rejected": "No!"} for n in range(60)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


class Session:
    """An execution of the notebook with these settings, in a folder of its own, as a service would run it."""

    def __init__(self, folder: Path, settings: str, server: LoopbackHub) -> None:
        folder.mkdir()
        notebook = read()
        (settings_at,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        notebook.cells.insert(settings_at + 1, nbformat.v4.new_code_cell(settings))
        self.path, self.log = folder / NOTEBOOK.name, folder / "log"
        nbformat.write(notebook, self.path)
        environment = hub_environment(server, folder) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
        command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=300", str(self.path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def end(self) -> None:
        """End it with all that it started, as a service ends a session."""
        started = psutil.Process(self.process.pid)
        everything = [started, *started.children(recursive=True)]
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(everything, timeout=60)

    def said(self) -> str:
        """Return what its cells printed, when all have run."""
        assert self.process.wait(timeout=400) == 0, self.log.read_text()[-6000:]
        cells = nbformat.read(self.path, as_version=4).cells
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_a_session_that_ends_in_the_middle_goes_on_in_the_next_one(tmp_path: Path) -> None:
    """The first one ends while the instruct model trains: the second trains the rest of it, and no base model."""
    write_data(tmp_path)
    with LoopbackHub() as server:
        first = Session(tmp_path / "first", SETTINGS.format(data=tmp_path), server)
        deadline = time.monotonic() + 300
        while not server.count("POST", "tiny-instruct/super-squash/"):
            assert first.process.poll() is None and time.monotonic() < deadline, first.log.read_text()[-6000:]
            time.sleep(0.05)
        first.end()
        said = Session(tmp_path / "second", SETTINGS.format(data=tmp_path), server).said()
        files = {name: repo.files() for (_, name), repo in server.endpoints.repos.items()}
    assert "downloading the state of step 4 from tester/tiny-base@last-checkpoint" in said
    resumed = re.search(r"downloading the state of step (\d+) from tester/tiny-instruct@last-checkpoint", said)
    assert resumed and 0 < int(resumed[1]) < 100
    assert "capitals-unseen" in said and "https://huggingface.co/tester/tiny" in said
    assert files.keys() == {f"tester/tiny{end}" for end in ("", "-base", "-instruct", "-preference", "-chat")}
    assert {"model.safetensors", "README.md", "notebook.ipynb"} <= files["tester/tiny"].keys()
    assert "app.py" in files["tester/tiny-chat"]
