"""The license of a model, as its card states it."""

from pathlib import Path

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def license_of(model: str) -> str | None:
    """Return the license that the card of a model states, in its folder or on the Hub; None if there is none.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "README.md").write_text("---\\nlicense: apache-2.0\\n---\\n# Base")
        >>> license_of(str(folder))
        'apache-2.0'
    """
    try:
        card = Path(model, REPOCARD_NAME) if Path(model).is_dir() else Path(hf_hub_download(model, REPOCARD_NAME))
        fields = metadata_load(card)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None  # without a card, or without a network
    found = (fields or {}).get("license")
    return found if isinstance(found, str) else None
