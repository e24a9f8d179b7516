"""The configuration: the flagship by default, GPT-2's names, and plain errors."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, GenerationConfig, GPT2Config

from fgpt_hf.model import blocks_fgpt, configuration_fgpt, modeling_fgpt
from fgpt_hf.model.configuration_fgpt import FGPTConfig


def test_the_defaults_are_the_flagship() -> None:
    config = FGPTConfig()
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (32, 24, 1296)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (5184, 1024, 50304)
    assert (config.hidden_act, config.layer_norm_eps, config.initializer_range) == ("gelu_pytorch_tanh", 1e-5, 0.02)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (50256, 50256, 50261)
    assert config.attention_bias and config.mlp_bias and config.tie_word_embeddings
    assert config.embedding_dropout == config.residual_dropout == config.attention_dropout == 0


def test_gpt2_names_are_read_and_written_as_aliases() -> None:
    config = FGPTConfig(n_embd=96, n_layer=2, n_head=4, n_positions=64, activation_function="gelu", resid_pdrop=0.1)  # type: ignore[call-arg]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 2, 4)
    assert (config.max_position_embeddings, config.hidden_act, config.residual_dropout) == (64, "gelu", 0.1)
    config.n_layer = 3
    assert config.num_hidden_layers == config.n_layer == 3
    assert "n_layer" not in config.to_dict()


def test_every_name_of_gpt2s_shape_has_a_counterpart() -> None:
    gpt2 = GPT2Config(n_embd=48, n_layer=2, n_head=3, n_positions=32, n_inner=100, layer_norm_epsilon=1e-6)
    shape: dict[str, Any] = {name: getattr(gpt2, name) for name in FGPTConfig.attribute_map}
    config = FGPTConfig(**shape)
    assert {name: getattr(config, name) for name in shape} == shape


@pytest.mark.parametrize("given", [{}, {"n_inner": None}, {"intermediate_size": None}])
def test_an_intermediate_size_left_out_is_four_times_the_width(given: dict) -> None:
    assert FGPTConfig(hidden_size=48, num_attention_heads=4, **given).intermediate_size == 192


@pytest.mark.parametrize("width", ["hidden_size", "n_embd"])
def test_a_width_that_the_heads_do_not_divide_is_a_value_error_naming_both(width: str) -> None:
    with pytest.raises(ValueError, match="hidden_size=50 must divide evenly among num_attention_heads=4"):
        FGPTConfig(**{width: 50, "num_attention_heads": 4})


def test_an_unknown_activation_is_a_value_error_naming_the_known_ones() -> None:
    with pytest.raises(ValueError, match="hidden_act='gleu' is unknown; choose from .*, gelu_pytorch_tanh,"):
        FGPTConfig(hidden_act="gleu")


@pytest.mark.parametrize("name", configuration_fgpt.SIZES)
def test_a_size_below_one_is_a_value_error_naming_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        FGPTConfig(**{name: 0})


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer"])
def test_a_value_of_the_wrong_type_is_refused_under_either_name(name: str) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="num_hidden_layers"):
        FGPTConfig(**{name: "12"})


def test_a_saved_config_loads_as_it_was_and_names_the_code_of_every_auto_class(tmp_path: Path) -> None:
    config = FGPTConfig(n_embd=48, n_head=4, hidden_act="gelu", attention_bias=False, eos_token_id=[50256, 50260])  # type: ignore[call-arg]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "fgpt"
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (tmp_path / "configuration_fgpt.py").exists()

    loaded = FGPTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()


def test_generation_starts_from_the_configs_tokens() -> None:
    generation = GenerationConfig.from_model_config(FGPTConfig())
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (50256, 50256, 50261)


def test_the_auto_class_gives_the_config_for_its_model_type() -> None:
    assert type(AutoConfig.for_model("fgpt")) is FGPTConfig


@pytest.mark.parametrize("module", [configuration_fgpt, blocks_fgpt, modeling_fgpt])
def test_the_files_that_travel_import_only_transformers_and_what_it_needs(module: Any) -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + node.module.partition(".")[0])
    standard = {"collections", "os", "typing"}
    assert imported - standard <= {"torch", "transformers", "huggingface_hub", ".configuration_fgpt", ".blocks_fgpt"}
