"""The state of a run on a branch of its repo: whole, the newest, of one run, and one commit."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fgpt_hf.errors import UserError
from fgpt_hf.files import integrity_error, sealed_json, write_manifest
from fgpt_hf.hub.state import BRANCH, STATE, OtherWriterError, StateBranch, find_state
from fgpt_hf.hub.uploader import Snapshot, UploadQueue
from tests.support.loopback_hub import LoopbackHub

REPO = "tester/tiny"
RECORDS = {"run.yaml": b"preset: tiny\n", "metrics.jsonl": b'{"step": 0}\n'}


@pytest.fixture
def branch(server: LoopbackHub) -> StateBranch:
    server.add_repo("model", REPO, {"README.md": "# Tiny\n"})
    return StateBranch(REPO, "here")


def checkpoint(folder: Path, step: int) -> Path:
    """A folder with a manifest, as a run saves it: its files' names are nobody's business."""
    saved = folder / f"step_{step:08d}"
    for name in ("model.safetensors", "training.pt", "shards/0.distcp", "config.json"):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(f"{name} of step {step}".encode())
    write_manifest(saved)
    return saved


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_state_comes_back_as_it_was_saved(branch: StateBranch, tmp_path: Path) -> None:
    saved = checkpoint(tmp_path / "there", 7)
    branch.push(saved, RECORDS, 7)
    found = find_state(REPO, BRANCH)
    assert found and found.state.step == 7 and found.records == RECORDS
    found.download_checkpoint(tmp_path / "here")
    assert contents(tmp_path / "here" / "step_00000007") == contents(saved)
    assert integrity_error(tmp_path / "here" / "step_00000007") is None


def test_the_branch_holds_the_newest_state_alone_and_no_history(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        saved = checkpoint(tmp_path, step)
        (saved / f"only_of_{step}").write_text("")
        write_manifest(saved)
        branch.push(saved, RECORDS, step)
    repo = server.repo("model", REPO)
    names = {*contents(saved), STATE, "run/run.yaml", "run/metrics.jsonl", ".gitattributes"}
    assert repo.files(BRANCH).keys() == names
    assert [commit.title for commit in repo.history(BRANCH)] == ["Step 3: all that the run needs to resume"]
    assert "README.md" in repo.files("main") and len(repo.history("main")) == 2


def test_a_state_that_is_to_be_kept_has_a_branch_of_its_own_and_is_uploaded_once(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path
) -> None:
    for step in (1, 2, 2):  # a run that went back saves a step again
        branch.push(checkpoint(tmp_path, step), RECORDS, step, keep=f"step_{step}")
    assert {name for name in server.repo("model", REPO).branches} == {"main", BRANCH, "step_1", "step_2"}
    first, second = find_state(REPO, "step_1"), find_state(REPO, "step_2")
    assert first and first.state.step == 1 and second and second.state.step == 2
    assert server.count("PUT", "/lfs/") == 4  # two files of each step


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"drop": True}, {"drop_after": 5}, {"status": 412}], ids=["503", "drop", "cut", "412"]
)
def test_an_upload_survives_a_hub_that_fails_for_a_while(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path, fault: dict[str, int]
) -> None:
    for method, path in [("POST", "/commit/"), ("POST", "/super-squash/"), ("POST", "/branch/"), ("PUT", "/lfs/")]:
        server.fail(method, path, times=2, **fault)
    branch.push(checkpoint(tmp_path, 1), RECORDS, 1)
    branch.push(checkpoint(tmp_path, 2), RECORDS, 2)
    found = find_state(REPO, BRANCH)
    assert found and found.state.step == 2 and len(server.repo("model", REPO).history(BRANCH)) == 1


def test_a_download_survives_a_hub_that_fails_for_a_while(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path
) -> None:
    saved = checkpoint(tmp_path / "there", 1)
    branch.push(saved, RECORDS, 1)
    for fault in ({"status": 503}, {"drop": True}, {"drop_after": 5}):
        server.fail("GET", "/resolve/", **fault)
    server.fail("HEAD", "/resolve/", drop=True)
    server.fail("GET", "/api/models/", times=2, status=503)
    found = find_state(REPO, BRANCH)
    assert found is not None
    found.download_checkpoint(tmp_path / "here")
    assert contents(tmp_path / "here" / saved.name) == contents(saved)


def test_there_is_no_state_where_there_is_no_repo_or_branch_or_nothing_on_it(server: LoopbackHub) -> None:
    assert find_state("tester/nowhere", BRANCH) is None
    repo = server.add_repo("model", REPO, {"README.md": "# Tiny\n"})
    assert find_state(REPO, BRANCH) is None
    repo.branches[BRANCH] = repo.branches["main"]  # an upload was killed when it had made the branch
    repo.add({"README.md": "# Tiny, edited\n"})
    assert find_state(REPO, BRANCH) is None


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"training.pt": None}, "training.pt is missing"),
        ({"shards/0.distcp": b"other"}, "shards/0.distcp is damaged"),
        ({"manifest.json": b"{}"}, "manifest.json is damaged"),
        ({"manifest.json": None}, "manifest.json is missing"),
        ({"run/run.yaml": b"preset: other\n"}, "run/run.yaml is damaged"),
        ({"state.json": None}, "state.json is missing"),
        ({"state.json": b"{}"}, "state.json is damaged or another version's"),
        ({"state.json": sealed_json({"step": 1}).encode()}, "state.json is damaged or another version's"),
    ],
)
def test_half_a_state_is_refused_in_one_line_and_leaves_nothing(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path, damage: dict[str, bytes | None], problem: str
) -> None:
    branch.push(checkpoint(tmp_path / "there", 1), RECORDS, 1)
    server.damage(REPO, BRANCH, damage)
    with pytest.raises(UserError, match=rf"^{REPO}@{BRANCH} does not hold the whole state of a run \({problem}"):
        found = find_state(REPO, BRANCH)
        assert found and found.records
        found.download_checkpoint(tmp_path / "here")
    assert not (tmp_path / "here").exists() or contents(tmp_path / "here") == {}


@pytest.mark.parametrize("part", ["state.json", "manifest.json"])
def test_a_state_writes_no_file_outside_of_its_folder(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path, part: str
) -> None:
    branch.push(checkpoint(tmp_path / "there", 1), RECORDS, 1)
    hashes = {"run/../../outside": "0"}
    content = hashes if part == "manifest.json" else {"step": 1, "writer": "here", "hashes": hashes}
    server.damage(REPO, BRANCH, {part: sealed_json(content).encode()})
    with pytest.raises(UserError, match="does not hold the whole state of a run"):
        found = find_state(REPO, BRANCH)
        assert found and found.records
        found.download_checkpoint(tmp_path / "here")
    assert not list(tmp_path.rglob("outside"))


def test_a_start_replaces_the_state_that_it_found_and_no_newer_one_of_another_machine(
    branch: StateBranch, tmp_path: Path
) -> None:
    branch.push(checkpoint(tmp_path, 1), RECORDS, 1)
    next_start = StateBranch(REPO, "elsewhere", before="here")
    branch.push(checkpoint(tmp_path, 2), RECORDS, 2)  # the old machine was only slow
    next_start.push(checkpoint(tmp_path, 3), RECORDS, 3)
    with pytest.raises(OtherWriterError, match="has a state of step 3 from another machine"):
        branch.push(checkpoint(tmp_path, 4), RECORDS, 4)
    with pytest.raises(OtherWriterError):
        StateBranch(REPO, "third").push(checkpoint(tmp_path, 4), RECORDS, 4)
    StateBranch(REPO, "third", replace=True).push(checkpoint(tmp_path, 5), RECORDS, 5)


def test_a_run_that_replaces_all_replaces_half_a_state_too(
    branch: StateBranch, server: LoopbackHub, tmp_path: Path
) -> None:
    branch.push(checkpoint(tmp_path, 1), RECORDS, 1)
    server.damage(REPO, BRANCH, {STATE: b"{}"})
    StateBranch(REPO, "third", replace=True).push(checkpoint(tmp_path, 5), RECORDS, 5)
    found = find_state(REPO, BRANCH)
    assert found and found.state.step == 5


def snapshot(step: int) -> Snapshot:
    return Snapshot(Path(f"step_{step:08d}"), {}, TemporaryDirectory())


@pytest.mark.parametrize(("most_waiting", "uploaded"), [(1, [1, 4]), (2, [1, 3, 4])])
def test_one_upload_runs_at_a_time_and_newer_ones_take_the_place_of_those_that_wait(
    most_waiting: int, uploaded: list[int]
) -> None:
    may_end, steps = threading.Event(), []

    def upload(snapshot: Snapshot) -> None:
        steps.append(snapshot.step)
        assert may_end.wait(60)

    queue = UploadQueue(upload, most_waiting)
    put = [snapshot(step) for step in (1, 2, 3, 4)]
    queue.put(put[0])
    _wait_until(lambda: steps == [1])
    for each in put[1:]:
        queue.put(each)
    may_end.set()
    queue.join()
    assert steps == uploaded
    assert not any(Path(each.scratch.name).exists() for each in put)


def test_a_queue_that_was_empty_for_a_while_uploads_again() -> None:
    steps: list[int] = []
    queue = UploadQueue(lambda snapshot: steps.append(snapshot.step), 1)
    for step in (1, 2):
        queue.put(snapshot(step))
        queue.join()
    assert steps == [1, 2]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
