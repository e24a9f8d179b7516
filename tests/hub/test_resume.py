"""Which state a run goes on from: the newest of its own, here or on the Hub, and never another run's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fgpt_hf.cli.stage import TrainingStage
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from fgpt_hf.files import write_manifest
from fgpt_hf.hub.resume import HubResume
from fgpt_hf.hub.state import BRANCH, STATE, StateBranch, find_state
from fgpt_hf.hub.uploader import CheckpointUploader
from fgpt_hf.training.checkpoints import checkpoint_name
from fgpt_hf.training.run_folder import RunFolder
from tests.support.loopback_hub import READ_TOKEN, LoopbackHub
from tests.support.run_folders import write_run

REPO = "tester/tiny"
RUN = replace(
    PRESETS["quickstart"], push_to_hub=True, hub_model_id=REPO, hub_strategy="checkpoint", max_steps=90, eval_tasks=None
)


def save(folder: Path, step: int, content: str = "") -> Path:
    saved = folder / checkpoint_name(step)
    saved.mkdir(parents=True)
    (saved / "weights").write_text(content or f"those of step {step}")
    write_manifest(saved)
    return saved


def on_hub(server: LoopbackHub, scratch: Path, step: int, run: BaseRun = RUN) -> None:
    """Let a run have left the state of a step on the Hub."""
    if ("model", REPO) not in server.endpoints.repos:
        server.add_repo("model", REPO, {})
    records = {"run.yaml": run.to_yaml().encode(), "metrics.jsonl": b'{"step": 0, "tokens": 0, "seconds": 0}\n'}
    StateBranch(REPO, "another start", replace=True).push(save(scratch / "elsewhere", step), records, step)


def on_disk(run: BaseRun, step: int) -> None:
    save(run.folder / "checkpoints", step, "local")
    (run.folder / "run.yaml").write_text(run.to_yaml())


def goes_on_from(run: BaseRun) -> str | None:
    """Open the run's folder as a start of the run does; return what is in the checkpoint that it goes on from."""
    folder = RunFolder(run)
    with folder.opened(HubResume(run, folder).fetch):
        return (folder.checkpoint / "weights").read_text() if folder.checkpoint else None


@pytest.fixture
def run(tmp_path: Path) -> BaseRun:
    return replace(RUN, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("wanted", [None, "hub", f"{REPO}@{BRANCH}"])
def test_an_empty_machine_goes_on_from_the_hub(
    server: LoopbackHub, tmp_path: Path, run: BaseRun, wanted: str | None
) -> None:
    on_hub(server, tmp_path, 7)
    assert goes_on_from(replace(run, resume_from_checkpoint=wanted)) == "those of step 7"
    assert (run.folder / "metrics.jsonl").read_text().startswith('{"step": 0')


def test_a_run_without_push_goes_on_from_the_hub_when_told(server: LoopbackHub, tmp_path: Path, run: BaseRun) -> None:
    on_hub(server, tmp_path, 7)
    own = replace(run, push_to_hub=False, hub_model_id=None, hub_strategy="every_save")
    assert goes_on_from(replace(own, resume_from_checkpoint=f"{REPO}@{BRANCH}")) == "those of step 7"
    assert goes_on_from(replace(own, output_dir=str(tmp_path / "new"))) is None


@pytest.mark.parametrize("wanted", [None, "hub"])
@pytest.mark.parametrize(
    ("here", "there", "taken"), [(5, 7, "those of step 7"), (9, 7, "local"), (7, 7, "those of step 7")]
)
def test_the_newest_state_is_taken_wherever_it_is(
    server: LoopbackHub, tmp_path: Path, run: BaseRun, wanted: str | None, here: int, there: int, taken: str
) -> None:
    on_hub(server, tmp_path, there)
    on_disk(run, here)
    assert goes_on_from(replace(run, resume_from_checkpoint=wanted)) == taken


def test_latest_and_a_checkpoint_of_the_disk_are_taken_from_the_disk(
    server: LoopbackHub, tmp_path: Path, run: BaseRun
) -> None:
    on_hub(server, tmp_path, 7)
    on_disk(run, 5)
    for wanted in ("latest", str(run.folder / "checkpoints" / checkpoint_name(5))):
        assert goes_on_from(replace(run, resume_from_checkpoint=wanted)) == "local"


def test_a_damaged_disk_goes_on_from_the_hub(server: LoopbackHub, tmp_path: Path, run: BaseRun) -> None:
    on_hub(server, tmp_path, 7)
    on_disk(run, 9)
    (run.folder / "checkpoints" / checkpoint_name(9) / "weights").write_text("damaged")
    assert goes_on_from(replace(run, resume_from_checkpoint="hub")) == "those of step 7"


@pytest.mark.parametrize("wanted", [None, "hub"])
def test_a_run_begins_where_the_hub_has_nothing_yet(server: LoopbackHub, run: BaseRun, wanted: str | None) -> None:
    assert goes_on_from(replace(run, resume_from_checkpoint=wanted)) is None


@pytest.mark.parametrize(
    ("changes", "wanted", "message"),
    [
        ({"seed": 5}, None, f"{REPO}@{BRANCH} already holds a run, with seed=1337 instead of 5: replace it with"),
        ({"eval_steps": 5}, None, "instead of 5: continue it with --resume_from_checkpoint hub, replace it with"),
        ({"seed": 5}, "hub", f"{REPO}@{BRANCH} holds a run with seed=1337, which cannot continue with seed=5"),
        ({"seed": 5}, "latest", f"{REPO}@{BRANCH} holds a run with seed=1337, which cannot continue with seed=5"),
        ({"seed": 5}, f"{REPO}@{BRANCH}", f"{REPO}@{BRANCH} holds a run with seed=1337"),
        ({}, f"{REPO}@other", f"resume_from_checkpoint={REPO}@other: there is no such state on the Hub"),
        ({}, "tester/nowhere@main", "resume_from_checkpoint=tester/nowhere@main: there is no such state on the Hub"),
        ({"max_steps": 3}, "hub", "max_steps=3 is below step 7, from which the run continues"),
    ],
)
def test_a_state_of_another_run_is_neither_taken_nor_replaced(
    server: LoopbackHub, tmp_path: Path, run: BaseRun, changes: dict[str, int], wanted: str | None, message: str
) -> None:
    on_hub(server, tmp_path, 7)
    with pytest.raises(UserError, match=re.escape(message)):
        goes_on_from(replace(run, resume_from_checkpoint=wanted, **changes))
    assert changes.keys() == {"max_steps"} or not run.folder.exists()
    found = find_state(REPO, BRANCH)
    assert found and found.state.step == 7


def test_half_a_state_leaves_nothing_of_its_run(server: LoopbackHub, tmp_path: Path, run: BaseRun) -> None:
    on_hub(server, tmp_path, 7)
    server.damage(REPO, BRANCH, {"weights": b"damaged"})
    with pytest.raises(UserError, match="does not hold the whole state of a run .weights is damaged"):
        goes_on_from(run)
    assert not [path for path in run.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("resume_from_checkpoint", REPO, "no such folder; 'latest' takes the newest complete one, 'hub' the run's"),
        ("resume_from_checkpoint", "HUB", "HUB: there is no such folder"),
        ("resume_from_checkpoint", "", "resume_from_checkpoint=.: "),
        ("resume_from_checkpoint", f"{REPO}@", "there is no such folder"),
        ("resume_from_checkpoint", f"{REPO}@no branch", "there is no such state on the Hub"),
        ("resume_from_checkpoint", "a//b@main", "there is no such folder"),
        ("resume_from_checkpoint", "-a/b@main", "'-a/b' cannot be a repo's name"),
        ("hub_model_id", "tiny", "'tiny' cannot be a repo's name: give user/name"),
        ("hub_model_id", "", "'' cannot be a repo's name"),
        ("hub_model_id", "a/b/c", "'a/b/c' cannot be a repo's name"),
    ],
)
def test_names_of_nothing_are_one_line(
    server: LoopbackHub, tmp_path: Path, run: BaseRun, option: str, value: str, message: str
) -> None:
    on_hub(server, tmp_path, 7)
    with pytest.raises(UserError, match=re.escape(message)):
        goes_on_from(replace(run, **{option: value}))
    assert not run.folder.exists()


@pytest.mark.parametrize(
    "flag",
    ["--hub_strategy=", "--hub_strategy=sometimes", "--hub_strategy=Checkpoint", "--hub_private_repo=perhaps"],
)
def test_strategies_that_do_not_exist_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match="invalid choice: .*'all_checkpoints'|Truthy value expected: got perhaps"):
        parse_run(BaseRun, PRESETS, ["--preset=quickstart", "--push_to_hub", f"--hub_model_id={REPO}", flag])


def test_a_new_run_replaces_another_ones_state_when_it_is_told_to(
    server: LoopbackHub, tmp_path: Path, run: BaseRun
) -> None:
    on_hub(server, tmp_path, 7)
    new = replace(run, seed=5, overwrite_output_dir=True)
    assert goes_on_from(new) is None
    folder = RunFolder(new)
    uploader = CheckpointUploader(new, folder)
    uploader.begin(None)
    save(folder.checkpoints, 1)
    folder.record.write_text(new.to_yaml())
    uploader.push_checkpoint(folder.checkpoints / checkpoint_name(1))
    uploader.finish(is_complete=False)
    found = find_state(REPO, BRANCH)
    assert found and found.state.step == 1 and b"seed: 5" in found.records["run.yaml"]


def test_a_finished_run_that_the_hub_refuses_is_told_how_to_publish_its_model(
    server: LoopbackHub, tmp_path: Path, run: BaseRun
) -> None:
    run = replace(run, output_dir=str(write_run(tmp_path / "a run")), hub_private_repo=True, hub_strategy="end")
    uploader = CheckpointUploader(run, RunFolder(run))
    uploader.begin(None)
    server.fail("POST", "/commit/", status=403)
    with pytest.raises(
        UserError, match=r"may not write there.*finished.*: \S*fgpt publish '.*/a run' tester/tiny --private"
    ):
        uploader.finish(is_complete=True)


def test_a_run_that_goes_on_elsewhere_is_told_and_uploads_no_more(
    server: LoopbackHub, tmp_path: Path, run: BaseRun, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(run)
    uploader = CheckpointUploader(run, folder)
    uploader.begin(None)
    on_disk(run, 1)
    on_hub(server, tmp_path, 7)
    for _ in range(2):
        uploader.push_checkpoint(folder.checkpoints / checkpoint_name(1))
        uploader.finish(is_complete=False)
    said = [record.message for record in caplog.records if "another machine" in record.message]
    assert len(said) == 1 and "state of step 7 from another machine, where the run continues: this one" in said[0]
    found = find_state(REPO, BRANCH)
    assert found and found.state.step == 7


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_each_strategy_leaves_the_branches_that_it_promises(server: LoopbackHub, run: BaseRun, strategy: str) -> None:
    run = replace(run, hub_strategy=strategy)
    folder = RunFolder(run)
    uploader = CheckpointUploader(run, folder)
    uploader.begin(None)
    on_disk(run, 1)
    save(folder.checkpoints, 2)
    for step in (1, 2):
        (folder.checkpoints / checkpoint_name(step) / "config.json").write_text(f'{{"step": {step}}}')
        uploader.push_checkpoint(folder.checkpoints / checkpoint_name(step))
        uploader._queue.join()
    repo = server.repo("model", REPO)
    branches = {"checkpoint": {BRANCH}, "all_checkpoints": {BRANCH, checkpoint_name(1), checkpoint_name(2)}}
    assert repo.branches.keys() == {"main", *branches.get(strategy, set())}
    assert repo.files().get("config.json") == (None if strategy == "end" else b'{"step": 2}')
    assert all(STATE in repo.files(branch) for branch in repo.branches if branch != "main")


def test_a_token_that_may_not_write_is_refused_at_the_start(
    server: LoopbackHub, run: BaseRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by its role, and a fine-grained one when it is tried."""
    server.add_repo("model", REPO, {})
    server.fail("POST", "/preupload/", status=403)
    with pytest.raises(UserError, match="the token may not write there: use one with the role 'write'"):
        CheckpointUploader(run, RunFolder(run)).begin(None)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(UserError, match=f"the token may only read, and {REPO} is to be written"):
        CheckpointUploader(run, RunFolder(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": False}, "hub_strategy=checkpoint needs push_to_hub=true and hub_model_id=user/name"),
        (
            {"push_to_hub": False, "hub_strategy": "end", "hub_model_id": None, "resume_from_checkpoint": "hub"},
            "resume_from_checkpoint=hub needs hub_model_id=user/name; or give user/name@branch",
        ),
        (
            {"push_to_hub": False, "hub_strategy": "end"},
            f"hub_model_id={REPO} has no effect without push_to_hub=true: add --push_to_hub, or leave it out",
        ),
    ],
)
def test_options_that_lack_another_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        replace(RUN, **changes)


@pytest.mark.usefixtures("own_accelerator")
def test_a_training_command_asks_for_all_that_before_it_reads_data(
    server: LoopbackHub, tmp_path: Path, run: BaseRun
) -> None:
    on_hub(server, tmp_path, 7)
    stage = TrainingStage(run)
    with stage.opened():
        assert stage.folder.checkpoint is not None
        assert server.count("POST", "/preupload/") > 1
