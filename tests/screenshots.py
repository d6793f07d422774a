"""`make screenshots`: pictures of the app for the README, with the default model and editor."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from apps.editor_app import build, launch
from workbench import Workbench

FOLDER = Path(__file__).parents[1] / "assets" / "screenshots"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
PATIENCE = 120_000  # milliseconds
TABS = {"Factors": "factors"}  # of the figures, and the pictures' names


def main() -> None:
    """Make one edit and take the pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is not installed: `make browser` does it.")
    expect.set_options(timeout=PATIENCE)
    app = build(Workbench.open(device="cpu", progress=False))
    _, url, _ = launch(app, prevent_thread_lock=True, quiet=True)
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(url)
        page.locator("#examples button").first.click()
        expect(page.locator("#target textarea, #target input")).not_to_have_value("")
        page.locator("#edit").click()
        expect(page.locator("#history .entry")).to_have_count(1)
        _draw(page)
        top = page.locator("#figures").bounding_box()
        assert top is not None
        page.screenshot(
            path=FOLDER / "app.png",
            clip={"x": 0, "y": 0, "width": 1400, "height": top["y"]},
            full_page=True,
        )
        for tab, name in TABS.items():
            page.get_by_role("tab", name=tab).click()
            _draw(page)
            page.locator("#figures").screenshot(path=FOLDER / f"{name}.png")
        page.get_by_role("tab", name="Reach").click()
        page.locator("#probe-one").click()
        expect(page.locator("#reach tbody tr").first).to_be_visible()
        _draw(page)
        page.locator("#figures").screenshot(path=FOLDER / "reach.png")
        browser.close()
    app.close()
    print(f"pictures in {FOLDER}")


def _draw(page: Page) -> None:
    """Wait until the figures are drawn and have come to rest."""
    expect(page.locator("#figures .js-plotly-plot .main-svg:visible").first).to_be_visible()
    page.mouse.move(0, 0)  # off the figure, whose buttons it would show
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    main()
