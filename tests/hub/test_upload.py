"""Pushing to the Hub: all or nothing, what may pass is tried again, and every refusal is one clear line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from fgpt_hf.errors import UserError
from fgpt_hf.hub.card import build_card
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.publish import keep_published_text
from fgpt_hf.hub.published_files import Content, Files
from fgpt_hf.hub.run_record import read_run_record
from fgpt_hf.hub.upload import (
    Destination,
    PublishedFiles,
    check_access,
    push_files,
)
from tests.support.loopback_hub import ORGANIZATION, READ_TOKEN, WRITE_TOKEN, LoopbackHub
from tests.support.run_folders import write_run

WEIGHTS = safetensors.numpy.save({"weight": np.zeros(3, dtype=np.float32)})
FILES: dict[str, Content] = {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": b"# Tiny\n"}
REPO = "tester/tiny"
HERE = Destination(repo_id=REPO)


def test_one_commit_brings_all_files_and_its_message(server: LoopbackHub) -> None:
    url = push_files(FILES, HERE, "Step 400: 819,200 tokens, validation loss 4.700")
    repo = server.repo("model", REPO)
    assert {name: repo.files()[name] for name in FILES} == FILES
    assert repo.history()[0].title == "Step 400: 819,200 tokens, validation loss 4.700"
    assert url.endswith(repo.at("main").oid)
    assert len(repo.history()) == 2  # the Hub's own first commit, and this


def test_an_unchanged_push_makes_no_commit_and_a_changed_one_uploads_the_change_alone(server: LoopbackHub) -> None:
    assert push_files(FILES, HERE, "one") == push_files(FILES, HERE, "two")
    push_files(FILES | {"config.json": b'{"a": 1}'}, HERE, "three")
    assert [commit.title for commit in server.repo("model", REPO).history()] == ["three", "one", "initial commit"]
    assert server.count("PUT", r"\.git/lfs/") == 1


def test_weights_and_code_of_before_go_and_what_people_added_stays(server: LoopbackHub) -> None:
    shards = {f"model-0000{number}-of-00002.safetensors": b"%d" % number for number in (1, 2)}
    push_files(shards | {"modeling_fgpt.py": b"", "model.safetensors.index.json": b"{}"}, HERE, "sharded")
    added = {"paper.pdf": "by hand", "figures/mine.png": "by hand"}
    added |= {"extra/model.safetensors": "a star", "model/tiny.safetensors": "stands for no slash"}
    server.repo("model", REPO).add(added)
    push_files(FILES, HERE, "whole")
    files = server.repo("model", REPO).files()
    assert files.keys() == {".gitattributes", *FILES, *added}


def test_what_was_measured_goes_with_the_weights_that_it_was_measured_on(server: LoopbackHub, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    card = build_card(read_run_record(run / "model"), CardOptions()).encode()
    measured: dict[str, Content] = {"metrics.jsonl": b"{}\n", ".eval_results/hellaswag.yaml": b"[]"}
    push_files(FILES | measured | {"README.md": card}, HERE, "first", keep_published_text)
    (run / "results.json").unlink()
    card = build_card(read_run_record(run / "model"), CardOptions()).encode()
    push_files(FILES | {"README.md": card}, HERE, "the same weights", keep_published_text)
    files = server.repo("model", REPO).files()
    assert measured.keys() <= files.keys() and b"hellaswag" in files["README.md"]
    others = FILES | {"README.md": card, "model.safetensors": b"others"}
    push_files(others, HERE, "other weights", keep_published_text)
    files = server.repo("model", REPO).files()
    assert not measured.keys() & files.keys() and b"hellaswag" not in files["README.md"]
    assert b"eval_loss" not in files["README.md"] and b"validation" in files["README.md"]


def test_private_organisation_revision_and_tag_are_options(server: LoopbackHub) -> None:
    place = Destination(repo_id=f"{ORGANIZATION}/tiny", private=True, revision="next", tag="v1.0")
    push_files(FILES, place, "first")
    repo = server.repo("model", f"{ORGANIZATION}/tiny")
    assert repo.private and set(repo.branches) == {"main", "next"}
    assert repo.tags == {"v1.0": repo.at("next").oid} and "config.json" not in repo.files("main")
    push_files(FILES, place, "again")  # nothing new: the tag names it already
    with pytest.raises(UserError, match=r"tag=v1.0 already names another commit of loopback-lab/tiny"):
        push_files(FILES | {"config.json": b"[]"}, place, "more")


def test_what_people_wrote_in_the_card_survives(server: LoopbackHub, tmp_path: Path) -> None:
    push_files(FILES, HERE, "first")
    server.repo("model", REPO).add({"README.md": "---\nlicense: mit\n---\n\n# By a person\n"})
    card = build_card(read_run_record(write_run(tmp_path / "run") / "model"), CardOptions())
    push_files(FILES | {"README.md": card.encode()}, HERE, "second", keep_published_text)
    card = server.repo("model", REPO).files()["README.md"].decode()
    assert "# By a person" in card and "- torch 2.13.0" in card and "license: mit" in card and "library_name" in card


def test_a_push_that_finds_a_newer_commit_merges_what_people_wrote_in_between(server: LoopbackHub) -> None:
    push_files(FILES, HERE, "first")
    seen: list[Any] = []

    def amend(files: Files, published: PublishedFiles) -> Files:
        if not seen:
            server.repo("model", REPO).add({"README.md": "# By a person\n"})
        seen.append(published.read_card())
        return {**files, "README.md": f"{seen[-1]} and more".encode()}

    push_files(FILES | {"config.json": b"[]"}, HERE, "second", amend)
    assert seen == ["# Tiny\n", "# By a person\n"]
    assert server.repo("model", REPO).files()["README.md"] == b"# By a person\n and more"


# Faults

STEPS = [
    ("GET", r"/api/whoami"),
    ("GET", r"/api/models/tester/tiny$"),
    ("POST", r"/api/repos/create"),
    ("POST", r"/branch/"),
    ("GET", r"/refs"),
    ("GET", r"/revision/"),
    ("POST", r"/validate-yaml"),
    ("POST", r"/preupload/"),
    ("POST", r"/objects/batch"),
    ("PUT", r"\.git/lfs/"),
    ("POST", r"/commit/"),
    ("POST", r"/tag/"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"drop_after": 0}], ids=str)
@pytest.mark.parametrize(("method", "path"), STEPS, ids=[path for _, path in STEPS])
def test_a_passing_failure_at_any_step_is_tried_again(server: LoopbackHub, method: str, path: str, fault: dict) -> None:
    server.fail(method, path, **fault)
    push_files(FILES, Destination(repo_id=REPO, revision="next", tag="v1"), "whole")
    repo = server.repo("model", REPO)
    assert FILES.items() <= repo.files("next").items()
    assert repo.tags == {"v1": repo.at("next").oid}
    assert [commit.title for commit in repo.history("next")].count("whole") == 1


def test_a_stale_parent_is_read_again(server: LoopbackHub) -> None:
    push_files(FILES, HERE, "first")
    server.fail("POST", r"/commit/", status=412)
    push_files(FILES | {"config.json": b"[]"}, HERE, "second")
    assert server.repo("model", REPO).files()["config.json"] == b"[]"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"status": 503}, "tester/tiny: the Hub answered 503 .*; publish again to continue where it stopped"),
        ({"drop": True}, "tester/tiny: the Hub cannot be reached .*; publish again to continue where it stopped"),
    ],
    ids=["503", "drop"],
)
def test_a_failure_that_stays_is_one_line_and_moves_nothing(server: LoopbackHub, fault: dict, problem: str) -> None:
    before = server.add_repo("model", REPO, {"config.json": "old"}).at("main").oid
    server.fail("POST", r"/commit/", times=99, **fault)
    with pytest.raises(UserError, match=problem):
        push_files(FILES, HERE, "whole")
    assert server.repo("model", REPO).at("main").oid == before


# Bad input


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "tester/", "/tiny", "tester/ti ny", "tester/tiny.git", "", "te--ster/x"]
)
def test_a_name_that_no_repo_can_have_is_refused(server: LoopbackHub, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be a repo's name: give user/name"):
        check_access(name)
    assert server.requests == []


def test_no_token_is_said_before_anything_is_asked(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UserError, match="no token for the Hub: run `hf auth login`, or set HF_TOKEN"):
        push_files(FILES, HERE, "whole")
    assert server.requests == []


@pytest.mark.parametrize(
    ("token", "repo_id", "problem"),
    [
        (READ_TOKEN, REPO, "the token may only read, and tester/tiny is to be written: use one with the role 'write'"),
        ("hf_expired", REPO, r"the token is not valid \(it may have expired\): run `hf auth login` again"),
        (WRITE_TOKEN, "somebody/tiny", "the token may not write there: use one with the role 'write', of the owner"),
    ],
)
def test_a_token_that_will_not_do_is_refused(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, token: Any, repo_id: Any, problem: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=problem):
        push_files(FILES, Destination(repo_id=repo_id), "whole")
    assert not server.endpoints.repos


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_repo_of_another_type_is_refused(server: LoopbackHub, kind: Any) -> None:
    server.add_repo(kind, REPO, {})
    with pytest.raises(UserError, match=f"tester/tiny is a {kind} on the Hub: choose another name for the model"):
        push_files(FILES, HERE, "whole")


def test_a_public_repo_does_not_turn_private_unnoticed(server: LoopbackHub) -> None:
    server.add_repo("model", REPO, {})
    with pytest.raises(UserError, match="tester/tiny exists and is public: make it private in its settings, or choose"):
        push_files(FILES, Destination(repo_id=REPO, private=True), "whole")


def test_a_card_that_the_hub_refuses_is_said_before_the_upload(server: LoopbackHub) -> None:
    with pytest.raises(UserError, match=r"Invalid metadata in README.md.*\n.*license"):
        push_files(FILES | {"README.md": b"---\nlicense: none-of-these\n---\n"}, HERE, "whole")
    assert server.count("PUT", r"\.git/lfs/") == 0


def test_an_offline_machine_is_said_so(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="tester/tiny cannot be reached offline: unset HF_HUB_OFFLINE"):
        push_files(FILES, HERE, "whole")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="tester/tiny: the Hub cannot be reached .*refused"):
        push_files(FILES, HERE, "whole")
