"""Updates of batches: of each sequence its own change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.errors import EditError
from workbench.scope import Scope, widened
from workbench.updates import LayerUpdate, Update


def each_within(update: Update, scope: Scope) -> Update:
    """A batch's update, one edit a sequence, whose edits each act within the scope of their own.

    Args:
        update: Of a batch.
        scope: With one edit for each sequence, in order.
    """
    layers = {
        name: replace(layer, owners=torch.zeros_like(layer.owner_of_each()))
        for name, layer in update.items()
    }
    return Update(layers, Scope(scope.layer, *(part.unsqueeze(1) for part in scope.parts())))


def of_sequences(update: Update, places: int | Tensor) -> Update:
    """Of a batch's update that of one sequence, or of several, `(sequences,)`; some may repeat."""

    def pick(tensor: Tensor) -> Tensor:
        if isinstance(places, int):
            return tensor[places]
        return tensor.index_select(0, places.to(tensor.device))

    def picked(layer: LayerUpdate) -> LayerUpdate:
        found = (None if t is None else pick(t) for t in (layer.threshold, layer.owners))
        return LayerUpdate(pick(layer.A), pick(layer.B), layer.scale, *found)

    scope = update.scope
    if scope is not None:
        scope = Scope(scope.layer, *map(pick, scope.parts()))
    return Update({name: picked(layer) for name, layer in update.items()}, scope)


def stack_sequences(updates: Sequence[Update | None]) -> Update:
    """One update whose leading axis gives each sequence of a batch its own change.

    Args:
        updates: One unbatched update a sequence, or None for the base model. Ranks may differ:
            shorter ones are padded with zero terms, which change nothing.

    Raises:
        EditError: Every entry is None, so that no shapes are known.
    """
    names = dict.fromkeys(name for update in updates if update for name in update)
    if not names:
        raise EditError("None of the sequences has an update; run the model without an overlay.")
    scope = _stacked_scope(updates)
    stacked = {}
    for name in names:
        folded = [
            update[name].folded() if update and name in update else None for update in updates
        ]
        model = next(layer for layer in folded if layer is not None)
        rank = max(layer.rank for layer in folded if layer is not None)
        A = model.A.new_zeros(len(updates), rank, model.A.shape[-1])
        B = model.B.new_zeros(len(updates), rank, model.B.shape[-1])
        gated = any(layer is not None and layer.threshold is not None for layer in folded)
        threshold = A.new_zeros(len(updates), rank) if gated else None
        owned = any(layer is not None and layer.owners is not None for layer in folded)
        owners = A.new_full((len(updates), rank), -1, dtype=torch.long) if owned else None
        for row, layer in enumerate(folded):
            if layer is not None:
                A[row, : layer.rank], B[row, : layer.rank] = layer.A, layer.B
                if threshold is not None:
                    threshold[row, : layer.rank] = layer.thresholds()
                if owners is not None:
                    owners[row, : layer.rank] = layer.owner_of_each()
        stacked[name] = LayerUpdate(A, B, threshold=threshold, owners=owners)
    return Update(stacked, scope)


def _stacked_scope(updates: Sequence[Update | None]) -> Scope | None:
    """Each sequence's scope, short ones filled up with edits that are nowhere in force."""
    found = [update.scope if update else None for update in updates]
    scopes = [scope for scope in found if scope is not None]
    if not scopes:
        return None
    layer = Scope.side_by_side(scopes).layer
    edits, model = max(map(len, scopes)), scopes[0].keys
    most = max(scope.keys.shape[-2] for scope in scopes)
    keys = model.new_zeros(len(updates), edits, most, model.shape[-1])
    thresholds = model.new_full((len(updates), edits, most), torch.inf)
    openings = scopes[0].openings.new_full((len(updates), edits), -1)
    longest = max(scope.answers.shape[-1] for scope in scopes)
    answers = openings.new_full((len(updates), edits, longest), -1)
    for row, scope in enumerate(found):
        if scope is not None:
            count = scope.keys.shape[-2]
            keys[row, : len(scope), :count] = scope.keys
            thresholds[row, : len(scope), :count] = scope.thresholds
            thresholds[row, : len(scope), count:] = -torch.inf
            openings[row, : len(scope)] = scope.openings
            answers[row, : len(scope)] = widened(scope.answers, longest)
    return Scope(layer, keys, thresholds, openings, answers)
