"""The best rate counts, seeds give the spread, and what never reaches the default says so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgpt_hf.ablation.table import draw_losses, markdown_table, summarize, tokens_share, with_spread
from fgpt_hf.ablation.trials import TrialResult


def result(
    variant: str, rate: str, seed: int, losses: list[float], speed: float = 100.0, bytes_per_token: float = 1.0
) -> TrialResult:
    curve = [(100 * index, loss) for index, loss in enumerate(losses)]
    bits = [loss / bytes_per_token for loss in losses]
    return TrialResult(f"{variant}{rate}{seed}", variant, rate, seed, curve, bits, speed, 2**21, 10)


RESULTS = [
    result("default", "1", 1, [9.0, 6.0, 5.0]),
    result("default", "2", 1, [9.0, 5.0, 4.0]),
    result("better", "1", 1, [9.0, 4.0, 3.0], speed=50),
    result("better", "2", 1, [9.0, float("nan"), float("nan")]),
    result("worse", "1", 1, [9.0, 8.0, 7.0]),
    result("worse", "2", 1, [9.0, 8.5, 7.5]),
    result("default", "2", 2, [9.0, 5.0, 4.2]),
    result("better", "1", 2, [9.0, 4.0, 3.2], speed=50),
    result("worse", "1", 2, [9.0, 8.0, 7.2]),
]


def test_each_variant_is_judged_at_its_best_rate_with_the_spread_over_seeds() -> None:
    default, better, worse = summarize(RESULTS)
    assert [each.results[0].learning_rate for each in (default, better, worse)] == ["2", "1", "1"]
    assert default.loss == pytest.approx(4.1) and with_spread([4.0, 4.2]) == "4.100 ± 0.141"
    assert default.tokens_share == pytest.approx(1.0) and better.speed == pytest.approx(0.5)
    assert better.tokens_share == pytest.approx((9 - 4.1) / (9 - 4) / 2)
    assert worse.tokens_share is None


def test_variants_with_other_tokenizers_are_compared_by_the_bytes_that_a_token_stands_for() -> None:
    small = [result("tokenizer=small", "1", 1, [8.0, 3.5, 3.0], bytes_per_token=0.5)]
    _, other = summarize([result("default", "1", 1, [9.0, 6.0, 5.0]), *small])
    assert other.loss == 3.0 and other.bits == 6.0, "fewer nats, but more bits for each byte"
    assert other.tokens_share is None


def test_a_target_between_two_measurements_is_interpolated() -> None:
    assert tokens_share([(0, 8.0), (100, 6.0), (200, 4.0)], 7.0) == pytest.approx(0.25)
    assert tokens_share([(0, 8.0), (100, 9.0), (200, 4.0)], 4.0) == 1.0


def test_the_table_has_a_line_for_each_variant_and_the_figure_is_a_picture(tmp_path: Path) -> None:
    table = markdown_table(summarize(RESULTS)).splitlines()
    assert table[3] == "| better | 1 | 3.100 ± 0.141 | 3.100 ± 0.141 | 0.49 | 0.50 | 2 | 10 |"
    assert len({line.count("|") for line in table}) == 1 and "never" in table[4]
    draw_losses(summarize(RESULTS), tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 500


def test_names_of_many_settings_leave_the_curves_their_width(tmp_path: Path) -> None:
    long = ",".join(f"an_option_of_the_network_{number}=value" for number in range(8))
    draw_losses(
        summarize([replace(result, variant=f"{result.variant},{long}") for result in RESULTS]), tmp_path / "a.png"
    )
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    first_curve = np.abs(picture - (31, 119, 180)).sum(2) < 30  # matplotlib's first color
    columns = np.flatnonzero(first_curve.any(0))
    assert columns[-1] - columns[0] > picture.shape[1] / 2
