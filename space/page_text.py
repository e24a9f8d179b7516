"""Text as the page shows it: visitors' words as they are, replies as Markdown that loads nothing and holds no HTML.

`gr.Chatbot` reads every message as Markdown and HTML. Here a visitor's words become character references, and a reply
gets an invisible character wherever it would begin a tag, an entity or an image. `page.js` takes both away again where
a message is copied or edited; `plain_text` does so for the model.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

JOINER = "\N{WORD JOINER}"
WORDS = JOINER + "\N{ZERO WIDTH SPACE}"  # how a visitor's words begin on the page
_MARKUP = re.compile(r"[!-/:-@\[-`{-~\s]")  # ASCII punctuation and white space, of which all markup is made
# What begins a tag, an entity, an image or a diagram, which may load images; or what would read like a mark set here.
_BEGINNING = re.compile(rf"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])|!(?=\[)|`(?=mermaid)|[<&!`](?={JOINER})")


def as_words(text: str) -> str:
    """Return a visitor's text so that the page shows exactly its characters.

    Example:
        >>> as_words("a*b").removeprefix(WORDS)
        'a&#42;b'
    """
    return WORDS + _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def as_reply(text: str) -> str:
    """Return a reply as Markdown without HTML, images and diagrams: the page loads nothing that a model names.

    Example:
        >>> as_reply("List<int>").replace(JOINER, "|")
        'List<|int>'
    """
    return _BEGINNING.sub(lambda found: found[0] + JOINER, text)


def plain_text(shown: str) -> str:
    """Return the characters of words or of a reply that the page shows.

    Example:
        >>> plain_text(as_words("a*b")), plain_text(as_reply("List<int>")), plain_text("as it is")
        ('a*b', 'List<int>', 'as it is')
    """
    if shown.startswith(WORDS):
        return re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), shown.removeprefix(WORDS))
    return re.sub(f"([<&!`]){JOINER}", r"\1", shown)


def text_of(message: Mapping[str, Any]) -> str:
    """Return the characters of a message, whose content the page sends in parts."""
    content = message.get("content")
    parts: Sequence[Any] = content if isinstance(content, list) else [content]
    texts = [part.get("text", "") if isinstance(part, Mapping) else part for part in parts]
    return plain_text("".join(text for text in texts if isinstance(text, str)))


_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)|!(?=\[)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY = re.compile(r"^#+ [^\n]+\n\s*(?=^#+ )", re.MULTILINE)  # a heading without content
_TAG = re.compile(r"<(?!/?(?:details|summary)>)[a-zA-Z/][^>]*>")
_UNCLOSED = re.compile(r"<(?!/?(?:details|summary)>)(?=[a-zA-Z/!?])")
_DIAGRAM = re.compile(r"^(\s*`{3,})mermaid", re.MULTILINE)


def card_text(markdown: str) -> str:
    """Return a card's Markdown without images, diagrams and HTML, except <details>: the page loads nothing from it.

    What is left when a tag or an image goes may be another one, so they go until nothing changes.
    """
    before, text = None, markdown
    while text != before:
        before, text = text, _TAG.sub("", _IMAGE.sub("", _COMMENT.sub("", text)))
    return _DIAGRAM.sub(r"\1text", _EMPTY.sub("", _UNCLOSED.sub("&lt;", text)))
