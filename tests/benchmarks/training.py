"""Steps of meta-training: against the reference loop, and at a large rank against a small one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from tests.benchmarks.reference import ReferenceLoop
from tests.benchmarks.setting import Setting, Step
from tests.benchmarks.timing import Action, Figures, Makers, in_turn, made
from workbench.divergence import losses_of
from workbench.editors import Mend
from workbench.encoding import collate, passes
from workbench.training import EditTexts, MetaStep, TrainingConfig

_EXAMPLES = 2  # that the reference loop goes through in one round; each takes the same time


def training_makers(setting: Setting) -> Makers:
    """A step of each size, with what is constant for a text at hand; the middle one also without;
    the reference loop; the floor of the largest; then a step and the loop where the paper edits,
    in the last blocks."""
    editor, middle = setting.untrained(setting.ranks[0]), _middle(setting)
    late, most = setting.untrained(setting.ranks[0], late=True), max(setting.batches)
    return {
        **{f"batch_{size}": partial(Step, editor, setting.batch(size)) for size in setting.batches},
        f"uncached_{middle}": partial(Step, editor, setting.batch(middle), cached=False),
        "reference": partial(_going_through, editor, setting.batch(_EXAMPLES)),
        f"floor_{most}": partial(floor, editor, setting.batch(most)),
        f"late_{most}": partial(Step, late, setting.batch(most)),
        "late_reference": partial(_going_through, late, setting.batch(_EXAMPLES)),
    }


def training(setting: Setting, rounds: int) -> Figures:
    """Examples a second, and how many times the reference's; the losses that both have computed.

    The reference's optimiser steps are left out, in its favour: it would take one in many examples.
    """
    rivals = made(training_makers(setting))
    times = in_turn(setting.device, rounds, rivals)
    steps = {name: step for name, step in rivals.items() if isinstance(step, Step)}
    loops, most = ("reference", "late_reference"), max(setting.batches)
    sizes = {name: len(steps[name].edits) for name in steps} | dict.fromkeys(loops, _EXAMPLES)
    beside = {name: "late_reference" if "late" in name else "reference" for name in steps}
    losses = {name: _losses(step) for name, step in steps.items()}
    return {
        "ms": times.milliseconds(),
        "examples_per_second": {name: times.rate(name, size) for name, size in sizes.items()},
        **{
            f"{name}_over_{loop}": times.ratio(loop, name, sizes[name] / _EXAMPLES)
            for name, loop in beside.items()
        },
        f"batch_{most}_over_floor": times.ratio(f"batch_{most}", f"floor_{most}"),
        "losses": losses,
        "losses_apart": max(abs(x["step"] / x["reference"] - 1) for x in losses.values()),
    }


def floor(editor: Mend, edits: Sequence[EditTexts]) -> Action:
    """The arithmetic of the upper blocks alone: all scored texts forward and back, unedited."""
    step = MetaStep(editor, TrainingConfig())
    texts = [text for edit in edits for text in (*edit.equivalents, *edit.locality)]
    trunk, cache = step.trunk, step.cache

    def run() -> None:
        for places in passes(editor.lm, texts):
            some = [texts[place] for place in places]
            batch, hidden = collate(editor.lm, some), cache.hidden(some)
            assert hidden is not None
            leaf = hidden.requires_grad_()
            losses, _ = losses_of(trunk.final(batch, leaf), batch.targets, leaf[0, :0], trunk.head)
            torch.autograd.grad(losses.sum(), leaf)

    return run


def _losses(step: Step) -> Figures:
    """A step's loss and that of the reference, of the editor as it now is."""
    step.editor.eval()
    loop = ReferenceLoop(step.editor, TrainingConfig())
    losses = [loop.example(edit, backward=False) for edit in step.edits]
    return {"step": step.loss(), "reference": statistics.mean(losses)}


def rank_makers(setting: Setting) -> Makers:
    """A step of the middle size with a small editor and with a large one."""

    def step(rank: int) -> Action:
        return Step(setting.untrained(rank), setting.batch(_middle(setting)))

    return {f"rank_{rank}": partial(step, rank) for rank in setting.ranks}


def rank(setting: Setting, rounds: int) -> Figures:
    """What an example costs at the paper's rank beside the small one."""
    rivals, size = made(rank_makers(setting)), _middle(setting)
    times = in_turn(setting.device, rounds, rivals)
    small, large = rivals
    return {
        "ms": times.milliseconds(),
        "batch": size,
        "examples_per_second": {name: times.rate(name, size) for name in rivals},
        "large_over_small": times.ratio(large, small),
    }


def _middle(setting: Setting) -> int:
    return sorted(setting.batches)[len(setting.batches) // 2]


def _going_through(editor: Mend, edits: Sequence[EditTexts]) -> Action:
    loop = ReferenceLoop(editor, TrainingConfig())

    def run() -> None:
        for edit in edits:
            loop.example(edit)
        editor.zero_grad()

    return run
