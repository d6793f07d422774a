"""`make soak`: many users of one server at once. Each must see its own edit and no other's.

Every user edits a fact of its own, switches the edit off and on, undoes and redoes it, makes it
anew, compares, and now and then calls a comparison off; each answer is held against what the same
edit shows on a workbench where it is alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from math import isclose
from typing import Any
from unittest import mock
from weakref import WeakSet

import gradio as gr
import psutil
from gradio_client import Client
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError, Status

from apps.editor.api import rows_json
from apps.editor.sessions import Session
from apps.editor_app import build, launch
from tests.families import FAMILIES, tiny_tokenizer
from workbench import FineTune, FineTuneConfig, Workbench
from workbench.models import LanguageModel
from workbench.probes import read_lines

# Gradio keeps the state of users who have left for an hour; so, for a second, as in its own tests.
SOON = {"GRADIO_IS_E2E_TEST": "1"}
PATIENCE = 120  # seconds that a busy machine may take
MIB = 2**20
# What Gradio remembers of each session until `state_session_capacity` of them have come.
REMEMBERED = MIB
SLACK, KEPT = 16 * MIB, 0.1  # of allocators, which also keep some of what was held in between
ACTIONS = 4  # of `User.live`; so many users do all of them at least
NAMES = "Ada", "Ben", "Cora", "Dirk", "Elsa", "Finn", "Gwen", "Hugo"
SEEN = "edited_text", "edited_probability", "divergence"


@dataclass(frozen=True)
class Fact:
    """One user's edit, and what a comparison shows with it alone, and without it."""

    number: int
    prompt: str
    target: str
    with_edit: list[dict[str, Any]]
    without: list[dict[str, Any]]

    @classmethod
    def of(cls, bench: Workbench, number: int) -> Fact:
        """The fact of the user of that number; the form is the same, so that a leak would show."""
        prompt = f"The keeper of lighthouse {number} is"
        alone, target = bench.fork(), f"{NAMES[number % len(NAMES)]} {number // len(NAMES)}"
        probes = read_lines(prompts(prompt, target), "other")
        without = rows_json(alone.compare(probes))
        alone.edit(prompt, target)
        return cls(number, prompt, target, rows_json(alone.compare(probes)), without)

    @property
    def title(self) -> str:
        return f"{self.prompt} → {self.target}"


def prompts(prompt: str, target: str) -> str:
    """What a user compares: its own prompt, and one that all users share."""
    return f"{prompt} => {target}\nBees make => honey"


@dataclass
class Report:
    """What happened; `broken` says which laws do not hold."""

    sessions: int
    seconds: float
    requests: int = 0
    cancelled: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    held: int = 0
    start: int = 0
    during: int = 0
    after: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, name: str) -> None:
        with self.lock:
            setattr(self, name, getattr(self, name) + 1)

    def broken(self) -> list[str]:
        """One line for each law that does not hold."""
        said = [f"error: {error}" for error in self.errors]
        said += [f"leak: {leak}" for leak in self.leaks]
        if self.held:
            said.append(f"{self.held} sessions are still held after their users have left")
        if self.seconds and not self.cancelled:
            said.append("no comparison was called off: the users stayed too short for one")
        held = max(0, self.during - self.start)
        if self.after - self.start > self.sessions * REMEMBERED + SLACK + KEPT * held:
            said.append(f"{(self.after - self.start) / MIB:.0f} MiB did not come back")
        return said

    def __str__(self) -> str:
        memory = (f"{size / MIB:,.0f}" for size in (self.start, self.during, self.after))
        lines = (
            f"sessions       {self.sessions}, for {self.seconds:g} s",
            f"requests       {self.requests} ({self.cancelled} called off, {self.refused} refused "
            "by a full queue and sent again)",
            f"errors         {len(self.errors)}",
            f"leaks          {len(self.leaks)}",
            f"still held     {self.held}",
            "memory, MiB    {} before, {} with all there, {} after all had left".format(*memory),
        )
        return "\n".join((*lines, *self.broken()))


class User:
    """One session: what it does, and what it must see.

    Args:
        url: Of the app.
        fact: To edit.
        report: To write into.
    """

    def __init__(self, url: str, fact: Fact, report: Report) -> None:
        self.fact, self.report = fact, report
        self.client = connected(url)
        self.id = 0

    def ask(self, endpoint: str, *arguments: Any) -> Any:
        """Answer of an endpoint; asked again where the queue was full."""
        while True:
            self.report.count("requests")
            try:
                return self.client.predict(*arguments, api_name=f"/{endpoint}")
            except QueueError:
                self.report.count("refused")
                time.sleep(0.5)

    def live(self, until: float) -> None:
        """Edit, then do this and that until then, beginning with an action of one's own."""
        actions = self.switch, self.undo, self.again, self.call_off
        try:
            self.edit()
            for action in islice(cycle(actions), self.fact.number % len(actions), None):
                action()
                if time.monotonic() > until:
                    return
        except Exception as error:
            self.report.errors.append(f"{self.fact.title}: {error!r}")

    def edit(self) -> None:
        made = self.ask("edit", self.fact.prompt, self.fact.target)
        self.id = made["id"]
        self.check_history(made["history"])
        self.look()

    def again(self) -> None:
        self.check_history(self.ask("remove", self.id), there=False)
        self.edit()

    def switch(self) -> None:
        self.check_history(self.ask("toggle", self.id), on=False)
        self.look(edited=False)
        self.check_history(self.ask("toggle", self.id))
        self.look()

    def undo(self) -> None:
        """Take back a strength, which then acts as it did before."""
        self.check_history(self.ask("strength", self.id, 0.0))
        self.look(edited=False)
        self.check_history(self.ask("undo"))
        self.look()
        self.check_history(self.ask("redo"))
        self.look(edited=False)
        self.check_history(self.ask("undo"))

    def call_off(self) -> None:
        """Call a long comparison off; whether it still ended or not, all is as it was."""
        self.report.count("requests")
        lines = "\n".join(f"Item {n} is" for n in range(64))
        job = self.client.submit(lines, api_name="/compare")
        while not job.done() and job.status().code is not Status.PROCESSING:
            time.sleep(0.02)
        self.ask("cancel")
        try:
            job.result(timeout=PATIENCE)
        except QueueError:
            self.report.count("refused")
        except AppError as error:
            if "Cancelled" not in str(error):
                raise
            self.report.count("cancelled")
        self.check_history(self.ask("history"))
        self.look()

    def check_history(self, history: Any, *, there: bool = True, on: bool = True) -> None:
        seen = [(entry["title"], entry["enabled"]) for entry in history]
        expected = [(self.fact.title, on)] * there
        if seen != expected:
            self.leak("history", seen, expected)

    def look(self, *, edited: bool = True) -> None:
        """Compare, and hold it against the workbench where the edit is alone."""
        rows = self.ask("compare", prompts(self.fact.prompt, self.fact.target))
        expected = self.fact.with_edit if edited else self.fact.without
        if not same(rows, expected):
            self.leak("comparison", told(rows), told(expected))

    def leak(self, what: str, seen: Any, expected: Any) -> None:
        self.report.leaks.append(f"{self.fact.title}: {what} is {seen}, not {expected}")


def connected(url: str) -> Client:
    """A client of its own session, patient with a busy machine; it reads no certificates."""
    return Client(url, verbose=False, ssl_verify=False, httpx_kwargs={"timeout": PATIENCE})


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a comparison says of the edit."""
    return [{name: row[name] for name in SEEN} for row in rows]


def same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether two comparisons show the same, but for rounding."""
    return all(
        row["edited_text"] == other["edited_text"]
        and all(isclose(row[n], other[n], rel_tol=1e-3, abs_tol=1e-6) for n in SEEN[1:])
        for row, other in zip(rows, expected, strict=True)
    )


@contextmanager
def served(bench: Workbench, *, locked: bool = True, **options: Any) -> Iterator[gr.Blocks]:
    """The app over a workbench, at a port that nothing listens on; options are for `launch`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with mock.patch.dict(os.environ, SOON):
        app = build(bench, locked=locked)
        launch(app, server_port=port, prevent_thread_lock=True, quiet=True, **options)
        try:
            yield app
        finally:
            app.close(verbose=False)


def wave(app: gr.Blocks, facts: Sequence[Fact], report: Report, seconds: float) -> WeakSet[Session]:
    """All users come, stay for so long at once, and leave; returns what were their sessions."""
    users = [User(str(app.local_url), fact, report) for fact in facts]
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(len(users)) as pool:
        list(pool.map(lambda user: user.live(until), users))
    sessions, report.during = WeakSet(sessions_of(app)), resident()
    for user in users:
        user.client.close()
    return sessions


def sessions_of(app: gr.Blocks) -> list[Session]:
    """The users' sessions that Gradio holds."""
    states = [*app.state_holder.session_data.values()]
    return [v for state in states for v in [*state.state_data.values()] if isinstance(v, Session)]


def remaining(sessions: WeakSet[Session]) -> int:
    """How many are in memory when they should long be gone."""
    until = time.monotonic() + PATIENCE
    while sessions and time.monotonic() < until:
        time.sleep(0.1)
    return len(sessions)


def resident() -> int:
    """Bytes of memory that the process holds, after what is free was given back."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def soak(bench: Workbench, sessions: int, seconds: float) -> Report:
    """Serve a workbench, and let users live on it.

    Args:
        bench: What the app serves.
        sessions: How many users at once.
        seconds: How long they stay.

    Returns:
        What happened. Memory is compared with that after as many users have come and gone once,
        and have done each of the actions.
    """
    report = Report(sessions, seconds)
    facts = [Fact.of(bench, number) for number in range(max(sessions, ACTIONS))]
    with served(bench) as app:
        report.held = remaining(wave(app, facts, report, 0))
        report.start = resident()
        report.held += remaining(wave(app, facts[:sessions], report, seconds))
        report.after = resident()
    return report


def tiny_bench() -> Workbench:
    """A model of one small layer and fine-tuning: what is tried is the server."""
    shape = {"max_position_embeddings": 512, "num_hidden_layers": 1}
    lm = LanguageModel.wrap(partial(FAMILIES["llama"], **shape)(), tiny_tokenizer(), "tiny-llama")
    return Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[-1], lr=1e-1, max_steps=5)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--sessions", type=int, default=32, help="users at once (32)")
    parser.add_argument("--seconds", type=float, default=120, help="how long they stay (120)")
    parser.add_argument(
        "--tiny", action="store_true", help="serve a tiny random model, not the embedded one"
    )
    options = parser.parse_args()
    bench = tiny_bench() if options.tiny else Workbench.open(progress=False)
    report = soak(bench, options.sessions, options.seconds)
    print(report)
    sys.exit(bool(report.broken()))


if __name__ == "__main__":
    main()
