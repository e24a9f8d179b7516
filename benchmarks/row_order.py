"""Compare the validation loss after training on shuffled rows and on rows in document order, on the embedded corpus.

    python benchmarks/row_order.py

trains the same small network twice on the same rows with the same seed; only the order differs. The documents are in
alphabetical order of their modules, so neighbors are often about the same subject, like the pages of a crawl.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import Batches, RowChunk, RowsInMemory, ShuffledRows, StreamedRows, StreamPosition
from fgpt_hf.data.packing import pack_documents
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.splits import is_validation
from fgpt_hf.evaluation.checks import ValidationLoss, bytes_of_tokens
from fgpt_hf.files import read_json_lines
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.runtime.distributed import start_accelerator
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import encode_documents
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.trainer import Trainer

ROW_LENGTH = 128
NEIGHBORS = 16  # documents packed together, so that rows stay in document order
VALIDATION_FRACTION = 0.01
VALIDATION_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=120, help="Number of steps (default: 120).")
    max_steps = parser.parse_args().max_steps
    texts = load_pydocs()["text"]
    train = [text for text in texts if not is_validation(text, VALIDATION_FRACTION)]
    validation = [text for text in texts if is_validation(text, VALIDATION_FRACTION)]
    rows = rows_in_order(train)
    validation_rows = np.random.default_rng(0).permutation(rows_in_order(validation))[:VALIDATION_ROWS]
    losses = {}
    for name, batches in (("shuffled", ShuffledRows(RowsInMemory(rows), seed=0)), ("document order", in_order(rows))):
        losses[name] = validation_loss_after(batches, validation_rows, max_steps)
        print(f"{name}: validation loss {losses[name]:.3f} nats per token after {max_steps} steps", flush=True)
    ratio = losses["shuffled"] / losses["document order"]
    print(f"shuffled rows reach {ratio:.3f} times the validation loss of rows in document order")


def rows_in_order(texts: list[str]) -> Ids:
    """Pack a few neighboring documents at a time into rows."""
    documents = encode_documents(texts)
    return np.concatenate(
        [
            pack_documents(documents[first : first + NEIGHBORS], ROW_LENGTH).ids
            for first in range(0, len(documents), NEIGHBORS)
        ]
    )


def in_order(rows: Ids) -> Batches:
    def chunks_from(position: StreamPosition) -> Iterator[RowChunk]:
        while True:
            yield RowChunk(rows, position)

    return StreamedRows(chunks_from, StreamPosition("pydocs"))


def validation_loss_after(batches: Batches, validation_rows: Ids, max_steps: int) -> float:
    """Train a new network and return its final validation loss."""
    with TemporaryDirectory() as folder:
        run = Run(
            preset="row-order",
            output_dir=str(Path(folder, "run")),
            max_steps=max_steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=2e-3,
            warmup_steps=20,
            eval_steps=max_steps,
            save_steps=max_steps + 1,
        )
        accelerator = start_accelerator(run)
        tokenizer = build_tokenizer(ROW_LENGTH)
        model = FGPTForCausalLM(
            FGPTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=ROW_LENGTH)
        )
        bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size)
        check = ValidationLoss(max_steps, accelerator, model, validation_rows, bytes_of_token, batch_size=16)
        run_folder = RunFolder(run)
        with run_folder.opened():
            Trainer(
                accelerator=accelerator,
                run=run,
                plan=TrainingPlan(max_steps, rows=8, micro_batches=1),
                folder=run_folder,
                objective=LanguageModelObjective(model),
                tokenizer=tokenizer,
                batches=batches,
                checks=[check],
            ).fit()
        return float(read_json_lines(run_folder.path / "metrics.jsonl")[-1]["eval_loss"])


if __name__ == "__main__":
    main()
