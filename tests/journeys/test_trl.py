"""The same model folder and the same rows train in TRL's trainer, unchanged."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.tokenizer.fast_encoding import encode_conversation
from tests.data.test_conversations import turns
from tests.support.tiny import random_model, save

trl = pytest.importorskip("trl")


@pytest.mark.slow
def test_sft_trainer_learns_the_replies_of_the_same_folder_and_rows(tmp_path: Path) -> None:
    folder = save(random_model(), tmp_path / "model")
    rows = Dataset.from_list([{"messages": turns(f"Name {n}.", f"It is {n}.", "Again.", f"{n}.")} for n in range(16)])
    options = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        assistant_only_loss=True,
        packing=True,
        max_length=64,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(str(folder), args=options, train_dataset=rows)
    learned = [token for row in trainer.train_dataset for token in row["labels"] if token != IGNORED]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [encode_conversation(tokenizer, row["messages"]) for row in rows]
    assert sorted(learned) == sorted(token for pair in encoded for token, mask in zip(*pair, strict=True) if mask)
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert not torch.equal(trainer.model.model.embed_tokens.weight, before)
