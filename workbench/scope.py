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
    """Where in a text each edit of an update acts: from a token on that matches its last key.

    Token t with the input `x_t` of `layer` matches key k of edit e if
    `key_ek x_t >= threshold_ek`, where each key before k has been matched at t or earlier: what
    the edit is about, then what it asks of that. The edit acts there and for some tokens more, as
    many as its answer has, or to the end of the text. Nothing that an update changes lies below its
    lowest layer, so where that is the layer looked at, live edits do not decide over one another's
    scope. A text's first token is told by its id: what models hold there is nearly the same for
    every token (attention sinks, Xiao et al. 2024).

    Args:
        layer: Name of the layer whose input is looked at.
        keys: `(..., edits, keys, in)`.
        thresholds: `(..., edits, keys)`; minus infinity: every token matches.
        openings: Ids of the tokens that match an edit's first key as a text's first,
            `(..., edits)`; -1: none.
        lengths: How many tokens an edit acts on, from each that matches its last key on,
            `(..., edits)`; 0: all that follow, as with one key alone.

    A leading axis, where there is one, holds another scope for each sequence of a batch.
    """

    layer: str
    keys: Tensor
    thresholds: Tensor
    openings: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self.parts()]
        shape = shapes[0][:-1]
        if len(shape) < 2 or shapes[1:] != [shape, shape[:-1], shape[:-1]]:
            raise EditError(
                f"A scope's keys are (..., edits, keys, in), with a threshold for each, and for "
                f"each edit an opening and a length; got {', '.join(map(str, map(tuple, shapes)))}."
            )

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, thresholds, openings, lengths."""
        return self.keys, self.thresholds, self.openings, self.lengths

    def __len__(self) -> int:
        return self.keys.shape[-3]

    def matched(self, inputs: Tensor) -> Tensor:
        """Which keys each token matches, `(..., tokens, in)` -> `(..., tokens, edits, keys)`."""
        found = inputs @ self.keys.flatten(-3, -2).mT
        return found.unflatten(-1, self.keys.shape[-3:-1]) >= self.thresholds.unsqueeze(-3)

    def in_force(self, matched: Tensor) -> Tensor:
        """Which edits act on each token of whole texts, `(..., tokens, edits)` bool.

        Args:
            matched: As `matched` gives it, `(..., tokens, edits, keys)`.
        """
        hit, *later = matched.unbind(-1)
        known = hit.cummax(-2).values
        for key in later:
            hit = key & known
            known = hit.cummax(-2).values
        place = torch.arange(hit.shape[-2], device=hit.device).unsqueeze(-1)
        latest = torch.where(hit, place, -(2**31)).cummax(-2).values
        lengths = self.lengths.unsqueeze(-2)
        return torch.where(lengths == 0, known, place - latest < lengths)

    def map(self, function: Callable[[Tensor], Tensor]) -> Scope:
        """Apply a function to keys and thresholds; the others follow to another device alone."""
        keys = function(self.keys)
        openings, lengths = (part.to(keys.device) for part in (self.openings, self.lengths))
        return Scope(self.layer, keys, function(self.thresholds), openings, lengths)

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
        rest = (torch.cat([scope.parts()[n] for scope in scopes], -1) for n in (2, 3))
        return cls(looked_at[0], torch.cat(keys, -3), torch.cat(thresholds, -2), *rest)


class Reading:
    """How far a model has read, for one scope: which edits act on each token.

    Generation reads a text in pieces, with a cache of what came before. What was matched in it is
    kept beside the cache, follows its rows to other beams, and is forgotten with it.

    Args:
        scope: What is looked for.
        reached: Which edits act on each token of the present pass, `(batch, tokens, edits)` bool.
    """

    def __init__(self, scope: Scope, reached: Tensor | None = None) -> None:
        self.scope, self.reached = scope, reached
        self._start = 0  # tokens in the cache before the present pass
        self._matched: Tensor | None = None  # in all that was read, (batch, tokens, edits, keys)
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._kept: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def begin(self, ids: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        """A forward pass of the whole model begins, with these arguments."""
        self._start = 0 if cache is None else int(cache.get_seq_length())
        matched = self._kept.get(cache) if self._start else None
        self._matched = None if matched is None else matched[:, : self._start]
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
        if self._start:  # what was read before there was an edit has matched nothing
            before = self._matched
            if before is None:
                before = matched.new_zeros(len(matched), self._start, *matched.shape[2:])
            matched = torch.cat((before.to(matched.device), matched), 1)
        elif self._ids is not None:
            ids, thresholds = self._ids.to(inputs.device), scope.thresholds.unsqueeze(-3)
            always = (thresholds == -torch.inf).expand_as(matched).clone()
            always[..., 0] |= ids.unsqueeze(-1) == scope.openings.unsqueeze(-2)
            first = read & (read.cumsum(1) == 1)
            matched = torch.where(first[..., None, None], always, matched)
        self._matched = matched
        self.reached = scope.in_force(matched)[:, -inputs.shape[1] :]

    def end(self, output: Any) -> None:
        """The forward pass is over, or has failed."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._matched is not None:
            if cache not in self._kept:
                self._follow_beams(cache)
            self._kept[cache] = self._matched
        self._start, self._matched, self._ids, self._mask = 0, None, None, None

    def _follow_beams(self, cache: Any) -> None:
        """Have a cache reorder what is kept beside it along with its own rows."""
        kept, own, reorder = self._kept, ref(cache), type(cache).reorder_cache

        def reordered(beams: Tensor) -> None:
            reorder(own(), beams)
            kept[own()] = kept[own()][beams.to(kept[own()].device)]

        cache.reorder_cache = reordered
