"""Presets: the named runs that a command line starts from.

Tokens of a run = rows per micro-batch x micro-batches per step x tokens per row x steps. The sizes of base runs read
about 20 tokens per parameter (Hoffmann et al. 2022, arXiv:2203.15556). GPT-2's have GPT-3's batches of 0.5M tokens and
its learning rates for these sizes (Brown et al. 2020, arXiv:2005.14165, table 2.1).

The modern ones have as many parameters, and are what `Qwen3ForCausalLM` computes. Their rates and batches follow the
compute-optimal runs of Liu et al. 2025 (arXiv:2502.16982, table 2) with the same updates of Muon, such as 9.1e-4 and
128 x 8,192 = 1.05M tokens a step for 545M parameters without embeddings and 14.0B tokens, and a weight decay of 0.1.
Their schedules follow nanochat: the rate falls along a line over the last half of the run (dev/LOG.md, 2026-02-16;
scripts/base_train.py has 0.65 since), and the weight decay along half a cosine to zero (scripts/base_train.py). Their
heads of 128 are nanochat's at these widths, their zero-initialized projections too (nanochat/gpt.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun, Run

MODERN_BLOCKS: Mapping[str, Any] = {
    "position_embedding": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "mlp": "gated",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "zero_init_residual": True,
}
DECAY_OVER_THE_LAST_HALF: Mapping[str, Any] = {
    "lr_scheduler_type": "linear",
    "lr_decay_ratio": 0.5,
    "weight_decay_scheduler_type": "cosine",
}

_GPT2_PRESETS: Mapping[str, BaseRun] = {
    run.preset: run
    for run in (
        # 16 x 32 x 1,024 x 27,000 = 14.16B tokens, 19.9 per parameter. The rate is GPT-3's for 760M.
        BaseRun(preset="fgpt-712m"),
        # 16 x 32 x 1,024 x 13,600 = 7.13B tokens, 20.1 per parameter. The rate is GPT-3's for 350M.
        BaseRun(
            preset="fgpt-355m",
            num_hidden_layers=24,
            num_attention_heads=16,
            hidden_size=1024,
            learning_rate=3e-4,
            max_steps=13_600,
        ),
        # 16 x 32 x 1,024 x 4,800 = 2.52B tokens, 20.2 per parameter. The rate is GPT-3's for 125M.
        BaseRun(
            preset="fgpt-124m",
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_size=768,
            learning_rate=6e-4,
            max_steps=4_800,
        ),
        # 8 x 1 x 256 x 160 = 0.33M tokens, 0.02 per parameter: minutes on two cores. The vocabulary is most of the
        # work, so a smaller network would hardly be faster. The rate is the best of benchmarks/optimizers.py for Muon.
        BaseRun(
            preset="quickstart",
            num_hidden_layers=6,
            num_attention_heads=4,
            hidden_size=256,
            max_position_embeddings=256,
            dataset_name="pydocs",
            streaming=False,
            max_eval_rows=64,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=4e-3,
            warmup_steps=20,
            max_steps=160,
            logging_steps=10,
            eval_steps=80,
            sample_steps=80,
            save_steps=160,
            save_total_limit=1,
        ),
    )
}

_MODERN_PRESETS: Mapping[str, BaseRun] = {
    run.preset: run
    for run in (
        # 8 x 64 x 2,048 x 13,500 = 14.16B tokens, 19.8 per parameter, of which 650M are no embeddings. 350 steps of
        # warm-up are GPT-3's 375M tokens.
        BaseRun(
            preset="fgpt-712m-modern",
            **MODERN_BLOCKS,
            num_hidden_layers=32,
            num_attention_heads=10,
            hidden_size=1280,
            intermediate_size=3584,
            max_position_embeddings=2048,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=64,
            **DECAY_OVER_THE_LAST_HALF,
            learning_rate=9e-4,
            warmup_steps=350,
            max_steps=13_500,
        ),
        # 8 x 32 x 2,048 x 4,700 = 2.46B tokens, 19.9 per parameter. The rate extrapolates the table's,
        # with the power -0.09 of the parameters without embeddings, 85M; nanochat found batches of 0.5M tokens best.
        BaseRun(
            preset="fgpt-124m-modern",
            **MODERN_BLOCKS,
            num_hidden_layers=12,
            num_attention_heads=6,
            hidden_size=768,
            max_position_embeddings=2048,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=32,
            **DECAY_OVER_THE_LAST_HALF,
            learning_rate=1.1e-3,
            max_steps=4_700,
        ),
        # 8 x 1 x 256 x 300 = 0.61M tokens. The quickstart's run with other blocks: four layers learn as much here as
        # six. The settings of the optimizers are the best of docs/benchmarks.md, which also says why a sample of the
        # vocabulary is enough: a step takes half as long and teaches as much, so there is time for twice as many.
        replace(
            _GPT2_PRESETS["quickstart"],
            preset="quickstart-modern",
            **MODERN_BLOCKS,
            num_hidden_layers=4,
            sampled_softmax=6144,
            learning_rate=8e-3,
            muon_momentum=0.9,
            adam_beta2=0.99,
            max_steps=300,
            eval_steps=100,
            sample_steps=100,
            save_steps=300,
        ),
    )
}

PRESETS: Mapping[str, BaseRun] = {**_GPT2_PRESETS, **_MODERN_PRESETS}

INSTRUCT_PRESETS: Mapping[str, InstructRun] = {
    run.preset: run
    for run in (
        # 16 x 8 x 1,024 = 131,072 tokens per step, an eighth of SmolLM2-1.7B's, which trains at a rate of 3e-4
        # (alignment-handbook, recipes/smollm2/sft/config.yaml). The rate scales with the square root of that.
        InstructRun(
            preset="fgpt-712m",
            gradient_accumulation_steps=8,
            learning_rate=1e-4,
            warmup_steps=50,
            validation_fraction=0.01,
            eval_steps=200,
            sample_steps=500,
            save_steps=500,
        ),
        # The original FGPT's tuning on 1,100 entries. Rate, rows per step and epochs are those of Raschka 2024, Build a
        # Large Language Model (From Scratch), chapter 7.
        InstructRun(
            preset="rasbt",
            dataset_name="rasbt-instruct",
            num_train_epochs=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=5e-5,
            warmup_steps=5,
            logging_steps=1,
            eval_steps=5,
            sample_steps=50,
            save_steps=50,
        ),
        # 8 x 1 x 256 x 150 = 0.3M tokens: a minute or two on two cores, from the quickstart's base model, at half of
        # that model's rate. Half of the rows are basic-qa's, whose facts come seven times each: fewer are not learned.
        InstructRun(
            preset="quickstart",
            model_name_or_path="runs/quickstart/base",
            dataset_name="pydocs-chat:4000,basic-qa*8",
            eval_tasks="basic-qa,capitals-unseen",
            validation_fraction=0.01,
            max_eval_rows=32,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=4e-3,
            muon_momentum=0.9,
            adam_beta2=0.99,
            warmup_steps=10,
            max_steps=150,
            eval_steps=75,
            sample_steps=150,
            save_steps=150,
            save_total_limit=1,
            max_new_tokens=40,
        ),
    )
}

PREFERENCE_PRESETS: Mapping[str, PreferenceRun] = {
    run.preset: run
    for run in (
        # 8 x 8 = 64 pairs per step, 946 steps per epoch of UltraFeedback's 61k pairs. Rate, data and a warm-up of a
        # tenth of an epoch are SmolLM2's (alignment-handbook, recipes/smollm2/dpo/config_smol.yaml).
        PreferenceRun(
            preset="fgpt-712m",
            model_name_or_path="runs/fgpt-712m-instruct",
            dataset_train_split="train_prefs",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            optim="adamw",
            learning_rate=1e-6,
            weight_decay=0.0,
            warmup_steps=95,
            validation_fraction=0.01,
            eval_steps=100,
            sample_steps=500,
            save_steps=500,
        ),
        PreferenceRun(
            preset="rasbt",
            model_name_or_path="runs/rasbt-instruct",
            dataset_name="rasbt-preference",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            optim="adamw",
            learning_rate=2e-5,
            weight_decay=0.0,
            warmup_steps=10,
            logging_steps=1,
            eval_steps=20,
            sample_steps=130,
            save_steps=130,
        ),
        # 8 x 1 x 20 = 160 pairs, about an epoch: under a minute on two cores, from the quickstart's instruct model.
        PreferenceRun(
            preset="quickstart",
            model_name_or_path="runs/quickstart/instruct",
            dataset_name="pydocs-preference:200",
            validation_fraction=0.16,
            max_eval_rows=32,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            optim="adamw",
            learning_rate=5e-5,
            weight_decay=0.0,
            warmup_steps=4,
            max_steps=20,
            eval_steps=20,
            sample_steps=20,
            save_steps=20,
            save_total_limit=1,
            max_new_tokens=40,
        ),
    )
}

PRESETS_OF_STAGE: Mapping[str, Mapping[str, Run]] = {
    "base": PRESETS,
    "instruct": INSTRUCT_PRESETS,
    "preference": PREFERENCE_PRESETS,
}
