"""A softmax over a sample of the vocabulary estimates that over all of it, and reaches every token in time."""

import pytest
import torch

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.losses.linear_cross_entropy import summed_cross_entropy
from fgpt_hf.losses.sampled_softmax import sampled_cross_entropy


def problem(rows: int = 40, vocabulary: int = 500, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    states, embeddings = torch.randn(rows, width), torch.randn(vocabulary, width)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::7] = IGNORED
    return states.requires_grad_(), embeddings.requires_grad_(), labels


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_mean_over_many_samples_is_the_whole_softmax(softcap: float | None) -> None:
    states, embeddings, labels = problem()
    exact = summed_cross_entropy(states, embeddings, labels, softcap)
    expected = torch.autograd.grad(exact, (states, embeddings))
    losses, gradients = [], [torch.zeros_like(states), torch.zeros_like(embeddings)]
    for _ in range(300):
        loss = sampled_cross_entropy(states, embeddings, labels, 250, softcap)
        losses.append(loss.detach())
        for total, gradient in zip(gradients, torch.autograd.grad(loss, (states, embeddings)), strict=True):
            total += gradient / 300
    torch.testing.assert_close(torch.stack(losses).mean(), exact, rtol=0.02, atol=0)
    for found, gradient in zip(gradients, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("size", [500, 800, 3])
def test_a_sample_as_large_as_the_vocabulary_or_too_small_for_the_batch_is_the_whole_softmax(size: int) -> None:
    states, embeddings, labels = problem()
    assert torch.equal(
        sampled_cross_entropy(states, embeddings, labels, size), summed_cross_entropy(states, embeddings, labels)
    )


def test_only_the_sample_has_gradients_and_what_is_predicted_always_is_in_it() -> None:
    states, embeddings, labels = problem()
    sampled_cross_entropy(states, embeddings, labels, 100).backward()
    touched = embeddings.grad.abs().sum(dim=1) > 0
    assert touched.sum() == 100
    assert touched[labels[labels != IGNORED]].all()


def test_the_sample_follows_from_the_random_numbers() -> None:
    problem_ = problem()
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(sampled_cross_entropy(*problem_, 100).item())
    assert found[0] == found[1] != found[2]
