"""The corpus that all disturbed runs read, what each leaves undisturbed, and a count of the faults at the end."""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic

import pytest

from tests.faults.runs import LONG, NETWORK, SEED, Case, Disturbed, caches_of, count_changes
from tests.support.fineweb import documents, write_shards
from tests.support.forked import run_command
from tests.support.messages import say
from tests.support.tiny import random_model, save


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, prepared rows, conversations, pairs and a model to tune, all small."""
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "documents", shards=3, texts=40, row_group_size=10)
    texts = documents(60, seed=9, most_words=12)
    chats = [{"messages": say(text, f"Réponse {number}…")} for number, text in enumerate(texts)]
    pairs = [{"prompt": text, "chosen": f"{number}", "rejected": f"no {number}"} for number, text in enumerate(texts)]
    choices = [{"context": text, "endings": [text, "no", "yes", "7"], "label": 0} for text in texts[:8]]
    for name, rows in (("chats", chats), ("pairs", pairs), ("choices", choices)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    save(random_model(), folder / "model")
    length = f"--max_position_embeddings={NETWORK['max_position_embeddings']}"
    command = ("fgpt", "prepare", f"--dataset_name={folder / 'documents'}", f"--output_dir={folder / 'rows'}", length)
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    return folder


class Undisturbed:
    """An undisturbed run: its folder, the seconds that it took, and the number of times that it changed a file."""

    def __init__(self, case: Case, corpus: Path, folder: Path) -> None:
        counter = folder.with_name(f"{folder.name}-changes")
        began = monotonic()
        watched = (str(folder), str(caches_of(folder)))
        Disturbed(case, corpus, folder, fault=partial(count_changes, str(counter), watched)).succeed()
        self.folder, self.seconds = folder, monotonic() - began
        self.changes = counter.stat().st_size // case.processes


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Undisturbed]:
    """A function that returns a case's undisturbed run, made once."""
    runs: dict[str, Undisturbed] = {}

    def get(case: Case) -> Undisturbed:
        if case.name not in runs:
            runs[case.name] = Undisturbed(case, corpus, tmp_path_factory.mktemp("undisturbed") / "run")
        return runs[case.name]

    return get


Tally = Callable[[str], None]


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """A function that counts one fault of a kind."""
    return lambda fault: record_property("fault", fault)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder as slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


def pytest_report_header() -> str:
    return f"faults: the {'long' if LONG else 'short'} form, seed {SEED} (FGPT_FAULTS=long, FGPT_FAULTS_SEED)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many faults of each kind were tried."""
    tries: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, fault in report.user_properties:
                if name == "fault" and report.when == "call":
                    tries[str(fault)][outcome == "failed"] += 1
    if tries:
        terminalreporter.section("faults")
        for fault, (good, bad) in sorted(tries.items()):
            terminalreporter.line(f"{fault}: {good + bad} tries{f', {bad} in tests that failed' if bad else ''}")
