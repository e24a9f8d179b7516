"""Push files to a repo on the Hub: all of them in one commit, or none.

The Hub makes the commit when everything is uploaded: an interruption at any moment leaves the branch where it was, and
the next push uploads only what is missing.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from fgpt_hf.errors import UserError, one_line
from fgpt_hf.files import sha256_of
from fgpt_hf.hub.front_matter import CARD, read_card
from fgpt_hf.hub.published_files import WEIGHTS_AND_CODE, Files, matches, publishable
from fgpt_hf.retries import is_transient, retry
from fgpt_hf.training.records import METRICS, SAMPLES

REPLACED = {"model": WEIGHTS_AND_CODE, "space": ("*.py",)}  # deleted from a repo if a push does not bring it again
# Made from weights, and deleted when others come.
DERIVED = (METRICS, SAMPLES, ".eval_results/*.yaml", "*.gguf", "template", "params")
REFUSALS = {
    401: "the token is not valid (it may have expired): run `hf auth login` again",
    403: "the token may not write there: use one with the role 'write', of the owner or a member",
}
TRY_AGAIN = "publish again to continue where it stopped"
# Stricter than git: components of word characters, dots and dashes that begin with no dot or dash, and no "..".
_GIT_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)*")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A repo on the Hub to push to.

    Attributes:
        repo_id: user/name or organization/name.
        kind: the type of the repo.
        sdk: what runs a new Space.
        private: make a new repo private.
        revision: the branch (default: main), created if it is missing.
        tag: a name for the commit, such as v1.0.

    Example:
        >>> Destination(repo_id="user/tiny", private=True).kind
        'model'
    """

    repo_id: str
    kind: Literal["model", "space"] = "model"
    sdk: Literal["gradio", "static"] = "gradio"
    private: bool = False
    revision: str | None = None
    tag: str | None = None


class PinnedModel(NamedTuple):
    """A model on the Hub at one commit, with the names of its weight files."""

    repo_id: str
    commit: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class PublishedFiles:
    """The files of a repo at the commit on which the next one will be made.

    Attributes:
        hashes: by path, the SHA-256 of each file in large-file storage, and None for the others.
    """

    repo_id: str
    kind: str
    commit: str
    hashes: Mapping[str, str | None]

    def read_card(self) -> str | None:
        """Return the text of the repo's `README.md`, or None if it has none."""
        file = self.download(CARD)
        return read_card(file) if file else None

    def download(self, path: str) -> Path | None:
        """Download a file of the repo, or return None if it has none."""
        if path not in self.hashes:
            return None
        return Path(HfApi().hf_hub_download(self.repo_id, path, repo_type=self.kind, revision=self.commit))

    def has_same_weights(self, files: Files) -> bool:
        """Return whether every weight file among `files` is in the repo already."""
        weights = {path: content for path, content in files.items() if path.endswith(".safetensors")}
        return all(self.hashes.get(path) == sha256_of(content) for path, content in weights.items())


def push_folder(folder: Path, destination: Destination, message: str) -> str:
    """Push the publishable files of one folder unchanged, such as a checkpoint's; return the commit's URL.

    Raises:
        UserError: as `push_files`.

    Example:
        >>> push_folder(Path("model"), Destination(repo_id="user/tiny"), "First version")  # doctest: +SKIP
        'https://huggingface.co/user/tiny/commit/…'
    """
    return push_files(publishable(folder), destination, message)


def push_files(
    files: Files,
    destination: Destination,
    message: str,
    amend: Callable[[Files, PublishedFiles], Files] = lambda files, published: files,
) -> str:
    """Make one commit of files, by their path in the repo; return the commit's URL. The repo is created if need be.

    Weights and code that are not among the files are deleted, all other files in the repo stay, and files that are
    there unchanged make no new commit. Transient errors are retried, a newer commit on the branch among them.

    Args:
        amend: returns the files to push in view of those that are published, so that it can merge texts. It is called
            again if somebody else commits in between.

    Raises:
        UserError: the name cannot be a repo's; there is no token, or it may not write there; the repo has another type,
            or is public although a private one was asked for; the tag is taken; the Hub could not be reached, or kept
            failing.
    """
    api, repo_id, tag = HfApi(), destination.repo_id, destination.tag
    make_ready(destination)
    with plain_errors(repo_id):
        taken = retry(repo_id, lambda: _tagged_commit(api, destination))
        url, commit = retry(repo_id, lambda: _commit(api, files, destination, message, amend))
        if tag and taken is None:
            label = {"tag": tag, "revision": commit, "tag_message": message}
            retry(repo_id, lambda: api.create_tag(repo_id, **label, exist_ok=True))
        elif tag and taken != commit:
            raise UserError(
                f"tag={tag} already names another commit of {repo_id}: the files are published, choose another tag"
            )
    return url


def make_ready(destination: Destination) -> None:
    """Find the repo to write to, or create it; raises as `push_files`."""
    check_destination(destination)
    check_access(destination.repo_id)
    with plain_errors(destination.repo_id):
        retry(destination.repo_id, lambda: _make_repo(HfApi(), destination))


def pin_model(repo_id: str, revision: str | None = None) -> PinnedModel:
    """Return the present commit of a model's repo, and its weight files.

    Raises:
        UserError: there is no such model, or none that this token may read; the Hub could not be reached.
    """
    with plain_errors(repo_id):
        info = retry(repo_id, lambda: HfApi().model_info(repo_id, revision=revision))
    names = [sibling.rfilename for sibling in info.siblings or ()]
    return PinnedModel(repo_id, str(info.sha), tuple(name for name in names if name.endswith(".safetensors")))


def check_access(repo_id: str) -> None:
    """Check that there is a token that may write, before anything is done.

    Raises:
        UserError: the name cannot be a repo's; there is no token, or it is not valid, or may only read; the Hub could
            not be reached.
    """
    check_name(repo_id)
    if get_token() is None:
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    with plain_errors(repo_id):
        user = retry(repo_id, HfApi().whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token may only read, and {repo_id} is to be written: use one with the role 'write'")


def require_write_access(destination: Destination) -> None:
    """Find the repo to write to, or create it, and ask for an upload of a small file, which is not made.

    The role of a token is not enough: a fine-grained one may write to some repos, and its role does not say to which.

    Raises:
        UserError: as `make_ready`; the token may not write to this repo.
    """
    make_ready(destination)
    asked = [CommitOperationAdd(CARD, b"# A model")]
    with plain_errors(destination.repo_id):
        retry(destination.repo_id, lambda: HfApi().preupload_lfs_files(destination.repo_id, asked))


def check_destination(destination: Destination) -> None:
    """Raise UserError unless repo, branch and tag can have these names; the Hub is not asked."""
    check_name(destination.repo_id)
    for option in ("revision", "tag"):
        name = getattr(destination, option)
        if name is not None and (not _GIT_NAME.fullmatch(name) or name.endswith((".", "/", ".lock"))):
            raise UserError(f"{option}={name!r} cannot be a name in git: give letters, digits, '-', '_', '.' and '/'")


def check_hub_id(option: str, name: str) -> None:
    """Raise UserError unless a name can be that of a model on the Hub.

    Example:
        >>> check_hub_id("base_model", "openai-community/gpt2")
        >>> check_hub_id("base_model", "runs/quickstart/base")
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: base_model='runs/quickstart/base' cannot be a model's id on the Hub: give user/name
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{option}={name!r} cannot be a model's id on the Hub: give user/name") from None


def check_name(repo_id: str) -> None:
    """Raise UserError unless the name can be that of a user's or an organization's repo.

    Example:
        >>> check_name("tiny")
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: 'tiny' cannot be a repo's name: give user/name, of letters, digits, '-', '_' and '.'
    """
    try:
        validate_repo_id(repo_id)
        good = re.fullmatch(r"[^/]+/[^/]+", repo_id) is not None
    except HFValidationError:
        good = False
    if not good:
        raise UserError(f"{repo_id!r} cannot be a repo's name: give user/name, of letters, digits, '-', '_' and '.'")


def _make_repo(api: HfApi, destination: Destination) -> None:
    """Find the repo, or create it, and the branch in it."""
    repo_id, kind = destination.repo_id, destination.kind
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        for other in ("dataset", "space") if kind == "model" else ():
            if api.repo_exists(repo_id, repo_type=other):
                raise UserError(f"{repo_id} is a {other} on the Hub: choose another name for the model") from None
        sdk = destination.sdk if kind == "space" else None
        api.create_repo(repo_id, repo_type=kind, space_sdk=sdk, private=destination.private, exist_ok=True)
    else:
        if destination.private and not info.private:
            raise UserError(f"{repo_id} exists and is public: make it private in its settings, or choose another name")
    if destination.revision:
        api.create_branch(repo_id, branch=destination.revision, exist_ok=True)


def _tagged_commit(api: HfApi, destination: Destination) -> str | None:
    """Return the commit that the destination's tag already names, if it does."""
    if destination.tag is None:
        return None
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(destination.repo_id).tags}
    return tags.get(destination.tag)


def _commit(
    api: HfApi,
    files: Files,
    destination: Destination,
    message: str,
    amend: Callable[[Files, PublishedFiles], Files],
) -> tuple[str, str]:
    """Commit on top of what the branch has now; return the commit's URL and name."""
    repo_id, kind, revision = destination.repo_id, destination.kind, destination.revision
    head = (api.model_info if kind == "model" else api.space_info)(repo_id, revision=revision, files_metadata=True)
    hashes = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else None for sibling in head.siblings or ()}
    published = PublishedFiles(repo_id, kind, str(head.sha), hashes)
    replaced = (*REPLACED[kind], *(() if published.has_same_weights(files) else DERIVED))
    stale = [path for path in sorted(hashes.keys() - files.keys()) if matches(path, replaced)]
    info = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, content) for path, content in amend(files, published).items()),
            *(CommitOperationDelete(path) for path in stale),
        ],
        repo_type=kind,
        commit_message=message,
        revision=revision,
        parent_commit=head.sha,
    )
    return info.commit_url, str(info.oid)


@contextmanager
def plain_errors(repo_id: str, then: str = TRY_AGAIN) -> Iterator[None]:
    """Turn the Hub's errors into a UserError that says what they mean and what would help.

    Args:
        then: what to do after an error that passes by itself.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id} cannot be reached offline: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        problem, status = error.server_message or one_line(error), error.response.status_code
        if is_transient(error):
            raise UserError(f"{repo_id}: the Hub answered {status} ({problem}); {then}") from error
        meaning = REFUSALS.get(status, f"{repo_id}: the Hub refuses with {status}")
        raise UserError(f"{meaning} (the Hub says: {problem})") from error
    except ValueError as error:
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise UserError(f"{repo_id}: the Hub refuses the card. {error}") from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:  # the last two from downloads
        raise UserError(f"{repo_id}: the Hub cannot be reached ({one_line(error)}); {then}") from error
    except RuntimeError as error:
        if error.__cause__ is None:  # huggingface_hub raises the error of a large file's upload so
            raise
        raise UserError(f"{repo_id}: {one_line(error)} ({one_line(error.__cause__)}); {then}") from error
