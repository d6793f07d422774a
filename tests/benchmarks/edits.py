"""One edit beside its floor, and an undo."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.benchmarks.setting import PROMPT, TARGET, Setting
from tests.benchmarks.timing import Action, Figures, Makers, Times, in_turn, made
from workbench.editors import Mend
from workbench.encoding import collate, tokenize
from workbench.layers import EditableLayer
from workbench.models import LanguageModel


def floor(lm: LanguageModel, first: EditableLayer) -> Action:
    """A bare forward pass and a backward pass that ends at the first edited layer."""
    batch = collate(lm, [tokenize(lm, PROMPT, TARGET)])

    def run() -> None:
        leaves: list[Tensor] = []

        def cut(module: nn.Module, args: object, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[0]

        handle = first.module.register_forward_hook(cut)
        logits = lm.model(**batch.inputs).logits[batch.rows, batch.columns]
        handle.remove()
        torch.autograd.grad(cross_entropy(logits, batch.targets), leaves)

    return run


def edit_makers(setting: Setting) -> Makers:
    """An edit of one round, as in the paper; one in rounds, as the default editor makes it."""

    def editing(editor: Mend) -> Action:
        bench = setting.bench(editor)
        return lambda: bench.edit(PROMPT, TARGET)

    return {
        "edit": lambda: editing(setting.editor.changed(rounds=1)),
        "edit_in_rounds": lambda: editing(setting.editor),
        "floor": lambda: floor(setting.lm, setting.editor.layers[0]),
    }


def edit(setting: Setting, rounds: int) -> Figures:
    """Edits of both kinds beside the floor, and the numbers that one holds."""
    parameters = setting.lm.model.named_parameters
    pointers = {name: p.data_ptr() for name, p in parameters()}
    times = in_turn(setting.device, rounds, made(edit_makers(setting)))
    assert pointers == {name: p.data_ptr() for name, p in parameters()}
    found = setting.bench().edit(PROMPT, TARGET)
    layers = setting.editor.layers
    return {
        "ms": times.milliseconds(),
        "edit_over_floor": times.ratio("edit", "floor"),
        "edit_in_rounds_over_floor": times.ratio("edit_in_rounds", "floor"),
        "numbers_in_update": found.update.numbers(),
        "numbers_in_edited_weights": sum(x.in_features * x.out_features for x in layers),
    }


def undo_makers(setting: Setting) -> Makers:
    """An undo of the one live edit."""

    def undoing() -> Action:
        bench = setting.bench()
        bench.edit(PROMPT, TARGET)
        return bench.undo

    return {"undo": undoing}


def undo(setting: Setting, rounds: int) -> Figures:
    """An undo with one live edit. It runs nothing on the device: the clock times it there too."""
    bench = setting.bench()
    bench.edit(PROMPT, TARGET)
    taken = []
    for _ in range(20 * rounds):
        start = time.perf_counter()
        bench.undo()
        taken.append(time.perf_counter() - start)
        bench.redo()
    return {"ms": Times({"undo": taken}).milliseconds()}
