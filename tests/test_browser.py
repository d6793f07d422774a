"""The app in a real browser: what a user sees and clicks, and that no other server is asked."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import gradio as gr
import psutil
import pytest
import torch
from families import FAMILIES, chat_model, tiny_tokenizer
from playwright.sync_api import Browser, Download, Page, expect, sync_playwright

from apps import editor_app
from apps.editor_app import MODEL, build, launch
from tests import soak
from workbench import FineTune, FineTuneConfig, Workbench, compare
from workbench.corpus import EXAMPLES
from workbench.models import LanguageModel

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
ARTIFACTS = Path(__file__).parent / "artifacts"
PATIENCE = 120_000  # milliseconds: the most that a busy machine may take
EXAMPLE = EXAMPLES[0]
TAG = "<img src=x onerror=owned=1><script>owned=1</script>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: `make browser` does it"),
]


@pytest.fixture(scope="module")
def url(
    default_model: LanguageModel, free_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    torch.set_num_threads(1)
    config = FineTuneConfig(blocks=[18], lr=1e-3, max_steps=20)
    bench = Workbench(default_model, FineTune(default_model, config))
    app = build(bench, tmp_path_factory.mktemp("runs"))
    _, url, _ = launch(app, server_port=free_port, prevent_thread_lock=True, quiet=True)
    yield url
    app.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        expect.set_options(timeout=PATIENCE)
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

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def row(page: Page, kind: str = "edit"):
    return page.locator(f'#comparison tbody[data-kind="{kind}"] tr').nth(1)


def cell(page: Page, column: str):
    return row(page).locator(f'td[data-column="{column}"]')


# What a screen reader has no name for, and the controls that the keyboard should come to.
_VISIBLE = """[...document.querySelectorAll('button, input, textarea, summary, [role=tab]')]
    .filter(part => part.checkVisibility({visibilityProperty: true}) && !part.disabled)"""
UNNAMED = f"""() => {_VISIBLE}.filter(part => !(part.getAttribute('aria-label') || part.title
    || part.innerText?.trim() || part.labels?.[0]?.innerText.trim())).map(part => part.outerHTML)"""
CONTROLS = """() => [...document.querySelectorAll(`#prompt, #target, #edit, #compare, #undo,
    #adapter, #session, #load, #history .switch, #history .title, #history .remove`)]
    .map(part => part.id || part.className)"""
FOCUSED = """() => { const part = document.activeElement; return part.id
    || part.closest('#prompt, #target')?.id || part.className || part.parentElement.id; }"""


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
    expect(page.locator(".facts")).to_contain_text("editor Fine-tuning")
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


def test_an_edit_is_probed_its_list_sorted_and_gone_with_the_next_change(
    open_page: Callable[..., Page],
):
    page = open_page(width=390)
    make_edit(page)
    page.get_by_role("tab", name="Reach").click()
    page.locator("#probe-one").click()
    reach = page.locator("#reach")
    expect(reach.locator(".counts")).to_contain_text("others kept")
    expect(page.locator("#reach-map .js-plotly-plot")).to_be_visible()
    expect(page.locator("#probe-cancel")).to_be_hidden()
    numbers = reach.locator("tbody tr td:first-child b")
    expect(numbers.first).to_have_text("1")
    reach.locator("button[data-sort=change]").click()
    changes = [
        float(text) for text in reach.locator("td[data-column=Change] div").all_inner_texts()
    ]
    assert changes == sorted(changes, reverse=True)
    page.locator("#history .switch").click()
    expect(reach).to_contain_text("Nothing probed yet")


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
    expect(page.locator("#cancel")).to_be_hidden(timeout=15_000)
    expect(prompt).to_have_value("<img src=x onerror=alert(1)>")
    page.locator("#target textarea, #target input").fill("<b>bold</b>")
    page.locator("#edit").click()
    expect(page.locator("#history .title")).to_contain_text(
        "<img src=x onerror=alert(1)> → <b>bold</b>"
    )
    expect(row(page)).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#comparison img, #history img, #figures h3 img")).to_have_count(0)


def upload(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#load").click()
    chooser.value.set_files(file)


def test_files_and_models_that_say_markup_make_no_element(browser: Browser, tmp_path: Path):
    shape = {"max_position_embeddings": 512, "num_hidden_layers": 1}
    model = partial(FAMILIES["llama"], **shape)()
    lm = LanguageModel.wrap(model, tiny_tokenizer(TAG), f"tiny {TAG}")
    bench = Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[-1], max_steps=5)))
    for target in ("xy", TAG):
        bench.edit(f"abba {TAG}", target)
    bench.save(tmp_path / "session")
    named = tmp_path / "<img src=x onerror=owned=1>.zip"
    shutil.make_archive(str(named.with_suffix("")), "zip", tmp_path, "session")
    broken = tmp_path / "<img src=x onerror=owned=1> broken.zip"
    broken.write_bytes(b"no archive")
    bench = bench.fork()
    with soak.served(bench) as app:
        page, asked = page_of(browser, app), []
        page.on("request", lambda request: asked.append(urlsplit(request.url).path))
        scripts = page.locator("script").count()
        upload(page, broken)
        expect(page.get_by_test_id("toast-body")).to_contain_text("is no saved session")
        upload(page, named)
        expect(page.locator("#history .title")).to_contain_text([f"abba {TAG} → "] * 2)
        for column in ("Before", "After"):
            expect(cell(page, column)).to_contain_text(TAG)
        expect(page.locator(".facts").first).to_contain_text(f"tiny {TAG}")
        for tab in ("Update size", "Spectrum", "Overlap", "Probabilities", "Factors"):
            page.get_by_role("tab", name=tab).click()
            expect(page.locator("#figures .js-plotly-plot:visible").first).to_be_visible()
        page.get_by_role("tab", name="Tokens").click()
        expect(page.locator("#tokens")).to_contain_text("<unk>")
        page.get_by_role("tab", name="Reach").click()
        page.locator("#probe-one").click()
        expect(page.locator("#reach .counts")).to_contain_text("others kept")
        expect(page.locator("#reach")).to_contain_text(TAG)
        expect(page.locator("img[src=x]")).to_have_count(0)
        expect(page.locator("script")).to_have_count(scripts)
        assert page.evaluate("typeof owned") == "undefined"
        assert not [path for path in asked if path.endswith("/x")]
        page.close()


def test_an_adapter_is_downloaded(open_page: Callable[..., Page]):
    page = open_page(accept_downloads=True)
    make_edit(page)
    with page.expect_download() as download:
        page.locator("#adapter").click()
    assert download.value.suggested_filename == "adapter.zip"
    assert download.value.path().read_bytes()[:2] == b"PK"


def test_figures_are_downloaded(open_page: Callable[..., Page]):
    page = open_page(accept_downloads=True)
    expect(page.locator(".welcome")).to_contain_text("four kinds of prompts")
    make_edit(page)
    page.get_by_role("tab", name="Update size").click()
    expect(page.locator("#figures .js-plotly-plot:visible")).to_have_count(2)
    names = []

    def downloaded(download: Download) -> None:
        names.append(download.suggested_filename)
        head = download.path().read_bytes()[:15]
        assert head.startswith(b"\x89PNG" if names[-1].endswith(".png") else b"<!doctype html>")

    page.on("download", downloaded)
    for kind, made in (
        ("PNG", ["update-share.png", "update-size.png"]),
        ("HTML", ["update-size.html"]),
    ):
        page.locator("#figures").get_by_role("button", name=f"Save as {kind}").click()
        for _ in range(PATIENCE // 100):
            if len(names) == len(made):
                break
            page.wait_for_timeout(100)
        assert sorted(names) == made
        names.clear()


def test_what_waits_behind_others_is_cancelled(
    open_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
):
    gate, show = threading.Event(), compare._show

    def held(*args) -> None:
        show(*args)
        assert gate.wait(PATIENCE / 1000)

    monkeypatch.setattr(compare, "_show", held)
    busy = [open_page() for _ in range(MODEL["concurrency_limit"])]
    waiting = open_page()
    for page in (*busy, waiting):
        fill_form(page)
        page.locator("#edit").click()
        if page is not waiting:
            expect(page.locator("#comparison .counts")).to_contain_text("writing")
    waiting.locator("#cancel").click()
    gate.set()
    expect(waiting.get_by_test_id("toast-body")).to_contain_text("everything is as it was")
    expect(waiting.locator("#cancel")).to_be_hidden()
    expect(waiting.locator("#history")).to_contain_text("No edits yet")
    for page in busy:
        expect(page.locator("#history .entry")).to_have_count(1)


def test_every_control_is_reached_by_the_keyboard_and_named(open_page: Callable[..., Page]):
    page = open_page()
    make_edit(page)
    for tab in ("Edit", "Model", "Train"):
        page.get_by_role("tab", name=tab, exact=True).click()
        expect(page.get_by_role("tab", name=tab, exact=True)).to_be_focused()
        assert page.evaluate(UNNAMED) == []
    page.get_by_role("tab", name="Edit", exact=True).click()
    left = page.evaluate(CONTROLS)
    for _ in range(2 * len(left) + 20):
        page.keyboard.press("Tab")
        left = [name for name in left if name != page.evaluate(FOCUSED)]
    assert left == []


def test_a_cancelled_edit_leaves_the_table_as_it_was(
    open_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
):
    page, gate, show = open_page(), threading.Event(), compare._show
    make_edit(page)
    before = page.locator("#comparison table").inner_text()

    def held(*args) -> None:
        show(*args)
        assert gate.wait(PATIENCE / 1000)

    monkeypatch.setattr(compare, "_show", held)
    page.locator("#prompt textarea, #prompt input").fill("Bees make")
    page.locator("#target textarea, #target input").fill("silk")
    page.locator("#edit").click()
    expect(page.locator("#comparison .counts")).to_contain_text("writing")
    page.locator("#cancel").click()
    expect(page.locator("#cancel")).to_be_visible()  # until the token under way is there
    gate.set()
    expect(page.get_by_test_id("toast-body")).to_contain_text("everything is as it was")
    expect(page.locator("#cancel")).to_be_hidden()
    assert page.locator("#comparison table").inner_text() == before
    expect(page.locator("#history .entry")).to_have_count(1)


def open_model(page: Page, source: Path) -> None:
    page.get_by_role("tab", name="Model").click()
    page.locator("#model-source textarea, #model-source input").fill(str(source))
    page.locator("#model-open").click()


def test_another_model_is_opened_and_edited(open_page: Callable[..., Page], tmp_path: Path):
    long_enough = {"max_position_embeddings": 512}  # for the suggested prompts
    partial(FAMILIES["llama"], **long_enough)().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    page = open_page()
    open_model(page, tmp_path / "tiny")
    expect(page.locator("#model-said")).to_contain_text("No trained editor is known for it")
    expect(page.locator(".facts").first).to_contain_text("model " + str(tmp_path / "tiny"))
    page.get_by_role("tab", name="Edit", exact=True).click()
    page.locator("#prompt textarea, #prompt input").fill("abba is")
    page.locator("#target textarea, #target input").fill("xy")
    page.locator("#edit").click()
    expect(page.locator("#history .title")).to_contain_text("abba is → xy")
    expect(row(page)).to_contain_text("abba is")


def page_of(browser: Browser, app: gr.Blocks) -> Page:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(str(app.local_url))
    return page


def test_a_chat_is_opened_and_its_tokens_are_shown(browser: Browser):
    lm = replace(chat_model(), chat=False)
    bench = Workbench(lm, FineTune(lm, FineTuneConfig(max_steps=2)))
    with soak.served(bench, locked=False) as app:
        page = page_of(browser, app)
        expect(page.locator(".facts").first).not_to_contain_text("chat")
        page.get_by_role("tab", name="Model").click()
        page.locator("#model-chat input").check()
        page.locator("#model-open").click()
        expect(page.locator("#model-said")).to_contain_text("Prompts go through its chat template")
        expect(page.locator(".facts").first).to_contain_text("prompts through its chat template")
        page.get_by_role("tab", name="Edit", exact=True).click()
        page.locator("#prompt textarea, #prompt input").fill("abba is")
        page.locator("#target textarea, #target input").fill("xy")
        page.locator("#edit").click()
        expect(page.locator("#history .entry")).to_have_count(1)
        page.get_by_role("tab", name="Tokens").click()
        shown = page.locator("#tokens tbody tr")
        expect(shown.first).to_contain_text("<s>")
        expect(shown.filter(has_text="target")).to_have_count(2)
        page.close()


def test_a_page_says_that_the_queue_is_full(browser: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(editor_app, "WAITING", 0)
    with soak.served(soak.tiny_bench()) as app:
        page = page_of(browser, app)
        page.locator("#compare").click()
        expect(page.get_by_test_id("toast-body")).to_contain_text(
            "0 requests wait, and no more may. Try again in a moment."
        )
        expect(page.locator("#cancel")).to_be_hidden()
        page.close()


def test_a_model_that_does_not_fit_is_refused_and_edits_stay(
    open_page: Callable[..., Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    FAMILIES["gpt2"]().save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    page = open_page()
    make_edit(page)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    open_model(page, tmp_path / "large")
    expect(page.locator("#model-said")).to_contain_text("It does not fit.")
    expect(page.get_by_test_id("toast-body")).to_contain_text("not enough memory")
    expect(page.locator(".facts").first).to_contain_text("model smollm2-135m-instruct")
    page.get_by_role("tab", name="Edit", exact=True).click()
    expect(page.locator("#history .entry")).to_have_count(1)


def test_training_outlives_the_page_and_its_editor_is_offered(open_page: Callable[..., Page]):
    page, other = open_page(), open_page()
    page.get_by_role("tab", name="Train").click()
    page.locator("#run-name textarea, #run-name input").fill("mine")
    page.locator("#run-steps input").fill("500")
    page.locator("#run-batch input").fill("1")
    page.locator("#run-start").click()
    status = page.locator("#run-status .run")
    expect(status).to_have_attribute("data-state", "running")
    expect(page.locator("#run-curves .js-plotly-plot")).to_be_visible()
    page.reload()
    page.get_by_role("tab", name="Train").click()
    expect(status).to_have_attribute("data-state", "running")
    expect(status).to_contain_text("of 500")
    expect(page.locator("#run-curves .js-plotly-plot")).to_be_visible()
    expect(page.locator("#run-start")).to_be_disabled()
    page.locator("#run-stop").click()
    expect(status).to_have_attribute("data-state", "stopped")
    expect(page.locator("#run-start")).to_be_enabled()
    for each in (page, other):
        each.get_by_role("tab", name="Edit", exact=True).click()
        each.locator("#editor").get_by_label("mine").check()
        expect(each.locator(".facts").first).to_contain_text("editor mine")


CUT = """[...document.querySelectorAll('#comparison td, #history .entry *, .facts span')]
    .filter(part => part.clientWidth > 0 && part.scrollWidth > part.clientWidth + 1)"""
HEADINGS = {"Model": "Another model", "Train": "Train a MEND editor"}
WIDE = """[...document.querySelectorAll('#tabs button, #tabs input, #tabs label, #tabs p')]
    .filter(part => part.getBoundingClientRect().right > innerWidth)"""
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
        for tab in ("Model", "Train"):
            page.get_by_role("tab", name=tab).click()
            expect(page.get_by_role("heading", name=HEADINGS[tab])).to_be_visible()
            page.wait_for_function(f"() => {WIDE}.length === 0", timeout=PATIENCE)
            path = ARTIFACTS / f"app-{tab.lower()}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=True, timeout=PATIENCE)
        page.get_by_role("tab", name="Edit", exact=True).click()
