"""Align an instruct model with preference pairs: DPO, IPO or SimPO.

Full training with DPO:

    python train_preference.py --preset quickstart --model_name_or_path runs/quickstart/instruct

SimPO, which needs no reference model:

    python train_preference.py --preset rasbt --loss_type simpo --beta 2 --simpo_gamma 1

LoRA, which trains adapters of rank 16 and merges them into the model at the end:

    python train_preference.py --preset quickstart --model_name_or_path runs/quickstart/instruct --use_peft --lora_r 16

The published model, on eight GPUs, with a micro-batch that fits them:

    torchrun --nproc_per_node 8 train_preference.py --preset fgpt-712m --per_device_train_batch_size auto

The same command resumes an interrupted run. To continue one with other options, or for longer:

    python train_preference.py --config runs/fgpt-712m-preference/run.yaml --resume_from_checkpoint latest --max_steps N

`python train_preference.py --help` lists every option. An installed package has the same as `fgpt train-preference`.
"""

from fgpt_hf.cli.entry_point import script

if __name__ == "__main__":
    script("fgpt_hf.cli.train_preference")
