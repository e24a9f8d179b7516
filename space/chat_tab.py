"""The chat tab: its components, and the events between them.

Gradio's events are wired here rather than by `gr.ChatInterface`, which locks and empties the text box while a reply is
written, cannot stop one for an edited message, and shows a visitor's words as Markdown. What happens in the browser
alone is in `page.js`.
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import gradio as gr

from language_model import BOUNDS, LanguageModel, Settings
from page_text import as_reply, as_words, text_of
from replies import MAX_HISTORY, MAX_MESSAGE, MAX_SYSTEM_PROMPT, MAX_TURN, Demo, Reply
from visitors import visitor_of

logger = logging.getLogger(__name__)

QUESTIONS = (
    "What is a tokenizer?",
    "What does a learning rate do?",
    "How do I read a file in Python?",
    "Tell me a story that begins in a library.",
)
BEGINNINGS = ("Once upon a time", "Returns the", "The function takes a list of", "In the beginning")
COMPARE = "Show the base model too"
COPIED = "It opens this page with your settings and your first message."
CONTINUES = "The base model was not trained to answer: it continues a message as if it began a document."
LINKED = ("system_prompt", *(field.name for field in fields(Settings)))  # in the order of the page's settings
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # for every event that generates text
# For events that take a moment: without the queue or, where they may say something in a toast, in a lane of their own.
DIRECT: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
TOLD: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}

History = list[dict[str, Any]]
Shown = Sequence[Any]  # values for the text box, the conversation, the base model's text and the note


class ChatTab:
    """The chat's components, added to the page that is being built."""

    def __init__(self, demo: Demo) -> None:
        self.demo = demo
        self.chatbot, self.base = self._conversations()
        self.note = gr.Markdown(expected(demo.chat.model), elem_id="note")
        self.message = gr.Textbox(
            label="Message",
            show_label=False,
            placeholder="Write a message" if demo.chat.model.answers else "Write the beginning of a text",
            max_length=MAX_MESSAGE,
            max_lines=6,
            autofocus=True,
            submit_btn="Send",
            elem_id="message",
        )
        with gr.Row(elem_id="options"):
            self.compare = gr.Checkbox(label=COMPARE, visible=demo.base is not None, container=False, elem_id="compare")
            self.share = gr.Button("Copy a link", size="sm", elem_id="share", scale=0)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.settings = self._settings()
        self.saved = gr.BrowserState([], storage_key=f"chat with {demo.chat.model.id}", secret="kept in the browser")
        self._connect()

    def _conversations(self) -> tuple[gr.Chatbot, Any]:
        """Return the chat and, if there is a base model, its texts; style.css shows both if the visitor compares."""
        model, base = self.demo.chat.model, self.demo.base
        examples: Any = [{"text": text} for text in (QUESTIONS if model.answers else BEGINNINGS)]
        own: dict[str, Any] = {"label": model.name, "examples": examples, "editable": "user", "elem_id": "chat"}
        if base is None:
            return gr.Chatbot(**own, **_LOOK), gr.State()
        # gr.Tabs would not render the second one before it is chosen, nor show both on a wide screen.
        shown = ["This model", "The base model"]
        gr.Radio(shown, value=shown[0], label="Show", show_label=False, interactive=True, elem_id="which")
        with gr.Row(elem_id="replies"):
            chatbot = gr.Chatbot(**own, **_LOOK)
            texts = gr.Chatbot(label="The base model", placeholder=CONTINUES, elem_id="base", **_LOOK)
        return chatbot, texts

    def _settings(self) -> list[gr.components.Component]:
        """Return the components in the order of `_settings_of`, after the system prompt."""
        model = self.demo.chat.model
        prompt = gr.Textbox(
            value="",
            label="System prompt",
            placeholder="Instructions for the model",
            lines=2,
            max_length=MAX_SYSTEM_PROMPT,
            visible=model.answers,
        )
        with gr.Row():
            longest = _slider("max_new_tokens", "Longest reply", "in tokens", 1, model.reply_tokens)
            temperature = _slider("temperature", "Temperature", "higher values are more surprising", 0.05)
            top_p = _slider("top_p", "Top-p", "sample from the most likely tokens with this total probability", 0.05)
        with gr.Row():
            top_k = _slider("top_k", "Top-k", "sample from this many of the most likely tokens; 0: all", 1)
            penalty = _slider("repetition_penalty", "Repetition penalty", "1: no penalty", 0.05)
            seed = gr.Textbox(
                value="",
                label="Seed",
                info="the same seed gives the same reply",
                placeholder="random",
                max_length=10,
            )
        greedy = gr.Checkbox(label="Greedy: always choose the most likely token", container=False)
        return [prompt, temperature, top_p, top_k, penalty, longest, seed, greedy]

    # Events

    def _connect(self) -> None:
        box, chat = self.message, self.chatbot
        asked = [chat, *self.settings]
        accepted = {
            "send": box.submit(self._send, [box, *asked], [box, chat], js="(...all) => chatPage.send(all)", **TOLD),
            "retry": chat.retry(self._retry, asked, [box, chat], **TOLD),
            "edit": chat.edit(self._edit, asked, [box, chat], **TOLD),
            "example": chat.example_select(self._example, asked, [box, chat], **TOLD),
        }
        accepted["send"].success(None, js="() => chatPage.sent()", **DIRECT)
        accepted["send"].failure(None, js="() => chatPage.takeBack()", **DIRECT)
        accepted["edit"].failure(_as_words, chat, chat, **DIRECT)
        written = [self._write_after(event) for event in accepted.values()]
        # Gradio counts a canceled event as a failed one, so these serve Stop too.
        given_back = [event.failure(_without_reply, [box, chat], [box, chat], **DIRECT) for event in written]
        box.stop(None, cancels=written, **DIRECT)
        # Cancel first: otherwise a reply in progress would reappear.
        undone = chat.undo(None, cancels=written).then(_undo, chat, self._outputs, **DIRECT)
        cleared = chat.clear(None, cancels=written).then(self._cleared, None, self._outputs, **DIRECT)
        for event in (*written, *given_back, undone, cleared):
            event.then(None, chat, self.saved, js="history => [history]", **DIRECT)
        for event in (undone, cleared):
            event.then(None, js="() => chatPage.focus()", **DIRECT)
        link = f"(...all) => chatPage.copyLink({self.demo.chat.model.id!r}, all)"
        copied = self.share.click(None, [*asked, self.compare], None, js=link, **DIRECT)
        copied.then(lambda: gr.Info(COPIED, title="Link copied"), **TOLD)

    @property
    def _outputs(self) -> list[Any]:
        return [self.message, self.chatbot, self.base, self.note]

    def _write_after(self, accepted: Any) -> Any:
        """Let a reply follow an accepted message."""
        return accepted.success(
            self._write,
            [self.chatbot, self.compare, *self.settings],
            self._outputs,
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=[self.chatbot, self.note],
            **MODEL_QUEUE,
        )

    def _send(self, request: gr.Request, message: str, history: History, *values: Any) -> Shown:
        return self._accepted(request, message, history, values)

    def _retry(self, request: gr.Request, data: gr.RetryData, history: History, *values: Any) -> Shown:
        at = _first(data.index)
        return self._accepted(request, text_of(history[at]), history[:at], values)

    def _edit(self, request: gr.Request, data: gr.EditData, history: History, *values: Any) -> Shown:
        return self._accepted(request, text_of({"content": data.value}), history[: _first(data.index)], values)

    def _example(self, request: gr.Request, data: gr.SelectData, history: History, *values: Any) -> Shown:
        return self._accepted(request, data.value["text"], history, values)

    def _accepted(self, request: gr.Request, message: Any, history: History, values: Sequence[Any]) -> Shown:
        """Return the text box while a reply is awaited, and the conversation with the message.

        Raises:
            gr.Error: The message is refused; what it says is for the visitor.
        """
        system_prompt, *chosen = values
        try:
            self.demo.chat.reply(message, _turns(history), system_prompt, _settings_of(*chosen))
            self.demo.visitors.admit(visitor_of(request))
        except ValueError as error:
            raise refusal(error) from error
        return _may_stop(), [*history, {"role": "user", "content": as_words(message)}]

    def _write(self, history: History, compare: bool, system_prompt: str, *chosen: Any) -> Iterator[Shown]:
        """Yield the growing reply to the last message and a note about it, then the base model's."""
        message, settings = text_of(history[-1]), _settings_of(*chosen)
        try:
            for reply in self.demo.chat.reply(message, _turns(history[:-1]), system_prompt, settings):
                yield gr.skip(), [*history, _reply(reply, settings)], gr.skip(), reply.note
            if compare and self.demo.base:
                for text in self.demo.base.reply(message, [], "", settings):
                    note = f"{reply.note} — base model: {text.note}"
                    yield gr.skip(), gr.skip(), [history[-1], _reply(text, settings)], note
        except Exception as error:
            logger.exception("a reply failed")
            raise gr.Error(
                "The model failed while it wrote. Your message is back in the box; the log of the Space says why.",
                print_exception=False,
            ) from error
        yield _may_send(), gr.skip(), gr.skip(), gr.skip()

    def _cleared(self) -> Shown:
        return _may_send(), [], [], expected(self.demo.chat.model)

    def restore_on_load(self, page: gr.Blocks) -> None:
        """Restore a browser's conversation, or follow its link, when it opens the page; no message is sent before."""
        outputs = [self.message, self.chatbot, self.compare, *self.settings]
        opened = page.load(self._open, self.saved, outputs, **TOLD)
        for end in (opened.success, opened.failure):
            end(None, js="() => chatPage.opened()", **DIRECT)

    def _open(self, request: gr.Request, saved: Any) -> Shown:
        query = dict(request.query_params)
        if "message" not in query:
            return [gr.skip(), _restored(saved), *[gr.skip()] * (1 + len(self.settings))]
        if query.get("model", self.demo.chat.model.id) != self.demo.chat.model.id:
            told = f"The link was made with {query['model'][:100]}, whose reply may be another one."
            gr.Warning(told, title="Another model")
        values = [_linked(name, query.get(name)) for name in LINKED]
        both = query.get("compare") == "true" if self.demo.base else gr.skip()
        return [query["message"][:MAX_MESSAGE], [], both, *values]


_LOOK: dict[str, Any] = {
    "show_label": False,
    "buttons": ["copy"],
    "feedback_options": None,
    "latex_delimiters": [],
    "allow_tags": False,
    "height": None,
}


def refusal(error: ValueError) -> gr.Error:
    """Return what a visitor is told of a message that is not answered: the reason, in a sentence."""
    return gr.Error(f"Not sent: {error}.", print_exception=False)


def expected(model: LanguageModel) -> str:
    """Return how long a reply of the usual length takes, if that is known."""
    seconds = model.seconds_for(model.reply_tokens)
    return f"A reply of {model.reply_tokens} tokens takes about {max(1, round(seconds))} s here" if seconds else ""


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
    typed = str(seed).strip()
    number: Any = int(typed) if typed.isdecimal() else typed or secrets.randbelow(100_000)
    return Settings(temperature, top_p, top_k, repetition_penalty, max_new_tokens, number, greedy)


def _linked(name: str, text: str | None) -> Any:
    """Return the value of a setting that a link gives, if it is one."""
    if text is None:
        return gr.skip()
    if name == "greedy":
        return text == "true"
    if name in ("system_prompt", "seed"):
        return text[:MAX_SYSTEM_PROMPT]
    least, most = BOUNDS[name]
    try:
        return min(max(float(text), least), most)
    except ValueError:
        return gr.skip()


def _reply(reply: Reply, settings: Settings) -> dict[str, Any]:
    """Return a reply as a message, with its seed for a link."""
    return {"role": "assistant", "content": as_reply(reply.text), "metadata": {"id": int(settings.seed)}}


def _turns(history: History) -> list[dict[str, str]]:
    """Return the characters of a conversation up to its limits, without messages that got no reply."""
    messages = [{"role": message["role"], "content": text_of(message)[:MAX_TURN]} for message in history]
    turns = [turn for turn in pairwise(messages) if [message["role"] for message in turn] == ["user", "assistant"]]
    return [message for turn in turns for message in turn][-MAX_HISTORY:]


def _as_words(history: History) -> History:
    """Return the conversation with all that visitors said as their words, also a message that was just edited."""
    return [
        {**message, "content": as_words(text_of(message))} if message["role"] == "user" else message
        for message in history
    ]


def _restored(saved: Any) -> History:
    """Return the conversation that a browser kept; whatever else it holds is nothing."""
    messages = saved if isinstance(saved, list) else []
    if not all(isinstance(message, dict) and message.get("role") in ("user", "assistant") for message in messages):
        return []
    said = [(message["role"], text_of(message)[:MAX_TURN], message.get("metadata")) for message in messages]
    return [
        {"role": role, "content": as_words(text)}
        if role == "user"
        else {"role": role, "content": as_reply(text), "metadata": metadata}
        for role, text, metadata in said[-MAX_HISTORY:]
    ]


def _undo(history: History) -> Shown:
    """Move the last message back into the text box."""
    at = max((number for number, message in enumerate(history) if message["role"] == "user"), default=0)
    words = text_of(history[at]) if history else ""
    return gr.Textbox(words, submit_btn="Send", stop_btn=False), history[:at], [], ""


def _without_reply(typed: str, history: History) -> Shown:
    """Move a message that got no reply back into the text box, unless another one is being written there."""
    if typed.strip() or not history or history[-1]["role"] != "user":
        return _may_send(), gr.skip()
    return gr.Textbox(text_of(history[-1]), submit_btn="Send", stop_btn=False), history[:-1]


def _first(index: int | Sequence[int]) -> int:
    return index if isinstance(index, int) else index[0]


def _may_send() -> gr.Textbox:
    return gr.Textbox(submit_btn="Send", stop_btn=False)


def _may_stop() -> gr.Textbox:
    return gr.Textbox(submit_btn=False, stop_btn="Stop")
