"""Measures against plain arithmetic; evaluation against what single calls give."""

from __future__ import annotations

import pytest
import torch

from workbench import EditExample, LanguageModel, Statement, Update, Workbench
from workbench.editors import EditRequest, open_editor
from workbench.encoding import Batch
from workbench.evaluate import EvaluationConfig, evaluate
from workbench.metrics import EditorScores, EditScores, Mean, accuracy, exact, kept
from workbench.overlay import overlay


def batch(rows: list[int], targets: list[int]) -> Batch:
    ids = torch.zeros(max(rows) + 1, 4, dtype=torch.long)
    positions = torch.tensor(rows)
    return Batch({"input_ids": ids}, positions, torch.zeros_like(positions), torch.tensor(targets))


def test_success_wants_every_token() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3]]
    found = batch([0, 0, 1, 1], [0, 1, 2, 0])
    assert exact(logits, found).tolist() == [1.0, 0.0]
    assert accuracy(logits, found).tolist() == [1.0, 0.5]
    assert kept(logits, logits.roll(1, 0), found).tolist() == [0.0, 0.0]
    assert kept(logits, logits * 2, found).tolist() == [1.0, 1.0]


def test_means_leave_out_what_was_not_measured() -> None:
    scores = EditorScores([EditScores(1.0, 0.0), EditScores(0.0), EditScores(1.0, 1.0)])
    means = scores.means()
    assert means["edit_success"].value == pytest.approx(2 / 3)
    assert means["paraphrase_success"] == Mean.of([0.0, 1.0])
    assert means["paraphrase_success"].n == 2
    assert "drawdown" not in means
    interval = means["edit_success"].half_width
    assert interval == pytest.approx(1.96 * (1 / 3) ** 0.5 / 3**0.5)


EXAMPLE = EditExample(
    prompt="The capital of France is",
    target="Lyon",
    target_true="Paris",
    paraphrases=("The capital city of France is called",),
    neighbors=(
        Statement(prompt="The capital of Germany is", answer="Berlin"),
        Statement(prompt="The capital of Italy is", answer="Rome"),
    ),
)


class _Nothing:
    """An editor that changes nothing: every kept measure must be perfect."""

    name = "nothing"

    def __init__(self, editor) -> None:
        self.inner, self.lm, self.layers = editor, editor.lm, editor.layers

    def propose(self, requests):
        from dataclasses import replace

        return replace(self.inner.propose(requests), update=Update({}))


def test_evaluation_agrees_with_single_calls(default_model: LanguageModel) -> None:
    editor = open_editor(None, default_model)
    scores = evaluate(editor, [EXAMPLE], EvaluationConfig(generate=True)).edits[0]
    wb = Workbench(default_model, editor)
    wb.edit(EXAMPLE.prompt, EXAMPLE.target)
    rows = wb.compare([EXAMPLE.prompt, EXAMPLE.paraphrases[0]]).rows
    assert [scores.edit_success, scores.paraphrase_success] == [row.edited_exact for row in rows]
    assert scores.generated_success == rows[0].free_running
    kept_by_hand = []
    for statement in EXAMPLE.neighbors:
        inputs = default_model.tokenizer(statement.prompt, return_tensors="pt")
        with torch.no_grad():
            base = default_model.model(**inputs).logits[0, -1]
            with overlay(default_model.model, wb.update):
                edited = default_model.model(**inputs).logits[0, -1]
        kept_by_hand.append(float(base.argmax() == edited.argmax()))
    assert scores.neighborhood_kept == pytest.approx(sum(kept_by_hand) / 2)
    assert scores.unrelated_kept is not None
    assert scores.unrelated_kept > 0.8


def test_an_edit_of_nothing_scores_as_the_base(default_model: LanguageModel) -> None:
    editor = _Nothing(open_editor(None, default_model))
    scores = evaluate(editor, [EXAMPLE]).edits[0]  # type: ignore[arg-type]
    assert scores.edit_success == 0
    assert scores.neighborhood_kept == scores.unrelated_kept == 1
    assert scores.drawdown == 0
    assert scores.kl_neighborhood == pytest.approx(0, abs=1e-5)
    assert scores.neighborhood_score == scores.neighborhood_score_base == 1


def test_crossed_prompts_are_measured_at_their_first_token(default_model: LanguageModel) -> None:
    editor = open_editor(None, default_model)
    known = [
        EditExample(
            prompt=f"The {relation} of {subject} is",
            target="Lyon",
            subject=subject,
            relation=relation,
        )
        for subject in ("France", "Spain")
        for relation in ("capital", "national dish")
    ]
    scores = evaluate(editor, known, EvaluationConfig(crossed=4)).edits[0]
    update = editor.propose([EditRequest(known[0].prompt, "Lyon")]).update

    def kept(prompt: str) -> float:
        inputs = default_model.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            base = default_model.model(**inputs).logits[0, -1]
            with overlay(default_model.model, update):
                edited = default_model.model(**inputs).logits[0, -1]
        return float(base.argmax() == edited.argmax())

    assert scores.other_subjects_kept == kept("The capital of Spain is")
    assert scores.other_relations_kept == kept("The national dish of France is")
    assert evaluate(editor, known).edits[0].other_subjects_kept is None
