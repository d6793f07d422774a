"""Several edits as one update: the sum of their terms, or MALMEN's least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from workbench.checks import check_number
from workbench.editors import Editor, EditRequest, Proposal
from workbench.editors.proposals import capture_edits, joined
from workbench.errors import EditError
from workbench.overlay import overlay
from workbench.scope import Scope
from workbench.updates import LayerUpdate, Update

Aggregation = Literal["sum", "ridge", "sequence"]


def propose_together(
    editor: Editor,
    requests: Sequence[EditRequest],
    aggregation: Aggregation = "sum",
    damping: float = 0.003,
) -> Proposal:
    """Carry out several requests in one update.

    Args:
        editor: Makes the updates.
        requests: At least one.
        aggregation: "sum": as the editor does it, for MEND the sum of all terms (section 3.1);
            "ridge": each edit alone, then `ridge` over the inputs that each leads to; "sequence":
            one after another, each on the model that the ones before have changed.
        damping: For "ridge".

    Raises:
        EditError: The aggregation is unknown, a request cannot be carried out, or the damping of
            "ridge" is none.
    """
    if aggregation not in get_args(Aggregation):
        known = ", ".join(get_args(Aggregation))
        raise EditError(f"aggregation must be one of {known}; got {aggregation!r:.80}.")
    if aggregation == "ridge":
        check_number(damping, "damping", 0, 10**6)
    if aggregation == "sum":
        return editor.propose(requests)
    if not requests:
        raise EditError("There is nothing to edit: give at least one request (prompt, target).")
    proposals: list[Proposal] = []
    for request in requests:
        before = Update.sum(p.update for p in proposals) if aggregation == "sequence" else None
        with overlay(editor.lm.model, before):
            proposals.append(editor.propose([request]))
    updates = [proposal.update for proposal in proposals]
    if aggregation == "sequence":
        return joined(proposals, Update.sum(updates))
    inputs = [inputs_under(editor, *pair) for pair in zip(requests, updates, strict=True)]
    return joined(proposals, ridge(updates, inputs, damping))


def inputs_under(editor: Editor, request: EditRequest, update: Update) -> dict[str, Tensor]:
    """What the edited layers read in the text of an edit once that edit is made.

    Args:
        editor: Whose model and layers.
        request: The edit.
        update: What carries it out.

    Returns:
        Layer name -> `(tokens, in)`.
    """
    with overlay(editor.lm.model, update):
        factors = capture_edits(editor.lm, editor.layers, [request]).factors
    return {name: found.activation[found.live()] for name, found in factors.items()}


@torch.no_grad()
def ridge(
    updates: Sequence[Update], inputs: Sequence[Mapping[str, Tensor]], damping: float = 0.003
) -> Update:
    """The change nearest to what each edit does to its own inputs (MALMEN, Tan et al. 2024).

    Added up, edits disturb one another: each also acts on the others' inputs. With the inputs
    U of all edits, one a row, and D = what each edit alone adds to its own, a layer gets
    `argmin_S ||S U^T - D^T||^2 + l ||S||^2 = D^T (U U^T + l I)^-1 U`, of one term an input, `l`
    being `damping` times the mean squared norm of an input.

    Gated terms keep A and thresholds. With K = how strongly each acts on each input, they get
    `argmin_B' ||K B' - D||^2 + l ||B' - B||^2 = B + K^T (K K^T + l I)^-1 (D - K B)`, `l` being
    `damping` times the mean squared norm of a row of K: their sum, and what it takes to part them.

    Args:
        updates: One for each edit.
        inputs: Of each edit: layer name -> `(tokens, in)`, as its own update leads to them. Lower
            edited layers move what higher ones read; inputs of the unedited model fit worse.
        damping: 0 fits the edits' own inputs exactly; more keeps the change small.

    Raises:
        EditError: Damping is negative, no number, or beyond a million.
    """
    damping = check_number(damping, "damping", 0, 10**6)
    updates = Update.in_one_scope(updates)
    scope = updates[0].scope if updates else None
    reached = [
        None if scope is None else _reached(u, scope, i)
        for u, i in zip(updates, inputs, strict=True)
    ]
    solved = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        parts = zip(updates, inputs, reached, strict=True)
        edits = [(u[name], i[name], r) for u, i, r in parts if name in u]
        solved[name] = _solved(edits, damping)
    return Update(solved, scope)


def _reached(update: Update, scope: Scope, inputs: Mapping[str, Tensor]) -> Tensor:
    """Which edits are in force at an edit's own tokens, `(tokens, edits)` bool."""
    matched = scope.matched(inputs[scope.layer].to(scope.keys))
    # A first token is told by its id, which inputs do not hold.
    matched[0] = scope.thresholds == -torch.inf
    mine = torch.cat([layer.owner_of_each() for layer in update.values()]).unique()
    for edit in mine[mine >= 0].tolist():
        matched[0, edit] = ~matched[:, edit].any(0)  # its subject opens the text
    return scope.in_force(matched)


def _solved(
    edits: Sequence[tuple[LayerUpdate, Tensor, Tensor | None]], damping: float
) -> LayerUpdate:
    """One layer's change, of each edit's, its inputs, and which edits are in force there."""
    layers = [layer for layer, _, _ in edits]
    rows = torch.cat([own for _, own, _ in edits]).to(layers[0].A)
    wanted = torch.cat([layer.apply(own.to(layer.A), force) for layer, own, force in edits])
    if not any(layer.gated for layer in layers):
        keys = rows.double()
        return LayerUpdate(_weights(keys, keys, damping).to(rows), wanted)
    summed = LayerUpdate.sum(layers).folded()
    in_force = [force for _, _, force in edits if force is not None]
    acting = summed.acting(rows, torch.cat(in_force) if in_force else None)
    missing = (wanted - acting @ summed.B).double()
    keys = acting.double()
    parted = summed.B + (keys.T @ _weights(keys, missing, damping)).to(summed.B)
    return replace(summed, B=parted)


def _weights(keys: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """`(K K^T + l I)^-1` times what is wanted, in float64."""
    gram = keys @ keys.T
    # The least keeps the matrix definite where few terms act on few inputs, or none on any.
    gram.diagonal().add_((max(damping, 1e-9) * gram.diagonal().mean()).clamp_min(1e-30))
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(gram))
