"""The notebooks are committed executed, and the quick ones run again without a complaint."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from notebook_runs import LARGEST, NOTEBOOKS, complaints, execute, stated_minutes

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_notebook_is_committed_executed_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    figures = [
        output.data
        for cell in code
        for output in cell.outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert figures
    assert all("image/png" in figure for figure in figures)  # for sites that run no script
    assert not complaints(notebook)
    assert path.stat().st_size < LARGEST


@pytest.mark.notebook
@each
def test_notebook_runs(path: Path) -> None:
    if stated_minutes(nbformat.read(path, as_version=4)) > 2:
        pytest.skip("takes minutes: `make notebooks` runs it")
    assert not complaints(execute(path))
