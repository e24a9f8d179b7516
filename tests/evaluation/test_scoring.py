"""Scores: those of one row at a time, whatever the model, the batches and the order."""

import random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from tests.support.tiny import random_model
from tests.support.tiny_network import EVERY_NETWORK

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "llama": LlamaConfig(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA),
    "gpt-neox": GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "opt, its own offset of positions": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32),
    "bloom, positions as biases": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2),
    "gemma2, capped logits and a window": Gemma2Config(**LLAMA, sliding_window=5, final_logit_softcapping=2.0),
    "cohere2, scaled logits and a window": Cohere2Config(**LLAMA, sliding_window=5, logit_scale=0.2),
    "mamba, no attention": MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2),
}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def groups(count: int = 12, vocabulary: int = 96) -> list[list[Row]]:
    """Contexts of many lengths, each with two to four endings."""
    source = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, vocabulary) for _ in range(length))

    found = []
    for _ in range(count):
        context = ids(source.randrange(1, 30))
        endings = [ids(source.randrange(1, 9)) for _ in range(source.randrange(2, 5))]
        found.append([Row((*context, *ending), len(ending)) for ending in endings])
    return found


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def one_by_one(model: PreTrainedModel, row: Row) -> tuple[float, bool]:
    ids = torch.tensor([row.ids])
    predictions = model(ids).logits[0, -row.scored - 1 : -1].float().log_softmax(dim=1)
    targets = ids[0, -row.scored :]
    return float(predictions.gather(1, targets[:, None]).sum()), bool((predictions.argmax(dim=1) == targets).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_models_own_logits_row_by_row(accelerator: Accelerator, name: str) -> None:
    model = family(name)
    for group, scores in zip(groups(), Scorer(accelerator, model).score(groups()), strict=True):
        for row, score in zip(group, scores, strict=True):
            likelihood, likeliest = one_by_one(model, row)
            assert score.log_likelihood == pytest.approx(likelihood, abs=2e-4)
            assert score.likeliest == likeliest


def test_the_greedy_ending_is_the_likeliest(accelerator: Accelerator) -> None:
    model = random_model(vocab_size=96)
    with torch.no_grad():
        written = [5, 6, 7]
        for _ in range(4):
            written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
    wrong = [*written[:-1], (written[-1] + 1) % 96]
    (scores,) = Scorer(accelerator, model).score([[Row(tuple(written), 4), Row(tuple(wrong), 4)]])
    assert [score.likeliest for score in scores] == [True, False]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt-neox"])
def test_common_families_share_their_contexts(accelerator: Accelerator, name: str) -> None:
    scorer = Scorer(accelerator, family(name))
    assert scorer.reads_trees and scorer.has_plain_head


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_does_not_cost_the_sharing(accelerator: Accelerator, attention: str) -> None:
    """Neither as the weights' type nor as training has it, around float32 weights."""
    model = random_model(vocab_size=96)
    model.set_attn_implementation(attention)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scorer = Scorer(accelerator, model)
        assert scorer.reads_trees and scorer.has_plain_head
    with torch.no_grad():
        scorer = Scorer(accelerator, model.bfloat16())
        assert scorer.reads_trees and scorer.has_plain_head


@pytest.mark.parametrize("network", EVERY_NETWORK)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_this_projects_network_shares_its_contexts(accelerator: Accelerator, attention: str, network: str) -> None:
    model = random_model(vocab_size=96, **EVERY_NETWORK[network])
    expected = Scorer(accelerator, model).score(groups())
    model.set_attn_implementation(attention)
    scorer = Scorer(accelerator, model)
    for one, other in zip(sum(scorer.score(groups()), []), sum(expected, []), strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=2e-4)
    assert scorer.reads_trees and scorer.has_plain_head


def test_the_order_of_the_examples_changes_nothing_at_all(accelerator: Accelerator) -> None:
    model, examples = random_model(vocab_size=96), groups()
    order = random.Random(1).sample(range(len(examples)), len(examples))
    scores = Scorer(accelerator, model).score(examples)
    assert Scorer(accelerator, model).score([examples[number] for number in order]) == [
        scores[number] for number in order
    ]


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000])
def test_the_budget_of_a_batch_changes_only_rounding(accelerator: Accelerator, tokens_per_batch: int) -> None:
    model = random_model(vocab_size=96)
    expected = Scorer(accelerator, model).score(groups())
    scores = Scorer(accelerator, model, tokens_per_batch).score(groups())
    for one, other in zip(sum(scores, []), sum(expected, []), strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=2e-4)


def test_bfloat16_weights_are_scored_in_a_float32_softmax(accelerator: Accelerator) -> None:
    model = random_model(vocab_size=96)
    expected = Scorer(accelerator, model).score(groups())
    scores = Scorer(accelerator, model.bfloat16()).score(groups())
    errors = [
        abs(one.log_likelihood - other.log_likelihood)
        for one, other in zip(sum(scores, []), sum(expected, []), strict=True)
    ]
    assert 0 < max(errors) < 0.5


def test_the_models_mode_is_as_it_was(accelerator: Accelerator) -> None:
    model = random_model(vocab_size=96, residual_dropout=0.5).train()
    assert Scorer(accelerator, model).score(groups(2)) == Scorer(accelerator, model).score(groups(2))
    assert model.training


def test_scores_that_are_no_numbers_are_refused(accelerator: Accelerator) -> None:
    model = random_model(vocab_size=96)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"poems: the log-likelihoods of example 1 are \[nan, .*broken"):
        Scorer(accelerator, model).score(groups(2), "poems")
