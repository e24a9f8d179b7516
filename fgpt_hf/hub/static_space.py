"""Publish a page without a server: the model runs in the visitor's browser, through Transformers.js.

The page loads Transformers.js from a pinned address of jsDelivr, which all such pages share in a browser's cache, and
the model from the Space itself, so that the page and what it runs are one commit.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import SpaceCardData

from fgpt_hf.convert.export import write_onnx
from fgpt_hf.errors import UserError
from fgpt_hf.hub.front_matter import CARD
from fgpt_hf.hub.published_files import Content, Files
from fgpt_hf.hub.run_record import RunRecord, read_run_record
from fgpt_hf.hub.stage_record import HUB
from fgpt_hf.hub.upload import Destination, check_name, push_files
from fgpt_hf.model.io import context_length, load_model, model_folder

PAGE = Path(__file__).with_name("static_page")
MODEL = "model"  # the folder from which worker.js loads
MAX_PARAMETERS = 1_000_000_000  # a browser gives a page about 4 GB, of which a weight takes four bytes


def push_static_space(files: Files, space: str, model_repo: str, private: bool = False) -> str:
    """Publish the files of `static_space_files` as the Space `space`; return the URL of the commit.

    Raises:
        UserError: as `push_files`.
    """
    destination = Destination(repo_id=space, kind="space", sdk="static", private=private)
    return push_files(files, destination, f"Run {model_repo} in the browser")


@contextmanager
def static_space_files(model: Path, space: str, model_repo: str) -> Iterator[dict[str, Content]]:
    """Yield the files of the page by their path in the Space; they exist until the block ends.

    Raises:
        UserError: the Space's name cannot be a repo's; the folder holds no model, or one that is too large for a
            browser or that ONNX cannot express; the extra `export` is not installed.
    """
    check_name(space)
    record = read_run_record(model_folder(model))
    if record.is_adapter:
        raise UserError(f"{model} is an adapter: merge it with `fgpt export {model} FOLDER --format auto` first")
    network, tokenizer = load_model(str(record.model))
    if network.num_parameters() > MAX_PARAMETERS:
        raise UserError(
            f"{model} has {network.num_parameters() / 1e6:,.0f} million parameters, and a browser runs "
            f"{MAX_PARAMETERS / 1e6:,.0f} million at most: use --space, which runs it on a server"
        )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, MODEL)
        write_onnx(network, tokenizer, folder, int8=True)
        weights = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        settings = {
            "name": model_repo.rpartition("/")[2],
            "url": f"{HUB}/{model_repo}",
            "about": _about(record, network.num_parameters()),
            "answers": record.is_chat_model,
            "context": context_length(network, tokenizer),
            "megabytes": round(sum(path.stat().st_size for path in weights) / 1e6),
        }
        yield {
            **{path.name: path for path in sorted(PAGE.iterdir())},
            **{path.relative_to(scratch).as_posix(): path for path in weights},
            "settings.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
            CARD: _card(model_repo).encode(),
        }


def _about(record: RunRecord, parameters: int) -> str:
    kind = "A chat model" if record.is_chat_model else "A language model, which continues what you write,"
    return f"{kind} with {parameters:,} parameters. It does not know what is true: check whatever it says."


def _card(model_repo: str) -> str:
    name = model_repo.rpartition("/")[2]
    data = SpaceCardData(
        title=f"{name} in your browser",
        emoji="\N{SPEECH BALLOON}",
        colorFrom="indigo",
        colorTo="gray",
        sdk="static",
        app_file="index.html",
        pinned=False,
        models=[model_repo],
        short_description="A language model that runs in your browser",
    )
    text = (
        f"A page without a server: [{model_repo}]({HUB}/{model_repo}), with int8 weights in `{MODEL}/`, runs in the "
        "visitor's browser through Transformers.js. Nothing that a visitor writes leaves the device."
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {name} in your browser\n\n{text}\n"
