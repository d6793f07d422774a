"""One training run: its folder, from which it can be resumed, its state and its thread."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from apps.editor.shelf import OpenModel
from workbench import EditorError, WorkbenchError
from workbench.files import write_text
from workbench.training import LOG, Trainer

ABOUT, EDITOR = "run.json", "editor.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run does: enough to start it, and to resume it on another day.

    Args:
        model: The model's source.
        precision: How its weights are held.
        data: "facts", or FORMAT:FILE with a file in the run's folder of data.
        editor: Settings of the editor, as JSON values.
        training: Settings of training, as JSON values.
        skip_bad: Leave out records that cannot be read.
        chat: Prompts are read through the model's chat template.
        state: "running", "stopped", "finished" or "failed".
        said: Why it failed, or how it ended.
        server: Process id and start time of the server that began it last.
    """

    model: str
    precision: str
    data: str
    editor: dict[str, Any]
    training: dict[str, Any]
    skip_bad: bool = False
    chat: bool = False
    state: str = "running"
    said: str = ""
    server: Sequence[float] = ()


class Run:
    """One run and its folder.

    Args:
        folder: Of the run; its name is the run's.
        plan: What it does.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.name = folder.name
        self.seconds_per_step: float | None = None
        self.stopping = threading.Event()
        self._live = False
        self._read: tuple[float, list[dict[str, Any]]] = (0.0, [])

    @classmethod
    def at(cls, folder: Path) -> Run:
        """A run of this server or of an earlier one.

        Raises:
            EditorError: The folder holds none.
        """
        try:
            return cls(folder, Plan(**json.loads((folder / ABOUT).read_text("utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise EditorError(f"{folder.name} is no training run ({error!r}).") from None

    @property
    def state(self) -> str:
        """The plan's; "interrupted" where its server has ended, "elsewhere" where it has not."""
        if self._live:
            return "stopping" if self.stopping.is_set() else "running"
        if self.plan.state != "running":
            return self.plan.state
        return "elsewhere" if _is_another(self.plan.server) else "interrupted"

    @property
    def live(self) -> bool:
        return self._live

    @property
    def steps(self) -> int:
        return int(self.plan.training["steps"])

    @property
    def step(self) -> int:
        """Steps done, as far as they are logged."""
        return max((record["step"] for record in self.records()[-2:]), default=0)

    @property
    def keeps_editor(self) -> bool:
        """Whether there is an editor to edit with."""
        return self.plan.state != "failed" and (self.folder / EDITOR).exists()

    def records(self) -> list[dict[str, Any]]:
        """The log's records so far; the list is read again only where the file has changed."""
        try:
            changed = (self.folder / LOG).stat().st_mtime_ns
            if changed != self._read[0]:
                whole = (self.folder / LOG).read_text().rpartition("\n")[0]
                self._read = changed, [json.loads(line) for line in whole.splitlines()]
        except FileNotFoundError:
            return []
        return self._read[1]

    def note(self, state: str, said: str = "") -> None:
        """Keep the run's state in its folder."""
        self.plan = replace(self.plan, state=state, said=said)
        write_text(self.folder / ABOUT, json.dumps(asdict(self.plan), indent=2) + "\n")

    def train(self, trainer: Trainer, model: OpenModel) -> None:
        """Run to the end, or until stopped; the thread's work."""
        try:
            self.note(*self._outcome(trainer))
            if self.keeps_editor:
                model.add(self.folder)
        finally:
            model.users.discard(self)
            self._live = False

    def _outcome(self, trainer: Trainer) -> tuple[str, str]:
        try:
            progress = trainer.run(resume=True, bar=False)
            early = self.stopping.is_set() and progress.step < self.steps
            if early:
                return "stopped", ""
            if progress.step < self.steps:
                return "finished", f"It stopped improving after step {progress.best_step}."
            return "finished", ""
        except WorkbenchError as error:
            return "failed", str(error)
        except Exception as error:  # the thread's last word: nobody else would hear of it
            _log.exception("Training run %s", self.name)
            return "failed", f"{type(error).__name__}: {error}"

    def begin(self, trainer: Trainer, model: OpenModel) -> None:
        """Train in the background, over the model that all users share."""
        self.plan = replace(self.plan, server=_server(os.getpid()))
        self.note("running")
        self._live = True
        model.users.add(self)
        # A daemon: a server that ends does not wait; the run goes on from its last checkpoint.
        threading.Thread(target=self.train, args=(trainer, model), daemon=True).start()


def _server(pid: int) -> tuple[float, float]:
    return pid, psutil.Process(pid).create_time()


def _is_another(server: Sequence[float]) -> bool:
    """Whether that process lives, and is not this one; ids are used again, with other times."""
    try:
        pid, began = server
        return pid != os.getpid() and abs(_server(int(pid))[1] - began) < 2
    except (ValueError, psutil.Error):
        return False
