"""Resume from the state that a run left on the Hub, on a machine that may have nothing of it."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.files import MANIFEST, integrity_error, sha256_of, write_atomically
from fgpt_hf.hub.state import BRANCH, RECORDS, FoundState, find_state
from fgpt_hf.runtime.distributed import from_main_process
from fgpt_hf.training.checkpoints import latest_valid_checkpoint, step_of
from fgpt_hf.training.continuation import changed_option, describe_change, require_resumable
from fgpt_hf.training.records import RECORD, parse_record, read_record
from fgpt_hf.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

HUB = "hub"
_ON_HUB = re.compile(r"[^/@]+/[^/@]+@[^@]+")


@dataclass
class HubResume:
    """What a run that starts finds of itself on the Hub.

    Attributes:
        found: the state that it resumes from, if that is on the Hub.
        writer_before: the start of the run that uploaded the state on the branch where this run keeps its own.
    """

    run: Run
    folder: RunFolder
    found: FoundState | None = None
    writer_before: str | None = None

    def fetch(self) -> Run:
        """Write the state to resume from into the run's folder, and return the run with that folder to resume from.

        It is the one that `resume_from_checkpoint` names; or for a run that keeps its state on the Hub, the newest one
        there, where the same command would resume from it on this machine.

        Raises:
            UserError: it is the state of another run, or not whole; or there is no such state.
        """
        own = self._own_state()
        self.writer_before = own.state.writer if own else None
        wanted = self.run.resume_from_checkpoint
        if wanted is not None and is_on_hub(wanted):
            return self._fetch_named(*wanted.rsplit("@", 1))
        if wanted == HUB:
            own = own or find_state(str(self.run.hub_model_id), BRANCH)
            self._fetch_newer(own)
            return replace(self.run, resume_from_checkpoint="latest")
        if wanted is None and own and self._folder_is_own():
            self._fetch_newer(own)
        return self.run

    def _own_state(self) -> FoundState | None:
        """Return the state on the branch that the run will upload to; UserError if it is another run's."""
        if not self.run.keeps_state_on_hub or self.run.overwrite_output_dir:
            return None
        own = find_state(str(self.run.hub_model_id), BRANCH)
        if own is None:
            return None
        if self.run.resume_from_checkpoint is not None:
            require_resumable(self.run, _record(own), own.name, "choose another hub_model_id")
        elif name := changed_option(self.run, _record(own)):
            resume = "" if name in self.run.fixed_on_resume() else "continue it with --resume_from_checkpoint hub, "
            raise UserError(
                f"{own.name} already holds a run, with {describe_change(name, self.run, _record(own))}: {resume}"
                "replace it with --overwrite_output_dir, or choose another --hub_model_id"
            )
        return own

    def _folder_is_own(self) -> bool:
        """Return whether the folder holds this run, or none; it refuses another one itself."""
        return not self.folder.record.is_file() or not changed_option(self.run, read_record(self.folder.record))

    def _fetch_named(self, repo_id: str, branch: str) -> Run:
        found = find_state(repo_id, branch)
        if found is None:
            raise UserError(
                f"resume_from_checkpoint={repo_id}@{branch}: there is no such state on the Hub, or this token may not "
                f"read it; --hub_strategy checkpoint keeps the newest one on the branch {BRANCH}"
            )
        self._fetch(found)
        return replace(self.run, resume_from_checkpoint=str(self.folder.checkpoints / found.state.checkpoint))

    def _fetch_newer(self, state: FoundState | None) -> None:
        """Fetch a state unless the folder holds one of a later step."""
        if state is None:
            return
        here = self._newest_here()
        if here and step_of(here) > state.state.step:
            logger.info("%s is newer than %s: the run resumes from it", here, state.name)
        else:
            self._fetch(state)

    def _newest_here(self) -> Path | None:
        try:
            return latest_valid_checkpoint(self.folder.checkpoints) if self.folder.record.is_file() else None
        except UserError:  # all are damaged
            return None

    def _fetch(self, state: FoundState) -> None:
        require_resumable(self.run, _record(state), state.name, "leave out resume_from_checkpoint")
        if self.folder.record.is_file():
            require_resumable(self.run, read_record(self.folder.record), str(self.folder.path))
        if not _holds(self.folder.checkpoints / state.state.checkpoint, state):
            state.download_checkpoint(self.folder.checkpoints, partial(self._write_records, state))
        self.found = state

    def _write_records(self, state: FoundState) -> None:
        for name, content in state.records.items():
            write_atomically(self.folder.path / name, content)


def is_on_hub(name: str) -> bool:
    """Return whether a name to resume from is that of a branch of a repo.

    Example:
        >>> is_on_hub("user/name@last-checkpoint"), is_on_hub("runs/mine/checkpoints/step_00000100")
        (True, False)
    """
    return _ON_HUB.fullmatch(name) is not None and not Path(name).exists()


def share_state(found: FoundState | None, folder: RunFolder, accelerator: Accelerator) -> None:
    """Download the checkpoint that the main process resumes from to the disks of other machines that lack it.

    Every process calls it; `found` is the main process's.
    """
    state = from_main_process(found)
    if state and accelerator.is_local_main_process and not _holds(folder.checkpoints / state.state.checkpoint, state):
        state.download_checkpoint(folder.checkpoints)
    accelerator.wait_for_everyone()


def _record(state: FoundState) -> Mapping[str, Any]:
    if RECORD not in state.records:
        raise UserError(f"{state.name} does not hold a whole state ({RECORDS}/{RECORD} is missing)")
    return parse_record(state.records[RECORD].decode(errors="replace"), f"{state.name}, {RECORDS}/{RECORD}")


def _holds(checkpoint: Path, state: FoundState) -> bool:
    """Return whether a folder holds the checkpoint of a state, whole."""
    manifest = checkpoint / MANIFEST
    is_same = manifest.is_file() and sha256_of(manifest) == state.state.hashes.get(MANIFEST)
    return is_same and integrity_error(checkpoint) is None
