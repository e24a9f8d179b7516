"""A model's folder may come from anybody: it loads or is one line, within seconds, and none of its code is run."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fgpt_hf.errors import UserError
from fgpt_hf.model.folder_checks import check_size
from fgpt_hf.model.io import load_config, load_model, load_tokenizer
from tests.support.run_folders import tiny_model
from tests.support.tiny import save

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
HUGE = 10**12


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("models") / "intact")


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(copytree(intact, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def change_first_tensor(path: Path, **changes: Any) -> None:
    """Change what the header of a safetensors file says of its first tensor."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    next(value for name, value in header.items() if name != "__metadata__").update(changes)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": HUGE}, "hidden_size=1,000,000,000,000 is not a possible size"),
        ({"vocab_size": 10**40}, r"vocab_size=more than 10\*\*15 is not a possible size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1,000,000,000 is not a possible size"),
        ({"num_labels": HUGE}, "num_labels=1,000,000,000,000 is not a possible size"),
        ({"text_config": {"n_layer": HUGE}}, "n_layer=1,000,000,000,000 is not a possible size"),
        ({"vocab_size": 10**8}, "describes 1,.* parameters, and its files hold 8.* values"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is not a number"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"get_text_config": 5}, "'get_text_config', which is not a setting"),
        ({"attn_implementation": "owner/kernel"}, "attn_implementation='owner/kernel', code to be downloaded"),
        ({"_attn_implementation": "paged|owner/kernel@v1:f"}, "code to be downloaded and run: remove it"),
        ({"text_config": {"experts_implementation": "owner/kernel"}}, "code to be downloaded and run: remove it"),
        ({"dtype": "nosuch"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
        ({"model_type": ["fgpt"]}, "cannot be loaded"),
    ],
    ids=str,
)
def test_a_hostile_configuration_is_one_line(folder: Path, changes: Mapping[str, Any], said: str) -> None:
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=said):
        load_model(str(folder))


@pytest.mark.parametrize("longest", ["many", -5, 0, float("nan"), [1]])
def test_a_length_that_is_none_is_one_line(folder: Path, longest: object) -> None:
    change_json(folder / "tokenizer_config.json", model_max_length=longest)
    with pytest.raises(UserError, match=r"model_max_length=|cannot be loaded"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["[]", "", DEEP, '{"hidden_size": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_object_of_usual_depth_is_one_line(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=r"cannot be loaded|a JSON object|is damaged|no model"):
        load_model(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "XX"},
        {"dtype": "I64"},
        {"shape": [1, 2, 3]},
        {"shape": [-1, 16]},
        {"shape": [HUGE, 16]},
        {"data_offsets": [0, HUGE]},
        {"data_offsets": [16, 0]},
    ],
    ids=str,
)
def test_tensors_of_odd_types_shapes_and_places_are_one_line(folder: Path, changes: Mapping[str, Any]) -> None:
    change_first_tensor(folder / "model.safetensors", **changes)
    with pytest.raises(UserError):
        load_model(str(folder))


@pytest.mark.parametrize("header", [b"", b"\xff" * 8 + b"{}", struct.pack("<Q", 10**7) + b"{}"])
def test_weights_whose_header_is_damaged_are_one_line(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(UserError):
        load_model(str(folder))


def test_a_network_larger_than_the_machines_memory_is_not_made() -> None:
    with torch.device("meta"):
        network = torch.nn.Linear(10**7, 10**6, bias=False)
    with pytest.raises(UserError, match="has 10,000,000,000,000 parameters, 40,000 GB, and this machine has"):
        check_size("somebody/model", network, 4)


def test_nothing_in_a_folder_is_run(folder: Path, tmp_path: Path) -> None:
    """Neither its Python files nor a pickle, whatever its configuration asks for."""
    proof = tmp_path / "executed"
    code = f"open({str(proof)!r}, 'w')\nclass Evil: pass"
    (folder / "evil.py").write_text(code)
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change_json(folder / "config.json", model_type="evil", auto_map=dict.fromkeys(classes, "evil.Evil"))
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    for load in (load_config, load_model):
        with pytest.raises(UserError, match="comes with code of its own"):
            load(str(folder))
    load_tokenizer(str(folder))  # as the stock class that its files fit
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {proof}'\ntR.".encode())
    change_json(folder / "config.json", model_type="gpt2", auto_map={})
    change_json(folder / "tokenizer_config.json", auto_map={})
    with pytest.raises(UserError):
        load_model(str(folder))
    assert not proof.exists()


def test_an_intact_folder_loads(folder: Path) -> None:
    model, _ = load_model(str(folder))
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False))
