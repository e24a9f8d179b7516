"""An ablation trains what is missing, once, and each run by its own flags."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fgpt_hf.ablation import trials
from fgpt_hf.ablation.trials import Ablation, TrialResult
from fgpt_hf.ablation.variants import make_variants, parse_axis
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines
from tests.support.forked import run_command

AXES = [parse_axis("optim=muon,adamw")]
FLAGS = ["--preset=quickstart", "--max_steps=32"]


class Trained:
    """Stands in for training: writes metrics whose loss depends on the flags, and fails when told to."""

    def __init__(self, failing_at: int = -1) -> None:
        self.commands: list[Sequence[str]] = []
        self.failing_at = failing_at

    def __call__(self, flags: Sequence[str], log: Path) -> int:
        self.commands.append(flags)
        given = dict(flag.lstrip("-").split("=", 1) for flag in flags)
        if len(self.commands) - 1 == self.failing_at:
            log.write_text("loading\nfgpt: no such luck\n")
            return 2
        folder = Path(given["output_dir"])
        (folder / "model").mkdir(parents=True)
        (folder / "run.yaml").touch()
        final = 4 - 100 * float(given["learning_rate"]) + (given["optim"] == "adamw") + int(given["seed"]) / 1e6
        lines = [
            {"step": 0, "tokens": 0, "seconds": 0, "eval_loss": 9.0, "eval_bits_per_byte": 4.0},
            {
                "step": 32,
                "tokens": 64,
                "seconds": 9,
                "eval_loss": final,
                "eval_bits_per_byte": final / 2,
                "tokens_per_second": 7,
                "peak_memory_bytes": 5,
            },
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0


def ablation(folder: Path, *flags: str, rates: Sequence[str] = ("1e-3", "2e-3"), seeds: int = 2) -> Ablation:
    return Ablation(folder / "runs", make_variants(AXES), rates, seeds, [*FLAGS, *flags])


def test_every_rate_is_tried_and_the_best_has_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Trained()
    monkeypatch.setattr(trials, "train_base", training)
    results = ablation(tmp_path).run()
    assert [(each.variant, each.learning_rate, each.seed - results[0].seed) for each in results] == [
        ("default", "1e-3", 0),
        ("default", "2e-3", 0),
        ("optim=adamw", "1e-3", 0),
        ("optim=adamw", "2e-3", 0),
        ("default", "2e-3", 1),
        ("optim=adamw", "2e-3", 1),
    ]
    assert all("--optim=muon" in command for command in training.commands[:2])
    assert not list((tmp_path / "runs").glob("*/model")), "what a finished run left of its weights is deleted"
    again = Trained()
    monkeypatch.setattr(trials, "train_base", again)
    assert [each.loss for each in ablation(tmp_path).run()] == [each.loss for each in results]
    assert not again.commands, "finished runs are not repeated"


def test_a_run_that_fails_is_named_and_the_next_call_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "train_base", Trained(failing_at=2))
    with pytest.raises(UserError, match=r"optim=adamw,learning_rate=1e-3.*exit code 2: fgpt: no such luck"):
        ablation(tmp_path).run()
    later = Trained()
    monkeypatch.setattr(trials, "train_base", later)
    assert len(ablation(tmp_path).run()) == 6 and len(later.commands) == 4
    assert all("--resume_from_checkpoint=latest" in command for command in later.commands)


def test_by_default_the_runs_own_rate_is_halved_and_doubled_too(tmp_path: Path) -> None:
    assert ablation(tmp_path, "--learning_rate=2e-3", rates=()).rates == ["0.001", "0.002", "0.004"]
    axes = [parse_axis("learning_rate=1e-3,2e-3")]
    assert Ablation(tmp_path, make_variants(axes), (), 1, FLAGS).rates == [None]


@pytest.mark.parametrize(
    ("axis", "flags", "problem"),
    [
        ("optm=a,b", (), "did you mean --optim"),
        ("optim=muon,sgd", (), "optim='sgd' is unknown: choose from muon, adamw"),
        ("num_attention_heads=4,7", (), "num_attention_heads"),
        ("lr_scheduler_type=cosine,step", (), "invalid choice: 'step'"),
        ("optim=muon,adamw", ("--max_stepz=3",), "did you mean --max_steps"),
        ("learning_rate=1,2", (), "give no --learning_rates"),
    ],
)
def test_what_some_run_would_refuse_is_refused_before_the_first(
    tmp_path: Path, axis: str, flags: Sequence[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        Ablation(tmp_path / "runs", make_variants([parse_axis(axis)]), ["1e-3"], 1, [*FLAGS, *flags])
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_other_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "train_base", Trained())
    ablation(tmp_path).run()
    with pytest.raises(UserError, match="holds runs with other flags"):
        ablation(tmp_path, "--weight_decay=0.5").run()


@pytest.mark.slow
def test_the_command_trains_and_compares(tmp_path: Path) -> None:
    rows = [{"text": f"Document {n} says that {n} and {n + 1} make {2 * n + 1}."} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--max_position_embeddings=32"]
    common = ["--preset=quickstart", "--max_steps=16", "--warmup_steps=1", f"--dataset_name={tmp_path / 'rows.jsonl'}"]
    once = ["--vary=optim=muon,adamw", "--learning_rates=1e-2", "--seeds=1", f"--output_dir={tmp_path / 'runs'}"]
    done = run_command("fgpt", "ablate", *shape, *common, *once)
    assert done.returncode == 0, done.stderr
    lines = [TrialResult(**line) for line in read_json_lines(tmp_path / "runs" / "results.jsonl")]
    assert [line.variant for line in lines] == ["default", "optim=adamw"]
    assert all(
        len(line.curve) == len(line.bits_per_byte) == 17 and line.loss < line.curve[0][1] and line.parameters > 1000
        for line in lines
    )
    table = (tmp_path / "runs" / "ablation.md").read_text()
    assert table in done.stdout and (tmp_path / "runs" / "ablation.png").is_file()
