"""Compare Muon with AdamW on the embedded corpus: validation loss by step, each with the best of three learning rates.

    python benchmarks/optimizers.py

trains six small models with `train_base.py` and prints the validation losses of each, and the fraction of AdamW's steps
after which Muon reaches AdamW's final loss.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from fgpt_hf.files import read_json_lines

ROOT = Path(__file__).parent.parent
RATES = {"adamw": (5e-4, 1e-3, 2e-3), "muon": (1e-3, 2e-3, 4e-3)}
SHAPE = [
    "--preset=quickstart",
    "--eval_tasks=",
    "--hidden_size=192",
    "--num_hidden_layers=6",
    "--num_attention_heads=3",
    "--per_device_train_batch_size=4",
    "--max_eval_rows=128",
    "--sample_steps=1000000",
    "--save_steps=1000000",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=250, help="Number of steps (default: 250).")
    parser.add_argument("--eval_steps", type=int, default=25, help="Steps between validation losses (default: 25).")
    options = parser.parse_args()
    curves: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for optim, rates in RATES.items():
            curves[optim] = min(
                (train(Path(folder), optim, rate, options.max_steps, options.eval_steps) for rate in rates),
                key=lambda curve: curve[options.max_steps],
            )
    target = curves["adamw"][options.max_steps]
    passed = next(step for step, loss in curves["muon"].items() if loss <= target)
    print(
        f"The best AdamW run reaches {target:.3f} after {options.max_steps} steps, "
        f"the best Muon run after {passed} "
        f"({passed / options.max_steps:.2f} of the steps) and ends at {curves['muon'][options.max_steps]:.3f}"
    )


def train(folder: Path, optim: str, rate: float, max_steps: int, eval_steps: int) -> dict[int, float]:
    """Train one model, print its validation losses, and return them by step."""
    output = folder / f"{optim}-{rate}"
    flags = [f"--optim={optim}", f"--learning_rate={rate}", f"--max_steps={max_steps}", f"--eval_steps={eval_steps}"]
    command = [sys.executable, str(ROOT / "train_base.py"), *SHAPE, *flags, f"--output_dir={output}"]
    subprocess.run(command, check=True, capture_output=True)
    lines = read_json_lines(output / "metrics.jsonl")
    curve = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    print(f"{optim:6} {rate:.0e}  " + "  ".join(f"{step}: {loss:.3f}" for step, loss in curve.items()), flush=True)
    return curve


if __name__ == "__main__":
    main()
