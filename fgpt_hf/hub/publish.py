"""What is published of a model: its files, its card, its run's figures, results and record."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from fgpt_hf.config.runs import Run
from fgpt_hf.convert.export import write_gpt2
from fgpt_hf.files import PARTIAL
from fgpt_hf.hub.card import CARD, card_of, write_card
from fgpt_hf.hub.card_results import result_files
from fgpt_hf.hub.card_sections import CardOptions, figure_files
from fgpt_hf.hub.run_record import RunRecord, read_facts
from fgpt_hf.hub.upload import Content, Destination, check_access, check_name, publishable, push_files, push_folder
from fgpt_hf.model.io import load_fgpt, model_folder
from fgpt_hf.training.run_folder import RunFolder


def publish(model: Path, destination: Destination, told: CardOptions) -> str:
    """Publish a model's folder, or a run's, with its card; returns the commit's URL.

    `told.stock` publishes the same network as a stock GPT-2.

    Raises:
        UserError: not a model's folder, or one whose files are damaged; what `push` refuses.
        OSError: the Hub could not be reached, or went on failing.
    """
    with files_to_publish(model, destination, told) as files:
        return push_files(files, destination, commit_message(read_facts(model_folder(model))))


@contextmanager
def files_to_publish(model: Path, destination: Destination, told: CardOptions) -> Iterator[dict[str, Content]]:
    """All files of a publication by their path in the repo; they exist until the block ends.

    Raises:
        UserError: not a model's folder, or not a name for a repo.
    """
    check_name(destination.repo_id)
    facts = read_facts(model_folder(model))
    is_stock = facts.config.get("model_type") == "gpt2"
    told = replace(told, repo_id=destination.repo_id, stock=told.stock or is_stock)
    beside: dict[str, Content] = {CARD: card_of(facts, told).encode(), **figure_files(facts), **result_files(facts)}
    beside |= record_files(facts)
    with TemporaryDirectory() as scratch:
        folder = facts.model
        if told.stock and not is_stock:
            folder = Path(scratch, "gpt2")
            write_gpt2(*load_fgpt(str(facts.model)), folder)
        yield publishable(folder) | beside


def record_files(facts: RunRecord) -> dict[str, bytes]:
    """What the run measured and wrote as it went on, which a Space shows; none of it names a path."""
    record = {"metrics.jsonl": facts.metrics, "samples.jsonl": facts.samples}
    return {
        name: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        for name, lines in record.items()
        if lines
    }


def listing(files: Mapping[str, Content]) -> str:
    """What would go, and how large it is."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(files)} files"])


def commit_message(facts: RunRecord) -> str:
    """Step, tokens and loss of the run, as far as they are known."""
    last = facts.last
    if "step" not in last:
        return "Publish the model"
    losses = {"eval_loss": "held-out loss", "loss": "training loss"}
    loss = next((f", {name} {last[key]:.3f}" for key, name in losses.items() if key in last), "")
    return f"Step {last['step']:,}: {last['tokens']:,} tokens{loss}"


class CheckpointUploader:
    """How the models of a run get to the Hub, where it says so: checkpoints as it goes on, and the finished model."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        """See that what is to be pushed can be, before the run begins; raises as `check_access` does."""
        self.run, self.folder = run, folder
        self.destination = Destination(repo_id=str(run.hub_model_id), private=run.hub_private_repo)
        self._on_its_way = Thread()
        if run.push_to_hub and folder.is_writer:
            check_access(self.destination.repo_id)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Begin to push a checkpoint, which may be deleted as soon as this returns. The run never waits for it.

        One that comes while another is still on its way is left out: the next one holds more.
        """
        if self.run.push_to_hub and self.folder.is_writer and not self._on_its_way.is_alive():
            scratch = TemporaryDirectory(dir=self.folder.path, suffix=PARTIAL)
            copy = Path(shutil.copytree(checkpoint, Path(scratch.name, checkpoint.name), copy_function=_link_or_copy))
            self._on_its_way = Thread(target=self._push, args=(copy, scratch), daemon=True)
            self._on_its_way.start()

    def finish(self, step: int) -> None:
        """Wait for what is on its way; give the model of a run that ended at `step` its card, and publish it if asked.

        A run that was stopped before its last step has no model yet, or an earlier one, which stays as it is.

        Raises:
            UserError, OSError: as `publish` does; the model is on the disk all the same.
        """
        if self._on_its_way.ident is not None:
            self._on_its_way.join()
        if not self.folder.is_writer or step < self.run.max_steps:
            return
        write_card(self.folder.model)
        if self.run.push_to_hub:
            print(f"published: {publish(self.folder.model, self.destination, CardOptions())}")

    def _push(self, checkpoint: Path, scratch: "TemporaryDirectory[str]") -> None:
        step = int(checkpoint.name.removeprefix("step_"))
        with scratch:
            try:
                push_folder(checkpoint, self.destination, f"Step {step:,}, while the run goes on")
            except (ValueError, OSError) as error:
                print(f"step {step} did not get to the Hub, and the run goes on: {error}")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
