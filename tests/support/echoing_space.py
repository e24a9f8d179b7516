"""Run `space/app.py` with a model that repeats each message as its reply: what it writes is what a test sent.

Words come one after the other, as many as the longest reply may have. A message that begins with "on and on" is
repeated until the limit, and one that begins with "fail" makes the model fail.
"""

import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import app
import language_model
from language_model import LanguageModel, Progress, Settings

SECONDS_PER_WORD = 0.02
SECONDS_PER_ENDLESS_WORD = 0.1


def echo(model: LanguageModel, ids: Sequence[int], settings: Settings, seconds: float) -> Iterator[Progress]:
    """Write the last message again, word by word."""
    prompt = model.tokenizer.decode(list(ids))
    message = prompt.rpartition("<|user|>\n")[2].partition("<|end|>")[0] if model.answers else prompt
    message = message.removeprefix("<|endoftext|>")
    if message.startswith("fail"):
        raise RuntimeError("a secret in /home/user")
    words = re.findall(r"\s*\S+", message)
    is_endless = message.startswith("on and on")
    text, began = "", time.perf_counter()
    written = itertools.islice(itertools.cycle(words) if is_endless else words, int(settings.max_new_tokens))
    for number, word in enumerate(written, start=1):
        time.sleep(SECONDS_PER_ENDLESS_WORD if is_endless else SECONDS_PER_WORD)
        text += word
        yield Progress(text, number, time.perf_counter() - began)


if __name__ == "__main__":
    language_model.LanguageModel._write = echo  # type: ignore[method-assign, assignment]
    app.main()
