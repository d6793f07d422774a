"""The app's HTML: comparison table, history, header. Every text of a model or a user is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import SequenceMatcher
from html import escape

from workbench import Comparison, Edit, PromptComparison, Workbench
from workbench.plots import KIND_COLORS
from workbench.session import HistoryEntry

KINDS = {
    "edit": ("The edit", "should now say the target"),
    "equivalent": ("Equivalent prompts", "should say it too"),
    "neighbor": ("Neighbours", "same relation or subject: should stay as they were"),
    "unrelated": ("Unrelated prompts", "should stay as they were"),
    "other": ("Your own prompts", "nothing is expected of them"),
}
_COLUMNS = ("Prompt", "Before", "After", "p(answer)", "Teacher-forced", "Free-running")
LEGEND = (
    "<b>p(answer)</b>: probability of the answer after the prompt. <b>Teacher-forced</b>: each "
    "token of the answer is the most likely one while the right ones before it are fed in. "
    "<b>Free-running</b>: the text that the model writes by itself begins with the answer. "
    "Each goes from the base model → to the edited one."
)

# Clicks in the history become one event, `act`, that names the action, the edit and a value.
HISTORY_SCRIPT = """
const send = (source, value) => trigger('act', {
    action: source.dataset.action, id: Number(source.closest('[data-id]').dataset.id), value});
element.addEventListener('click', event => {
    const button = event.target.closest('button[data-action]');
    if (button) send(button, null);
});
element.addEventListener('input', event => {
    event.target.nextElementSibling.textContent = Number(event.target.value).toFixed(2);
});
element.addEventListener('change', event => {
    event.target.setAttribute('value', event.target.value);
    send(event.target, Number(event.target.value));
});
"""


def header(bench: Workbench) -> str:
    """Title, and what is open: model, device, dtype, editor and the blocks it edits."""
    lm, layers = bench.lm, bench.editor.layers
    blocks = ", ".join(map(str, sorted({layer.block for layer in layers})))
    facts = {
        "model": lm.source,
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "weights": lm.quantization,
        "editor": bench.editor.name,
        "edits": f"{len(layers)} matrices in block{'s' * (',' in blocks)} {blocks}",
    }
    items = "".join(
        f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts.items() if value
    )
    return (
        "<h1>Model-editing workbench</h1><p>Tell the model one thing it should say. See at once "
        "what changed, what should not have, and why; take it back exactly.</p>"
        f'<div class="facts">{items}</div>'
    )


def placeholder(text: str) -> str:
    """A line where there is nothing to show yet."""
    return f'<p class="empty">{escape(text)}</p>'


def figures_title(edit: Edit | None) -> str:
    """What the figures are about."""
    if edit is None:
        return placeholder("No edit in view: make one to see inside.")
    if edit.trace is None:
        return placeholder(f"Edit {edit.id} was imported as an adapter: it has no factors.")
    return f"<h3>Inside edit {edit.id}: {escape(edit.title)}</h3>"


def comparison_table(comparison: Comparison, note: str = "") -> str:
    """Every prompt before and after, grouped by kind, with what changed marked."""
    groups = [(kind, comparison.of_kind(kind)) for kind in KINDS]
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    body = "".join(_group(kind, rows) for kind, rows in groups if rows)
    counts = "".join(_count(kind, rows) for kind, rows in groups if rows and kind != "other")
    return (
        f'<div class="counts">{counts}<span class="note">{escape(note)}</span></div>'
        f"<table><thead><tr>{head}</tr></thead>{body}</table>"
        f'<p class="legend">{LEGEND}</p>'
    )


def _count(kind: str, rows: Iterable[PromptComparison]) -> str:
    verdicts = [_verdict(row)[1] for row in rows]
    good, of = sum(verdict == "good" for verdict in verdicts), len(verdicts)
    what = {
        "edit": "edit made" if good == of else "edit not reached",
        "equivalent": f"{good} of {of} equivalents follow",
        "neighbor": f"{good} of {of} neighbours unchanged",
        "unrelated": f"{good} of {of} unrelated unchanged",
    }[kind]
    return f'<span class="{"good" if good == of else "bad"}">{what}</span>'


def _group(kind: str, rows: Iterable[PromptComparison]) -> str:
    name, expected = KINDS[kind]
    return (
        f'<tbody data-kind="{kind}" style="--kind: {KIND_COLORS[kind]}"><tr class="kind">'
        f'<th scope="rowgroup" colspan="{len(_COLUMNS)}">{name} <small>{expected}</small></th></tr>'
        f"{''.join(map(_row, rows))}</tbody>"
    )


def _row(row: PromptComparison) -> str:
    verdict, mood = _verdict(row)
    before, after = _marked(row.base_text, row.edited_text)
    chance = "–"
    if row.target is not None:
        chance = (
            f"<q>{escape(row.target)}</q> {_percent(row.base_probability)} → "
            f"{_percent(row.edited_probability)}"
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
    if row.kind in ("edit", "equivalent"):
        return ("✓ says it", "good") if row.free_running else ("✗ does not say it", "bad")
    return ("✗ changed", "bad") if row.changed else ("✓ unchanged", "good")


def _tick(value: bool | None) -> str:
    if value is None:
        return "–"
    return '<b class="good">✓</b>' if value else '<b class="bad">✗</b>'


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    return "&lt;0.1%" if value < 0.001 else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _marked(base: str, edited: str) -> tuple[str, str]:
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


def history_list(entries: Iterable[HistoryEntry], shown: int | None) -> str:
    """The live edits with a switch, a strength and a way out each; `shown` is the one in view."""
    rows = "".join(_entry(entry, entry.id == shown) for entry in entries)
    return rows or placeholder("No edits yet: the model is as it was published.")


def _entry(entry: HistoryEntry, shown: bool) -> str:
    title = escape(entry.title)
    state = "on" if entry.enabled else "off"
    return (
        f'<div class="entry {state}{" shown" if shown else ""}" data-id="{entry.id}">'
        f'<button class="switch" role="switch" data-action="toggle" aria-checked="'
        f'{str(entry.enabled).lower()}" aria-label="Edit {entry.id}">{state}</button>'
        f'<button class="title" data-action="show" title="Show this edit">{entry.id} · {title}'
        f"</button><label>strength "
        f'<input type="range" min="0" max="2" step="0.05" value="{entry.strength}" '
        f'data-action="strength" aria-label="Strength of edit {entry.id}">'
        f"<output>{entry.strength:.2f}</output></label>"
        f'<button class="remove" data-action="remove" aria-label="Remove edit {entry.id}">✕'
        f"</button></div>"
    )
