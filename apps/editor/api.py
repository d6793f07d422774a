"""The app's named API endpoints: text and numbers in, JSON out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from apps.editor.sessions import Session, readable
from workbench import Comparison
from workbench.probes import read_lines
from workbench.results import as_json

P = ParamSpec("P")


def whole(
    handler: Callable[Concatenate[Session, P], Any],
) -> Callable[Concatenate[Session, P], tuple[Session, Any]]:
    """Do it whole or not at all, and let `cancel` call it off.

    The session is returned too, since Gradio counts its time to live from then.
    """

    @wraps(handler)
    def run(session: Session, *args: P.args, **kwargs: P.kwargs) -> tuple[Session, Any]:
        with readable(), session.whole():
            return session, handler(session, *args, **kwargs)

    return run


def _json(value: object) -> Any:
    return as_json(value)


def rows_json(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows, with what follows from them."""
    return [
        {**_json(row), "changed": row.changed, "kept": row.kept, "free_running": row.free_running}
        for row in comparison.rows
    ]


@whole
def edit(session: Session, prompt: str, target: str) -> dict[str, Any]:
    """Make the model say `target` after `prompt`, and compare suggested prompts before and after.

    Returns the edit's id, title and seconds, the compared rows, and the history.
    """
    made = session.edit(prompt, target)
    return {
        "id": made.id,
        "title": made.title,
        "seconds": made.seconds,
        "rows": rows_json(session.bench.compare(session.bench.suggest(prompt, target))),
        "history": _json(session.bench.history),
    }


@whole
def undo(session: Session) -> Any:
    """Take the last action back exactly; returns the history."""
    session.bench.undo()
    return _json(session.bench.history)


@whole
def redo(session: Session) -> Any:
    """Do again what was undone last; returns the history."""
    session.bench.redo()
    return _json(session.bench.history)


@whole
def toggle(session: Session, id: int) -> Any:
    """Switch an edit off, or on again; returns the history."""
    session.bench.toggle(id)
    return _json(session.bench.history)


@whole
def strength(session: Session, id: int, value: float) -> Any:
    """Set how strongly an edit acts (1 as made, 0 not at all); returns the history."""
    session.bench.strength(id, value)
    return _json(session.bench.history)


@whole
def remove(session: Session, id: int) -> Any:
    """Drop an edit, wherever it stands; returns the history."""
    session.bench.remove(id)
    return _json(session.bench.history)


@whole
def history(session: Session) -> Any:
    """The live edits, oldest first: id, title, enabled, strength."""
    return _json(session.bench.history)


@whole
def compare(session: Session, prompts: str) -> list[dict[str, Any]]:
    """Base and edited model on prompts, one a line; "prompt => answer" follows that answer."""
    probes = read_lines(prompts, "other")
    return rows_json(session.compare([p if p.target else p.prompt for p in probes]))


@whole
def inspect(session: Session, id: int) -> Any:
    """An edit's trace: by layer and token, norms and cosines of the factors; norms, spectra."""
    return _json(session.bench.inspect(id))


@whole
def probe(session: Session, id: int) -> list[dict[str, Any]]:
    """How far an edit reaches: each probe's texts, probabilities, change, verdict and score."""
    return session.bench.probe(id).to_rows()


def cancel(session: Session) -> Session:
    """Call off what this session is doing; it ends with a message, and other sessions go on."""
    session.cancelled.set()
    return session
