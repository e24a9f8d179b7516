"""How long a run takes: the arithmetic of steps, checks and the end."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.errors import UserError
from fgpt_hf.runtime.duration import MIN_STEPS, CheckTime, Steps, likely_seconds, require_steps
from fgpt_hf.runtime.estimation import describe_estimation, parse_estimation
from fgpt_hf.runtime.hardware import container_memory_bytes, known_machine, product_flops, this_machine
from fgpt_hf.runtime.network import network_config
from fgpt_hf.runtime.plan import plan_training
from fgpt_hf.runtime.workload import Workload


@pytest.mark.parametrize("seconds", [3, 10, 59, 1000, 12345])
@pytest.mark.parametrize("every", [1, 7, 100, 10**6])
def test_one_step_more_would_be_too_long(seconds: int, every: int) -> None:
    steps = Steps(0.3, [CheckTime(1.5, every)], closing_seconds=1.0)
    fitting = steps.within(seconds)
    assert steps.seconds_of(fitting + 1) > seconds
    assert fitting == 0 or steps.seconds_of(fitting) <= seconds


def test_the_time_that_is_named_is_long_enough() -> None:
    steps = Steps(30.0, [CheckTime(12.0, 5)], 40.0)
    with pytest.raises(UserError, match="each takes 30 s here, 20 s after the start; try --max_minutes 8"):
        require_steps(5, steps, spent_seconds=20)
    require_steps(8, steps, spent_seconds=20)
    assert steps.within(8 * 60 - 20) >= MIN_STEPS


def test_a_hopeless_time_is_refused_before_data_are_read() -> None:
    run = replace(PRESETS["fgpt-712m"], max_minutes=1.0)
    with pytest.raises(UserError, match="max_minutes=1 is too short for 10 steps: each takes .* a smaller --preset"):
        plan_training(Workload(run, network_config(run), known_machine("l4")))


def test_the_time_on_a_known_device_is_that_of_its_operations() -> None:
    run = PRESETS["fgpt-124m"]
    seconds = likely_seconds(Workload(run, network_config(run), known_machine("h100", 2)), tokens=10**9, mfu=0.5)
    assert seconds == pytest.approx(10**9 * 854_438_400 / (989e12 * 2 * 0.5), rel=0.02)


def test_the_start_says_how_long_the_run_takes_here_and_what_this_process_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    run, machine = PRESETS["quickstart"], this_machine(torch.device("cpu"))
    plan_training(Workload(run, network_config(run), machine))
    assert "of steps at 40% of the rate of its products, measured now" in caplog.text
    assert re.search(r"this process itself \d\.\d+ GB", caplog.text)
    assert product_flops(torch.device("cpu"), 256, 64, torch.float32) > 1e8


def test_an_estimate_turns_a_time_into_steps() -> None:
    estimation = parse_estimation(["--preset=fgpt-124m", "--device=h100", "--max_minutes=2h"])
    first = describe_estimation(estimation).splitlines()[0]
    steps = int(first.split("parameters; ")[1].split(" steps")[0].replace(",", ""))
    run = PRESETS["fgpt-124m"]
    seconds = likely_seconds(Workload(run, network_config(run), known_machine("h100")), tokens=steps * 2**19)
    assert seconds == pytest.approx(7200, rel=1e-3)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    assert container_memory_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_memory_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_memory_bytes(tmp_path) == 1000
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    assert container_memory_bytes(tmp_path) == 700
