"""Measures of an edit: pure functions of logits, and the table of an editor over many edits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from workbench import parallel
from workbench.encoding import Batch, per_sequence_mean


def exact(logits: Tensor, batch: Batch) -> Tensor:
    """Teacher-forced success: every target token is the most likely one, `(batch,)` of 0 and 1.

    Args:
        logits: At the batch's target positions, `(n, vocabulary)`.
        batch: Where they belong.
    """
    right = (logits.argmax(-1) == batch.targets).float()
    return (per_sequence_mean(right, batch) == 1).float()


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Share of target tokens that are the most likely ones, `(batch,)`."""
    return per_sequence_mean((logits.argmax(-1) == batch.targets).float(), batch)


def kept(base: Tensor, edited: Tensor, batch: Batch) -> Tensor:
    """Share of positions whose most likely token is unchanged, `(batch,)`."""
    return per_sequence_mean((base.argmax(-1) == edited.argmax(-1)).float(), batch)


def total_variation(base: Tensor, edited: Tensor) -> Tensor:
    """Share of the next token's probability that has moved, 0 to 1: half the L1 distance.

    The most by which the two models differ on any set of next tokens. Unlike a KL it is bounded
    and symmetric, so that prompts compare; unlike the answer's own probability it sees a change
    where the model had no answer to lose.

    Args:
        base: Logits of one model, `(n, vocabulary)`.
        edited: Logits of the other.

    Returns:
        `(n,)`, float32.
    """
    gap = base.float().softmax(-1) - edited.float().softmax(-1)
    return (gap.abs().sum(-1) / 2).clamp(max=1)


def begins_with(text: str, target: str) -> bool:
    """Free-running success: what the model writes begins with the target, in whatever case."""
    return text.strip().lower().startswith(target.strip().lower())


def mentions(text: str, target: str) -> bool:
    """Whether the model writes the target somewhere, in whatever case, not within a word."""
    return re.search(rf"(?<!\w){re.escape(target.strip())}(?!\w)", text, re.IGNORECASE) is not None


@dataclass
class EditScores:
    """What one edit did; None where the example has nothing to measure it on.

    Args:
        edit_success: The prompt's target is predicted exactly (0 or 1).
        paraphrase_success: The same for the first paraphrase.
        neighborhood_kept: Share of positions, over the neighbours' answers, whose most likely
            token is unchanged.
        neighborhood_score: Share of neighbours where p(true answer) > p(the edit's target), by
            mean log-probability a token (CounterFact's NS).
        neighborhood_score_base: The same before the edit.
        other_subjects_kept: Share of prompts that ask the same of other subjects, crossed from
            other examples, whose most likely next token is unchanged.
        other_relations_kept: The same of prompts that ask other things of the same subject.
        unrelated_kept: As neighborhood_kept, on unrelated texts.
        drawdown: Loss of token accuracy on unrelated texts; positive is worse.
        base_drawdown: The same of a trained base (ENN) against the original, before any edit.
        drawdown_perplexity: Gain of perplexity on unrelated texts (8 tokens or more).
        kl_neighborhood: KL(base || edited) on the neighbours' answers, nats a token.
        generated_success: The greedy continuation of the prompt begins with the target (0 or 1).
        seconds: Time to make the update.
    """

    edit_success: float
    paraphrase_success: float | None = None
    neighborhood_kept: float | None = None
    neighborhood_score: float | None = None
    neighborhood_score_base: float | None = None
    other_subjects_kept: float | None = None
    other_relations_kept: float | None = None
    unrelated_kept: float | None = None
    drawdown: float | None = None
    base_drawdown: float | None = None
    drawdown_perplexity: float | None = None
    kl_neighborhood: float | None = None
    generated_success: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Mean:
    """A mean over edits with the half-width of its 95% confidence interval (normal)."""

    value: float
    half_width: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean of at least one value."""
        tensor = torch.tensor(values, dtype=torch.float64)
        spread = tensor.std().item() if len(values) > 1 else 0.0
        return cls(tensor.mean().item(), 1.96 * spread / math.sqrt(len(values)), len(values))


@dataclass
class EditorScores:
    """Scores of one editor over many edits; `means` gives each measure's mean."""

    edits: list[EditScores] = field(default_factory=list)

    def means(self) -> dict[str, Mean]:
        """Measure -> mean over the edits that have it."""
        found: dict[str, Mean] = {}
        for entry in fields(EditScores):
            values = [getattr(edit, entry.name) for edit in self.edits]
            present = [float(value) for value in values if value is not None]
            if present:
                name = "seconds_per_edit" if entry.name == "seconds" else entry.name
                found[name] = Mean.of(present)
        return found

    def as_json(self) -> dict[str, object]:
        """Means and interval half-widths by name, and `n`."""
        means = self.means()
        return {
            **{name: round(mean.value, 6) for name, mean in means.items()},
            "confidence_95": {name: round(mean.half_width, 6) for name, mean in means.items()},
            "n": len(self.edits),
        }


def gathered(scores: Mapping[int, EditScores], count: int) -> list[EditScores]:
    """The scores of all processes in the order of the edits.

    Args:
        scores: Those that this process has found, by place.
        count: Of all edits; each is in one process.
    """
    width = 2 * len(fields(EditScores))  # whether it is there, and the value
    table = [[0.0] * width for _ in range(count)]
    for place, found in scores.items():
        values = vars(found).values()
        table[place] = [x for v in values for x in ((0.0, 0.0) if v is None else (1.0, v))]
    flat = parallel.added([value for row in table for value in row])
    rows = (flat[start : start + width] for start in range(0, len(flat), width))
    return [
        EditScores(*(v if there else None for there, v in zip(row[::2], row[1::2], strict=True)))  # type: ignore[arg-type]
        for row in rows
    ]


def mean_or_none(values: Iterable[float]) -> float | None:
    """The mean, or None for nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
