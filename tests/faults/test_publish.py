"""`fgpt publish`, killed at random moments: a repo holds all of the old files or all of the new ones."""

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from huggingface_hub import constants

from fgpt_hf.cli.entry_point import command_line
from fgpt_hf.cli.main import run as run_fgpt
from fgpt_hf.model.io import save_model
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from tests.faults.conftest import Tally
from tests.faults.runs import LONG, SEED
from tests.support.forked import Forked
from tests.support.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.support.run_folders import tiny_model, write_run

KILLS = 16 if LONG else 2
REPO, SPACE = "tester/tiny", "tester/tiny-chat"
State = tuple[dict[str, bytes], dict[str, bytes]]


@pytest.mark.timeout(3600)
def test_a_killed_publication_moves_nothing_or_all_and_the_next_one_completes(tmp_path: Path, tally: Tally) -> None:
    """Of the model and its Space, each in a commit of its own."""
    chance = Random(f"{SEED} publish")
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    model = tiny_model()
    torch.nn.init.ones_(model.get_input_embeddings().weight)
    save_model(model, build_tokenizer(64), new / "model")
    with LoopbackHub() as server:
        publish(server, old, tmp_path).wait()
        before = state(server)
        requests = len(server.requests)
        done = publish(server, new, tmp_path).wait()
        assert done.returncode == 0, done.stderr
        after, requests = state(server), len(server.requests) - requests
    assert before[0] != after[0]
    for _ in range(KILLS):
        with LoopbackHub() as server:
            assert publish(server, old, tmp_path).wait().returncode == 0
            number = chance.randint(1, requests)
            print(f"fgpt publish: killed at request {number} of {requests}")
            if kill_at(server, len(server.requests) + number, publish(server, new, tmp_path), chance):
                tally("kill: fgpt publish")
            assert all(files in pair for files, *pair in zip(state(server), before, after, strict=True))
            done = publish(server, new, tmp_path).wait()
            assert done.returncode == 0, done.stderr
            assert state(server) == after


def publish(server: LoopbackHub, run: Path, logs: Path) -> Forked:
    arguments = ["publish", str(run), REPO, "--space", SPACE]
    return Forked(partial(_publish, server.url), arguments, logs, name=str(time.time_ns()))


def kill_at(server: LoopbackHub, requests: int, publication: Forked, chance: Random) -> bool:
    """Kill a publication soon after the server has seen so many requests; return whether it was still running."""
    while len(server.requests) < requests and publication.returncode is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))
    publication.process.kill()
    return publication.wait().returncode == -9


def state(server: LoopbackHub) -> State:
    """Return the files of the model and of the Space."""
    return server.repo("model", REPO).files(), server.repo("space", SPACE).files()


def _publish(url: str, arguments: Sequence[str]) -> None:
    template = "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + template, "HF_HUB_DISABLE_XET": True}
    for name, value in values.items():
        setattr(constants, name, value)
    os.environ["HF_TOKEN"] = WRITE_TOKEN
    sys.argv = ["fgpt", *arguments]
    command_line(run_fgpt)
