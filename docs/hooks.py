"""What the site takes from the repository: notebooks, results, pictures, and the errors raised."""

from __future__ import annotations

import ast
import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import griffe
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


class Message(NamedTuple):
    """A text that an error comes with, with … for what is put in, and its page."""

    error: str
    text: str
    places: list[str]
    page: str


Item = griffe.Object | griffe.Alias
ROOT = Path(__file__).resolve().parents[1]
TAKEN = (
    *("notebooks/*.ipynb", "assets/results/*.md", "assets/results/growth.*"),
    *("assets/screenshots/*.png", "CHANGELOG.md", "CONTRIBUTING.md"),
)
SOURCES = sorted(path for name in ("workbench", "apps") for path in (ROOT / name).rglob("*.py"))
# What users see as another error than the code says: of records that readers refuse a DataError
# tells, and which class a file's error has is up to who reads it.
SHOWN_AS = {
    "FieldError": "DataError",
    "NotAnEdit": "DataError",
    "UnreadableRecord": "DataError",
    "error": "WorkbenchError",
}
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
    for message in messages():
        files.append(File.generated(config, message.page, content=page_of(message)))
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
    package = library()
    raised = raises(package)
    for name, error in package["errors"].classes.items():
        yield f"::: {error.path}\n"
        if raised[name]:
            yield "| raised by | when |\n|---|---|"
            yield from (f"| {where} | {when} |" for where, when in raised[name])
            yield ""
        yield '??? note "Its messages: … stands for what was given"\n'
        yield from (f"    - [{m.text}]({m.page})" for m in messages() if m.error == name)
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


@cache
def library() -> Item:
    """The package, read without being run."""
    return griffe.load("workbench", search_paths=[ROOT])


@cache
def messages() -> tuple[Message, ...]:
    """All messages in words, sorted."""
    places = defaultdict(list)
    for where, error, text in made():
        if re.search(r"\w", text):
            places[error, text].append(where)
    found, alike = [], Counter()
    for (error, text), where in sorted(places.items()):
        words = re.sub(r"\W+", "-", f"{error} {text}".lower()).strip("-")[:80]
        alike[words] += 1
        name = f"{words}-{alike[words]}" if alike[words] > 1 else words
        found.append(Message(error, text, where, f"errors/{name}.md"))
    return tuple(found)


def page_of(message: Message) -> str:
    """What is known of one message: its error, what to do, where it comes from."""
    described = library()["errors"][message.error].docstring.value
    means, _, todo = described.partition("What to do: ")
    link = f"[`{message.error}`][workbench.errors.{message.error}]"
    places = ", ".join(f"`{where}`" for where in message.places)
    return (
        f"# {message.text}\n\nA message of {link}; … stands for what was given.\n\n{means.strip()}"
        f"\n\nWhat to do: {todo.strip()}\n\nIt comes from {places}.\n\n[All errors](../errors.md)\n"
    )


def made() -> Iterator[tuple[str, str, str]]:
    """Each place where the library or the app makes an error: where, which one, a text of it."""
    classes = library()["errors"].classes
    shown = {name: name for name in classes} | SHOWN_AS
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = known_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func)
                if name in shown:
                    where = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
                    for text in written(node.args[-1], known):
                        yield where, shown[name], escaped(text)


def known_in(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """What a module's names stand for: constants, and what functions may return."""
    known = defaultdict(list)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            known[ast.unparse(node.targets[0])] = [node.value]
        elif isinstance(node, ast.FunctionDef):
            returned = [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
            known[node.name] = [value for value in returned if value]
    return known


def written(node: ast.expr, known: Mapping[str, list[ast.expr]]) -> list[str]:
    """The texts that an expression may give, with … where something is put in."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*(written(v, known) for v in node.values))]
    if isinstance(node, ast.FormattedValue):
        node = node.value
    name = ast.unparse(node.func if isinstance(node, ast.Call) else node).removesuffix(".format")
    others = {**known, name: []}  # a function may call itself
    texts = [text for value in known.get(name, ()) for text in written(value, others)]
    return [re.sub(r"\{\w*\}", "…", text) for text in texts] or ["…"]


def escaped(text: str) -> str:
    """A message as Markdown that shows each of its signs."""
    signs = {sign: f"\\{sign}" for sign in "\\`*_[]<>|#"}
    return " ".join(text.translate(str.maketrans(signs)).split())
