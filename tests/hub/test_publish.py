"""From a run's folder to a stranger who loads the model by its name."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from fgpt_hf.cli import main, train_base
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.gguf_files import CHAT_TURN
from fgpt_hf.hub.publish import commit_message, files_to_publish, size_table
from fgpt_hf.hub.run_record import read_run_record
from fgpt_hf.hub.upload import Destination
from fgpt_hf.hub.uploader import CheckpointUploader
from fgpt_hf.model.io import load_fgpt
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from fgpt_hf.training.run_folder import RunFolder
from tests.support.loopback_hub import LoopbackHub, hub_environment
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]
HERE = Destination(repo_id="tester/tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


STRANGER = """
    import json, sys
    sys.modules["fgpt_hf"] = None  # any import of it is now an ImportError
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    name, trust, revision = sys.argv[1], sys.argv[2] == "trust", sys.argv[3]
    options = dict(trust_remote_code=trust, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    AutoModel.from_pretrained(name, **options)
    chat = pipeline("text-generation", model=name, **options)
    answer = chat([{"role": "user", "content": "Hi"}], max_new_tokens=5, do_sample=False)
    print(json.dumps({
        "type": type(model).__name__,
        "logits": model(torch.tensor([[5, 6, 7]])).logits.tolist(),
        "prompt": tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False),
        "answer": answer[0]["generated_text"][-1],
    }))
"""


def loaded_by_a_stranger(server: LoopbackHub, folder: Path, trust: str, revision: str = "main") -> dict[str, Any]:
    """What a process without this project gets of tester/tiny."""
    script = dedent(STRANGER)
    environment = hub_environment(server, folder) | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script, "tester/tiny", trust, revision]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fgpt", "gpt2"])
def test_a_stranger_gets_the_published_model_by_its_name(
    run: Path, variant: str, server: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--as", variant, "--license", "mit", "--revision", "next", "--tag", "v1"]
    main.run(["publish", str(run), "tester/tiny", *options])
    repo = server.repo("model", "tester/tiny")
    assert repo.at("next").oid in capsys.readouterr().out and repo.tags["v1"] == repo.at("next").oid
    files = repo.files("next")
    assert not any(b"secret of" in content or str(run).encode() in content for content in files.values())
    assert any(name.endswith(".py") for name in files) == (variant == "fgpt")
    assert ModelCard(files["README.md"].decode()).data.license == "mit"  # type: ignore[attr-defined]
    assert files["figures/validation_loss.png"] and files[".eval_results/hellaswag.yaml"]

    found = loaded_by_a_stranger(server, tmp_path, "trust" if variant == "fgpt" else "stock", revision="v1")
    model, tokenizer = load_fgpt(str(run))
    assert found["type"] == {"fgpt": "FGPTForCausalLM", "gpt2": "GPT2LMHeadModel"}[variant]
    torch.testing.assert_close(
        torch.tensor(found["logits"]), model(torch.tensor([[5, 6, 7]])).logits, rtol=0, atol=1e-5
    )
    chat = [{"role": "user", "content": "Hi"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found["prompt"] == tokenizer.apply_chat_template(chat, tokenize=False)
    assert found["answer"] == {"role": "assistant", "content": tokenizer.decode(output, skip_special_tokens=True)}


def train_and_push(server: LoopbackHub, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A tiny run in `tmp_path/run` that pushes itself to tester/tiny."""
    text = "\n\n".join(f"Document {number} tells of {number * 7} tokens." for number in range(80))
    (tmp_path / "text.txt").write_text(text)
    shape = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--max_position_embeddings=96"]
    data = ["--dataset_name=text.txt", r"--document_separator=\n\n", "--validation_fraction=0.1"]
    steps = ["--max_steps=4", "--per_device_train_batch_size=2", *data]
    push = ["--push_to_hub", "--hub_model_id=tester/tiny", "--hub_private_repo", "--output_dir=run"]
    command = [
        sys.executable,
        str(ROOT / "train_base.py"),
        "--preset=quickstart",
        "--eval_tasks=",
        *shape,
        *steps,
        *push,
        *flags,
    ]
    environment = hub_environment(server, tmp_path) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_checkpoints_go_to_the_hub_while_the_run_goes_on_and_a_hub_that_fails_never_stops_it(
    server: LoopbackHub, tmp_path: Path
) -> None:
    server.fail("POST", r"/commit/", status=400, times=1)  # a refusal that is not tried again
    done = train_and_push(server, tmp_path, "--max_steps=40", "--save_steps=10", "--save_total_limit=1")
    assert done.returncode == 0, done.stderr
    assert "was not uploaded; training continues" in done.stdout
    titles = [commit.title for commit in server.repo("model", "tester/tiny").history()]
    assert titles[0].startswith("Step 40: ")
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.slow
def test_a_run_pushes_itself_with_its_card_when_it_ends(server: LoopbackHub, tmp_path: Path) -> None:
    done = train_and_push(server, tmp_path)
    assert done.returncode == 0, done.stderr
    repo = server.repo("model", "tester/tiny")
    assert any("during training" in commit.title for commit in repo.history())
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert repo.private
    assert repo.history()[0].title == f"Step 4: {last['tokens']:,} tokens, validation loss {last['eval_loss']:.3f}"
    card = ModelCard(repo.files()["README.md"].decode())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}  # type: ignore[attr-defined]
    assert results == {"loss": last["eval_loss"], "bits_per_byte": last["eval_bits_per_byte"]}
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]
    assert sum(split["documents"] for split in provenance.values()) == 80
    assert "`text.txt`" in card.text and str(tmp_path) not in card.text
    assert (tmp_path / "run" / "model" / "README.md").is_file()


def test_a_dry_run_shows_every_file_and_its_size_and_touches_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = sorted(run.rglob("*"))
    main.run(["publish", str(run), "tester/tiny", "--dry_run"])
    *lines, total = capsys.readouterr().out.splitlines()
    shown = {name: int(size.replace(",", "")) for size, name in (line.split() for line in lines)}
    assert shown.keys() == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("configuration_fgpt.py", "blocks_fgpt.py", "modeling_fgpt.py"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
        *("figures/validation_loss.png", ".eval_results/hellaswag.yaml", "metrics.jsonl", "samples.jsonl"),
        "notebook.ipynb",
    }
    assert shown["model.safetensors"] == (run / "model" / "model.safetensors").stat().st_size
    assert total.split() == [f"{sum(shown.values()):,}", "bytes", "in", str(len(shown)), "files"]
    assert sorted(run.rglob("*")) == before


def test_the_stock_variant_goes_without_code(run: Path) -> None:
    with files_to_publish(run, HERE, CardOptions(architecture="auto")) as files:
        assert not any(name.endswith(".py") for name in files)
        assert json.loads(Path(str(files["config.json"])).read_text())["architectures"] == ["GPT2LMHeadModel"]
        assert b"trust_remote_code" not in bytes(files["README.md"])
        assert "model.safetensors" in size_table(files)


@pytest.mark.slow
def test_gguf_files_go_beside_the_model_with_what_ollama_needs(run: Path) -> None:
    pytest.importorskip("gguf")
    options = CardOptions(architecture="auto", gguf=("q8_0", "BF16"))
    with files_to_publish(run, HERE, options) as files:
        names = [name for name in files if name.endswith(".gguf")]
        assert names == ["tiny-F16.gguf", "tiny-BF16.gguf"]  # its width is 16, and Q8_0 has blocks of 32
        card = bytes(files["README.md"]).decode()
        assert "ollama run hf.co/tester/tiny:F16\n" in card and "ollama run hf.co/tester/tiny:BF16\n" in card
        assert {"gguf", "gpt2"} <= set(ModelCard(card).data.to_dict()["tags"])
        assert bytes(files["template"]) == b"{{ .Prompt }}"
        assert json.loads(bytes(files["params"]))["stop"] == ["<|end|>", "<|endoftext|>"]


def test_ollama_prompts_a_chat_model_as_its_own_template_does(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    go = CHAT_TURN.partition("{{ .Response }}")[0]
    go = go.replace("{{ .System }}", "Be kind.").replace("{{ .Prompt }}", "Hi")
    assert re.sub(r"\{\{.*?\}\}", "", go) == rendered


@pytest.mark.slow
def test_an_exported_gpt2_is_published_as_it_is(run: Path, tmp_path: Path) -> None:
    main.run(["export", str(run), str(tmp_path / "gpt2"), "--format", "gpt2"])
    with files_to_publish(tmp_path / "gpt2", HERE, CardOptions(gguf=("F16",))) as files:
        assert files["config.json"] == tmp_path / "gpt2" / "config.json" and "tiny-F16.gguf" in files
        assert b"trust_remote_code" not in bytes(files["README.md"])


def test_the_commit_says_step_tokens_and_loss_as_far_as_they_are_known(run: Path) -> None:
    record = read_run_record(run / "model")
    assert commit_message(record) == "Step 400: 819,200 tokens, validation loss 4.700"
    in_training = replace(record, metrics=[{"step": 3, "tokens": 60, "seconds": 1.0, "loss": 9.5}])
    assert commit_message(in_training) == "Step 3: 60 tokens, training loss 9.500"
    assert commit_message(replace(record, metrics=[])) == "Publish the model"


# Bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{run}", "tiny"], "'tiny' cannot be a repo's name: give user/name"),
        (["{empty}", "tester/tiny"], "neither the folder nor its model/ holds config.json and"),
        (["{empty}/none", "tester/tiny"], "no model "),
        (["{run}", "tester/tiny"], "no token for the Hub: run `hf auth login`, or set HF_TOKEN"),
        (["{run}", "tester/tiny", "--dry_run", "--tag", "v 1"], "tag='v 1' cannot be a name in git: give letters"),
        (["{run}", "tester/tiny", "--dry_run", "--revision", "../x"], "revision='../x' cannot be a name in git"),
        (["{run}", "tester/tiny", "--dry_run", "--base_model", "runs/x/base"], "base_model='runs/x/base' cannot be a"),
        (["{run}", "tester/tiny", "--dry_run", "--space", "chat"], "'chat' cannot be a repo's name: give user/name"),
        (["{run}", "tester/tiny", "--as", "bert"], "'bert' is not one of 'fgpt', 'auto', 'gpt2'"),
        (["{run}", "tester/tiny", "--as", "llama"], "LlamaForCausalLM lacks position_embedding='learned' (it needs"),
        (["{run}", "tester/tiny", "--gguf", "Q5_1"], "outtype='Q5_1' is unknown: choose from F32, F16, BF16, Q8_0"),
        (["{run}", "tester/tiny", "--watts", "many"], "'--watts': 'many' should be a valid number"),
        (["{run}", "tester/tiny", "--watts", "-3"], "watts=-3.0 must be above zero"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    arguments: Any,
    problem: Any,
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    places = {"run": run, "empty": tmp_path}
    monkeypatch.setattr("sys.argv", ["fgpt", "publish", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


def with_damage(run: Path, folder: Path, name: str, content: bytes | Path) -> Path:
    """A copy of a run in which one file holds other bytes, or is a link."""
    shutil.copytree(run, folder)
    (folder / name).unlink()
    if isinstance(content, Path):
        (folder / name).symlink_to(content)
    else:
        (folder / name).write_bytes(content)
    return folder


RUN_FILES = ("metrics.jsonl", "samples.jsonl", "results.json", "provenance.json", "run.yaml")


@pytest.mark.parametrize("name", [*RUN_FILES, "figures/validation_loss.png", "model/model.safetensors"])
def test_a_link_in_a_run_or_its_model_is_refused_before_the_hub_is_asked(
    name: str, run: Path, server: LoopbackHub, tmp_path: Path
) -> None:
    linked = with_damage(run, tmp_path / "run", name, run / name)
    with pytest.raises(UserError, match=f"{Path(name).name} is a link to .*, and publish follows none"):
        main.run(["publish", str(linked), "tester/tiny"])
    assert server.requests == []


def test_an_adapter_is_not_published_as_a_stock_gpt2_that_its_card_would_deny(run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "model", adapter, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    shutil.copy(run / "model" / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is an adapter, .*: merge it with `fgpt export .* --format auto`, and publish"
    ):
        main.run(["publish", str(adapter), "tester/tiny", "--as", "gpt2", "--dry_run"])


@pytest.mark.parametrize("folder", ["model", "figures"])
def test_a_linked_folder_is_refused(folder: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / folder)
    (tmp_path / "run" / folder).symlink_to(run / folder)
    with pytest.raises(UserError, match=f"{folder} is a link to .*, and publish follows none"):
        main.run(["publish", str(tmp_path / "run"), "tester/tiny", "--dry_run"])


@pytest.mark.parametrize("variant", ["fgpt", "gpt2"])
def test_weights_that_are_cut_are_refused_before_the_hub_is_asked(
    variant: str, run: Path, server: LoopbackHub, tmp_path: Path
) -> None:
    whole = (run / "model" / "model.safetensors").read_bytes()
    cut = with_damage(run, tmp_path / "run", "model/model.safetensors", whole[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: "):
        main.run(["publish", str(cut), "tester/tiny", "--as", variant])
    assert server.requests == []


def test_a_run_stopped_while_it_goes_on_publishes_no_earlier_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fgpt_hf")
    monkeypatch.setattr("fgpt_hf.hub.uploader.check_access", lambda repo_id: None)
    monkeypatch.setattr("fgpt_hf.hub.uploader.publish", lambda *arguments: "its address")
    continued = replace(
        PRESETS["quickstart"], output_dir=str(run), max_steps=9, push_to_hub=True, hub_model_id="tester/tiny"
    )
    uploader = CheckpointUploader(continued, RunFolder(continued))
    uploader.finish(is_complete=False)
    assert caplog.messages == []
    uploader.finish(is_complete=True)
    assert caplog.messages == ["published: its address"]


def test_a_run_that_cannot_be_pushed_is_refused_before_it_begins() -> None:
    with pytest.raises(ValueError, match="push_to_hub=true needs hub_model_id=user/name"):
        parse_run(BaseRun, PRESETS, ["--push_to_hub"])


@pytest.mark.usefixtures("own_accelerator")
def test_a_run_without_a_token_is_refused_before_it_makes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    push = ["--push_to_hub", "--hub_model_id", "tester/tiny", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="no token for the Hub"):
        train_base.main(["--preset", "quickstart", *push])
    assert not (tmp_path / "run").exists()
