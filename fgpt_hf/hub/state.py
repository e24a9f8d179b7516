"""The whole state of a run on a branch of its model's repo: upload it, find it, and download it again.

The branch holds the files of one checkpoint at its root, so that `from_pretrained` loads the model from it; the run's
records in `run/`; and `state.json`, which says of which step they are. Each state is one commit, which replaces the one
before, and the history is squashed: a reader sees one whole state or another, and the branch does not grow.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from fgpt_hf.errors import UserError, first_line
from fgpt_hf.files import (
    MANIFEST,
    atomic_directory,
    integrity_error,
    read_sealed_json,
    remove,
    sealed_json,
    sha256_of,
)
from fgpt_hf.hub.upload import check_name, plain_errors
from fgpt_hf.parsing import as_type
from fgpt_hf.retries import STREAM, retry
from fgpt_hf.training.checkpoints import checkpoint_name

logger = logging.getLogger(__name__)

BRANCH = "last-checkpoint"  # as transformers calls the folder that it pushes
STATE = "state.json"
RECORDS = "run"
KEPT = ".gitattributes"  # the one file of the branch that is not the run's
START_AGAIN = "start the same command again when it can be reached"
DOWNLOADS = 8  # at a time


@dataclass(frozen=True)
class State:
    """What `state.json` says of the state on a branch.

    Attributes:
        step: the optimizer steps taken.
        writer: the start of the run that uploaded it.
        hashes: the SHA-256 of the files that the checkpoint's manifest does not list: its own, and the run's records.
    """

    step: int
    writer: str
    hashes: Mapping[str, str]

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint's folder in the run's."""
        return checkpoint_name(self.step)


@dataclass(frozen=True)
class FoundState:
    """The state on a branch at one commit.

    Attributes:
        files: the paths in the repo at that commit.
    """

    repo_id: str
    branch: str
    commit: str
    files: tuple[str, ...]
    state: State

    @property
    def name(self) -> str:
        """What `--resume_from_checkpoint` calls it."""
        return f"{self.repo_id}@{self.branch}"

    @cached_property
    def records(self) -> dict[str, bytes]:
        """The run's records by name, `run.yaml` among them, as they were at this step.

        Raises:
            UserError: one of them is missing or damaged; the Hub could not be reached.
        """
        names = [name for name in self.state.hashes if name.startswith(f"{RECORDS}/")]
        with TemporaryDirectory() as folder:
            self._download(names, Path(folder))
            return {name.removeprefix(f"{RECORDS}/"): Path(folder, name).read_bytes() for name in names}

    def download_checkpoint(self, folder: Path, when_whole: Callable[[], object] | None = None) -> None:
        """Write the checkpoint into its folder in `folder`, all of it or nothing.

        Args:
            when_whole: called when all files are there and verified, just before the folder has its name.

        Raises:
            UserError: a file of it is missing or damaged; the Hub could not be reached.
        """
        logger.info("downloading the state of step %s from %s", f"{self.state.step:,}", self.name)
        target = folder / self.state.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target) as partial:
            self._download([MANIFEST], partial)
            try:
                manifest = read_sealed_json(partial / MANIFEST)
            except UserError as error:
                raise incomplete_state(self.name, f"{MANIFEST} is damaged") from error
            self._download(list(manifest), partial)
            remove(partial / ".cache")  # where huggingface_hub notes what it downloaded into a folder
            if problem := integrity_error(partial):
                raise incomplete_state(self.name, problem)
            if when_whole:
                when_whole()

    def _download(self, names: list[str], folder: Path) -> None:
        """Download files of the commit into a folder, and compare those with the hashes that `state.json` has."""
        if missing := sorted(set(names) - set(self.files)):
            raise incomplete_state(self.name, f"{missing[0]} is missing")
        with plain_errors(self.repo_id, START_AGAIN), ThreadPoolExecutor(DOWNLOADS) as pool:
            try:
                list(pool.map(lambda name: download(self.repo_id, name, self.commit, folder), names))
            except (RemoteEntryNotFoundError, RevisionNotFoundError) as error:
                raise UserError(
                    f"{self.name} was replaced by another state while it was downloaded: is the run still training "
                    "on another machine? Start again to take the newer state"
                ) from error
        for name in names:
            if name in self.state.hashes and sha256_of(folder / name) != self.state.hashes[name]:
                raise incomplete_state(self.name, f"{name} is damaged")


def find_state(repo_id: str, branch: str) -> FoundState | None:
    """Return the state of a run on a branch, or None where there is no such repo or branch, or nothing on it yet.

    Raises:
        UserError: the branch holds something else; the Hub could not be reached.
    """
    check_name(repo_id)
    with plain_errors(repo_id, START_AGAIN):
        try:
            head = retry(repo_id, lambda: HfApi().model_info(repo_id, revision=branch), STREAM)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
        if STATE in _files_of(head):
            return _read_state(repo_id, branch, head)
        if not _is_fresh(repo_id, head):
            raise incomplete_state(f"{repo_id}@{branch}", f"{STATE} is missing")
    return None


def _read_state(repo_id: str, branch: str, head: ModelInfo) -> FoundState:
    with TemporaryDirectory() as folder:
        path = download(repo_id, STATE, str(head.sha), Path(folder))
        try:
            state = as_type(State, read_sealed_json(path))
        except UserError as error:
            raise incomplete_state(f"{repo_id}@{branch}", f"{STATE} is damaged or another version's") from error
    return FoundState(repo_id, branch, str(head.sha), _files_of(head), state)


def incomplete_state(name: str, problem: str) -> UserError:
    """Return the error of a branch that lacks a part of a state, or that was never one."""
    return UserError(
        f"{name} does not hold the whole state of a run ({problem}): resume from a checkpoint of this machine or from "
        "another branch, or start over with --overwrite_output_dir"
    )


def _files_of(head: ModelInfo) -> tuple[str, ...]:
    return tuple(sibling.rfilename for sibling in head.siblings or ())


def _is_fresh(repo_id: str, head: ModelInfo) -> bool:
    """Return whether a branch is as it was made, by an upload that went no further: at a commit of `main`."""
    commits = retry(repo_id, lambda: HfApi().list_repo_commits(repo_id), STREAM)
    return head.sha in [commit.commit_id for commit in commits]


def download(repo_id: str, name: str, commit: str, folder: Path) -> Path:
    """Download one file of a commit into a folder; after an error that passes by itself, try again."""

    def attempt() -> str:
        try:
            return hf_hub_download(repo_id, name, revision=commit, local_dir=folder)
        except LocalEntryNotFoundError as error:  # no connection, and no earlier download of the file
            raise ConnectionError(first_line(error.__cause__ or error)) from error

    return Path(retry(f"{repo_id}/{name}", attempt, STREAM))


class StateBranch:
    """The branch of a repo to which one start of a run uploads its states.

    Attributes:
        writer: a name that no other start has.
        before: the writer of the state that this start found there, and so may replace; None if there was none.
        replace: whether the first upload may replace the state of another run.
    """

    def __init__(self, repo_id: str, writer: str, before: str | None = None, replace: bool = False) -> None:
        self.repo_id, self.writer, self.before, self.replace = repo_id, writer, before, replace

    def push(self, checkpoint: Path, records: Mapping[str, bytes], step: int, keep: str | None = None) -> None:
        """Replace the state on the branch by another one, in one commit, and forget the history.

        Args:
            keep: the name of a further branch that keeps this state.

        Raises:
            UserError: another start of the run, on another machine, uploads there; the Hub refuses, or kept failing.
        """
        files = self._files(checkpoint, records, step)
        message = f"Step {step:,}: all that the run needs to resume"
        api, what = HfApi(), f"{self.repo_id}@{BRANCH}"
        with plain_errors(self.repo_id, "the next checkpoint is tried again"):
            retry(what, lambda: api.create_branch(self.repo_id, branch=BRANCH, exist_ok=True), STREAM)
            retry(what, lambda: self._commit(files, message), STREAM)
            self.replace = False
            retry(what, lambda: api.super_squash_history(self.repo_id, branch=BRANCH, commit_message=message), STREAM)
            if keep is not None:
                retry(what, lambda: self._keep(keep), STREAM)

    def _files(self, checkpoint: Path, records: Mapping[str, bytes], step: int) -> dict[str, Path | bytes]:
        files: dict[str, Path | bytes] = {
            path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()
        }
        beside = {f"{RECORDS}/{name}": content for name, content in records.items()}
        hashes = {name: sha256_of(content) for name, content in {**beside, MANIFEST: files[MANIFEST]}.items()}
        state = State(step, self.writer, hashes)
        return {**files, **beside, STATE: sealed_json(asdict(state)).encode()}

    def _commit(self, files: Mapping[str, Path | bytes], message: str) -> None:
        """Commit on top of what the branch has now, unless that is the state of another start."""
        head = HfApi().model_info(self.repo_id, revision=BRANCH)
        present = _files_of(head)
        if STATE in present and not self.replace:
            self._require_own(_read_state(self.repo_id, BRANCH, head).state)
        stale = sorted(set(present) - {KEPT, *files})
        HfApi().create_commit(
            self.repo_id,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=message,
            revision=BRANCH,
            parent_commit=head.sha,
        )

    def _require_own(self, found: State) -> None:
        if found.writer not in (self.writer, self.before):
            raise OtherWriterError(
                f"{self.repo_id}@{BRANCH} has a state of step {found.step:,} from another machine, where the run "
                "continues: this one stops uploading"
            )

    def _keep(self, branch: str) -> None:
        """Let another branch keep the present state, in place of one that it kept before."""
        api = HfApi()
        try:
            api.create_branch(self.repo_id, branch=branch, revision=BRANCH)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            api.delete_branch(self.repo_id, branch=branch)
            api.create_branch(self.repo_id, branch=branch, revision=BRANCH)


class OtherWriterError(UserError):
    """Another start of the same run uploads its states to the same branch."""
