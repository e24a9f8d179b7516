"""The chat for programs: an endpoint with a signature, which is an MCP tool where `gradio[mcp]` is installed."""

from collections.abc import Callable, Iterator

import gradio as gr

from app_state import MODEL_QUEUE, Demo, visitor
from language_model import Settings

USUAL = Settings()


def add_api(demo: Demo) -> None:
    """Add `/chat` to the page that is being built."""
    gr.api(endpoint(demo), api_name="chat", **MODEL_QUEUE)


def endpoint(demo: Demo) -> Callable[..., Iterator[str]]:
    """The function behind `/chat`; its docstring is what programs are shown."""

    def chat(
        request: gr.Request,
        message: str,
        history: list[dict[str, str]] = [],  # noqa: B006 -- shown as the default, and never changed
        system_prompt: str = "",
        temperature: float = USUAL.temperature,
        top_p: float = USUAL.top_p,
        top_k: int = USUAL.top_k,
        repetition_penalty: float = USUAL.repetition_penalty,
        max_new_tokens: int = USUAL.max_new_tokens,
        seed: int = USUAL.seed,
        greedy: bool = USUAL.greedy,
    ) -> Iterator[str]:
        """Answer a message with the language model; the reply comes longer each time, and the last is all of it.

        Args:
            message: what to answer, 4,000 characters at most.
            history: earlier turns, each {"role": "user", "content": …} and {"role": "assistant", "content": …}.
            system_prompt: who the model is to be, 1,000 characters at most.
            temperature: 0.1 to 2; higher is more surprising.
            top_p: 0.05 to 1; sample among the likeliest tokens that together have this probability.
            top_k: 0 to 500; sample among so many of the likeliest tokens, 0 among all.
            repetition_penalty: 1 (none) to 2.
            max_new_tokens: 1 to 512; the longest reply.
            seed: the same seed and settings give the same reply.
            greedy: take the likeliest token each time, whatever the sampling settings are.
        """
        try:
            settings = Settings(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, greedy)
            demo.visitors.admit(visitor(request))
            replies = demo.chat.reply(message, history, system_prompt, settings)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        for reply in replies:
            yield reply.text

    chat.__annotations__["return"] = str  # what each piece is, for the signature that programs are shown
    return chat
