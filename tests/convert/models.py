"""A network with the real vocabulary, small enough to convert in a moment."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2Tokenizer

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.cli import main
from fgpt_hf.convert.stock import to_stock
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, END_OF_TURN_ID, PAD_ID, build_tokenizer, read_vocabulary

CONTEXT = 64
TEXTS = ("Once upon a time", "def f(x):\n    return  x", "naïve café 日本")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "Once upon a time there was a small model that knew three sentences by heart, and it told them to everyone.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the warm afternoon sun of October.",
)
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


def trained_model(steps: int = 25, **changes: object) -> FGPTForCausalLM:
    """A network that knows three sentences by heart, so that it prefers tokens as clearly as a trained one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    model = FGPTForCausalLM(FGPTConfig(initializer_range=0.1, **shape | changes))
    rows = build_tokenizer(CONTEXT)(list(SENTENCES), return_tensors="pt", padding=True)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    rows["position_ids"] = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # the padding is on the left
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(steps):
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[END_OF_TEXT_ID, END_OF_TURN_ID], pad_token_id=PAD_ID
    )
    return model.eval()


def write_small_model(folder: Path, **changes: object) -> Path:
    """Write `small_model` as a folder; return that folder."""
    save_model(small_model(**changes), build_tokenizer(CONTEXT), folder)
    return folder


def write_gpt2_with(folder: Path, tokens: list[str], template: str | None = None, rows: int | None = None) -> Path:
    """A stock GPT-2 whose tokenizer has further tokens, which ends a turn at the last one of them."""
    model = to_stock(small_model(), "gpt2")
    vocabulary, merges = read_vocabulary()
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.chat_template = template
    model.resize_token_embeddings(len(tokenizer) if rows is None else rows, mean_resizing=False)
    end = tokenizer.convert_tokens_to_ids(tokens[-1]) if tokens else END_OF_TEXT_ID
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[END_OF_TEXT_ID, end], do_sample=True, temperature=0.7
    )
    save_model(model, tokenizer, folder)
    return folder


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run `fgpt` offline with arguments that it must refuse; return the last line that it prints."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["fgpt", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
