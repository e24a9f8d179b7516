"""The `evaluate` modules: what `evaluate.load` gives, alone in a folder, and what their numbers mean."""

import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fgpt_hf.metrics.bits_per_byte.bits_per_byte import document_scores
from fgpt_hf.metrics.hellaswag.hellaswag import mean, right_choices

METRICS = Path(__file__).parents[2] / "fgpt_hf" / "metrics"
METRIC_NAMES = ["hellaswag", "bits_per_byte"]
LOAD = """
import json, sys
import evaluate
metric = evaluate.load(sys.argv[1])
print(json.dumps(metric.compute(**json.loads(sys.argv[2]))))
print(json.dumps([metric.features is not None, len(metric.description) > 100]))
"""
CHOICES = {
    "log_likelihoods": [[-4.0, -6.0], [-3.0, -1.0], [-6.0, -6.5]],
    "tokens": [[1, 3], [1, 1], [2, 3]],
    "characters": [[4, 7], [2, 2], [6, 5]],
    "bytes": [[4, 7], [2, 2], [6, 9]],
    "labels": [1, 1, 1],
}
DOCUMENTS = {"negative_log_likelihoods": [6.0, 2.5, 9.0], "tokens": [3, 1, 5], "bytes": [12, 4, 30], "words": [3, 1, 4]}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inputs"), [("hellaswag", CHOICES), ("bits_per_byte", DOCUMENTS)])
def test_a_folder_loads_alone_as_an_evaluate_module(tmp_path: Path, name: str, inputs: dict) -> None:
    """From a copy elsewhere, with neither this package nor its folder in sight."""
    shutil.copytree(METRICS / name, tmp_path / name)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['fgpt_hf'] = None\n" + LOAD,
            str(tmp_path / name),
            json.dumps(inputs),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results, manners = map(json.loads, done.stdout.splitlines())
    scores = right_choices(**inputs) if name == "hellaswag" else document_scores(**inputs)
    assert results == {key: value for metric, values in scores.items() for key, value in mean(metric, values).items()}
    assert manners == [True, True]


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_a_folder_is_a_space_of_the_hub(name: str) -> None:
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "sdk: gradio" in card and "app_file: app.py" in card
    assert (METRICS / name / "app.py").is_file() and (METRICS / name / "requirements.txt").is_file()


APP = """
import json, sys
sys.path.insert(0, sys.argv[1])
import app
app.page()
print(json.dumps(app.compute(app.EXAMPLE)))
try:
    app.compute('{"labels": [1]}')
except app.gr.Error as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", METRIC_NAMES)
def test_the_page_of_a_metric_computes_it_and_says_what_is_wrong(name: str) -> None:
    command = [sys.executable, "-c", APP, str(METRICS / name)]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results, problem = done.stdout.splitlines()[-2:]
    assert len(json.loads(results)) > 3 and problem


def test_each_convention_divides_by_its_own_length() -> None:
    assert right_choices(**CHOICES) == {
        "acc": [0.0, 1.0, 0.0],
        "acc_norm": [1.0, 1.0, 0.0],
        "acc_bytes": [1.0, 1.0, 1.0],
        "acc_token": [1.0, 1.0, 1.0],
    }


def test_of_equal_scores_the_first_is_chosen() -> None:
    ones = [[1, 1]]
    assert right_choices([[-1.0, -1.0]], ones, ones, ones, [0])["acc"] == [1.0]


def test_right_answers_score_one_and_chance_scores_chance() -> None:
    source = random.Random(0)
    sums = [[-source.random() for _ in range(4)] for _ in range(4_000)]
    ones = [[1] * 4] * len(sums)
    assert set(right_choices(sums, ones, ones, ones, [row.index(max(row)) for row in sums])["acc"]) == {1.0}
    chance = mean("acc", right_choices(sums, ones, ones, ones, [source.randrange(4) for _ in sums])["acc"])
    assert abs(chance["acc"] - 0.25) < 3 * chance["acc_stderr"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"labels": []}, "no examples"),
        ({"labels": [1, 2, 1]}, "the label 2 is not one of 0 to 1"),
        ({"bytes": [[4, 7], [2], [6, 9]]}, "2 log-likelihoods and 1 lengths"),
        ({"characters": [[4, 7], [0, 2], [6, 5]]}, "lengths must be 1 or more"),
        ({"log_likelihoods": [[-4.0, -6.0], [-3.0, math.nan], [-6.0, -6.5]]}, "must be numbers"),
    ],
)
def test_choices_that_make_no_sense_are_refused(change: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        right_choices(**{**CHOICES, **change})


def test_a_standard_error_is_that_of_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean("acc", values) == {"acc": 0.6, "acc_stderr": pytest.approx(statistics.stdev(values) / math.sqrt(5))}
    assert mean("acc", [1.0]) == {"acc": 1.0}


def test_a_corpus_is_measured_as_a_whole() -> None:
    results = {name: statistics.fmean(values) for name, values in document_scores(**DOCUMENTS).items()}
    assert results == pytest.approx(
        {
            "loss": 17.5 / 9,
            "perplexity": math.exp(17.5 / 9),
            "bits_per_byte": 17.5 / math.log(2) / 46,
            "word_perplexity": math.exp(17.5 / 8),
        }
    )


def test_the_standard_errors_of_ratios_are_those_that_resampling_finds() -> None:
    source = np.random.default_rng(0)
    size = source.integers(20, 200, 400)
    documents = np.stack(
        [size * source.normal(3, 0.5, 400), size, size * 4 + source.integers(0, 40, 400), size // 2 + 1]
    )
    resampled = []
    for _ in range(400):
        nats, tokens, octets, words = documents[:, source.integers(0, 400, 400)].sum(axis=1)
        resampled.append([nats / tokens, math.exp(nats / tokens), nats / math.log(2) / octets, math.exp(nats / words)])
    shares = document_scores(documents[0].tolist(), *documents[1:].astype(int).tolist())
    errors = [mean("x", values)["x_stderr"] for values in shares.values()]
    assert errors == pytest.approx(np.std(resampled, axis=0), rel=0.15)


def test_weights_that_are_broken_have_no_perplexity() -> None:
    assert set(document_scores([5000.0], [5], [27], [1])) == {"loss", "bits_per_byte"}
    with pytest.raises(ValueError, match="must be finite numbers"):
        document_scores([math.inf], [5], [27], [1])


def test_text_without_spaces_has_no_word_perplexity() -> None:
    assert "word_perplexity" not in document_scores([5000.0], [900], [2700], [1])


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        (([], [], [], []), "no documents"),
        (([1.0], [0], [1], [1]), "no tokens, bytes or words"),
        (([math.nan], [1], [1], [1]), "one is NaN"),
    ],
)
def test_documents_that_make_no_sense_are_refused(documents: tuple, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        document_scores(*documents)
