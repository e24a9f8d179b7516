"""Run transformers' own tests of a model on FGPT: as GPT-2, and with the blocks of Qwen3 and of nanochat.

    python benchmarks/model_tests.py

downloads the source distribution of the installed transformers, which holds `ModelTesterMixin`, and the package
`parameterized`, which that needs. Their tests of text generation and of exports are not in it.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent
# What the mixin imports and the source distribution lacks.
LACKING = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: ...",
}
# Tests that read past `max_position_embeddings`, which FGPT refuses; and one that wants rotary positions of GPT-2.
LEFT_OUT = "rope_scaling_from_config or (GPT2 and rope_with_partial_rotation)"
TESTS = """
import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from fgpt_hf import FGPTConfig, FGPTForCausalLM, FGPTModel
from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor

MODEL_MAPPING_NAMES["fgpt"], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fgpt"] = "FGPTModel", "FGPTForCausalLM"
SHAPE = dict(vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODERN = dict(position_embedding="rope", norm="rmsnorm", qk_norm=True, attention_bias=False, mlp_bias=False)
BLOCKS = {
    "GPT2": {},
    "Qwen3": MODERN | dict(mlp="gated", hidden_act="silu", num_key_value_heads=2),
    "NanoChat": MODERN
    | dict(norm_elementwise_affine=False, embedding_norm=True, hidden_act="relu2")
    | dict(tie_word_embeddings=False, final_logit_softcapping=15.0),
}


class Shape:
    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 13, 7, 32, 2, 4, 99
    all_model_classes = [FGPTModel, FGPTForCausalLM]

    def __init__(self, blocks):
        self.blocks = blocks

    def get_config(self):
        return FGPTConfig(**SHAPE, **self.blocks)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def case(name):
    class Tests(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (FGPTModel, FGPTForCausalLM)

        def setUp(self):
            self.model_tester = Shape(BLOCKS[name])

    return type(name + "Test", (Tests,), {})


for name in BLOCKS:
    globals()[name + "Test"] = case(name)
"""


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tests(folder)
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "needed")]), "HF_HUB_OFFLINE": "1"}
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", name]
        return subprocess.run(
            [*pytest, "tests/test_fgpt.py", "-k", f"not ({LEFT_OUT})"], cwd=folder, env=os.environ | environment
        ).returncode


def write_tests(folder: Path) -> None:
    """Fill `folder/tests` with transformers' common tests and ours made of them."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = ["--no-deps", "--no-binary", "transformers", f"transformers=={transformers.__version__}"]
    subprocess.run([*pip, "download", "--dest", folder, *source], check=True)
    subprocess.run([*pip, "install", "--target", folder / "needed", "parameterized"], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    (folder / archive.name.removesuffix(".tar.gz") / "tests").rename(folder / "tests")
    for path, content in {**LACKING, "test_fgpt.py": TESTS}.items():
        (folder / "tests" / path).parent.mkdir(exist_ok=True)
        (folder / "tests" / path).write_text(content)


if __name__ == "__main__":
    sys.exit(main())
