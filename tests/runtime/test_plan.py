"""Before the first step: what a run takes is said, what it leaves open is chosen, what cannot fit is refused."""

from dataclasses import replace

import pytest

from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.runtime.estimation import describe_estimation, parse_estimation
from fgpt_hf.runtime.hardware import GPUS, Machine, known_machine
from fgpt_hf.runtime.network import network_config
from fgpt_hf.runtime.plan import TrainingPlan, plan_training
from fgpt_hf.runtime.workload import Workload


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def plan_on(machine: Machine, run: BaseRun) -> TrainingPlan:
    return plan_training(Workload(run, network_config(run), machine))


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("gpu", ["l4", "h200"])
def test_an_open_micro_batch_is_chosen_and_the_step_stays(gpu: str, processes: int) -> None:
    run = replace(PRESETS["fgpt-712m"], auto_find_batch_size=True)
    machine = known_machine(gpu, processes)
    plan = plan_on(machine, run)
    assert plan.rows * plan.micro_batches * processes == 512
    assert not plan.fill_in(run).auto_find_batch_size
    need = Workload(run, network_config(run), machine).memory(plan.rows, plan.micro_batches)
    assert need.total < machine.memory_bytes


def test_numbers_that_were_given_stay_with_a_hint_that_they_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_on(known_machine("l4"), PRESETS["fgpt-712m"])
    assert plan.fill_in(PRESETS["fgpt-712m"]).to_yaml() == PRESETS["fgpt-712m"].to_yaml()
    assert "and only micro-batches of 4 rows fit: try --per_device_train_batch_size auto" in caplog.messages[-1]


@pytest.mark.parametrize("is_open", [False, True])
def test_what_cannot_fit_is_refused_with_what_would(is_open: bool) -> None:
    run = replace(PRESETS["fgpt-712m"], auto_find_batch_size=is_open)
    with pytest.raises(ValueError) as error:
        plan_on(known_machine("l4")._replace(name="a small GPU", memory_bytes=9 * 10**9), run)
    for part in ("preset fgpt-712m", "9 GB of a small GPU", "--fsdp on 16 such devices", "--preset fgpt-124m"):
        assert part in str(error.value)


def test_a_run_with_an_adapter_says_so_and_is_refused_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    run = replace(INSTRUCT_PRESETS["fgpt-712m"], use_peft=True, max_steps=10)
    config = network_config(PRESETS["fgpt-712m"])
    plan_training(Workload(run, config, known_machine("l4")))
    assert "11,949,120 further parameters are in adapters, and only these are trained" in caplog.messages[1]
    assert "optimizer 0.0956 GB" in caplog.messages[-2]
    with pytest.raises(ValueError, match="3 GB of l4. What would fit: a larger device"):
        plan_training(Workload(run, config, known_machine("l4")._replace(memory_bytes=3 * 10**9)))


def test_a_pair_is_two_sequences_of_the_greatest_length(caplog: pytest.LogCaptureFixture) -> None:
    run = replace(PREFERENCE_PRESETS["fgpt-712m"], max_steps=10, max_length=512, auto_find_batch_size=True)
    rows = replace(
        INSTRUCT_PRESETS["fgpt-712m"], optim="adamw", auto_find_batch_size=True, max_steps=10, max_length=512
    )
    config, machine = network_config(PRESETS["fgpt-712m"]), known_machine("a100-40gb")
    of_pairs, of_rows = (plan_training(Workload(each, config, machine)) for each in (run, rows))
    assert "10 steps x at most 65,536 tokens" in caplog.messages[0]
    assert of_pairs.rows * of_pairs.micro_batches == 64
    assert of_pairs.rows == of_rows.rows // 2


@pytest.mark.parametrize(("auto", "processes", "steps"), [(False, 2, 32), (True, 2, 63)])
def test_an_open_length_is_that_of_the_epochs(auto: bool, processes: int, steps: int) -> None:
    """250 rows of 4 per step and device, or 4 per step on all devices together."""
    run = replace(
        INSTRUCT_PRESETS["rasbt"], num_train_epochs=2.5, per_device_train_batch_size=4, auto_find_batch_size=auto
    )
    config = network_config(PRESETS["quickstart"])
    assert plan_training(Workload(run, config, known_machine("h100", processes)), epoch_rows=100).max_steps == steps
    decided = replace(run, max_steps=7)
    assert plan_training(Workload(decided, config, known_machine("h100", processes)), epoch_rows=100).max_steps == 7


def test_the_command_answers_for_every_known_gpu() -> None:
    answer = describe_estimation(parse_estimation(["--preset", "fgpt-712m"]))
    assert (
        "712,035,360 parameters; 27,000 steps x 524,288 tokens = 14,155,776,000 tokens (19.9 tokens per parameter)"
        in answer
    )
    for part in ("GFLOPs per token", "weights", "gradients", "optimizer", "activations", "loss", "this ", *GPUS):
        assert part in answer


def test_time_and_cost_follow_from_what_is_given() -> None:
    """10 steps of 2^19 tokens on an H100 at half of 989 TFLOP/s."""
    flags = ["--device=h100", "--max_steps=10", "--mfu=0.5", "--price_per_hour=3600"]
    seconds = 10 * 2**19 * 4_773_000_000 / (989e12 * 0.5)
    line = describe_estimation(parse_estimation(flags)).splitlines()[-1]
    cost = float(line.rpartition("costs ")[2].replace(",", ""))
    assert cost == pytest.approx(seconds, rel=1e-3)
    on_eight = describe_estimation(parse_estimation([*flags, "--num_processes=8"])).splitlines()[-1]
    assert float(on_eight.rpartition("costs ")[2].replace(",", "")) == pytest.approx(8 * cost, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--device=h1000"], "device='h1000' is not known: the devices are a100-40gb"),
        (["--preset=fgpt-1b"], "unknown preset 'fgpt-1b'"),
        (["--device=h100", "--mfu=40"], "mfu=40.0 must be above zero and at most 1"),
        (["--price_per_hour=2"], "price_per_hour needs --device"),
        (["--device=h100", "--price_per_hour=-2"], "price_per_hour=-2.0 must be above zero"),
        (["--num_processes=0"], "num_processes=0 must be above zero"),
        (["--per_device_train_batch_size=auto", "--num_processes=3"], "do not divide among 3 processes"),
        (["--devise=h100"], "did you mean --device?"),
        (["h100"], "unknown argument 'h100'"),
        (["--num_attention_heads=7"], "must divide evenly among num_attention_heads=7"),
    ],
)
def test_bad_input_is_answered_with_what_would_work(flags: list[str], answer: str) -> None:
    with pytest.raises(ValueError) as error:
        describe_estimation(parse_estimation(flags))
    assert answer in str(error.value)
