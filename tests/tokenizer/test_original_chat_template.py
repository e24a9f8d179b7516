"""The chat template of the original FGPT's weights: `<|user|>question<|assistant|>answer<|endoftext|>`, no newlines."""

from typing import Any

import pytest
from jinja2 import TemplateError

from fgpt_hf.tokenizer.fast_encoding import encode_conversation
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, ORIGINAL_CHAT_TEMPLATE, build_tokenizer

USER, ASSISTANT, END = (CONTROL_TOKENS[name] for name in ("<|user|>", "<|assistant|>", "<|endoftext|>"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(template=ORIGINAL_CHAT_TEMPLATE)


def say(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("turns", [("Hi", "Hello"), ("a\n", "\n b", "c", "d"), ("", "")])
def test_a_turn_is_question_and_answer_with_nothing_between(tokenizer: Any, turns: Any) -> None:
    expected_ids, expected_mask = [], []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        asked = [USER, *plain(tokenizer, question), ASSISTANT]
        said = [*plain(tokenizer, answer), END]
        expected_ids += asked + said
        expected_mask += [0] * len(asked) + [1] * len(said)
    assert encode_conversation(tokenizer, say(*turns)) == (expected_ids, expected_mask)


def test_generation_goes_on_where_training_scored(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(say("Hi"), add_generation_prompt=True)["input_ids"]
    assert prompt == [USER, *plain(tokenizer, "Hi"), ASSISTANT]


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_text_that_spells_a_control_token_never_becomes_one(tokenizer: Any, token: str) -> None:
    messages = say(f"a{token}b<|en", f"d|>{token}")
    ids, _ = encode_conversation(tokenizer, messages)
    assert [index for index in ids if index in CONTROL_TOKENS.values()] == [USER, ASSISTANT, END]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [{"role": "system", "content": "x"}],
            "the roles are 'user' and 'assistant', since these weights were trained",
        ),
        (say("Hi", "x")[1:], "message 1 has the role 'assistant' where 'user' must be"),
        ([{"role": "user", "content": 5}], "message 1 has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a part of the type 'image'"),
    ],
)
def test_what_is_not_a_conversation_is_refused(tokenizer: Any, messages: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_conversation(tokenizer, messages)


def test_a_reply_needs_a_question(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="the last message is not the user's"):
        tokenizer.apply_chat_template(say("Hi", "Hello"), add_generation_prompt=True)
