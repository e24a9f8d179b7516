"""A training run in one or several processes, as a launcher would start them."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fgpt_hf.cli.entry_point import command_line
from tests.support import loop_run
from tests.support.forked import Forked, held_port, port_of, process_group


class Launched:
    """The processes of a run that writes to `folder`."""

    def __init__(
        self,
        folder: Path,
        *flags: object,
        processes: int = 1,
        port: int | None = None,
        file_size_limit: int | None = None,
        main: Callable[[Sequence[str]], None] = loop_run.main,
    ) -> None:
        self.logs = Path(tempfile.mkdtemp(dir=folder.parent))
        self._port_holder = held_port()
        arguments = [f"--output_dir={folder}", *map(str, flags)]
        self._forked = [
            Forked(
                partial(call_as_script, main),
                arguments,
                self.logs,
                name=str(rank),
                environment=environment,
                file_size_limit=file_size_limit,
            )
            for rank, environment in enumerate(process_group(processes, port or port_of(self._port_holder)))
        ]

    def wait(self) -> "Launched":
        """Wait until all processes have ended."""
        for forked in self._forked:
            forked.wait()
        self._port_holder.close()
        return self

    @property
    def processes(self) -> list[Any]:
        """The processes, as `multiprocessing.Process`."""
        return [forked.process for forked in self._forked]

    @property
    def exit_codes(self) -> list[int | None]:
        return [forked.returncode for forked in self._forked]

    @property
    def outputs(self) -> list[str]:
        """What each process printed."""
        return [forked.stdout for forked in self._forked]

    @property
    def output(self) -> str:
        """What the main process printed."""
        return self.outputs[0]

    @property
    def errors(self) -> str:
        """What the main process wrote to its standard error."""
        return self.all_errors[0]

    @property
    def all_errors(self) -> list[str]:
        """What each process wrote to its standard error."""
        return [forked.stderr for forked in self._forked]


def torchrun(processes: int, folder: Path, main: Callable[..., object], *arguments: Any) -> None:
    """Call `main` in several processes that torchrun's own agent forks and watches, with its logs in a folder."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="tests",
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=tempfile.mkdtemp(dir=folder)),
    )
    elastic_launch(config, main)(*arguments)


def call_as_script(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    sys.argv = [main.__module__, *arguments]
    command_line(main)
