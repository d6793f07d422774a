"""The app's own HTML: header, history, titles. Every text of a model or a user is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from apps.editor.run import Run
from apps.editor.shelf import LABELS
from workbench import Edit, Workbench
from workbench.cards import figures_of, line, listed, mapping
from workbench.memory import MemoryEstimate
from workbench.results import HistoryEntry
from workbench.style import KIND_COLORS
from workbench.tables import KINDS, placeholder

MOST_TOKENIZED = 8  # requests of one edit, whose tokens are shown

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
let waiting;  // held keys move a slider in many steps: the last one counts
element.addEventListener('change', event => {
    event.target.setAttribute('value', event.target.value);
    clearTimeout(waiting);
    waiting = setTimeout(() => send(event.target, Number(event.target.value)), 400);
});
"""


def header(bench: Workbench, editor: str) -> str:
    """Title, and what is open: model, device, dtype, memory, editor and how it was trained."""
    lm, layers = bench.lm, bench.editor.layers
    blocks = ", ".join(map(str, sorted({layer.block for layer in layers})))
    facts = {
        "model": lm.source,
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "weights": lm.quantization,
        "prompts": "through its chat template" if lm.chat else "",
        "memory": f"{lm.model.get_memory_footprint() / 2**20:,.0f} MiB",
        "editor": LABELS.get(editor, editor),
        "edits": f"{len(layers)} matrices in block{'s' * (',' in blocks)} {blocks}",
    }
    items = "".join(
        f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts.items() if value
    )
    return (
        "<h1>Model-editing workbench</h1><p>Tell the model one thing it should say. See at once "
        "what changed, what should not have, and why; take it back exactly.</p>"
        f'<div class="facts">{items}</div>{_card(getattr(bench.editor, "card", None))}'
    )


def _card(card: Any) -> str:
    """How a trained editor was trained and what it scored, folded away; it may say anything."""
    if not (card := mapping(card)):
        return ""
    said = {
        "data": ", ".join(listed(card.get("data"))),
        "steps": card.get("steps"),
        "edits seen": card.get("edits_seen"),
        **figures_of(mapping(card.get("evaluation"))),
    }
    rows = "".join(
        f"<dt>{escape(line(name.replace('_', ' ')))}</dt><dd>{escape(_number(value))}</dd>"
        for name, value in said.items()
        if isinstance(value, str | int | float)
    )
    return f"<details><summary>How the editor was trained</summary><dl>{rows}</dl></details>"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else line(value)


WELCOME = {
    "edit": "is what you type: the model should now say the target.",
    "equivalent": "ask the same in other words: they should follow.",
    "neighbor": "ask the like of other subjects, or more of this one: they should stay.",
    "unrelated": "have nothing to do with it: they should stay.",
}


def welcome() -> str:
    """What will be seen, before there is anything to see."""
    kinds = "".join(
        f'<li style="--kind: {KIND_COLORS[kind]}"><b>{KINDS[kind][0]}</b> {text}</li>'
        for kind, text in WELCOME.items()
    )
    return (
        '<div class="welcome"><p><b>Choose an example or type an edit, then press Edit.</b> In '
        "a few seconds you see here what the model says before and after it, word by word, "
        f"for four kinds of prompts:</p><ul>{kinds}</ul><p>Below them: every edit, to switch off, "
        "weaken, strengthen, remove or undo; and <b>why</b> it works: the gradient's factors by "
        "layer and token, the size of each layer's update, its spectrum, its overlap with other "
        "edits.</p></div>"
    )


def busy(table: str) -> str:
    """What was there, dimmed, while something is being done."""
    return f'<p class="empty" role="status">Working …</p><div class="stale">{table}</div>'


def memory(estimate: MemoryEstimate, note: str = "") -> str:
    """What a model needs beside what is free, as a bar and in words."""
    share = min(1.0, estimate.needed / max(1, estimate.free))
    mood = "good" if estimate.fits else "bad"
    verdict = "It fits." if estimate.fits else "It does not fit."
    note = note or ("" if estimate.fits else estimate.advice)
    return (
        f'<div class="memory" role="status"><div class="meter {mood}" aria-hidden="true">'
        f'<i style="width: {share:.1%}"></i></div><p><b class="{mood}">{verdict}</b> '
        f"{escape(str(estimate))} {escape(note)}</p></div>"
    )


def run_status(run: Run | None) -> str:
    """Where a training run stands."""
    if run is None:
        return placeholder("No training run is in progress. Its curves will be drawn here.")
    steps, latest = run.records(), {}
    for record in steps:
        latest |= record
    share = run.step / run.steps
    left = (run.steps - run.step) * (run.seconds_per_step or 0.0)
    about = f"{run.plan.data} · {run.plan.model}{' · chat' * run.plan.chat}"
    facts = [f"step {run.step:,} of {run.steps:,}", about]
    if run.live and left:
        facts.append(f"about {max(1, round(left / 60))} min left" if left > 50 else "almost done")
    if "total" in latest:
        facts += [
            f"edit loss {latest['edit']:.3f} ({latest['edit_before']:.3f} before the edit)",
            f"locality loss {latest['locality']:.4f}",
            f"edit success {latest['success']:.0%}",
        ]
    items = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    ends = {
        "stopped": "Resume it from the list of earlier runs.",
        "elsewhere": "Another server on this machine is at work on it.",
        "interrupted": "The server ended before it did. Resume it from the list of earlier runs.",
    }
    said = run.plan.said or ends.get(run.state, "")
    if run.keeps_editor and not run.live:
        said += f" Its editor can be chosen by the name {run.name}."
    return (
        f'<div class="run" role="status" data-state="{run.state}"><h3>{escape(run.name)} '
        f'<small class="{run.state}">{run.state}</small></h3>'
        f'<div class="meter" aria-hidden="true"><i style="width: {share:.1%}"></i></div>'
        f'<div class="facts">{items}</div><p>{escape(said.strip())}</p></div>'
    )


def figures_title(edit: Edit | None) -> str:
    """What the figures are about."""
    if edit is None:
        return placeholder("No edit in view: make one to see inside.")
    if edit.trace is None:
        return placeholder(f"Edit {edit.id} was imported as an adapter: it has no factors.")
    return f"<h3>Inside edit {edit.id}: {escape(edit.title)}</h3>"


def token_tables(bench: Workbench, edit: Edit | None) -> str:
    """What the edit in view is to the model; of a batch, its first requests."""
    requests = edit.requests[:MOST_TOKENIZED] if edit else ()
    tables = "".join(bench.tokens(r.prompt, r.target)._repr_html_() for r in requests)
    scrolled = f'<div class="tokens" role="region" aria-label="Tokens" tabindex="0">{tables}</div>'
    return scrolled if tables else ""


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
        f'<input type="range" min="{min(0, entry.strength)}" max="{max(2, entry.strength)}" '
        f'step="0.05" value="{entry.strength}" '
        f'data-action="strength" aria-label="Strength of edit {entry.id}" '
        f'title="0: not at all, 1: as made, above 1: more">'
        f"<output>{entry.strength:.2f}</output></label>"
        f'<button class="remove" data-action="remove" aria-label="Remove edit {entry.id}">✕'
        f"</button></div>"
    )
