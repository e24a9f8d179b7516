"""The loopback Hub, as the real clients see it: each scenario is a script in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.loopback_hub import ORGANIZATION, READ_TOKEN, WRITE_TOKEN, LoopbackHub, byte_range, hub_environment

BEFORE = """
import json, os
from huggingface_hub import HfApi
api = HfApi()

def error(call):
    try:
        call()
    except Exception as raised:
        return [type(raised).__name__, getattr(getattr(raised, "response", None), "status_code", None)]

"""
AFTER = """
print(json.dumps(result), flush=True)
os._exit(0)  # a stream that was not read to its end may hang at exit: https://github.com/apache/arrow/issues/45214
"""


class Client:
    """Runs scripts in a folder of their own, where `server` is the Hub."""

    def __init__(self, server: LoopbackHub, folder: Path) -> None:
        self.server, self.folder = server, folder

    def write(self, path: str, content: bytes) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)

    def run(self, script: str, token: str | None = WRITE_TOKEN, **environment: str) -> Any:
        """What the script left in `result`. It has an `api`, and `error(call)`: the exception's name and status."""
        command = [sys.executable, "-c", BEFORE + dedent(script) + AFTER]
        environment = {**hub_environment(self.server, self.folder, token), **environment}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with LoopbackHub() as server:
        yield Client(server, tmp_path)


# huggingface_hub


def test_a_folder_comes_back_as_it_was_uploaded(client: Client) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "figures/loss.png": b"\x89PNG\0", "empty": b""}
    for path, content in files.items():
        client.write(f"model/{path}", content)
    result = client.run(
        """
        from pathlib import Path
        from huggingface_hub import snapshot_download

        repo = api.create_repo("tester/tiny", private=True)
        assert api.create_repo("tester/tiny", exist_ok=True) == repo
        commit = api.upload_folder(repo_id="tester/tiny", folder_path="model")
        folder = Path(snapshot_download("tester/tiny"))
        result = {
            "user": api.whoami()["name"],
            "repo_id": repo.repo_id,
            "oid": commit.oid,
            "info": [api.repo_info("tester/tiny").sha, api.repo_info("tester/tiny").private],
            "listed": api.list_repo_files("tester/tiny"),
            "lfs_size": api.get_paths_info("tester/tiny", "model.safetensors")[0].lfs.size,
            "exists": [api.file_exists("tester/tiny", name) for name in ("config.json", "missing.json")],
            "downloaded": {str(f.relative_to(folder)): f.read_bytes().hex() for f in folder.rglob("*") if f.is_file()},
        }
        """
    )
    repo = client.server.repo("model", "tester/tiny")
    assert files.items() <= repo.files().items()
    assert result["downloaded"] == {path: content.hex() for path, content in repo.files().items()}
    assert result["listed"] == sorted(repo.files())
    assert result["lfs_size"] == len(b"weights")
    assert result["exists"] == [True, False]
    assert result["info"] == [repo.at("main").oid, True] == [result["oid"], True]
    assert (result["user"], result["repo_id"]) == ("tester", "tester/tiny")
    assert client.server.count("PUT", r"\.git/lfs/") == 2  # the weights and the binary figure


def test_an_unchanged_upload_makes_no_commit(client: Client) -> None:
    client.write("model/config.json", b"{}")
    client.write("model/model.safetensors", b"weights")
    oids = client.run(
        """
        api.create_repo("tester/tiny")
        result = [api.upload_folder(repo_id="tester/tiny", folder_path="model").oid for _ in range(2)]
        """
    )
    assert oids[0] == oids[1]
    assert client.server.count("POST", r"/commit/") == 1


def test_an_upload_resumes_with_the_lfs_files_that_are_there(client: Client) -> None:
    client.write("model/model.safetensors", b"weights")
    client.server.fail("POST", r"/commit/", status=503)
    result = client.run(
        """
        api.create_repo("tester/tiny")
        before = api.repo_info("tester/tiny").sha
        failure = error(lambda: api.upload_folder(repo_id="tester/tiny", folder_path="model"))
        result = [failure, api.repo_info("tester/tiny").sha == before]
        api.upload_folder(repo_id="tester/tiny", folder_path="model")
        """
    )
    assert result == [["HfHubHTTPError", 503], True]  # visible to the caller, and the branch is where it was
    assert client.server.repo("model", "tester/tiny").files()["model.safetensors"] == b"weights"
    assert client.server.count("PUT", r"\.git/lfs/") == 1


def test_branches_tags_and_commits_are_revisions(client: Client) -> None:
    repo = client.server.add_repo("model", "tester/tiny", {"config.json": "1", "old/a.txt": "a", "old/b.txt": "b"})
    first = repo.at("main").oid
    result = client.run(
        f"""
        from pathlib import Path
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def read(revision):
            return Path(api.hf_hub_download("tester/tiny", "config.json", revision=revision)).read_text()

        def put(content, **where):
            return api.upload_file(
                repo_id="tester/tiny", path_in_repo="config.json", path_or_fileobj=content, **where
            ).oid

        api.create_tag("tester/tiny", tag="v1")
        api.create_branch("tester/tiny", branch="try/this")
        put(b"2", revision="try/this")
        api.create_commit(
            "tester/tiny",
            [CommitOperationAdd("config.json", b"3"), CommitOperationDelete("old/")],
            commit_message="Third",
            parent_commit="{first}",
        )
        refs = api.list_repo_refs("tester/tiny")
        result = {{
            "read": [read(revision) for revision in ("v1", "try/this", "main", "{first}")],
            "refs": [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]],
            "titles": [commit.title for commit in api.list_repo_commits("tester/tiny")],
            "files": api.list_repo_files("tester/tiny"),
            "again": error(lambda: api.create_tag("tester/tiny", tag="v1")),
            "stale": error(lambda: put(b"4", parent_commit="{first}")),
        }}
        """
    )
    assert result == {
        "read": ["1", "2", "3", "1"],
        "refs": [["main", "try/this"], ["v1"]],
        "titles": ["Third", "Add files", "initial commit"],
        "files": [".gitattributes", "config.json"],
        "again": ["HfHubHTTPError", 409],
        "stale": ["HfHubHTTPError", 412],
    }
    assert repo.files("main")["config.json"] == b"3"
    assert [commit.oid for commit in repo.history("try/this")][1] == first


def test_a_card_with_refused_metadata_is_not_pushed(client: Client) -> None:
    repo = client.server.add_repo("model", "tester/tiny", {})
    before = repo.at("main").oid
    errors = client.run(
        """
        from huggingface_hub import ModelCard

        def push(metadata):
            return error(lambda: ModelCard(f"---\\n{metadata}\\n---\\n# Tiny").push_to_hub("tester/tiny"))

        def upload(metadata):
            content = f"---\\n{metadata}\\n---\\n".encode()
            return error(lambda: api.upload_file(
                repo_id="tester/tiny", path_in_repo="README.md", path_or_fileobj=content
            ))

        result = [push("license: beerware"), push("model-index: [{results: [{task: {}}]}]"), upload("license: [")]
        """
    )
    assert errors == [["ValueError", None]] * 3
    assert repo.at("main").oid == before


def test_a_card_tells_its_license_and_results(client: Client) -> None:
    client.server.add_repo("model", "tester/tiny", {})
    result = client.run(
        """
        from huggingface_hub import EvalResult, ModelCard, ModelCardData

        loss = EvalResult("text-generation", "wikitext", "WikiText", metric_type="loss", metric_value=3.2)
        data = ModelCardData(license="mit", library_name="transformers", model_name="Tiny", eval_results=[loss])
        ModelCard(f"---\\n{data.to_yaml()}\\n---\\n# Tiny\\n").push_to_hub("tester/tiny")
        result = [
            ModelCard.load("tester/tiny").data.license,
            api.model_info("tester/tiny").card_data.eval_results[0].metric_value,
        ]
        """
    )
    assert result == ["mit", 3.2]


def test_every_kind_of_repository_can_be_made_and_deleted(client: Client) -> None:
    result = client.run(
        f"""
        made = [
            api.create_repo("tiny").repo_id,
            api.create_repo("{ORGANIZATION}/poems", repo_type="dataset").repo_id,
            api.create_repo("tester/chat", repo_type="space", space_sdk="gradio").repo_id,
        ]
        sdk = api.space_info("tester/chat").sdk
        elsewhere = error(lambda: api.create_repo("somebody/tiny"))
        api.delete_repo("tester/tiny")
        result = [made, sdk, elsewhere, api.repo_exists("tester/tiny"), error(lambda: api.delete_repo("tester/tiny"))]
        """
    )
    assert result == [
        ["tester/tiny", f"{ORGANIZATION}/poems", "tester/chat"],
        "gradio",
        ["HfHubHTTPError", 403],
        False,
        ["RepositoryNotFoundError", 404],
    ]


def test_a_folder_can_be_placed_as_a_repository(client: Client) -> None:
    client.write("metric/src/length.py", b"code")
    repo = client.server.add_repo("space", "somebody/length", client.folder / "metric")
    assert repo.files()["src/length.py"] == b"code"


def test_what_a_client_may_not_have_is_refused_as_the_hub_refuses(client: Client) -> None:
    files = {"config.json": "{}"}
    client.server.add_repo("model", "tester/open", files)
    client.server.add_repo("model", "somebody/private", files, private=True)
    client.server.add_repo("model", "somebody/gated", files, gated=True)
    result = client.run(
        f"""
        def download(repo_id, path="config.json", **options):
            return error(lambda: api.hf_hub_download(repo_id, path, **options))

        def upload(token):
            return error(lambda: api.upload_file(
                repo_id="tester/open", path_in_repo="a.txt", path_or_fileobj=b"a", token=token
            ))

        result = {{
            "no such repo": download("tester/missing"),
            "no such revision": download("tester/open", revision="missing"),
            "no such entry": download("tester/open", "missing.json"),
            "private": download("somebody/private"),
            "gated": download("somebody/gated"),
            "gated, anonymous": download("somebody/gated", token=False),
            "read token": upload("{READ_TOKEN}"),
            "expired token": upload("hf_expired"),
            "expired token, whoami": error(lambda: api.whoami(token="hf_expired")),
        }}
        """
    )
    assert result == {
        "no such repo": ["RepositoryNotFoundError", 404],
        "no such revision": ["RevisionNotFoundError", 404],
        "no such entry": ["RemoteEntryNotFoundError", 404],
        "private": ["RepositoryNotFoundError", 404],
        "gated": ["GatedRepoError", 403],
        "gated, anonymous": ["GatedRepoError", 401],
        "read token": ["HfHubHTTPError", 403],
        "expired token": ["HfHubHTTPError", 401],
        "expired token, whoami": ["HfHubHTTPError", 401],
    }
    anonymous = 'result = error(lambda: api.hf_hub_download("somebody/private", "config.json"))'
    assert client.run(anonymous, token=None) == ["RepositoryNotFoundError", 401]


def test_a_download_is_cached_by_its_etag(client: Client) -> None:
    repo = client.server.add_repo("model", "tester/tiny", {"config.json": "1"})
    download = """
        from pathlib import Path
        result = [Path(api.hf_hub_download("tester/tiny", "config.json")).read_text() for _ in range(2)]
        """
    assert client.run(download) == ["1", "1"]
    repo.add({"other.txt": "another commit, the same content"})
    assert client.run(download) == ["1", "1"]
    assert (client.server.count("HEAD", "/resolve/"), client.server.count("GET", "/resolve/")) == (4, 1)


# faults


@pytest.mark.slow
def test_uploads_are_tried_again_after_503_and_after_a_dropped_connection(client: Client) -> None:
    client.write("model/model.safetensors", b"weights" * 300_000)
    client.server.fail("POST", r"/preupload/", status=503)
    client.server.fail("PUT", r"\.git/lfs/", drop=True)
    client.run(
        """
        api.create_repo("tester/tiny")
        result = api.upload_folder(repo_id="tester/tiny", folder_path="model").oid
        """
    )
    assert (client.server.count("POST", r"/preupload/"), client.server.count("PUT", r"\.git/lfs/")) == (2, 2)


def test_a_commit_whose_answer_is_lost_is_made_all_the_same(client: Client) -> None:
    repo = client.server.add_repo("model", "tester/tiny", {})
    client.server.fail("POST", r"/commit/", drop_after=0)
    script = """
        result = error(lambda: api.upload_file(
            repo_id="tester/tiny", path_in_repo="a.txt", path_or_fileobj=b"a", parent_commit="{}"
        ))
        """.format(repo.at("main").oid)
    assert client.run(script) == ["RemoteProtocolError", None]
    assert repo.files()["a.txt"] == b"a"
    assert client.run(script) is None  # nothing has changed, so nothing is committed


@pytest.mark.slow
def test_a_download_outlives_stalls_and_drops_but_not_a_wrong_size(client: Client) -> None:
    client.server.add_repo("model", "tester/tiny", {"model.safetensors": b"weights" * 300_000})
    client.server.fail("GET", r"/resolve/", delay=1.5)
    client.server.fail("GET", r"/resolve/", drop_after=1_000_000)
    download = """
        result = error(lambda: api.hf_hub_download("tester/tiny", "model.safetensors", force_download=True))
        """
    assert client.run(download, HF_HUB_DOWNLOAD_TIMEOUT="1") is None
    assert client.server.count("GET", r"/resolve/") == 3
    client.server.fail("GET", r"/resolve/", truncate_to=1_000_000)
    assert client.run(download) == ["OSError", None]


def test_nothing_goes_to_another_host(client: Client) -> None:
    failure = client.run(
        """
        from huggingface_hub import get_session
        result = error(lambda: get_session().get("https://huggingface.co/api/models/gpt2"))
        """
    )
    assert failure == ["ProxyError", None]
    assert client.server.strays == ["huggingface.co:443"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes=2-4", (2, 5)), ("bytes=7-", (7, 10)), ("bytes=-3", (7, 10)), ("bytes=8-99", (8, 10))],
)
def test_byte_ranges(header: str, expected: tuple[int, int]) -> None:
    assert byte_range(header, 10) == expected


# datasets, transformers, evaluate

CONFIGURED = """---
configs:
- config_name: default
  data_files: data/*.parquet
- config_name: sample
  data_files: sample/*.parquet
---
"""


def parquet(path: Path, texts: list[str]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


@pytest.mark.slow
def test_datasets_loads_shards_by_configuration_streaming_or_not(client: Client) -> None:
    shards = {
        f"data/{i}.parquet": parquet(client.folder / f"{i}.parquet", [f"{i}.{n}" for n in range(3)]) for i in range(3)
    }
    sample = {"sample/0.parquet": parquet(client.folder / "sample.parquet", ["one"])}
    client.server.add_repo("dataset", "somebody/poems", {"README.md": CONFIGURED, **shards, **sample})
    client.server.add_repo("dataset", "somebody/lines", {"train.jsonl": '{"text": "a"}\n{"text": "b"}\n'})
    result = client.run(
        """
        from datasets import load_dataset

        def texts(*arguments, **options):
            return [row["text"] for row in load_dataset(*arguments, split="train", **options)]

        result = [
            texts("somebody/poems", streaming=True),
            texts("somebody/poems"),
            texts("somebody/poems", "sample", streaming=True),
            texts("somebody/lines", streaming=True),
            texts("somebody/lines"),
        ]
        """
    )
    poems = [f"{shard}.{row}" for shard in range(3) for row in range(3)]
    assert result == [poems, poems, ["one"], ["a", "b"], ["a", "b"]]
    assert all("datasets-server.127.0.0.1" in stray for stray in client.server.strays)


@pytest.mark.slow
def test_datasets_streams_the_parts_of_a_shard_that_it_needs(client: Client) -> None:
    shard = client.folder / "large.parquet"
    table = pyarrow.table({"text": [str(n) for n in range(1000)], "image": [bytes(100_000)] * 1000})
    pyarrow.parquet.write_table(table, shard, row_group_size=10, compression="none", use_dictionary=False)
    client.server.add_repo("dataset", "somebody/large", {"train.parquet": shard})
    result = client.run(
        """
        from datasets import load_dataset
        result = next(iter(load_dataset("somebody/large", split="train", streaming=True, columns=["text"])))
        """
    )
    assert result == {"text": "0"}
    assert client.server.bytes_sent < shard.stat().st_size / 4


@pytest.mark.slow
def test_datasets_pushes_a_configuration(client: Client) -> None:
    result = client.run(
        """
        from datasets import Dataset, load_dataset

        Dataset.from_dict({"text": ["a", "b", "c"]}).push_to_hub("tester/poems", "small", num_shards=2, private=True)
        result = load_dataset("tester/poems", "small", split="train")["text"][:]
        """
    )
    assert result == ["a", "b", "c"]
    assert client.server.repo("dataset", "tester/poems").private


@pytest.mark.slow
def test_transformers_pushes_and_loads_a_model(client: Client) -> None:
    result = client.run(
        """
        import torch
        from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
        model.push_to_hub("tester/tiny")
        model.push_to_hub("tester/tiny", revision="next")
        loaded = AutoModelForCausalLM.from_pretrained("tester/tiny", revision="next")
        result = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
        """
    )
    assert result
    repo = client.server.repo("model", "tester/tiny")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= set(repo.files("main"))
    assert set(repo.branches) == {"main", "next"}
    assert client.server.strays == []


@pytest.mark.slow
def test_transformers_runs_the_code_of_a_revision(client: Client) -> None:
    config = {"model_type": "tiny", "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig"}}
    code = "from transformers import PreTrainedConfig\n\nclass TinyConfig(PreTrainedConfig):\n    model_type = 'tiny'\n"
    files = {"config.json": json.dumps(config), "configuration_tiny.py": code + "    answer = 1\n"}
    repo = client.server.add_repo("model", "tester/tiny", files)
    repo.tags["v1"] = repo.at("main").oid
    repo.add({"configuration_tiny.py": code + "    answer = 2\n"})
    result = client.run(
        """
        from transformers import AutoConfig

        def answer(revision):
            return AutoConfig.from_pretrained("tester/tiny", revision=revision, trust_remote_code=True).answer

        result = [answer("v1"), answer("main")]
        """
    )
    assert result == [1, 2]


METRIC = '''
import datasets
import evaluate

class Length(evaluate.Metric):
    """The mean length of the predictions."""

    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features({"predictions": datasets.Value("string")})
        )

    def _compute(self, predictions):
        return {"length": sum(map(len, predictions)) / len(predictions)}
'''


@pytest.mark.slow
def test_evaluate_loads_a_metric_from_a_space(client: Client) -> None:
    client.server.add_repo("space", "tester/length", {"length.py": METRIC})
    result = client.run(
        """
        import evaluate
        result = evaluate.load("tester/length").compute(predictions=["a", "abc"])
        """
    )
    assert result == {"length": 2.0}
    assert client.server.strays == []
