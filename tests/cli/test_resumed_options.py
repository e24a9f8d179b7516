"""Each option that is given on resume takes effect or is refused: every one of every kind of run is in these tables."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from transformers import GenerationConfig

from fgpt_hf.cli import train_base, train_instruct, train_preference
from fgpt_hf.config.options import described_fields
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun, Run
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.checks import Benchmarks, ChatSamples, ValidationLoss, ValidationMeans
from fgpt_hf.files import read_json, read_json_lines
from fgpt_hf.model.lora import ADAPTER
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS
from fgpt_hf.training.checkpoints import checkpoints
from fgpt_hf.training.records import read_record
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.state import TrainingState
from fgpt_hf.training.trainer import Trainer
from tests.support.tiny import random_model, save

pytestmark = pytest.mark.slow

KINDS: dict[type[Run], tuple[Any, Callable[[list[str]], None]]] = {
    BaseRun: (PRESETS, train_base.main),
    InstructRun: (INSTRUCT_PRESETS, train_instruct.main),
    PreferenceRun: (PREFERENCE_PRESETS, train_preference.main),
}
SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "eval_steps": 1,
    "sample_steps": 100,
    "save_steps": 2,
    "bf16": False,
    "max_eval_rows": 8,
    "eval_tasks": "",
}
BASE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
TUNING = {"validation_fraction": 0.2, "validation_prompts": 1, "max_new_tokens": 4}
LORA = {"use_peft": True, "lora_r": 2}


@dataclass
class Resumed:
    """A resumed run: what it was made of, and what it left."""

    folder: Path
    trainer: Trainer
    state: TrainingState

    def metrics(self, name: str) -> dict[int, float]:
        lines = read_json_lines(self.folder / "metrics.jsonl")
        return {line["step"]: line[name] for line in lines if line["step"] > 2 and name in line}

    def samples(self, name: str) -> list[tuple[int, str]]:
        return [(line["step"], line[name]) for line in read_json_lines(self.folder / "samples.jsonl")]

    def check(self, *kinds: type) -> Any:
        return next(check for check in self.trainer.checks if isinstance(check, kinds))

    @property
    def group(self) -> dict[str, Any]:
        return next(group for group in self.state.optimizer.param_groups if "betas" in group)

    @property
    def momentum(self) -> float:
        return next(group["momentum"] for group in self.state.optimizer.param_groups if "momentum" in group)

    @property
    def decays(self) -> set[float]:
        return {group["weight_decay"] for group in self.state.optimizer.param_groups}

    def dropouts(self, of_adapter: bool) -> set[float]:
        modules = self.state.model.named_modules()
        return {m.p for name, m in modules if type(m).__name__ == "Dropout" and ("lora" in name) == of_adapter}


def validation_size(run: Resumed) -> int:
    check = run.check(ValidationLoss, ValidationMeans)
    return (
        len(check.rows) if isinstance(check, ValidationLoss) else sum(len(batch["labels"]) for batch in check.batches)
    )


# By option: the value on resume, and what shows that it took effect, with what it then is.
EFFECTS: dict[str, tuple[Any, Callable[[Resumed], Any], Any]] = {
    "max_steps": (8, lambda run: run.state.progress.step, 8),
    "per_device_train_batch_size": (2, lambda run: run.trainer.plan.rows, 2),
    "gradient_accumulation_steps": (3, lambda run: run.trainer.plan.micro_batches, 3),
    "learning_rate": (2e-3, lambda run: run.metrics("learning_rate")[4], 2e-3),
    "warmup_steps": (4, lambda run: run.metrics("learning_rate")[3], pytest.approx(2e-3 * 3 / 4)),
    "lr_scheduler_type": ("linear", lambda run: run.metrics("learning_rate")[8], pytest.approx(2e-3 / 4)),
    "weight_decay": (0.25, lambda run: max(run.decays), 0.25),
    "muon_momentum": (0.85, lambda run: run.momentum, 0.85),
    "adam_beta1": (0.8, lambda run: run.group["betas"][0], 0.8),
    "adam_beta2": (0.9, lambda run: run.group["betas"][1], 0.9),
    "dropout": (0.2, lambda run: run.dropouts(of_adapter=False), {0.2}),
    "lora_dropout": (0.3, lambda run: run.dropouts(of_adapter=True), {0.3}),
    "gradient_checkpointing": (True, lambda run: run.state.model.is_activation_checkpointing, True),
    "attn_implementation": ("eager", lambda run: run.state.model.config._attn_implementation, "eager"),
    "eval_steps": (4, lambda run: list(run.metrics("eval_loss")), [4, 8]),
    "max_eval_rows": (2, validation_size, 2),
    "eval_tasks": ("pydocs-choice", lambda run: list(run.metrics("pydocs-choice/acc_norm")), [6, 8]),
    "eval_task_steps": (6, lambda run: list(run.metrics("pydocs-choice/acc_norm")), [6, 8]),
    "eval_task_limit": (3, lambda run: run.check(Benchmarks).latest[0].examples, 3),
    "sample_steps": (5, lambda run: sorted({step for step, _ in run.samples("prompt")})[-2:], [5, 8]),
    "sample_prompt": ("Another", lambda run: (5, "Another") in run.samples("prompt"), True),
    "validation_prompts": (2, lambda run: len([step for step, _ in run.samples("prompt") if step == 8]), 5),
    "max_new_tokens": (6, lambda run: run.check(ChatSamples).max_new_tokens, 6),
    "save_steps": (3, lambda run: [path.name[-1] for path in checkpoints(run.folder / "checkpoints")], ["8", "6"]),
    "save_total_limit": (2, lambda run: len(checkpoints(run.folder / "checkpoints")), 2),
    "logging_steps": (1, lambda run: list(run.metrics("loss")), [3, 4, 5, 6, 7, 8]),
    "merge_adapter": (False, lambda run: (run.folder / "model" / ADAPTER).is_file(), True),
}
# Options that nothing in a checkpoint holds, that need other hardware or the Hub, or that change the speed alone: the
# run that reads them is the one that was given.
READ_FROM_THE_RUN = {
    *(
        "min_lr_ratio",
        "lr_decay_ratio",
        "weight_decay_scheduler_type",
        "max_grad_norm",
        "max_bad_steps",
        "sampled_softmax",
        "trust_remote_code",
        "bf16",
        "fp16",
        "torch_compile",
        "fsdp",
        "report_to",
    ),
    *("auto_find_batch_size", "preprocessing_num_workers", "verify_rows"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
}
BY_CONTENT = {"dataset_revision"}  # data with another content is refused wherever it comes from: tests/data
# The instruction run trains all weights, the preference run adapters, which do not decay, by AdamW.
NO_EFFECT: dict[type[Run], set[str]] = {
    BaseRun: set(),
    InstructRun: {"lora_dropout", "merge_adapter"},
    PreferenceRun: {"weight_decay", "muon_momentum"},
}
ONE_START = {"output_dir", "print_groups", "profile", "overwrite_output_dir", "resume_from_checkpoint"}
# With max_steps, as which the first was recorded: tested below; and the second in tests/training/test_timing.py.
REFUSED_TOGETHER = {"num_train_epochs", "max_minutes"}

FIXED = [(kind, name) for kind in KINDS for name in kind.fixed_on_resume()]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    model = random_model()
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    save(model, home / "start")
    rows = [{"prompt": f"Say {n}", "chosen": f"Gladly: {n}", "rejected": f"No, not {n}!"} for n in range(60)]
    (home / "PreferenceRun.json").write_text(json.dumps(rows))
    chats = [{"instruction": f"Name {n}.", "input": "", "output": f"It is {n}. " * 9} for n in range(120)]
    (home / "InstructRun.json").write_text(json.dumps(chats))
    texts = [{"text": f"Document {n} says that {n} and {n + 1} make {2 * n + 1}. " * (1 + n % 7)} for n in range(900)]
    (home / "BaseRun.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.finetuning", "data.prepare"):
            patch.setattr(f"fgpt_hf.{module}.HF_HOME", str(home / "cache"), raising=False)
        yield home
    AcceleratorState._reset_state(reset_partial_state=True)


def flags(kind: type[Run], home: Path, **changes: Any) -> list[str]:
    (data,) = home.glob(f"{kind.__name__}.json*")
    given = {"dataset_name": data, "output_dir": home / f"run of {kind.__name__}", **SHORT}
    given |= BASE if kind is BaseRun else {**TUNING, "model_name_or_path": home / "start"}
    given |= LORA if kind is PreferenceRun else {}
    return ["--preset=quickstart", *(f"--{name}={value}" for name, value in (given | changes).items())]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def resumed(request: pytest.FixtureRequest, home: Path) -> Resumed:
    """A run that was resumed with all options changed that may be."""
    kind = request.param
    _, main = KINDS[kind]
    main(flags(kind, home, overwrite_output_dir=True))  # made again after tests of other kinds
    names = {field.name for field, _ in described_fields(kind)}
    changes = {name: value for name, (value, *_) in EFFECTS.items() if name in names}
    seen = []
    start = Trainer._start

    def watched(trainer: Trainer) -> Any:
        forward, state = start(trainer)
        seen.append(Resumed(trainer.folder.path, trainer, state))
        return forward, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_start", watched)
        main(flags(kind, home, **changes, resume_from_checkpoint="latest"))
    return seen[0]


def test_each_option_that_may_change_takes_effect(resumed: Resumed) -> None:
    names = {field.name for field, _ in described_fields(resumed.trainer.run)} - NO_EFFECT[type(resumed.trainer.run)]
    found = {name: EFFECTS[name][1](resumed) for name in names if name in EFFECTS}
    assert found == {name: EFFECTS[name][2] for name in found}


def test_a_run_killed_after_its_last_checkpoint_loses_no_result(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"eval_tasks": "pydocs-choice", "eval_task_limit": 4, "output_dir": home / "killed", "max_steps": 1}

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingState, "save_model", killed)
        train_base.main(flags(BaseRun, home, **changes))
    train_base.main(flags(BaseRun, home, **changes, resume_from_checkpoint="latest"))
    (values,) = read_json(home / "killed" / "results.json")["tasks"].values()
    measured = read_json_lines(home / "killed" / "metrics.jsonl")[-1]
    assert values["acc_norm"] == measured["pydocs-choice/acc_norm"] and measured["step"] == 1


def test_the_record_says_what_was_used(resumed: Resumed) -> None:
    recorded = read_record(resumed.folder / "run.yaml")
    expected = {name: value for name, (value, *_) in EFFECTS.items() if name in asdict(resumed.trainer.run)}
    assert {name: recorded[name] for name in expected} == expected


@pytest.mark.parametrize(("kind", "name"), FIXED, ids=lambda value: getattr(value, "__name__", value))
def test_each_option_that_may_not_change_is_refused_in_one_line(tmp_path: Path, kind: type[Run], name: str) -> None:
    run = parse_run(
        kind,
        KINDS[kind][0],
        ["--preset=quickstart", f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest"],
    )
    recorded = yaml.safe_load(run.to_yaml()) | {name: "another one"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recorded))
    said = f"a run with {name}=another one, which cannot continue with {name}="
    with pytest.raises(UserError, match=said), RunFolder(run).opened():
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_no_option_is_left_out(kind: type[Run]) -> None:
    tables = [set(EFFECTS), READ_FROM_THE_RUN, BY_CONTENT, ONE_START, REFUSED_TOGETHER, set(kind.fixed_on_resume())]
    for field, _ in described_fields(kind):
        assert sum(field.name in table for table in tables) == 1, field.name


def test_epochs_that_a_recorded_number_of_steps_would_hide_are_refused(tmp_path: Path) -> None:
    arguments = [f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest"]
    run = parse_run(InstructRun, INSTRUCT_PRESETS, [*arguments, "--max_steps=9"])
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    again = [*arguments, f"--config={tmp_path / 'run.yaml'}", "--num_train_epochs=2"]
    said = "num_train_epochs=2.0 has no effect with max_steps=9: give --max_steps 0"
    with pytest.raises(UserError, match=said), RunFolder(parse_run(InstructRun, INSTRUCT_PRESETS, again)).opened():
        pass
    with RunFolder(parse_run(InstructRun, INSTRUCT_PRESETS, [*again, "--max_steps=0"])).opened():
        pass
