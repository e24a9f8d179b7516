"""A published Space that runs in an environment of its requirements alone, for visitors who call or browse."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from benchmarks.space import Served, serving
from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.cli import main
from fgpt_hf.hub.card import write_card
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, END_OF_TURN_ID, PAD_ID, build_tokenizer
from tests.support.hub_here import hub_here
from tests.support.loopback_hub import hub_environment
from tests.support.run_folders import METRICS, write_run

CONTEXT = 512  # enough for a reply that lasts some seconds
LAUNCHER = Path(__file__).with_name("needed_only.py")  # app.py finds no package but what requirements.txt brings


def write_chat_run(folder: Path, seed: int, **fields: object) -> Path:
    """A finished run whose network has learned nothing, and so never ends a reply by itself."""
    run = write_run(folder, **fields)
    shutil.rmtree(run / "model")
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    model = FGPTForCausalLM(FGPTConfig(**shape)).eval()
    ends = [END_OF_TEXT_ID, END_OF_TURN_ID]
    model.generation_config = GenerationConfig(bos_token_id=END_OF_TEXT_ID, eos_token_id=ends, pad_token_id=PAD_ID)
    save_model(model, build_tokenizer(CONTEXT), run / "model")
    lines = [METRICS[0], *({**METRICS[1], "step": step} for step in range(80, 401, 80))]  # enough for a curve
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_card(run / "model")
    return run


@contextmanager
def published_space(folder: Path) -> Iterator[tuple[Served, Path]]:
    """The Space that `fgpt publish --space` made on a loopback Hub, and the run that was published."""
    chat = write_chat_run(folder / "chat", seed=0, model_name_or_path="tester/base")
    base = write_chat_run(folder / "base", seed=1)
    with pytest.MonkeyPatch.context() as patches, hub_here(folder, patches) as server:
        server.add_repo("model", "tester/base", base / "model")
        main.run(["publish", str(chat), "tester/tiny", "--space", "tester/chat"])
        space = folder / "space"
        for name, content in server.repo("space", "tester/chat").files().items():
            (space / name).parent.mkdir(parents=True, exist_ok=True)
            (space / name).write_bytes(content)
        environment = hub_environment(server, folder) | {"OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        with serving([sys.executable, str(LAUNCHER), "requirements.txt", "app.py"], space, environment) as served:
            yield served, chat
        commit = json.loads((space / "models.json").read_text())["MODEL_ID"].partition("@")[2]
        assert server.count("GET", rf"/tester/tiny/resolve/{commit}/model.safetensors") == 1
        assert not server.strays, server.strays  # no analytics, nothing from elsewhere
