# /// script
# requires-python = ">=3.11"
# dependencies = ["fgpt-hf[peft]"]
#
# [tool.hf-jobs]
# flavor = "h200"
# timeout = "3h"
# secrets = ["HF_TOKEN"]
# ///
"""Train on a machine of the Hub's Jobs. Its state is on the Hub: started again, it resumes from there (hf_jobs.md).

hf jobs uv run --timeout 3h recipes/hf_job.py --preset fgpt-124m --hub_model_id user/name
hf jobs uv run recipes/hf_job.py train-instruct --model_name_or_path user/name --hub_model_id user/name-chat
"""

import os
import sys

import torch

DEFAULTS = ["--push_to_hub", "--hub_strategy=checkpoint", "--per_device_train_batch_size=auto", "--save_steps=100"]


def main(arguments: list[str]) -> None:
    """Become the training command, in one process per GPU; an argument that is given counts more than the defaults."""
    stage = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train-base"
    devices = torch.cuda.device_count()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"] if devices > 1 else []
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "fgpt_hf", stage, *DEFAULTS, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
