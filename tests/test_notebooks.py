"""The notebooks are committed executed, and the quick ones run again without a complaint."""

from __future__ import annotations

import ast
from importlib import import_module
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


@each
def test_what_a_notebook_imports_of_the_library_is_there(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        plain = "".join(line for line in cell.source.splitlines(True) if line[:1] not in "%!")
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("workbench"):
                module = import_module(str(node.module))
                assert not [name.name for name in node.names if not hasattr(module, name.name)]


@pytest.mark.notebook
@each
def test_notebook_runs(path: Path) -> None:
    if stated_minutes(nbformat.read(path, as_version=4)) > 2:
        pytest.skip("takes minutes: `make notebooks` runs it")
    assert not complaints(execute(path))
