"""`fgpt evaluate`: benchmarks for any causal language model of transformers, or for two of them side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from fgpt_hf.cli.options import SEEDS, TrustRemoteCode
from fgpt_hf.config.options import Limits
from fgpt_hf.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fgpt_hf.evaluation.benchmark import TaskResult

Results = Mapping[str, list["TaskResult"]]  # by model


Models = Annotated[
    list[str],
    Argument(metavar="MODEL", help="Folder of a model or a run, or a Hub id; two models are compared."),
]
Tasks = Annotated[
    str,
    Option(
        "--tasks",
        metavar="NAME[=FILE],…",
        help="Benchmarks, separated by commas; an unknown name lists them all. FILE replaces a benchmark's rows.",
    ),
]
Limit = Annotated[int | None, Option("--limit", help="Use only this many examples of each benchmark (default: all).")]
Bf16 = Annotated[bool, Option("--bf16", help="Compute in bfloat16 (default: float32).")]
TokensPerBatch = Annotated[
    int | None,
    Option("--tokens_per_batch", help="Tokens in a batch, padding included (default: chosen for the device)."),
]
Seed = Annotated[int, Option("--seed", help="Random seed, for models that draw random numbers.")]
Out = Annotated[
    Path | None, Option("--out", metavar="FILE", help="Also write the results as JSON, with versions and settings.")
]
UpdateCard = Annotated[
    bool, Option("--update_card", help="Also write the results into the folder's README.md and .eval_results/.")
]


def evaluate(
    models: Models,
    tasks: Tasks = "pydocs-choice",
    limit: Limit = None,
    bf16: Bf16 = False,
    tokens_per_batch: TokensPerBatch = None,
    seed: Seed = 1337,
    out: Out = None,
    update_card: UpdateCard = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model on benchmarks, or compare two models.

    Example: fgpt evaluate runs/quickstart/base --tasks hellaswag,piqa

    On eight GPUs: torchrun --nproc_per_node 8 -m fgpt_hf evaluate MODEL
    """
    names = tuple(name for name in tasks.split(",") if name)
    run_evaluation(
        EvaluateOptions(tuple(models), names, limit, bf16, tokens_per_batch, seed, out, update_card, trust_remote_code)
    )


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure, how, and where the results go."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    limit: int | None
    bf16: bool
    tokens_per_batch: int | None
    seed: int
    out: Path | None
    update_card: bool
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if len(self.models) > 2 or len(set(self.models)) < len(self.models):
            raise UserError(
                f"give one model, or two different ones to compare, not {' '.join(self.models)}; several benchmarks "
                "are separated by commas: --tasks hellaswag,piqa"
            )
        if not self.tasks:
            raise UserError("--tasks names none: try --tasks pydocs-choice")
        Limits().check("limit", self.limit)
        Limits().check("tokens_per_batch", self.tokens_per_batch)
        SEEDS.check("seed", self.seed)
        if self.out and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: name a file")
        for model in self.models if self.update_card else ():
            if not Path(model).is_dir():
                raise UserError(f"--update_card: {model!r} is not a folder; download the model to write to its card")


def run_evaluation(options: EvaluateOptions) -> None:
    """Evaluate each model on each task, print a table, and write what was asked for; also under `torchrun`.

    Raises:
        UserError: an unknown model or task, or examples that cannot be scored.
    """
    import torch  # this and the next imports take seconds, which a mistake in the options need not wait for
    from accelerate import Accelerator

    from fgpt_hf.evaluation.tasks import find_task
    from fgpt_hf.model.io import model_name
    from fgpt_hf.runtime.hardware import keep_freed_memory

    for task in options.tasks:
        find_task(task.partition("=")[0])
    # Accelerate starts several processes on CPUs only if it is asked to.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    names = [model_name(model) for model in options.models]
    results = {name: _evaluate_model(name, options, accelerator) for name in names}
    if accelerator.is_main_process:
        _report(results, options, accelerator)


def _evaluate_model(name: str, options: EvaluateOptions, accelerator: "Accelerator") -> list["TaskResult"]:
    import torch
    from accelerate.utils import set_seed

    from fgpt_hf.evaluation.benchmark import Benchmark
    from fgpt_hf.model.io import load_model

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model, tokenizer = load_model(name, dtype, options.trust_remote_code)
    model.to(accelerator.device)
    set_seed(options.seed)
    benchmarks = [Benchmark(task, tokenizer, options.limit) for task in options.tasks]
    return [benchmark.run(accelerator, model, options.tokens_per_batch) for benchmark in benchmarks]


def _report(results: Results, options: EvaluateOptions, accelerator: "Accelerator") -> None:
    """Print the results, and write them where they are wanted."""
    from fgpt_hf.evaluation.results import contexts_cut_notes, differences, results_record, write_results
    from fgpt_hf.hub.card_results import write_to_card

    paired = differences(*results.values()) if len(results) == 2 else []
    _print_tables(results, paired)
    for line in contexts_cut_notes(results):
        print(line)
    settings = {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "bf16": options.bf16,
        "tokens_per_batch": options.tokens_per_batch,
        "seed": options.seed,
    }
    records = {name: results_record(result, settings, options.limit) for name, result in results.items()}
    models = [{"model": name, **record.to_json()} for name, record in records.items()]
    if options.out:
        compared = {"models": models, "differences": [row.to_json() for row in paired]}
        write_results(options.out, models[0] if len(models) == 1 else compared)
    for name, record in records.items() if options.update_card else ():
        write_to_card(Path(name), record)


def _print_tables(results: Results, paired: Sequence[Any]) -> None:
    from fgpt_hf.evaluation.results import differences_table, results_table

    if paired:
        print(differences_table(list(results), paired))
    else:
        print(results_table(next(iter(results.values()))))
