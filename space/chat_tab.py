"""The chat tab: its components, and the events between them."""

import secrets
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import gradio as gr

from app_state import MODEL_QUEUE, Demo, visitor
from chat import Chat, Reply
from escaping import as_text, said_text
from language_model import BOUNDS, Settings
from prompts import MAX_HISTORY, MAX_MESSAGE, MAX_SYSTEM_PROMPT, MAX_TURN

QUESTIONS = (
    "What is a tokenizer?",
    "What does a learning rate do?",
    "How do I read a file in Python?",
    "Tell me a story that begins in a library.",
)
BEGINNINGS = ("Once upon a time", "Returns the", "The function takes a list of", "In the beginning")
COMPARE = "Show the base model too: it was not trained to answer, and continues your message as if it began a document"

History = list[dict[str, Any]]
Shown = Sequence[Any]  # values for the text box, the conversation and the base model's


class ChatTab:
    """The chat's components, added to the page that is being built."""

    def __init__(self, demo: Demo) -> None:
        self.demo = demo
        with gr.Row():
            self.chatbot = self._chatbot(demo.chat)
            self.compared = self._base_chatbot(demo.base) if demo.base else gr.State([])
        self.message = gr.Textbox(
            show_label=False,
            placeholder="Write a message" if demo.chat.model.answers else "Write the beginning of a text",
            max_length=MAX_MESSAGE,
            max_lines=8,
            autofocus=True,
            submit_btn=True,
            elem_id="message",
        )
        self.compare = gr.Checkbox(label=COMPARE, visible=demo.base is not None, container=False, elem_id="compare")
        with gr.Accordion("Settings", open=False):
            self.settings = self._settings()
        self._connect()

    def _chatbot(self, chat: Chat) -> gr.Chatbot:
        return gr.Chatbot(
            label=chat.model.name,
            show_label=False,
            examples=[{"text": text} for text in (QUESTIONS if chat.model.answers else BEGINNINGS)],
            editable="user",
            elem_id="chat",
            **_AS_TEXT,
        )

    def _base_chatbot(self, base: Chat) -> gr.Chatbot:
        return gr.Chatbot(label="The base model", visible=False, elem_id="base", **_AS_TEXT)

    def _settings(self) -> list[gr.components.Component]:
        """Return the components in the order of `_settings_of`, after the system prompt."""
        prompt = gr.Textbox(
            value="",
            label="System prompt",
            placeholder="Instructions for the model",
            lines=2,
            max_length=MAX_SYSTEM_PROMPT,
            visible=self.demo.chat.model.answers,
        )
        with gr.Row():
            temperature = _slider("temperature", "Temperature", "higher values are more surprising", 0.05)
            top_p = _slider("top_p", "Top-p", "sample from the most likely tokens with this total probability", 0.05)
            top_k = _slider("top_k", "Top-k", "sample from this many of the most likely tokens; 0: all", 1)
        with gr.Row():
            penalty = _slider("repetition_penalty", "Repetition penalty", "1: no penalty", 0.05)
            longest = _slider("max_new_tokens", "Longest reply", "in tokens", 1, self.demo.chat.model.reply_tokens)
            seed = gr.Textbox(
                value="",
                label="Seed",
                info="the same seed gives the same reply",
                placeholder="random",
                max_length=10,
            )
        greedy = gr.Checkbox(label="Greedy: always choose the most likely token", container=False)
        return [prompt, temperature, top_p, top_k, penalty, longest, seed, greedy]

    def _connect(self) -> None:
        inputs = [self.chatbot, self.compare, *self.settings]
        outputs = [self.message, self.chatbot, self.compared]
        written: dict[str, Any] = {"outputs": outputs, "api_visibility": "private", **MODEL_QUEUE}
        direct: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        events: Any = [
            self.message.submit(self._send, [self.message, *inputs], **written),
            self.chatbot.retry(self._retry, inputs, **written),
            self.chatbot.edit(self._edit, inputs, **written),
            self.chatbot.example_select(self._example, inputs, **written),
        ]
        for event in events:
            event.failure(_may_send, None, self.message, **direct)
        self.message.stop(_may_send, None, self.message, cancels=events, **direct)
        # Cancel first: otherwise a reply in progress would reappear.
        self.chatbot.undo(None, cancels=events).then(_undo, self.chatbot, outputs, **direct)
        self.chatbot.clear(None, cancels=events).then(lambda: (_may_send(), [], []), None, outputs, **direct)
        self.compare.change(
            lambda both: (gr.update(show_label=both), gr.update(visible=both)),
            self.compare,
            [self.chatbot, self.compared],
            **direct,
        )

    def _send(self, request: gr.Request, message: str, history: History, *chosen: Any) -> Iterator[Shown]:
        yield from self._written(request, message, history, chosen)

    def _retry(self, request: gr.Request, data: gr.RetryData, history: History, *chosen: Any) -> Iterator[Shown]:
        at = _first(data.index)
        yield from self._written(request, _text(history[at]), history[:at], chosen)

    def _edit(self, request: gr.Request, data: gr.EditData, history: History, *chosen: Any) -> Iterator[Shown]:
        yield from self._written(request, said_text(data.value), history[: _first(data.index)], chosen)

    def _example(self, request: gr.Request, data: gr.SelectData, history: History, *chosen: Any) -> Iterator[Shown]:
        yield from self._written(request, data.value["text"], history, chosen)

    def _written(self, request: gr.Request, message: Any, history: History, chosen: Sequence[Any]) -> Iterator[Shown]:
        """Empty the text box once the message is accepted, then yield the growing reply, and the base model's."""
        compare, system_prompt, *values = chosen
        try:
            settings = _settings_of(*values)
            self.demo.visitors.admit(visitor(request))
            replies = self.demo.chat.reply(message, _said(history), system_prompt, settings)
        except ValueError as error:
            gr.Warning(str(error), title="Not sent")
            yield gr.skip(), gr.skip(), gr.skip()
            return
        asked = {"role": "user", "content": as_text(message)}
        yield gr.Textbox("", submit_btn=False, stop_btn=True), [*history, asked], []
        for reply in replies:
            yield gr.skip(), [*history, asked, *_messages(reply)], gr.skip()
        for reply in self._base_replies(message, settings) if compare else ():
            yield gr.skip(), gr.skip(), [asked, *_messages(reply)]
        yield _may_send(), gr.skip(), gr.skip()

    def _base_replies(self, message: str, settings: Settings) -> Iterator[Reply]:
        """Return the base model's continuation of the message alone."""
        return self.demo.base.reply(message, [], "", settings) if self.demo.base else iter(())


_AS_TEXT: dict[str, Any] = {
    "render_markdown": False,
    "buttons": ["copy", "copy_all"],
    "feedback_options": None,
    "height": "56vh",
    "min_height": 300,
}


def _slider(name: str, label: str, info: str, step: float, value: float | None = None) -> gr.Slider:
    shown = getattr(Settings(), name) if value is None else value
    return gr.Slider(*BOUNDS[name], value=shown, step=step, label=label, info=info)


def _settings_of(
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    max_new_tokens: int,
    seed: str,
    greedy: bool,
) -> Settings:
    """Return the page's settings, with a random seed if none is given."""
    typed = seed.strip()
    number: Any = int(typed) if typed.isdecimal() else typed or secrets.randbelow(100_000)
    return Settings(temperature, top_p, top_k, repetition_penalty, max_new_tokens, number, greedy)


def _messages(reply: Reply) -> History:
    """Return a reply as two messages: its text, and a note under it that is not part of the conversation."""
    return [
        {"role": "assistant", "content": as_text(reply.text)},
        {"role": "assistant", "content": "", "metadata": {"title": reply.note, "status": "done"}},
    ]


def _said(history: History) -> list[dict[str, str]]:
    """Return the conversation up to its limits, without notes under replies and messages without a reply."""
    messages = [
        {"role": message["role"], "content": _text(message)[:MAX_TURN]}
        for message in history
        if not (message.get("metadata") or {}).get("title")
    ]
    turns = [turn for turn in pairwise(messages) if [message["role"] for message in turn] == ["user", "assistant"]]
    return [message for turn in turns for message in turn][-MAX_HISTORY:]


def _text(message: dict[str, Any]) -> str:
    """Return the text of a message, which the page sends in parts."""
    content = message["content"]
    parts = [part.get("text", "") for part in content] if isinstance(content, list) else [content]
    return said_text("".join(map(str, parts)))


def _undo(history: History) -> Shown:
    """Move the last message back into the text box."""
    at = max(number for number, message in enumerate(history) if message["role"] == "user")
    return gr.Textbox(_text(history[at]), submit_btn=True, stop_btn=False), history[:at], []


def _first(index: int | Sequence[int]) -> int:
    return index if isinstance(index, int) else index[0]


def _may_send() -> gr.Textbox:
    """Return the text box for a visitor who may send a message."""
    return gr.Textbox(submit_btn=True, stop_btn=False)
