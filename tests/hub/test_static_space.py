"""`fgpt publish --static-space`: a page without a server, which writes what transformers writes."""

import functools
import http.server
import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard

from fgpt_hf.cli import main
from fgpt_hf.convert.onnx import SMALL_WEIGHTS, int8_steps
from fgpt_hf.errors import UserError
from fgpt_hf.hub import static_space
from fgpt_hf.hub.static_space import static_space_files
from fgpt_hf.model.io import load_fgpt
from tests.support.loopback_hub import LoopbackHub
from tests.support.run_folders import write_run
from tests.support.served_space import write_chat_run
from tests.support.space_page import chromium

JSDELIVR = "https://cdn.jsdelivr.net/npm/"
PROMPTS = [f"{ask} {what}?" for ask in ("What is", "Who likes", "Where is", "Define") for what in "abcde"]
TOKENS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_run(tmp_path_factory.mktemp("runs") / "chat", seed=0, model_name_or_path="tester/base")


@pytest.fixture(scope="module")
def page_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, in a folder."""
    folder = tmp_path_factory.mktemp("page")
    with static_space_files(run, "tester/page", "tester/tiny") as files:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


def test_the_page_is_a_space_without_a_server_beside_the_model(
    server: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    main.run(["publish", str(run), "tester/tiny", "--static-space", "tester/page"])
    space = server.repo("space", "tester/page")
    files = space.files()
    card = SpaceCard(files["README.md"].decode())
    assert space.sdk == card.data["sdk"] == "static" and card.data["models"] == ["tester/tiny"]
    assert {"index.html", "page.js", "worker.js", "style.css", "model/onnx/model_quantized.onnx"} <= files.keys()
    assert not [name for name in files if "secret" in str(files[name][:200])]
    settings = json.loads(files["settings.json"])
    assert (settings["name"], settings["answers"], settings["context"]) == ("tiny", False, 64)
    assert (
        space.at().oid in capsys.readouterr().out and "model.safetensors" in server.repo("model", "tester/tiny").files()
    )


def test_a_dry_run_lists_the_page_and_publishes_nothing(
    server: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    main.run(["publish", str(run), "tester/tiny", "--static_space", "tester/page", "--dry_run"])
    assert "model/onnx/model_quantized.onnx" in capsys.readouterr().out


def test_what_no_browser_runs_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_space, "MAX_PARAMETERS", 1_000_000)
    refused = pytest.raises(
        UserError, match=r"has 8 million parameters, and a browser runs 1 million at most: use --space"
    )
    with refused, static_space_files(run, "tester/page", "tester/tiny"):
        pass
    for name in ("no name", "page", "a/b/c"):
        with (
            pytest.raises(UserError, match=f"'{name}' cannot be a repo's name"),
            static_space_files(run, name, "tester/tiny"),
        ):
            pass


def test_int8_is_at_most_half_a_step_from_each_weight() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    weights[3] *= 100  # one row that would cost the others their steps, if columns shared them
    steps, scales = int8_steps(weights)
    assert scales.shape == (64, 1) and (np.abs(weights - steps * scales) <= scales * 0.501).all()
    assert int8_steps(weights.T)[1].shape == (1, 64)


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of Transformers.js and ONNX Runtime that the page loads, from npm."""
    if not (npm := shutil.which("npm")):
        pytest.skip("there is no npm")
    folder = tmp_path_factory.mktemp("npm")
    worker = (static_space.PAGE / "worker.js").read_text()
    package = worker.partition(JSDELIVR)[2].partition("/dist/")[0]
    _unpack(npm, package, folder)
    needs = json.loads((folder / package / "package.json").read_text())["dependencies"]
    _unpack(npm, f"onnxruntime-web@{needs['onnxruntime-web']}", folder)
    return folder


def _unpack(npm: str, package: str, folder: Path) -> None:
    command = [npm, "pack", package, "--silent", "--fetch-retries=1", "--fetch-timeout=60000"]
    try:
        packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=200)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"npm cannot fetch {package} here")
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        for member in archive.getmembers():
            if (
                member.name == "package/package.json"
                or "simd-threaded.asyncify" in member.name
                or member.name.endswith(".min.js")
            ):
                member.name = member.name.removeprefix("package/")
                archive.extract(member, folder / package, filter="data")


@pytest.fixture(scope="module")
def address(page_folder: Path) -> Iterator[str]:
    """A server of nothing but files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(page_folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}/"
        files.shutdown()


@pytest.mark.slow
def test_the_browser_writes_what_transformers_writes(address: str, run: Path, transformers_js: Path) -> None:
    def from_npm(route: Any) -> None:
        file = transformers_js / route.request.url.removeprefix(JSDELIVR)
        kind = "application/wasm" if file.suffix == ".wasm" else "text/javascript"
        route.fulfill(path=file, headers={"access-control-allow-origin": "*", "content-type": kind})

    with chromium() as browser:
        context = browser.new_context()
        context.route(f"{JSDELIVR}**", from_npm)
        page, requests = context.new_page(), list[str]()
        page.on("request", lambda request: requests.append(request.url))
        _choices_made_while_the_page_loads_stay(page, address)
        page.wait_for_function("!document.getElementById('send').disabled", timeout=120_000)
        page.get_by_label("Always the most likely word").check()
        assert [_reply(page, prompt) for prompt in PROMPTS] == list(_written_by_transformers(run))
        _stop_ends_a_reply(page)
        _look_is_for_everyone(page)
        assert not [url for url in requests if not url.startswith((address, JSDELIVR, "blob:", "data:"))]


def _choices_made_while_the_page_loads_stay(page: Any, address: str) -> None:
    held: list[Any] = []
    page.route("**/settings.json", lambda route: held.append(route))  # for which the page waits
    page.goto(address)
    assert page.evaluate("document.activeElement.id") == "message"
    page.get_by_label("Longest reply").press("Control+a")
    page.keyboard.press("1")
    held.pop().continue_()
    page.wait_for_function("document.getElementById('name').textContent === 'tiny'")
    page.keyboard.press("2")
    assert page.get_by_label("Longest reply").input_value() == str(TOKENS)


def _reply(page: Any, prompt: str) -> str:
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Message").fill(prompt)
    page.get_by_label("Message").press("Enter")
    page.locator("#stop").wait_for(state="hidden")
    page.wait_for_function("!document.getElementById('send').hidden && document.querySelector('.assistant')")
    return str(page.locator(".assistant").text_content())


def _written_by_transformers(run: Path) -> Iterator[str]:
    """Yield the greedy replies with the weights as the page has them."""
    model, tokenizer = load_fgpt(str(run / "model"))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2 and weights.numel() >= SMALL_WEIGHTS:
                steps, scales = int8_steps(weights.numpy())
                weights.copy_(torch.from_numpy(steps * scales))
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        yield str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _stop_ends_a_reply(page: Any) -> None:
    page.get_by_label("Longest reply").fill("400")
    page.get_by_label("Message").fill("<b>on</b>")
    page.get_by_label("Message").press("Enter")
    page.wait_for_function("parseInt(document.getElementById('note').textContent) > 2")
    page.keyboard.press("Escape")
    page.locator("#send").wait_for()
    assert int(str(page.locator("#note").text_content()).split()[0]) < 400
    assert page.locator(".user").last.inner_text() == "<b>on</b>" and page.locator("#conversation b").count() == 0


def _look_is_for_everyone(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for width, scheme in ((1280, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert [rule["id"] for rule in Axe().run(page).response["violations"]] == []
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
