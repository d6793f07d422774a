"""One edit as a user holds it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workbench.adapters import export_peft
from workbench.editors import EditRequest, Proposal
from workbench.models import LanguageModel
from workbench.results import EditTrace, trace_of
from workbench.updates import Update


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit: what was asked, the update that carries it out, and how it was made.

    Args:
        id: Number within its workbench.
        requests: What the model should say; several for `edit_many`, none for an adapter.
        update: The change of weights, at full strength.
        seconds: How long making the update took.
        lm: The model it was made for.
        origin: The editor's proposal, or the trace that a saved session kept; None for an adapter.
    """

    id: int
    requests: tuple[EditRequest, ...]
    update: Update
    seconds: float
    lm: LanguageModel
    origin: Proposal | EditTrace | None = None

    @cached_property
    def trace(self) -> EditTrace | None:
        """The factors' norms and cosines, worked out when first looked at; None for an adapter."""
        if isinstance(self.origin, Proposal):
            return trace_of(self.lm, self.requests, self.origin)
        return self.origin

    @property
    def title(self) -> str:
        """The edit in a line."""
        if not self.requests:
            return "imported adapter"
        first = self.requests[0]
        more = f" and {len(self.requests) - 1} more" if len(self.requests) > 1 else ""
        return f"{first.prompt} → {first.target}{more}"

    def to_peft(self, folder: str | Path) -> Path:
        """Write the edit as a PEFT LoRA adapter folder."""
        return export_peft(self.update, self.lm, folder, note=self.title)
