"""`make notebooks`: execute the notebooks in place, each in a clean kernel, and judge them."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 1_500_000  # bytes
_WORDS = ("one", "two", "three", "four", "five")
_WIDGET = "application/vnd.jupyter.widget-view+json"
_FIGURE = "application/vnd.plotly.v1+json"


def stated_minutes(notebook: NotebookNode) -> int:
    """The time that a notebook's first cell promises on two CPU cores, in minutes."""
    found = re.search(r"\*\*Time\.\*\* Under (\w+) minutes?", notebook.cells[0].source)
    if found is None or found[1] not in _WORDS:
        raise ValueError("the first cell does not say: **Time.** Under one (to five) minutes")
    return _WORDS.index(found[1]) + 1


def execute(path: Path) -> NotebookNode:
    """Run a notebook from top to bottom.

    Raises:
        CellExecutionError: A cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
    )
    return client.execute(cwd=str(path.parent))


def keep_stills(notebook: NotebookNode) -> None:
    """Of a widget's output keep what it shows without a kernel, which viewers pass over else."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if data.keys() - {_WIDGET, "text/plain"}:
                data.pop(_WIDGET, None)


def complaints(notebook: NotebookNode) -> list[str]:
    """What is wrong with an executed notebook: warnings, other noise, no figure."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    noise = [output.text for output in outputs if output.get("name") == "stderr"]
    if not any(_FIGURE in output.get("data", {}) for output in outputs):
        noise.append("it shows no figure")
    return noise


def main(names: list[str]) -> int:
    """Execute the notebooks whose names begin so, or all; returns how many went wrong."""
    # A picture beside each figure is what shows where no script runs.
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype+png")
    failed = 0
    for path in NOTEBOOKS:
        if names and not path.name.startswith(tuple(names)):
            continue
        start = time.perf_counter()
        notebook = execute(path)
        minutes, most = (time.perf_counter() - start) / 60, stated_minutes(notebook)
        wrong = complaints(notebook)
        if minutes > most:
            wrong.append(f"it promises to run in under {most} minutes")
        keep_stills(notebook)
        nbformat.write(notebook, path)
        if path.stat().st_size > LARGEST:
            wrong.append(f"it has more than {LARGEST:,} bytes")
        print(
            f"{path.name}: {minutes:.1f} minutes, {path.stat().st_size:,} bytes", *wrong, sep="\n  "
        )
        failed += bool(wrong)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
