"""Answer a visitor's message, within the same limits on the page and in the API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from language_model import LanguageModel, Progress, Settings
from prompts import (
    MAX_SYSTEM_PROMPT,
    Message,
    Prompt,
    chat_prompt,
    checked_history,
    checked_message,
    checked_text,
    text_prompt,
)


class Reply(NamedTuple):
    """A reply so far, and a note about it for the visitor."""

    text: str
    note: str


class Chat:
    """One model that writes one reply at a time, each within a number of seconds."""

    def __init__(self, model: LanguageModel, seconds: float) -> None:
        self.model, self.seconds = model, seconds

    def reply(self, message: Any, history: Any, system_prompt: Any, settings: Settings) -> Iterator[Reply]:
        """Check the input, and return an iterator over the reply as it grows.

        Raises:
            ValueError: the input is invalid; the message says why.
        """
        prompt = self._prompt(message, history, system_prompt, settings)
        allowed = replace(settings, max_new_tokens=min(int(settings.max_new_tokens), prompt.room))
        return self._replies(prompt, allowed)

    def _replies(self, prompt: Prompt, allowed: Settings) -> Iterator[Reply]:
        for progress in self.model.write(prompt.ids, allowed, self.seconds):
            yield Reply(progress.text, self._note(prompt, progress, allowed))

    def _prompt(self, message: Any, history: Any, system_prompt: Any, settings: Settings) -> Prompt:
        text, turns = checked_message(message), checked_history(history)
        system = checked_text(system_prompt, "system prompt", MAX_SYSTEM_PROMPT)
        if not self.model.answers:
            return text_prompt(self.model.tokenizer, text, self.model.context)
        asked: Sequence[Message] = [*turns, {"role": "user", "content": text}]
        return chat_prompt(self.model.tokenizer, asked, system, self.model.context, int(settings.max_new_tokens))

    def _note(self, prompt: Prompt, progress: Progress, settings: Settings) -> str:
        speed = f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.seconds else ""
        seed = "" if settings.greedy else f"seed {int(settings.seed)}"
        parts = [f"{len(prompt.ids):,} tokens read, {progress.tokens:,} written", speed, seed]
        if prompt.left_out:
            turns = "turn" if prompt.left_out == 1 else f"{prompt.left_out} turns"
            parts.append(f"the first {turns} left out: the model reads {self.model.context:,} tokens")
        if progress.out_of_time:
            parts.append(f"stopped after {self.seconds:.0f} s")
        elif progress.tokens >= prompt.room:
            parts.append("the context is full")
        return " · ".join(filter(None, parts))
