"""Measure the Space: time to start, memory, delay of the first words, crowds of visitors, and hostile ones.

    python benchmarks/space.py [--model FOLDER] [--seconds 60]

serves a model (by default one of the quickstart's shape with random weights) and prints the seconds from process start
to the first answer, the resident memory, the delay of the first words in a real browser (Chromium, if installed) and
through the API, compared with `generate` for one new token in this process, the answers that fifty concurrent visitors
get within a minute and then twenty programs, what becomes of 25 hostile messages, and which files the server gives.
"""

import argparse
import asyncio
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.space_visitors import (  # noqa: E402  # where this file runs as a script
    HOSTILE,
    PROMPT,
    TRAVERSALS,
    crowd,
    leaks,
    programs,
    send_hostile,
)

APP = Path(__file__).parent.parent / "space" / "app.py"
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # for Chromium
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Model folder to serve (default: random weights).")
    parser.add_argument("--seconds", type=float, default=60, help="Seconds that the visitors stay (default: 60).")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        model = options.model or random_model(Path(scratch, "model"))
        environment = {**os.environ, "MODEL_ID": str(model.resolve()), "MESSAGES_PER_MINUTE": "1000"}
        with serving([sys.executable, str(APP)], Path(scratch), environment) as space:
            print(f"ready after {space.seconds_to_ready:.1f} s; resident memory {space.megabytes():,.0f} MB")
            _print_delays(space, model)
            before = space.megabytes()
            print("50 visitors:", asyncio.run(crowd(space.url, visitors=50, seconds=options.seconds)))
            print("20 programs:", asyncio.run(programs(space.url, clients=20, seconds=options.seconds)))
            print(f"resident memory before {before:,.0f} MB, after {space.megabytes():,.0f} MB")
            outcomes = Counter(answer.kind for answer in send_hostile(space.url))
            print(f"{len(HOSTILE)} hostile messages:", ", ".join(f"{count} {kind}" for kind, count in outcomes.items()))
            given = [path for path in TRAVERSALS if leaks(space.url, path)]
            print(f"{len(TRAVERSALS)} paths to files that are not for visitors: {len(given)} given {given or ''}")
            log = Path(scratch, "space.log").read_text("utf-8", "replace")
            print("tracebacks in the log:", re.findall(r"^Traceback.*?\n(\S.*?)$", log, re.MULTILINE | re.DOTALL))


@dataclass(frozen=True)
class Served:
    """A running Space."""

    url: str
    process: "subprocess.Popen[bytes]"
    seconds_to_ready: float

    def megabytes(self) -> float:
        """Return the resident memory of its process."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


@contextmanager
def serving(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Served]:
    """Run a Space from the start of its process until the block ends; its log is `space.log` in the folder."""
    began = time.perf_counter()
    with socket.socket() as held, (folder / "space.log").open("wb") as log:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does, which may then listen there
        held.bind(("127.0.0.1", 0))  # until it does, nobody else gets the port
        port = held.getsockname()[1]
        own = {**environment, "GRADIO_SERVER_PORT": str(port)}
        process = subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _answers(f"http://127.0.0.1:{port}/config"):
                if process.poll() is not None or time.perf_counter() - began > 300:
                    raise OSError(f"the Space did not start:\n{(folder / 'space.log').read_text('utf-8', 'replace')}")
                time.sleep(0.05)
            yield Served(f"http://127.0.0.1:{port}", process, time.perf_counter() - began)
        finally:
            process.terminate()
            process.wait()


def _print_delays(space: Served, model: Path) -> None:
    """Print the median delay of the first words, compared with the model's own first token."""
    own = statistics.median(_own_first_token(model))
    delays = {"API": statistics.median(_timed(lambda: _first_piece(space.url)))}
    if shutil.which("chromium"):
        delays["page"] = statistics.median(_first_words_on_the_page(space.url))
    print(f"the model's own first token: {own * 1000:.0f} ms")
    for client, seconds in delays.items():
        later = (seconds - own) * 1000
        print(f"first words, {client}: {seconds * 1000:.0f} ms, {later:+.0f} ms, ratio {seconds / own:.1f}")


def _own_first_token(model: Path) -> Iterator[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    network = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).eval()
    question = [{"role": "user", "content": PROMPT}]

    def first_token() -> None:
        inputs: Any = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
        network.generate(**inputs, max_new_tokens=1)

    return _timed(first_token)


def _timed(action: Callable[[], object]) -> Iterator[float]:
    """Yield the seconds of each round, after one warm-up."""
    action()
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        yield time.perf_counter() - began


def _first_piece(url: str) -> None:
    """Ask through the API, and read until the first piece of the reply."""
    asked = httpx.post(f"{url}/gradio_api/call/chat", json={"data": [PROMPT, [], "", 0.8, 0.95, 50, 1.1, 8, 0, False]})
    with httpx.stream("GET", f"{url}/gradio_api/call/chat/{asked.json()['event_id']}", timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data: ["):
                return


def _first_words_on_the_page(url: str) -> Iterator[float]:
    """Yield the seconds from pressing Enter to the first words of the reply on the page."""
    from playwright.sync_api import sync_playwright

    watch = """() => new Promise(seen => {
        const words = () => document.querySelector('#chat [data-testid=bot] span.md')?.innerText.trim();
        const began = performance.now(), box = document.querySelector('#message textarea');
        const look = (_, watcher) => { if (words()) { watcher.disconnect(); seen(performance.now() - began); } };
        const changes = {childList: true, subtree: true, characterData: true};
        new MutationObserver(look).observe(document.querySelector('#chat'), changes);
        box.dispatchEvent(new KeyboardEvent('keypress', {key: 'Enter', bubbles: true}));
    })"""
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=[*CHROMIUM, OFFLINE])
        page = browser.new_page()
        for _ in range(ROUNDS):
            page.goto(url)
            page.get_by_text("Settings").first.wait_for()
            page.fill("#message textarea", PROMPT)
            yield page.evaluate(watch) / 1000
        browser.close()


def random_model(folder: Path) -> Path:
    """Save a model of the quickstart's shape with random weights."""
    from fgpt_hf import FGPTConfig, FGPTForCausalLM
    from fgpt_hf.tokenizer.tokenizer import build_tokenizer

    shape: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    FGPTForCausalLM(FGPTConfig(**shape)).save_pretrained(folder)
    build_tokenizer(256).save_pretrained(folder)
    return folder


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
