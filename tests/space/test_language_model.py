"""The Space's model: found or refused in words, in the format that fits and is fastest, with its speed known."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import language_model
import model_source
from cpu_generation import available_formats
from language_model import LanguageModel, Settings
from model_source import ModelUnavailableError, fetch, formats_that_fit, free_memory, parameter_count
from tests.support.hub_here import server  # noqa: F401  -- a fixture
from tests.support.loopback_hub import LoopbackHub
from tests.support.tiny import random_model, save

int8 = pytest.mark.skipif("int8" not in available_formats(), reason="needs oneDNN's int8 products")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(), tmp_path_factory.mktemp("model"))


def large(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Let the tiny model count as one above all limits, on a machine where the formats take these times."""
    monkeypatch.setattr(language_model, "TIMED_PARAMETERS", 0)
    monkeypatch.setattr("cpu_generation.TIMED_PARAMETERS", 0)
    monkeypatch.setattr("cpu_generation.INT8_PARAMETERS", 0)
    monkeypatch.setattr(language_model, "time_formats", lambda: seconds)


# The format


def test_a_small_model_is_served_in_float32_and_nothing_is_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "time_formats", lambda: 1 / 0)
    assert LanguageModel(str(folder)).number_format == "float32"


@int8
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"float32": 4, "bfloat16": 2, "int8": 1}, "int8"),
        ({"float32": 4, "bfloat16": 1, "int8": 2}, "bfloat16"),
        ({"float32": 4, "bfloat16": 9, "int8": 8}, "float32"),
    ],
)
def test_a_large_model_is_served_in_the_fastest_format(
    seconds: dict[str, float], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(monkeypatch, **seconds)
    model = LanguageModel(str(folder))
    assert model.number_format == expected
    settings = Settings(greedy=True, max_new_tokens=8)
    *_, last = model.write([11, 12, 13], settings, 60)
    prompt = torch.tensor([[11, 12, 13]])
    plain = model.model.generate(prompt, max_new_tokens=8, **settings.decoding())  # type: ignore[operator]
    assert last.text == model.tokenizer.decode(plain[0, 3:], skip_special_tokens=True)


def test_int8_that_writes_worse_gives_way_to_the_next_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch, float32=4, bfloat16=2, int8=1)
    tried: list[str] = []

    def prepare(model: torch.nn.Module, number_format: str, text: list[int]) -> bool:
        tried.append(number_format)
        return number_format != "int8"

    monkeypatch.setattr(language_model, "prepare", prepare)
    assert LanguageModel(str(folder)).number_format == "bfloat16"
    assert tried == ["int8", "bfloat16"]
    monkeypatch.setattr(language_model, "formats_that_fit", lambda *_: ["int8"])
    with pytest.raises(ModelUnavailableError, match="no memory for another format"):
        LanguageModel(str(folder))


# Memory


@pytest.mark.parametrize(("free", "formats"), [(16e9, ["float32", "bfloat16", "int8"]), (2e9, ["bfloat16", "int8"])])
def test_a_format_serves_if_its_loading_fits_into_memory(free: float, formats: list[str]) -> None:
    assert formats_that_fit("user/name", 712_000_000, free) == formats


def test_a_model_that_is_too_large_is_refused_before_it_is_loaded_with_what_would_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("language_model.AutoModelForCausalLM.from_pretrained", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(language_model, "parameter_count", lambda _: 7_000_000_000)
    monkeypatch.setattr(language_model, "time_formats", lambda: {"float32": 1.0})
    monkeypatch.setattr(language_model, "free_memory", lambda: 3.5e9)
    with pytest.raises(ModelUnavailableError) as refused:
        LanguageModel(str(folder))
    assert "7,000 million parameters need 14.5 GB of memory, and 3.5 GB are free" in str(refused.value)
    assert "A model of 1,500 million parameters would fit" in str(refused.value)


def test_the_parameters_are_counted_without_loading_them(folder: Path) -> None:
    assert parameter_count(folder) == random_model().num_parameters()


@pytest.mark.parametrize("version", ["memory.{}", "memory/memory.{}_in_bytes"])
def test_the_free_memory_of_a_container_is_what_its_limit_leaves(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_source, "CGROUP", tmp_path)
    assert free_memory() > 1e6
    names = ("max", "current") if version == "memory.{}" else ("limit", "usage")
    (tmp_path / "memory").mkdir()
    for name, value in zip(names, ("100000", "70000"), strict=True):
        (tmp_path / version.format(name)).write_text(f"{value}\n")
    (tmp_path / version.format("x")).with_name("memory.stat").write_text("anon 5\ninactive_file 20000\n")
    assert free_memory() == 50_000
    (tmp_path / version.format(names[0])).write_text("max\n" if names[0] == "max" else f"{2**63}\n")
    assert free_memory() > 1e6


# Its speed


def test_its_speed_is_measured_and_decides_the_usual_length_and_the_time_for_a_reply(folder: Path) -> None:
    model = LanguageModel(str(folder))
    assert model.tokens_per_second and model.tokens_per_second > 1
    for speed, tokens, seconds in ((1.35, 48, 300), (4.6, 96, 167), (8.0, 160, 96), (100.0, 160, 60), (None, 160, 60)):
        model.tokens_per_second = speed
        assert (model.reply_tokens, round(model.reply_seconds)) == (tokens, seconds)
    assert model.seconds_for(160) is None
    model.tokens_per_second = 8.0
    assert model.seconds_for(160) == 20


def test_on_zerogpu_a_reply_holds_the_gpu_for_the_length_that_it_was_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def gpu(function: Callable[..., Iterator[Any]], duration: Callable[..., int]) -> Callable[..., Iterator[Any]]:
        """Stand in for `spaces.GPU`, which asks `duration` with the arguments of each call."""

        def with_gpu(*arguments: Any) -> Iterator[Any]:
            held.append(duration(*arguments))
            yield from function(*arguments)

        return with_gpu

    monkeypatch.setattr(language_model, "spaces", SimpleNamespace(GPU=gpu))
    model = LanguageModel(str(folder))
    for tokens, seconds in ((1, 60.0), (160, 60.0), (512, 60.0), (512, 12.0)):
        next(model.write([11, 12], Settings(greedy=True, max_new_tokens=tokens), seconds))
    assert held == [11, 18, 36, 12]


# Names


def test_what_cannot_be_found_is_said_in_a_sentence(
    server: LoopbackHub,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add_repo("model", "tester/public", folder)
    server.add_repo("model", "other/secret", folder, private=True)
    assert parameter_count(fetch("tester/public")) == parameter_count(fetch("tester/public@main"))
    for name, words in {
        "tester/public@v9": "tester/public has no revision 'v9': name a branch, tag or commit",
        "other/secret": "the Hub shows no model other/secret: .*the one in HF_TOKEN does not",
        "tester/none": "the Hub shows no model tester/none",
        "a/b/c": "'a/b/c' is no folder here and no user/name on the Hub",
    }.items():
        with pytest.raises(ModelUnavailableError, match=words):
            fetch(name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelUnavailableError, match="private and needs a token .*set the secret HF_TOKEN to one"):
        fetch("other/secret")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailableError, match=r"empty holds no readable \*.safetensors"):
        parameter_count(tmp_path / "empty")
