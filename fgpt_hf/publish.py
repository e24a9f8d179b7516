"""What is published of a model: its files, its card, its run's figures and results."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fgpt_hf.card import CARD, card_of, write_card
from fgpt_hf.card_results import result_files
from fgpt_hf.card_sections import Told, figure_files
from fgpt_hf.facts import Facts, read_facts
from fgpt_hf.folders import RunFolder, model_folder
from fgpt_hf.hub import Content, Destination, check_access, check_name, publishable, push
from fgpt_hf.interop import load, write_gpt2
from fgpt_hf.runs import Run


def publish(model: Path, destination: Destination, told: Told) -> str:
    """Publish a model's folder, or a run's, with its card; returns the commit's URL.

    `told.stock` publishes the same network as a stock GPT-2.

    Raises:
        ValueError: not a model's folder, or one whose files are damaged; what `push` refuses.
        OSError: the Hub could not be reached, or went on failing.
    """
    with files_to_publish(model, destination, told) as files:
        return push(files, destination, commit_message(read_facts(model_folder(model))))


@contextmanager
def files_to_publish(model: Path, destination: Destination, told: Told) -> Iterator[dict[str, Content]]:
    """All files of a publication by their path in the repo; they exist until the block ends.

    Raises:
        ValueError: not a model's folder, or not a name for a repo.
    """
    check_name(destination.repo_id)
    facts = read_facts(model_folder(model))
    is_stock = facts.config.get("model_type") == "gpt2"
    told = replace(told, repo_id=destination.repo_id, stock=told.stock or is_stock)
    beside: dict[str, Content] = {CARD: card_of(facts, told).encode(), **figure_files(facts), **result_files(facts)}
    with TemporaryDirectory() as scratch:
        folder = facts.model
        if told.stock and not is_stock:
            folder = Path(scratch, "gpt2")
            write_gpt2(*load(str(facts.model)), folder)
        yield publishable(folder) | beside


def listing(files: Mapping[str, Content]) -> str:
    """What would go, and how large it is."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(files)} files"])


def commit_message(facts: Facts) -> str:
    """Step, tokens and loss of the run, as far as they are known."""
    last = facts.last
    if "step" not in last:
        return "Publish the model"
    losses = {"eval_loss": "held-out loss", "loss": "training loss"}
    loss = next((f", {name} {last[key]:.3f}" for key, name in losses.items() if key in last), "")
    return f"Step {last['step']:,}: {last['tokens']:,} tokens{loss}"


def check_delivery(run: Run, folder: RunFolder) -> None:
    """See that a run that is to be pushed can be, before it begins; raises as `check_access` does."""
    if run.push_to_hub and folder.is_writer:
        check_access(str(run.hub_model_id))


def deliver(run: Run, folder: RunFolder) -> None:
    """Give a finished run's model its card, and publish it if the run says so; nothing for one that was stopped.

    Raises:
        ValueError, OSError: as `publish` does; the model is on the disk all the same.
    """
    if not folder.is_writer or not folder.model.is_dir():
        return
    write_card(folder.model)
    if run.push_to_hub:
        destination = Destination(repo_id=str(run.hub_model_id), private=run.hub_private_repo)
        print(f"published: {publish(folder.model, destination, Told())}")
