"""Figures as files: whole without a network, as large as asked, refused with a way out."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import plotly.graph_objects as go
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from workbench import FigureError, plots

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
RECORDS = [
    {"step": n, "total": 1.0, "edit": 2.0 / n, "edit_before": 3.0, "locality": 0.1, "success": 0.5}
    for n in range(1, 30)
]


def data(file: Path) -> list[dict]:
    """The traces that a page holds."""
    found = re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{"template', file.read_text())
    assert found
    return json.loads(found[1])


def test_a_page_holds_the_figure_and_the_library(tmp_path: Path):
    figure = plots.training_curves(RECORDS)
    file = plots.save(figure, tmp_path / "curves.html")
    assert file == tmp_path / "curves.html"
    assert data(file) == json.loads(str(figure.to_json()))["data"]
    assert not re.search(r"<script[^>]+src=|<link", file.read_text())


@pytest.mark.parametrize("name", ["curves.doc", "curves", "html"])
def test_another_ending_is_refused(name: str, tmp_path: Path):
    with pytest.raises(FigureError, match=rf"{name!r}.*\.html, \.png"):
        plots.save(go.Figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_without_kaleido_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(FigureError, match=r"pip install kaleido.*write \.html"):
        plots.save(go.Figure(), tmp_path / "curves.png")


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: `make browser` does it")
def test_a_picture_has_the_figures_size_times_the_scale(tmp_path: Path):
    pytest.importorskip("kaleido", reason="install the extra 'png' to run this")
    figure = plots.training_curves(RECORDS)
    picture = plots.save(figure, tmp_path / "curves.png", scale=2).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1800, 2 * figure.layout.height)
    assert plots.save(figure, tmp_path / "curves.svg").read_text().startswith("<svg")


LEGEND_ABOVE = """width => {
    const box = name => document.querySelector(name).getBoundingClientRect();
    return box('.gridlayer').right > width - 60 && box('.legend').bottom <= box('.gridlayer').top;
}"""


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: `make browser` does it")
def test_a_page_draws_without_a_network_and_follows_its_width(tmp_path: Path):
    file = plots.save(plots.training_curves(RECORDS), tmp_path / "curves.html")
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page: Page = browser.new_context(offline=True).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
        for width in (390, 1400, 700):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(LEGEND_ABOVE, arg=width)
        browser.close()
    assert asked == [file.as_uri()]
