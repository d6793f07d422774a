"""The app in a real browser: what a user sees and clicks, and that no other server is asked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from apps.editor_app import build, launch
from workbench import FineTune, FineTuneConfig, Workbench
from workbench.corpus import EXAMPLES

if TYPE_CHECKING:
    from workbench.models import LanguageModel

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
ARTIFACTS = Path(__file__).parent / "artifacts"
PATIENCE = 120_000  # milliseconds: the most that a busy machine may take
EXAMPLE = EXAMPLES[0]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: `make browser` does it"),
]


@pytest.fixture(scope="module")
def url(default_model: LanguageModel, free_port: int) -> Iterator[str]:
    torch.set_num_threads(1)
    config = FineTuneConfig(blocks=[18], lr=1e-3, max_steps=20)
    app = build(Workbench(default_model, FineTune(default_model, config)))
    _, url, _ = launch(app, server_port=free_port, prevent_thread_lock=True, quiet=True)
    yield url
    app.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """Opens pages, each of a new user; none may ask another host or report an error."""
    wrong: list[str] = []
    contexts = []

    def asked(address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("data", "blob") and parts.hostname not in (
            "127.0.0.1",
            "localhost",
        ):
            wrong.append(f"request to {address}")

    def opened(width: int = 1400, height: int = 900, **options) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: asked(request.url))
        page.on("pageerror", lambda error: wrong.append(f"error {error}"))
        page.on(
            "console",
            lambda said: wrong.append(f"console {said.text}") if said.type == "error" else None,
        )
        page.goto(url)
        expect(page.locator("#edit")).to_be_visible()
        return page

    expect.set_options(timeout=PATIENCE)
    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def row(page: Page, kind: str = "edit"):
    return page.locator(f'#comparison tbody[data-kind="{kind}"] tr').nth(1)


def cell(page: Page, column: str):
    return row(page).locator(f'td[data-column="{column}"]')


def fill_form(page: Page) -> None:
    """Click the first example and wait until it stands in the form."""
    page.locator("#examples button").first.click()
    expect(page.locator("#prompt textarea, #prompt input")).to_have_value(EXAMPLE.prompt)


def make_edit(page: Page) -> None:
    """Click the first example, then Edit."""
    fill_form(page)
    page.locator("#edit").click()
    expect(page.locator("#history .entry")).to_have_count(1)


def test_an_example_is_edited_switched_and_undone(open_page: Callable[..., Page]):
    page = open_page()
    expect(page.locator(".facts")).to_contain_text("editor ft")
    make_edit(page)
    expect(cell(page, "After")).to_have_text(re.compile(rf"\s*{EXAMPLE.target}"))
    expect(cell(page, "After").locator("mark").first).to_be_visible()
    expect(row(page)).to_contain_text("✓ says it")
    before = cell(page, "Before").inner_text()
    assert EXAMPLE.target not in before
    for kind in ("equivalent", "neighbor", "unrelated"):
        expect(row(page, kind)).to_be_visible()
    for figure in ("Factors", "Update size", "Spectrum", "Overlap", "Probabilities"):
        page.get_by_role("tab", name=figure).click()
        expect(page.locator("#figures .js-plotly-plot:visible").first).to_be_visible()

    switch = page.locator("#history .switch")
    switch.click()
    expect(switch).to_have_text("off")
    expect(cell(page, "After")).to_have_text(before)
    undo = page.locator("#undo")
    undo.click()
    expect(switch).to_have_text("on")
    expect(row(page)).to_contain_text("✓ says it")
    undo.click()
    expect(page.locator("#history .entry")).to_have_count(0)
    expect(cell(page, "After")).to_have_text(before)
    expect(undo).to_be_disabled()


def test_strength_and_removal_from_the_keyboard(open_page: Callable[..., Page]):
    page = open_page()
    make_edit(page)
    slider = page.locator("#history input[type=range]")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#history output")).to_have_text("0.00")
    expect(row(page)).to_contain_text("✗ does not say it")
    page.locator("#history .remove").press("Enter")
    expect(page.locator("#history")).to_contain_text("No edits yet")


def test_a_second_user_sees_no_edits(open_page: Callable[..., Page]):
    first = open_page()
    make_edit(first)
    second = open_page()
    expect(second.locator("#history")).to_contain_text("No edits yet")
    fill_form(second)
    second.locator("#compare").click()
    expect(row(second)).to_contain_text("✗ does not say it")
    expect(first.locator("#history .entry")).to_have_count(1)


def test_bad_input_is_answered_and_kept(open_page: Callable[..., Page]):
    page = open_page()
    prompt = page.locator("#prompt textarea, #prompt input")
    prompt.fill("<img src=x onerror=alert(1)>")
    page.locator("#edit").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("target is empty")
    expect(prompt).to_have_value("<img src=x onerror=alert(1)>")
    page.locator("#target textarea, #target input").fill("<b>bold</b>")
    page.locator("#edit").click()
    expect(page.locator("#history .title")).to_contain_text(
        "<img src=x onerror=alert(1)> → <b>bold</b>"
    )
    expect(row(page)).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#comparison img, #history img, #figures h3 img")).to_have_count(0)


def test_an_adapter_is_downloaded(open_page: Callable[..., Page]):
    page = open_page(accept_downloads=True)
    make_edit(page)
    with page.expect_download() as download:
        page.locator("#adapter").click()
    assert download.value.suggested_filename == "adapter.zip"
    assert download.value.path().read_bytes()[:2] == b"PK"


CUT = """[...document.querySelectorAll('#comparison td, #history .entry *, .facts span')]
    .filter(part => part.clientWidth > 0 && part.scrollWidth > part.clientWidth + 1)"""
DRAWN = """() => {
    const drawn = [...document.querySelectorAll('#figures .js-plotly-plot .main-svg')];
    return drawn.length && drawn.every(svg => svg.getBoundingClientRect().right <= innerWidth);
}"""
_SCREENS: tuple[tuple[int, Literal["light", "dark"]], ...] = (
    (1400, "light"),
    (1400, "dark"),
    (400, "dark"),
    (400, "light"),
)


def test_nothing_is_cut_off_on_a_phone_or_in_the_dark(open_page: Callable[..., Page]):
    page = open_page()
    make_edit(page)
    ARTIFACTS.mkdir(exist_ok=True)
    for width, scheme in _SCREENS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("body.dark")).to_have_count(int(scheme == "dark"))
        # Figures follow the width in their own time.
        page.wait_for_function(
            "width => document.documentElement.scrollWidth <= width", arg=width, timeout=PATIENCE
        )
        page.wait_for_function(f"() => ({CUT}).length === 0", timeout=PATIENCE)
        page.wait_for_function(DRAWN, timeout=PATIENCE)
        path = ARTIFACTS / f"app-{width}-{scheme}.png"
        page.screenshot(path=path, full_page=True, timeout=PATIENCE)
