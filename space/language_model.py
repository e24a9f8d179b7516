"""A language model from the Hub or a folder, loaded once, that streams its text."""

from __future__ import annotations

try:
    import spaces  # on ZeroGPU, where it must come before torch
except ImportError:
    spaces = None

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)

from card import Card

READ = ("*.json", "*.jsonl", "*.safetensors", "*.py", "*.jinja", "*.md", "*.txt")
MAX_SEED = 2**32 - 1
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.1, 2.0),
    "top_p": (0.05, 1.0),
    "top_k": (0, 500),
    "repetition_penalty": (1.0, 2.0),
    "max_new_tokens": (1, 512),
    "seed": (0, MAX_SEED),
}
_TURN = threading.Lock()  # torch's random state belongs to the whole process

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """Options of a reply; greedy decoding ignores the sampling options."""

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.1
    max_new_tokens: int = 160
    seed: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a value that is not a number or out of bounds."""
        for name, (least, most) in BOUNDS.items():
            value, whole = getattr(self, name), name in ("top_k", "max_new_tokens", "seed")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{name} must be {kind} from {least} to {most}, not {str(value)[:40]}")
        if not isinstance(self.greedy, bool):
            raise ValueError(f"greedy must be true or false, not {str(self.greedy)[:40]}")

    def decoding(self) -> dict[str, Any]:
        """Return these settings as arguments of `generate`."""
        chosen = asdict(self)
        sampled = {name: chosen[name] for name in ("temperature", "top_p", "top_k")}
        return {
            "do_sample": not self.greedy,
            "repetition_penalty": float(self.repetition_penalty),
            **({} if self.greedy else sampled | {"top_k": int(self.top_k)}),
        }


class Progress(NamedTuple):
    """The text so far, its tokens and seconds, and whether the time limit ended it."""

    text: str
    tokens: int
    seconds: float
    out_of_time: bool = False


class LanguageModel:
    """A model with its tokenizer, card and folder.

    Args:
        model_id: A folder, or a repository on the Hub: user/name or user/name@revision.
        answers: Whether it answers messages or continues text (default: as its card says).

    Raises:
        OSError, ValueError: the model does not exist or cannot be loaded.
    """

    def __init__(self, model_id: str, answers: bool | None = None) -> None:
        self.id = model_id
        self.folder = fetch(model_id)
        self.card = Card(self.folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=True)
        dtype = "auto" if self.device == "cuda" else torch.float32  # CPUs are slow at bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, trust_remote_code=True)
        self.model: PreTrainedModel = model.to(self.device).eval()
        is_chat_model = self.tokenizer.chat_template is not None and self.card.is_conversational
        self.answers = is_chat_model if answers is None else answers
        self.write = _on_gpu(self._write)

    @property
    def name(self) -> str:
        """Return the title of its card, or the last part of its id."""
        return self.card.title or self.id.partition("@")[0].rstrip("/").rpartition("/")[2]

    @property
    def context(self) -> int:
        """Return the length of its context in tokens."""
        return int(self.model.config.max_position_embeddings)

    def _write(self, ids: Sequence[int], settings: Settings, seconds: float) -> Iterator[Progress]:
        """Continue these ids until the model ends its reply or reaches the limit of tokens or seconds.

        Closing the iterator stops the generation.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        watch = _Watch(seconds)
        failures: list[Exception] = []
        writer = threading.Thread(target=self._generate, args=(ids, settings, streamer, watch, failures))
        writer.start()
        text, began = "", time.perf_counter()
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield Progress(text, watch.tokens, time.perf_counter() - began)
        finally:
            watch.stopped.set()
            writer.join()
        if failures:
            raise failures[0]
        yield Progress(text, watch.tokens, time.perf_counter() - began, watch.out_of_time)

    @torch.inference_mode()
    def _generate(
        self,
        ids: Sequence[int],
        settings: Settings,
        streamer: TextIteratorStreamer,
        watch: _Watch,
        failures: list[Exception],
    ) -> None:
        """Generate into the streamer, which is always ended."""
        prompt = torch.tensor([list(ids)], device=self.device)
        try:
            with _TURN:
                torch.manual_seed(int(settings.seed))
                self.model.generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=int(settings.max_new_tokens),
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                    streamer=streamer,
                    stopping_criteria=[watch],
                    **settings.decoding(),
                )
        except Exception as error:  # raised again in the thread that reads
            failures.append(error)
            streamer.end()


def fetch(model_id: str) -> Path:
    """Return the folder of a model, and download it if it is a repository on the Hub."""
    if Path(model_id).is_dir():
        return Path(model_id)
    repo_id, _, revision = model_id.partition("@")
    return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(READ)))


class _Watch(StoppingCriteria):
    """A stopping criterion that counts tokens, and ends on request or at the time limit."""

    def __init__(self, seconds: float) -> None:
        self.stopped, self.tokens, self.out_of_time = threading.Event(), 0, False
        self._deadline = time.monotonic() + seconds

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        self.tokens += 1
        self.out_of_time = time.monotonic() > self._deadline
        ends = self.stopped.is_set() or self.out_of_time
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)  # type: ignore[return-value]


def _on_gpu(function: F) -> F:
    """Return the function, on ZeroGPU with a GPU while it runs."""
    return spaces.GPU(function) if spaces else function
