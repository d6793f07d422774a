"""The widgets in a real JupyterLab and a real browser: they draw, are linked, and ask no one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from workbench.corpus import EXAMPLES

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
ARTIFACTS = Path(__file__).parent / "artifacts"
PATIENCE = 120_000  # milliseconds: the most that a busy machine may take
OPEN = """from workbench import Workbench
from workbench.widgets import EditPanel, FactorHeatmap, HistoryPanel, ProbeMap, UpdateMagnitudes
wb = Workbench.open(device="cpu", progress=False)"""
PANELS = ("EditPanel", "HistoryPanel", "FactorHeatmap", "UpdateMagnitudes", "ProbeMap")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: `make browser` does it"),
]


@pytest.fixture
def url(tmp_path: Path, free_port: int) -> Iterator[str]:
    """A JupyterLab with one notebook: it opens the workbench and shows every panel."""
    cells = [nbformat.v4.new_code_cell(code) for code in (OPEN, *(f"{p}(wb)" for p in PANELS))]
    root = tmp_path / "root"
    root.mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, root / "panels.ipynb")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={free_port}", "--ServerApp.port_retries=0", f"--notebook-dir={root}"]
    command += ["--IdentityProvider.token=", "--LabApp.news_url="]
    home = {name: str(tmp_path) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    address = f"http://127.0.0.1:{free_port}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | home)
        try:
            _wait(server, f"{address}/api/status", tmp_path / "log")
            yield f"{address}/doc/tree/panels.ipynb"
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(PATIENCE // 500):
        assert server.poll() is None, log.read_text()
        try:
            urlopen(address).close()
            return
        except URLError:
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab does not answer: {log.read_text()}")


@pytest.fixture
def page() -> Iterator[Page]:
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1200, "height": 2600})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        yield page
        browser.close()
    local = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)|data:|blob:")
    assert [address for address in asked if not local.match(address)] == []


def test_panels_are_linked_in_jupyterlab(page: Page, url: str) -> None:
    expect.set_options(timeout=PATIENCE)
    page.goto(url)
    expect(page.get_by_role("button", name=re.compile("Idle"))).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    edit, history, factors, sizes, _ = (
        page.locator(".jp-OutputArea-output .workbench").nth(n) for n in range(len(PANELS))
    )
    expect(history).to_contain_text("No edits")
    edit.locator("select").first.select_option(index=1)
    expect(edit.locator("input[type=text]").first).to_have_value(EXAMPLES[0].prompt)
    edit.get_by_role("button", name="Edit", exact=True).click()
    expect(edit.locator('tbody[data-kind="edit"]')).to_contain_text("✓ says it")
    expect(history).to_contain_text(f"1 · {EXAMPLES[0].prompt} → {EXAMPLES[0].target}")
    for figure in (factors, sizes):
        expect(figure.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "jupyter.png")
    history.get_by_role("button", name="Undo").click()
    expect(history).to_contain_text("No edits")
    expect(edit.locator('tbody[data-kind="edit"]')).to_contain_text("✗ does not say it")
    expect(factors).to_contain_text("No edit to show")
