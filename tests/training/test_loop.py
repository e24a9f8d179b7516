"""The loop's promises: one trajectory however a step is divided, exact resume, faults survived."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.files import integrity_error, read_json_lines
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.runtime.distributed import evaluating
from fgpt_hf.runtime.hardware import supports_bf16
from fgpt_hf.training.checkpoints import checkpoints
from tests.support import loop_run
from tests.support.forked import Forked
from tests.support.launched import Launched, call_as_script, torchrun


def succeed(
    folder: Path, *flags: object, processes: int = 1, main: Callable[[Sequence[str]], None] = loop_run.main
) -> str:
    done = Launched(folder, *flags, processes=processes, main=main).wait()
    assert done.exit_codes == [0] * processes, done.errors
    return done.output


def refusal(folder: Path, *flags: object) -> str:
    done = Launched(folder, *flags).wait()
    assert done.exit_codes == [2], done.errors
    (line,) = done.errors.strip().splitlines()
    return line


def trajectory(folder: Path) -> list[tuple[int, float | None, float | None]]:
    lines = read_json_lines(folder / "metrics.jsonl")
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert trajectory(one) == trajectory(other)
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(weights(one)[name], weights(other)[name]) for name in weights(one))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    succeed(folder)
    return folder


@pytest.fixture(scope="module")
def whole_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dropout"
    succeed(folder, "--dropout=0.1")
    return folder


def test_a_run_learns_and_leaves_all_that_it_promises(whole: Path) -> None:
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    assert [path.name for path in checkpoints(whole / "checkpoints")] == [f"step_0000000{step}" for step in (8, 6, 3)]
    lines = read_json_lines(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8]
    assert {"tokens", "seconds", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= lines[-1].keys()
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    assert {path.name for path in (whole / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


DIVISIONS = {
    "micro-batches": (1, ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=4"]),
    "processes": (2, ["--per_device_train_batch_size=4"]),
    "sharded": (2, ["--per_device_train_batch_size=4", "--fsdp"]),
    "sharded micro-batches": (
        2,
        ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2", "--fsdp"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("division", DIVISIONS)
def test_one_trajectory_however_a_step_is_divided(whole: Path, tmp_path: Path, division: str) -> None:
    processes, flags = DIVISIONS[division]
    succeed(tmp_path / "run", *flags, processes=processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=3e-5)


@pytest.mark.slow
def test_a_check_with_more_batches_on_one_process_than_on_another_ends(tmp_path: Path) -> None:
    """Where weights are sharded, each forward pass would wait for the other process."""
    succeed(tmp_path / "one", "--validation_rows=9", "--max_steps=4")
    flags = ["--validation_rows=9", "--max_steps=4", "--per_device_train_batch_size=4", "--fsdp"]
    succeed(tmp_path / "two", *flags, processes=2)
    expected = [
        line["eval_loss"] for line in read_json_lines(tmp_path / "one" / "metrics.jsonl") if "eval_loss" in line
    ]
    validation = [
        line["eval_loss"] for line in read_json_lines(tmp_path / "two" / "metrics.jsonl") if "eval_loss" in line
    ]
    assert len(validation) == 2 and validation == pytest.approx(expected, rel=3e-5)


def test_checks_leave_the_compiler_to_training() -> None:
    """They see many shapes, of which it takes a few and then gives up."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable:
        compiled.append(graph)
        return graph.forward

    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    objective = LanguageModelObjective(FGPTForCausalLM(FGPTConfig(vocab_size=64, **shape)))
    decoder = objective.model.get_decoder()
    decoder.compile(backend=backend)

    with evaluating(objective):
        for length in range(2, 14):
            decoder(torch.ones(1, length, dtype=torch.int64), use_cache=False)
    assert not compiled
    decoder(torch.ones(2, 16, dtype=torch.int64), use_cache=False)
    assert compiled


def test_the_progress_bar_fits_80_columns_and_no_other_one_breaks_it(tmp_path: Path) -> None:
    launched = Launched(tmp_path / "run", "--max_steps=12").wait()
    lines = launched.errors.replace("\r", "\n").splitlines()
    assert any("12/12" in line and "tok/s" in line for line in lines)
    assert max(map(len, lines)) < 80
    assert all("step" in line for line in lines if line.strip())


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    whole_with_dropout: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "run"
    succeed(folder, "--dropout=0.1", f"--save_steps={step}", "--save_total_limit=9")
    succeed(folder, "--dropout=0.1", f"--resume_from_checkpoint={folder}/checkpoints/step_{step:08d}")
    assert_equal_runs(folder, whole_with_dropout)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_resume_exactly(tmp_path: Path, sharded: bool) -> None:
    flags = ["--dropout=0.1", "--per_device_train_batch_size=4", f"--fsdp={sharded}"]
    folder = tmp_path / "run"
    succeed(folder, *flags, processes=2)
    expected = trajectory(folder), weights(folder)
    succeed(folder, *flags, f"--resume_from_checkpoint={folder}/checkpoints/step_00000003", processes=2)
    assert trajectory(folder) == expected[0]
    assert all(torch.equal(weight, expected[1][name]) for name, weight in weights(folder).items())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeed(folder, "--per_device_train_batch_size=4", processes=2)
    output = succeed(folder, f"--resume_from_checkpoint={folder}/checkpoints/step_00000003")
    assert "written by 2 processes and continues on 1" in output
    assert losses(folder) == pytest.approx(losses(whole), rel=3e-5)


ENDLESS = ["--max_steps=100000", "--save_steps=100000", "--eval_steps=100000"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_lets_the_step_end_saves_and_leaves_with_a_code_that_ends_a_chain(
    tmp_path: Path, number: signal.Signals, code: int, processes: int
) -> None:
    folder = tmp_path / "run"
    launched = Launched(folder, *ENDLESS, processes=processes)
    wait_for_step(folder, 3)
    os.kill(launched.processes[-1].pid, number)
    assert launched.wait().exit_codes == [code] * processes
    assert "the same command resumes from there" in launched.output and "Traceback" not in launched.errors
    (checkpoint,) = checkpoints(folder / "checkpoints")
    assert trajectory(folder)[-1][0] == int(checkpoint.name[5:])
    assert not (folder / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_torchrun_a_signal_to_all_processes_saves_once(tmp_path: Path, number: signal.Signals) -> None:
    """A scheduler and a terminal signal the workers too, and torchrun passes the signal on to them a second time."""
    folder = tmp_path / "run"
    launcher, workers = under_torchrun(folder, *ENDLESS)
    for process in (*workers, psutil.Process(launcher.process.pid)):
        process.send_signal(number)
    assert launcher.wait().returncode not in (0, -number) and "loop_run.py" not in launcher.stderr
    assert not psutil.wait_procs(workers, timeout=120)[1]
    (checkpoint,) = checkpoints(folder / "checkpoints")
    assert integrity_error(checkpoint) is None


def under_torchrun(folder: Path, *flags: str) -> tuple[Forked, list[psutil.Process]]:
    """Return torchrun and its two workers, which have taken the first steps of a run."""
    action = partial(torchrun, 2, folder.parent, call_as_script, loop_run.main)
    launcher = Forked(action, [f"--output_dir={folder}", *flags], folder.parent)
    wait_for_step(folder, 2)
    return launcher, psutil.Process(launcher.process.pid).children()


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_json_lines(folder / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"{folder} did not come to step {step}")


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tmp_path: Path) -> None:
    output = succeed(tmp_path / "run", "--infinite_from=4", "--infinite_steps=2")
    assert "step 4 is skipped: the gradient is not finite" in output
    assert [line["skipped_steps"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")[1:]] == [
        0,
        0,
        0,
        1,
        2,
        2,
        2,
        2,
    ]
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())


def test_too_many_such_steps_stop_the_run_with_its_checkpoints(tmp_path: Path) -> None:
    flags = ["--infinite_from=5", "--infinite_steps=9", "--max_bad_steps=3"]
    launched = Launched(tmp_path / "run", *flags).wait()
    assert launched.exit_codes == [2]
    assert "none of the last 3 steps could be used" in launched.errors.splitlines()[-1]
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000006", "step_00000003"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_step_without_a_scored_token_is_skipped_and_said(tmp_path: Path) -> None:
    output = succeed(tmp_path / "run", "--unscored=4")
    assert "step 4 is skipped: the batch has no labels" in output
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl")[4]["loss"] == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--attn_implementation=eager", "--torch_compile"])
def test_how_the_network_is_computed_does_not_change_what_it_learns(whole: Path, tmp_path: Path, flag: str) -> None:
    succeed(tmp_path / "run", flag)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=3e-5)


def test_bfloat16_learns_as_float32_does(whole: Path, tmp_path: Path) -> None:
    if not supports_bf16(torch.device("cpu")):
        assert "has no bfloat16 arithmetic" in refusal(tmp_path / "run", "--bf16")
        return
    succeed(tmp_path / "run", "--bf16")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=0.01)


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(tmp_path: Path) -> None:
    """The limit on the size of a file is what a process can be given in place of a full disk."""
    folder = tmp_path / "run"
    succeed(folder, "--max_steps=4")
    largest = (folder / "checkpoints" / "step_00000004" / "training.pt").stat().st_size
    launched = Launched(folder, "--resume_from_checkpoint=latest", "--max_steps=8", file_size_limit=largest // 2).wait()
    assert "no checkpoint of step 6, but the earlier ones are complete" in launched.output
    assert launched.exit_codes == [2]
    assert "could not write" in launched.errors.splitlines()[-1]
    assert [integrity_error(path) for path in checkpoints(folder / "checkpoints")] == [None, None]
    assert not list(folder.rglob("*.partial"))
    succeed(folder, "--resume_from_checkpoint=latest")
    assert trajectory(folder)[-1][0] == 8


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert "report_to=wandb is not installed: pip install wandb" in refusal(tmp_path / "run", "--report_to=wandb")


def test_a_damaged_checkpoint_is_named_and_passed_over(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeed(folder)
    content = (folder / "checkpoints" / "step_00000008" / "training.pt").read_bytes()
    (folder / "checkpoints" / "step_00000008" / "training.pt").write_bytes(content[:-1])
    (folder / "checkpoints" / "step_00000006" / "model.safetensors").unlink()
    output = succeed(folder, "--resume_from_checkpoint=latest")
    assert "step_00000008: training.pt is damaged" in output
    assert "step_00000006: model.safetensors is missing" in output
    assert_equal_runs(folder, whole)


@pytest.mark.slow
def test_a_run_that_goes_back_leaves_the_other_branch_behind(tmp_path: Path) -> None:
    """Stopped before its next checkpoint, it goes on where it went back to; all later lines are of the new branch."""
    folder = tmp_path / "run"
    flags = ["--save_steps=2", "--max_steps=9", "--save_total_limit=9"]
    succeed(folder, *flags)
    back = ["--learning_rate=1e-3", "--save_total_limit=1"]
    output = succeed(
        folder, *flags, *back, "--max_steps=5", f"--resume_from_checkpoint={folder}/checkpoints/step_00000004"
    )
    assert "goes back to step 4: its later checkpoints (step_00000006, step_00000008, step_00000009)" in output
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step_00000005"]
    succeed(folder, *flags, *back, "--resume_from_checkpoint=latest")
    assert [step for step, *_ in trajectory(folder)] == list(range(10))
    rates = [line["learning_rate"] for line in read_json_lines(folder / "metrics.jsonl")[1:]]
    assert min(rates[:4]) > 4e-3 and max(rates[4:]) <= 1e-3


def test_a_run_is_not_resumed_behind_its_last_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeed(folder, "--max_steps=3")
    before = trajectory(folder)
    assert "max_steps=2 is below step 3" in refusal(folder, "--resume_from_checkpoint=latest", "--max_steps=2")
    assert trajectory(folder) == before


def test_a_named_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    succeed(tmp_path / "run")
    answer = refusal(tmp_path / "run", "--resume_from_checkpoint=nowhere")
    assert "nowhere: there is no such folder" in answer and "'latest'" in answer


def test_a_folder_that_holds_a_run_is_not_overwritten(whole: Path) -> None:
    before = trajectory(whole)
    answers = {
        "--max_steps=8": "already holds this run, finished: train on with --resume_from_checkpoint latest",
        "--learning_rate=0.5": "with learning_rate=0.01 instead of 0.5: continue it with --resume_from_checkpoint",
        "--seed=5": "with seed=1337 instead of 5: replace it with --overwrite_output_dir",
        "--max_minutes=5": "with max_minutes=none instead of 5.0",
    }
    for flag, said in answers.items():
        answer = refusal(whole, flag)
        assert said in answer and "--overwrite_output_dir, or choose another --output_dir" in answer
    assert trajectory(whole) == before


@pytest.mark.parametrize("divided", [False, True])
def test_the_same_command_goes_on_with_an_unfinished_run(
    whole_with_dropout: Path, tmp_path: Path, divided: bool
) -> None:
    """Wherever the first one was stopped: here behind step 6, with lines of step 7 that no checkpoint holds."""
    folder = tmp_path / "run"
    shutil.copytree(whole_with_dropout, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step_00000008")
    if divided:  # as a step is after memory ran out
        record = (folder / "run.yaml").read_text()
        record = record.replace("per_device_train_batch_size: 8", "per_device_train_batch_size: 4")
        (folder / "run.yaml").write_text(
            record.replace("gradient_accumulation_steps: 1", "gradient_accumulation_steps: 2")
        )
    output = succeed(folder, "--dropout=0.1")
    assert "run holds this run, unfinished: resuming from step 6" in output
    assert_equal_runs(folder, whole_with_dropout)


def test_a_run_that_was_another_is_not_resumed(whole: Path) -> None:
    assert "seed=1337, which cannot continue with seed=5" in refusal(
        whole, "--resume_from_checkpoint=latest", "--seed=5"
    )


def test_where_nothing_was_saved_latest_starts_the_run(whole: Path, tmp_path: Path) -> None:
    output = succeed(tmp_path / "run", "--resume_from_checkpoint=latest")
    assert "run holds no checkpoint yet: the run starts from its first step" in output
    assert_equal_runs(tmp_path / "run", whole)


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    launched = Launched(tmp_path / "run", "--max_steps=100000")
    try:
        wait_for_step(tmp_path / "run", 1)
        assert "is being written to by another run" in refusal(tmp_path / "run", "--overwrite_output_dir")
    finally:
        launched.processes[0].kill()


def test_a_precision_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this device may have it")
    assert "fp16=true needs a CUDA GPU" in refusal(tmp_path / "run", "--fp16")


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = Launched(tmp_path / "run", processes=2, port=port)
        launched.processes[0].join(timeout=120)
        launched.processes[1].kill()
    assert launched.processes[0].exitcode == 2
    assert f"cannot connect at 127.0.0.1:{port}: is the port in use?" in launched.errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_when_a_process_dies_torchrun_ends_the_others(tmp_path: Path) -> None:
    launcher, workers = under_torchrun(tmp_path / "run", *ENDLESS)
    assert len(workers) == 2
    workers[1].kill()
    assert launcher.wait().returncode == 1
    assert not psutil.wait_procs(workers, timeout=120)[1]


@pytest.mark.slow
def test_a_step_too_large_for_the_memory_is_taken_in_smaller_micro_batches(tmp_path: Path) -> None:
    succeed(tmp_path / "expected", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=4")
    output = succeed(tmp_path / "run", "--rows_that_fit=3")
    assert "out of memory with micro-batches of 8 rows: continuing with 2 micro-batches of 4 rows" in output
    assert "out of memory with micro-batches of 4 rows: continuing with 4 micro-batches of 2 rows" in output
    assert_equal_runs(tmp_path / "run", tmp_path / "expected")
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (record["per_device_train_batch_size"], record["gradient_accumulation_steps"]) == (2, 4)


def test_a_micro_batch_of_an_odd_number_of_rows_is_divided_evenly(tmp_path: Path) -> None:
    assert "continuing with 3 micro-batches of 3 rows" in succeed(
        tmp_path / "run", "--per_device_train_batch_size=9", "--rows_that_fit=4"
    )


def test_several_processes_are_told_which_micro_batch_to_try(tmp_path: Path) -> None:
    flags = ["--per_device_train_batch_size=4", "--rows_that_fit=2"]
    done = Launched(tmp_path / "run", *flags, processes=2).wait()
    assert done.exit_codes == [2, 2]
    assert "try --per_device_train_batch_size 2 --gradient_accumulation_steps 2" in done.errors
