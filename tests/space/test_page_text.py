"""What the page shows of visitors, models and cards: their words, and never their markup."""

import re
from typing import Any

import pytest

from chat_tab import _restored
from page_text import as_reply, as_words, card_text, plain_text, text_of


@pytest.mark.parametrize(
    "text",
    [
        "<b>bold</b>",
        "&lt;script&gt;",
        "a < b && c",
        "<!-- x -->",
        "R&D <3 </p>",
        "plain",
        "![x](//a.b)",
        "```mermaid\n",
        "<\N{WORD JOINER}b>",
        "`x` **b** $$y$$ \\* 1. a\n\n    code\n| a |\n|---|\nhttps://a.b",
    ],
)
def test_text_begins_no_markup_on_the_page_and_comes_back_as_it_was(text: str) -> None:
    assert not re.search(r"<[A-Za-z/!?]|&[A-Za-z#]|!\[|`mermaid", as_reply(text))
    assert plain_text(as_reply(text)) == text
    assert not re.search(r"[!-/:-@\[-`{-~\s]", re.sub(r"&#\d+;", "", as_words(text)))
    assert plain_text(as_words(text)) == text


@pytest.mark.parametrize("saved", [None, "x", [1], [{"role": "system"}], {"a": 1}])
def test_what_a_browser_keeps_and_is_no_conversation_is_nothing(saved: Any) -> None:
    assert _restored(saved) == []


def test_a_conversation_that_a_browser_kept_is_shown_again_without_markup() -> None:
    saved = [{"role": "user", "content": "<b>*"}, {"role": "assistant", "content": "<img src=x>", "metadata": None}]
    restored = _restored(saved)
    assert [text_of(message) for message in restored] == ["<b>*", "<img src=x>"]
    assert "<" not in restored[0]["content"] and "<i" not in restored[1]["content"]
    assert _restored(restored) == restored


def test_a_card_loads_nothing_from_elsewhere() -> None:
    card = "# A\n![x](//a.b/c.png) ![y][z] <img src='//a.b'> <script>1</script> <details><summary>s</summary></details>"
    assert not re.search(r"!\[|<img|<script|png", card_text(card))
    assert "<details><summary>" in card_text(card)


@pytest.mark.parametrize(
    "card",
    [
        "<im<b>g src=//a.b/c.png onerror=alert(1)>",
        "<<script>script>alert(1)<</script>/script>",
        "<!-<!-- -->- --><iframe src=//a.b>",
        "!![x](y)[z](//a.b/c.png)",
        "![a![b](c)](//a.b/d.png)",
        "<img src=//a.b/c.png",
        "<details><svg/onload=alert(1)></details>",
        "```mermaid\nA@{ img: '//a.b/c.png' }\n```",
    ],
)
def test_what_is_left_of_a_nested_tag_is_no_tag(card: str) -> None:
    assert not re.search(r"!\[|<(?!/?details>)[a-zA-Z/!?]|```mermaid", card_text(card))
