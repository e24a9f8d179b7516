"""Held-out loss after training on random rows and on rows in the order of the documents, on the embedded corpus.

The same small network, rows, seed and steps; only the order differs. The documents come in the alphabetical order of
their modules, so that neighbours are about the same thing, as the pages of a crawl often are. Run by `make bench`.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.batches import Batches, RandomRows, StreamedRows, Stretch
from fgpt_hf.corpora import is_held_out
from fgpt_hf.evaluation import bytes_of_tokens, held_out_loss
from fgpt_hf.folders import RunFolder, read_lines
from fgpt_hf.objectives import LanguageModelObjective
from fgpt_hf.packing import Ids, pack_documents
from fgpt_hf.processes import start
from fgpt_hf.pydocs import load_pydocs
from fgpt_hf.runs import Run
from fgpt_hf.tokenizer import build_tokenizer, encode_documents
from fgpt_hf.training import Check, fit

ROW_LENGTH = 128
NEIGHBOURS = 16  # documents that are packed together, so that rows stay in the order of documents
HELD_OUT_SHARE = 0.01
HELD_OUT_ROWS = 256
STEPS = 120


def main() -> None:
    texts = load_pydocs()["text"]
    train = [text for text in texts if not is_held_out(text, HELD_OUT_SHARE)]
    held_out = [text for text in texts if is_held_out(text, HELD_OUT_SHARE)]
    rows = rows_in_order(train)
    held_out_rows = np.random.default_rng(0).permutation(rows_in_order(held_out))[:HELD_OUT_ROWS]
    losses = {}
    for name, batches in (("random rows", RandomRows(rows, seed=0)), ("rows in order", in_order(rows))):
        losses[name] = held_out_loss_after(batches, held_out_rows)
        print(f"{name}: held-out loss {losses[name]:.3f} nats a token after {STEPS} steps", flush=True)
    ratio = losses["random rows"] / losses["rows in order"]
    print(f"random rows reach {ratio:.3f} times the held-out loss of rows in order")


def rows_in_order(texts: list[str]) -> Ids:
    """Rows of a few neighbouring documents at a time."""
    documents = encode_documents(texts)
    return np.concatenate(
        [
            pack_documents(documents[first : first + NEIGHBOURS], ROW_LENGTH).ids
            for first in range(0, len(documents), NEIGHBOURS)
        ]
    )


def in_order(rows: Ids) -> Batches:
    def stretches(place: dict[str, Any]) -> Iterator[Stretch]:
        while True:
            yield Stretch(rows, place)

    return StreamedRows(stretches, {})


def held_out_loss_after(batches: Batches, held_out_rows: Ids) -> float:
    """Train a new network and return its loss at the end."""
    with TemporaryDirectory() as folder:
        run = Run(
            preset="row-order",
            output_dir=str(Path(folder, "run")),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=2e-3,
            warmup_steps=20,
            eval_steps=STEPS,
            save_steps=STEPS + 1,
        )
        accelerator = start(run)
        tokenizer = build_tokenizer(ROW_LENGTH)
        model = FGPTForCausalLM(
            FGPTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=ROW_LENGTH)
        )
        bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size)

        def check(step: int) -> dict[str, float]:
            return held_out_loss(accelerator, model, held_out_rows, bytes_of_token, batch_size=16)

        run_folder = RunFolder(run)
        with run_folder.opened():
            objective = LanguageModelObjective(model)
            fit(accelerator, run, run_folder, objective, tokenizer, batches, [Check(STEPS, check)])
        return read_lines(run_folder.path / "metrics.jsonl")[-1]["eval_loss"]


if __name__ == "__main__":
    main()
