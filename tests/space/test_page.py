"""The page of the Space in Chromium, with a model that repeats what it is asked."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.space import Served, serving
from tests.support.served_space import write_chat_run
from tests.support.space_page import Page, chromium

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MARKDOWN = """List<int> & <b>bold</b> ![x](https://evil.example/a.png) <img src=https://evil.example/b.png>

```python
a: List<int> = [1]  # <b>
```

- one
- **two**

| a | b |
|---|---|
| 1 | 2 |

[go](javascript:alert(1)) <script>alert(1)</script> &lt;"""
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("space")
    chat = write_chat_run(folder / "chat", seed=0, model_name_or_path="tester/base")
    base = write_chat_run(folder / "base", seed=1)
    models = {"MODEL_ID": str(chat / "model"), "BASE_MODEL_ID": str(base / "model"), "MESSAGES_PER_MINUTE": "40"}
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/support/echoing_space.py")]
    with serving(command, folder, {**os.environ, **models, **own}) as served:
        yield served
    log = (folder / "space.log").read_text()
    told = log.count("RuntimeError: a secret")
    assert log.count("Traceback") == told <= 1, log


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, space: Served) -> Iterator[Page]:
    opened = Page(browser, space)
    yield opened
    opened.check()
    opened.context.close()


@pytest.fixture
def other(browser: Any, space: Served) -> Iterator[Page]:
    """A second visitor, whose reply is being written."""
    opened = Page(browser, space)
    opened.set_longest(512)
    opened.send("on and on")
    opened.page.wait_for_function("document.querySelector('#note').innerText.includes('written')")
    yield opened
    opened.context.close()


# Sending


@pytest.mark.parametrize("refused", [False, True])
def test_a_message_that_is_sent_while_the_page_opens_is_not_lost(browser: Any, space: Served, refused: bool) -> None:
    """Also if a full queue refuses the event that restores the conversation."""
    page = Page(browser, space)
    page.ask("First")
    held: list[Any] = []
    page.page.route("**/queue/join*", lambda route: held.append(route), times=1)
    page.page.reload()
    page.box.fill("Second")
    page.page.wait_for_function("chatPage && document.querySelector('#message .submit-button')")
    page.box.press("Enter")
    assert page.box.input_value() == "Second"
    while not held:
        page.page.wait_for_timeout(50)
    held[0].fulfill(status=503, json={"detail": "Queue is full."}) if refused else held[0].continue_()
    page.page.locator("#chat [data-testid=bot]", has_text="Second").wait_for()
    page.wait_until_written()
    assert page.words() == page.replies() == (["Second"] if refused else ["First", "Second"])
    page.context.close()


def test_a_message_appears_at_once_a_place_is_told_and_nothing_typed_meanwhile_is_lost(page: Page, other: Page) -> None:
    page.set_longest(3)
    page.send("First")
    page.page.keyboard.type("Second")
    page.page.locator("#chat [data-testid=user]").wait_for()
    page.page.wait_for_function(
        "document.querySelector('#note').dataset.waiting === 'Waiting: number 1 of 1 in the queue'"
    )
    page.box.press("Enter")
    assert (page.words(), page.box.input_value()) == (["First"], "Second")
    other.page.keyboard.press("Escape")
    page.wait_until_written()
    assert page.replies() == ["First"] and page.box.input_value() == "Second"
    page.box.press("Enter")
    page.page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length === 2")
    page.wait_until_written()
    assert page.words() == page.replies() == ["First", "Second"]


def test_stop_works_while_waiting_and_gives_the_message_back(page: Page, other: Page) -> None:
    page.send("Wait")
    page.page.wait_for_function("document.querySelector('#note').dataset.waiting")
    page.stop.click()
    page.page.wait_for_function("document.querySelector('#message textarea').value === 'Wait'")
    assert page.words() == []
    assert other.stop.is_visible()


def test_what_is_sent_while_a_reply_is_being_stopped_stays_in_the_box_until_then(page: Page) -> None:
    page.set_longest(512)
    page.send("on and on")
    page.page.locator("#chat [data-testid=bot]", has_text="on and on").wait_for()
    held: list[Any] = []
    page.page.route("**/cancel", lambda route: held.append(route), times=1)
    page.page.keyboard.press("Escape")
    while not held:
        page.page.wait_for_timeout(50)
    page.page.wait_for_timeout(500)  # for a Send that comes too early
    page.send("Next")
    assert page.words() == ["on and on"] and page.box.input_value() == "Next"
    held[0].continue_()
    page.wait_until_written()
    page.box.press("Enter")
    page.page.locator("#chat [data-testid=bot]", has_text="Next").wait_for()
    page.wait_until_written()
    assert page.words() == ["on and on", "Next"] and page.box.input_value() == ""


def test_escape_and_stop_end_the_writing_and_what_is_written_stays(page: Page) -> None:
    page.set_longest(512)
    for end in (lambda: page.page.keyboard.press("Escape"), lambda: page.stop.click()):
        page.send("on and on")
        page.page.wait_for_function("document.querySelector('#note').innerText.match(/(\\d+) written/)?.[1] > 5")
        end()
        page.wait_until_written()
        assert 5 < page.wait_until_still() < 400 and page.replies()[-1].startswith("on and on")
        page.page.get_by_label("Clear").first.click()
        page.page.locator("#chat .example").first.wait_for()


def test_a_refused_message_stays_in_the_box_and_the_reason_is_a_sentence(page: Page) -> None:
    page.send("word " * 700)
    told = page.wait_for_toast("Not sent")
    assert re.search(
        r"Not sent: the message is [\d,]+ tokens with its frame, and the model reads 512: shorten it\.", told
    )
    assert page.box.input_value() == "word " * 700 and page.words() == []
    page.ask("shorter")
    assert page.replies() == ["shorter"]


def test_a_failure_gives_the_message_back_and_tells_nothing_of_the_machine(page: Page) -> None:
    page.send("fail please")
    told = page.wait_for_toast("The model failed while it wrote")
    page.page.wait_for_function("document.querySelector('#message textarea').value === 'fail please'")
    assert "a secret in" not in page.page.content() and "RuntimeError" not in page.page.content()
    assert "Your message is back in the box" in told and page.words() == []


# Reading


def test_replies_are_safe_markdown_words_are_text_and_copies_are_exact(page: Page) -> None:
    page.ask(MARKDOWN)
    assert page.words() == [MARKDOWN]
    user, bot = (page.page.locator(f"#chat [data-testid={role}]") for role in ("user", "bot"))
    assert user.locator(":is(b, strong, code, li, table, a, img, script)").count() == 0
    for tag, count in {"pre code": 1, "li": 2, "strong": 1, "table": 1, "img": 0, "script": 0, "b": 0}.items():
        assert bot.locator(tag).count() == count, tag
    assert bot.locator("a[href^=javascript]").count() == 0
    assert "<b>bold</b>" in bot.inner_text().replace("\u2060", "")
    page.page.get_by_label("Copy message").last.click()
    assert page.clipboard() == MARKDOWN
    page.page.get_by_label("Copy message").first.click()
    assert page.clipboard() == MARKDOWN
    bot.locator(".copy_code_button").click()
    assert page.clipboard().strip() == "a: List<int> = [1]  # <b>"
    bot.click(click_count=1)
    page.page.keyboard.press("Control+a")
    page.page.keyboard.press("Control+c")
    assert "List<int> & <b>bold</b>" in page.clipboard()


def test_what_a_reply_took_stands_in_one_line_under_the_chat(page: Page) -> None:
    assert re.fullmatch(r"A reply of \d+ tokens takes about \d+ s here", page.note())
    page.ask("Hi there")
    assert re.fullmatch(r"\d+ tokens read, 2 written · [\d,]+ tokens/s · seed \d+", page.note())
    assert page.replies() == ["Hi there"]
    assert page.page.locator("#chat [data-testid=bot] :is(button, [tabindex])").count() == 0


def test_right_to_left_text_is_laid_out_as_such(page: Page) -> None:
    page.ask("שלום לכולם\n\nHello")
    edge = "part => Math.round(part.getBoundingClientRect().right)"
    hebrew, english = page.page.locator("#chat [data-testid=bot] p").all()
    direction = "part => getComputedStyle(part).unicodeBidi + getComputedStyle(part).textAlign"
    assert hebrew.evaluate(direction) == "plaintextstart"
    text = (
        "part => {const range = document.createRange(); range.selectNodeContents(part);"
        "return range.getBoundingClientRect().right}"
    )
    assert abs(hebrew.evaluate(text) - hebrew.evaluate(edge)) < 3 < english.evaluate(edge) - english.evaluate(text)


# The conversation


def test_retry_edit_undo_and_clear_change_the_last_turn_and_the_box_has_the_focus(page: Page) -> None:
    page.ask("First *a*")
    seed = page.note()
    page.page.get_by_role("button", name="Retry", exact=True).click()
    page.page.wait_for_function("before => document.querySelector('#note').innerText !== before", arg=seed)
    page.wait_until_written()
    assert page.words() == ["First *a*"]
    page.page.get_by_role("button", name="Edit", exact=True).click()
    edited = page.page.locator("#chat textarea")
    assert edited.input_value() == "First *a*"
    edited.fill("Second <b>*")
    page.page.get_by_role("button", name="Submit", exact=True).click()
    page.page.locator("#chat [data-testid=bot]", has_text="Second").wait_for()
    page.wait_until_written()
    assert page.words() == ["Second <b>*"]
    page.page.get_by_role("button", name="Undo", exact=True).click()
    page.page.wait_for_function("document.querySelector('#message textarea').value === 'Second <b>*'")
    page.page.wait_for_function("document.activeElement === document.querySelector('#message textarea')")
    assert page.words() == []
    page.box.press("Enter")
    page.wait_until_written()
    page.page.get_by_label("Clear").first.click()
    page.page.wait_for_function("document.activeElement === document.querySelector('#message textarea')")
    assert page.words() == []


def test_the_reply_to_an_edited_message_can_be_stopped(page: Page) -> None:
    page.set_longest(512)
    page.ask("short")
    page.page.get_by_role("button", name="Edit", exact=True).click()
    page.page.locator("#chat textarea").fill("on and on")
    page.page.get_by_role("button", name="Submit", exact=True).click()
    page.page.locator("#chat [data-testid=bot]", has_text="on and on").wait_for()
    page.stop.click()
    page.page.get_by_role("button", name="Send", exact=True).wait_for()
    assert page.written() < 400


def test_an_example_and_the_comparison_by_the_keyboard_alone(page: Page) -> None:
    page.page.get_by_label("Show the base model too").focus()
    page.page.keyboard.press("Space")
    page.page.locator("#chat .example").first.focus()
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("document.querySelector('#note').innerText.includes('base model')")
    page.wait_until_written()
    assert page.words() == page.replies() == ["What is a tokenizer?"]
    assert page.replies("#base") == ["What is a tokenizer?"]
    left, right = (page.page.locator(chat).bounding_box() for chat in ("#chat", "#base"))
    assert left["x"] + left["width"] < right["x"] and left["y"] == right["y"]


def test_a_conversation_survives_a_reload(page: Page) -> None:
    with page.saving():
        page.ask("Keep *me* <b>")
    page.open()
    page.page.locator("#chat [data-testid=bot]").wait_for()
    assert page.words() == ["Keep *me* <b>"]
    with page.saving():
        page.page.get_by_label("Clear").first.click()
    page.open()
    assert page.words() == []


def test_the_page_works_in_a_browser_without_storage(browser: Any, space: Served) -> None:
    denied = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied', 'SecurityError') }})"
    )
    page = Page(browser, space, before=denied)
    page.ask("Hi")
    assert page.words() == page.replies() == ["Hi"]
    page.context.close()


def test_a_link_opens_the_page_with_its_message_seed_and_settings(page: Page) -> None:
    page.set_longest(7)
    page.ask("Share & <b> me?")
    page.page.get_by_role("button", name="Copy a link").click()
    page.wait_for_toast("It opens this page with your settings and your first message.")
    link = page.clipboard()
    seed = re.search(r"seed (\d+)", page.note())
    assert seed and f"seed={seed[1]}" in link and "max_new_tokens=7" in link and "model=" in link
    page.open(link.removeprefix(page.url).removeprefix("/"))
    page.page.wait_for_function("document.querySelector('#message textarea').value === 'Share & <b> me?'")
    page.page.get_by_role("button", name="Settings").click()
    assert page.page.get_by_label("number input for Longest reply").input_value() == "7"
    assert page.page.get_by_label("Seed").input_value() == seed[1]
    page.open("?message=a&model=tester/other&temperature=x&top_k=1e9")
    page.wait_for_toast("The link was made with tester/other, whose reply may be another one.")


# The look


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 800}, PHONE], ids=["desktop", "phone"])
def test_everyone_can_read_and_use_every_state_in_light_and_dark(
    browser: Any, space: Served, viewport: dict[str, int]
) -> None:
    page = Page(browser, space, viewport=viewport)

    def check(state: str) -> None:
        assert violations(page.page, "light") == [], state
        assert violations(page.page, "dark", only="color-contrast") == [], state
        assert not page.is_wider_than_the_window(), state

    check("start")
    page.page.get_by_role("button", name="Settings").click()
    page.page.get_by_label("Seed").wait_for()
    assert page.page.get_by_text("Settings").count() == 1
    check("settings")
    page.set_longest(512)
    page.page.get_by_label("Show the base model too").check()
    page.send("on and on")
    page.stop.wait_for()
    check("writing")
    page.page.keyboard.press("Escape")
    page.wait_until_written()
    page.ask(MARKDOWN)
    check("written")
    page.page.get_by_text("About this model and its limits").click()
    page.page.get_by_role("tab", name="How it was trained").click()
    page.page.locator(".vega-embed svg.marks").first.wait_for()
    check("training")
    page.check()
    page.context.close()


def violations(page: Any, scheme: str, only: str | None = None) -> list[tuple[str, list[str]]]:
    """What axe-core finds in a color scheme: all of it, or what breaks one rule, for the others know no colors."""
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.wait_for_function(
        "dark => (getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"
        ".reduce((sum, part) => sum + Number(part), 0) < 380) === dark",
        arg=scheme == "dark",
    )
    page.wait_for_timeout(250)  # until colors have changed
    options: dict[str, Any] = {"resultTypes": ["violations"]} | ({"runOnly": [only]} if only else {})
    found = Axe().run(page, options=options).response["violations"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]


def test_a_phone_shows_the_box_and_folds_the_rest_away(browser: Any, space: Served) -> None:
    page = Page(browser, space, viewport=PHONE, has_touch=True, is_mobile=True)
    about = page.page.get_by_text("It was trained on", exact=False)
    assert not page.page.locator("#about details").get_attribute("open") and about.count() >= 0
    for height in (844, 420):
        page.page.set_viewport_size({"width": 390, "height": height})
        place = page.page.locator("#message").bounding_box()
        assert place["y"] >= 0 and place["y"] + place["height"] <= height
    page.page.set_viewport_size(PHONE)
    page.page.get_by_label("Show the base model too").check()
    page.ask("Hi")
    page.page.wait_for_function("document.querySelector('#note').innerText.includes('base model')")
    assert page.page.locator("#chat").is_visible() and not page.page.locator("#base").is_visible()
    page.page.get_by_label("The base model", exact=True).check()
    assert page.page.locator("#base").is_visible() and not page.page.locator("#chat").is_visible()
    page.check()
    page.context.close()
