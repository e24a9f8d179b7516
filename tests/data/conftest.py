"""Settings of the data modules for a single test."""

from pathlib import Path

import pytest

from fgpt_hf.data import prepare, pretraining, stream


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of Hugging Face's libraries that nothing else uses."""
    for module in (pretraining, prepare):
        monkeypatch.setattr(module, "HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of no more documents than there must be."""
    monkeypatch.setattr(stream, "BUFFER_CHARACTERS", 0)
