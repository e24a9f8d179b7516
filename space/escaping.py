"""Text that a chat shows as it is.

Without Markdown, `gr.Chatbot` still reads HTML and entities. An invisible character behind each "<" and "&" that would
begin one keeps them text; escaping them instead would show in the box in which a visitor edits a message.
"""

import re

JOINER = "\N{WORD JOINER}"
_BEGINS_MARKUP = re.compile(r"(?:<(?=[A-Za-z/!?])|&(?=[A-Za-z#]))")


def as_text(text: str) -> str:
    """The text for the page."""
    return _BEGINS_MARKUP.sub(lambda begin: begin[0] + JOINER, text)


def said_text(shown: str) -> str:
    """The text that the page shows."""
    return re.sub(f"([<&]){JOINER}", r"\1", shown)
