"""A Hugging Face Hub on 127.0.0.1, for the real clients to talk to.

    with LoopbackHub() as server:
        server.add_repo("dataset", "lab/poems", files={"train.jsonl": '{"text": "a rose"}\n'})
        server.fail("POST", r"/commit/", status=503, times=2)
        subprocess.run([sys.executable, "publish.py"], env=hub_environment(server, tmp_path), check=True)
        assert server.repo("model", "tester/tiny").files()["config.json"]

Clients run in child processes, because `huggingface_hub`, `datasets` and `evaluate` read `HF_ENDPOINT` when they are
imported. Repositories are versioned as in git, live in memory and are gone with the server. Not spoken: Xet,
multipart uploads, pull requests, search.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

Kind = Literal["model", "dataset", "space"]

USER, ORGANIZATION = "tester", "loopback-lab"
WRITE_TOKEN, READ_TOKEN = "hf_loopback_write", "hf_loopback_read"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read"}


class LoopbackHub:
    """The server. It answers from the start to the end of the `with` block, on a free port of 127.0.0.1.

    `WRITE_TOKEN` and `READ_TOKEN` are tokens of `USER`, a member of `ORGANIZATION`; any other token is refused.
    `requests` lists what was asked, as (method, path with query); `strays` lists what was asked of any other host;
    `bytes_sent` counts the bytes of all answers' bodies.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.strays: list[str] = []
        self.bytes_sent = 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), partial(_Connection, self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.endpoints = Endpoints(self.url)

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_repo(
        self, kind: Kind, repo_id: str, files: Mapping[str, bytes | str | Path] | Path, **settings: Any
    ) -> Repo:
        """A repository of contents by path, or of what is below a folder; `private=True`, `gated=True` if need be."""
        if isinstance(files, Path):
            files = {file.relative_to(files).as_posix(): file for file in files.rglob("*") if file.is_file()}
        repo = self.endpoints.repos[kind, repo_id] = Repo(repo_id, **settings)
        repo.add(files)
        return repo

    def repo(self, kind: Kind, repo_id: str) -> Repo:
        """The repository as it is now; KeyError if there is none."""
        return self.endpoints.repos[kind, repo_id]

    def damage(self, repo_id: str, branch: str, files: Mapping[str, bytes | None]) -> None:
        """Change or delete (None) files of a model's branch, as nobody should."""
        changes = {path: None if content is None else Blob.of(path, content) for path, content in files.items()}
        self.repo("model", repo_id).commit(changes, "Damage", branch=branch)

    def fail(self, method: str, path: str, **what: Any) -> None:
        """Let requests of this method, whose path matches this regular expression, go wrong as `Fault` describes."""
        self._faults.append(Fault(method, path, **what))

    def count(self, method: str, path: str) -> int:
        """How many requests of this method had a path that matches this regular expression."""
        return sum(asked == method and re.search(path, where) is not None for asked, where in self.requests)

    def next_fault(self, method: str, path: str) -> Fault:
        """The first fault that waits for such a request, used once more; one without effect if none waits."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return Fault(method, path)

    def note_sent(self, size: int) -> None:
        """Count bytes that were sent."""
        with self._lock:
            self.bytes_sent += size


@pytest.fixture
def hub_server() -> Iterator[LoopbackHub]:
    """A running, empty Hub of the test's own."""
    with LoopbackHub() as server:
        yield server


def hub_environment(server: LoopbackHub, folder: Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
    """The environment in which a child process takes `server` for the Hub, with its caches in `folder`.

    The server is also the child's proxy for every other host, and refuses: what strays is seen, and goes nowhere.
    """
    disturbing = re.compile(r"(HF_|HUGGING|TRANSFORMERS_).*|.*_proxy", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not disturbing.fullmatch(name)}
    environment |= {name: server.url for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    environment |= {name: "127.0.0.1,localhost" for name in ("no_proxy", "NO_PROXY")}
    environment |= {"HF_TOKEN": token} if token else {}
    return environment | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",  # Xet wants a content store behind the Hub
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets and evaluate count downloads at Amazon
    }


@dataclass
class Fault:
    """What goes wrong, and how many times."""

    method: str
    path: str
    times: int = 1
    status: int | None = None  # answer with this status; do nothing
    delay: float = 0.0  # seconds of silence before the answer
    drop: bool = False  # close the connection before the request's body is read; do nothing
    drop_after: int | None = None  # do what was asked; close the connection after so many bytes of the answer's body
    truncate_to: int | None = None  # do what was asked; answer with so many bytes, as if that were all of them


# What a repository is.


class Repo:
    """Commits with parents, and the branches and tags that name them."""

    def __init__(self, repo_id: str, private: bool = False, gated: bool = False, sdk: str | None = None) -> None:
        self.id, self.private, self.gated, self.sdk = repo_id, private, gated, sdk
        self.uploads: dict[str, bytes] = {}  # LFS contents by sha256, whether committed or not
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit({".gitattributes": Blob(GITATTRIBUTES)}, "initial commit")

    def add(self, files: Mapping[str, bytes | str | Path], title: str = "Add files", branch: str = "main") -> str:
        """Commit files as another client might have; returns the commit's oid."""
        return self.commit({path: Blob.of(path, content) for path, content in files.items()}, title, branch=branch)

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        title: str,
        message: str = "",
        branch: str = "main",
        squash: bool = False,
    ) -> str:
        """Commit on top of the branch, or in place of its history, where None deletes a file; returns the commit's oid.

        Another thread sees the branch before or after.
        """
        parent = None if squash else self.branches.get(branch)
        files = {**(self.commits[parent].files if parent else {}), **changes}
        kept = {path: blob for path, blob in sorted(files.items()) if blob is not None}
        identity = json.dumps([len(self.commits), parent, title, {path: blob.oid for path, blob in kept.items()}])
        oid = hashlib.sha1(identity.encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.commits[oid] = Commit(oid, parent, title, message, date, kept)
        self.branches[branch] = oid
        return oid

    def at(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag or an oid names; HubError if there is none."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: blob.content for path, blob in self.at(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commit that a revision names and its ancestors, newest first."""
        commits = [self.at(revision)]
        while parent := commits[-1].parent:
            commits.append(self.commits[parent])
        return commits


@dataclass(frozen=True)
class Commit:
    """A state of all files, and how it came to be."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Blob]


LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".h5", ".model", ".onnx", ".parquet", ".pt", ".safetensors", ".zip")
LFS_BYTES = 10_000_000
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file outside git: known suffixes, large files and binary ones, but never an empty one."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample)


@dataclass(frozen=True)
class Blob:
    """One version of a file. Of a file on disk, only the bytes that are asked for are read."""

    source: bytes | Path
    lfs: bool = False

    @classmethod
    def of(cls, path: str, content: bytes | str | Path) -> Blob:
        """A blob that is LFS where the Hub would have it so."""
        blob = cls(content.encode() if isinstance(content, str) else content)
        return cls(blob.source, is_lfs(path, blob.size, blob.read(0, 512)))

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`."""
        if isinstance(self.source, bytes):
            return self.source[start:stop]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    @property
    def content(self) -> bytes:
        return self.read(0, self.size)

    @cached_property
    def size(self) -> int:
        return self.source.stat().st_size if isinstance(self.source, Path) else len(self.source)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Git's name for what it holds."""
        held = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        """The Hub's name for the content, by which clients see that a file has not changed."""
        return self.sha256 if self.lfs else self.oid


# What the Hub answers.

REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+(?:/[^/]+)?)"
PAGE = r"(?:/(?P<kind>dataset|space)s)?/(?P<repo_id>[^/]+(?:/[^/]+)?)"
REVISION = r"/(?P<revision>[^/]+)"

ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", r"/api/jobs/hardware", "jobs_hardware"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    # writing
    ("POST", REPO + r"/preupload" + REVISION, "preupload"),
    ("POST", PAGE + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", PAGE + r"\.git/lfs/(?P<sha256>[0-9a-f]{64})", "lfs_upload"),
    ("POST", PAGE + r"\.git/lfs/verify", "lfs_verify"),
    ("POST", REPO + r"/commit" + REVISION, "commit"),
    ("POST", REPO + r"/branch/(?P<branch>[^/]+)", "create_branch"),
    ("DELETE", REPO + r"/branch/(?P<branch>[^/]+)", "delete_branch"),
    ("POST", REPO + r"/super-squash/(?P<branch>[^/]+)", "super_squash"),
    ("POST", REPO + r"/tag" + REVISION, "create_tag"),
    # reading, where HEAD is answered as GET
    ("GET", REPO + r"/refs", "refs"),
    ("GET", REPO + r"/commits" + REVISION, "commits"),
    ("GET", REPO + r"/tree" + REVISION + r"(?:/(?P<path>.+))?", "tree"),
    ("POST", REPO + r"/paths-info" + REVISION, "paths_info"),
    ("GET", REPO + r"(?:/revision" + REVISION + r")?", "repo_info"),
    ("GET", PAGE + r"/resolve" + REVISION + r"/(?P<path>.+)", "resolve"),
]


class Endpoints:
    """One method for each route: it takes the request and the route's named groups, and returns the reply."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[tuple[str, str], Repo] = {}
        self.hardware: Any = []  # machines of the Jobs
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Reply:
        """The reply to any request, one at a time; a HubError is a reply too."""
        method = "GET" if request.method == "HEAD" else request.method
        try:
            for routed, pattern, endpoint in ROUTES:
                if routed == method and (match := re.fullmatch(pattern, request.path)):
                    groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                    with self._lock:
                        reply: Reply = getattr(self, endpoint)(request, **groups)
                    return reply
            raise HubError(404, f"the loopback Hub has no {method} {request.path}")
        except HubError as error:
            return error.reply()

    def readable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """The repository, if there is one that this client may know of."""
        role, repo = request.role, self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not _is_member(role, repo_id)):
            raise HubError(404 if role else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """The repository, if this client may write to it."""
        repo = self.readable(request, kind, repo_id)
        _require_writer(request.role, repo_id)
        return repo

    def whoami(self, request: Request) -> Reply:
        if request.role is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": request.role}
        auth = {"type": "access_token", "accessToken": token}
        return Reply.of({"type": "user", "name": USER, "orgs": [{"name": ORGANIZATION}], "auth": auth})

    def jobs_hardware(self, request: Request) -> Reply:
        return Reply.of(self.hardware)

    def validate_card(self, request: Request) -> Reply:
        errors = [{"message": error} for error in card_errors(request.json["repoType"], request.json["content"])]
        return Reply.of({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def create_repo(self, request: Request) -> Reply:
        kind, private = request.json.get("type", "model"), request.json.get("visibility") == "private"
        repo_id = _named(request)
        _require_writer(request.role, repo_id)
        page = {"name": repo_id, "url": f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"}
        if (kind, repo_id) in self.repos:
            return Reply.of({"error": f"You already created this {kind} repo", **page}, status=409)
        self.repos[kind, repo_id] = Repo(repo_id, private=private, sdk=request.json.get("sdk"))
        return Reply.of(page)

    def delete_repo(self, request: Request) -> Reply:
        kind, repo_id = request.json.get("type", "model"), _named(request)
        self.writable(request, kind, repo_id)
        del self.repos[kind, repo_id]
        return Reply.of({})

    def preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        """Says of each file whether it is to come by LFS, and which content is there now."""
        files = self.writable(request, kind, repo_id).at(revision).files

        def plan(file: dict[str, Any]) -> dict[str, Any]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            there = files[file["path"]].etag if file["path"] in files else None
            mode = "lfs" if lfs else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there}

        return Reply.of({"files": [plan(file) for file in request.json["files"]]})

    def lfs_batch(self, request: Request, repo_id: str, kind: str = "model") -> Reply:
        """Says of each LFS object where to upload it; one that is there needs no action."""
        uploads = self.writable(request, kind, repo_id).uploads
        folder = self.url + request.path.replace("/info/lfs/objects/batch", "/lfs")

        def plan(wanted: dict[str, Any]) -> dict[str, Any]:
            actions = {"upload": {"href": f"{folder}/{wanted['oid']}"}, "verify": {"href": f"{folder}/verify"}}
            return wanted if wanted["oid"] in uploads else {**wanted, "actions": actions}

        return Reply.of({"transfer": "basic", "objects": [plan(wanted) for wanted in request.json["objects"]]})

    def lfs_upload(self, request: Request, repo_id: str, sha256: str, kind: str = "model") -> Reply:
        """Takes an LFS object. The URL is as good as signed: clients send no token with it."""
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "The content does not match its SHA-256")
        self.repos[kind, repo_id].uploads[sha256] = request.body
        return Reply()

    def lfs_verify(self, request: Request, repo_id: str, kind: str = "model") -> Reply:
        uploads = self.writable(request, kind, repo_id).uploads
        if len(uploads.get(request.json["oid"], b"")) != request.json["size"]:
            raise HubError(404, f"No such LFS object: {request.json['oid']}")
        return Reply.of({})

    def commit(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        """Commits the operations of an NDJSON body, unless the branch is no longer at the header's `parentCommit`."""
        repo = self.writable(request, kind, repo_id)
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        (_, header), *operations = [json.loads(line).values() for line in request.body.splitlines()]
        head = repo.at(revision)
        if not head.oid.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, Blob | None] = {}
        for key, value in operations:
            changes |= _changes(repo, head, key, value)
        oid = repo.commit(changes, header["summary"], header["description"], revision)
        page = repo_id if kind == "model" else f"{kind}s/{repo_id}"
        return Reply.of({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{page}/commit/{oid}"})

    def create_branch(self, request: Request, kind: str, repo_id: str, branch: str) -> Reply:
        repo = self.writable(request, kind, repo_id)
        return _point(repo.branches, branch, repo.at(request.json.get("startingPoint", "main")))

    def delete_branch(self, request: Request, kind: str, repo_id: str, branch: str) -> Reply:
        repo = self.writable(request, kind, repo_id)
        if branch == "main" or branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        del repo.branches[branch]
        return Reply.of({})

    def super_squash(self, request: Request, kind: str, repo_id: str, branch: str) -> Reply:
        """Makes the branch's files the only commit of its history."""
        repo = self.writable(request, kind, repo_id)
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        repo.commit(dict(repo.at(branch).files), request.json["message"], branch=branch, squash=True)
        return Reply.of({})

    def create_tag(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        repo = self.writable(request, kind, repo_id)
        return _point(repo.tags, request.json["tag"], repo.at(revision))

    def refs(self, request: Request, kind: str, repo_id: str) -> Reply:
        repo = self.readable(request, kind, repo_id)

        def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names.items()]

        branches, tags = listed(repo.branches, "refs/heads/"), listed(repo.tags, "refs/tags/")
        return Reply.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        history, authors = self.readable(request, kind, repo_id).history(revision), [{"user": USER}]
        return Reply.of(
            [{"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": authors} for c in history]
        )

    def tree(self, request: Request, kind: str, repo_id: str, revision: str, path: str = "") -> Reply:
        commit = self.readable(request, kind, repo_id).at(revision)
        folder = f"{path}/" if path else ""
        below = [entry for entry in _entries(commit).values() if entry["path"].startswith(folder)]
        if path and not below:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = request.query.get("recursive") == "true"
        return Reply.of([entry for entry in below if recursive or "/" not in entry["path"].removeprefix(folder)])

    def paths_info(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        entries = _entries(self.readable(request, kind, repo_id).at(revision))
        return Reply.of([entries[path] for path in parse_qs(request.body.decode())["paths"] if path in entries])

    def repo_info(self, request: Request, kind: str, repo_id: str, revision: str = "main") -> Reply:
        repo = self.readable(request, kind, repo_id)
        commit = repo.at(revision)
        files = [entry for entry in _entries(commit).values() if entry["type"] == "file"]
        siblings = [{"rfilename": file["path"], "blobId": file["oid"], **file} for file in files]
        card = _front_matter(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        settings = {"private": repo.private, "gated": "auto" if repo.gated else False, "sdk": repo.sdk}
        version = {"sha": commit.oid, "lastModified": commit.date, "siblings": siblings, "cardData": card}
        return Reply.of({"id": repo.id, **settings, **version})

    def resolve(self, request: Request, repo_id: str, revision: str, path: str, kind: str = "model") -> Reply:
        """The file itself, or the part of it that the Range header asks for."""
        repo = self.readable(request, kind, repo_id)
        if repo.gated and not _is_member(request.role, repo_id):
            raise HubError(403 if request.role else 401, f"Access to {kind} {repo_id} is restricted.", "GatedRepo")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if "range" not in request.headers:
            return Reply(200, blob.content, headers)
        start, stop = byte_range(request.headers["range"], blob.size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        return Reply(206, blob.read(start, stop), headers)


def _named(request: Request) -> str:
    """The repository that the body names; without an organization, it is the user's."""
    return f"{request.json.get('organization') or USER}/{request.json['name']}"


def _is_member(role: str | None, repo_id: str) -> bool:
    return role is not None and repo_id.split("/")[0] in (USER, ORGANIZATION)


def _require_writer(role: str | None, repo_id: str) -> None:
    if role is None:
        raise HubError(401, "Invalid username or password.")
    if role != "write":
        raise HubError(403, "Forbidden: you must use a write token")
    if not _is_member(role, repo_id):
        raise HubError(403, f"Forbidden: you have no right to write to {repo_id}")


def _changes(repo: Repo, head: Commit, key: str, value: dict[str, Any]) -> dict[str, Blob | None]:
    """What one operation of a commit does, by path."""
    path = value["path"]
    if key == "file":
        return {path: Blob(base64.b64decode(value["content"]))}
    if key == "lfsFile":
        if value["oid"] not in repo.uploads:
            raise HubError(400, f"The LFS object of {path} was not uploaded")
        return {path: Blob(repo.uploads[value["oid"]], lfs=True)}
    folder = path.rstrip("/") + "/"
    deleted = [name for name in head.files if (name.startswith(folder) if key == "deletedFolder" else name == path)]
    if not deleted:
        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    return dict.fromkeys(deleted)


def _point(names: dict[str, str], name: str, commit: Commit) -> Reply:
    if name in names:
        raise HubError(409, f"Reference already exists: {name}")
    names[name] = commit.oid
    return Reply.of({}, status=201)


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit as listings describe them, by path."""
    folders = {parent.as_posix() for path in commit.files for parent in Path(path).parents} - {"."}
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(folders):
        entries[path] = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    for path, blob in commit.files.items():
        entries[path] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.lfs:
            names = {"oid": blob.sha256, "sha256": blob.sha256}  # the first in trees, the second in repo_info
            entries[path]["lfs"] = {**names, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entries


def byte_range(header: str, size: int) -> tuple[int, int]:
    """Start and stop of `bytes=first-last`, `bytes=first-` or `bytes=-length`; HubError if the file ends before."""
    first, _, last = header.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


# What the Hub asks of a card: a part of https://huggingface.co/docs/hub/model-cards and .../spaces-config-reference.

COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LICENSES = ("apache-2.0", "mit", "openrail", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "odc-by", "gpl-3.0", "other")
CHOICES = {"license": LICENSES, "sdk": ("gradio", "docker", "static"), "colorFrom": COLORS, "colorTo": COLORS}
RESULT_KEYS = ("task.type", "dataset.type", "dataset.name")


def card_errors(kind: str, content: str) -> list[str]:
    """Why the Hub would refuse a README: broken YAML, a choice it does not know, a result that lacks a part."""
    try:
        card = _front_matter(content)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    unknown = [key for key, choices in CHOICES.items() if card.get(key, choices[0]) not in choices]
    errors = [f'"{key}" must be one of {CHOICES[key]}' for key in unknown]
    if kind == "space" and "sdk" not in card:
        errors.append('"sdk" is required')
    if len(card.get("short_description", "")) > 60:
        errors.append('"short_description" must have 60 characters at most')
    for model in card.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[].name" is required')
        for result in model.get("results", []):
            present = {f"{part}.{key}" for part in ("task", "dataset") for key in result.get(part, {})}
            errors += [f'"model-index[].results[].{key}" is required' for key in RESULT_KEYS if key not in present]
    return errors


def _front_matter(content: str) -> dict[str, Any]:
    """The mapping between the README's first two lines of dashes; YAMLError if something else is there."""
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---([\r\n]|$)", content, re.DOTALL)
    card: dict[str, Any] = (yaml.safe_load(match[1]) or {}) if match else {}
    if not isinstance(card, dict):
        raise yaml.YAMLError("metadata must be a mapping")
    return card


# What goes over the wire.


@dataclass(frozen=True)
class Request:
    """What a client asks. The path is still quoted; header names are in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @cached_property
    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body)
        return body

    @property
    def role(self) -> str | None:
        """What the client's token may do, None if it sends no token; HubError if the token is not known."""
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in ROLES:
            raise HubError(401, "Invalid credentials in Authorization header")
        return ROLES.get(token)


@dataclass(frozen=True)
class Reply:
    """What a client is told."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Reply:
        body = json.dumps(value, default=str)  # YAML has dates, JSON has not
        return cls(status, body.encode(), {"Content-Type": "application/json"})


class HubError(Exception):
    """An error to tell the client of; clients choose their exception by the status and by `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}

    def reply(self) -> Reply:
        reply = Reply.of({"error": str(self)}, self.status)
        return Reply(reply.status, reply.body, {**reply.headers, **self.headers})


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # clients open many connections at once


class _Connection(BaseHTTPRequestHandler):
    """A client's connection: reads requests, lets faults happen, writes replies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: LoopbackHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has gone
            super().handle()

    def serve(self) -> None:
        if not self.path.startswith("/"):  # as to a proxy: meant for another host
            self.hub.strays.append(self.path)
            return self._send(HubError(403, f"{self.path} is not this Hub").reply())
        self.hub.requests.append((self.command, self.path))
        fault = self.hub.next_fault(self.command, self.path)
        if fault.drop:
            self.close_connection = True
            return None
        request = self._request()
        time.sleep(fault.delay)
        if fault.status:
            return self._send(HubError(fault.status, "the test wants it so").reply())
        reply = self.hub.endpoints.answer(request)
        return self._send(replace(reply, body=reply.body[: fault.truncate_to]), fault.drop_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = serve

    def _request(self) -> Request:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the client has gone, and half of a request means nothing")
        return Request(self.command, url.path, query, headers, body)

    def _send(self, reply: Reply, drop_after: int | None = None) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else reply.body[:drop_after]
        self.wfile.write(body)
        self.hub.note_sent(len(body))
        if drop_after is not None:
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""
