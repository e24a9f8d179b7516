"""Generation with every kind of cache, within the context and no further."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StaticCache

from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from tests.support.tiny_network import (
    CONTEXT,
    PAD,
    VOCABULARY,
    gpt2_twin,
    packed,
    padded,
    random_ids,
    tiny_config,
    tiny_model,
)

# Generation


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_text_is_the_same_with_any_cache_and_without(options: dict) -> None:
    model = tiny_model()
    ids = random_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert expected.shape == (2, 36)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **options), expected)
    assert torch.equal(gpt2_twin(model).generate(ids, max_new_tokens=30, do_sample=False), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(options: dict) -> None:
    model = tiny_model()
    ids, mask, _ = padded("left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
    for row in range(3):
        alone = model.generate(ids[row, mask[row] == 1].unsqueeze(0), max_new_tokens=12, do_sample=False)
        assert torch.equal(together[row, -12:], alone[0, -12:])


def test_beam_search_and_prompt_lookup_run() -> None:
    model = tiny_model()
    ids = random_ids(1, 6)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), greedy)
    assert model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False).shape == (1, 18)


@pytest.mark.slow
def test_continuous_batching_generates_what_each_prompt_generates_alone() -> None:
    model = tiny_model()
    prompts = [random_ids(1, length)[0].tolist() for length in (7, 3, 12)]
    # Batching needs an end of text to wait for: -1 never comes.
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    answers = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


# The context


def test_a_sequence_past_the_context_is_a_value_error_naming_both_lengths() -> None:
    model = tiny_model()
    too_long = random_ids(1, CONTEXT + 1)
    message = f"{CONTEXT + 1} tokens is longer than the context of {CONTEXT}"
    for given in ({"input_ids": too_long}, {"inputs_embeds": model.get_input_embeddings()(too_long)}):
        with pytest.raises(ValueError, match=message):
            model(**given)
    with pytest.raises(ValueError, match=message):
        model(too_long, position_ids=packed(CONTEXT + 1))
    with pytest.raises(ValueError, match=message):
        model(too_long[:, :4], position_ids=torch.arange(CONTEXT - 3, CONTEXT + 1).unsqueeze(0))


def test_a_cache_past_the_context_is_a_value_error_naming_both_lengths() -> None:
    model = tiny_model()
    message = f"{CONTEXT + 1} tokens is longer than the context of {CONTEXT}"
    past = model(random_ids(1, CONTEXT)).past_key_values
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 1), past_key_values=past)
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 1), past_key_values=StaticCache(model.config, max_cache_len=CONTEXT + 1))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_fills_the_context_and_no_more(options: dict) -> None:
    model = tiny_model()
    ids = random_ids(1, 40)
    assert model.generate(ids, max_length=CONTEXT + 1, do_sample=False, **options).shape == (1, CONTEXT + 1)
    with pytest.raises(ValueError, match=f"longer than the context of {CONTEXT}"):
        model.generate(ids, max_length=CONTEXT + 2, do_sample=False, **options)


def test_the_context_is_guarded_without_reading_from_the_device() -> None:
    with torch.device("meta"):  # where any value read is an error
        model = FGPTForCausalLM(tiny_config()).eval()
        ids = torch.zeros(1, 4, dtype=torch.long)
        past = StaticCache(model.config, max_cache_len=CONTEXT)
        assert model(ids, past_key_values=past, position_ids=ids).logits.shape == (1, 4, VOCABULARY)
        with pytest.raises(ValueError, match="longer than the context"):
            model(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


@pytest.mark.parametrize("given", [{}, {"input_ids": random_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 48)}])
def test_exactly_one_kind_of_input_must_be_given(given: dict) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model()(**given)
