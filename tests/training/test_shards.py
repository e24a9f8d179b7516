"""Several processes write their shards of a checkpoint in the background, and any number of them goes on from it."""

import pickle
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.parser import parse_run
from fgpt_hf.data.batches import RowsInMemory, ShuffledRows
from fgpt_hf.errors import UserError
from fgpt_hf.files import integrity_error
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.model.io import load_fgpt
from fgpt_hf.runtime.distributed import shard, start_accelerator
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from fgpt_hf.training import shards
from fgpt_hf.training.checkpoints import checkpoints
from fgpt_hf.training.optim import build_optimizer
from fgpt_hf.training.state import Progress, TrainingState
from tests.support.launched import Launched
from tests.support.loop_run import TINY, TinyRun, ragged_rows

STEP = "step_00000003"


def save_again(arguments: Sequence[str]) -> None:
    """Restore the checkpoint that a run names, on these processes, and save it under the run's own folder."""
    torch.set_num_threads(1)
    run = parse_run(TinyRun, {"tiny": TINY}, ["--preset=tiny", *arguments])
    accelerator = start_accelerator(run)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    objective = LanguageModelObjective(FGPTForCausalLM(FGPTConfig(**shape, max_position_embeddings=16)).train())
    if run.fsdp:
        shard(objective, accelerator)
    rows = ShuffledRows(RowsInMemory(ragged_rows()), run.seed, accelerator.process_index, accelerator.num_processes)
    optimizer = build_optimizer(objective.model, run)
    state = TrainingState(accelerator, objective, build_tokenizer(), optimizer, rows, Progress())
    state.restore(Path(str(run.resume_from_checkpoint)))
    state.save(run.folder, keep=9).result()
    accelerator.wait_for_everyone()


def save_with_a_scale(arguments: Sequence[str]) -> None:
    """Save a model with a buffer without dimensions, such as some classes of transformers have."""
    torch.set_num_threads(1)
    run = parse_run(TinyRun, {"tiny": TINY}, ["--preset=tiny", *arguments])
    accelerator = start_accelerator(run)
    model = FGPTForCausalLM(FGPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).train()
    model.register_buffer("scale", torch.tensor(1.5))
    objective = LanguageModelObjective(model)
    shard(objective, accelerator)
    rows = ShuffledRows(RowsInMemory(ragged_rows()), run.seed, accelerator.process_index, accelerator.num_processes)
    state = TrainingState(accelerator, objective, build_tokenizer(), build_optimizer(model, run), rows, Progress())
    state.save_model(run.folder)
    accelerator.wait_for_everyone()


def launch(folder: Path, *flags: object, processes: int, **options: Any) -> None:
    done = Launched(folder, *flags, processes=processes, **options).wait()
    assert done.exit_codes == [0] * processes, done.errors


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the optimizer's state, whoever wrote them."""
    assert integrity_error(checkpoint) is None
    recorded = torch.load(checkpoint / "training.pt", weights_only=True)["optimizer"]
    if recorded is not None:
        return shards.tensors_of(recorded)
    metadata = shards._Reader(checkpoint / shards.FOLDER).read_metadata()
    found = {name: torch.empty(tensor.size) for name, tensor in metadata.state_dict_metadata.items()}
    load(found, storage_reader=shards._Reader(checkpoint / shards.FOLDER), no_dist=True)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["replicated", "sharded"])
def written_by_two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    folder = tmp_path_factory.mktemp("shards") / "run"
    flags = ["--per_device_train_batch_size=4", f"--fsdp={request.param}", "--max_steps=3"]
    launch(folder, *flags, processes=2)
    return folder / "checkpoints" / STEP, request.param


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_the_state_bit_for_bit(
    written_by_two: tuple[Path, bool], tmp_path: Path
) -> None:
    checkpoint, fsdp = written_by_two
    expected, weights = contents(checkpoint), load_file(checkpoint / "model.safetensors")
    assert {file.name for file in (checkpoint / shards.FOLDER).iterdir()} == {
        *(".metadata", "__0_0.distcp", "__1_0.distcp")
    }
    assert sum(tensor.numel() for tensor in expected.values()) > 10_000
    for processes in (3, 1, 2):  # from two to three, to one, which writes no shards, and back to two
        folder = tmp_path / str(processes)
        flags = [f"--resume_from_checkpoint={checkpoint}", f"--fsdp={fsdp and processes > 1}"]
        launch(folder, *flags, processes=processes, main=save_again)
        checkpoint = folder / STEP
        found = contents(checkpoint)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert (checkpoint / shards.FOLDER).exists() == (processes > 1)
        assert [file.name for file in checkpoint.glob("**/*.safetensors")] == ["model.safetensors"]
        loaded = load_file(checkpoint / "model.safetensors")
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_weights_that_cannot_be_joined_from_shards_are_gathered(tmp_path: Path) -> None:
    launch(tmp_path / "model", "--fsdp=true", processes=2, main=save_with_a_scale)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.pop("scale").item() == 1.5
    assert weights.keys() == load_fgpt(str(tmp_path / "model"))[0].state_dict().keys() - {"lm_head.weight"}


@pytest.mark.slow
def test_a_checkpoint_holds_its_own_step_although_training_goes_on(tmp_path: Path) -> None:
    flags = ["--per_device_train_batch_size=4", "--save_total_limit=9", "--eval_steps=100"]
    launch(tmp_path / "short", *flags, "--max_steps=3", "--lr_scheduler_type=constant", processes=2)
    launch(tmp_path / "long", *flags, "--max_steps=12", "--lr_scheduler_type=constant", processes=2)
    one, other = (tmp_path / name / "checkpoints" / STEP for name in ("short", "long"))
    weights, others = (load_file(checkpoint / "model.safetensors") for checkpoint in (one, other))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert all(torch.equal(tensor, contents(other)[name]) for name, tensor in contents(one).items())


@pytest.mark.slow
def test_processes_killed_while_they_write_leave_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--per_device_train_batch_size=4", "--save_steps=1", "--save_total_limit=9"]
    launch(folder, *flags, "--max_steps=3", processes=2)
    launched = Launched(folder, *flags, "--max_steps=400", "--resume_from_checkpoint=latest", processes=2)
    while not is_writing_shards(folder / "checkpoints"):
        assert launched.processes[0].is_alive()
    for process in launched.processes:
        process.kill()
    launched.wait()
    found = checkpoints(folder / "checkpoints")
    assert len(found) >= 3 and all(integrity_error(checkpoint) is None for checkpoint in found)
    last = int(found[0].name[5:])
    launch(folder, *flags, f"--max_steps={last + 1}", "--resume_from_checkpoint=latest", processes=2)
    assert not list((folder / "checkpoints").glob("*.partial"))


def is_writing_shards(checkpoints: Path) -> bool:
    with suppress(FileNotFoundError):  # a folder may get its final name while it is searched
        return any(checkpoints.glob("*.partial/shards/*"))
    return False


class _RunsCode:
    def __reduce__(self) -> Any:
        return sys.exit, ("code of a checkpoint ran",)


def test_shards_from_elsewhere_run_no_code(tmp_path: Path) -> None:
    (tmp_path / shards.FOLDER).mkdir()
    (tmp_path / shards.FOLDER / shards.METADATA).write_bytes(pickle.dumps(_RunsCode()))
    states = {"state": {"weight": {"exp_avg": torch.zeros(2)}}}
    with pytest.raises(UserError, match="shards is damaged, or another state: .*exit has no place in the metadata"):
        shards.read(states, tmp_path)


@pytest.mark.slow
def test_damaged_shards_are_noticed_by_the_manifest(written_by_two: tuple[Path, bool], tmp_path: Path) -> None:
    damaged = shutil.copytree(written_by_two[0], tmp_path / "damaged")
    shard_file = damaged / shards.FOLDER / "__1_0.distcp"
    shard_file.write_bytes(shard_file.read_bytes()[:-1])
    assert integrity_error(damaged) == "shards/__1_0.distcp is damaged"
