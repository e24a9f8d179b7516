"""Messages of conversations, in short."""

from typing import Any

ROLES = ("system", "user", "assistant")


def say(*texts: Any, system: str | None = None) -> list[dict[str, Any]]:
    """Return a conversation of these turns, the user's first."""
    turns = [{"role": ROLES[1 + index % 2], "content": text} for index, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]
