"""The summary of the model at the top of the page, from its card."""

import re

from language_model import LanguageModel


def described(model: LanguageModel) -> str:
    """Return Markdown with the model's name, description, training data and limits."""
    size = f"{model.model.num_parameters():,} parameters, a context of {model.context:,} tokens"
    what = shown(model.card.first_words(model.card.title)) or f"A language model: {size}."
    data = shown(", ".join(model.card.column("Training data", "data")))
    limits = (
        shown(model.card.first_words("Intended use and limitations"))
        or "It continues text, and does not know what is true."
    )
    training = f" Trained on {data}." if data else ""
    task = "" if model.answers else " It continues what you write."
    return "\n\n".join([f"# {shown(model.name)}", what + training + task, f"<small>{limits}</small>"])


_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)|!(?=\[)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY = re.compile(r"^#+ [^\n]+\n\s*(?=^#+ )", re.MULTILINE)  # a heading without content
_TAG = re.compile(r"<(?!/?(?:details|summary)>)[a-zA-Z/][^>]*>")
_UNCLOSED = re.compile(r"<(?!/?(?:details|summary)>)(?=[a-zA-Z/!?])")


def shown(markdown: str) -> str:
    """Return a card's Markdown without images and HTML, except <details>: the page loads nothing from elsewhere.

    What is left when a tag or an image goes may be another one, so they go until nothing changes.
    """
    before, text = None, markdown
    while text != before:
        before, text = text, _TAG.sub("", _IMAGE.sub("", _COMMENT.sub("", text)))
    return _EMPTY.sub("", _UNCLOSED.sub("&lt;", text))
