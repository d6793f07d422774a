"""Several edits as one update: the sum of their terms, or MALMEN's least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from workbench.editors import Editor, EditRequest, Proposal
from workbench.editors.proposals import joined
from workbench.errors import EditError
from workbench.overlay import overlay
from workbench.updates import LayerUpdate, Update

Aggregation = Literal["sum", "ridge", "sequence"]


def propose_together(
    editor: Editor,
    requests: Sequence[EditRequest],
    aggregation: Aggregation = "sum",
    damping: float = 0.1,
) -> Proposal:
    """Carry out several requests in one update.

    Args:
        editor: Makes the updates.
        requests: At least one.
        aggregation: "sum": as the editor does it, for MEND the sum of all terms (section 3.1);
            "ridge": each edit alone, then `ridge`; "sequence": one after another, each on the
            model that the ones before have changed.
        damping: For "ridge".

    Raises:
        EditError: The aggregation is unknown or a request cannot be carried out.
    """
    if aggregation not in get_args(Aggregation):
        raise EditError(
            f"aggregation must be one of {', '.join(get_args(Aggregation))}; got {aggregation!r}."
        )
    if aggregation == "sum":
        return editor.propose(requests)
    if not requests:
        raise EditError("There is nothing to edit: give at least one request (prompt, target).")
    proposals: list[Proposal] = []
    for request in requests:
        before = Update.sum(p.update for p in proposals) if aggregation == "sequence" else None
        with overlay(editor.lm.model, before):
            proposals.append(editor.propose([request]))
    if aggregation == "sequence":
        return joined(proposals, Update.sum(p.update for p in proposals))
    return replace(joined(proposals, ridge(proposals, damping)), gates={})


@torch.no_grad()
def ridge(proposals: Sequence[Proposal], damping: float = 0.1) -> Update:
    """The change nearest to what each edit does to its own inputs (MALMEN, Tan et al. 2024).

    Added up, edits disturb one another: each also acts on the others' inputs. With the inputs
    U of all edits, one a row, and D = what each edit alone adds to its own, a layer gets
    `argmin_S ||S U^T - D^T||^2 + l ||S||^2 = D^T (U U^T + l I)^-1 U`, of one term an input, `l`
    being `damping` times the mean squared norm of an input. Of gated edits the result is linear.

    Args:
        proposals: One for each edit, with factors.
        damping: 0 fits the edits' own inputs exactly; more keeps the change small.

    Raises:
        EditError: Damping is negative, or a proposal has no factors to take inputs from.
    """
    if damping < 0:
        raise EditError(f"damping must be 0 or more; got {damping}.")
    if not all(proposal.factors for proposal in proposals):
        raise EditError(
            "Least squares needs each edit's inputs, and this editor's proposals have none. Add "
            "its edits up instead: aggregation='sum'."
        )
    names = dict.fromkeys(name for proposal in proposals for name in proposal.update)
    return Update({name: _solved(name, proposals, damping) for name in names})


def _solved(name: str, proposals: Sequence[Proposal], damping: float) -> LayerUpdate:
    inputs: list[Tensor] = []
    changes: list[Tensor] = []
    for proposal in proposals:
        factors, layer = proposal.factors[name], proposal.update[name]
        rows = factors.activation[factors.live()].to(layer.A)
        inputs.append(rows)
        changes.append(layer.apply(rows))
    keys, wanted = torch.cat(inputs).double(), torch.cat(changes)
    gram = keys @ keys.T
    gram.diagonal().add_(max(damping, 1e-9) * gram.diagonal().mean())
    solved = torch.cholesky_solve(keys, torch.linalg.cholesky(gram))
    return LayerUpdate(solved.to(wanted.dtype), wanted)
