"""Compare instruction tuning on packed rows with batches padded to their longest conversation.

    python benchmarks/instruct_loader.py [--dataset_name FILE]

prints the reply tokens that each trains on per second, and the ratios. Network, loss and optimizer are the same; only
the batches differ. Padded batches have as many conversations as the original's, or as many as a packed one. All take
turns, and medians are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PRESETS
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import ShuffledRows
from fgpt_hf.data.conversations import load_conversations
from fgpt_hf.data.instruct import chat_batch, encode_chats, pack_chats
from fgpt_hf.data.mixtures import RowIssues
from fgpt_hf.losses.objectives import Batch, LanguageModelObjective
from fgpt_hf.runtime.hardware import keep_freed_memory, supports_bf16
from fgpt_hf.runtime.network import network_config
from fgpt_hf.tokenizer.fast_encoding import EncodedConversation
from fgpt_hf.tokenizer.tokenizer import PAD_ID, build_tokenizer
from fgpt_hf.training.optim import build_optimizer

ROWS = 8  # per packed batch; also the conversations per padded batch of the original
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_name", default="pydocs-chat:4000", help="Data, as for train_instruct.py (default: pydocs-chat:4000)."
    )
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds (default: 5).")
    parser.add_argument("--batches", type=int, default=3, help="Batches of each kind per round (default: 3).")
    options = parser.parse_args()
    keep_freed_memory()
    run = replace(INSTRUCT_PRESETS["quickstart"], dataset_name=options.dataset_name)
    issues = RowIssues()
    conversations = load_conversations(run, issues)
    chats = [chat for _, chat in encode_chats(build_tokenizer(LENGTH), conversations, issues, LENGTH, run)]
    rows = pack_chats(chats, LENGTH)
    print(f"{len(chats):,} conversations in {rows}")
    packed = ShuffledRows(rows, seed=0, collate=chat_batch)
    as_many = round(ROWS * len(chats) / len(rows))
    contenders: dict[str, Callable[[], Batch]] = {
        "packed": lambda: packed.take(ROWS),
        f"padded, {ROWS} conversations": padded(chats, ROWS),
        f"padded, {as_many} conversations": padded(chats, as_many),
    }
    step = training_step()
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(options.rounds + 1):
        for name, take in contenders.items():
            tokens, seconds = 0, 0.0
            for _ in range(options.batches):
                began = time.perf_counter()
                tokens += step(take())
                seconds += time.perf_counter() - began
            if round_number:  # the first is a warm-up
                speeds[name].append(tokens / seconds)
    for name, values in speeds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(speeds["packed"], values, strict=True))
        speed = statistics.median(values)
        print(f"{name:26} {speed:6,.0f} reply tokens per second; packed rows are {ratio:.2f} times as fast")


def padded(chats: Sequence[EncodedConversation], size: int) -> Callable[[], Batch]:
    """Return a source of batches of `size` conversations in random order, padded on the right to the longest."""
    order = cycle(np.random.default_rng(0).permutation(len(chats)).tolist())

    def take() -> Batch:
        batch = [chats[next(order)] for _ in range(size)]
        ids = [torch.from_numpy(chat.ids.astype(np.int64)) for chat in batch]
        labels = [
            row.masked_fill(torch.from_numpy(~chat.loss_mask), IGNORED) for row, chat in zip(ids, batch, strict=True)
        ]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD_ID),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    return take


def training_step() -> Callable[[Batch], int]:
    """Return a function that trains on a batch as the loop does, and returns its number of reply tokens."""
    torch.manual_seed(0)
    base, has_bf16 = PRESETS["quickstart"], supports_bf16(torch.device("cpu"))
    model = FGPTForCausalLM(network_config(base))
    objective, optimizer = LanguageModelObjective(model), build_optimizer(model, base)

    def step(batch: Batch) -> int:
        weight = int(objective.num_items(batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16):
            loss = objective(batch) / weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return weight

    return step


if __name__ == "__main__":
    main()
