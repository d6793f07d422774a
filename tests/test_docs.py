"""The documentation: it builds without a warning, and says what the package is."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

import workbench
from docs import hooks
from workbench import Workbench, errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ERRORS = [error for _, error in inspect.getmembers(errors, inspect.isclass)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr
    return folder


def page(site: Path, name: str) -> BeautifulSoup:
    found = (site / name / "index.html").read_text(encoding="utf-8")
    return BeautifulSoup(found, "html.parser")


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path):
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    public = [getattr(workbench, name) for name in workbench.__all__]
    assert {f"{item.__module__}.{item.__qualname__}" for item in public} <= listed


@pytest.mark.slow
def test_every_error_says_what_it_means_who_raises_it_and_what_to_do(site: Path):
    shown = page(site, "errors")
    assert {f"workbench.errors.{error.__name__}" for error in ERRORS} <= {
        str(heading["id"]) for heading in shown.find_all("h2")
    }
    assert len(shown.find_all("table")) >= len(ERRORS) - 1  # but for what only calls off
    listed = shown.select("details a")
    links = {str(link["href"]).strip("/"): link.get_text() for link in listed}
    assert "There is no edit …. Edits at hand: …." in links.values()
    assert len(links) == len(hooks.messages()) > 200
    for name, text in links.items():
        told = page(site, f"errors/{name}").select_one("article")
        assert told is not None
        assert told.find("h1").get_text().startswith(text)  # type: ignore[union-attr]
        assert "What to do: " in told.get_text()


@pytest.mark.slow
def test_notebooks_have_pages_with_figures_and_formulas(site: Path):
    formulas = 0
    for path in NOTEBOOKS:
        shown = page(site, f"notebooks/{path.stem}")
        assert shown.find("img", src=re.compile("^data:image/png")), path.name
        formulas += len(shown.find_all("math"))
        for cell in shown.select(".jp-MarkdownOutput"):
            for code in cell.find_all(("code", "pre")):
                code.decompose()
            assert "$" not in cell.get_text(), path.name
    assert formulas > 200


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path):
    for path in site.rglob("*.html"):
        shown = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        loaded = [tag["src"] for tag in shown.find_all(src=True)]
        loaded += [tag["href"] for tag in shown.find_all("link", rel="stylesheet")]
        assert [url for url in loaded if re.match(r"https?:|//", str(url))] == [], path.name


def raised() -> Iterator[tuple[str, str]]:
    """Each place of the sources that raises something made there, and by which name."""
    for path in hooks.SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                place = f"{path.relative_to(ROOT).as_posix()}:{node.exc.lineno}"
                yield place, ast.unparse(node.exc.func)


# What is no error of the library's: caught where it is raised, or not meant for users.
OTHERS = {"SystemExit", "TypeError", "ValueError", "_Reached", "gr.Error"}
# Methods that make an error, and the text that they give it.
MAKERS = {"self.error": "expected …, found …", "rewrite.error": "expected …, found …"}


def test_every_error_that_is_raised_is_in_the_docs():
    messages = hooks.messages()
    told = {place for message in messages for place in message.places}
    left = {place: name for place, name in raised() if place not in told and name not in OTHERS}
    assert set(left.values()) & set(MAKERS) == set(MAKERS)
    assert set(MAKERS.values()) <= {message.text for message in messages}
    passed_on = [place.split(":")[0] for place, name in left.items() if name not in MAKERS]
    assert passed_on == ["apps/editor/runs.py", "workbench/readers.py"]  # what another one said


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_each_error_tells_what_to_do(error: type[Exception]):
    assert "\n\nWhat to do: " in inspect.cleandoc(error.__doc__ or "")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_what_the_examples_name_exists(path: Path):
    blocks = re.findall(r"^```python\n(.+?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for node in ast.walk(ast.parse("".join(blocks))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = {"wb": Workbench, "Workbench": Workbench}.get(node.value.id)
            if node.value.id in ("plots", "reach"):
                owner = importlib.import_module(f"workbench.{node.value.id}")
            held = Workbench.__init__.__code__.co_names if owner is Workbench else ()
            known = owner is None or hasattr(owner, node.attr) or node.attr in held
            assert known, ast.unparse(node)


def test_examples_call_with_arguments_that_are_taken():
    text = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.+?)^```", text, re.MULTILINE | re.DOTALL)
    calls = 0
    for node in ast.walk(ast.parse("".join(blocks))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("wb."):
            method = getattr(Workbench, ast.unparse(node.func).removeprefix("wb."))
            named = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(method).bind(None, *node.args, **named)
            calls += 1
    assert calls > 10
