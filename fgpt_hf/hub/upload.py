"""Files to a repo on the Hub, all or none.

They arrive in one commit, which the Hub makes when everything is uploaded: an interruption at any moment leaves the
branch where it was, and the next push uploads only what is not there yet.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fgpt_hf.errors import UserError
from fgpt_hf.files import sha256_of
from fgpt_hf.hub.card import CARD, merge_card

WEIGHTS_AND_CODE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "configuration_fgpt.py",
    "modeling_fgpt.py",
)
REPLACED = {"model": WEIGHTS_AND_CODE, "space": ("*.py",)}  # what goes from a repo if a push does not bring it again
MEASURED = ("metrics.jsonl", "samples.jsonl", ".eval_results/*.yaml")  # of the weights, so it goes when others come
# Nothing else goes: no optimizer state, no token files, no logs, no pickles.
PUBLISHED = (
    CARD,
    "LICENSE",
    "config.json",
    "generation_config.json",
    *WEIGHTS_AND_CODE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "figures/*.png",
    ".eval_results/*.yaml",
)
PASSING = {408, 412, 429, 500, 502, 503, 504}  # answers after which the same request may succeed
REFUSALS = {
    401: "the token is not valid (it may have expired): run `hf auth login` again",
    403: "the token may not write there: use one with the role 'write', of the owner or a member",
}
WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
GO_ON = "publish again, and it goes on where it was"

Content = Path | bytes
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A place on the Hub.

    Attributes:
        kind: what the repo is there.
        private: make a new repo private.
        revision: the branch (default: main); it is made if need be.
        tag: a name for the commit, such as v1.0.
    """

    repo_id: str
    kind: Literal["model", "space"] = "model"
    private: bool = False
    revision: str | None = None
    tag: str | None = None


class Pinned(NamedTuple):
    """A model on the Hub as it is at one commit, and the names of its weight files."""

    repo_id: str
    commit: str
    weights: tuple[str, ...]


def push_folder(folder: Path, destination: Destination, message: str) -> str:
    """Push what may be published of one folder, a checkpoint's say, as it is; returns the commit's URL.

    Raises:
        UserError, OSError: as `push` does.
    """
    return push_files(publishable(folder), destination, message)


def push_files(files: Mapping[str, Content], destination: Destination, message: str) -> str:
    """Make one commit of files by their path in the repo, which is made if need be; returns the commit's URL.

    Weights and code that are not among them are deleted; all other files that are there stay, and so does what people
    wrote in the card. Where nothing has changed there is no new commit. What may pass is tried again.

    Raises:
        UserError: a name that no repo can have; no token, or none that may write there; a repo of another type, or a
            public one where a private one was asked for; a tag that is taken; a card that was edited on both sides.
        OSError: the Hub could not be reached, or went on failing.
    """
    api, repo_id, tag = HfApi(), destination.repo_id, destination.tag
    make_ready(destination)
    with _plain_errors(repo_id):
        taken = _persistently(lambda: _tagged_commit(api, destination))
        url, commit = _persistently(lambda: _commit(api, files, destination, message))
        if tag and taken is None:
            _persistently(lambda: api.create_tag(repo_id, tag=tag, revision=commit, tag_message=message, exist_ok=True))
        elif tag and taken != commit:
            raise UserError(f"tag={tag} names another commit of {repo_id}: the new one is there, choose another tag")
    return url


def make_ready(destination: Destination) -> None:
    """Find the repo that is to be written, or make it; raises as `push` does."""
    check_access(destination.repo_id)
    with _plain_errors(destination.repo_id):
        _persistently(lambda: _make_repo(HfApi(), destination))


def pinned(repo_id: str, revision: str | None = None) -> Pinned:
    """What a model's repo holds now.

    Raises:
        UserError: there is no such model, or none that this token may read.
        OSError: the Hub could not be reached.
    """
    with _plain_errors(repo_id):
        info = _persistently(lambda: HfApi().model_info(repo_id, revision=revision))
    names = [sibling.rfilename for sibling in info.siblings or ()]
    return Pinned(repo_id, str(info.sha), tuple(name for name in names if name.endswith(".safetensors")))


def publishable(folder: Path) -> dict[str, Content]:
    """The files of a folder that may be published, by their path in the repo."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if _matches(name, PUBLISHED)}


def check_access(repo_id: str) -> None:
    """See that there is a token that may write, before anything is done.

    Raises:
        UserError: the name cannot be a repo's; there is no token, or it is not valid, or may only read.
        OSError: the Hub could not be reached.
    """
    check_name(repo_id)
    if get_token() is None:
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    with _plain_errors(repo_id):
        user = _persistently(HfApi().whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token may only read, and {repo_id} is to be written: use one with the role 'write'")


def check_name(repo_id: str) -> None:
    """Raise ValueError unless the name can be that of a repo of somebody."""
    try:
        validate_repo_id(repo_id)
        good = re.fullmatch(r"[^/]+/[^/]+", repo_id) is not None
    except HFValidationError:
        good = False
    if not good:
        raise UserError(f"{repo_id!r} cannot be a repo's name: it is user/name, of letters, digits, '-', '_' and '.'")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path has one of these forms, in which a star stands for no slash."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _make_repo(api: HfApi, destination: Destination) -> None:
    """Find the repo, or make it, and the branch in it."""
    repo_id, kind = destination.repo_id, destination.kind
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        for other in ("dataset", "space") if kind == "model" else ():
            if api.repo_exists(repo_id, repo_type=other):
                raise UserError(f"{repo_id} is a {other} on the Hub: choose another name for the model") from None
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repo_id, repo_type=kind, space_sdk=sdk, private=destination.private, exist_ok=True)
    else:
        if destination.private and not info.private:
            raise UserError(f"{repo_id} is there and public: make it private in its settings, or choose another name")
    if destination.revision:
        api.create_branch(repo_id, branch=destination.revision, exist_ok=True)


def _tagged_commit(api: HfApi, destination: Destination) -> str | None:
    """The commit that the destination's tag names already, if it does."""
    if destination.tag is None:
        return None
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(destination.repo_id).tags}
    return tags.get(destination.tag)


def _commit(api: HfApi, files: Mapping[str, Content], destination: Destination, message: str) -> tuple[str, str]:
    """Commit on top of what the branch has now; returns the commit's URL and name."""
    repo_id, kind, revision = destination.repo_id, destination.kind, destination.revision
    head = (api.model_info if kind == "model" else api.space_info)(repo_id, revision=revision, files_metadata=True)
    there = {sibling.rfilename: sibling.lfs and sibling.lfs.sha256 for sibling in head.siblings or ()}
    files = dict(files)
    weights = {name: file for name, file in files.items() if name.endswith(".safetensors")}
    other_weights = any(there.get(name) != sha256_of(file) for name, file in weights.items())
    if CARD in files and CARD in there:
        published = Path(api.hf_hub_download(repo_id, CARD, repo_type=kind, revision=head.sha)).read_text(
            encoding="utf-8"
        )
        files[CARD] = merge_card(_text(files[CARD]), published, keep_results=not other_weights).encode()
    replaced = (*REPLACED[kind], *(MEASURED if other_weights else ()))
    stale = [name for name in sorted(there.keys() - files.keys()) if _matches(name, replaced)]
    info = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        repo_type=kind,
        commit_message=message,
        revision=revision,
        parent_commit=head.sha,
    )
    return info.commit_url, str(info.oid)


def _text(content: Content) -> str:
    return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")


def _persistently(request: Callable[[], T]) -> T:
    """Make a request, and again after a while where its failure may pass."""
    for wait in WAITS:
        try:
            return request()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                raise
            print(f"the Hub failed ({_one_line(error)[:100]}); again in {wait:.0f} s")
            time.sleep(wait)
    return request()


@contextmanager
def _plain_errors(repo_id: str) -> Iterator[None]:
    """Say what the Hub's refusals mean, and what would help."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id} cannot be published offline: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        problem, status = error.server_message or _one_line(error), error.response.status_code
        if status in PASSING:
            raise OSError(f"{repo_id}: the Hub answered {status} ({problem}); {GO_ON}") from error
        meaning = REFUSALS.get(status, f"{repo_id}: the Hub refuses with {status}")
        raise UserError(f"{meaning} (the Hub says: {problem})") from error
    except (HTTPError, LocalEntryNotFoundError) as error:  # the second from a download, after its own attempts
        raise OSError(f"{repo_id}: the Hub cannot be reached ({_one_line(error)}); {GO_ON}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
