"""Before the first step: what a run takes is said, what it leaves open is chosen, what cannot fit is refused."""

from dataclasses import replace

import pytest

from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.runtime.estimate import memory, network
from fgpt_hf.runtime.hardware import GPUS, Machine, known_machine
from fgpt_hf.runtime.plan import choose_micro_batch, estimate_command


def fitted(run: BaseRun, machine: Machine) -> list[str]:
    said: list[str] = []
    choose_micro_batch(run, network(run), machine, said.append)
    return said


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("gpu", ["l4", "h200"])
def test_an_open_micro_batch_is_chosen_and_the_step_stays(gpu: str, processes: int) -> None:
    run = replace(PRESETS["fgpt-712m"], auto_find_batch_size=True)
    machine = known_machine(gpu, processes)
    fitted(run, machine)
    assert not run.auto_find_batch_size
    rows = run.per_device_train_batch_size
    assert rows * run.gradient_accumulation_steps * processes == 512
    need = memory(run, network(run), machine, rows, run.gradient_accumulation_steps)
    assert need.total < machine.memory_bytes


def test_numbers_that_were_given_stay_and_are_doubted_aloud() -> None:
    run = replace(PRESETS["fgpt-712m"])
    said = fitted(run, known_machine("l4"))
    assert run == PRESETS["fgpt-712m"]
    assert "where 4 rows would fit: --per_device_train_batch_size auto takes as many" in said[-1]


@pytest.mark.parametrize("is_open", [False, True])
def test_what_cannot_fit_is_refused_with_what_would(is_open: bool) -> None:
    run = replace(PRESETS["fgpt-712m"], auto_find_batch_size=is_open)
    with pytest.raises(ValueError) as error:
        fitted(run, known_machine("l4")._replace(name="a small GPU", memory_bytes=9 * 10**9))
    for part in ("preset fgpt-712m", "9 GB of a small GPU", "--fsdp on 16 such devices", "--preset fgpt-124m"):
        assert part in str(error.value)


def test_a_run_with_an_adapter_says_so_and_is_refused_in_one_line() -> None:
    run = replace(INSTRUCT_PRESETS["fgpt-712m"], use_peft=True, max_steps=10)
    config, said = network(PRESETS["fgpt-712m"]), []
    choose_micro_batch(run, config, known_machine("l4"), said.append)
    assert "11,949,120 parameters more are an adapter's, and they alone are trained" in said[1]
    assert "optimizer 0.0956 GB" in said[-2]
    with pytest.raises(ValueError, match="3 GB of l4. What would fit: a larger device"):
        choose_micro_batch(run, config, known_machine("l4")._replace(memory_bytes=3 * 10**9), said.append)


def test_a_pair_is_two_sequences_of_the_greatest_length() -> None:
    run = replace(PREFERENCE_PRESETS["fgpt-712m"], max_steps=10, max_length=512, auto_find_batch_size=True)
    rows = replace(
        INSTRUCT_PRESETS["fgpt-712m"], optim="adamw", auto_find_batch_size=True, max_steps=10, max_length=512
    )
    config, said = network(PRESETS["fgpt-712m"]), []
    for each in (run, rows):
        choose_micro_batch(each, config, known_machine("a100-40gb"), said.append)
    assert "10 steps of at most 65,536 tokens" in said[0]
    assert run.per_device_train_batch_size * run.gradient_accumulation_steps == 64
    assert run.per_device_train_batch_size == rows.per_device_train_batch_size // 2


def test_the_command_answers_for_every_known_gpu() -> None:
    answer = estimate_command(["--preset", "fgpt-712m"])
    assert "712,035,360 parameters; 27,000 steps of 524,288 tokens are 14,155,776,000" in answer
    for part in ("GFLOPs a token", "weights", "gradients", "optimizer", "activations", "loss", "this ", *GPUS):
        assert part in answer


def test_time_and_cost_follow_from_what_is_given() -> None:
    """10 steps of 2^19 tokens on an H100 at half of 989 TFLOP/s."""
    flags = ["--device=h100", "--max_steps=10", "--mfu=0.5", "--price_per_hour=3600"]
    seconds = 10 * 2**19 * 4_773_000_000 / (989e12 * 0.5)
    line = estimate_command(flags).splitlines()[-1]
    cost = float(line.rpartition("costs ")[2].replace(",", ""))
    assert cost == pytest.approx(seconds, rel=1e-3)
    on_eight = estimate_command([*flags, "--num_processes=8"]).splitlines()[-1]
    assert float(on_eight.rpartition("costs ")[2].replace(",", "")) == pytest.approx(8 * cost, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--device=h1000"], "device='h1000' is not known: the devices are a100-40gb"),
        (["--preset=fgpt-1b"], "unknown preset 'fgpt-1b'"),
        (["--device=h100", "--mfu=40"], "mfu=40.0 must be a share of the peak, such as 0.4"),
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
        estimate_command(flags)
    assert answer in str(error.value)
