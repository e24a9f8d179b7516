"""Which settings are compared, and what cannot be."""

import pytest

from fgpt_hf.ablation.variants import ALL, DEFAULT, Axis, make_variants, parse_axis
from fgpt_hf.errors import UserError

AXES = [Axis("optim", ("muon", "adamw")), Axis("weight_decay", ("0.1", "0", "1")), Axis("seed_of_rows", ("1", "2"))]


def test_each_value_is_compared_alone_and_the_last_ones_together() -> None:
    variants = make_variants(AXES)
    names = [variant.name for variant in variants]
    assert names == [DEFAULT, "optim=adamw", "weight_decay=0", "weight_decay=1", "seed_of_rows=2", ALL]
    assert variants[2].settings == {"optim": "muon", "weight_decay": "0", "seed_of_rows": "1"}
    assert variants[-1].settings == {"optim": "adamw", "weight_decay": "1", "seed_of_rows": "2"}


def test_every_combination_has_a_name_of_its_own() -> None:
    variants = make_variants(AXES, every_combination=True)
    assert len({variant.name for variant in variants}) == len(variants) == 2 * 3 * 2
    assert variants[0].name == DEFAULT


@pytest.mark.parametrize("text", ["optim", "optim=", "optim=muon", "optim=muon,muon", "optim=muon,", "seed=1,2"])
def test_an_axis_that_compares_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"^--vary {text}: "):
        parse_axis(text)


def test_a_field_that_is_varied_twice_is_refused() -> None:
    with pytest.raises(UserError, match="optim is there twice"):
        make_variants([AXES[0], AXES[0]])
