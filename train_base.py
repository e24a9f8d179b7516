"""Train a base model on documents.

The quickstart: ten minutes at most on two cores, without a network.

    python train_base.py --preset quickstart

The published model of 712M parameters, on eight GPUs, with a micro-batch that fits them:

    torchrun --nproc_per_node 8 train_base.py --preset fgpt-712m --per_device_train_batch_size auto

Your own text, one document per line of a JSON-lines file:

    python train_base.py --preset fgpt-124m --dataset_name documents.jsonl --output_dir runs/mine

The same command resumes an interrupted run. To continue one with other options, or for longer:

    python train_base.py --config runs/mine/run.yaml --resume_from_checkpoint latest --max_steps N

`python train_base.py --help` lists every option. An installed package has the same as `fgpt train-base`.
"""

from fgpt_hf.cli.entry_point import script

if __name__ == "__main__":
    script("fgpt_hf.cli.train_base")
