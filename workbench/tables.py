"""Results as HTML for the app and for notebooks; every text of a model or a user is escaped."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from workbench.results import Comparison, PromptComparison
from workbench.style import KIND_COLORS

CSS = Path(__file__).with_suffix(".css")
KINDS = {
    "edit": ("The edit", "should now say the target"),
    "equivalent": ("Equivalent prompts", "should say it too"),
    "portability": ("What follows", "is entailed by the edit: should change with it"),
    "neighbor": ("Neighbours", "same relation or subject: should keep their answers"),
    "unrelated": ("Unrelated prompts", "should keep their answers"),
    "other": ("Your own prompts", "nothing is expected of them"),
}
_COLUMNS = ("Prompt", "Before", "After", "p(answer)", "Teacher-forced", "Free-running")
LEGEND = (
    "<b>p(answer)</b>: probability of the answer after the prompt. <b>Teacher-forced</b>: each "
    "token of the answer is the most likely one while the right ones before it are fed in. "
    "<b>Free-running</b>: the text that the model writes by itself begins with the answer. "
    "Each goes from the base model → to the edited one."
)


def placeholder(text: str) -> str:
    """A line where there is nothing to show yet."""
    return f'<p class="empty">{escape(text)}</p>'


def comparison_table(comparison: Comparison, note: str = "") -> str:
    """Every prompt before and after, grouped by kind, with what changed marked."""
    groups = [(kind, comparison.of_kind(kind)) for kind in KINDS]
    finished = comparison.rows[: len(comparison.rows) - comparison.unfinished]
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    body = "".join(_group(kind, rows, finished) for kind, rows in groups if rows)
    counts = "".join(_count(kind, rows) for kind, rows in groups if rows and kind != "other")
    if comparison.unfinished:
        counts = "writing …"
    return (
        f'<div class="comparison"><div class="counts" role="status">{counts}'
        f'<span class="note">{escape(note)}</span></div>'
        f"<table><thead><tr>{head}</tr></thead>{body}</table>"
        f'<p class="legend">{LEGEND}</p></div>'
    )


def _count(kind: str, rows: Iterable[PromptComparison]) -> str:
    verdicts = [_verdict(row)[1] for row in rows]
    good, of = sum(verdict == "good" for verdict in verdicts), len(verdicts)
    what = {
        "edit": "edit made" if good == of else "edit not reached",
        "equivalent": f"{good} of {of} equivalents follow",
        "portability": f"{good} of {of} consequences drawn",
        "neighbor": f"{good} of {of} neighbours kept",
        "unrelated": f"{good} of {of} unrelated kept",
    }[kind]
    return f'<span class="{"good" if good == of else "bad"}">{what}</span>'


def _group(
    kind: str, rows: Iterable[PromptComparison], finished: Collection[PromptComparison]
) -> str:
    name, expected = KINDS[kind]
    return (
        f'<tbody data-kind="{kind}" style="--kind: {KIND_COLORS[kind]}"><tr class="kind">'
        f'<th scope="rowgroup" colspan="{len(_COLUMNS)}">{name} <small>{expected}</small></th></tr>'
        f"{''.join(_row(row, row in finished) for row in rows)}</tbody>"
    )


def _row(row: PromptComparison, finished: bool) -> str:
    verdict, mood = _verdict(row) if finished else ("…", "plain")
    # What is half written differs for no reason.
    texts = (row.base_text, row.edited_text)
    before, after = marked(*texts) if finished else map(escape, texts)
    chance = "–"
    if row.target is not None:
        chance = (
            f"<q>{escape(row.target)}</q> {percent(row.base_probability)} → "
            f"{percent(row.edited_probability)}{_bars(row)}"
        )
    base_free = replace(row, edited_text=row.base_text).free_running
    cells = (
        f'{escape(row.prompt)}<span class="verdict {mood}">{verdict}</span>',
        before,
        after,
        chance,
        f"{_tick(row.base_exact)} → {_tick(row.edited_exact)}",
        f"{_tick(base_free)} → {_tick(row.free_running)}",
    )
    return f"<tr>{''.join(map(_cell, _COLUMNS, cells))}</tr>"


def _cell(column: str, content: str) -> str:
    return f'<td data-column="{column}"><div>{content}</div></td>'


def _verdict(row: PromptComparison) -> tuple[str, str]:
    """What became of a row, in a word, and whether that is good."""
    if row.kind == "other":
        return ("changed" if row.changed else "unchanged"), "plain"
    if row.kind in ("edit", "equivalent", "portability"):
        return ("✓ says it", "good") if row.free_running else ("✗ does not say it", "bad")
    if not row.changed:
        return "✓ unchanged", "good"
    return ("✓ answer kept, then it drifts", "good") if row.kept else ("✗ changed", "bad")


def _tick(value: bool | None) -> str:
    if value is None:
        return "–"
    return '<b class="good">✓</b>' if value else '<b class="bad">✗</b>'


def _bars(row: PromptComparison) -> str:
    """Both probabilities as bars, the base model's above."""
    widths = (row.base_probability or 0.0, row.edited_probability or 0.0)
    bars = "".join(f'<i style="width: {width:.1%}"></i>' for width in widths)
    return f'<span class="bars" aria-hidden="true">{bars}</span>'


def percent(value: float | None) -> str:
    if value is None:
        return "–"
    return "&lt;0.1%" if value < 0.001 else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def marked(base: str, edited: str) -> tuple[str, str]:
    """Both texts, escaped, with the words that the other one lacks marked."""
    old, new = (
        re.findall(r"\S+\s*", re.sub(r"\s*\n\s*", " ↵ ", text.strip())) or ["(nothing)"]
        for text in (base, edited)
    )
    before = after = ""
    for same, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = escape("".join(old[a:b])), escape("".join(new[c:d]))
        before += gone if same == "equal" or not gone else f"<del>{gone}</del>"
        after += come if same == "equal" or not come else f"<mark>{come}</mark>"
    return before, after
