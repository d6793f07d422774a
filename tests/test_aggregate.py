"""Several edits as one update: sums, sequences, least squares; and how they are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import TEXTS, editor_for, examples, opened

from workbench import EditError, EditRequest, Update, Workbench
from workbench.aggregate import Aggregation, inputs_under, propose_together, ridge
from workbench.editors import Mend
from workbench.encoding import collate, tokenize
from workbench.evaluate import EvaluationConfig, evaluate
from workbench.overlay import overlay
from workbench.training import MetaStep, TextSampler, TrainingConfig
from workbench.updates import LayerUpdate
from workbench.views import target_logits

Alone = tuple[list[Update], list[dict[str, torch.Tensor]]]

REQUESTS = [EditRequest(e.prompt, e.target) for e in examples(4)]


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["linear", "gated"])
def editor(request: pytest.FixtureRequest) -> Mend:
    """An editor with statistics and steps large enough for edits to meet."""
    config = TrainingConfig(text_tokens=8)
    made = editor_for("llama", gate=request.param, edit_lr=0.1)
    sampler = TextSampler(made.lm, examples(12), TEXTS, config)
    MetaStep(made.train(), config).losses(sampler.batch(0), backward=False)
    return made.eval()


@pytest.fixture(scope="module")
def alone(editor: Mend) -> Alone:
    """Each request's update, and what the layers read once it is made."""
    updates = [editor.propose([request]).update for request in REQUESTS]
    return updates, [inputs_under(editor, r, u) for r, u in zip(REQUESTS, updates, strict=True)]


def test_inputs_are_what_the_layers_read_in_the_edited_model(editor: Mend, alone: Alone) -> None:
    for request, update, inputs in zip(REQUESTS, *alone, strict=True):
        text = tokenize(editor.lm, request.prompt, request.target)
        seen: dict[str, torch.Tensor] = {}

        def reader(name: str, seen: dict[str, torch.Tensor] = seen):
            return lambda module, args: seen.update({name: args[0][0]})

        handles = [x.module.register_forward_pre_hook(reader(x.name)) for x in editor.layers]
        with overlay(editor.lm.model, update), torch.no_grad():
            target_logits(editor.lm, collate(editor.lm, [text]))
        for handle in handles:
            handle.remove()
        for name, rows in inputs.items():
            # In the last block only the places that predict the target lead to the loss.
            assert len(text.targets) <= len(rows) <= len(text.ids)
            torch.testing.assert_close(rows, seen[name][-len(rows) :])


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_least_squares_is_the_dense_ridge_solution(
    editor: Mend, alone: Alone, damping: float
) -> None:
    for name, layer in ridge(*alone, damping).items():
        inputs = [found[name] for found in alone[1]]
        keys = torch.cat(inputs).double()
        wanted = torch.cat(
            [update[name].apply(rows) for update, rows in zip(alone[0], inputs, strict=True)]
        ).double()
        if not editor.config.gate:
            penalty = damping * keys.square().sum(1).mean()
            normal = keys.T @ keys + penalty * torch.eye(keys.shape[1], dtype=torch.float64)
            dense = torch.linalg.solve(normal, keys.T @ wanted).T
            torch.testing.assert_close(layer.dense().double(), dense, rtol=1e-3, atol=1e-6)
            assert layer.threshold is None
            continue
        # Of gated terms: stacked rows of the penalised problem, solved as they stand.
        summed = LayerUpdate.sum([update[name] for update in alone[0]]).folded()
        acting = summed.acting(keys.float()).double()
        penalty = damping * acting.square().sum(1).mean()
        stacked = torch.cat([acting, penalty.sqrt() * torch.eye(summed.rank, dtype=torch.float64)])
        aims = torch.cat([wanted, penalty.sqrt() * summed.B.double()])
        dense = torch.linalg.lstsq(stacked, aims).solution
        torch.testing.assert_close(layer.B.double(), dense, rtol=1e-3, atol=1e-6)
        assert torch.equal(layer.A, summed.A)
        assert layer.threshold is not None


def test_without_damping_each_edit_does_to_its_inputs_what_it_did(
    editor: Mend, alone: Alone
) -> None:
    name = editor.layers[-1].name
    fitted = ridge(*alone, 0.0)[name]
    for update, inputs in zip(*alone, strict=True):
        rows = inputs[name]
        torch.testing.assert_close(
            fitted.apply(rows), update[name].apply(rows), rtol=1e-2, atol=1e-4
        )


@pytest.mark.parametrize("editor", [0.3], ids=["gated"], indirect=True)
def test_one_gated_edit_is_left_as_it_is(alone: Alone) -> None:
    update, inputs = alone[0][0], alone[1][0]
    for name, layer in ridge([update], [inputs]).items():
        torch.testing.assert_close(layer.B, update[name].folded().B)


def test_a_sequence_sees_the_edits_before_it(editor: Mend) -> None:
    first = editor.propose(REQUESTS[:1])
    with overlay(editor.lm.model, first.update):
        second = editor.propose(REQUESTS[1:2])
    joined = propose_together(editor, REQUESTS[:2], "sequence")
    whole = first.update + second.update
    for name, layer in joined.update.items():
        assert torch.equal(layer.A, whole[name].A)
        assert torch.equal(layer.B, whole[name].B)
    # The factors are those of each edit in its turn, and not of the unedited model.
    name = editor.layers[0].name
    assert torch.equal(joined.factors[name].delta[1], second.factors[name].delta[0])
    assert not torch.equal(
        second.factors[name].delta, editor.propose(REQUESTS[1:2]).factors[name].delta
    )


@pytest.mark.parametrize("aggregation", ["sum", "sequence"])
def test_a_single_edit_is_the_same_however_it_is_put_together(
    editor: Mend, aggregation: Aggregation
) -> None:
    alone, together = (
        editor.propose(REQUESTS[:1]),
        propose_together(editor, REQUESTS[:1], aggregation),
    )
    for name, layer in alone.update.items():
        assert torch.equal(layer.dense(), together.update[name].dense())


@pytest.mark.parametrize("aggregation", ["sum", "ridge", "sequence"])
def test_edits_that_are_live_together_are_measured_under_their_one_update(
    editor: Mend, aggregation: Aggregation
) -> None:
    config = EvaluationConfig(at_once=3, aggregation=aggregation, text_tokens=8)
    found = examples(5)
    scores = evaluate(editor, found, config, texts=TEXTS).edits
    assert len(scores) == 5
    for together in (found[:3], found[3:]):
        requests = [EditRequest(e.prompt, e.target) for e in together]
        update = propose_together(editor, requests, aggregation).update
        fixed, single = _Fixed(editor, update), EvaluationConfig(text_tokens=8)
        alone = evaluate(fixed, together, single, texts=TEXTS).edits  # type: ignore[arg-type]
        mine = scores[found.index(together[0]) :]
        for one, expected in zip(mine, alone, strict=False):
            for name in ("edit_success", "neighborhood_kept", "unrelated_kept", "drawdown"):
                assert getattr(one, name) == pytest.approx(getattr(expected, name))
            assert one.kl_neighborhood == pytest.approx(expected.kl_neighborhood, rel=1e-3)


class _Fixed:
    """Gives the same update to every request."""

    def __init__(self, editor: Mend, update: Update) -> None:
        self.inner, self.lm, self.layers, self.update = editor, editor.lm, editor.layers, update

    def propose(self, requests):
        return replace(self.inner.propose(requests), update=self.update)


def test_a_workbench_edits_by_least_squares_and_undoes_it(editor: Mend) -> None:
    wb = Workbench(opened("llama"), editor)
    edit = wb.edit_many(REQUESTS, aggregation="ridge")
    assert edit.update.gated == bool(editor.config.gate)
    assert edit.trace is not None
    assert len(edit.trace.requests) == len(REQUESTS)
    wb.undo()
    assert not wb.update


def test_what_cannot_be_put_together_says_why(editor: Mend) -> None:
    with pytest.raises(EditError, match="aggregation must be one of sum, ridge, sequence"):
        propose_together(editor, REQUESTS, "mean")  # type: ignore[arg-type]
    with pytest.raises(EditError, match="damping must be a number between 0 and 1,000,000; got -1"):
        propose_together(editor, REQUESTS, "ridge", -1)
    with pytest.raises(EditError, match="nothing to edit"):
        propose_together(editor, [], "ridge")
    with pytest.raises(EditError, match="at least 1; got 0"):
        EvaluationConfig(at_once=0)
