"""A language model from the Hub or a folder, loaded once, that streams its text."""

from __future__ import annotations

try:
    import spaces  # on ZeroGPU, where it must come before torch
except ImportError:
    spaces = None

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)

from card import Card
from cpu_generation import TEXT, TIMED_PARAMETERS, cache_options, formats_by_speed, loaded_dtype, prepare, time_formats
from model_source import ModelUnavailableError, fetch, formats_that_fit, free_memory, parameter_count

logger = logging.getLogger(__name__)

MAX_SEED = 2**32 - 1
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.1, 2.0),
    "top_p": (0.05, 1.0),
    "top_k": (0, 500),
    "repetition_penalty": (1.0, 2.0),
    "max_new_tokens": (1, 512),
    "seed": (0, MAX_SEED),
}
MEASURED_SECONDS = 0.5
USUAL_SECONDS = 20  # of a reply of the usual length
USUAL_TOKENS = (48, 160)
REPLY_SECONDS = (60.0, 300.0)
GPU_START = 10  # seconds until ZeroGPU has moved the model to the GPU
GPU_TOKENS_PER_SECOND = 20  # what a GPU writes at least
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

    On a CPU it is given the number format that this machine reads fastest, and its speed is measured.

    Args:
        model_id: A folder, or a repository on the Hub: user/name or user/name@revision.
        answers: Whether it answers messages or continues text (default: as its card says).

    Attributes:
        number_format: float32, bfloat16 or int8; on a GPU the stored one.
        tokens_per_second: How fast it writes on this CPU; None on a GPU, which is not there before a reply.

    Raises:
        ModelUnavailableError: it is not there, or too large for this machine; the message is for visitors.
        OSError, ValueError: it cannot be loaded.
    """

    def __init__(self, model_id: str, answers: bool | None = None) -> None:
        self.id = model_id
        self.folder = fetch(model_id)
        self.card = Card(self.folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=True)
        self.model, self.number_format = self._load_on_gpu() if self.device == "cuda" else self._load_on_cpu()
        self.tokens_per_second = self._measured() if self.device == "cpu" else None
        is_chat_model = self.tokenizer.chat_template is not None and self.card.is_conversational
        self.answers = is_chat_model if answers is None else answers
        self.write = _on_gpu(self._write)

    def _load_on_gpu(self) -> tuple[PreTrainedModel, str]:
        model = self._loaded("auto").to(self.device)  # type: ignore[arg-type]
        return model, str(model.dtype).removeprefix("torch.")

    def _load_on_cpu(self) -> tuple[PreTrainedModel, str]:
        """Load it in the fastest format that fits into memory and writes as well as the others."""
        parameters = parameter_count(self.folder)
        timed = time_formats() if parameters >= TIMED_PARAMETERS else {}
        fitting = formats_that_fit(self.id, parameters, free_memory())
        wanted = [name for name in formats_by_speed(parameters, timed) if name in fitting]
        text: list[int] = self.tokenizer(TEXT)["input_ids"]
        for number_format in dict.fromkeys([*wanted, *fitting]):
            model = self._loaded(loaded_dtype(number_format))
            if prepare(model, number_format, text[: model.config.max_position_embeddings]):
                return model, number_format
            del model  # before another is loaded
            logger.warning("%s: int8 would raise its loss by more than 1 %%", self.id)
        raise ModelUnavailableError(f"{self.id} writes badly in int8, and there is no memory for another format here")

    def _loaded(self, dtype: Any) -> PreTrainedModel:
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, trust_remote_code=True)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def _measured(self) -> float:
        """Return the tokens that it writes in a second, from half a second's trial."""
        watch = _Watch(seconds=MEASURED_SECONDS)
        self._generate(self.tokenizer(TEXT)["input_ids"][:16], watch, max_new_tokens=32, min_new_tokens=32)
        return watch.tokens_per_second

    @property
    def reply_tokens(self) -> int:
        """Return the usual length of a reply: what it writes in `USUAL_SECONDS`, within limits."""
        fitting = 16 * round(USUAL_SECONDS * (self.tokens_per_second or 1e6) / 16)
        return max(USUAL_TOKENS[0], min(USUAL_TOKENS[1], fitting))

    @property
    def reply_seconds(self) -> float:
        """Return a time limit for replies: half more than the longest one takes when nothing else runs."""
        longest = BOUNDS["max_new_tokens"][1]
        return max(REPLY_SECONDS[0], min(REPLY_SECONDS[1], 1.5 * (self.seconds_for(longest) or 0)))

    def seconds_for(self, tokens: float) -> float | None:
        """Return how long it writes a reply of so many tokens; None if its speed is not known."""
        return tokens / self.tokens_per_second if self.tokens_per_second else None

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
        writer = threading.Thread(target=self._reply, args=(ids, settings, streamer, watch, failures))
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

    def _reply(
        self,
        ids: Sequence[int],
        settings: Settings,
        streamer: TextIteratorStreamer,
        watch: _Watch,
        failures: list[Exception],
    ) -> None:
        """Generate into the streamer, which is always ended."""
        try:
            with _TURN:
                torch.manual_seed(int(settings.seed))
                self._generate(
                    ids, watch, streamer=streamer, max_new_tokens=int(settings.max_new_tokens), **settings.decoding()
                )
        except Exception as error:  # raised again in the thread that reads
            failures.append(error)
            streamer.end()

    @torch.inference_mode()
    def _generate(self, ids: Sequence[int], watch: _Watch, **options: Any) -> None:
        prompt = torch.tensor([list(ids)], device=self.device)
        self.model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            stopping_criteria=[watch],
            **cache_options(self.model),
            **options,
        )


class _Watch(StoppingCriteria):
    """A stopping criterion that counts tokens, and ends on request or at the time limit."""

    def __init__(self, seconds: float) -> None:
        self.stopped, self.tokens, self.out_of_time = threading.Event(), 0, False
        self._seconds, self._times = seconds, [time.perf_counter()]  # of the start and of each token

    @property
    def tokens_per_second(self) -> float:
        """Return the rate after the first token, which the prompt belongs to."""
        first = self._times[1]
        return (self.tokens - 1) / (self._times[-1] - first)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        self.tokens += 1
        self._times.append(time.perf_counter())
        self.out_of_time = self._times[-1] - self._times[0] > self._seconds
        ends = self.stopped.is_set() or self.out_of_time
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)  # type: ignore[return-value]


def gpu_seconds(ids: Sequence[int], settings: Settings, seconds: float) -> int:
    """Return how long a reply of this length may hold a GPU: short requests wait less in the queue of ZeroGPU.

    Example:
        >>> gpu_seconds([1, 2, 3], Settings(max_new_tokens=160), seconds=60)
        18
    """
    return math.ceil(min(seconds, GPU_START + settings.max_new_tokens / GPU_TOKENS_PER_SECOND))


def _on_gpu(function: F) -> F:
    """Return the function, on ZeroGPU with a GPU while it runs."""
    return spaces.GPU(function, duration=gpu_seconds) if spaces else function
