"""One edit as a user holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workbench.adapters import export_peft
from workbench.editors import EditRequest, Proposal
from workbench.editors.scoping import subject_in
from workbench.errors import EditError
from workbench.memory import size
from workbench.models import LanguageModel
from workbench.overlay import EditStack
from workbench.results import EditTrace, trace_of
from workbench.shortage import memory_errors
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
    @memory_errors()
    def trace(self) -> EditTrace | None:
        """The factors' norms and cosines, worked out when first looked at; None for an adapter."""
        if isinstance(self.origin, Proposal):
            return trace_of(self.lm, self.requests, self.origin)
        return self.origin

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: the update, and the factors that it was made from."""
        if not isinstance(self.origin, Proposal):
            return self.update.nbytes
        made = (self.origin.factors, self.origin.pseudofactors or {})
        factors = (layer for group in made for layer in group.values())
        return self.update.nbytes + sum(f.activation.nbytes + f.delta.nbytes for f in factors)

    @property
    def title(self) -> str:
        """The edit in a line."""
        if not self.requests:
            return "imported adapter"
        first = self.requests[0]
        more = f" and {len(self.requests) - 1} more" if len(self.requests) > 1 else ""
        return f"{first.prompt} → {first.target}{more}"

    @property
    def subjects(self) -> tuple[str | None, ...]:
        """What each request is about, where the edit acts in texts that name it alone; None for a
        request to which every text counts as naming it."""
        if self.update.scope is None:
            return (None,) * len(self.requests)
        return tuple(subject_in(request.prompt, request.subject) for request in self.requests)

    @property
    def acts(self) -> str:
        """Where the edit acts, in words."""
        if self.update.scope is None:
            return "everywhere"
        anything = "anything (no subject was recognised in the prompt)"
        found = dict.fromkeys(subject or anything for subject in self.subjects)
        return f"in texts about {' and '.join(found)}"

    def to_peft(self, folder: str | Path) -> Path:
        """Write the edit, at full strength, as a PEFT LoRA adapter folder."""
        return export_peft(self.update, self.lm, folder, [self.title])


def check_room(live: Iterable[Edit], new: Edit, most: float) -> None:
    """See that an edit fits beside the live ones; the first one always does.

    Args:
        live: Edits at hand.
        new: To be added.
        most: Bytes of edits that may be kept.

    Raises:
        EditError: It does not fit.
    """
    held = sum(edit.nbytes for edit in live)
    if held and held + new.nbytes > most:
        raise EditError(
            f"The live edits take {size(held)} and this one {size(new.nbytes)}; no more than "
            f"{size(most)} are kept. Remove a live edit, or add fewer."
        )


def kept(stack: EditStack, edits: Mapping[int, Edit], most: float) -> dict[int, Edit]:
    """The edits that undo and redo can reach.

    Args:
        stack: Their history; it forgets its oldest actions until the edits within reach fit.
        edits: By id.
        most: Bytes of edits that may be kept.
    """
    while True:
        within = stack.ids()
        reached = {id: edit for id, edit in edits.items() if id in within}
        if sum(edit.nbytes for edit in reached.values()) <= most or not stack.forget():
            return reached
