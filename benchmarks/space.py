"""Measure the Space: time to start, memory, delay of the first words, and fifty visitors at once.

    python benchmarks/space.py [--model FOLDER]

serves a model (by default one of the quickstart's shape with random weights) and prints the seconds from process start
to the first answer, the resident memory, the delay of the first words in a real browser (Chromium, if installed) and
through the API, compared with `generate` for one new token in this process, and the answers that fifty concurrent
visitors get within a minute.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

APP = Path(__file__).parent.parent / "space" / "app.py"
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # for Chromium
PROMPT = "What is a tokenizer?"
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
            print(asyncio.run(crowd(space.url, visitors=50, seconds=options.seconds)))
            print(f"resident memory before {before:,.0f} MB, after {space.megabytes():,.0f} MB")


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    with (folder / "space.log").open("wb") as log:
        own = {**environment, "GRADIO_SERVER_PORT": str(port)}
        process = subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _answers(f"http://127.0.0.1:{port}/config"):
                if process.poll() is not None or time.perf_counter() - began > 120:
                    raise OSError(f"the Space did not start:\n{(folder / 'space.log').read_text('utf-8', 'replace')}")
                time.sleep(0.05)
            yield Served(f"http://127.0.0.1:{port}", process, time.perf_counter() - began)
        finally:
            process.terminate()
            process.wait()


@dataclass
class Crowd:
    """Counts of the answers that visitors got; `lost` requests got none."""

    replies: int = 0
    told_a_place: int = 0
    told_it_is_full: int = 0
    failures: int = 0
    lost: int = 0

    def __str__(self) -> str:
        return (
            f"crowd: {self.replies:,} replies, {self.told_a_place:,} times told a place in the queue, "
            f"{self.told_it_is_full:,} times that it is full, {self.failures} failures, {self.lost} lost"
        )


async def crowd(url: str, visitors: int, seconds: float) -> Crowd:
    """Let this many visitors, each with its own address, ask repeatedly for a number of seconds."""
    met, until = Crowd(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=2 * visitors)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        config = (await client.get("/config")).json()
        chat = next(event["id"] for event in config["dependencies"] if event["api_name"] == "chat")
        await asyncio.gather(*(_visit(client, chat, number, until, met) for number in range(visitors)))
    return met


async def _visit(client: httpx.AsyncClient, chat: int, number: int, until: float, met: Crowd) -> None:
    """Ask and wait for the reply, again and again; if the queue is full, retry after a second."""
    session, address = f"visitor{number}", {"X-Forwarded-For": f"9.0.0.{number}"}
    question = [PROMPT, [], "", 0.8, 0.95, 50, 1.1, 8, number, False]
    while time.monotonic() < until:
        body = {"data": question, "fn_index": chat, "session_hash": session}
        joined = await client.post("/gradio_api/queue/join", json=body, headers=address)
        if joined.status_code == 503:
            met.told_it_is_full += 1
            await asyncio.sleep(1)
        elif joined.is_success:
            await _wait(client, session, met)
        else:
            met.failures += 1


async def _wait(client: httpx.AsyncClient, session: str, met: Crowd) -> None:
    """Read the events of a request until its reply is complete."""
    placed = False
    async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
        async for line in events.aiter_lines():
            message: dict[str, Any] = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            placed = placed or "rank" in message or message.get("msg") == "process_starts"
            if message.get("msg") == "process_completed":
                met.told_a_place += placed
                met.replies += bool(message["success"])
                met.failures += not message["success"]
                return
    met.lost += 1


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
