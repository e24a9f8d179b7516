"""Every schedule has its shape."""

import pytest

from fgpt_hf.config.schedules import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_warms_up_to_its_peak_and_never_exceeds_it(kind: str) -> None:
    factors = [learning_rate_factor(kind, step, 100, 10, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_the_schedules_end_where_they_say() -> None:
    last = {kind: learning_rate_factor(kind, 100, 100, 10, 0.1) for kind in SCHEDULES}
    assert last == pytest.approx({"cosine": 0.1, "linear": 0.0, "warmup_stable_decay": 0.1, "constant": 1.0})
    assert learning_rate_factor("cosine", 55, 100, 10, 0.1) == pytest.approx(0.55)
    assert learning_rate_factor("warmup_stable_decay", 81, 100, 10, 0.1) == 1.0


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_rate_can_stay_at_its_peak_and_follow_any_schedule_at_the_end(kind: str) -> None:
    factors = [learning_rate_factor(kind, step, 110, 10, 0.1, decay_ratio=0.5) for step in range(110)]
    assert set(factors[10:61]) == {1.0}
    assert factors[60:] == pytest.approx([learning_rate_factor(kind, step, 50, 0, 0.1) for step in range(50)])


def test_a_warm_up_as_long_as_the_run_is_a_warm_up() -> None:
    assert [learning_rate_factor("cosine", step, 4, 8) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
