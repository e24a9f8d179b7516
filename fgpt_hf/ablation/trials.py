"""Train each variant with every learning rate and the first seed, then at its best rate with the other seeds.

Every run is a process of its own, and its result is a line of `results.jsonl`: an interrupted ablation resumes
with the run that is missing, from that run's last checkpoint.
"""

import itertools
import logging
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from fgpt_hf.ablation.variants import Variant
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from fgpt_hf.files import append_json_line, locked, read_json, read_json_lines, write_json
from fgpt_hf.runtime.network import count_parameters, network_config
from fgpt_hf.training.optim import require_known_optimizer
from fgpt_hf.training.records import read_metrics

logger = logging.getLogger(__name__)

RESULTS, FLAGS = "results.jsonl", "flags.json"
FACTORS = (0.5, 1, 2)  # of the run's own learning rate
EVALUATIONS = 16  # of the validation loss, on the way to the last step


@dataclass(frozen=True)
class Trial:
    """One run: a variant with a learning rate and a seed. Without a rate, the preset's or the flags' is used."""

    variant: Variant
    learning_rate: str | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        rate = f",learning_rate={self.learning_rate}" if self.learning_rate else ""
        return f"{self.variant.name.replace(' ', '_')}{rate},seed={self.seed}"

    @property
    def flags(self) -> list[str]:
        """The flags that set it apart from the other runs."""
        settings = {**self.variant.settings, "seed": str(self.seed)}
        if self.learning_rate:
            settings["learning_rate"] = self.learning_rate
        return [f"--{field}={value}" for field, value in settings.items()]


@dataclass(frozen=True)
class TrialResult:
    """The measurements of one run.

    Attributes:
        name: that of the trial.
        curve: `(tokens, loss)` from the first step to the last: the validation loss in nats after that many tokens.
        bits_per_byte: of the held-out text, as often as `curve`; only these compare where tokenizers differ.
        tokens_per_second: the median over the run.
        peak_memory_bytes: of the process, or on a GPU of its tensors.
        parameters: of the network.
    """

    name: str
    variant: str
    learning_rate: str | None
    seed: int
    curve: Sequence[tuple[float, float]]
    bits_per_byte: Sequence[float]
    tokens_per_second: float
    peak_memory_bytes: int
    parameters: int

    @property
    def loss(self) -> float:
        """The validation loss at the end; infinite if the run diverged."""
        return _finite(self.curve[-1][1])

    @property
    def bits(self) -> float:
        """The bits per byte at the end; infinite if the run diverged."""
        return _finite(self.bits_per_byte[-1])

    @property
    def bits_curve(self) -> list[tuple[float, float]]:
        """The bits per byte after that many tokens."""
        return [(tokens, bits) for (tokens, _), bits in zip(self.curve, self.bits_per_byte, strict=True)]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def train_base(flags: Sequence[str], log: Path) -> int:
    """Run `fgpt train-base` in a process of its own that writes to a log; return its exit code."""
    command = [sys.executable, "-m", "fgpt_hf", "train-base", *flags]
    with log.open("w", encoding="utf-8") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode


class Ablation:
    """The runs of a comparison in one folder.

    Args:
        folder: where runs, results, table and figure are written.
        variants: the default first.
        learning_rates: each variant is trained with all of these, and compared at its best; by default half the run's
            own, the run's own and twice that, unless the rate itself is varied.
        seeds: how many seeds each variant's best rate is trained with.
        flags: flags of `fgpt train-base` for all runs.

    Raises:
        UserError: a flag or a value does not work with some variant, or the folder holds another comparison.
    """

    def __init__(
        self, folder: Path, variants: Sequence[Variant], learning_rates: Sequence[str], seeds: int, flags: Sequence[str]
    ) -> None:
        self.folder, self.variants = folder, variants
        first = self._parse(flags)
        self.rates: Sequence[str | None] = learning_rates or [f"{rate * first.learning_rate:g}" for rate in FACTORS]
        if "learning_rate" in variants[0].settings:
            if learning_rates:
                raise UserError("learning_rate is varied, so give no --learning_rates")
            self.rates = [None]
        self.seeds = range(first.seed, first.seed + seeds)
        steps = max(1, first.max_steps // EVALUATIONS)
        quiet = ["--save_total_limit=1", "--eval_tasks=", f"--sample_steps={first.max_steps}", f"--eval_steps={steps}"]
        self.flags = [*quiet, *flags]
        for trial in self._first_trials():
            self._parse([*self.flags, *trial.flags])

    def run(self) -> list[TrialResult]:
        """Train what is missing, and return all results.

        Raises:
            UserError: a run failed, and its log says why; or the folder holds another comparison.
        """
        try:
            with locked(self.folder / ".lock", timeout=0):
                self._claim_folder()
                first = [self._result(trial) for trial in self._first_trials()]
                return first + [self._result(trial) for trial in self._other_seeds(first)]
        except Timeout as error:
            raise UserError(f"{self.folder} is being written to by another process: choose another folder") from error

    def _first_trials(self) -> Iterator[Trial]:
        for variant, rate in itertools.product(self.variants, self.rates):
            yield Trial(variant, rate, self.seeds[0])

    def _other_seeds(self, results: Sequence[TrialResult]) -> Iterator[Trial]:
        for variant, seed in itertools.product(self.variants, self.seeds[1:]):
            best = min((each for each in results if each.variant == variant.name), key=lambda each: each.loss)
            yield Trial(variant, best.learning_rate, seed)

    def _parse(self, flags: Sequence[str]) -> BaseRun:
        run = parse_run(BaseRun, PRESETS, [f"--output_dir={self.folder}", *flags])
        network_config(run)  # refuses a shape that cannot be built
        require_known_optimizer(run)
        return run

    def _claim_folder(self) -> None:
        """Write the flags that all runs share, or refuse the folder of a comparison with others."""
        path = self.folder / FLAGS
        if not path.is_file():
            write_json(path, {"flags": self.flags})
        elif read_json(path) != {"flags": self.flags}:
            raise UserError(
                f"{self.folder} holds runs with other flags ({path} lists them): give those, or another --output_dir"
            )

    def _result(self, trial: Trial) -> TrialResult:
        """Return a trial's result, from `results.jsonl` or by training it."""
        results = self.folder / RESULTS
        for line in read_json_lines(results) if results.is_file() else ():
            if line["name"] == trial.name:
                return TrialResult(**line)
        folder = self.folder / trial.name
        logger.info("%s", trial.name)
        self._train(trial, folder)
        result = self._measured(trial, folder)
        append_json_line(results, asdict(result))
        for large in ("checkpoints", "model"):
            shutil.rmtree(folder / large, ignore_errors=True)
        return result

    def _train(self, trial: Trial, folder: Path) -> None:
        log = self.folder / f"{trial.name}.log"
        given = [*self.flags, *trial.flags, f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
        if code := train_base(given, log):
            last = (log.read_text(encoding="utf-8", errors="replace").strip() or "nothing").splitlines()[-1]
            raise UserError(f"the run {trial.name} ended with exit code {code}: {last} ({log})")

    def _measured(self, trial: Trial, folder: Path) -> TrialResult:
        metrics: Sequence[Mapping[str, Any]] = read_metrics(folder)
        return TrialResult(
            name=trial.name,
            variant=trial.variant.name,
            learning_rate=trial.learning_rate,
            seed=trial.seed,
            curve=[(line["tokens"], line["eval_loss"]) for line in metrics if "eval_loss" in line],
            bits_per_byte=[line["eval_bits_per_byte"] for line in metrics if "eval_loss" in line],
            tokens_per_second=statistics.median(
                line["tokens_per_second"] for line in metrics if "tokens_per_second" in line
            ),
            peak_memory_bytes=max(line.get("peak_memory_bytes", 0) for line in metrics),
            parameters=count_parameters(network_config(self._parse([*self.flags, *trial.flags]))).total,
        )
