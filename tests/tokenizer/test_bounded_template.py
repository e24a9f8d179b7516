"""A chat template is a program that came with a model: one that does not end or writes without limit is refused."""

import json
from time import monotonic

import pytest

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.chat_template import require_bounded_template
from fgpt_hf.tokenizer.fast_encoding import encode_conversation, encode_conversations
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from tests.support.messages import say

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(a='aaaaaaaa') %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "does not end within 1 seconds"),
        (f"{{% generation %}}{LOOPS}{{% endgeneration %}}", "does not end within 1 seconds"),
        (f"{{% if messages|length > 3 %}}{LOOPS}{{% endif %}}", "does not end within 1 seconds"),
        ("{{ 10 ** (10 ** 10) }}", "does not end within 1 seconds|writes without limit"),
        ("{{ 'a' * 10 ** 12 }}", "writes without limit"),
        ("{{ 'a' * 10 ** 7 }}", "writes without limit"),
        (DOUBLING, "does not end within 1 seconds|writes without limit"),
        ({"default": "{{ messages }}", "tools": LOOPS}, "does not end"),
        (5, "is not text"),
    ],
    ids=str,
)
def test_an_unbounded_template_is_refused_within_seconds(template: object, said: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    began = monotonic()
    with pytest.raises(UserError, match=f"the chat template of somebody/model ({said})"):
        require_bounded_template("somebody/model", tokenizer, seconds=1)
    assert monotonic() - began < 20


@pytest.mark.parametrize(
    "template",
    [
        None,
        build_tokenizer().chat_template,
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}",
        "{{ raise_exception('no system prompt') }}",
        "{% for",
    ],
)
def test_any_other_template_passes(template: str | None) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    require_bounded_template("somebody/model", tokenizer)


@pytest.mark.parametrize("expression", ["1 / 0", "1 + 'a'", "messages[9].x", "''.__class__.__mro__", "none()"])
def test_whatever_a_template_raises_is_about_the_conversation(expression: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = f"{{{{ {expression} }}}}"
    with pytest.raises(UserError, match="^not a conversation: "):
        encode_conversation(tokenizer, say("Hi", "Hello"))
    (refused,) = encode_conversations(tokenizer, [say("Hi", "Hello")])
    assert isinstance(refused, UserError)


def test_the_project_template_reads_conversations_with_odd_text() -> None:
    text = json.loads('"\\ud800 <|end|> \\u0000 \\n"')
    ids, _ = encode_conversation(build_tokenizer(), say(text, text))
    assert ids.count(50260) == 2
