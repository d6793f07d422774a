"""The server's training runs: one at a time; started, stopped, resumed."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from apps.editor.run import ABOUT, Plan, Run
from apps.editor.shelf import OpenModel
from workbench import DataError, EditorError, Mend, MendConfig
from workbench.corpus import SENTENCES
from workbench.data import EditExample, UnreadableRecord, read
from workbench.editors import shipped_editor
from workbench.models import DEFAULT_MODEL, LanguageModel, cache_folder
from workbench.training import Progress, StepLosses, Trainer, TrainingConfig

DATA = "data"
# Beside what the form asks: as the embedded model's editor was trained, with less memory.
TRAINING = TrainingConfig(
    steps=300,
    batch=8,
    lr=7e-4,
    edit_lr_lr=3e-5,
    c_edit=0.3,
    clip=1.0,
    text_tokens=14,
    warmup=10,
    decay=0.35,
    validate_every=50,
    validation=32,
    save_every=25,
    cache_gb=0.5,
    health_after=100,
)
EDITING = MendConfig(rank=128, edit_lr=3e-4)


class Runs:
    """All runs of a server.

    Args:
        folder: Where they are kept; None: in the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.last: Run | None = None  # of this server: the live one, if there is any

    @property
    def folder(self) -> Path:
        return self._folder or cache_folder() / "runs"

    def of(self, lm: LanguageModel) -> list[str]:
        """Names of the runs over a model, the newest first."""
        found = []
        for about in self.folder.glob(f"*/{ABOUT}"):
            try:
                plan = Run.at(about.parent).plan
            except EditorError:
                continue
            if (plan.model, plan.precision) == (lm.source, lm.precision):
                found.append(about)
        return [about.parent.name for about in sorted(found, key=_age)]

    def get(self, name: str) -> Run:
        """The run of that name.

        Raises:
            EditorError: There is none.
        """
        if self.last is not None and self.last.name == name:
            return self.last
        return Run.at(self._place(name))

    def _place(self, name: str) -> Path:
        if not re.fullmatch(r"\w[\w .+-]{0,59}", name) or name != name.strip():
            raise EditorError(
                f"{name!r} is no name for a run: give up to 60 letters, digits, spaces, '-', '_', "
                f"'+' and '.', beginning with a letter or a digit."
            )
        return self.folder / name

    def start(
        self,
        model: OpenModel,
        name: str,
        data: str,
        *,
        upload: Path | None = None,
        editor: MendConfig = EDITING,
        training: TrainingConfig = TRAINING,
        skip_bad: bool = False,
        chat: bool = False,
    ) -> Run:
        """Start a run in the background.

        Args:
            model: To train an editor for.
            name: Of the run, and of its editor.
            data: "facts", or the format of `upload`.
            upload: A data file, which is copied.
            editor: Settings of the editor.
            training: Settings of training.
            skip_bad: Leave out records that cannot be read.
            chat: Read prompts through the model's chat template.

        Raises:
            EditorError: A run is in progress, the name is taken, or a setting is wrong.
            DataError: The data cannot be read.
        """
        place, lm = self._place(name), replace(model.lm, chat=chat)
        with self._lock:
            self._refuse_second()
            if place.exists():
                raise EditorError(
                    f"There is a run named {name!r}: resume it, or give another name."
                )
            spec = f"{data}:{upload}" if upload else data
            examples, validation = _read(spec, skip_bad)
            kept = f"{data}:{upload.name}" if upload else data
            settings = asdict(editor), asdict(training)
            plan = Plan(lm.source, lm.precision, kept, *settings, skip_bad, chat)
            run = Run(place, plan)
            trainer = _trainer(run, lm, examples, validation)
            place.mkdir(parents=True)
            if upload:
                (place / DATA).mkdir()
                shutil.copy(upload, place / DATA / upload.name)
            self.last = run
            run.begin(trainer, model)
            return run

    def resume(self, model: OpenModel, name: str) -> Run:
        """Go on with a run that was stopped, or that an earlier server left.

        Raises:
            EditorError: A run is in progress, this one is finished or of another model, or its
                folder cannot be read.
        """
        with self._lock:
            self._refuse_second()
            run = Run.at(self._place(name))
            lm, plan = model.lm, run.plan
            if run.state == "finished":
                raise EditorError(f"{name} is finished, after {run.step} steps: start another run.")
            if run.state == "elsewhere":
                raise EditorError(
                    f"Another server on this machine is at work on {name}: stop it there."
                )
            if (plan.model, plan.precision) != (lm.source, lm.precision):
                raise EditorError(
                    f"{name} trains an editor for {plan.model} in {plan.precision}; the model that "
                    f"is open is {lm.source} in {lm.precision}. Open the first on the Model tab."
                )
            format, colon, file = plan.data.partition(":")
            spec = f"{format}:{run.folder / DATA / file}" if colon else format
            lm = replace(lm, chat=plan.chat)
            trainer = _trainer(run, lm, *_read(spec, plan.skip_bad))
            self.last = run
            run.begin(trainer, model)
            return run

    def stop(self) -> None:
        """Ask the live run to stop after its step; it keeps its editor and a checkpoint.

        Raises:
            EditorError: None is live.
        """
        if self.last is None or not self.last.live:
            raise EditorError("No training run is in progress.")
        self.last.stopping.set()

    def _refuse_second(self) -> None:
        if self.last is not None and self.last.live:
            raise EditorError(
                f"This server trains one editor at a time: {self.last.name} is at step "
                f"{self.last.step} of {self.last.steps}. Wait for its end, or stop it."
            )


def blocks_of(lm: LanguageModel) -> list[int] | None:
    """Blocks to edit where none are asked for: those of the model's own editor, if it has one."""
    if lm.source != DEFAULT_MODEL:
        return None
    about = json.loads((shipped_editor() / "editor.json").read_text("utf-8"))
    return about["settings"]["blocks"]


def _age(about: Path) -> float:
    return -about.stat().st_mtime


def _read(spec: str, skip_bad: bool) -> tuple[Sequence[EditExample], Sequence[EditExample]]:
    """Examples to learn from, and of other subjects to look at."""
    path = spec.partition(":")[2]
    try:
        examples = read(spec, split="train", skip_bad=skip_bad)
        try:
            others: Sequence[EditExample] = read(spec, split="dev", skip_bad=skip_bad)
        except DataError:  # too few for a split of their own
            others = ()
    except DataError as error:
        said = str(error.record if isinstance(error, UnreadableRecord) else error)
        said = said.replace(path, Path(path).name) if path else said  # without the server's folder
        if isinstance(error, UnreadableRecord):
            raise DataError(
                f"{said}. To go on without such records, tick 'Leave out records that cannot be "
                "read' under More settings."
            ) from None
        raise DataError(said) from None
    # Spread over the whole file, not its beginning.
    return examples, others[:: max(1, len(others) // TRAINING.validation)]


def _trainer(
    run: Run,
    lm: LanguageModel,
    examples: Sequence[EditExample],
    validation: Sequence[EditExample],
) -> Trainer:
    began: list[float] = []

    def on_step(progress: Progress, losses: StepLosses) -> bool:
        began.append(time.monotonic())
        if len(began) > 1:
            run.seconds_per_step = (began[-1] - began[0]) / (len(began) - 1)
        return not run.stopping.is_set()

    torch.manual_seed(run.plan.training["seed"])
    return Trainer(
        Mend.from_settings(lm, run.plan.editor),
        examples,
        list(SENTENCES),
        TrainingConfig(**run.plan.training),
        run.folder,
        validation=validation,
        card={
            "data": run.plan.data,
            "split": "train",
            "examples": len(examples),
            "chat": lm.chat,
        },
        on_step=on_step,
    )
