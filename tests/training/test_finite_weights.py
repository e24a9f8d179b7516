"""A model whose weights are no numbers is refused before the first step, in every stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fgpt_hf.cli import train_instruct, train_preference
from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import RowsInMemory, ShuffledRows
from fgpt_hf.errors import UserError
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.trainer import Trainer
from tests.support.tiny import random_model, save, tokenizer

pytestmark = pytest.mark.usefixtures("own_accelerator")
BROKEN = "such as model.layers.0.mlp.down_proj.bias"


def broken_model() -> FGPTForCausalLM:
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.bias[1] = float("nan")
    return model


def test_the_loop_takes_no_step_from_weights_that_are_no_numbers(tmp_path: Path) -> None:
    run = Run(output_dir=str(tmp_path / "run"), bf16=False)
    trainer = Trainer(
        accelerator=Accelerator(cpu=True),
        run=run,
        plan=TrainingPlan(max_steps=2, rows=4, micro_batches=1),
        folder=RunFolder(run),
        objective=LanguageModelObjective(broken_model()),
        tokenizer=tokenizer(),
        batches=ShuffledRows(RowsInMemory(np.full((8, 16), 5, dtype=np.uint16)), seed=0),
    )
    with pytest.raises(UserError, match=f"weights of the model hold NaN or infinite values, {BROKEN}"):
        trainer.fit()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "row"),
    [
        (train_instruct, {"instruction": "Hi", "input": "", "output": "Hello"}),
        (train_preference, {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}),
    ],
)
def test_a_tuning_script_names_the_model_and_leaves_nothing_behind(
    stage: Any, row: dict[str, str], tmp_path: Path
) -> None:
    folder = save(broken_model(), tmp_path / "broken")
    (tmp_path / "data.json").write_text(json.dumps([row]))
    flags = [f"--model_name_or_path={folder}", f"--dataset_name={tmp_path / 'data.json'}", "--bf16=false"]
    with pytest.raises(UserError, match=f"weights of {folder} hold NaN or infinite values, {BROKEN}"):
        stage.main(["--preset=quickstart", f"--output_dir={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()
