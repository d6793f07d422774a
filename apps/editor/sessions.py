"""One user's session."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import wraps
from html import escape
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Concatenate, ParamSpec, TypeVar

import gradio as gr
from plotly.basedatatypes import BaseFigure

from apps.editor.markup import busy, welcome
from apps.editor.run import Run
from apps.editor.runs import Runs
from apps.editor.shelf import OpenModel, Shelf
from workbench import Comparison, Edit, EditError, EditorError, Probe, Workbench, WorkbenchError
from workbench.cancel import cancellable, checkpoint
from workbench.checks import check_text
from workbench.editors import with_chat
from workbench.errors import Cancelled
from workbench.tables import comparison_table

P = ParamSpec("P")
T = TypeVar("T")

MOST_PROMPTS = 64
REDRAWN = 0.3  # seconds between two drawings of a table that grows
SCREEN = 17  # components that show a session: what `page.screen` gives values for


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
        self.cancelled = threading.Event()  # asked for, of the action that runs
        self.watch: Callable[[Comparison], object] | None = None  # of that action's comparison
        self.refused = False  # the action that waits for its turn, if one does
        self.figures: dict[str, BaseFigure] = {}  # on the screen, by name
        self.table = welcome()
        self._files: TemporaryDirectory[str] | None = None
        self.use(shelf.first)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session(self.shelf, self.runs)

    def use(self, model: OpenModel, *, chat: bool | None = None) -> None:
        """Begin anew over a model, without edits.

        Args:
            model: One of the shelf's.
            chat: Read prompts through its chat template, or not; None: as it was opened.

        Raises:
            ModelError: It has no chat template; nothing has changed.
        """
        name = model.preferred
        editor = with_chat(model.editors[name], model.lm.chat if chat is None else chat)
        for other in (getattr(self, "model", model), model):
            other.users.discard(self)
        model.users.add(self)
        self.model, self.editor = model, name
        self.look_at(Workbench(editor.lm, editor, model.most_bytes))

    def look_at(self, bench: Workbench) -> None:
        """Take another workbench over the same model, with nothing of it on the screen yet."""
        self.bench = bench
        self.shown: int | None = None
        self.drawn: tuple[Edit | None] | None = None  # whose figures are on the screen
        self.overlapping: tuple[int, ...] | None = None  # the edits whose overlap is on the screen
        self.probes: tuple[Probe, ...] = ()
        self.probes_of: dict[int, tuple[Probe, ...]] = {}

    def close(self) -> None:
        """Delete the files written for this user, and let go of the model."""
        self.model.users.discard(self)
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

        Raises:
            EditError: The request cannot be carried out, or there is no such editor.
        """
        if editor is not None:
            self.choose(editor)
        prompt, target = check_text(prompt, "prompt"), check_text(target, "target")
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
        self.editor = editor
        self.bench.editor = with_chat(self.model.editors[editor], self.bench.lm.chat)

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
        return self.bench.compare(probes, watch=self.watch)

    @contextmanager
    def whole(self, watch: Callable[[Comparison], object] | None = None) -> Iterator[None]:
        """One action at a time, done or, if it fails or is cancelled, not begun.

        Args:
            watch: Called as the rows of a comparison grow.
        """
        with self.lock:
            kept = self.bench, self.editor, self.shown, self.probes, dict(self.probes_of)
            self.bench = self.bench.fork(edits=True)
            self.cancelled.clear()
            self.watch = watch
            try:
                with cancellable(self.cancelled.is_set):
                    if self.refused:
                        self.cancelled.set()
                    checkpoint()
                    yield
            except BaseException:
                self.bench, self.editor, self.shown, self.probes, self.probes_of = kept
                raise
            finally:
                self.watch, self.refused = None, False


def streamed(
    extra: int = 0,
) -> Callable[
    [Callable[Concatenate[Session, P], tuple[Any, ...]]],
    Callable[Concatenate[Session, P], Iterator[tuple[Any, ...]]],
]:
    """Run a handler in the background, show its comparison as it grows, let it be cancelled.

    Args:
        extra: How many outputs the handler has beside the screen.
    """

    def decorated(
        handler: Callable[Concatenate[Session, P], tuple[Any, ...]],
    ) -> Callable[Concatenate[Session, P], Iterator[tuple[Any, ...]]]:
        @wraps(handler)
        def run(session: Session, *args: P.args, **kwargs: P.kwargs) -> Iterator[tuple[Any, ...]]:
            def showing(table: str, running: bool) -> tuple[Any, ...]:
                rest = (gr.skip(),) * (SCREEN - 3 + extra)
                if running:
                    table = f"<i data-running hidden></i>{table}"
                return gr.skip(), table, gr.update(visible=running or "hidden"), *rest

            def work() -> tuple[Any, ...]:
                with session.whole(rows.put):
                    return handler(session, *args, **kwargs)

            rows: SimpleQueue[Comparison | None] = SimpleQueue()
            yield showing(busy(session.table), True)
            pool = ThreadPoolExecutor(1)
            done = pool.submit(copy_context().run, work)
            done.add_done_callback(lambda _: rows.put(None))
            pool.shutdown(wait=False)
            for latest in now_and_then(rows):
                yield showing(comparison_table(latest), True)
            error = done.exception()
            if error is not None:
                yield showing(session.table, False)
            if isinstance(error, Cancelled):
                gr.Info(str(error))
                return
            with readable():
                yield done.result()

        return run

    return decorated


def now_and_then(news: SimpleQueue[T | None]) -> Iterator[T]:
    """The latest of what comes, at most every `REDRAWN` seconds, until None comes."""
    latest, due = None, 0.0
    while True:
        try:
            wait = None if latest is None else max(0.0, due - time.monotonic())
            latest = news.get(timeout=wait)
        except Empty:
            assert latest is not None
            yield latest
            latest, due = None, time.monotonic() + REDRAWN
        else:
            if latest is None:
                return


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
