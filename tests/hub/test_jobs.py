"""What a run takes on the machines of the Hub's Jobs, by the prices that the Hub answers."""

import re
import shlex
from typing import Any

import pytest

from fgpt_hf.cli.main import run as run_fgpt
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from fgpt_hf.hub.jobs import Flavor, gpu_flavors
from tests.support.loopback_hub import LoopbackHub


def machine(name: str, model: str | None, count: int, gigabytes: int, dollars_per_minute: float) -> dict[str, Any]:
    """A machine as the Hub describes it."""
    gpu = {"type": "gpu", "model": model, "quantity": str(count), "vram": f"{count * gigabytes} GB"}
    size = {"cpu": "8 vCPU", "ram": "64 GB", "ephemeralStorage": "100 GB"}
    cost = {"unitCostMicroUSD": round(1e6 * dollars_per_minute), "unitCostUSD": dollars_per_minute}
    accelerator = {**gpu, "manufacturer": "Nvidia"} if model else None
    return {"name": name, "prettyName": name, **size, "accelerator": accelerator, **cost, "unitLabel": "minute"}


MACHINES = [
    machine("cpu-basic", None, 0, 0, 0.000167),
    machine("t4-small", "T4", 1, 16, 0.4 / 60),
    machine("l4x1", "L4", 1, 24, 0.8 / 60),
    machine("a100-large", "A100", 1, 80, 2.5 / 60),
    machine("h200", "H200", 1, 141, 5 / 60),
    machine("h200x8", "H200", 8, 141, 40 / 60),
]


def test_prices_are_dollars_an_hour_of_machines_with_a_gpu(server: LoopbackHub) -> None:
    server.endpoints.hardware = MACHINES
    flavors = {flavor.name: flavor for flavor in gpu_flavors()}
    assert flavors.keys() == {"t4-small", "l4x1", "a100-large", "h200", "h200x8"}
    assert flavors["a100-large"].device == "a100-80gb" and flavors["t4-small"].device is None
    assert flavors["h200x8"] == Flavor("h200x8", "H200", "h200", 8, pytest.approx(40))


def test_each_machine_has_a_time_a_cost_and_a_timeout(server: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    """fgpt-124m's 2.15e18 FLOPs at 40 % of 989 TFLOP/s: 1.5 hours on one H200, an eighth of that on eight."""
    server.endpoints.hardware = MACHINES
    run_fgpt(["estimate", "--jobs", "--preset", "fgpt-124m"])
    table = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert lines["h200"][1:] == ["256", "rows", "2.52B", "1.5", "hours", "5.00", "8.81", "3h"]
    assert lines["h200x8"][1:] == ["64", "rows", "2.52B", "11", "minutes", "40.00", "17.56", "1h"]
    assert "t4-small        has T4, which the table of GPUs lacks" in table
    assert "cpu-basic" not in table
    costs = [cost(lines[line.split()[0]]) for line in table.splitlines()[1:5]]
    assert costs == sorted(costs)
    assert "cheapest: " in table and "fastest: 11 minutes, $17.56" in table
    assert "hf jobs uv run --flavor h200x8 --timeout 1h --secrets HF_TOKEN recipes/hf_job.py --preset fgpt" in table


def test_the_commands_repeat_all_options_of_the_run(server: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    server.endpoints.hardware = MACHINES
    given = ["--preset=fgpt-124m", "--max_minutes=2h", "--learning_rate=1.234567e-4", "--dataset_name=a/b:7, c/d"]
    given += [
        "--dataset_revision=v1.0",
        "--eval_tasks=none",
        "--bf16=true",
        "--push_to_hub",
        "--hub_model_id=tester/tiny",
        "--gradient_accumulation_steps=8",
    ]
    run_fgpt(["estimate", "--jobs", *given])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "hf_job.py" in line]
    assert len(commands) == 2
    for command in commands:
        flags = command[command.index("recipes/hf_job.py") + 1 :]
        assert parse_run(BaseRun, PRESETS, ["--push_to_hub", *flags]) == parse_run(BaseRun, PRESETS, given)


def cost(line: list[str]) -> float:
    return float(line[-2].replace(",", ""))


def test_with_a_time_the_machines_differ_in_tokens(server: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    server.endpoints.hardware = MACHINES
    run_fgpt(["estimate", "--jobs", "--preset", "fgpt-124m", "--max_minutes", "60"])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["h200"][4:6] == ["60", "minutes"] and float(lines["h200x8"][3][:-1]) > 7 * float(lines["h200"][3][:-1])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([{"name": "h200"}], "the prices of the Hub's Jobs cannot be read: the answer is not what this version"),
        ({"error": "no"}, "the prices of the Hub's Jobs cannot be read"),
        ([machine("h200", "H200", 1, 141, -1)], "h200 has 1 accelerators for -60.0 dollars an hour"),
        ([machine("h200", "H200", 1, 141, 1) | {"unitLabel": "token"}], r"cannot be read: .*KeyError: 'token'"),
        ([machine("h200", "H200", 1, 141, 1) | {"unitCostUSD": None}], "cannot be read"),
        ([machine("t4-small", "T4", 1, 16, 1)], "preset fgpt-124m fits none of the 1 machines of the Hub's Jobs"),
        ([], "preset fgpt-124m fits none of the 0 machines of the Hub's Jobs"),
    ],
)
def test_prices_that_cannot_be_read_are_one_line(server: LoopbackHub, answer: Any, message: str) -> None:
    server.endpoints.hardware = answer
    with pytest.raises(UserError, match=message):
        run_fgpt(["estimate", "--jobs", "--preset=fgpt-124m"])


def test_a_hub_that_does_not_answer_is_one_line(server: LoopbackHub) -> None:
    server.fail("GET", "/api/jobs/hardware", times=9, status=503)
    with pytest.raises(UserError, match=r"the prices of the Hub's Jobs: the Hub answered 503 .*; try again later"):
        run_fgpt(["estimate", "--jobs", "--preset=fgpt-124m"])
    assert server.count("GET", "/api/jobs/hardware") > 1


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--device=h100", "leave out --device and --num_processes"),
        ("--num_processes=2", "leave out --device and --num_processes"),
        ("--price_per_hour=3", "jobs has the prices from the Hub: leave out --price_per_hour"),
    ],
)
def test_devices_and_prices_of_ones_own_are_refused_beside_the_jobs(flag: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        run_fgpt(["estimate", "--jobs", flag])
