"""The chat template: Phi-3's format, the assistant's mask, and text that never becomes a control token."""

import random
from itertools import groupby
from operator import itemgetter
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fgpt_hf.tokenizer.fast_encoding import encode_conversation
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TURN_ID
from tests.support.messages import ROLES, parts, say

CONTROL_IDS = set(CONTROL_TOKENS.values())


# Conversations


def written(messages: list[dict]) -> str:
    """Phi-3's format, naively: what the template writes for harmless text."""
    return "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)


def control_ids(ids: list[int]) -> list[int]:
    return [index for index in ids if index in CONTROL_IDS]


CONVERSATIONS = [
    say("Hi", "Hello"),
    say("Hi", "Hello", system="Be brief."),
    say("Hi", "Hello", "And?", "Bye.", "  code:\n\tx\n", "trailing space \n"),
    say("", ""),
    say("\n\n", "👩‍👩‍👧‍👦 é", "Wo?", "日本語", system=""),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_is_written_in_phi3s_format(tokenizer: Any, messages: Any) -> None:
    ids, _ = encode_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False) == written(messages)
    assert ids == tokenizer(written(messages))["input_ids"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_mask_holds_the_replies_and_their_ends(tokenizer: Any, messages: Any) -> None:
    ids, mask = encode_conversation(tokenizer, messages)
    assert len(ids) == len(mask)
    spans = [(said, [index for _, index in span]) for said, span in groupby(zip(mask, ids, strict=True), itemgetter(0))]
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(span) for said, span in spans if said] == [f"{reply}<|end|>" for reply in replies]
    assert all(span[-2:] == [CONTROL_TOKENS["<|assistant|>"], 198] for said, span in spans[:-1] if not said)
    assert spans[-1] == (0, [198])


@pytest.mark.parametrize("reply", ["x", "\nx", "\n\nx", "\n", " ", "\u00a0\u00a0x", "\u2028\n x", "\x85\x1cx", "\t"])
def test_training_sees_the_prompt_that_generation_will_see(tokenizer: Any, reply: Any) -> None:
    """The newline of the header never merges with white space in front of a reply, which the template drops."""
    prompt = tokenizer.apply_chat_template(say("Hi"), add_generation_prompt=True)["input_ids"]
    ids, mask = encode_conversation(tokenizer, say("Hi", reply))
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt) - 1) + [0]
    assert tokenizer.decode(ids[len(prompt) :]).replace("< |", "<|") == reply.lstrip() + "<|end|>\n"


def test_the_generation_prompt_asks_for_a_reply(tokenizer: Any) -> None:
    messages = say("Hi", "Hello", "And?", system="Be brief.")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == written(messages) + "<|assistant|>\n"


def test_parts_of_text_are_joined(tokenizer: Any) -> None:
    messages = say(parts("Hi ", "there"), parts("Hello"), system=parts("Be", " brief."))
    assert encode_conversation(tokenizer, messages) == encode_conversation(
        tokenizer, say("Hi there", "Hello", system="Be brief.")
    )


def test_a_lone_surrogate_in_a_conversation_is_replaced(tokenizer: Any) -> None:
    assert encode_conversation(tokenizer, say("a\ud83d", parts("\ude00b"))) == encode_conversation(
        tokenizer, say("a\ufffd", "\ufffdb")
    )


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (say("Hi")[:0], "at least one message"),
        ([{"role": "tool", "content": "x"}], "message 1 has the role 'tool'; the roles are 'system', 'user' and"),
        ([{"content": "x"}], "message 1 has the role ''; the roles are"),
        (say("Hi", "x")[1:], "message 1 has the role 'assistant' where 'user' must be; a conversation is"),
        (say("Hi") + say("Hi"), "message 2 has the role 'user' where 'assistant' must be"),
        (say("Hi", "x") + say(system="late"), "message 3 has the role 'system' where 'user' must be"),
        (say(system="one") + say(system="two"), "message 2 has the role 'system' where 'user' must be"),
        (say("Hi", "x", "y", "z") + say("Hi", "x")[1:], "message 5 has the role 'assistant' where 'user' must be"),
        ([{"role": "user"}], "message 1 has no text; its 'content' must be a string, or a list of parts"),
        (say(None), "message 1 has no text"),
        (say(5), "message 1 has no text"),
        (say({"type": "text", "text": "x"}), "message 1 has no text"),
        (say("Hi", []), "message 2 has no text"),
        (say("Hi", [*parts("x"), {"type": "image", "url": "x"}]), "message 2 has a part of the type 'image'; "),
        (say([{"type": "text"}]), "message 1 has a part of the type 'text'; only text"),
        (say(["x"]), "message 1 has a part of the type ''; only text"),
    ],
)
def test_what_is_not_a_conversation_is_refused(tokenizer: Any, messages: Any, problem: Any) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_conversation(tokenizer, messages)


@pytest.mark.parametrize("messages", [say("Hi", "Hello"), say(system="Be brief.")])
def test_a_reply_needs_a_question(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(TemplateError, match="the last message is not the user's; end with a user message, or pass"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("messages", [*CONVERSATIONS, say(parts("a<|en", "d|>"), "<|pad|>", system="<|user|>")])
def test_an_engine_without_generation_blocks_writes_the_same(tokenizer: Any, messages: Any, trim: Any) -> None:
    """Servers with another Jinja drop the two tags, spelled exactly so, and may not trim blocks."""
    template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    engine = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim).from_string(template)
    assert engine.render(messages=messages) == tokenizer.apply_chat_template(messages, tokenize=False)


# Text that spells control tokens


TRICKS = [
    "{t}",
    "a{t}b{t}{t}",
    " {t}\n",
    "<{t}>",
    "<{t}|end|>",
    "<|e{t}nd|>",
    "{t}" + "<|",
    "<|end" + "{t}",
    "|>{t}<|end|",
    "{t} CONTINUE_FINAL_MESSAGE_TAG {t}",
    "\U000f0000{t}\U000f0001 <|\U000f0000end|>",
]


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("role", range(3))
@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_typed_control_tokens_stay_text(tokenizer: Any, token: Any, role: Any, sanitize: Any) -> None:
    for trick in TRICKS:
        text = trick.format(t=token)
        contents = ["x", "x", "x"]
        contents[role] = text
        messages = say(*contents[1:], system=contents[0])
        ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=sanitize)["input_ids"]
        assert control_ids(ids) == [50259, 50260, 50257, 50260, 50258, 50260], text
        contents[role] = text.lstrip() if ROLES[role] == "assistant" else text
        if not sanitize:  # sanitising drops its own markers from the text
            unescaped = tokenizer.decode(ids).replace("< |", "<|")
            assert unescaped == written(say(*contents[1:], system=contents[0])), text


def test_only_whole_control_tokens_are_altered(tokenizer: Any) -> None:
    """The least that is needed: operators and near misses keep their spelling."""
    text = "f <| x |> g, a <|> b, <|END|>, <| end |>, <end>, |end|, <|us"
    assert tokenizer.apply_chat_template(say(text), tokenize=False) == written(say(text))
    assert tokenizer.apply_chat_template(say("a<|end|>"), tokenize=False) == written(say("a< |end|>"))


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_no_joint_completes_a_control_token(tokenizer: Any, token: Any) -> None:
    for cut in range(1, len(token)):
        head, tail = token[:cut], token[cut:]
        for first, second in [(parts(head, tail), parts("x" + head, tail, "y")), (head, tail + head), (tail, head)]:
            ids, _ = encode_conversation(tokenizer, say(first, second, system=tail + head))
            assert control_ids(ids) == [50259, 50260, 50257, 50260, 50258, 50260]


def test_random_text_never_makes_a_control_token(tokenizer: Any) -> None:
    source = random.Random(1)
    pieces = [*CONTROL_TOKENS, *"<|>\n ", "<|", "|>", "end", "user", "pad", "\ud83d", "\U000f0000", "\u200b", "é"]
    for _ in range(300):
        texts = ["".join(source.choices(pieces, k=source.randrange(12))) for _ in range(6)]
        messages = say(texts[0], parts(*texts[1:3]), parts(*texts[3:5]), system=texts[5])
        ids, mask = encode_conversation(tokenizer, messages)
        assert control_ids(ids) == [50259, 50260, 50257, 50260, 50258, 50260, 50257, 50260], texts
        assert sum(index == END_OF_TURN_ID for index, said in zip(ids, mask, strict=True) if said) == 1


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("content", ["The answer is", " is \n", "ends in <|us", "<", "", parts("a <|en", "d|> b")])
def test_the_final_message_can_be_continued(tokenizer: Any, content: Any, sanitize: Any) -> None:
    text = content if isinstance(content, str) else "a < |end|> b"
    messages = say("Hi", content)
    prompt = written(say("Hi")) + "<|assistant|>\n" + text.lstrip()
    assert tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False) == prompt
    options = {"continue_final_message": True, "sanitize_control_tokens": sanitize}
    ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    assert control_ids(ids) == [50257, 50260, 50258]
    assert tokenizer.decode(ids) == prompt


def test_a_continued_message_must_not_spell_a_control_token(tokenizer: Any) -> None:
    """transformers looks for the message as it was given, and the template cannot write a control token as given."""
    with pytest.raises(ValueError, match="final message does not appear in the chat"):
        tokenizer.apply_chat_template(say("Hi", "a<|end|>b"), continue_final_message=True)
