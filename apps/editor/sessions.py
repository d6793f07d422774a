"""One user's session."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Concatenate, ParamSpec, TypeVar

import gradio as gr

from apps.editor.runs import Run, Runs
from apps.editor.shelf import OpenModel, Shelf
from workbench import Comparison, Edit, EditError, EditorError, Probe, Workbench, WorkbenchError

P = ParamSpec("P")
T = TypeVar("T")

MOST_PROMPTS = 64


class Session:
    """One browser tab's (or one API client's) workbench, and what it is looking at.

    `gr.State` gives every user a deep copy of its value; a copy of a session is a new one over
    the shelf's first model, and has no edits.

    Args:
        shelf: Where models and editors come from.
        runs: The server's training runs.
    """

    def __init__(self, shelf: Shelf, runs: Runs | None = None) -> None:
        self.shelf, self.runs = shelf, runs or Runs()
        self.watching: str | None = None  # the run whose curves were asked for
        self.seen: Any = None  # of the runs, on the screen
        self.lock = threading.RLock()
        self._files: TemporaryDirectory[str] | None = None
        self.use(shelf.first)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session(self.shelf, self.runs)

    def use(self, model: OpenModel) -> None:
        """Begin anew over a model, without edits."""
        for other in (getattr(self, "model", model), model):
            other.users.discard(self)
        model.users.add(self)
        self.model = model
        self.editor = model.preferred
        self.look_at(Workbench(model.lm, model.editors[self.editor]))

    def look_at(self, bench: Workbench) -> None:
        """Take another workbench over the same model, with nothing of it on the screen yet."""
        self.bench = bench
        self.shown: int | None = None
        self.drawn: tuple[Edit | None] | None = None  # whose figures are on the screen
        self.overlapping: tuple[int, ...] | None = None  # the edits whose overlap is on the screen
        self.probes: tuple[Probe, ...] = ()
        self.probes_of: dict[int, tuple[Probe, ...]] = {}

    def close(self) -> None:
        """Delete the files written for this user."""
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def folder(self, name: str) -> Path:
        """A fresh folder of this user's."""
        if self._files is None:
            self._files = TemporaryDirectory(prefix="workbench-")
        path = Path(self._files.name) / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def edit(self, prompt: str, target: str, editor: str | None = None) -> Edit:
        """Make an edit and look at it.

        Args:
            prompt: What the model reads.
            target: What it should say next.
            editor: Name of one of the model's editors; None: the one used last.
        """
        if editor is not None:
            self.choose(editor)
        made = self.bench.edit(prompt.strip(), target.strip())
        self.shown = made.id
        return made

    def choose(self, editor: str) -> None:
        """Make the next edits with another of the model's editors.

        Raises:
            EditError: There is none of that name.
        """
        if editor not in self.model.editors:
            known = ", ".join(self.model.editors)
            raise EditError(f"There is no editor {editor!r} for this model. Choose one of: {known}")
        self.editor, self.bench.editor = editor, self.model.editors[editor]

    def watched(self) -> Run | None:
        """The training run to show: the one asked for, else the server's last."""
        try:
            return self.runs.get(self.watching) if self.watching else self.runs.last
        except EditorError:  # its folder is gone
            return None

    def current(self) -> Edit | None:
        """The edit in view: the one chosen, else the last."""
        edits = {edit.id: edit for edit in self.bench.edits}
        return edits.get(self.shown or 0) or next(reversed(edits.values()), None)

    def compare(self, probes: Sequence[Probe | str]) -> Comparison:
        """Base and edited model on prompts.

        Raises:
            EditError: There are none, or more than `MOST_PROMPTS`.
        """
        if not 0 < len(probes) <= MOST_PROMPTS:
            raise EditError(f"Give 1 to {MOST_PROMPTS} prompts, one a line; got {len(probes)}.")
        return self.bench.compare(probes)


@contextmanager
def readable() -> Iterator[None]:
    """Show what the library refuses as a message on the page."""
    try:
        yield
    except WorkbenchError as error:
        # The page shows messages as HTML, and they may quote what was typed.
        message = escape(str(error), quote=False)
        raise gr.Error(message, print_exception=False) from error


def guarded(
    handler: Callable[Concatenate[Session, P], T],
) -> Callable[Concatenate[Session, P], T]:
    """One action at a time in a session; what the library refuses is shown as a message."""

    @wraps(handler)
    def run(session: Session, *args: P.args, **kwargs: P.kwargs) -> T:
        with session.lock, readable():
            return handler(session, *args, **kwargs)

    return run
