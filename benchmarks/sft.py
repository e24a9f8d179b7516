"""Compare instruction tuning of a Llama with TRL's SFTTrainer: speed, memory and held-out loss.

    pip install 'trl>=1.16'
    python benchmarks/sft.py

Each contender tunes the same weights on the same conversations for one epoch, in a process of its own, by turns, in
each round with another seed: steps of 8 rows of 256 tokens, each row filled with several conversations, the loss on the
replies alone, AdamW with the same settings and rates, bfloat16 where the processor has it. Printed are tokens of
replies per second by the median step, the peak resident memory, both as ratios, and the loss of held-out replies, which
transformers' own forward pass computes for all of them. The contenders:

    fgpt          train_instruct.py
    fgpt-row      … with one row at a time and gradients of eight
    trl           SFTTrainer with packing (bfd) and assistant_only_loss
    trl-wrapped   … with conversations cut at the ends of rows, which attend to what stands before them in the row
    trl-row       … one row at a time and gradients of eight
    trl-compiled  trl-wrapped with torch_compile; the median leaves out the first steps, which compile for minutes
    trl-masked    trl-row with one condition of its loss changed: no option does that
    trl-logits    trl-wrapped with the loss of transformers' Trainer, from the logits of all rows: no option does that
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from fgpt_hf.data.sources import CONVERSATIONS, load_rows
from fgpt_hf.files import read_json_lines
from fgpt_hf.runtime.hardware import keep_freed_memory, peak_memory_bytes, supports_bf16
from fgpt_hf.tokenizer.fast_encoding import EncodedConversation, encode_conversations
from fgpt_hf.tokenizer.tokenizer import build_tokenizer

CPU = torch.device("cpu")
LENGTH, ROWS, RATE, WARMUP, HELD_OUT = 256, 8, 1e-3, 5, 200
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
BF16 = supports_bf16(CPU)
WRAPPED: Mapping[str, Any] = {"packing_strategy": "wrapped"}
ONE_ROW: Mapping[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}


class Tuned(NamedTuple):
    """What a contender's process reports: seconds of each step, bytes at most, and the loss of held-out replies."""

    seconds: Sequence[float]
    peak_memory_bytes: int
    held_out_loss: float


class Task(NamedTuple):
    """What a contender's process is to do: the folder of model and data, that of the result, and the seed."""

    folder: Path
    output: Path
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=1500, help="Number to train on (default: 1500).")
    parser.add_argument("--vocab_size", type=int, default=50304, help="Rows of the embeddings (default: 50304).")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="One for each round (default: 1 2 3).")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="Who takes part, the first one compared.")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.seed)))
        return
    with tempfile.TemporaryDirectory() as name:
        replies = prepare(Path(name), options.conversations, options.vocab_size)
        print(f"{options.conversations:,} conversations, {replies:,} tokens of replies", flush=True)
        results: dict[str, list[Tuned]] = {contender: [] for contender in options.contenders.split(",")}
        for seed in options.seeds:
            for contender, found in results.items():
                command = [sys.executable, __file__, "--measure", contender, "--folder", name, "--seed", str(seed)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(Tuned(*json.loads(done.stdout.splitlines()[-1])))
                print(contender, seed, *describe(found[-1], replies), flush=True)
        report(results, replies)


def prepare(folder: Path, conversations: int, vocab_size: int) -> int:
    """Write the model, the conversations and the held-out ones; return the tokens of replies to train on."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(LENGTH)
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        **SHAPE, **ids, vocab_size=vocab_size, max_position_embeddings=LENGTH, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = islice(load_rows(CONVERSATIONS, "pydocs-chat"), 2 * conversations + 2 * HELD_OUT)
    chats = [json.loads(each) for each in dict.fromkeys(json.dumps(row["messages"]) for row in rows)]
    encoded = zip(chats, encode_conversations(tokenizer, chats), strict=True)
    fitting = [
        (chat, each) for chat, each in encoded if isinstance(each, EncodedConversation) and len(each.ids) < LENGTH
    ]
    for name, part in (("train", fitting[:conversations]), ("held_out", fitting[-HELD_OUT:])):
        lines = [json.dumps({"messages": chat}) + "\n" for chat, _ in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return sum(int(each.loss_mask.sum()) for _, each in fitting[:conversations])


def measure(contender: str, folder: Path, seed: int) -> Tuned:
    """Tune the model, and return what that took."""
    task = Task(folder, folder / contender, seed)
    keep_freed_memory()  # as train_instruct.py does: it is faster for TRL too
    seconds = CONTENDERS[contender](task)
    peak = peak_memory_bytes(CPU)
    return Tuned(seconds, peak, held_out_loss(task))


def fgpt(task: Task, rows: int = ROWS) -> list[float]:
    from fgpt_hf.cli.train_instruct import main as train_instruct

    settings: dict[str, Any] = {
        "preset": "quickstart", "model_name_or_path": task.folder / "model",
        "dataset_name": task.folder / "train.jsonl", "validation_fraction": 0, "output_dir": task.output,
        "overwrite_output_dir": True, "num_train_epochs": 1, "max_steps": 0, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": ROWS // rows, "optim": "adamw", "learning_rate": RATE, "weight_decay": 0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "lr_scheduler_type": "constant", "warmup_steps": WARMUP,
        "max_grad_norm": 1.0, "bf16": BF16, "new_token_init": "keep", "seed": task.seed, "eval_tasks": "",
        "logging_steps": 1, "sample_steps": 10**6, "save_steps": 10**6, "max_new_tokens": 1,
    }  # fmt: skip
    train_instruct([f"--{name}={value}" for name, value in settings.items()])
    ends = [line["seconds"] for line in read_json_lines(task.output / "metrics.jsonl") if "loss" in line]
    return [end - start for start, end in pairwise([0.0, *ends])]


class StepTimer(TrainerCallback):
    """The seconds of each step of transformers' Trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def trl(task: Task, settings: Mapping[str, Any] = {}, with_logits: bool = False) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    class WithLogits(SFTTrainer):
        compute_loss = Trainer.compute_loss

    model = AutoModelForCausalLM.from_pretrained(task.folder / "model", dtype=torch.float32)
    given: dict[str, Any] = {
        "output_dir": str(task.output), "packing": True, "assistant_only_loss": True, "max_length": LENGTH,
        "num_train_epochs": 1, "per_device_train_batch_size": ROWS, "max_grad_norm": 1.0, "bf16": BF16,
        "use_cpu": True, "gradient_checkpointing": False, "seed": task.seed, "report_to": "none",
        "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    timer = StepTimer()
    trainer = (WithLogits if with_logits else SFTTrainer)(
        model,
        args=SFTConfig(**{**given, **settings}),
        train_dataset=Dataset.from_list(list(read_json_lines(task.folder / "train.jsonl"))),
        processing_class=build_tokenizer(LENGTH),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP))),
        callbacks=[timer],
    )
    trainer.train()
    trainer.save_model(str(task.output / "model"))
    return timer.seconds


def trl_masked(task: Task) -> list[float]:
    from trl.trainer import utils

    vars(utils)["_use_triton"] = lambda device: True  # which decides that the head scores labels alone
    return trl(task, ONE_ROW)


@torch.no_grad()
def held_out_loss(task: Task) -> float:
    """Return the mean loss of the tokens of held-out replies in nats, one conversation at a time."""
    model = AutoModelForCausalLM.from_pretrained(task.output / "model", dtype=torch.float32).eval()
    chats = [row["messages"] for row in read_json_lines(task.folder / "held_out.jsonl")]
    nats, tokens = 0.0, 0
    for each in encode_conversations(build_tokenizer(LENGTH), chats):
        assert isinstance(each, EncodedConversation)
        ids, mask = torch.from_numpy(each.ids.astype("int64")), torch.from_numpy(each.loss_mask)
        logits = model(input_ids=ids[None]).logits[0, :-1][mask[1:]]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[1:][mask[1:]], reduction="sum"))
        tokens += int(mask[1:].sum())
    return nats / tokens


def speed(found: Tuned, replies: int) -> float:
    """Return tokens of replies per second, with every step as long as the median one."""
    return replies / len(found.seconds) / statistics.median(found.seconds)


def describe(found: Tuned, replies: int) -> list[str]:
    return [
        f"{speed(found, replies):,.0f} tokens/s",
        f"{found.peak_memory_bytes / 2**20:,.0f} MiB",
        f"{found.held_out_loss:.3f} nats",
    ]


def report(results: Mapping[str, Sequence[Tuned]], replies: int) -> None:
    """Print the medians over the rounds as a Markdown table, with the ratios of the first contender to each."""
    name, first = next(iter(results.items()))
    print(f"| | tokens of replies/s | {name} is faster by | peak memory | {name} takes of it | held-out loss |")
    print("|---|---|---|---|---|---|")
    for contender, found in results.items():
        pairs = list(zip(first, found, strict=True))
        faster = statistics.median(speed(one, replies) / speed(other, replies) for one, other in pairs)
        less = statistics.median(one.peak_memory_bytes / other.peak_memory_bytes for one, other in pairs)
        tokens = statistics.median(speed(each, replies) for each in found)
        memory = statistics.median(each.peak_memory_bytes for each in found) / 2**20
        losses = ", ".join(f"{each.held_out_loss:.3f}" for each in found)
        print(f"| `{contender}` | {tokens:,.0f} | {faster:.1f} | {memory:,.0f} MiB | {less:.2f} | {losses} |")


CONTENDERS: Mapping[str, Callable[[Task], list[float]]] = {
    "fgpt": fgpt,
    "fgpt-row": partial(fgpt, rows=1),
    "trl": trl,
    "trl-wrapped": partial(trl, settings=WRAPPED),
    "trl-row": partial(trl, settings=ONE_ROW),
    "trl-compiled": partial(trl, settings={**WRAPPED, "torch_compile": True, "dataloader_drop_last": True}),
    "trl-masked": trl_masked,
    "trl-logits": partial(trl, settings=WRAPPED, with_logits=True),
}

if __name__ == "__main__":
    main()
