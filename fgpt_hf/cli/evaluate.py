"""`fgpt evaluate`: any causal model of transformers on benchmarks, or two of them side by side."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt_hf.errors import UserError
from fgpt_hf.model.io import model_name

if TYPE_CHECKING:
    from fgpt_hf.evaluation.benchmark import TaskResult

HELP = "results on benchmarks: fgpt evaluate runs/quickstart/base/model --tasks pydocs-choice pydocs-validation"


def add_evaluate(commands: Any) -> None:
    """Add `evaluate`, with its arguments, to the subparsers of `fgpt`."""
    parser: ArgumentParser = commands.add_parser("evaluate", help=HELP, description=__doc__)
    parser.set_defaults(function=evaluate)
    add = parser.add_argument
    add(
        "models", nargs="+", metavar="MODEL", help="a model's or a run's folder, or an id on the Hub; two: side by side"
    )
    add("--tasks", nargs="+", default=["pydocs-choice"], metavar="TASK[=FILE]", help="by name, by spaces or commas")
    add("--limit", type=int, metavar="N", help="only the first N examples of each task")
    add("--bf16", action="store_true", help="weights and products in bfloat16 (default: float32)")
    add("--tokens_per_batch", type=int, metavar="N", help="padding included (default: what suits the device)")
    add("--seed", type=int, default=1337, help="of whatever the model draws; none of the tasks draws anything")
    add("--out", type=Path, metavar="FILE", help="write the results as JSON, with versions and conventions")
    add("--update_card", action="store_true", help="write them into the folder's README.md and .eval_results/ too")
    add("--trust_remote_code", action="store_true", help="run the code that comes with a model of the Hub")


def evaluate(options: Namespace) -> None:
    """Evaluate each model on each task, print a table, and write what was asked for; also under `torchrun`.

    Raises:
        UserError: an unknown model or task, or examples that cannot be scored.
    """
    options.models = [model_name(name) for name in options.models]
    names = _checked(options)
    import torch  # all of it here, because it takes seconds and other commands do without
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from fgpt_hf.evaluation.benchmark import Benchmark
    from fgpt_hf.evaluation.tasks import find_task
    from fgpt_hf.model.io import load_model
    from fgpt_hf.runtime.hardware import keep_freed_memory

    for name in names:
        find_task(name.partition("=")[0])
    # Accelerate starts several processes on CPUs only when told.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    runs = {}
    for name in options.models:
        model, tokenizer = load_model(name, dtype, options.trust_remote_code)
        model.to(accelerator.device)
        set_seed(options.seed)
        benchmarks = [Benchmark(task, tokenizer, options.limit) for task in names]
        runs[name] = [benchmark.run(accelerator, model, options.tokens_per_batch) for benchmark in benchmarks]
    if accelerator.is_main_process:
        settings = {"processes": accelerator.num_processes, "device": accelerator.device.type}
        _report(runs, options, settings)


def _report(runs: dict[str, list["TaskResult"]], options: Namespace, settings: dict[str, Any]) -> None:
    """Print the results, and write them where they are wanted."""
    from fgpt_hf.evaluation.results import (
        as_json,
        cut_notes,
        differences,
        differences_table,
        results_table,
        write_results,
    )
    from fgpt_hf.hub.card_results import write_to_card

    found = differences(*runs.values()) if len(runs) == 2 else []
    print(differences_table(list(runs), found) if found else results_table(runs[options.models[0]]))
    for line in cut_notes(runs):
        print(line)
    settings |= {name: getattr(options, name) for name in ("bf16", "tokens_per_batch", "seed")}
    models = [{"model": name} | as_json(run, settings, options.limit) for name, run in runs.items()]
    if options.out:
        together = {"models": models, "differences": [row.as_json() for row in found]}
        write_results(options.out, models[0] if len(models) == 1 else together)
    for model in models if options.update_card else ():
        write_to_card(Path(model["model"]), model)


def _checked(options: Namespace) -> list[str]:
    """The names of the tasks; UserError for options that cannot be."""
    if len(options.models) > 2 or len(set(options.models)) < len(options.models):
        raise UserError(f"give one model, or two different ones to compare, not {' '.join(options.models)}")
    for name in ("limit", "tokens_per_batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be above zero")
    if options.out and options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder: name a file")
    for name in options.models if options.update_card else ():
        if not Path(name).is_dir():
            raise UserError(f"--update_card: {name!r} is not a folder; download the model to write to its card")
    names = [name for given in options.tasks for name in given.split(",") if name]
    if not names:
        raise UserError("--tasks names none: try --tasks pydocs-choice")
    return names
