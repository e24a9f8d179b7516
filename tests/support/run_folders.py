"""A run's folder as training leaves it, made in a moment."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PRESETS
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS, build_tokenizer

METRICS = [
    {"step": 0, "tokens": 0, "seconds": 0.0, "eval_loss": 10.8, "eval_bits_per_byte": 3.4},
    {"step": 400, "tokens": 819_200, "seconds": 1800.0, "loss": 4.6, "eval_loss": 4.7, "eval_bits_per_byte": 1.5},
]
SAMPLES = [
    {"step": 0, "prompt": "Once", "greedy": " early", "sampled": " early too"},
    {"step": 400, "prompt": "Once", "greedy": " upon upon upon", "sampled": " ```fences``` | and pipes"},
    {"step": 400, "prompt": "def f", "greedy": "(x)", "sampled": "(\n\n"},
]
PROVENANCE = {
    "data": {
        "train": {"documents": 75_000, "tokens": 9_000_000},
        "validation": {"documents": 750, "tokens": 90_000},
    },
    "device": "NVIDIA H100",
    "processes": 4,
    "precision": "bf16",
    "versions": {"Python": "3.12.1", "torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "network_code_sha256": "fedcba9876543210",
    "training_flops": 1.5e15,
}
RESULTS = {
    "tasks": {"hellaswag": {"acc": 0.2892, "acc_stderr": 0.0045, "acc_norm": 0.3114, "acc_norm_stderr": 0.0046}},
    "datasets": {"hellaswag": {"id": "Rowan/hellaswag", "task_id": "hellaswag", "split": "validation"}},
    "conventions": {"acc": "sum of log-likelihoods", "acc_norm": "divided by the ending's characters"},
    "harness": "fgpt evaluate",
    "versions": {"fgpt-hf": "0.1.0"},
}


def tiny_model() -> FGPTForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    model = FGPTForCausalLM(FGPTConfig(**shape)).eval()
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    return model


def write_run(folder: Path, **fields: Any) -> Path:
    """A finished quickstart run with everything that a run may write, secrets that must not be published included."""
    folder.mkdir(parents=True)
    save_model(tiny_model(), build_tokenizer(64), folder / "model")
    presets = INSTRUCT_PRESETS if "model_name_or_path" in fields else PRESETS
    run = replace(presets["quickstart"], output_dir=str(folder), **fields)
    (folder / "run.yaml").write_text(run.to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SAMPLES))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "figures").mkdir()
    (folder / "figures" / "validation_loss.png").write_bytes(b"\x89PNG\0")
    (folder / "checkpoints").mkdir()
    for name in ("training.pt", "optimizer.bin", "pytorch_model.bin", "ids.npy", "train.log", "tokens.json", ".env"):
        (folder / "model" / name).write_text(f"secret of {folder}")
    return folder
