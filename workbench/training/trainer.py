"""The training loop: optimiser, validation, early stopping, checkpoints that resume, health."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from workbench import parallel
from workbench.data import EditExample
from workbench.editors.base import TrainableEditor
from workbench.errors import EditorError
from workbench.files import (
    MALFORMED,
    flat_optimizer,
    read_tensors,
    restore_optimizer,
    write_tensors,
    write_text,
    writing,
)
from workbench.shortage import memory_errors
from workbench.training.config import TrainingConfig
from workbench.training.sampling import TextSampler
from workbench.training.step import MetaStep, StepLosses

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


@dataclass
class Progress:
    """Where training stands: saved with each checkpoint.

    Args:
        step: Optimiser steps done.
        best_loss: Lowest validation loss so far.
        best_step: When that was.
        looks_without_gain: Validations since.
        history: One record for each validation: its step and losses.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    looks_without_gain: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Meta-trains an editor and keeps the best one in a folder.

    Of several processes (`parallel.join`) each takes its share of every batch and makes the same
    steps; the first one writes. Of a run in one process it differs by rounding alone.

    Args:
        editor: Trained in place.
        examples: Training edits.
        texts: Unrelated texts that edits must not move.
        config: Settings.
        folder: Receives `checkpoint.safetensors` (to resume), `editor.safetensors` (the best on
            validation, to open) and `log.jsonl`.
        validation: Edits of other subjects; none: no validation, the last editor is kept.
        card: What the model card should say of the data.
        on_step: Called with the progress and each step's losses; returning False stops training
            at that step, with a checkpoint. Processes must answer alike.
        on_record: Called with each record that is written to `log.jsonl`.
        cache_folder: Keep what is constant in training there, too: for a model whose hidden states
            memory does not hold (`cache_gb`), and for later runs over the same layers.

    Raises:
        EditorError: There are no examples, or the batch has no share for each process.
    """

    def __init__(
        self,
        editor: TrainableEditor,
        examples: Sequence[EditExample],
        texts: Sequence[str],
        config: TrainingConfig,
        folder: str | Path,
        *,
        validation: Sequence[EditExample] = (),
        card: dict[str, Any] | None = None,
        on_step: Callable[[Progress, StepLosses], bool | None] | None = None,
        on_record: Callable[[Mapping[str, Any]], object] | None = None,
        cache_folder: str | Path | None = None,
    ) -> None:
        if config.batch < config.at_once * parallel.count():
            raise EditorError(
                f"A batch of {config.batch} is too small for {parallel.count()} processes: each "
                f"takes {config.at_once} edits (at_once) or more. Give a batch of at least "
                f"{config.at_once * parallel.count()}, or start fewer processes."
            )
        if editor.scoped and config.at_once > 1:
            raise EditorError(
                f"at_once is {config.at_once}, but an editor with a scope is trained on edits that "
                f"live alone. Leave at_once out, or train without a scope."
            )
        self.editor, self.config, self.folder = editor, config, Path(folder)
        self.sampler = TextSampler(editor.lm, examples, texts, config, editor.scoped)
        self.meta = MetaStep(
            editor, config, cache_folder=Path(cache_folder) if cache_folder else None
        )
        chooser = random.Random(config.seed)
        self._looks = [self.sampler.texts(e, chooser) for e in validation[: config.validation]]
        self._card, self._on_step, self._on_record = card or {}, on_step, on_record
        alphas = {"edit_lr_lr": "lr"} if config.one_alpha_optimizer else {}
        groups = [
            {"params": parameters, "base_lr": getattr(config, alphas.get(name, name))}
            for name, parameters in editor.learned().items()
        ]
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
        self.progress = Progress()
        # Health compares the edit losses of two windows: the first steps and the latest.
        self._window, self._health_at = min(50, config.health_after // 2), config.health_after
        self._recent: deque[StepLosses] = deque(maxlen=self._window)
        self._first: list[float] = []

    def run(self, *, resume: bool = False, bar: bool = True) -> Progress:
        """Train up to `config.steps`, or until validation stops improving.

        Args:
            resume: Go on from the folder's checkpoint, if there is one.
            bar: Show a progress bar with the losses.

        Raises:
            EditorError: The folder holds a training run and `resume` is off; processes find
                different ones; or training has failed, with a diagnosis: losses not finite, an
                edit loss that does not fall, an editor that changes nothing.
        """
        checkpoint = self.folder / CHECKPOINT
        if resume and checkpoint.exists():
            self._restore()
        elif checkpoint.exists():
            raise EditorError(
                f"{self.folder} holds a training run. Resume it (resume=True, --resume), or give "
                f"another folder."
            )
        parallel.agree(self.progress.step, f"the step of the run in {self.folder}")
        if parallel.leads():
            self._trim_log()
        self.editor.train()
        advice = (
            f"Give a smaller batch ({self.config.batch}) or chunk, or shorter texts; the last "
            f"checkpoint is in {self.folder}."
        )
        with (
            memory_errors(advice),
            tqdm(
                total=self.config.steps,
                initial=self.progress.step,
                disable=not bar or not parallel.leads(),
                desc="training",
            ) as shown,
        ):
            while self.progress.step < self.config.steps:
                losses = self._step()
                shown.update()
                shown.set_postfix(edit=f"{losses.edit:.3f}", locality=f"{losses.locality:.4f}")
                stop = self._on_step is not None and self._on_step(self.progress, losses) is False
                step, last = self.progress.step, self.progress.step == self.config.steps
                validate = self._looks and (step % self.config.validate_every == 0 or last)
                if validate:
                    stop = self._validate() or stop
                if stop or validate or step % self.config.save_every == 0:
                    self._save()
                if stop:
                    break
        self.editor.eval()
        if not self.progress.history:
            self._keep_editor()
        self._save()
        return self.progress

    def _step(self) -> StepLosses:
        step, config = self.progress.step, self.config
        late = int(config.late_first_step)
        first = step * config.accumulate + (late if step else 0)
        for index in range(first, (step + 1) * config.accumulate + late):
            at_once = config.together(index)
            losses = self.meta.losses(self.sampler.batch(index), at_once=at_once)
            self._check_finite(losses)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parallel.add_gradients(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if not torch.isfinite(norm):  # before it reaches the weights, and a checkpoint
            raise EditorError(
                f"Training stopped at step {step + 1}: the gradient is not finite. Lower lr "
                f"({config.lr}), or open the model with dtype='float32'; the last checkpoint is "
                f"in {self.folder}."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * config.lr_factor(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self._recent.append(losses)
        self._log({"step": self.progress.step, "gradient_norm": float(norm), **asdict(losses)})
        self._check_health()
        return losses

    def _check_finite(self, losses: StepLosses) -> None:
        if not math.isfinite(losses.total):
            if not math.isfinite(losses.edit_before):
                raise EditorError(
                    f"Training stopped at step {self.progress.step + 1}: the model's loss is not "
                    f"finite before any edit. Its weights are damaged, or overflow in "
                    f"{self.editor.lm.dtype}: open it with dtype='float32'."
                )
            part = "edit" if not math.isfinite(losses.edit) else "locality"
            raise EditorError(
                f"Training stopped at step {self.progress.step + 1}: the {part} loss is not "
                f"finite. Lower lr ({self.config.lr}) or edit_lr, or clip lower "
                f"({self.config.clip}); the last checkpoint is in {self.folder}."
            )

    def _check_health(self) -> None:
        if self.progress.step <= self._window:
            self._first.append(self._recent[-1].edit)
        if self.progress.step != self._health_at or not self._window:
            return
        edit, before, locality = (
            sum(getattr(losses, name) for losses in self._recent) / self._window
            for name in ("edit", "edit_before", "locality")
        )
        first = sum(self._first) / len(self._first)
        if edit > 0.99 * before and locality < 1e-3:
            raise EditorError(
                f"Training stopped at step {self.progress.step}: this editor changes nothing (edit "
                f"loss {edit:.3f} after the edit, {before:.3f} before it). Raise edit_lr (alpha "
                f"starts at {self.editor.config.edit_lr}) or c_edit ({self.config.c_edit})."
            )
        if edit >= first:
            raise EditorError(
                f"Training stopped at step {self.progress.step}: the edit loss does not fall "
                f"({first:.3f} at the start, {edit:.3f} now). Raise lr ({self.config.lr}) or "
                f"c_edit ({self.config.c_edit}), or check the data's targets."
            )

    @torch.no_grad()
    def validation_losses(self) -> StepLosses:
        """Mean losses over the validation edits, with the editor as it is; nothing is learned."""
        training, size = self.editor.training, self.config.batch
        self.editor.eval()
        looks = [
            (len(part), self.meta.losses(part, backward=False))
            for part in (self._looks[i : i + size] for i in range(0, len(self._looks), size))
        ]
        self.editor.train(training)
        total = sum(count for count, _ in looks)
        means = {
            name: sum(count * getattr(losses, name) for count, losses in looks) / total
            for name in StepLosses.__dataclass_fields__
        }
        return StepLosses(**means)

    def _validate(self) -> bool:
        """Look at the validation edits; returns whether to stop."""
        losses, progress = self.validation_losses(), self.progress
        progress.history.append({"step": progress.step, **asdict(losses)})
        self._log({"step": progress.step, "validation": asdict(losses)})
        if losses.total < progress.best_loss:
            progress.best_loss, progress.best_step = losses.total, progress.step
            progress.looks_without_gain = 0
            self._keep_editor()
            return False
        progress.looks_without_gain += 1
        return 0 < self.config.patience <= progress.looks_without_gain

    def _keep_editor(self) -> None:
        if not parallel.leads():
            return
        self.editor.card = {
            **self._card,
            "steps": self.progress.step,
            "edits_seen": self.progress.step * self.config.batch * self.config.accumulate,
            "training": asdict(self.config),
            "validation": self.progress.history[-1] if self.progress.history else None,
        }
        self.editor.save_pretrained(self.folder)

    def _log(self, record: dict[str, Any]) -> None:
        if not parallel.leads():
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder / LOG), (self.folder / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._on_record:
            self._on_record(record)

    def _trim_log(self) -> None:
        """Drop what a killed run wrote after its last checkpoint: those steps come again."""
        log = self.folder / LOG
        if log.exists():
            lines = log.read_text("utf-8", "replace").rpartition("\n")[0].splitlines()
            kept = (line for line in lines if 0 < _step_of(line) <= self.progress.step)
            write_text(log, "".join(f"{line}\n" for line in kept))

    def _save(self) -> None:
        if not parallel.leads():
            return
        tensors = {f"editor.{k}": v for k, v in self.editor.state_dict().items()}
        about = {
            "progress": asdict(self.progress),
            "settings": self.editor.settings(),
            "training": asdict(self.config),
            "first": self._first,
        }
        write_tensors(
            self.folder / CHECKPOINT,
            tensors | flat_optimizer(self.optimizer),
            {"about": json.dumps(about)},
        )

    def _restore(self) -> None:
        tensors, metadata = read_tensors(self.folder / CHECKPOINT, EditorError)
        try:
            about = json.loads(metadata["about"])
            settings, training = about["settings"], dict(about["training"])
            first = [float(loss) for loss in about["first"]]
            progress = Progress(**about["progress"])
            if not all(
                isinstance(getattr(progress, name), type(value))
                for name, value in vars(Progress()).items()
            ):
                raise ValueError(f"progress {progress}")
        except MALFORMED as error:
            raise EditorError(
                f"{self.folder}/{CHECKPOINT} is no training run that this version can resume "
                f"({error!r}). Give another folder."
            ) from None
        for name in ("batch", "accumulate", "seed"):  # they say which examples come next
            if training.get(name) != getattr(self.config, name):
                raise EditorError(
                    f"{self.folder} holds a run with {name}={training.get(name)}; this one has "
                    f"{getattr(self.config, name)}. Give the same, or another folder."
                )
        mine = json.loads(json.dumps(self.editor.settings()))
        if settings != mine:
            raise EditorError(
                f"{self.folder} holds a run with other editor settings: {settings}; this one has "
                f"{mine}. Give the same settings or another folder."
            )
        prefix = "editor."
        try:
            self.editor.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        except RuntimeError as error:
            raise EditorError(
                f"{self.folder} holds a run over a model of other widths than "
                f"{self.editor.lm.source}: {error}. Give that model or another folder."
            ) from None
        restore_optimizer(self.optimizer, tensors)
        if self.config.reset_statistics:
            self.editor.reset_statistics()
        self.progress, self._first = progress, first
        # A checkpoint does not hold the latest losses: health waits until there are enough again.
        if progress.step < self._health_at:
            self._health_at = max(self._health_at, progress.step + self._window)


def _step_of(line: str) -> int:
    """The step that a line of the log is about; 0 for one that a crash has garbled."""
    try:
        return int(json.loads(line)["step"])
    except MALFORMED:
        return 0
