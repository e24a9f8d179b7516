"""What may leave a folder: files of known names, whole, and none that a link leads to."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from fgpt_hf.errors import UserError
from fgpt_hf.hub.published_files import publishable, refuse_links
from fgpt_hf.hub.upload import Destination, push_folder
from tests.support.loopback_hub import LoopbackHub

WEIGHTS = save({"weight": np.zeros(300, dtype=np.float32)})
INDEX = {"weight_map": {"weight": "model-00001-of-00002.safetensors", "other": "model-00002-of-00002.safetensors"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with two publishable files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "model"


def test_a_folder_gives_its_publishable_files_only(folder: Path, server: LoopbackHub) -> None:
    secrets = ["training.pt", "optimizer.bin", "pytorch_model.bin", "ids.npy", "train.log", "run.yaml", ".env", "a.pkl"]
    secrets += ["model/deep.safetensors", "figures/old/loss.png", "optimizer.safetensors", "scheduler.pt", "notes.md"]
    secrets += ["checkpoints/model.safetensors", "manifest.json"]
    for name in (*secrets, "README.md", "figures/loss.png", ".eval_results/hellaswag.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"# content of its own\n")
    files = {"README.md", "config.json", "model.safetensors", "figures/loss.png", ".eval_results/hellaswag.yaml"}
    assert publishable(folder).keys() == files
    push_folder(folder, Destination(repo_id="tester/tiny"), "Step 1")
    assert server.repo("model", "tester/tiny").files().keys() == {".gitattributes", *files}


@pytest.mark.parametrize("missing_bytes", [1, 600, len(WEIGHTS) - 8, len(WEIGHTS)])
def test_weights_that_are_cut_anywhere_are_refused(missing_bytes: int, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[: len(WEIGHTS) - missing_bytes])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: "):
        publishable(folder)


def test_weights_with_more_than_their_header_says_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS + b"secret")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: "):
        publishable(folder)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (INDEX, r"model-00002-of-00002.safetensors is missing, which holds other"),
        ({"weight_map": ["model.safetensors"]}, "should say in weight_map which file holds which weight"),
        ({}, "should say in weight_map which file holds which weight"),
        ({"weight_map": {"a": "../../../etc/passwd"}}, "'../../../etc/passwd' is not the name of a file next to it"),
        ({"weight_map": {"a": 5}}, "'5' is not the name of a file next to it"),
    ],
)
def test_every_shard_of_an_index_must_be_there(index: object, problem: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=problem):
        publishable(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_json_that_is_cut_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_text('{"vocab_size": 50')
    with pytest.raises(UserError, match=f"{name} is damaged"):
        publishable(folder)


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors", "README.md", "figures/loss.png"])
@pytest.mark.parametrize("target", ["../secret", "../none", "config.json"])
def test_a_link_is_refused_wherever_it_leads(name: str, target: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(WEIGHTS)
    (folder / "figures").mkdir()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link to {target}, and publish follows none: put a copy"):
        publishable(folder)


def test_a_file_behind_a_linked_folder_is_refused(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "figures").symlink_to("../elsewhere")
    with pytest.raises(UserError, match=r"figures is a link to \.\./elsewhere"):
        refuse_links(folder, [folder / "figures" / "loss.png"])
