"""The recipes do what they say: their shell is valid, their flags exist, and a job that was stopped goes on."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.files import read_json_lines
from tests.faults.runs import CASES

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SBATCH = RECIPES / "two_nodes.sbatch"
PAGES = [RECIPES / "README.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
# Those of https://slurm.schedmd.com/sbatch.html and srun.html, 25.05, that a training job may want.
SBATCH_OPTIONS = {
    *("account", "array", "chdir", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency", "error"),
    *("exclude", "exclusive", "gpus", "gpus-per-node", "gpus-per-task", "gres", "hint", "job-name", "licenses"),
    *("mail-type", "mail-user", "mem", "mem-per-cpu", "mem-per-gpu", "nodelist", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "partition", "qos", "requeue", "reservation", "signal", "time", "time-min"),
}
SRUN_OPTIONS = SBATCH_OPTIONS | {"kill-on-bad-exit", "label", "unbuffered", "wait"}


def commands() -> list[list[str]]:
    """Return the commands of the recipes' page, continued lines joined."""
    text = (RECIPES / "README.md").read_text("utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    (\S.+)$", text, re.MULTILINE)]


def test_the_shell_of_a_job_is_valid() -> None:
    for script in RECIPES.glob("*.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)


def test_a_job_has_options_of_slurm_and_what_a_requeued_one_needs() -> None:
    text = SBATCH.read_text("utf-8")
    head, body = text.split("\nsource ")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert (
        len(options) == text.count("#SBATCH") and options.keys() <= SBATCH_OPTIONS
    )  # and none after the first command
    needed = {"cpus-per-task", "time", "signal", "requeue", "output", "open-mode"}
    assert needed <= options.keys() and options["open-mode"] == "append"
    assert set(re.findall(r" --([\w-]+)[= ]", body[body.index("srun") : body.index("bash -c")])) <= SRUN_OPTIONS
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_each_flag_of_a_recipe_exists() -> None:
    launched = [command for command in commands() if "train_base.py" in command or "sbatch" in command]
    assert len(launched) > 4
    for command in launched:
        script = "train_base.py" if "train_base.py" in command else str(SBATCH.relative_to(ROOT))
        parse_run(BaseRun, PRESETS, command[command.index(script) + 1 :])
        for path in command:
            assert not path.startswith("recipes/") or (ROOT / path).is_file(), path


def test_each_launcher_configuration_is_one_of_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in RECIPES.glob("*.yaml"):
        assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_ends_processes_by_name(page: Path) -> None:
    assert not re.search(r"\b(pkill|killall)\b", page.read_text("utf-8"))


SRUN = """#!/bin/bash
# Starts a command in SLURM_NTASKS processes on this machine; returns the highest exit code, as Slurm's srun does.
while [[ "$1" == --* ]]; do shift; done
pids=() highest=0
for number in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$number SLURM_LOCALID=$number "$@" & pids+=($!)
done
echo "${pids[@]}" > tasks
for pid in "${pids[@]}"; do wait "$pid"; status=$?; ((status > highest)) && highest=$status; done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder to submit from, in which Slurm's commands are stand-ins for one machine and two processes."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    for name, content in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (binaries / name).write_text(content)
        (binaries / name).chmod(0o755)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    (tmp_path / "train_base.py").symlink_to(ROOT / "train_base.py")
    text = "".join(f'{{"text": "Document {n} says that {n} and {n + 1} make {2 * n + 1}."}}\n' for n in range(400))
    (tmp_path / "documents.jsonl").write_text(text)
    return tmp_path


@pytest.mark.slow
def test_a_job_that_is_stopped_saves_returns_to_the_queue_and_finishes(cluster: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": str(os.getpid())}
    environment = {**os.environ, **slurm, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (case,) = [case for case in CASES if case.name == "base, streamed, two processes"]
    flags = [flag for flag in case.flags(cluster) if not flag.startswith(("--dataset_name", "--max_steps"))]
    flags += [f"--dataset_name={cluster / 'documents.jsonl'}", f"--output_dir={cluster / 'run'}"]

    def submit(steps: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", SBATCH, *flags, f"--max_steps={steps}"], cwd=cluster, env=environment, stderr=subprocess.PIPE
        )

    job = submit(100_000)
    deadline = time.monotonic() + 200
    while not any(line["step"] >= 1 for line in read_json_lines(cluster / "run" / "metrics.jsonl")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for task in (cluster / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    _, errors = job.communicate(timeout=100)
    assert job.returncode == 143, errors.decode()
    assert (cluster / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"

    last = read_json_lines(cluster / "run" / "metrics.jsonl")[-1]["step"]
    job = submit(last + 2)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors.decode()
    steps = [line["step"] for line in read_json_lines(cluster / "run" / "metrics.jsonl")]
    assert steps == list(range(last + 3))
    assert len((cluster / "requeued").read_text().splitlines()) == 1
