"""Scope: the texts in which an edit acts, from the token on by which they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.errors import EditError


@dataclass(frozen=True, eq=False)
class Scope:
    """Where in a text each edit of an update acts: from the token on that matches its last key.

    Token t with the input `x_t` of `layer` matches key k of edit e if
    `key_ek x_t >= threshold_ek`, where each key before k has been matched at t or earlier: what
    the edit is about, then what it asks of that. Nothing that an update changes lies below its
    lowest layer, so where that is the layer looked at, live edits do not decide over one another's
    scope. A text's first token is told by its id: what models hold there is nearly the same for
    every token (attention sinks, Xiao et al. 2024).

    Args:
        layer: Name of the layer whose input is looked at.
        keys: `(..., edits, keys, in)`.
        thresholds: `(..., edits, keys)`; minus infinity: every token matches.
        openings: Ids of the tokens that match an edit's first key as a text's first,
            `(..., edits)`; -1: none.

    A leading axis, where there is one, holds another scope for each sequence of a batch.
    """

    layer: str
    keys: Tensor
    thresholds: Tensor
    openings: Tensor

    def __post_init__(self) -> None:
        shape = self.keys.shape[:-1]
        if (
            len(shape) < 2
            or not shape == self.thresholds.shape
            or shape[:-1] != self.openings.shape
        ):
            raise EditError(
                f"A scope's keys are (..., edits, keys, in), with a threshold for each and an "
                f"opening for each edit; got {tuple(self.keys.shape)}, "
                f"{tuple(self.thresholds.shape)} and {tuple(self.openings.shape)}."
            )

    def __len__(self) -> int:
        return self.keys.shape[-3]

    def matched(self, inputs: Tensor) -> Tensor:
        """Which keys each token matches, `(..., tokens, in)` -> `(..., tokens, edits, keys)`."""
        found = inputs @ self.keys.flatten(-3, -2).mT
        return found.unflatten(-1, self.keys.shape[-3:-1]) >= self.thresholds.unsqueeze(-3)

    def map(self, function: Callable[[Tensor], Tensor]) -> Scope:
        """Apply a function to keys and thresholds; openings follow to another device alone."""
        keys = function(self.keys)
        openings = self.openings.to(keys.device)
        return Scope(self.layer, keys, function(self.thresholds), openings)

    @classmethod
    def side_by_side(cls, scopes: Sequence[Scope]) -> Scope:
        """All their edits in one scope, in their order.

        Raises:
            EditError: They look at different layers.
        """
        looked_at = sorted({scope.layer for scope in scopes})
        if len(looked_at) > 1:
            raise EditError(
                f"Edits whose scopes look at different layers cannot live together: "
                f"{', '.join(looked_at)}. They come from editors of other blocks; remove the ones "
                f"before the others are made, or edit with one editor."
            )
        if len(scopes) == 1:
            return scopes[0]
        most = max(scope.keys.shape[-2] for scope in scopes)
        keys = [pad(scope.keys, (0, 0, 0, most - scope.keys.shape[-2])) for scope in scopes]
        thresholds = [
            pad(scope.thresholds, (0, most - scope.keys.shape[-2]), value=-torch.inf)
            for scope in scopes
        ]
        openings = torch.cat([scope.openings for scope in scopes], -1)
        return cls(looked_at[0], torch.cat(keys, -3), torch.cat(thresholds, -2), openings)


def in_order(matched: Tensor) -> Tensor:
    """How far each token has come: which keys it or one before it matched, those before them too,
    `(..., tokens, edits, keys)` bool."""
    keys = matched.unbind(-1)
    reached = [keys[0].cummax(-2).values]
    for key in keys[1:]:
        reached.append((key & reached[-1]).cummax(-2).values)
    return torch.stack(reached, -1)


class Reading:
    """How far a model has read, for one scope: which edits each sequence has reached so far.

    Generation reads a text in pieces, with a cache of what came before. Where each edit was first
    matched is kept beside the cache, follows its rows to other beams, and is forgotten with it.

    Args:
        scope: What is looked for.
        reached: What each token of the present pass has reached, `(batch, tokens, edits)` bool.
    """

    def __init__(self, scope: Scope, reached: Tensor | None = None) -> None:
        self.scope, self.reached = scope, reached
        self._start = 0  # tokens in the cache before the present pass
        self._first: Tensor | None = None  # (batch, edits, keys): where in them each is reached
        self._far: Tensor | None = None  # (batch, tokens, edits, keys): reached in this pass
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._kept: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def begin(self, ids: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        """A forward pass of the whole model begins, with these arguments."""
        self._start = 0 if cache is None else int(cache.get_seq_length())
        self._first = self._kept.get(cache) if self._start else None
        self._ids, self._mask = ids, mask

    @torch.no_grad()
    def look(self, inputs: Tensor) -> None:
        """The layer that the scope looks at reads its input."""
        if inputs.dim() != 3:
            raise EditError(
                "A scope looks at the tokens of each sequence; this layer reads those of all in "
                "one axis, as in mixtures of experts. Use an editor without a scope."
            )
        scope = self.scope = self.scope.map(lambda tensor: tensor.to(inputs.device))
        matched = scope.matched(inputs.to(scope.keys))
        read = torch.ones_like(matched[..., 0, 0])
        if self._mask is not None and self._mask.dim() == 2:
            read = self._mask[:, -inputs.shape[1] :].bool().to(inputs.device)
            matched &= read[..., None, None]
        if self._first is not None:
            matched[:, 0] |= (self._first < self._start).to(inputs.device)
        elif not self._start and self._ids is not None:
            always = (scope.thresholds == -torch.inf).unsqueeze(-3).expand_as(matched).clone()
            always[..., 0] |= self._ids.to(inputs.device).unsqueeze(-1) == scope.openings.unsqueeze(
                -2
            )
            first = read & (read.cumsum(1) == 1)
            matched = torch.where(first[..., None, None], always, matched)
        self._far = in_order(matched)
        self.reached = self._far[..., -1]

    def end(self, output: Any) -> None:
        """The forward pass is over, or has failed."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._far is not None:
            place = self._start + self._far.int().argmax(1)
            first = place.masked_fill(~self._far[:, -1], torch.iinfo(place.dtype).max)
            if self._first is not None:
                first = first.minimum(self._first.to(first.device))
            if cache not in self._kept:
                self._follow_beams(cache)
            self._kept[cache] = first
        self._start, self._first, self._far, self._ids, self._mask = 0, None, None, None, None

    def _follow_beams(self, cache: Any) -> None:
        """Have a cache reorder what is kept beside it along with its own rows."""
        kept, own, reorder = self._kept, ref(cache), type(cache).reorder_cache

        def reordered(beams: Tensor) -> None:
            reorder(own(), beams)
            kept[own()] = kept[own()][beams.to(kept[own()].device)]

        cache.reorder_cache = reordered
