"""Training runs: they repeat, resume, stop, keep the best editor, and say what is wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import language_model
from runs import RUN, editor_for, examples, left_by, trainer_for

from workbench.data import EditExample
from workbench.editors.base import TrainableEditor
from workbench.editors.mend import Mend
from workbench.errors import EditError, EditorError
from workbench.files import read_tensors, write_tensors
from workbench.training import CHECKPOINT, EditTexts, Progress, StepLosses, TextSampler, Trainer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = trainer_for(tmp_path_factory.mktemp("whole"))
    trainer.run(bar=False)
    return trainer


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_run_repeats_to_the_bit(tmp_path: Path, cache_gb: float):
    once, again = (trainer_for(tmp_path / name, cache_gb=cache_gb) for name in "ab")
    once.run(bar=False)
    torch.rand(5)  # the global random state plays no part
    again.run(bar=False)
    assert left_by(again) == left_by(once)


def test_another_seed_makes_another_run(whole_run: Trainer, tmp_path: Path):
    other = trainer_for(tmp_path, seed=1)
    other.run(bar=False)
    assert other.progress.best_loss != whole_run.progress.best_loss


class Killed(Exception):
    """Stands for whatever ends a run between two checkpoints."""


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_run_resumes_to_the_bit(whole_run: Trainer, tmp_path: Path, step: int, kill: bool):
    def end(progress: Progress, losses: StepLosses) -> bool:
        if kill and progress.step == step:
            raise Killed
        return progress.step != step

    broken = trainer_for(tmp_path, on_step=end)
    if kill:
        with pytest.raises(Killed):
            broken.run(bar=False)
        with (tmp_path / "log.jsonl").open("a") as log:
            log.write('{"step": 6, "edi')  # a line cut short
    else:
        assert broken.run(bar=False).step == step
    resumed = trainer_for(tmp_path)
    assert resumed.run(resume=True, bar=False).step == 6
    assert left_by(resumed) == left_by(whole_run)


def test_a_cached_run_resumes_to_rounding(whole_run: Trainer, tmp_path: Path):
    config: dict[str, Any] = {"cache_gb": 1.0}
    trainer_for(tmp_path, on_step=lambda progress, _: progress.step != 3, **config).run(bar=False)
    resumed = trainer_for(tmp_path, **config).run(resume=True, bar=False)
    for ours, theirs in zip(resumed.history, whole_run.progress.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_run_killed_at_any_moment_resumes_to_the_bit(tmp_path: Path):
    config: dict[str, Any] = {"steps": 20, "save_every": 1}
    code = f"""
import sys, time
from pathlib import Path
from runs import trainer_for

def say(progress, losses):
    print(progress.step, flush=True)
    time.sleep(0.05 if progress.step < 15 else 600)  # the kill comes before the end

trainer_for(Path(sys.argv[1]), on_step=say, **{config}).run(bar=False)
"""
    tests = Path(__file__).parent
    run = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "killed"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))},
    )
    with run:
        assert run.stdout
        assert "7\n" in run.stdout
        run.kill()
    assert run.returncode == -signal.SIGKILL
    whole = trainer_for(tmp_path / "whole", **config)
    whole.run(bar=False)
    resumed = trainer_for(tmp_path / "killed", **config)
    resumed.run(resume=True, bar=False)
    for unfinished in resumed.folder.glob(".*"):  # a file that was being written
        unfinished.unlink()
    assert left_by(resumed) == left_by(whole)


def test_a_finished_run_stays_as_it_is(whole_run: Trainer):
    before = left_by(whole_run)
    again = trainer_for(whole_run.folder)
    assert again.run(resume=True, bar=False).step == 6
    assert left_by(again) == before


def test_resuming_nothing_starts_anew(whole_run: Trainer, tmp_path: Path):
    trainer = trainer_for(tmp_path)
    trainer.run(resume=True, bar=False)
    assert left_by(trainer) == left_by(whole_run)


def test_a_folder_with_a_run_is_not_overwritten(whole_run: Trainer):
    before = left_by(whole_run)
    with pytest.raises(EditorError, match=r"holds a training run\. Resume it"):
        trainer_for(whole_run.folder).run(bar=False)
    assert left_by(whole_run) == before


def test_what_cannot_be_resumed_is_refused(tmp_path: Path):
    trainer_for(tmp_path, on_step=lambda *_: False).run(bar=False)
    checkpoint = tmp_path / CHECKPOINT
    tensors, _ = read_tensors(checkpoint, EditorError)

    def resume(editor: Mend | None = None) -> None:
        trainer_for(tmp_path, editor=editor).run(resume=True, bar=False)

    with pytest.raises(EditorError, match="other editor settings"):
        resume(editor_for("gpt2", rank=3, blocks=[-1]))
    with pytest.raises(EditorError, match="a model of other widths than tiny-llama"):
        resume(editor_for("llama", rank=2, blocks=[-1]))
    for about in ("{", "[]", "{}"):
        write_tensors(checkpoint, tensors, {"about": about})
        with pytest.raises(EditorError, match="no training run that this version can resume"):
            resume()
    checkpoint.write_bytes(b"")
    with pytest.raises(EditorError, match="damaged"):
        resume()


def test_the_log_has_every_step_and_every_look(whole_run: Trainer):
    lines = (whole_run.folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records if "validation" not in record]
    looks = [record["step"] for record in records if "validation" in record]
    assert (steps, looks) == ([1, 2, 3, 4, 5, 6], [3, 6])
    assert [look["step"] for look in whole_run.progress.history] == looks


def test_optimizer_follows_the_schedule(tmp_path: Path):
    lrs = []

    def look(progress: Progress, losses: StepLosses) -> None:
        lrs.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer = trainer_for(tmp_path, on_step=look)
    trainer.run(bar=False)
    factors = [trainer.config.lr_factor(step) for step in range(6)]
    assert lrs == [[RUN.lr * factor, RUN.edit_lr_lr * factor] for factor in factors]
    assert len(set(factors)) > 2


class Noting:
    """A sampler that notes which batches are drawn."""

    def __init__(self, sampler: TextSampler) -> None:
        self.sampler, self.drawn = sampler, []

    def batch(self, step: int) -> list[EditTexts]:
        self.drawn.append(step)
        return self.sampler.batch(step)


@pytest.mark.parametrize(("late", "first"), [(False, 3), (True, 4)])
def test_accumulation_takes_each_batch_once(tmp_path: Path, late: bool, first: int):
    config: dict[str, Any] = {"steps": 2, "accumulate": 3, "late_first_step": late}
    ends = []
    trainer = trainer_for(tmp_path, on_step=lambda *_: ends.append(len(noting.drawn)), **config)
    trainer.sampler = noting = Noting(trainer.sampler)  # type: ignore[assignment]
    trainer.run(bar=False)
    assert (noting.drawn, ends) == (list(range(first + 3)), [first, first + 3])


# Validation


def test_validation_changes_nothing(tmp_path: Path):
    trainer = trainer_for(tmp_path, steps=1)
    trainer.run(bar=False)
    for editor in (trainer.editor.train(), trainer.editor.eval()):
        mode, before = editor.training, {k: v.clone() for k, v in editor.state_dict().items()}
        losses = trainer.validation_losses()
        assert trainer.validation_losses() == losses
        assert editor.training == mode
        assert all(torch.equal(v, before[k]) for k, v in editor.state_dict().items())
        assert all(parameter.grad is None for parameter in editor.parameters())


def test_validation_is_the_mean_over_its_examples(tmp_path: Path):
    trainer = trainer_for(tmp_path, steps=1)
    trainer.run(bar=False)
    looks = trainer._looks
    assert len(looks) == 3  # a full batch and a rest
    apart = [trainer.meta.losses([edit], backward=False).edit for edit in looks]
    assert trainer.validation_losses().edit == pytest.approx(sum(apart) / 3, rel=1e-5)


def test_training_stops_when_validation_stops_improving(tmp_path: Path):
    editor = editor_for("gpt2", rank=2, blocks=[-1], normalize=False)
    config: dict[str, Any] = {"lr": 0.0, "edit_lr_lr": 0.0, "validate_every": 1, "patience": 2}
    progress = trainer_for(tmp_path, editor=editor, **config).run(bar=False)
    assert (progress.step, progress.best_step, progress.looks_without_gain) == (3, 1, 2)


def test_the_best_editor_is_kept(tmp_path: Path):
    trainer = trainer_for(tmp_path, lr=0.3, warmup=0, validate_every=1)
    progress = trainer.run(bar=False)
    totals = [look["total"] for look in progress.history]
    assert progress.best_loss == min(totals) < totals[-1]
    assert progress.best_step == totals.index(min(totals)) + 1
    kept = TrainableEditor.from_pretrained(tmp_path, trainer.editor.lm)
    assert isinstance(kept, Mend)
    assert (kept.card["steps"], kept.card["data"]) == (progress.best_step, "items")
    again = trainer_for(tmp_path, editor=kept)
    assert again.validation_losses().total == pytest.approx(progress.best_loss, rel=1e-6)


def test_without_validation_the_last_editor_is_kept(tmp_path: Path):
    trainer = trainer_for(tmp_path, steps=2, validation=0)
    assert trainer.run(bar=False).history == []
    kept = TrainableEditor.from_pretrained(tmp_path, trainer.editor.lm)
    assert kept.card["steps"] == 2
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, trainer.editor.state_dict()[name])


# Health


def test_a_model_that_is_not_finite_is_reported(tmp_path: Path):
    lm = language_model("gpt2")
    with torch.no_grad():
        next(lm.model.parameters()).fill_(math.nan)
    editor = editor_for("gpt2", lm, blocks=[-1])
    with pytest.raises(EditorError, match="step 1: the model's loss is not finite before any edit"):
        trainer_for(tmp_path, editor=editor).run(bar=False)
    assert list(tmp_path.iterdir()) == []


def test_an_editor_that_diverges_is_reported(tmp_path: Path):
    editor = editor_for("gpt2", rank=2, blocks=[-1], edit_lr=1e38)
    with pytest.raises(EditorError, match=r"step 1: the edit loss is not finite\. Lower lr"):
        trainer_for(tmp_path, editor=editor).run(bar=False)


# One example, again and again, with an editor that stays as it is.
ALONE = [EditExample(prompt="Item 1 is", target="a", neighbors=examples(1)[0].neighbors)]
FROZEN: dict[str, Any] = {
    "lr": 0.0,
    "edit_lr_lr": 0.0,
    "batch": 1,
    "validation": 0,
    "steps": 12,
    "health_after": 6,
}


def harmful() -> Mend:
    return editor_for("gpt2", rank=2, blocks=[-1], edit_lr=3.0, normalize=False, ascent=True)


def test_an_editor_that_changes_nothing_is_reported(tmp_path: Path):
    editor = editor_for("gpt2", rank=2, blocks=[-1], edit_lr=0.0)
    with pytest.raises(EditorError, match="step 6: this editor changes nothing"):
        trainer_for(tmp_path, editor=editor, data=ALONE, **FROZEN).run(bar=False)


def test_an_edit_loss_that_does_not_fall_is_reported(tmp_path: Path):
    with pytest.raises(EditorError, match="step 6: the edit loss does not fall"):
        trainer_for(tmp_path, editor=harmful(), data=ALONE, **FROZEN).run(bar=False)


def test_health_waits_for_enough_losses_after_a_resume(tmp_path: Path):
    config: dict[str, Any] = {"editor": harmful(), "data": ALONE, **FROZEN}
    trainer_for(tmp_path, on_step=lambda progress, _: progress.step < 5, **config).run(bar=False)
    with pytest.raises(EditorError, match="step 8: the edit loss does not fall"):
        trainer_for(tmp_path, **config).run(resume=True, bar=False)


@pytest.mark.parametrize("config", [{"health_after": 0}, {"lr": 1e-2}])
def test_a_healthy_or_unwatched_run_goes_on(tmp_path: Path, config: dict[str, Any]):
    editor = harmful() if "health_after" in config else None
    trainer = trainer_for(tmp_path, editor=editor, data=ALONE, **(FROZEN | config))
    assert trainer.run(bar=False).step == 12


def test_the_last_step_is_looked_at(tmp_path: Path):
    trainer = trainer_for(tmp_path, validate_every=4)
    assert [look["step"] for look in trainer.run(bar=False).history] == [4, 6]


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path: Path):
    trainer = trainer_for(tmp_path)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan

    trainer.editor.edit_lrs.register_hook(spoil)
    with pytest.raises(EditorError, match="step 1: the gradient is not finite"):
        trainer.run(bar=False)
    assert all(parameter.isfinite().all() for parameter in trainer.editor.parameters())


@pytest.mark.parametrize("reset", [False, True])
def test_a_resumed_run_keeps_or_forgets_its_statistics(tmp_path: Path, reset: bool):
    trainer_for(tmp_path, on_step=lambda progress, _: progress.step != 3).run(bar=False)
    rows: list[int] = []

    def count(progress: Progress, losses: StepLosses) -> None:
        rows.append(sum(network.rows_seen for network in resumed.editor.networks.values()))  # type: ignore[union-attr]

    resumed = trainer_for(tmp_path, on_step=count, reset_statistics=reset)
    resumed.run(resume=True, bar=False)
    assert rows == sorted(rows)
    assert (rows[0] < rows[-1] - rows[0]) == reset


def test_a_run_over_other_batches_is_not_resumed(tmp_path: Path):
    trainer_for(tmp_path, on_step=lambda progress, _: False).run(bar=False)
    others: list[dict[str, Any]] = [{"batch": 3}, {"seed": 1}, {"accumulate": 2}]
    for other in others:
        with pytest.raises(EditorError, match=f"a run with {next(iter(other))}="):
            trainer_for(tmp_path, **other).run(resume=True, bar=False)


def test_an_example_that_cannot_be_read_is_named(tmp_path: Path):
    long = EditExample(prompt="word " * 200, target="a", id="record-7")
    with pytest.raises(EditError, match=r"'record-7'.*tokens"):
        trainer_for(tmp_path, data=[long]).run(bar=False)
