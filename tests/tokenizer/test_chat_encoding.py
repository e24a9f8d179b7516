"""Conversations under any chat template: what the assistant says is told, or the turn that prevents it is named."""

from typing import Any

import pytest

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.chat_encoding import EncodedConversation, encode_by_template, end_of_turn, render_chat
from fgpt_hf.tokenizer.fast_encoding import encode_conversations
from fgpt_hf.tokenizer.tokenizer import add_role_tokens
from tests.support.any_models import CHATML, any_tokenizer

CHAT = [
    {"role": "user", "content": "What is 3?"},
    {"role": "assistant", "content": "Three <|im_end|> and </s>."},
    {"role": "user", "content": "And <|im_start|>17?"},
    {"role": "assistant", "content": "An old number."},
]
STRIPS_EARLIER_REPLIES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[:2] }}{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(tokenizer: Any, chat: Any) -> EncodedConversation:
    (encoded,) = encode_by_template(tokenizer, [chat])
    assert isinstance(encoded, EncodedConversation), encoded
    return encoded


def learned(tokenizer: Any, encoded: EncodedConversation) -> str:
    return str(tokenizer.decode(encoded.ids[encoded.loss_mask], skip_special_tokens=False))


@pytest.mark.parametrize("name", ["qwen3", "llama", "nanochat"])
def test_replies_are_learned_with_the_token_that_ends_them_and_control_tokens_in_text_stay_text(name: str) -> None:
    tokenizer = any_tokenizer(name)
    encoded = encode(tokenizer, CHAT)
    assert learned(tokenizer, encoded) == "Three <|im_end|> and </s>.<|im_end|>An old number.<|im_end|>"
    ids = encoded.ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4
    assert tokenizer.convert_tokens_to_ids("</s>") not in ids
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_without_control_tokens_in_the_text_the_ids_are_transformers_own() -> None:
    tokenizer: Any = any_tokenizer("llama")
    chat = [{**message, "content": message["content"].replace("<", "(")} for message in CHAT]
    assert encode(tokenizer, chat).ids.tolist() == tokenizer.apply_chat_template(chat)["input_ids"]


def test_marks_and_renderings_agree() -> None:
    """The template's own marks are what its renderings show, where both can be had."""
    tokenizer = any_tokenizer("llama")
    marked = CHATML.replace(
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}",
    )
    expected = render_chat(tokenizer, CHAT)
    tokenizer.chat_template = marked
    try:
        assert render_chat(tokenizer, CHAT) == expected
    finally:
        tokenizer.chat_template = CHATML


def test_a_template_that_writes_earlier_replies_otherwise_is_refused_with_the_turn() -> None:
    tokenizer = any_tokenizer("llama")
    tokenizer.chat_template = STRIPS_EARLIER_REPLIES
    try:
        one_turn, two_turns = encode_by_template(tokenizer, [CHAT[:2], CHAT])
    finally:
        tokenizer.chat_template = CHATML
    assert isinstance(one_turn, EncodedConversation) and isinstance(two_turns, UserError)
    assert str(two_turns).startswith("message 2 shows that the chat template writes a message in another way")


def test_a_role_that_the_template_refuses_is_named() -> None:
    tokenizer = any_tokenizer("gpt2")
    had = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    try:
        (error,) = encode_by_template(tokenizer, [[{"role": "system", "content": "Be brief."}, *CHAT]])
    finally:
        tokenizer.chat_template = had
    assert str(error) == "not a conversation: System role not supported"


@pytest.mark.parametrize("name", ["gpt2", "smollm3"])
def test_the_projects_template_on_another_tokenizer_gives_the_ids_of_its_rendering(name: str) -> None:
    tokenizer: Any = type(any_tokenizer(name))(tokenizer_object=any_tokenizer(name).backend_tokenizer, eos_token="</s>")
    assert add_role_tokens(tokenizer) == ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    chat = [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "Three."}]
    (encoded,) = encode_conversations(tokenizer, [chat])
    assert isinstance(encoded, EncodedConversation)
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(chat)["input_ids"]
    assert learned(tokenizer, encoded) == "Three.<|end|>"
    (spelled,) = encode_conversations(tokenizer, [[*chat[:1], {"role": "assistant", "content": "</s><|end|>"}]])
    assert isinstance(spelled, EncodedConversation)
    assert tokenizer.eos_token_id not in spelled.ids and learned(tokenizer, spelled) == "</s>< |end|><|end|>"
