"""`fgpt lm-eval`: the command of lm-evaluation-harness, with the model class `fgpt`."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from fgpt_hf.errors import UserError

SUBCOMMANDS = ("run", "ls", "validate")


def main(arguments: Sequence[str]) -> None:
    """Run lm_eval's own command line, in which `--model` is `fgpt` where nothing else is given.

    Raises:
        UserError: lm_eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError("fgpt lm-eval needs lm-evaluation-harness: pip install 'fgpt-hf[harness]'")
    from lm_eval.__main__ import cli_evaluate

    import fgpt_hf.evaluation.harness  # noqa: F401  # registers the class

    sys.argv = ["lm_eval", *with_model(arguments)]
    cli_evaluate()


def with_model(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of lm_eval, with `--model fgpt` where they run tasks and name no model.

    Example:
        >>> with_model(["--tasks", "hellaswag"])
        ['run', '--model', 'fgpt', '--tasks', 'hellaswag']
        >>> with_model(["ls", "tasks"])
        ['ls', 'tasks']
    """
    command, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in SUBCOMMANDS else ("run", arguments)
    is_named = any(each.partition("=")[0] in ("--model", "-M", "--config", "-C") for each in rest)
    model = ["--model", "fgpt"] if command == "run" and not is_named else []
    return [command, *model, *rest]
