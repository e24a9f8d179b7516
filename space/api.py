"""The chat for programs: an endpoint with a typed signature; with `gradio[mcp]` installed, also an MCP tool."""

from collections.abc import Callable, Iterator

import gradio as gr

from chat_tab import MODEL_QUEUE, refusal
from language_model import Settings
from replies import Demo
from visitors import visitor_of

DEFAULTS = Settings()


def add_api(demo: Demo) -> None:
    """Add `/chat` to the page that is being built."""
    gr.api(endpoint(demo), api_name="chat", **MODEL_QUEUE)


def endpoint(demo: Demo) -> Callable[..., Iterator[str]]:
    """Return the function behind `/chat`, whose docstring and signature are shown to programs."""

    def chat(
        request: gr.Request,
        message: str,
        history: list[dict[str, str]] = [],  # noqa: B006 -- shown as the default, and never changed
        system_prompt: str = "",
        temperature: float = DEFAULTS.temperature,
        top_p: float = DEFAULTS.top_p,
        top_k: int = DEFAULTS.top_k,
        repetition_penalty: float = DEFAULTS.repetition_penalty,
        max_new_tokens: int = demo.chat.model.reply_tokens,
        seed: int = DEFAULTS.seed,
        greedy: bool = DEFAULTS.greedy,
    ) -> Iterator[str]:
        """Answer a message with the language model; each piece repeats the reply so far, and the last is complete.

        Args:
            message: The message to answer, at most 4,000 characters.
            history: Earlier turns, each {"role": "user", "content": …} and {"role": "assistant", "content": …}.
            system_prompt: Instructions for the model, at most 1,000 characters.
            temperature: 0.1 to 2; higher values give more surprising text.
            top_p: 0.05 to 1; sample from the most likely tokens that together have this probability.
            top_k: 0 to 500; sample from this many of the most likely tokens, or from all if 0.
            repetition_penalty: 1 (no penalty) to 2.
            max_new_tokens: 1 to 512; maximum length of the reply in tokens.
            seed: Random seed; the same seed and settings give the same reply.
            greedy: Choose the most likely token each time, and ignore the sampling settings.
        """
        try:
            settings = Settings(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, greedy)
            demo.visitors.admit(visitor_of(request))
            replies = demo.chat.reply(message, history, system_prompt, settings)
        except ValueError as error:
            raise refusal(error) from error
        yield from (reply.text for reply in replies)

    chat.__annotations__["return"] = str  # the type of each piece, for the signature that programs see
    return chat
