"""What the page does: handlers of its events, each giving new values to components."""

from __future__ import annotations

import shutil
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from apps.editor import markup
from apps.editor.figures import shown
from apps.editor.sessions import Session, guarded, streamed
from apps.editor.shelf import LABELS
from workbench import Comparison, Edit, EditError, Probe, Workbench, WorkbenchError, plots, tables
from workbench.corpus import EXAMPLES
from workbench.errors import Cancelled
from workbench.probes import LISTED, as_lines, read_form, suggest

SESSION_FILE = "session.safetensors"
INSIDE = ("factors", "update-size", "update-share", "spectrum")  # an edit's figures
MOST_BYTES = 2**31  # of an unpacked session

# `screen` gives the values of the components that show a session, `form` those of the
# form; editor_app.py lists the components in the same order.
FORM = len(LISTED) + 3


def form(prompt: str, target: str, probes: Sequence[Probe]) -> tuple[str, ...]:
    """Prompt, target, the lists of `LISTED`, and the prompt that the lists are for."""
    return prompt, target, *(as_lines(probes, kind) for kind in LISTED), prompt


def screen(session: Session, note: str = "") -> tuple[Any, ...]:
    """Everything that shows the session, the comparison made anew."""
    bench, edit = session.bench, session.current()
    session.shown = edit.id if edit else None
    table, figure = tables.placeholder("Nothing compared yet."), None
    if session.probes:
        start = time.perf_counter()
        try:
            comparison = session.compare(session.probes)
        except Cancelled:
            raise
        except WorkbenchError as error:  # what was done is done; only the table is missing
            comparison, table = Comparison(()), tables.placeholder(str(error))
        else:
            seconds = time.perf_counter() - start
            missed = [row for row in comparison.of_kind("edit") if not row.free_running]
            hint = ". Not reached: raise its strength, or choose another editor" if note else ""
            note += (
                f"{len(comparison.rows)} prompts compared in {seconds:.1f} s{hint * len(missed)}"
            )
            table = tables.comparison_table(comparison, note)
        if any(row.target for row in comparison.rows):
            figure = plots.target_probabilities(comparison)
    session.table = table
    return (
        session,
        table,
        gr.update(visible="hidden"),
        markup.history_list(bench.history, session.shown),
        gr.update(interactive=bench.can_undo),
        gr.update(interactive=bench.can_redo),
        gr.update(interactive=bool(bench.update)),
        gr.update(interactive=bool(bench.edits)),
        gr.update(visible=bool(session.probes)),
        shown(session, "probabilities", figure),
        *_inside(session, edit),
        _overlap(session),
    )


def _inside(session: Session, edit: Edit | None) -> tuple[Any, ...]:
    """The edit's title, tokens and own figures, drawn only when another edit comes into view."""
    if session.drawn == (edit,):
        return (gr.skip(),) * 6
    session.drawn = (edit,)
    trace = edit.trace if edit else None
    made: dict[str, Any] = dict.fromkeys(INSIDE)
    if trace is not None:
        figures = (
            plots.factor_panels(trace),
            plots.update_magnitudes(trace),
            plots.update_magnitudes(trace, relative=True),
            plots.spectra(trace),
        )
        made = dict(zip(INSIDE, figures, strict=True))
    tokens = markup.token_tables(session.bench, edit)
    drawn = (shown(session, *item) for item in made.items())
    return markup.figures_title(edit), tokens, *drawn


def _overlap(session: Session) -> Any:
    """How the live edits overlap, drawn only when there are others."""
    ids = tuple(edit.id for edit in session.bench.edits)
    if ids == session.overlapping:
        return gr.skip()
    session.overlapping = ids
    return shown(session, "overlap", plots.overlaps(session.bench.overlap()) if ids else None)


@streamed(extra=len(LISTED))
def edit(
    session: Session,
    editor: str,
    prompt: str,
    target: str,
    equivalents: str,
    neighbors: str,
    unrelated: str,
    other: str,
    listed_for: str,
) -> tuple[Any, ...]:
    """Edit, then compare; lists that were made for another prompt are suggested anew."""
    made = session.edit(prompt, target, editor)
    lists, filled = _lists(prompt, target, (equivalents, neighbors, unrelated), listed_for)
    session.probes = session.probes_of[made.id] = read_form(prompt, target, *lists, other)
    by = f"edited by {LABELS.get(editor, editor)} in {made.seconds:.2f} s, acts {made.acts}, "
    shown = screen(session, by)
    return *shown, *filled


@streamed(extra=len(LISTED))
def compare(
    session: Session,
    prompt: str,
    target: str,
    equivalents: str,
    neighbors: str,
    unrelated: str,
    other: str,
    listed_for: str,
) -> tuple[Any, ...]:
    """Compare what the form lists, without a new edit."""
    lists, filled = _lists(prompt, target, (equivalents, neighbors, unrelated), listed_for)
    probes = read_form(prompt, target, *lists, other)
    if not probes:
        raise EditError("There is nothing to compare: type a prompt, or choose an example.")
    session.probes = probes
    return *screen(session), *filled


@streamed()
def undo(session: Session) -> tuple[Any, ...]:
    session.bench.undo()
    return screen(session)


@streamed()
def redo(session: Session) -> tuple[Any, ...]:
    session.bench.redo()
    return screen(session)


@streamed(extra=FORM)
def act(session: Session, event: gr.EventData) -> tuple[Any, ...]:
    """A click in the history: switch, strength, remove, or show an edit."""
    action, id = str(event.action), int(event.id)
    filled: tuple[Any, ...] = (gr.skip(),) * FORM
    if action == "toggle":
        session.bench.toggle(id)
    elif action == "strength":
        session.bench.strength(id, float(event.value))
    elif action == "remove":
        session.bench.remove(id)
    elif action == "show":
        filled = _show(session, session.bench.get(id)) or filled
    return *screen(session), *filled


def _show(session: Session, edit: Edit) -> tuple[str, ...]:
    """Bring an edit into view; returns the form's values, none for an imported adapter."""
    session.shown = edit.id
    if not edit.requests:
        return ()
    prompt, target = edit.requests[0].prompt, edit.requests[0].target
    probes = session.probes_of.get(edit.id) or suggest(prompt, target)
    session.probes = tuple(probes)
    return form(prompt, target, session.probes)


def cancel(session: Session, waiting: bool = False) -> None:
    """Call off what this session is doing; other sessions go on.

    Args:
        session: Whose.
        waiting: It has not begun: others' work goes before it.
    """
    session.refused = waiting
    session.cancelled.set()


def example(index: int) -> tuple[Any, ...]:
    """The form of a gallery example; the user's own prompts stay."""
    chosen = EXAMPLES[index]
    lists = _suggested(chosen.prompt, chosen.target)
    return chosen.prompt, chosen.target, *lists, gr.skip(), chosen.prompt


def relist(prompt: str, target: str, listed_for: str) -> tuple[Any, ...]:
    """Lists for a prompt that was typed, where they were made for another one."""
    return _lists(prompt, target, ("",) * 3, listed_for)[1]


def _lists(
    prompt: str, target: str, lists: tuple[str, ...], listed_for: str
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The lists to compare, and what to fill in: anew where they were made for another prompt."""
    if prompt == listed_for or not prompt.strip():
        return lists, (gr.skip(),) * len(LISTED)
    lists = _suggested(prompt, target)
    return lists, (*lists, prompt)


def _suggested(prompt: str, target: str) -> tuple[str, ...]:
    """All lists but the last, which is the user's own."""
    probes = suggest(prompt.strip(), target)
    return tuple(as_lines(probes, kind) for kind in LISTED[:-1])


# Files


def _zipped(folder: Path) -> str:
    return shutil.make_archive(str(folder), "zip", folder.parent, folder.name)


@guarded
def export(session: Session) -> str:
    """All live edits as one PEFT LoRA adapter, zipped."""
    return _zipped(session.bench.to_peft(session.folder("adapter")))


@guarded
def save(session: Session) -> str:
    """The session, zipped."""
    return _zipped(session.bench.save(session.folder("session")))


@streamed(extra=FORM + 2)
def load(session: Session, path: str) -> tuple[Any, ...]:
    """Take a saved session's edits, and its way of reading prompts, in place of those at hand."""
    folder = session.folder("loaded")
    try:
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if Path(i.filename).name == SESSION_FILE)
            if info.file_size > MOST_BYTES:
                raise EditError(f"That session unpacks to {info.file_size} bytes: too many.")
            with archive.open(info) as packed, (folder / SESSION_FILE).open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (StopIteration, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):
        raise EditError(
            f"{Path(path).name} is no saved session: choose a .zip made by 'Save session'."
        ) from None
    try:
        session.look_at(Workbench.load(folder, workbench=session.bench))
    finally:
        shutil.rmtree(folder)
    filled: tuple[str, ...] = ()
    if session.bench.edits:
        filled = _show(session, session.bench.edits[-1])
    header = markup.header(session.bench, session.editor)
    return *screen(session), *(filled or form("", "", ())), header, session.bench.lm.chat
