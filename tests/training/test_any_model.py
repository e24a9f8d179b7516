"""Runs from models of several classes: trained, tuned, aligned, resumed, scored, chatted with, exported, described."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, OPTConfig

from fgpt_hf.chat import ChatSession, load_for_chat
from fgpt_hf.cli import train_base, train_instruct, train_preference
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.convert.export import export
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import Benchmark
from fgpt_hf.files import read_json, read_json_lines
from fgpt_hf.hub.front_matter import split_card
from fgpt_hf.model.io import load_model, save_model
from fgpt_hf.training.start_model import open_model
from fgpt_hf.training.state import _stored_weights
from tests.support.any_models import (
    NAMES,
    any_config,
    any_tokenizer,
    save_any,
    write_chats,
    write_documents,
    write_pairs,
)
from tests.support.forked import run_command
from tests.support.loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow

EVERY = [
    *("--warmup_steps=1", "--bf16=false", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1"),
    *("--eval_steps=99", "--sample_steps=99", "--learning_rate=0.01"),
]
TUNING = [
    "--preset=rasbt",
    "--max_steps=2",
    "--save_steps=99",
    "--max_new_tokens=4",
    "--validation_prompts=1",
    "--max_length=64",
]
DOCUMENTS = ["--max_position_embeddings=48", "--sample_prompt=The", "--validation_fraction=0.2", "--streaming=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    write_documents(folder / "documents.jsonl")
    write_chats(folder / "chats.jsonl")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module", params=NAMES)
def runs(request: pytest.FixtureRequest, place: Path) -> Any:
    """The folders of a base run, an instruct run from it, and a preference run of adapters on that."""
    name = request.param
    start = save_any(name, place / name)
    (start / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A start")
    done = {stage: place / f"{name}-{stage}" for stage in ("base", "instruct", "preference")}
    for folder in done.values():  # made again where a worker took tests of other models in between
        shutil.rmtree(folder, ignore_errors=True)
    command = [f"--model_name_or_path={start}", f"--dataset_name={place / 'documents.jsonl'}"]
    base = [*EVERY, *DOCUMENTS, *command, "--max_steps=4", "--save_steps=2"]
    said = train(train_base, *base, "--print_groups", f"--output_dir={done['base']}")
    assert "matrices inside the layers, such as" in said and "embeddings and head, such as" in said
    chats = [f"--model_name_or_path={done['base']}", f"--dataset_name={place / 'chats.jsonl'}"]
    train(train_instruct, *EVERY, *TUNING, *chats, f"--output_dir={done['instruct']}")
    pairs = [f"--model_name_or_path={done['instruct']}", f"--dataset_name={place / 'pairs.jsonl'}"]
    lora = ["--use_peft", "--lora_r=2"]
    train(train_preference, *EVERY, *TUNING, *pairs, *lora, f"--output_dir={done['preference']}")
    return SimpleNamespace(name=name, start=start, base_command=base, **done)


def train(stage: Any, *flags: str) -> str:
    done = run_command(f"{stage.__name__.rpartition('.')[2]}.py", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_each_stage_learns_and_leaves_a_folder_that_transformers_loads(runs: Any) -> None:
    before = AutoModelForCausalLM.from_pretrained(runs.start)
    for stage in (runs.base, runs.instruct, runs.preference):
        model = AutoModelForCausalLM.from_pretrained(stage / "model")
        assert type(model) is type(before) and model.dtype == torch.float32
        lines = read_json_lines(stage / "metrics.jsonl")
        assert all(line["skipped_steps"] == 0 for line in lines if "skipped_steps" in line)
        embeddings = [each.get_input_embeddings().weight for each in (before, model)]
        assert not torch.equal(*(rows[: len(embeddings[0])] for rows in embeddings))
    losses = [line["eval_loss"] for line in read_json_lines(runs.base / "metrics.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0]


def test_a_base_run_goes_on_bit_by_bit_from_a_checkpoint(runs: Any, tmp_path: Path) -> None:
    again = shutil.copytree(runs.base, tmp_path / "again")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    train(train_base, *runs.base_command, f"--output_dir={again}", "--resume_from_checkpoint=latest")
    found, expected = weights(again / "model"), weights(runs.base / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_tokenizer_is_the_models_and_a_missing_template_is_added(runs: Any) -> None:
    start, tuned = (AutoTokenizer.from_pretrained(folder) for folder in (runs.start, runs.instruct / "model"))
    if start.chat_template:
        assert tuned.chat_template == start.chat_template and len(tuned) == len(start)
    else:
        assert len(tuned) == len(start) + 4 and "<|assistant|>" in tuned.get_vocab()
    assert tuned.eos_token == start.eos_token
    ends = read_json(runs.instruct / "model" / "generation_config.json")["eos_token_id"]
    turn = "<|im_end|>" if start.chat_template else "<|end|>"
    assert {tuned.eos_token_id, tuned.convert_tokens_to_ids(turn)} <= set(ends)


def test_the_result_is_scored_and_chatted_with(runs: Any) -> None:
    from accelerate import Accelerator

    model, tokenizer = load_model(str(runs.preference / "model"))
    result = Benchmark("pydocs-choice", tokenizer, limit=2).run(Accelerator(cpu=True), model)
    assert 0 <= result.metrics["acc"] <= 1
    session = ChatSession(*load_for_chat(str(runs.preference / "model"), "float32"), {"do_sample": False}, 4)
    assert session.answers
    session.answer("What is 3?", write=lambda text: None)
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_it_is_exported_or_refused_in_one_line(runs: Any, tmp_path: Path) -> None:
    refusals = {
        "smollm3": "is a smollm3, and FGPT models, gpt2, llama, qwen3, arcee, nanochat are exported",
        "nanochat": "llama.cpp does not know nanochat",
    }
    target = tmp_path / "model.gguf"
    if runs.name in refusals:
        with pytest.raises(UserError, match=refusals[runs.name]):
            export(str(runs.base), target, "gguf")
    elif runs.name == "qwen3":
        with pytest.raises(UserError, match="write the model's folder with llama.cpp's own convert_hf_to_gguf.py"):
            export(str(runs.base), target, "gguf")
    else:
        assert export(str(runs.base), target, "gguf").endswith("F32") and target.stat().st_size > 100_000
    with pytest.raises(UserError, match=runs.name):
        export(str(runs.base), tmp_path / "stock", "auto")


def test_the_card_says_where_it_comes_from(runs: Any) -> None:
    fields, text = split_card((runs.preference / "model" / "README.md").read_text())
    assert fields["license"] == "apache-2.0"  # the start's, carried over three stages
    assert "trust_remote_code" not in text and f"`{runs.name}`" in text
    has_added = "Its tokenizer was given a chat template and" in text
    assert has_added == (runs.name in ("gpt2", "smollm3"))
    assert "after base training and instruction tuning" in text


def test_a_base_model_on_the_hub_is_named_with_its_relation(runs: Any, tmp_path: Path) -> None:
    from fgpt_hf.hub.card import write_card

    run = shutil.copytree(runs.base, tmp_path / "run")
    recorded = yaml.safe_load((run / "run.yaml").read_text()) | {"model_name_or_path": "somebody/start"}
    (run / "run.yaml").write_text(yaml.safe_dump(recorded))
    fields, text = split_card(write_card(run / "model").read_text())
    assert (fields["base_model"], fields["base_model_relation"]) == ("somebody/start", "finetune")
    assert "It was trained from [somebody/start]" in text


def test_a_generation_config_that_transformers_would_not_save_does_not_stop_a_run(tmp_path: Path) -> None:
    """Llama 2's has a temperature and does not sample."""
    start = save_any("llama", tmp_path / "llama")
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (start / "generation_config.json").write_text(json.dumps(settings))
    model = open_model(InstructRun(model_name_or_path=str(start))).model
    model.save_pretrained(tmp_path / "saved")
    saved = read_json(tmp_path / "saved" / "generation_config.json")
    assert saved["do_sample"] is True and saved["temperature"] == 0.6 and 2 in saved["eos_token_id"]


def test_experts_that_files_hold_by_other_names_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    start = any_config("llama").to_dict() | {"num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**{**start, "model_type": "mixtral"}))
    weights = model.state_dict()
    save_model(model, any_tokenizer("llama"), tmp_path, dict(weights))
    assert not set(weights) <= set(load_file(tmp_path / "model.safetensors"))
    found = _stored_weights(model, tmp_path)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


# Bad input, each refused in one line


def refused(stage: Any, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        stage.main([*EVERY, *flags])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_that_contradict_the_model_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    start = save_any("llama", tmp_path / "llama")
    flags = [
        f"--model_name_or_path={start}",
        f"--dataset_name={place / 'documents.jsonl'}",
        f"--output_dir={tmp_path}/o",
    ]
    wide = refused(train_base, *flags, *DOCUMENTS, "--hidden_size=48")
    assert wide.startswith("hidden_size=48 contradicts") and "has hidden_size=32" in wide
    long = refused(train_base, *flags, "--max_position_embeddings=1024")
    assert long.startswith("max_position_embeddings=1024 is longer than the context") and "512" in long
    assert "exclude each other" in refused(train_base, *flags, "--tokenizer=gpt2")
    assert not (tmp_path / "o").exists()


def test_models_that_cannot_learn_are_refused(place: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel, T5Config

    chats = [*TUNING, f"--dataset_name={place / 'chats.jsonl'}", f"--output_dir={tmp_path}/o"]

    def answer(folder: Path, *flags: str) -> str:
        return refused(train_instruct, *chats, f"--model_name_or_path={folder}", *flags)

    start = save_any("llama", tmp_path / "quantized")
    config = read_json(start / "config.json") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (start / "config.json").write_text(json.dumps(config))
    assert "is quantized, and quantized weights cannot be trained" in answer(start)

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    encoder = save_any("gpt2", tmp_path / "bert")
    BertLMHeadModel(BertConfig(vocab_size=400, **shape)).save_pretrained(encoder)
    assert "as in an encoder" in answer(encoder)

    T5Config(d_model=16, d_kv=8, num_layers=1, num_heads=2).save_pretrained(save_any("gpt2", tmp_path / "t5"))
    assert "an encoder with a decoder" in answer(tmp_path / "t5")

    short = save_any("llama", tmp_path / "short", vocab_size=300)
    assert "tokens but 300 embeddings" in answer(short)

    endless = save_any("gpt2", tmp_path / "endless")
    settings = read_json(endless / "tokenizer_config.json")
    settings.pop("eos_token")
    (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no end of text" in answer(endless)
    assert "load_in_4bit needs use_peft" in answer(start, "--load_in_4bit")


def test_an_adapter_is_kept_apart_unless_the_embeddings_grow(place: Path, tmp_path: Path) -> None:
    llama, gpt2 = (save_any(name, tmp_path / name) for name in ("llama", "gpt2"))
    flags = [*TUNING, f"--dataset_name={place / 'chats.jsonl'}", "--use_peft", "--merge_adapter=false"]
    train(train_instruct, *EVERY, *flags, f"--model_name_or_path={llama}", f"--output_dir={tmp_path}/run")
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    model, _ = load_model(str(tmp_path / "run" / "model"))
    assert model.config.model_type == "llama"
    assert "trust_remote_code" not in (tmp_path / "run" / "model" / "README.md").read_text()
    said = refused(train_instruct, *flags, f"--model_name_or_path={gpt2}", f"--output_dir={tmp_path}/o")
    assert "An adapter that is kept apart cannot hold these: leave merge_adapter at true" in said


def test_documents_that_a_model_does_not_keep_apart_have_rows_of_their_own(place: Path, tmp_path: Path) -> None:
    start = save_any("gpt2", tmp_path / "opt")
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=512, num_attention_heads=2, max_position_embeddings=128, pad_token_id=1, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(start)
    flags = [*EVERY, f"--model_name_or_path={start}"]
    base = [*DOCUMENTS, f"--dataset_name={place / 'documents.jsonl'}", "--max_steps=1"]
    said = train(train_base, *flags, *base, f"--output_dir={tmp_path}/base")
    assert "mixes the documents of a packed row" in said
    chats = [*TUNING, f"--dataset_name={place / 'chats.jsonl'}"]
    assert "57 conversations in 57 rows" in train(train_instruct, *flags, *chats, f"--output_dir={tmp_path}/chat")


def test_an_estimate_reads_the_shape_of_a_model(tmp_path: Path) -> None:
    from fgpt_hf.runtime.estimation import describe_estimation, parse_estimation

    start = save_any("qwen3", tmp_path / "qwen3")
    parameters = AutoModelForCausalLM.from_pretrained(start).num_parameters()
    lines = describe_estimation(parse_estimation(["--model_name_or_path", str(start), "--device", "h100"])).splitlines()
    assert lines[0].startswith("a qwen3: parameters and operations are those of its configuration")
    assert lines[1].startswith(f"{parameters:,} parameters")


def test_a_gated_or_missing_repo_and_code_of_its_own_are_refused(server: LoopbackHub, tmp_path: Path) -> None:
    from fgpt_hf.model.io import load_config

    server.add_repo("model", "somebody/gated", {"config.json": b"{}"}, gated=True)
    with pytest.raises(UserError, match="somebody/gated is gated: accept its terms at .*, then log in with `hf auth"):
        load_config("somebody/gated")
    with pytest.raises(UserError, match="no model 'somebody/nothing': give a folder"):
        load_config("somebody/nothing")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match="comes with code of its own.*give --trust_remote_code"):
        load_config(str(tmp_path))


def test_sharded_weights_of_another_class_take_the_same_way(place: Path, tmp_path: Path) -> None:
    start = save_any("gpt2", tmp_path / "gpt2")
    data = [f"--model_name_or_path={start}", f"--dataset_name={place / 'documents.jsonl'}", "--max_steps=2"]
    losses = []
    for processes, flags in ((1, ["--gradient_accumulation_steps=2"]), (2, ["--fsdp"])):
        folder = tmp_path / str(processes)
        command = [*EVERY, *DOCUMENTS, *data, *flags, f"--output_dir={folder}"]
        done = run_command("train_base.py", *command, processes=processes)
        assert done.returncode == 0, done.stderr
        losses.append([line.get("eval_loss") for line in read_json_lines(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
