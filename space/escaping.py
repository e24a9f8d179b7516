"""Show text literally in a chat.

Even without Markdown, `gr.Chatbot` interprets HTML and entities. An invisible character after each "<" and "&" that
would begin one prevents that. Escapes would show up in the box in which a visitor edits a message.
"""

import re

JOINER = "\N{WORD JOINER}"
_BEGINS_MARKUP = re.compile(r"(?:<(?=[A-Za-z/!?])|&(?=[A-Za-z#]))")


def as_text(text: str) -> str:
    """Return the text as the page needs it."""
    return _BEGINS_MARKUP.sub(lambda begin: begin[0] + JOINER, text)


def said_text(shown: str) -> str:
    """Return the text that the page shows, without the invisible characters."""
    return re.sub(f"([<&]){JOINER}", r"\1", shown)
