"""Scopes learned: the metrics by which an editor knows the texts that an edit should act in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from workbench.data import EditExample
from workbench.editors import Editor, Mend
from workbench.editors.scoping import Measure, scope_of
from workbench.encoding import Tokens, collate
from workbench.errors import EditorError
from workbench.scope import Reading
from workbench.training.inputs import read_of
from workbench.training.relations import learn_relations, questions, relations_matched
from workbench.training.subjects import Subject, learn_subjects, subjects
from workbench.views import LayerInputs

T = TypeVar("T")
_SUBJECTS = "A scope is learned from examples whose prompt names their subject, as others do;"
_QUESTIONS = (
    "What is asked is learned from examples that ask several things of a subject (or not: "
    "--relation-rank 0, scope_relation=0);"
)
_HELD_OUT = 200  # most subjects, and questions, that are measured rather than learned


@dataclass(frozen=True)
class LearnedScope:
    """How learning a scope went.

    Args:
        examples: Of those given, how many have a subject in their prompt and in another text.
        loss: Of the last step.
        held_out: Subjects that were measured, not learned.
        matched: Share of the texts about those in which an edit of theirs meets its subject.
        matched_elsewhere: Share of the texts about others that does: of neighbours, unrelated
            prompts, the edit's own prompt with another subject, and other edits' prompts.
        asked: Where the editor looks at what is asked, how many examples have texts about their
            subject that ask the same and others that do not.
        asked_same: Share of those that ask the same which match; of held out examples.
        asked_elsewhere: Share of the others that do.
    """

    examples: int
    loss: float
    held_out: int
    matched: float
    matched_elsewhere: float
    asked: int = 0
    asked_same: float = 0.0
    asked_elsewhere: float = 0.0


def with_scope(editor: Editor, **settings: float) -> Mend:
    """The editor with a scope of these settings, whose metrics are still to be learned.

    Args:
        editor: A MEND editor of a decoder; a scope that it has makes room.
        settings: `scope`, the rank of its metric, and what else `MendConfig` has of scopes.

    Raises:
        EditorError: It is of another kind, of a model that has no scopes, or a setting makes no
            sense.
    """
    if not isinstance(editor, Mend):
        raise EditorError(
            f"Of the editors MEND's have a scope; got a {editor.name!r} editor. Give the folder of "
            f"a trained MEND editor."
        )
    if settings["scope"] < 1:
        raise EditorError(f"A scope's rank must be at least 1; got {settings['scope']}.")
    return editor.changed(scope=0).changed(**settings)


def learn_scope(
    editor: Mend, examples: Sequence[EditExample], *, steps: int = 1500, seed: int = 0
) -> LearnedScope:
    """Learn the metrics of an editor's scope, in place; nothing else of the editor changes.

    A tenth of the subjects is held out and measured, and so of the questions.

    Args:
        editor: Has a scope.
        examples: Those are used that name a subject which their prompt and another text hold.
        steps: Of 192 subjects or questions each.
        seed: Of what is drawn.

    Raises:
        EditorError: The editor has no scope, or fewer than three subjects can be used.
    """
    if not editor.scoped:
        raise EditorError(
            "The editor has no scope whose metric could be learned. Give it one of rank 128: "
            "editor.changed(scope=128)."
        )
    if steps < 1:
        raise EditorError(f"steps must be at least 1; got {steps}.")
    chooser, config = random.Random(seed), editor.config
    inputs = LayerInputs(editor.lm, editor.layers[0])
    kept, rest = _parted(subjects(editor.lm, examples, chooser), chooser, _SUBJECTS, examples)
    metric, loss = learn_subjects(inputs, rest, config.scope, config.scope_share, steps, chooser)
    editor.get_buffer("scope_metric").copy_(metric)
    measure = Measure(editor.get_buffer("scope_metric"), config.scope_share)
    used = sum(subject.examples for subject in (*kept, *rest))
    found = used, loss, len(kept), *_measured(editor, inputs, measure, kept)
    if not config.scope_relation:
        return LearnedScope(*found)
    share = config.scope_relation_share
    held, asked = _parted(questions(editor.lm, examples, chooser), chooser, _QUESTIONS, examples)
    metric, _ = learn_relations(inputs, asked, config.scope_relation, share, steps, chooser)
    editor.get_buffer("relation_metric").copy_(metric)
    measure = Measure(editor.get_buffer("relation_metric"), share)
    return LearnedScope(*found, len(held) + len(asked), *relations_matched(inputs, held, measure))


def _parted(
    found: list[T], chooser: random.Random, wanted: str, examples: Sequence[EditExample]
) -> tuple[list[T], list[T]]:
    """Those that are held out, and the others."""
    if len(found) < 3:
        raise EditorError(
            f"{wanted} {len(found)} of {len(examples)} examples can be used, and at least 3 are "
            f"needed. Give more examples, or data with subjects: counterfact:PATH, zsre:PATH or "
            f"facts."
        )
    chooser.shuffle(found)
    count = min(_HELD_OUT, -(-len(found) // 10))
    return found[:count], found[count:]


@torch.no_grad()
def _measured(
    editor: Mend, inputs: LayerInputs, measure: Measure, subjects: Sequence[Subject]
) -> tuple[float, float]:
    """Shares of subjects' own texts, and of texts about others, that name the subject of an edit of
    theirs, by the scope of their first."""
    first = [next(iter(each.edits)) for each in subjects]
    batch = collate(editor.lm, first)
    read = inputs(batch).to(measure.metric)

    def of_others(texts: Sequence[Tokens]) -> Tensor:
        return inputs(collate(editor.lm, texts))

    scope = scope_of(editor.lm, inputs.layer, measure, None, first, read, of_others)
    reached = dict[Tokens, Tensor]()
    for some, batch, read in read_of(
        inputs, {t for e in subjects for t in (*e.about, *e.elsewhere)}
    ):
        reading = Reading(scope)
        reading.begin(batch.inputs["input_ids"], batch.inputs["attention_mask"], None)
        reading.look(read)
        assert reading.reached is not None
        reached.update(zip(some, reading.reached[:, -1], strict=True))
    about = [reached[t][n] for n, e in enumerate(subjects) for t in e.about if t not in e.edits]
    elsewhere = [reached[t][n] for n, e in enumerate(subjects) for t in e.elsewhere]
    return _share(about), _share(elsewhere)


def _share(found: Sequence[Tensor]) -> float:
    return round(sum(map(bool, found)) / max(1, len(found)), 4)
