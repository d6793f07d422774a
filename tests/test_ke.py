"""Laws of KE: its factors are the masked gradient, it reads the edit, a fresh one descends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import assert_exact, in_double, logits_of
from runs import KINDS, edits_for, left_by, opened, requests_for, trainer_for
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench import Workbench
from workbench.editors import Ke, KeConfig
from workbench.editors.proposals import CapturedEdits, capture_edits
from workbench.encoding import collate
from workbench.errors import EditorError
from workbench.factors import capture
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.training import MetaStep, TrainingConfig
from workbench.views import target_logits

kinds = pytest.mark.parametrize("family", KINDS)


def editor_for(lm: LanguageModel, **config: Any) -> Ke:
    """A small fresh editor, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {"lstm": 5, "condition": 6, "hidden": 7, "edit_lr": 0.3}
        return Ke(lm, KeConfig(**(small | config))).eval()


def stirred(editor: Ke) -> Ke:
    """The editor with all its parameters moved, as if trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return editor


def captured(editor: Ke) -> CapturedEdits:
    return capture_edits(editor.lm, editor.layers, requests_for(editor.lm))


def gradient(edits: CapturedEdits, name: str) -> Tensor:
    """Each edit's dense gradient, `(batch, out, in)`."""
    factors = edits.factors[name]
    return torch.einsum("bto,bti->boi", factors.delta, factors.activation)


@kinds
def test_low_rank_form_is_the_dense_masked_gradient(family: str):
    editor = stirred(editor_for(in_double(opened(family))).double())
    edits = captured(editor)
    masks = editor.masks(edits)
    update = editor.edit_batch(edits)
    for layer, alpha in zip(editor.layers, editor.edit_lrs, strict=True):
        m = masks[layer.name]
        mask, bias = (
            torch.einsum("bo,bi->boi", out, over)
            for out, over in ((m.mask_out, m.mask_in), (m.bias_out, m.bias_in))
        )
        dense = m.scale.unsqueeze(2) * (mask * gradient(edits, layer.name) + bias)
        assert_exact(update[layer.name].dense(), -alpha * dense)
        assert update[layer.name].rank == edits.factors[layer.name].delta.shape[1] + 1
    assert_exact(m.bias_out.sum(-1), torch.ones_like(m.bias_out[:, 0]))


@kinds
def test_fresh_editor_takes_half_a_step_down(family: str):
    editor = editor_for(opened(family))
    edits = captured(editor)
    for name, layer in editor.edit_batch(edits).items():
        torch.testing.assert_close(layer.dense(), -0.15 * gradient(edits, name))


@kinds
def test_padding_does_not_matter(family: str):
    editor = stirred(editor_for(in_double(opened(family))).double())
    requests = requests_for(editor.lm)
    together = editor.edit_batch(captured(editor))
    total = editor.propose(requests).update
    for name, layer in together.items():
        alone = [editor.propose([request]).update[name].dense() for request in requests]
        assert_exact(layer.dense(), torch.stack(alone))
        assert_exact(total[name].dense(), sum(alone))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_it_reads_prediction_target_and_input(family: str):
    editor = editor_for(opened(family))
    tokens, prediction = captured(editor).tokens[1], captured(editor).predictions[1]
    said = editor.lm.tokenizer.decode(prediction)
    request = requests_for(editor.lm)[1]
    text = editor.lm.tokenizer.decode(editor._reading(tokens, prediction))
    space = " " if family == "gpt2" else ""  # which a decoder's target owns
    assert text == f"{said} >> {space}{request.target} || {request.prompt}"
    batch = collate(editor.lm, [tokens])
    assert torch.equal(target_logits(editor.lm, batch).argmax(-1), prediction)


def test_a_classifier_reads_the_names_of_labels():
    editor = editor_for(opened("bert"))
    edits = captured(editor)
    text = editor.lm.tokenizer.decode(editor._reading(edits.tokens[0], edits.predictions[0]))
    said = int(edits.predictions[0])
    assert text == f"LABEL_{said} >> LABEL_1 || {requests_for(editor.lm)[0].prompt}"


def test_what_it_reads_decides_what_it_does():
    editor = stirred(editor_for(opened("gpt2")))
    edits = captured(editor)
    other = replace(edits, predictions=tuple(said.flip(0) + 1 for said in edits.predictions))
    for one, two in zip(editor.masks(edits).values(), editor.masks(other).values(), strict=True):
        assert not torch.allclose(one.mask_in, two.mask_in)


@kinds
def test_a_step_in_chunks_and_with_blocks_run_twice_is_the_undivided_one(family: str):
    editor = stirred(editor_for(opened(family), edit_lr=0.1))
    edits = edits_for(editor.lm)
    whole = TrainingConfig(c_edit=0.3, c_locality=2.0)
    plain(editor, whole)
    wanted = {name: p.grad for name, p in editor.named_parameters() if p.grad is not None}
    assert len(wanted) == len(list(editor.parameters()))
    editor.zero_grad(set_to_none=True)
    for config in (whole, replace(whole, chunk=1), replace(whole, checkpointing=True)):
        MetaStep(editor, config).losses(edits)
        for name, parameter in editor.named_parameters():
            atol = 2e-5 * wanted[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=atol)
        editor.zero_grad(set_to_none=True)


def plain(editor: Ke, config: TrainingConfig) -> None:
    """Backward of the loss in one undivided graph, one edit at a time."""
    lm, nll, kept = editor.lm, [], []
    for edit in edits_for(lm):
        batch = collate(lm, [edit.edit])
        with capture(editor.layers) as tap:
            logits = target_logits(lm, batch)
            loss = cross_entropy(logits, batch.targets)
            factors = tap.factors(loss)
        seen = CapturedEdits((edit.edit,), (logits.argmax(-1),), factors)
        update = editor.edit_batch(seen)
        for text in edit.equivalents:
            batch = collate(lm, [text])
            with overlay(lm.model, update):
                logits = target_logits(lm, batch)
            nll.append(cross_entropy(logits, batch.targets))
        for text in edit.locality:
            batch = collate(lm, [text])
            with overlay(lm.model, update):
                after = target_logits(lm, batch).log_softmax(-1)
            before = target_logits(lm, batch).log_softmax(-1)
            kept.append((before.exp() * (before - after)).sum(-1).mean())
    total = config.c_edit * torch.stack(nll).mean() + config.c_locality * torch.stack(kept).mean()
    total.backward()


@kinds
def test_first_steps_of_training_lower_the_loss_and_leave_the_model_alone(family: str):
    lm = opened(family)
    editor, edits, before = editor_for(lm).train(), edits_for(lm), lm.checksum()
    step = MetaStep(editor, TrainingConfig(c_edit=1.0, c_locality=0.1))
    optimizer = torch.optim.Adam(editor.parameters(), lr=1e-3)
    totals = []
    for _ in range(4):
        totals.append(step.losses(edits).total)
        optimizer.step()
        optimizer.zero_grad()
    assert totals == sorted(totals, reverse=True)
    assert lm.checksum() == before
    assert all(parameter.grad is None for parameter in lm.model.parameters())


@kinds
def test_it_is_saved_reproducible_and_undone_to_the_bit(family: str, tmp_path: Path):
    lm = opened(family)
    editor, twin = stirred(editor_for(lm)), stirred(editor_for(lm))
    loaded = Ke.from_pretrained(editor.save_pretrained(tmp_path), lm)
    assert isinstance(loaded, Ke)
    requests = requests_for(lm)
    update = editor.propose(requests).update
    for other in (twin, loaded):
        for one, two in zip(
            update.tensors(), other.propose(requests).update.tensors(), strict=True
        ):
            assert torch.equal(one, two)
    bench = Workbench(lm, editor)
    inputs = collate(lm, captured(editor).tokens).inputs
    before = logits_of(lm.model, inputs)
    edit = bench.edit_many(requests)
    with bench.applied() as model:
        assert not torch.equal(logits_of(model, inputs), before)
    assert bench.inspect(edit).layers[0].edit_lr == pytest.approx(editor.edit_lrs[0].item())
    bench.undo()
    with bench.applied() as model:
        assert torch.equal(logits_of(model, inputs), before)


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path):
    def editor() -> Ke:
        return editor_for(opened("gpt2"), blocks=[-1])

    whole = trainer_for(tmp_path / "whole", editor=editor())
    whole.run(bar=False)
    broken = tmp_path / "broken"
    trainer_for(broken, editor=editor(), on_step=lambda p, _: p.step != 3).run(bar=False)
    resumed = trainer_for(broken, editor=editor())
    resumed.run(resume=True, bar=False)
    assert left_by(resumed) == left_by(whole)


def test_a_width_below_one_is_refused():
    with pytest.raises(EditorError, match="hidden must be at least 1; got 0"):
        KeConfig(hidden=0)
