"""Every change that docs/tinkering.md shows works as it stands: applied to a copy of the code, in one run with all."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHAPE = [
    *("--preset=quickstart", "--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=2", "--bf16=false"),
    *(
        "--max_position_embeddings=32",
        "--warmup_steps=2",
        "--max_eval_rows=8",
        "--save_steps=8",
        "--save_total_limit=9",
    ),
]
OWN = [
    *("--norm=dynamic_tanh", "--mlp=bilinear", "--hidden_act=sine", "--optim=lion", "--learning_rate=0.01"),
    *("--lr_scheduler_type=one_minus_sqrt", "--dataset_name=counting", "--eval_tasks=next-number", "--qk_norm"),
]
INSTALLED = """
import sys
from pathlib import Path

from accelerate import Accelerator

from fgpt_hf.convert.export import export
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import Benchmark
from fgpt_hf.model.io import load_fgpt
from fgpt_hf.runtime.network import count_parameters

model, tokenizer = load_fgpt(sys.argv[1])
assert count_parameters(model.config).total == sum(each.numel() for each in model.parameters())
assert Benchmark("next-number", tokenizer, limit=8).run(Accelerator(cpu=True), model).examples == 8
try:
    export(sys.argv[1], Path("gpt2"), "gpt2")
except UserError as error:
    print(error)
"""
STRANGER = """
import sys
sys.modules["fgpt_hf"] = None  # cannot be imported
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(type(model.model.norm).__name__, type(model.model.layers[0].mlp).__name__, model.model.layers[0].mlp.act_fn)
ids = torch.arange(100, 112)[None]
with torch.no_grad():
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values).logits
torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-4)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all changes of the page."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "fgpt_hf", folder / "fgpt_hf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_base.py", folder)
    page = (ROOT / "docs" / "tinkering.md").read_text(encoding="utf-8")
    for change in re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL):
        done = subprocess.run(["git", "apply", "-"], cwd=folder, input=change, text=True, capture_output=True)
        assert done.returncode == 0, f"{done.stderr}\n{change}"
    return folder


def python(copy: Path, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(copy: Path) -> Path:
    python(copy, "train_base.py", *SHAPE, *OWN, "--max_steps=16", "--output_dir=run")
    return copy / "run"


@pytest.mark.slow
def test_a_run_with_all_changes_learns_and_records_them(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert any("next-number/margin" in line for line in lines)
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "dynamic_tanh" in card and "Lion" in card and "next-number" in card


@pytest.mark.slow
def test_it_resumes_exactly(copy: Path, run: Path) -> None:
    again = copy / "again"
    shutil.copytree(run, again)
    (again / "model" / "model.safetensors").unlink()
    middle = again / "checkpoints" / "step_00000008"
    flags = ["--max_steps=16", f"--output_dir={again}", f"--resume_from_checkpoint={middle}"]
    python(copy, "train_base.py", *SHAPE, *OWN, *flags)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, again)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_model_is_counted_scored_and_refused_by_exports(copy: Path, run: Path) -> None:
    assert "norm='dynamic_tanh'" in python(copy, "-c", INSTALLED, run / "model")


@pytest.mark.slow
def test_the_model_travels_with_its_blocks(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(run / "model")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["FGPTDynamicTanh", "FGPTBilinearMLP", "Sine()"]
