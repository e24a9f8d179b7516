"""Publish the Space of a model: the files of `space/`, with the model's name and commit in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import SpaceCard

from fgpt_hf.errors import UserError
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.front_matter import CARD
from fgpt_hf.hub.publish import publish
from fgpt_hf.hub.published_files import Content
from fgpt_hf.hub.run_record import read_run_record
from fgpt_hf.hub.upload import Destination, PinnedModel, check_name, make_ready, pin_model, push_files
from fgpt_hf.model.io import model_folder

# Of an installed package, into which setup.py puts them; of a clone.
SOURCES = (Path(__file__).with_name("space_files"), Path(__file__).parents[2] / "space")
PATTERNS = ("*.py", "*.css", "*.js", "*.txt", CARD)
MODELS = "models.json"
VARIABLES = ("MODEL_ID", "BASE_MODEL_ID")  # what `space/app.py` reads, in this order


def publish_with_space(model: Path, destination: Destination, options: CardOptions) -> tuple[str, str]:
    """Publish a model, then the Space `options.space` that serves this very commit; return the URLs of both commits.

    The Space also shows the model on the Hub from which this one was trained, if that is known.

    Raises:
        UserError: as `publish`; the base model is not on the Hub; the Space's files are missing.
        OSError: as `publish`.
    """
    space = Destination(repo_id=str(options.space), kind="space", private=destination.private)
    check_name(space.repo_id)
    base = [pin_model(name) for name in _base_models(model, options)]
    source_files()
    make_ready(destination)
    make_ready(space)  # first, so that no card names a Space that the Hub refuses
    url = publish(model, destination, options)
    models = [pin_model(destination.repo_id, destination.revision), *base]
    return url, push_files(space_files(models), space, f"Serve {destination.repo_id} at {models[0].commit[:8]}")


def planned_files(
    model: Path, destination: Destination, options: CardOptions, files: Mapping[str, Content]
) -> dict[str, Content]:
    """Return the Space's files for a model that is not published yet, without asking the Hub.

    Args:
        files: the model's files. Its commit, which the Hub has not named yet, is a row of zeros.

    Raises:
        UserError: the Space's name cannot be a repo's; the Space's files are missing.
    """
    check_name(str(options.space))
    weights = tuple(name for name in files if name.endswith(".safetensors"))
    return space_files(
        [PinnedModel(name, "0" * 40, weights) for name in (destination.repo_id, *_base_models(model, options))]
    )


def space_files(models: Sequence[PinnedModel]) -> dict[str, Content]:
    r"""Return the files of a Space that serves the first model, and compares it with the second if there is one.

    Example:
        >>> files = space_files([PinnedModel("user/name", "0123abcd", ("model.safetensors",))])
        >>> files["models.json"]
        b'{\n  "MODEL_ID": "user/name@0123abcd"\n}\n'
    """
    files: dict[str, Content] = dict(source_files())
    names = {name: f"{model.repo_id}@{model.commit}" for name, model in zip(VARIABLES, models, strict=False)}
    return files | {MODELS: (json.dumps(names, indent=2) + "\n").encode(), CARD: _card(models).encode()}


def source_files() -> dict[str, Path]:
    """Return the files of `space/` by name.

    Raises:
        UserError: the package lacks them.
    """
    for folder in SOURCES:
        if files := [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]:
            return {path.name: path for path in files}
    raise UserError(f"the Space's files are missing from {SOURCES[0]}: install fgpt-hf again")


def _base_models(model: Path, options: CardOptions) -> list[str]:
    """Return the name on the Hub of the model that this one was trained from, if it is known."""
    stage = read_run_record(model_folder(model)).stage
    name = options.base_model or (stage.base_model if stage else None)
    return [name] if name else []


def _card(models: Sequence[PinnedModel]) -> str:
    """Return the Space's README, which names its models to the Hub and to readers."""
    card = SpaceCard(source_files()[CARD].read_text(encoding="utf-8"))
    card.data["title"] = models[0].repo_id.rpartition("/")[2]
    card.data["models"] = [served.repo_id for served in models]
    card.data["preload_from_hub"] = [
        f"{served.repo_id} {','.join(served.weights)} {served.commit}" for served in models
    ]
    links = [f"[{served.repo_id}](https://huggingface.co/{served.repo_id}) at `{served.commit}`" for served in models]
    compared = f", beside its base model {links[1]}" if len(links) > 1 else ""
    card.text = f"{card.text.rstrip()}\n\nIt serves {links[0]}{compared}.\n"
    return str(card)
