"""Which settings are compared, and what cannot be."""

import re

import pytest

from fgpt_hf.ablation.variants import ALL, DEFAULT, make_variants, parse_axis
from fgpt_hf.errors import UserError

AXES = [parse_axis(text) for text in ("optim=muon,adamw", "weight_decay=0.1,0,1", "adam_beta1=0.8,0.9")]


def test_each_value_is_compared_alone_and_the_last_ones_together() -> None:
    variants = make_variants(AXES)
    names = [variant.name for variant in variants]
    assert names == [DEFAULT, "optim=adamw", "weight_decay=0", "weight_decay=1", "adam_beta1=0.9", ALL]
    assert variants[2].settings == {"optim": "muon", "weight_decay": "0", "adam_beta1": "0.8"}
    assert variants[-1].settings == {"optim": "adamw", "weight_decay": "1", "adam_beta1": "0.9"}


def test_every_combination_has_a_name_of_its_own() -> None:
    variants = make_variants(AXES, every_combination=True)
    assert len({variant.name for variant in variants}) == len(variants) == 2 * 3 * 2
    assert variants[0].name == DEFAULT


def test_fields_that_change_together_are_one_axis() -> None:
    default, gated = make_variants([parse_axis("mlp=plain,gated+hidden_act=gelu,silu")])
    assert gated.name == "mlp=gated,hidden_act=silu" and gated.settings == {"mlp": "gated", "hidden_act": "silu"}
    assert default.settings == {"mlp": "plain", "hidden_act": "gelu"}


@pytest.mark.parametrize(
    "text",
    [
        "optim",
        "optim=",
        "optim=muon",
        "optim=muon,muon",
        "optim=muon,",
        "seed=1,2",
        "mlp=plain,gated+norm=rmsnorm",
        "+",
    ],
)
def test_an_axis_that_compares_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"^--vary {re.escape(text)}: "):
        parse_axis(text)


def test_a_field_that_is_varied_twice_is_refused() -> None:
    with pytest.raises(UserError, match="optim is given twice"):
        make_variants([AXES[0], AXES[0]])
