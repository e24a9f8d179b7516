"""A loopback Hub that the test's own process takes for the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.support.loopback_hub import WRITE_TOKEN, LoopbackHub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this very process takes for the Hub, and no time lost in waiting."""
    with hub_here(tmp_path, monkeypatch) as server:
        yield server


@contextmanager
def hub_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The same, with its caches in `folder`, until the block ends or the patches are undone."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which keeps the address of its first use
        monkeypatch.setattr("fgpt_hf.retries.FIRST_WAIT_SECONDS", 0.0)
        yield server
