"""A run told to a person: figures of what was measured, losses and samples before and after, what to do next."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fgpt_hf.cli.main import run
from fgpt_hf.errors import UserError
from fgpt_hf.report.figures import draw_figures
from fgpt_hf.report.summary import summarize_run


def make_run(folder: Path, steps: int = 20, **more: float) -> Path:
    """A folder as training leaves it, with a validation loss and samples before the first and after the last step."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("preset: tiny\n")
    lines = []
    for step in range(steps + 1):
        line: dict[str, float] = {"step": step, "tokens": 100 * step, "seconds": 2.0 * step}
        if step:
            line |= {"loss": 10.0 - step / 10, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0} | more
        if step in (0, steps):
            line |= {"eval_loss": 10.5 - step / 10, "eval_bits_per_byte": 5.5 - step / 20}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": step, "prompt": "Once", "greedy": "", "sampled": f"told at {step}"} for step in (0, steps)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def figures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "figures").iterdir()}


def test_losses_and_samples_are_told_before_and_after(tmp_path: Path) -> None:
    answer = summarize_run(make_run(tmp_path / "run"))
    assert "20 steps, 2,000 tokens, 40 s of training" in answer
    assert "validation loss  10.500 at step 0 -> 8.500 at step 20" in answer
    assert "50 tokens/s" in answer
    assert answer.index("told at 0") < answer.index("told at 20")
    assert "This base run is unfinished: 2,000 tokens in 40 s, validation loss 10.500 -> 8.500, bits per byte" in answer
    assert f"report --watch {tmp_path}/run" in answer and "metrics.jsonl" in answer


def test_rewards_are_no_benchmarks_and_have_figures_of_their_own(tmp_path: Path) -> None:
    measured = {"rewards/margins": 0.25, "rewards/accuracies": 0.75, "eval_rewards/margins": 0.5, "task/acc": 0.25}
    folder = make_run(tmp_path / "run", **measured)
    answer = summarize_run(folder)
    draw_figures(folder)
    assert {"reward_margin", "reward_accuracy", "benchmarks"} <= figures(tmp_path / "run")
    assert "validation reward margin  0.500 at step 1 -> 0.500 at step 20" in answer
    assert "rewards/" not in answer and "task/acc" in answer


def test_every_figure_is_a_picture_and_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert [path.parent for path in draw_figures(folder)] == [folder / "figures"] * 5
    assert figures(folder) == {"loss", "bits_per_byte", "learning_rate", "gradient_norm", "speed"}
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            assert image.width >= 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_benchmarks_and_utilization_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    measured = {"mfu": 0.4, "hellaswag/acc_norm": 0.31, "hellaswag/acc_norm_stderr": 0.01}
    folder = make_run(tmp_path / "run", **measured)
    assert "0.310 at step 1 -> 0.310 ± 0.010 at step 20" in summarize_run(folder)
    draw_figures(folder)
    assert figures(folder) >= {"benchmarks", "utilization"}


@pytest.mark.parametrize("steps", [1, 500])
def test_short_and_long_runs_and_infinite_values_are_drawn(tmp_path: Path, steps: int) -> None:
    folder = make_run(tmp_path / "run", steps, grad_norm=float("inf"))
    draw_figures(folder)
    assert "gradient_norm" in figures(folder)


def test_answers_before_and_after_are_a_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", answers_ended=0.5, answer_tokens=9.0)
    samples = [
        {"step": step, "prompt": "Who?\nYou?", "greedy": f"{said} " * 20, "sampled": ""}
        for step, said in ((0, "nobody"), (20, "me"))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    draw_figures(folder)
    lines = summarize_run(folder).splitlines()
    (row,) = (line for line in lines if line.startswith("Who? You?"))
    assert "nobody" in row and row.index("nobody") < row.index("me me")
    assert lines[lines.index(row) - 2].split() == ["prompt", "before", "after"]
    assert figures(folder) >= {"answer_length", "answers_ended"}


def test_a_killed_run_without_samples_is_told_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "samples.jsonl").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "los')
    assert "20 steps" in summarize_run(folder)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a run, because it has no run.yaml"):
        summarize_run(tmp_path / "nowhere")
    make_run(tmp_path / "runs" / "base")
    with pytest.raises(UserError, match="it holds the runs .*base"):
        summarize_run(tmp_path / "runs")
    (tmp_path / "runs" / "base" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no line yet"):
        summarize_run(tmp_path / "runs" / "base")
    (tmp_path / "runs" / "base" / "metrics.jsonl").write_text("{step}\n")
    with pytest.raises(UserError, match=r"is damaged: line \d+ is not JSON"):
        summarize_run(tmp_path / "runs" / "base")


def test_the_commands_print_a_report_and_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["report", str(make_run(tmp_path / "run"))])
    assert "validation loss" in capsys.readouterr().out
    run(["estimate", "--preset", "quickstart", "--device=l4"])
    assert "17,682,432 parameters" in capsys.readouterr().out
