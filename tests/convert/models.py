"""A network with the real vocabulary, small enough to convert in a moment."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.cli import main
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, END_OF_TURN_ID, PAD_ID, build_tokenizer

CONTEXT = 64
TEXTS = ("Once upon a time", "def f(x):\n    return  x", "naïve café 日本")
QUESTION = [{"role": "user", "content": "Who <|end|> are you?"}]


def small_model(**changes: object) -> FGPTForCausalLM:
    """A network with the real vocabulary, whose random weights prefer some tokens clearly."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": CONTEXT}
    model = FGPTForCausalLM(FGPTConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[END_OF_TEXT_ID, END_OF_TURN_ID], pad_token_id=PAD_ID
    )
    return model


def write_small_model(folder: Path, **changes: object) -> Path:
    """Write `small_model` as a folder; return that folder."""
    save_model(small_model(**changes), build_tokenizer(CONTEXT), folder)
    return folder


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run `fgpt` offline with arguments that it must refuse; return the last line that it prints."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["fgpt", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
