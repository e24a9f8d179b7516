"""A visitor's page of the Space in Chromium, which cannot reach anything but this machine."""

import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.space import CHROMIUM, OFFLINE, Served

_ADDRESSES = itertools.count(1)


def new_address() -> dict[str, str]:
    """Return the header of a visitor who has not been here."""
    return {"X-Forwarded-For": f"9.1.0.{next(_ADDRESSES)}"}


@contextmanager
def chromium() -> Iterator[Any]:
    """Open a browser, or skip the test where there is none."""
    if shutil.which("chromium") is None:
        pytest.skip("there is no Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=[*CHROMIUM, OFFLINE])
        yield browser
        browser.close()


class Page:
    """A visitor's page; `check` says whether it worked without errors and requests to elsewhere."""

    def __init__(self, browser: Any, space: Served, query: str = "", before: str = "", **options: Any) -> None:
        self.url, self.requests, self.errors = space.url, list[str](), list[str]()
        self.context = browser.new_context(extra_http_headers=new_address(), **options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        if before:
            self.context.add_init_script(before)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open(query)

    def open(self, query: str = "") -> None:
        self.page.goto(self.url + query)
        self.page.locator("body[data-open]").wait_for()

    def check(self) -> None:
        assert self.errors == []
        assert not [url for url in self.requests if not re.match(rf"{self.url}|data:|blob:", url)]

    @property
    def box(self) -> Any:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def stop(self) -> Any:
        return self.page.get_by_role("button", name="Stop", exact=True)

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text: str) -> None:
        """Send a message, and wait until its reply is written."""
        replies = self.page.locator("#chat [data-testid=bot]")
        number = replies.count()
        self.send(text)
        replies.nth(number).wait_for()
        self.wait_until_written()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Wait at the end until the browser keeps another conversation than before."""
        kept = self.page.evaluate("JSON.stringify(localStorage)")
        yield
        self.page.wait_for_function("kept => JSON.stringify(localStorage) !== kept", arg=kept)

    def wait_until_written(self) -> None:
        self.page.locator("#chat .bot.message:not(.pending)").first.wait_for()
        self.page.get_by_role("button", name="Send", exact=True).wait_for()

    def set_longest(self, tokens: int) -> None:
        settings = self.page.get_by_role("button", name="Settings")
        number = self.page.get_by_label("number input for Longest reply")
        if not number.is_visible():
            settings.click()
        number.fill(str(tokens))
        number.press("Tab")
        settings.click()

    def words(self) -> list[str]:
        """What the page shows of the visitor's messages."""
        shown = self.page.locator("#chat [data-testid=user]").all_inner_texts()
        return [text.replace("\u2060\u200b", "") for text in shown]

    def replies(self, chat: str = "#chat") -> list[str]:
        return self.page.locator(f"{chat} [data-testid=bot]").all_inner_texts()

    def note(self) -> str:
        return str(self.page.locator("#note").inner_text())

    def written(self) -> int:
        """How many tokens the last reply has, by the line under the chat."""
        found = re.search(r"(\d+) written", self.note())
        return int(found[1]) if found else 0

    def wait_until_still(self) -> int:
        """Wait until nothing more is written, also of what was on its way, and return how many tokens there are."""
        before = -1
        while before != (before := self.written()):
            self.page.wait_for_timeout(300)
        return before

    def wait_for_toast(self, text: str) -> str:
        toast = self.page.locator(".toast-body", has_text=text).first
        toast.wait_for()
        said = str(toast.inner_text())
        toast.get_by_test_id("toast-close").click()
        return said

    def clipboard(self) -> str:
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def is_wider_than_the_window(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))
