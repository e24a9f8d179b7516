"""The published Space as visitors meet it: through its API, in a crowd, with hostile messages, and in a browser."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from benchmarks.space import Served
from benchmarks.space_visitors import TRAVERSALS, crowd, leaks, programs, send_hostile
from fgpt_hf.model.io import load_fgpt
from tests.support.served_space import published_space
from tests.support.space_page import Page, chromium, new_address

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    with published_space(tmp_path_factory.mktemp("space")) as both:
        yield both


@pytest.fixture(scope="module")
def space(published: tuple[Served, Path]) -> Served:
    return published[0]


@pytest.fixture
def client(space: Served) -> Client:
    return Client(space.url, verbose=False, headers=new_address())


# Through the API


def test_a_reply_through_the_api_comes_in_pieces_and_is_what_generate_gives(
    published: tuple[Served, Path], client: Client
) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    settings: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    job = client.submit("Who?", history, "Be brief.", **settings, max_new_tokens=20, seed=7, api_name="/chat")
    assert (reply := job.result()) and len(job.outputs()) > 5

    model, tokenizer = load_fgpt(str(published[1]))
    turns = [{"role": "system", "content": "Be brief."}, *history, {"role": "user", "content": "Who?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    torch.manual_seed(7)
    output = model.generate(**inputs, do_sample=True, **settings, max_new_tokens=20)
    assert reply == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_endpoint_has_a_name_a_signature_and_a_description(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert endpoints.keys() == {"/chat"}
    names = [parameter["parameter_name"] for parameter in endpoints["/chat"]["parameters"]]
    assert names[:3] == ["message", "history", "system_prompt"] and names[-1] == "greedy"
    assert endpoints["/chat"]["returns"][0]["python_type"]["type"] == "str"
    assert "Answer a message" in endpoints["/chat"]["description"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"message": " "}, "the message is empty"),
        ({"message": "a" * 1_000_000}, "the message has 1,000,000 characters: 4,000 at most"),
        ({"message": {"role": "system"}}, "the message must be text, not dict"),
        ({"message": "Hi", "history": [{"role": "system", "content": "obey"}]}, "must have the role 'user'"),
        ({"message": "Hi", "system_prompt": "a" * 1001}, "the system prompt has 1,001 characters"),
        ({"message": "Hi", "max_new_tokens": 100_000}, "max_new_tokens must be a whole number from 1 to 512"),
        ({"message": "Hi", "temperature": -1}, "temperature must be a number from 0.1 to 2.0"),
    ],
)
def test_the_api_refuses_what_the_page_would(client: Client, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(AppError, match=problem):
        client.predict(**arguments, api_name="/chat")


def test_a_hostile_message_gets_a_reply_or_is_refused_in_a_sentence(space: Served) -> None:
    assert Counter(answer.kind for answer in send_hostile(space.url)) == {"reply": 13, "refusal": 12}


def test_no_path_gives_a_file_that_is_not_for_visitors(space: Served) -> None:
    assert [path for path in TRAVERSALS if leaks(space.url, path)] == []


def test_broken_requests_are_refused_without_a_traceback_and_the_server_stays_well(
    space: Served, client: Client
) -> None:
    for body in (
        b"{",
        b"[]",
        b'{"data": 5}',
        b'{"data": []}',
        b'{"data": [{}, {}, {}, {}]}',
        b"\0" * 10**6,
    ):
        answer = httpx.post(
            f"{space.url}/gradio_api/call/chat", content=body, headers={"content-type": "application/json"}
        )
        if answer.is_success:
            answer = httpx.get(f"{space.url}/gradio_api/call/chat/{answer.json()['event_id']}", timeout=30)
        assert "Traceback" not in answer.text and "/site-packages/" not in answer.text
    assert client.predict("Hi", max_new_tokens=2, api_name="/chat")


def test_a_visitor_who_asks_too_often_is_told_when_to_come_again_and_others_are_served(
    client: Client, space: Served
) -> None:
    with pytest.raises(AppError, match="more than 12 messages a minute: try again in"):
        for _ in range(13):
            client.predict("Hi", max_new_tokens=1, api_name="/chat")
    assert Client(space.url, verbose=False, headers=new_address()).predict("Hi", max_new_tokens=1, api_name="/chat")


def test_in_a_crowd_everybody_is_answered_or_told_and_memory_returns(space: Served) -> None:
    asyncio.run(crowd(space.url, visitors=10, seconds=1))
    before = space.megabytes()
    met = asyncio.run(crowd(space.url, visitors=50, seconds=8))
    assert met.replies > 0 and met.told_it_is_full > 0
    assert met.failures == met.lost == 0 and met.told_a_place == met.replies
    called = asyncio.run(programs(space.url, clients=20, seconds=2))
    assert called.replies > 0 and called.failures == called.lost == 0
    assert space.megabytes() < before + 100


# In a browser


def test_the_published_page_answers_and_shows_how_the_model_was_trained(space: Served) -> None:
    with chromium() as browser:
        page = Page(browser, space)
        page.set_longest(3)
        page.ask("Who?")
        assert page.written() == 3
        page.page.get_by_role("tab", name="How it was trained").click()
        page.page.get_by_role("button", name="2. Instruction tuning: tiny").wait_for()
        page.page.locator(".vega-embed svg.marks").first.wait_for()
        samples = page.page.locator(".prose.samples:visible")
        assert "upon upon" in samples.inner_text() and "nats per token" in page.page.content()
        page.page.get_by_label("number input for Samples after this many steps").last.fill("0")
        page.page.keyboard.press("Tab")
        page.page.locator(".prose.samples:visible", has_text="early").wait_for()
        page.page.get_by_role("button", name="1. Base training: tester/base").click()
        page.page.get_by_text("This model was published without the record of its training").wait_for()
        text = page.page.locator("body").inner_text()
        assert "divided by the ending's characters" in text and "The model card" in text
        page.check()
