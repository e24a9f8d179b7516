"""A published Space that runs in an environment of its requirements alone, for visitors who call or browse."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from tests.support.run_folders import write_run

CONTEXT = 512  # enough for a reply that lasts some seconds

# Runs app.py as a Space would, where only what requirements.txt brings can be imported.
LAUNCH = '''
import importlib.machinery, importlib.util, re, runpy, sys
from importlib import metadata
from packaging.requirements import Requirement

def reachable(lines):
    found, waiting = {}, [Requirement(line) for line in lines if not line.startswith("#")]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = {"", *requirement.extras}
        if extras <= found.get(name, set()):
            continue
        found.setdefault(name, set()).update(extras)
        try:
            needed = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # for another system
        waiting += [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found

class OnlyNeeded:
    """Finds modules as before, but none of a distribution that is not needed."""

    def __init__(self, finders, needed):
        owners = metadata.packages_distributions()
        normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
        self.hidden = {top for top, names in owners.items() if not needed & {normal(name) for name in names}}
        self.hidden |= {"fgpt_hf", "tests"}
        self.finders = list(finders)
        self.find_distributions = importlib.machinery.PathFinder.find_distributions
        self.invalidate_caches = importlib.machinery.PathFinder.invalidate_caches

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

sys.meta_path[:] = [OnlyNeeded(sys.meta_path, set(reachable(open("requirements.txt").read().splitlines())))]
assert importlib.util.find_spec("accelerate") is None is importlib.util.find_spec("fgpt_hf")
sys.path.insert(0, "")
runpy.run_path("app.py", run_name="__main__")
'''


def write_chat_run(folder: Path, seed: int, **fields: object) -> Path:
    """A finished run whose network has learned nothing, and so never ends a reply by itself."""
    run = write_run(folder, **fields)
    shutil.rmtree(run / "model")
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    model = FGPTForCausalLM(FGPTConfig(**shape)).eval()
    ends = [END_OF_TEXT_ID, END_OF_TURN_ID]
    model.generation_config = GenerationConfig(bos_token_id=END_OF_TEXT_ID, eos_token_id=ends, pad_token_id=PAD_ID)
    save_model(model, build_tokenizer(CONTEXT), run / "model")
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
        with serving([sys.executable, "-c", LAUNCH], space, environment) as served:
            yield served, chat
        commit = json.loads((space / "models.json").read_text())["MODEL_ID"].partition("@")[2]
        assert server.count("GET", rf"/tester/tiny/resolve/{commit}/model.safetensors") == 1
        assert server.strays == []  # no analytics, nothing from elsewhere
