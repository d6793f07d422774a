"""One user's session, and prompts as the lines of text that users write."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Concatenate, ParamSpec, TypeVar

import gradio as gr

from workbench import Comparison, Edit, EditError, EditTrace, Probe, Workbench, WorkbenchError

P = ParamSpec("P")
T = TypeVar("T")

MOST_PROMPTS = 64
_WITH_ANSWER = ("neighbor", "unrelated")
LISTED = ("equivalent", "neighbor", "unrelated", "other")


class Session:
    """One browser tab's (or one API client's) workbench, and what it is looking at.

    `gr.State` gives every user a deep copy of its value; a copy of a session is a fork, which
    shares model and editor and has no edits.

    Args:
        bench: Where model and editor come from.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench.fork()
        self.lock = threading.RLock()
        self.shown: int | None = None
        self.drawn: EditTrace | None = None
        self.probes: tuple[Probe, ...] = ()
        self.probes_of: dict[int, tuple[Probe, ...]] = {}
        self._files: TemporaryDirectory[str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session(self.bench)

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

    def edit(self, prompt: str, target: str) -> Edit:
        """Make an edit and look at it."""
        made = self.bench.edit(prompt.strip(), target.strip())
        self.shown = made.id
        return made

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


def guarded(
    handler: Callable[Concatenate[Session, P], T],
) -> Callable[Concatenate[Session, P], T]:
    """One action at a time in a session; what the library refuses is shown as a message."""

    @wraps(handler)
    def run(session: Session, *args: P.args, **kwargs: P.kwargs) -> T:
        with session.lock:
            try:
                return handler(session, *args, **kwargs)
            except WorkbenchError as error:
                # The page shows messages as HTML, and they may quote what was typed.
                message = escape(str(error), quote=False)
                raise gr.Error(message, print_exception=False) from error

    return run


# Prompts as text: one a line, "prompt => answer" where an answer is to be followed


def as_lines(probes: Sequence[Probe], kind: str) -> str:
    """The prompts of one kind as text."""
    lines = []
    for probe in probes:
        if probe.kind == kind:
            answer = f" => {probe.target}" if probe.target and kind in _WITH_ANSWER else ""
            lines.append(" ".join(probe.prompt.splitlines()) + answer)
    return "\n".join(lines)


def read_lines(text: str, kind: str, target: str | None = None) -> tuple[Probe, ...]:
    """Text as probes; `target` is for the lines that name no answer."""
    parts = (line.partition(" => ") for line in text.splitlines())
    return tuple(
        Probe(prompt.strip(), kind, answer.strip() or target)
        for prompt, _, answer in parts
        if prompt.strip()
    )


def read_form(prompt: str, target: str, *lists: str) -> tuple[Probe, ...]:
    """The probes that the form describes: the edit's own prompt, then the lists of `LISTED`."""
    wanted = target.strip() or None
    probes = (Probe(prompt.strip(), "edit", wanted),) if prompt.strip() else ()
    for kind, text in zip(LISTED, lists, strict=True):
        probes += read_lines(text, kind, None if kind in _WITH_ANSWER else wanted)
    return probes
