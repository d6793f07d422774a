"""What probing an edit found: where it reaches too far, and where not far enough."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from workbench.metrics import Mean, mentions
from workbench.probes import KINDS
from workbench.results import Comparison, PromptComparison, as_json

# Kind -> (what is well, what is not) of its verdicts.
VERDICTS = {
    "edit": ("follows", "under-generalises"),
    "equivalent": ("follows", "under-generalises"),
    "portability": ("carries over", "does not carry over"),
    "neighbor": ("kept", "over-generalises"),
    "unrelated": ("kept", "over-generalises"),
}
MEASURES = {
    "edit_success": ("edit",),
    "generalisation": ("equivalent",),
    "portability": ("portability",),
    "locality": ("neighbor", "unrelated"),
}
TOLERANCE = 0.1  # share of probability that may move where nothing should change
Column = Literal["score", "change", "closeness", "kind", "prompt"]


def own_answer(text: str) -> str:
    """The answer in a text that a model wrote: up to its first mark of punctuation."""
    return re.split(r"[.,;:!?\n]", text.strip(), maxsplit=1)[0].strip() or text.strip()


@dataclass(frozen=True, kw_only=True)
class ProbeResult(PromptComparison):
    """One probe before and after, and what to make of it.

    The target is the answer that matters: what the edit says or entails where that should appear;
    where nothing should change, what the base model says: the corpus's answer if it gives that.

    Args:
        edit: Which edit it probes: "prompt → target".
        made: How the probe was made.
        closeness: Cosine of its prompt and the edit's by the report's encoder, 0 to 1.
    """

    edit: str
    made: str
    closeness: float

    @property
    def should_change(self) -> bool:
        return self.kind in ("edit", "equivalent", "portability")

    @property
    def right(self) -> bool:
        """Whether the edited model says what it should.

        What should change says the target, at once or in a sentence ("The capital is ..."). What
        should stay still begins with its answer, or has moved by `TOLERANCE` at most: where two
        answers are nearly tied, that flips them.
        """
        if self.should_change:
            said = self.target is not None and mentions(self.edited_text, self.target)
            return bool(self.edited_exact) or said
        begins = self.target is not None and self.free_running is True
        return not self.changed or begins or self.change <= TOLERANCE

    @property
    def verdict(self) -> str:
        """ "follows" or "under-generalises", "kept" or "over-generalises", and so on."""
        return VERDICTS[self.kind][not self.right]

    @property
    def score(self) -> float:
        """How good it is, 0 to 1: the target's probability, or how much has not changed."""
        if self.should_change:
            return self.edited_probability or 0.0
        return 1 - self.change


@dataclass(frozen=True)
class ProbeReport(Comparison):
    """Every probe of one edit or of several.

    Args:
        rows: In the order probed, edit by edit.
        encoder: What the closeness was measured with.
    """

    rows: tuple[ProbeResult, ...] = ()
    encoder: str = ""

    def over(self) -> tuple[ProbeResult, ...]:
        """What should have stayed and did not, worst first."""
        return _worst(row for row in self.rows if not (row.right or row.should_change))

    def under(self) -> tuple[ProbeResult, ...]:
        """What should have changed and did not, consequences included, worst first."""
        return _worst(row for row in self.rows if row.should_change and not row.right)

    def wrong(self, by: Column = "score", *, descending: bool = False) -> tuple[ProbeResult, ...]:
        """Both, in the order of a column."""
        return tuple(row for row in self.sorted(by, descending=descending) if not row.right)

    def sorted(self, by: Column = "score", *, descending: bool = False) -> tuple[ProbeResult, ...]:
        """All probes in the order of a column."""

        def key(row: ProbeResult) -> Any:
            return KINDS.index(row.kind) if by == "kind" else getattr(row, by)

        return tuple(sorted(self.rows, key=key, reverse=descending))

    def scores(self) -> dict[str, Mean]:
        """Share of right probes, with n: edit_success, generalisation, portability, locality.

        A measure that nothing was probed for is left out.
        """
        return {
            measure: found
            for measure, kinds in MEASURES.items()
            if (found := _share(row for row in self.rows if row.kind in kinds))
        }

    def shares(self, by: Literal["kind", "made", "edit"]) -> dict[str, Mean]:
        """Share of right probes for each kind, each way of making them, or each edit."""
        groups = dict.fromkeys(getattr(row, by) for row in self.rows)
        return {
            group: found
            for group in groups
            if (found := _share(row for row in self.rows if getattr(row, by) == group))
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """Each probe as JSON values, with what follows from them."""
        return [
            {name: value for name, value in as_json(row).items()}  # type: ignore[attr-defined]
            | {name: getattr(row, name) for name in _DERIVED}
            for row in self.rows
        ]

    def to_json(self) -> str:
        """The scores, the encoder and the rows."""
        found = {"encoder": self.encoder, "scores": as_json(self.scores()), "rows": self.to_rows()}
        return json.dumps(found, ensure_ascii=False, indent=2)


_DERIVED = ("verdict", "right", "score", "changed", "kept", "free_running")


def _worst(rows: Iterable[ProbeResult]) -> tuple[ProbeResult, ...]:
    return tuple(sorted(rows, key=lambda row: row.score))


def _share(rows: Iterable[ProbeResult]) -> Mean | None:
    right = [float(row.right) for row in rows]
    return Mean.of(right) if right else None
