"""Upload what a run saves while it trains: in the background, one upload at a time, never stopping the run."""

import logging
import os
import shlex
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from uuid import uuid4

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # imported lazily there

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError, first_line
from fgpt_hf.files import PARTIAL
from fgpt_hf.hub.card import write_card
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.publish import publish
from fgpt_hf.hub.state import OtherWriterError, StateBranch
from fgpt_hf.hub.upload import Destination, check_access, push_folder, require_write_access
from fgpt_hf.report.next_steps import fgpt_command
from fgpt_hf.training.checkpoints import step_of
from fgpt_hf.training.records import METRICS, RECORD, RESULTS, SAMPLES
from fgpt_hf.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint and the run's records as they were when it was written: later changes do not reach them.

    Attributes:
        checkpoint: a copy of the checkpoint, of hard links where the disk has them.
        records: the contents of the run's records by name.
        scratch: the folder of the copy.
    """

    checkpoint: Path
    records: dict[str, bytes]
    scratch: "TemporaryDirectory[str]"

    @classmethod
    def of(cls, checkpoint: Path, run_folder: Path) -> "Snapshot":
        """Copy a checkpoint and the run's records; raise OSError if they cannot be copied."""
        scratch = TemporaryDirectory(dir=run_folder, suffix=PARTIAL)
        copy = shutil.copytree(checkpoint, Path(scratch.name, checkpoint.name), copy_function=_link_or_copy)
        paths = [path for name in (RECORD, METRICS, SAMPLES, RESULTS) if (path := run_folder / name).is_file()]
        return cls(copy, {path.name: path.read_bytes() for path in paths}, scratch)

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)


class UploadQueue:
    """Uploads snapshots in a thread, one after the other; if too many wait, the oldest is dropped.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> queue = UploadQueue(lambda snapshot: print("uploading step", snapshot.step), most_waiting=1)
        >>> queue.put(Snapshot(Path("step_00000007"), {}, TemporaryDirectory()))
        >>> queue.join()
        uploading step 7
    """

    def __init__(self, upload: Callable[[Snapshot], None], most_waiting: int) -> None:
        self._upload, self._most_waiting = upload, most_waiting
        self._waiting: deque[Snapshot] = deque()
        self._lock, self._thread = Lock(), Thread()
        self._is_busy = False

    def put(self, snapshot: Snapshot) -> None:
        """Add a snapshot, which is deleted when it is uploaded, has failed, or is dropped; return at once."""
        with self._lock:
            self._waiting.append(snapshot)
            while len(self._waiting) > self._most_waiting:
                left_out = self._waiting.popleft()
                logger.info("the upload of step %d is skipped in favor of step %d", left_out.step, snapshot.step)
                left_out.scratch.cleanup()
            if not self._is_busy:
                self._is_busy = True
                self._thread = Thread(target=self._work, daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until nothing is left to upload."""
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while snapshot := self._next():
            with snapshot.scratch:
                self._upload(snapshot)

    def _next(self) -> Snapshot | None:
        with self._lock:
            self._is_busy = bool(self._waiting)
            return self._waiting.popleft() if self._waiting else None


class CheckpointUploader:
    """Uploads a run that asks for it: while it trains what `--hub_strategy` says, then the finished model."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        """Check that there is a token that may write, before anything else is done; raises as `check_access`."""
        self.run, self.folder = run, folder
        self.destination = Destination(repo_id=str(run.hub_model_id), private=run.hub_private_repo)
        self._states: StateBranch | None = None
        self._goes_on_elsewhere = False  # another start of the run uploads now
        self._queue = UploadQueue(self._upload, run.save_total_limit if run.hub_strategy == "all_checkpoints" else 1)
        if self._is_active:
            check_access(self.destination.repo_id)

    @property
    def _is_active(self) -> bool:
        return self.run.push_to_hub and self.folder.is_writer

    def begin(self, writer_before: str | None) -> None:
        """Make the repo ready, and try whether the token may write to it.

        Args:
            writer_before: which start of the run uploaded the state that this one resumes from, or replaces.

        Raises:
            UserError: as `require_write_access`.
        """
        if not self._is_active:
            return
        disable_progress_bars()  # they would break that of the training
        require_write_access(self.destination)
        if self.run.keeps_state_on_hub:
            own = uuid4().hex
            self._states = StateBranch(self.destination.repo_id, own, writer_before, self.run.overwrite_output_dir)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Upload a checkpoint, which may be deleted as soon as this returns; the run never waits for it.

        If an upload is still running, the newest checkpoint waits for its end, in place of one that waited before.
        """
        if not self._is_active or self._goes_on_elsewhere or self.run.hub_strategy == "end":
            return
        try:
            self._queue.put(Snapshot.of(checkpoint, self.folder.path))
        except OSError as error:
            logger.warning("%s cannot be copied for its upload; training continues: %s", checkpoint, error)

    def finish(self, is_complete: bool) -> None:
        """Wait for the uploads; write the card of a complete run's model, and publish it if asked.

        A run that was stopped before its last step has no model yet, or an earlier one, which stays unchanged.

        Raises:
            UserError: as `publish`, with the command that publishes the model later.
        """
        self._queue.join()
        if not self.folder.is_writer or not is_complete:
            return
        write_card(self.folder.model)
        if self.run.push_to_hub and not self._goes_on_elsewhere:
            try:
                logger.info("published: %s", publish(self.folder.model, self.destination, CardOptions()))
            except UserError as error:
                options = [shlex.quote(str(self.folder.path)), self.destination.repo_id]
                command = fgpt_command("publish", *options, *["--private"] * self.destination.private)
                raise UserError(f"{error}; the run is finished, and this publishes its model: {command}") from error

    def _upload(self, snapshot: Snapshot) -> None:
        """Upload a snapshot; an error of any kind is logged, because the run continues, and so do later uploads."""
        if self._goes_on_elsewhere:
            return
        try:
            self._push_state(snapshot)
            push_folder(snapshot.checkpoint, self.destination, f"Step {snapshot.step:,}, during training")
        except Exception as error:
            is_expected = isinstance(error, (UserError, OSError))
            problem = first_line(error) if is_expected else "an error that FGPT did not expect"
            text = "the checkpoint of step %d was not uploaded; training continues: %s"
            logger.warning(text, snapshot.step, problem, exc_info=not is_expected)

    def _push_state(self, snapshot: Snapshot) -> None:
        if self._states is None:
            return
        keep = snapshot.checkpoint.name if self.run.hub_strategy == "all_checkpoints" else None
        try:
            self._states.push(snapshot.checkpoint, snapshot.records, snapshot.step, keep)
        except OtherWriterError:
            self._goes_on_elsewhere = True
            raise


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
