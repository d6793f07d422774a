"""What the site takes from the repository: notebooks, results, pictures, and the errors raised."""

from __future__ import annotations

import ast
import html
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

Item = griffe.Object | griffe.Alias
ROOT = Path(__file__).resolve().parents[1]
TAKEN = (
    *("notebooks/*.ipynb", "assets/results/*.md", "assets/screenshots/*.png"),
    *("CHANGELOG.md", "CONTRIBUTING.md"),
)
FORMULA = re.compile(r"(\$\$.+?\$\$|\$[^$]+?\$)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List in the navigation each file that a section's pattern stands for."""
    for entry in config.nav or ():
        for title, names in entry.items() if isinstance(entry, dict) else ():
            if isinstance(names, list):
                entry[title] = [found for name in names for found in named(name)]
    return config


def named(name: str) -> list[str]:
    """A page, or the files of the repository that a pattern with * stands for."""
    files = sorted(ROOT.glob(name)) if "*" in name else ()
    return [path.relative_to(ROOT).as_posix() for path in files] or [name]


@event_priority(100)  # before the notebooks' plugin looks at the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/, under its path in the repository."""
    for pattern in TAKEN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the pages that are made from the repository's own texts."""
    if page.file.src_uri == "security.md":
        return (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    if page.file.src_uri == "errors.md":
        return markdown.replace("<!-- errors -->", "\n".join(errors()))
    return markdown


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Formulas of notebooks as MathML, which needs no script from elsewhere."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    soup = BeautifulSoup(content, "html.parser")
    for cell in soup.select(".jp-MarkdownOutput"):
        for text in cell.find_all(string=FORMULA):
            if not text.find_parent(("code", "pre")):
                text.replace_with(BeautifulSoup(with_mathml(text), "html.parser"))
    return str(soup)


def with_mathml(text: str) -> str:
    """A text of $formulas$ and words as HTML."""
    return "".join(
        convert(part.strip("$"), display="block" if part.startswith("$$") else "inline")
        if FORMULA.fullmatch(part)
        else html.escape(part)
        for part in FORMULA.split(text)
    )


def errors() -> Iterator[str]:
    """Each error: what it means and what to do, what raises it when, the messages it comes with."""
    package = griffe.load("workbench", search_paths=[ROOT])
    raised, said = raises(package), messages()
    for name, error in package["errors"].classes.items():
        yield f"::: {error.path}\n"
        if raised[name]:
            yield "| raised by | when |\n|---|---|"
            yield from (f"| {where} | {when} |" for where, when in raised[name])
            yield ""
        if said[name]:
            yield '??? note "Its messages: … stands for what was given"\n'
            yield from (f"    - {message}" for message in sorted(said[name]))
            yield ""


def raises(package: Item) -> dict[str, list[tuple[str, str]]]:
    """Error -> who raises it and when, as the docstrings' sections say."""
    found = defaultdict(list)
    for item in public(package):
        for section in item.docstring.parse("google") if item.docstring else ():
            if section.kind is griffe.DocstringSectionKind.raises:
                name = item.path.removeprefix("workbench.")
                link = f'<autoref optional identifier="{item.path}">`{name}`</autoref>'
                for entry in section.value:
                    when = " ".join(entry.description.split())
                    found[str(entry.annotation)].append((link, when))
    return found


def public(item: Item) -> Iterator[Item]:
    """Modules, classes and functions without an underscore, where they are defined."""
    for name, member in item.members.items():
        if not member.is_alias and not name.startswith("_"):
            yield member
            if member.is_module or member.is_class:
                yield from public(member)


def messages() -> dict[str, set[str]]:
    """Error -> the texts it is raised with in the library."""
    found = defaultdict(set)
    for path in sorted((ROOT / "workbench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = written(node.exc.args[0])
                if text and text.strip(" …"):
                    found[ast.unparse(node.exc.func)].add(text)
    return found


def written(node: ast.expr) -> str | None:
    """A literal text with … where something is put in; None for what is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return escaped(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return escaped("".join(map(str, parts)))
    return None


def escaped(text: str) -> str:
    """A message as Markdown that shows each of its signs."""
    signs = {sign: f"\\{sign}" for sign in "\\`*_[]<>|#"}
    return " ".join(text.translate(str.maketrans(signs)).split())
