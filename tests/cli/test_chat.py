"""`fgpt chat` in a terminal, from the command line and in a pipe."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest
from transformers import GenerationConfig

from fgpt_hf.cli import conversation
from fgpt_hf.cli.chat import answer_once
from fgpt_hf.cli.main import run
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID, build_tokenizer
from tests.support.tiny import random_model, save, taught_to_answer

CONTEXT = 8192  # at 3 ms a token a reply takes long enough to be stopped
PROMPT, SENT = (
    r"\x1b\[\?2004h",
    r"\x1b\[\?2004l",
)  # a terminal is told to mark pasted text at a prompt, and not to after it
COMMAND = [sys.executable, "-m", "fgpt_hf", "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a model that never ends a reply by itself."""
    model = taught_to_answer(random_model(max_position_embeddings=CONTEXT))
    model.generation_config = GenerationConfig(bos_token_id=END_OF_TEXT_ID, eos_token_id=[50303], pad_token_id=PAD_ID)
    folder = tmp_path_factory.mktemp("run")
    save(model, folder / "model")
    build_tokenizer(CONTEXT).save_pretrained(folder / "model")
    return folder


def answered(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    run(["chat", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


class Piped(io.TextIOWrapper):
    def __init__(self, octets: bytes) -> None:
        super().__init__(io.BytesIO(octets))


def test_a_pipe_gets_the_reply_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = answered(capsys, folder, "What is 2 + 2?", "--greedy", "--max_new_tokens=12")
    monkeypatch.setattr(sys, "stdin", Piped(b"What is 2 + 2?\n"))
    assert answered(capsys, folder, "--greedy", "--max_new_tokens=12") == given
    assert given.endswith("\n") and len(given) > 12 and "\x1b" not in given and ">" not in given


def test_the_message_may_stand_behind_the_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--greedy", "--max_new_tokens=8")
    assert answered(capsys, folder, *flags, "Hello") == answered(capsys, folder, "Hello", *flags)
    with pytest.raises(ValueError, match=r"unexpected extra argument\(s\) \(again\) \(fgpt chat --help explains\)"):
        run(["chat", str(folder), "Hello", *flags, "again"])


def test_bytes_that_are_no_text_are_answered_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(b"\xff\xfe caf\xe9\n"))
    assert answered(capsys, folder, "--max_new_tokens=4")


def test_a_seed_repeats_a_reply_and_another_does_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = [answered(capsys, folder, "Hello", f"--seed={seed}", "--max_new_tokens=12") for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--temperature=0.01"], ["--top_k=1"], ["--top_p=0.00001"], ["--top_k=1", "--temperature=9"]]
)
def test_decoding_without_choice_is_greedy(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    greedy = answered(capsys, folder, "Hello", "--greedy", "--max_new_tokens=12")
    assert answered(capsys, folder, "Hello", "--max_new_tokens=12", *flags) == greedy


def test_a_repetition_penalty_and_a_system_prompt_change_the_reply(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--greedy", "--max_new_tokens=12"]
    replies = {
        answered(capsys, folder, "Hello", *flags, *more)
        for more in ([], ["--repetition_penalty=5"], ["--system=You are terse."])
    }
    assert len(replies) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature=0"], "temperature=0.0 must be at least 1e-06"),
        (["--top_p=2"], "top_p=2.0 must be above zero and at most 1"),
        (["--greedy", "--top_k=5"], "greedy excludes top_k"),
        ([f"--max_new_tokens={CONTEXT}"], "leaves no room"),
        (["--max_new_tokens=0"], "max_new_tokens=0 must be above zero"),
        (["--temperature=nan"], "temperature=nan must be a finite number"),
        (["--seed=99999999999999999999"], "seed=99999999999999999999 must be zero or more and at most 4294967295"),
    ],
)
def test_options_that_cannot_be_are_refused(folder: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(["chat", str(folder), "Hello", *flags])


def test_nothing_to_answer_and_no_such_model_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", Piped(b" \n"))
    with pytest.raises(ValueError, match="nothing to answer"):
        run(["chat", str(folder)])
    with pytest.raises(ValueError, match="nothing to answer"):
        run(["chat", str(folder), ""])
    with pytest.raises(ValueError, match="no model 'nowhere/at-all'"):
        run(["chat", "nowhere/at-all", "Hello"])
    with pytest.raises(ValueError, match="neither the folder nor its model/ holds config.json"):
        run(["chat", str(tmp_path), "Hello"])


@pytest.mark.parametrize("template", [True, False])
def test_a_base_model_says_so_and_goes_on_from_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: bool
) -> None:
    base = save(random_model(), tmp_path / "base")
    if not template:
        (base / "chat_template.jinja").unlink()
    run(["chat", str(base), "Once upon", "--max_new_tokens=4"])
    captured = capsys.readouterr()
    assert captured.err == f"({base} was not trained to answer: it continues each text on its own.)\n"
    assert captured.out.strip()


def test_a_piped_text_keeps_its_indentation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[str] = []
    monkeypatch.setattr("fgpt_hf.cli.chat._start_session", lambda options: SimpleNamespace(answers=True))
    monkeypatch.setattr("fgpt_hf.cli.chat.answer_once", lambda session, message: answered.append(message))
    monkeypatch.setattr(sys, "stdin", Piped(b"\n    if x:\n        return\n\n"))
    run(["chat", str(folder)])
    assert answered == ["    if x:\n        return"]


@pytest.mark.parametrize(
    ("is_terminal", "shown"), [(True, "\N{REPLACEMENT CHARACTER}]0;owned"), (False, "\x1b]0;owned")]
)
def test_a_single_reply_steers_no_terminal_and_is_itself_in_a_pipe(
    is_terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(message: str, write: Callable[[str], None]) -> SimpleNamespace:
        write("\x1b]0;owned")
        return SimpleNamespace(stopped=False)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    session: Any = SimpleNamespace(answer=answer)
    answer_once(session, "Hi")
    assert capsys.readouterr().out == f"{shown}\n"


class Terminal:
    """The command in a terminal of its own, of a kind that does not tell where its cursor is."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.process = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], str(folder), *flags],
            encoding="utf-8",
            timeout=300,
            dimensions=(40, 200),
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
        )

    def sees(self, pattern: str) -> re.Match[str]:
        self.process.expect(pattern)
        match = self.process.match
        assert isinstance(match, re.Match)
        return match

    def types(self, line: str) -> None:
        self.process.send(f"{line}\r")

    def pastes(self, text: str) -> None:
        """Send a text as a terminal does when it is pasted, and press Enter."""
        self.types(f"\x1b[200~{text}\x1b[201~")

    def ends(self) -> int | None:
        """Wait for the end, without a traceback; return the exit code."""
        self.process.expect(pexpect.EOF)
        assert "Traceback" not in (self.process.before or "")
        self.process.close()
        status: int | None = self.process.exitstatus
        return status

    def interrupts(self, until: str) -> None:
        """Press Ctrl-C until the pattern is seen: one that comes just before the program waits for input is lost."""
        for _ in range(12):
            self.process.sendintr()
            if self.process.expect([until, pexpect.TIMEOUT], timeout=10) == 0:
                return
        raise AssertionError(f"Ctrl-C did not lead to {until!r}")


@pytest.mark.slow
def test_a_conversation_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C at the prompt, in a reply; each command; Ctrl-D."""
    terminal = Terminal(folder, "--greedy", f"--max_new_tokens={CONTEXT // 2}")
    terminal.sees(PROMPT)
    terminal.interrupts(until=PROMPT)
    terminal.types("Hello")
    terminal.sees(rf"{SENT}(.|\n)*\w+ ")
    terminal.interrupts(until=rf"\(stopped\)\r\n(.|\n)*{PROMPT}")
    terminal.types(f"/save {tmp_path / 'said.jsonl'}")
    terminal.sees(rf"\(saved: (.|\n)*{PROMPT}")
    messages = json.loads((tmp_path / "said.jsonl").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "Hello"}
    assert 0 < len(build_tokenizer().encode(messages[1]["content"])) < CONTEXT // 2
    for line, answer in {
        f"/save {tmp_path / 'said.jsonl'}": "not saved: .*File exists",
        "/save": "needs a name",
        "/nonsense": "unknown command /nonsense: /help",
        "/help": "Ctrl-C stops a reply",
        "/system Be brief.": "from now on",
        "/reset": "forgotten",
        f"/save {tmp_path / 'other.jsonl'}": "nothing has been said",
    }.items():
        terminal.types(line)
        terminal.sees(answer)
        terminal.sees(PROMPT)
    terminal.process.send("\x04")
    assert terminal.ends() == 0


@pytest.mark.slow
def test_a_pasted_text_of_several_lines_is_one_message_as_it_is(folder: Path, tmp_path: Path) -> None:
    pasted = "    def f(x):\n        if x:\n\n\t\treturn 'é'"
    terminal = Terminal(folder, "--max_new_tokens=2")
    terminal.sees(PROMPT)
    terminal.pastes(pasted.replace("\n", "\r"))  # as terminals send line ends
    terminal.sees(PROMPT)
    terminal.pastes("/usr/bin/env\r  a path, and no command")
    terminal.process.send("one\x1b\rtwo\r")  # Alt-Enter
    file = tmp_path / "said.jsonl"
    terminal.types(f"/save {file}")
    terminal.sees(r"\(saved")
    terminal.types("quit")
    assert terminal.ends() == 0
    users = [each["content"] for each in json.loads(file.read_text("utf-8"))["messages"] if each["role"] == "user"]
    assert users == [pasted, "/usr/bin/env\n  a path, and no command", "one\ntwo"]


@pytest.mark.slow
def test_a_base_model_writes_texts_and_a_dumb_terminal_has_plain_lines(tmp_path: Path) -> None:
    base = save(random_model(), tmp_path / "base")
    terminal = Terminal(base, "--max_new_tokens=2", TERM="dumb")
    terminal.sees(r"was not trained to answer(.|\n)*> ")
    terminal.types("Once upon")
    terminal.sees("> ")
    terminal.types("/system Be brief.")
    terminal.sees(r"\(the model was not trained to answer")
    terminal.types(f"/save {tmp_path / 'texts.jsonl'}")
    terminal.sees(r"\(saved")
    terminal.types("/exit")
    assert terminal.ends() == 0
    assert json.loads((tmp_path / "texts.jsonl").read_text("utf-8"))["text"].startswith("Once upon")


@pytest.mark.slow
def test_a_terminated_conversation_and_a_reader_that_leaves_end_cleanly(folder: Path) -> None:
    terminal = Terminal(folder)
    terminal.sees(PROMPT)
    terminal.process.kill(signal.SIGTERM)
    assert terminal.ends() == 128 + signal.SIGTERM

    reading, writing = os.pipe()
    child = subprocess.Popen([*COMMAND, str(folder), "Hello"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert os.read(reading, 1)
    os.close(reading)
    assert child.communicate(timeout=300)[1] == ""
    assert child.returncode == 0


def test_a_termination_within_a_task_of_the_prompt_ends_it_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt_toolkit = pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input

    async def load(history: object) -> AsyncIterator[str]:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        yield "an earlier message"

    monkeypatch.setattr("prompt_toolkit.history.History.load", load)
    monkeypatch.setattr(conversation, "is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        with (
            create_pipe_input() as keyboard,
            prompt_toolkit.application.create_app_session(input=keyboard),
            pytest.raises(SystemExit, match="143"),
        ):
            conversation._message_reader()()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caplog.records == []
