"""An estimate is what PyTorch then allocates: parameters, optimizer states, what the backward pass keeps, logits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, PreferenceRun, Run, TuningRun
from fgpt_hf.data.batches import as_batch
from fgpt_hf.errors import UserError
from fgpt_hf.model.lora import add_adapter
from fgpt_hf.runtime.hardware import GPUS, Machine, find_gpu, known_machine, this_machine
from fgpt_hf.runtime.network import count_parameters, flops_per_token, network_config
from fgpt_hf.runtime.workload import USABLE_SHARE, Workload
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, build_tokenizer
from fgpt_hf.training.optim import build_optimizer
from tests.support.tiny_network import EVERY_NETWORK

TINY = BaseRun(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    bf16=False,
    attn_implementation="sdpa",
)
TINY_NETWORK = network_config(TINY)
TUNED = replace(INSTRUCT_PRESETS["quickstart"], bf16=False, attn_implementation="sdpa")
ADAPTED = replace(TUNED, use_peft=True, lora_r=8)
MACHINE = Machine("a test", "cpu", 10**9, has_bf16=False, peak_flops=None, processes=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_network(preset: str) -> None:
    config = network_config(PRESETS[preset])
    with torch.device("meta"):
        model = FGPTForCausalLM(config)
    counts = count_parameters(config)
    assert counts.total == model.num_parameters()
    table = model.model.embed_positions
    assert counts.position_embeddings == (0 if table is None else table.weight.numel())
    assert counts.matrices == sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": False, "mlp_bias": False}, {"intermediate_size": 100}, *EVERY_NETWORK.values()],
)
def test_parameters_are_those_of_other_shapes_too(changes: dict[str, object]) -> None:
    shape: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FGPTConfig(**shape | changes)
    with torch.device("meta"):
        model = FGPTForCausalLM(config)
    assert count_parameters(config).total == model.num_parameters()


@pytest.mark.parametrize("network", EVERY_NETWORK)
def test_operations_are_those_of_the_matrix_products(network: str) -> None:
    """Counted by PyTorch as it runs: the backward pass has twice the forward's, attention as if nothing were masked."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    config = FGPTConfig(**shape | EVERY_NETWORK[network])
    model = FGPTForCausalLM(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 32, dtype=torch.int64)).logits.sum().backward()
    run = replace(TINY, max_position_embeddings=32)
    assert flops_per_token(run, config) == pytest.approx(counter.get_total_flops() / 64, rel=0.005)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_optimizer_states_are_those_after_a_step(optim: str) -> None:
    run = replace(TINY, optim=optim)
    model = FGPTForCausalLM(network_config(run))
    optimizer = build_optimizer(model, run)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [state for one in optimizer.optimizers for state in one.state.values()]
    held = sum(tensor.nbytes for state in states for tensor in state.values() if tensor.ndim)
    need = Workload(run, network_config(run), MACHINE).memory(rows=1, micro_batches=1)
    assert need.optimizer == held
    assert need.weights == need.gradients == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", "q_proj, v_proj", "mlp.up_proj", "layers.1.self_attn.o_proj"])
def test_an_adapters_gradients_and_states_are_all_that_there_are(targets: str) -> None:
    run = replace(ADAPTED, lora_target_modules=targets)
    model = FGPTForCausalLM(TINY_NETWORK)
    add_adapter(model, run, build_tokenizer())
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    need = Workload(run, TINY_NETWORK, MACHINE).memory(rows=1, micro_batches=1)
    assert need.gradients == sum(parameter.nbytes for parameter in learning)
    assert need.optimizer == 2 * need.gradients  # AdamW's, whatever `optim` says
    assert need.weights == sum(parameter.nbytes for parameter in model.parameters())


def test_operations_with_an_adapter_are_those_of_the_matrix_products() -> None:
    model = FGPTForCausalLM(TINY_NETWORK)
    model.set_attn_implementation("eager")
    add_adapter(model, ADAPTED, build_tokenizer())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 128, dtype=torch.int64)).logits.sum().backward()
    assert flops_per_token(ADAPTED, TINY_NETWORK) == pytest.approx(counter.get_total_flops() / 256, rel=0.005)


def kept_for_backward(run: Run, rows: int, config: FGPTConfig = TINY_NETWORK) -> int:
    """Bytes that the network's forward pass on packed rows, or on pairs, keeps beside the parameters."""
    model = FGPTForCausalLM(config).train()
    model.set_attn_implementation(run.attn_implementation)
    if isinstance(run, TuningRun) and run.use_peft:
        add_adapter(model, run, build_tokenizer())
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = np.full(
        (rows * run.sequences_per_row, run.sequence_length(config.max_position_embeddings)), 5, dtype=np.uint16
    )
    ids[:, ::40] = END_OF_TEXT_ID
    inputs = ("input_ids",) if isinstance(run, PreferenceRun) else ("input_ids", "position_ids")
    batch = {name: tensor for name, tensor in as_batch(ids).items() if name in inputs}
    unpack = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with unpack, torch.autocast("cpu", torch.bfloat16, enabled=bool(run.bf16)):
        model.get_decoder()(**batch, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["base", "short", "adapted", "pairs"])
def test_activations_are_what_the_backward_pass_keeps(kind: str, bf16: bool, attention: str) -> None:
    kinds: dict[str, Run] = {
        "base": TINY,
        "short": replace(TUNED, max_length=64),
        "adapted": ADAPTED,
        "pairs": PREFERENCE_PRESETS["quickstart"],
    }
    run = replace(kinds[kind], bf16=bf16, attn_implementation=attention)
    more = kept_for_backward(run, rows=4) - kept_for_backward(run, rows=2)
    estimated = Workload(run, TINY_NETWORK, MACHINE).memory(2, 1).activations
    assert estimated == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("blocks", ["qwen3", "nanochat"])
def test_activations_of_other_blocks_are_what_the_backward_pass_keeps(blocks: str, bf16: bool) -> None:
    shape: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128}
    run, config = replace(TINY, bf16=bf16), FGPTConfig(**{"num_attention_heads": 4} | EVERY_NETWORK[blocks] | shape)
    more = kept_for_backward(run, 4, config) - kept_for_backward(run, 2, config)
    assert Workload(run, config, MACHINE).memory(2, 1).activations == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batchnorm"}, "norm='batchnorm' is unknown; choose from layernorm, rmsnorm"),
        ({"mlp": "mixture"}, "mlp='mixture' is unknown"),
        ({"position_embedding": "alibi"}, "position_embedding='alibi' is unknown"),
        ({"position_embedding": "rope", "head_dim": 7}, "head_dim=7 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"rope_theta": 500.0}, "need position_embedding='rope'"),
    ],
)
def test_a_network_that_cannot_be_is_refused_with_its_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        network_config(replace(TINY, **changes))


def test_checkpointing_keeps_a_layers_input_and_recomputes_one_layer() -> None:
    run = replace(TINY, gradient_checkpointing=True)
    whole, checkpointed = (
        Workload(each, network_config(each), MACHINE).memory(4, 1).activations for each in (TINY, run)
    )
    kept = kept_for_backward(run, rows=4)
    shallow = replace(TINY, num_hidden_layers=1)
    one_layer = Workload(shallow, network_config(shallow), MACHINE).memory(4, 1)
    assert kept < checkpointed < kept + one_layer.activations < whole


def test_sharding_divides_and_replicas_do_not() -> None:
    config = network_config(PRESETS["fgpt-712m"])
    alone, replicated, sharded = (
        Workload(replace(PRESETS["fgpt-712m"], fsdp=fsdp), config, known_machine("h100", processes)).memory(1, 1)
        for fsdp, processes in ((False, 1), (False, 8), (True, 8))
    )
    assert replicated.optimizer == alone.optimizer == pytest.approx(8 * sharded.optimizer, abs=8)
    assert replicated.gradients == 2 * alone.gradients  # with DDP's buckets
    assert sharded.fixed < alone.fixed / 2


def test_sharded_gradients_are_whole_until_the_last_micro_batch() -> None:
    run, config = replace(PRESETS["fgpt-712m"], fsdp=True), network_config(PRESETS["fgpt-712m"])
    need = Workload(run, config, known_machine("h100", processes=8)).memory(rows=1, micro_batches=2)
    assert need.gradients == pytest.approx(4 * count_parameters(config).total * (1 + 1 / 8))


def test_the_micro_batch_is_the_largest_power_of_two_that_fits_and_divides_the_step() -> None:
    run = replace(TINY, per_device_train_batch_size=16, gradient_accumulation_steps=6)
    config = network_config(run)

    def largest(gigabytes: float) -> int | None:
        return Workload(run, config, MACHINE._replace(memory_bytes=int(gigabytes * 1e9))).largest_micro_batch()

    assert largest(1000) == 32  # of 96 rows
    for rows in (1, 2, 4, 8, 16):
        need = Workload(run, config, MACHINE).memory(rows, 96 // rows).total / USABLE_SHARE / 1e9
        assert largest(need * 1.0001) == rows
    assert largest(0.001) is None


def test_rows_of_a_step_are_each_devices_or_all_devices_together() -> None:
    run = replace(TINY, per_device_train_batch_size=16, gradient_accumulation_steps=4)
    eight = MACHINE._replace(processes=8)
    assert Workload(run, TINY_NETWORK, eight).rows_on_device() == 64
    assert Workload(replace(run, auto_find_batch_size=True), TINY_NETWORK, eight).rows_on_device() == 8
    with pytest.raises(ValueError, match="64 rows per step do not divide among 3 processes"):
        Workload(replace(run, auto_find_batch_size=True), TINY_NETWORK, eight._replace(processes=3)).rows_on_device()


def test_a_remedy_fits() -> None:
    run, config = PRESETS["fgpt-712m"], network_config(PRESETS["fgpt-712m"])
    ten_gigabytes = known_machine("l4")._replace(memory_bytes=10**10)
    assert Workload(run, config, ten_gigabytes).largest_micro_batch() is None
    found = Workload(run, config, ten_gigabytes).remedies()
    assert "--preset fgpt-355m" in found and any("--fsdp on" in remedy for remedy in found)
    smaller = PRESETS["fgpt-355m"]
    assert Workload(smaller, network_config(smaller), ten_gigabytes).largest_micro_batch()


def test_autocasts_copies_of_frozen_weights_stay_only_for_a_backward_pass_that_keeps_them() -> None:
    run = replace(ADAPTED, bf16=True)
    config, counts = TINY_NETWORK, count_parameters(TINY_NETWORK)
    checkpointed = replace(run, gradient_checkpointing=True)
    whole, one = (Workload(each, config, MACHINE).memory(1, 1).weights for each in (run, checkpointed))
    assert whole - one == 2 * counts.matrices * 2 // 3  # two layers of three, two bytes each
    kept = kept_for_backward(run, rows=2) - Workload(run, config, MACHINE).memory(2, 1).activations
    assert kept == pytest.approx(whole - Workload(ADAPTED, config, MACHINE).memory(1, 1).weights, rel=0.05)


def test_remedies_of_a_tuning_run_fit_and_leave_the_model_as_large_as_it_is() -> None:
    config = network_config(PRESETS["fgpt-712m"])
    run, small = INSTRUCT_PRESETS["fgpt-712m"], known_machine("l4")._replace(memory_bytes=10**10)
    assert Workload(run, config, small).largest_micro_batch() is None
    assert Workload(run, config, small).remedies() == ["--fsdp on 8 such devices", "--use_peft"]
    assert Workload(replace(run, use_peft=True), config, small).largest_micro_batch()


def test_remedies_of_a_run_with_an_adapter_do_not_share_it() -> None:
    config = network_config(PRESETS["fgpt-712m"])
    run = replace(PREFERENCE_PRESETS["fgpt-712m"], use_peft=True)
    need = Workload(run, config, known_machine("l4")).memory(1, 2).total
    small = known_machine("l4")._replace(memory_bytes=need)
    assert Workload(run, config, small).remedies() == ["--gradient_checkpointing", "--max_length 512"]


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(driver_name: str, name: str | None) -> None:
    assert find_gpu(driver_name) == (GPUS[name] if name else None)


def test_utilisation_is_a_share_of_all_peaks_and_unknown_on_a_cpu() -> None:
    run = PRESETS["fgpt-712m"]
    workload = Workload(run, network_config(run), known_machine("h100", processes=8))
    tokens_per_second = 0.5 * 8 * 989e12 / workload.flops_per_token
    assert workload.mfu(tokens_per_second) == pytest.approx(0.5)
    assert replace(workload, machine=this_machine(torch.device("cpu"))).mfu(tokens_per_second) is None
