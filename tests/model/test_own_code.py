"""Code that comes with a model: the installed one where it is equal, else said, and run only where it is trusted."""

from pathlib import Path

import pytest
import torch

from fgpt_hf.model.io import load_model
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from tests.support.tiny import random_model, save

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return save(random_model(), tmp_path / "model")


def double_the_logits(folder: Path) -> None:
    code = folder / "modeling_fgpt.py"
    call = "logits = self.lm_head("
    assert call in code.read_text()
    code.write_text(code.read_text().replace(call, "logits = 2 * self.lm_head("))


def logits(folder: Path, trust_remote_code: bool) -> torch.Tensor:
    model, _ = load_model(str(folder), trust_remote_code=trust_remote_code)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_equal_code_is_the_installed_class_and_nothing_is_said(
    folder: Path, trust_remote_code: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load_model(str(folder), trust_remote_code=trust_remote_code)
    assert type(model) is FGPTForCausalLM and not caplog.messages


@pytest.mark.slow
def test_other_code_is_run_where_it_is_trusted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(folder, trust_remote_code=True)
    double_the_logits(folder)
    torch.testing.assert_close(logits(folder, trust_remote_code=True), 2 * expected)
    assert f"{folder} runs with its own code, which differs from the installed code" in caplog.messages
    caplog.clear()
    torch.testing.assert_close(logits(folder, trust_remote_code=False), expected)
    assert "--trust_remote_code runs its own" in caplog.text


def test_another_configuration_s_code_is_noticed_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (folder / "configuration_fgpt.py").open("a") as code:
        code.write("# changed")
    load_model(str(folder))
    assert "comes with code that differs from the installed code" in caplog.text


def test_a_folder_without_code_is_the_installed_class(folder: Path) -> None:
    for code in folder.glob("*.py"):
        code.unlink()
    model, _ = load_model(str(folder))
    assert type(model) is FGPTForCausalLM
