"""Every Python snippet of the documentation and of cards runs as it stands, where FGPT is not installed.

A process that has imported `fgpt_hf` knows its architecture, and would hide a snippet that forgets `trust_remote_code`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.convert.export import export
from fgpt_hf.hub.card import build_card
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.run_record import read_run_record
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS, build_tokenizer
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT)
    for folder in (".", "docs", "recipes", "space", "fgpt_hf/metrics/*")
    for path in sorted(ROOT.glob(f"{folder}/*.md"))
]
MODELS = (*(f"runs/quickstart/{stage}/model" for stage in ("base", "instruct", "preference")), "user/name")
STRANGER = "import sys; sys.modules['fgpt_hf'] = None  # cannot be imported\n"
AT_REST = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def snippets(text: str) -> list[str]:
    return re.findall(r"^```(?:python|py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


SNIPPETS = {
    f"{page}:{number}": code
    for page in PAGES
    for number, code in enumerate(snippets((ROOT / page).read_text("utf-8")), start=1)
}


def run_alone(code: str, folder: Path) -> None:
    """Run a program in a new process that cannot import FGPT, unless the program itself asks for it."""
    needed = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    if missing := [name for name in needed if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
    if "BitsAndBytesConfig" in code and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes not installed")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if "fgpt_hf" in needed:
        environment["PYTHONPATH"] = str(ROOT)
    else:
        code = STRANGER + code
    environment |= AT_REST | {"HF_HOME": str(folder / "hf_home")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the models and files that the snippets name."""
    folder = tmp_path_factory.mktemp("snippets")
    for name in MODELS:
        write_model(folder / name)
    write_model(folder / "runs/quickstart-modern/model", position_embedding="rope")
    pairs = [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": str(n)} for n in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for metric in (ROOT / "fgpt_hf" / "metrics").glob("*/README.md"):
        shutil.copytree(metric.parent, folder / metric.parent.name)
    return folder


def write_model(folder: Path, **blocks: Any) -> None:
    """Write a model with the context of the quickstart's, for which the snippets were written."""
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = FGPTForCausalLM(FGPTConfig(**shape | blocks, max_position_embeddings=256))
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    save_model(model, build_tokenizer(256), folder)


def test_the_pages_have_snippets() -> None:
    assert len(SNIPPETS) >= 7 and {Path(name.split(":")[0]).name for name in SNIPPETS} >= {"README.md", "preference.md"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_runs_without_this_package(name: str, folder: Path) -> None:
    run_alone(SNIPPETS[name], folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "chat", "gpt2"])
def test_the_snippet_of_a_card_runs_without_this_package(kind: str, folder: Path) -> None:
    tuned = {"model_name_or_path": str(folder / MODELS[0])} if kind == "chat" else {}
    run = write_run(folder / "runs" / kind, **tuned)
    model = run / "model"
    write_model(model)
    if kind == "gpt2":
        model = folder / "user" / "name-gpt2"
        export(str(run / "model"), model, "gpt2")
    options = CardOptions(repo_id=str(model.relative_to(folder)), architecture="gpt2" if kind == "gpt2" else "fgpt")
    (code,) = snippets(build_card(read_run_record(run / "model"), options))
    assert ("apply_chat_template" in code) == (kind == "chat")
    run_alone(code, folder)
