"""The recipes do what they say: their shell is valid, their flags exist, and a job that was stopped goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun
from fgpt_hf.files import read_json_lines
from tests.faults.runs import CASES
from tests.support.loopback_hub import LoopbackHub, hub_environment

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


STAGES = {
    "train-base": (BaseRun, PRESETS),
    "train-instruct": (InstructRun, INSTRUCT_PRESETS),
    "train-preference": (PreferenceRun, PREFERENCE_PRESETS),
}


def commands(page: Path = RECIPES / "README.md", before: str = "    ") -> list[list[str]]:
    """Return the commands of a page, which stand after this beginning of a line, continued lines joined."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(rf"^{before}(\S.+)$", text, re.MULTILINE)]


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


def test_the_hubs_own_command_line_takes_each_job_and_fgpt_its_options() -> None:
    jobs = [command for page in ("README.md", "hf_jobs.md") for command in commands(RECIPES / page) if "uv" in command]
    jobs += commands(RECIPES / "hf_job.py", before="(?=hf jobs)")
    assert len(jobs) == 4
    for job in jobs:
        given = parsed_by_hf(job[1:])
        assert given["script"] == "recipes/hf_job.py"
        stage, *flags = given["script_args"]
        if stage not in STAGES:
            stage, flags = "train-base", [stage, *flags]
        assert parse_run(*STAGES[stage], ["--push_to_hub", *flags]).hub_model_id
    assert all(parsed_by_hf(job[1:])["timeout"] == "3h" for job in jobs[:3])


def parsed_by_hf(arguments: list[str]) -> dict[str, Any]:
    """Return what `hf` makes of its arguments, without doing it."""
    from huggingface_hub.cli.hf import app

    command: Any = app
    while hasattr(command, "get_command"):
        command = command.get_command(command.context_class(command), arguments[0])
        arguments = arguments[1:]
    return dict(command.make_context("", list(arguments)).params)


def test_containers_are_built_for_targets_that_exist_and_take_the_options_of_fgpt() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    in_file = [shlex.split(line) for line in re.findall(r"^#     (docker .+)$", text, re.MULTILINE)]
    docker = [command for command in [*commands(), *in_file] if command[0] == "docker"]
    targets = [command[command.index("--target") + 1] for command in docker if "build" in command]
    assert targets and set(targets) <= set(re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE))
    runs = [command for command in docker if "run" in command]
    assert len(runs) == 2
    for command in runs:
        parse_run(*STAGES["train-base"], command[command.index("train-base") + 1 :])


def test_each_launcher_configuration_is_one_of_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in RECIPES.glob("*.yaml"):
        if path.name == "skypilot.yaml":
            continue
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
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 143, errors.decode()
    assert (cluster / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"

    last = read_json_lines(cluster / "run" / "metrics.jsonl")[-1]["step"]
    job = submit(last + 2)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors.decode()
    steps = [line["step"] for line in read_json_lines(cluster / "run" / "metrics.jsonl")]
    assert steps == list(range(last + 3))
    assert len((cluster / "requeued").read_text().splitlines()) == 1


def test_the_jobs_script_carries_what_the_hub_needs_to_start_it() -> None:
    from huggingface_hub.cli._uv_script_header import parse_uv_script_header

    text = (RECIPES / "hf_job.py").read_text("utf-8")
    header = parse_uv_script_header(text)
    assert header and header.flavor == "h200" and header.timeout == "3h" and header.secrets == ["HF_TOKEN"]
    assert 'dependencies = ["fgpt-hf[peft]"]' in text


def test_spot_instances_go_on_from_the_hub() -> None:
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text("utf-8"))
    assert task["resources"]["use_spot"] and "HF_TOKEN" in task["secrets"]
    command = shlex.split(task["run"].replace("\\\n", " ").replace("$HUB_MODEL_ID", "user/name"))
    flags = command[command.index("train-base") + 1 :]
    run = parse_run(BaseRun, PRESETS, [flag.replace("$PRESET", task["envs"]["PRESET"]) for flag in flags])
    assert run.keeps_state_on_hub and run.hub_model_id == "user/name"


@pytest.mark.slow
def test_a_job_that_is_cut_off_goes_on_in_the_next_one(tmp_path: Path) -> None:
    """Each in an empty folder, as on a machine of the Hub's Jobs; the loopback Hub answers."""
    text = "".join(f'{{"text": "Document {n} says that {n} and {n + 1} make {2 * n + 1}."}}\n' for n in range(400))
    (tmp_path / "documents.jsonl").write_text(text)
    (case,) = [case for case in CASES if case.name == "base, streamed"]
    given = ("--dataset_name", "--max_steps", "--per_device")
    flags = [flag for flag in case.flags(tmp_path) if not flag.startswith(given)]
    flags += [f"--dataset_name={tmp_path / 'documents.jsonl'}", "--max_steps=300", "--hub_model_id=tester/tiny"]

    with LoopbackHub() as server:

        def start(number: int) -> subprocess.Popen[str]:
            folder = tmp_path / f"machine{number}"
            folder.mkdir()
            environment = hub_environment(server, folder) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(RECIPES / "hf_job.py"), *flags, "--logging_steps=10", "--save_steps=10"]
            output = (folder / "log").open("w")
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, text=True)

        first = start(1)
        deadline = time.monotonic() + 200
        while not server.count("POST", "/super-squash/"):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "machine1" / "log").read_text()
            time.sleep(0.05)
        first.kill()
        first.wait()
        second = start(2)
        second.wait(timeout=200)
        log = (tmp_path / "machine2" / "log").read_text()
        assert second.returncode == 0, log
        assert re.search(r"downloading the state of step \d+ from tester/tiny@last-checkpoint", log)
        files = server.repo("model", "tester/tiny").files()
    assert {"model.safetensors", "README.md", "metrics.jsonl"} <= files.keys()
    steps = [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 300
