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
    many as its answer has, or to the end of the text. A text that goes on to give the answer is
    about the subject no longer until it matches the first key again; an answer that stands in the
    question ends nothing.

    Nothing that an update changes lies below its lowest layer, so where that is the layer looked
    at, live edits do not decide over one another's scope. A text's first token is told by its id:
    what models hold there is nearly the same for every token (attention sinks, Xiao et al. 2024).

    Args:
        layer: Name of the layer whose input is looked at.
        keys: `(..., edits, keys, in)`.
        thresholds: `(..., edits, keys)`; minus infinity: every token matches.
        openings: Ids of the tokens that match an edit's first key as a text's first,
            `(..., edits)`; -1: none.
        answers: Ids of each edit's answer, `(..., edits, longest)`, filled up with -1 on the left.
            An edit acts on as many tokens as it has, from each that matches its last key on; none:
            on all that follow, as with one key alone.

    A leading axis, where there is one, holds another scope for each sequence of a batch.
    """

    layer: str
    keys: Tensor
    thresholds: Tensor
    openings: Tensor
    answers: Tensor

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self.parts()]
        shape = shapes[0][:-1]
        edits, answers = shape[:-1], shapes[3]
        if (
            len(shape) < 2
            or not shape[-1]
            or shapes[1:3] != [shape, edits]
            or answers[:-1] != edits
            or not answers[-1]
        ):
            raise EditError(
                f"A scope's keys are (..., edits, keys, in), with a threshold for each, and for "
                f"each edit an opening and an answer; got "
                f"{', '.join(map(str, map(tuple, shapes)))}."
            )

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, thresholds, openings, answers."""
        return self.keys, self.thresholds, self.openings, self.answers

    @property
    def lengths(self) -> Tensor:
        """How many tokens each edit's answer has, `(..., edits)`; 0: it acts to the text's end."""
        return (self.answers >= 0).sum(-1)

    def __len__(self) -> int:
        return self.keys.shape[-3]

    def matched(self, inputs: Tensor) -> Tensor:
        """Which keys each token matches, `(..., tokens, in)` -> `(..., tokens, edits, keys)`."""
        found = inputs @ self.keys.flatten(-3, -2).mT
        return found.unflatten(-1, self.keys.shape[-3:-1]) >= self.thresholds.unsqueeze(-3)

    def answered(self, ids: Tensor) -> Tensor:
        """At which tokens an edit's answer ends, `(..., tokens)` -> `(..., tokens, edits)` bool."""
        longest = self.answers.shape[-1]
        ends = pad(ids, (longest - 1, 0), value=-1).unfold(-1, longest, 1).unsqueeze(-2)
        answers = self.answers.unsqueeze(-3)
        return ((ends == answers) | (answers < 0)).all(-1) & (self.lengths > 0).unsqueeze(-2)

    def in_force(self, matched: Tensor, answered: Tensor | None = None) -> Tensor:
        """Which edits act on each token of whole texts, `(..., tokens, edits)` bool.

        Args:
            matched: As `matched` gives it, `(..., tokens, edits, keys)`.
            answered: As `answered` gives it, `(..., tokens, edits)`; None: nowhere.
        """
        place = torch.arange(matched.shape[-3], device=matched.device).unsqueeze(-1)
        lengths = self.lengths.unsqueeze(-2)

        def latest(found: Tensor) -> Tensor:
            return torch.where(found, place, -(2**31)).cummax(-2).values

        def hits(over: Tensor) -> Tensor:
            hit, *later = matched.unbind(-1)
            for key in later:
                hit = key & (latest(hit) > over)
            return hit

        over = torch.full_like(place, -1)
        if answered is not None:
            asked = latest(hits(over))
            asked = (asked >= 0) & (asked >= latest(matched[..., 0]))
            before = place - lengths
            asked = asked.gather(-2, before.clamp_min(0).expand_as(asked)) & (before >= 0)
            over = latest(answered & asked).clamp_min(-1)
        last = latest(hits(over))
        return torch.where(lengths == 0, last > over, place - last < lengths)

    def map(self, function: Callable[[Tensor], Tensor]) -> Scope:
        """Apply a function to keys and thresholds; the others follow to another device alone."""
        keys = function(self.keys)
        openings, answers = (part.to(keys.device) for part in (self.openings, self.answers))
        return Scope(self.layer, keys, function(self.thresholds), openings, answers)

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
        longest = max(scope.answers.shape[-1] for scope in scopes)
        answers = [widened(scope.answers, longest) for scope in scopes]
        parts = (torch.cat(keys, -3), torch.cat(thresholds, -2), openings, torch.cat(answers, -2))
        return cls(looked_at[0], *parts)


def widened(answers: Tensor, longest: int) -> Tensor:
    """Answers as `Scope` holds them, `(..., tokens)` -> `(..., longest)`."""
    return pad(answers, (longest - answers.shape[-1], 0), value=-1)


@dataclass(frozen=True)
class _Read:
    """All that a model has read so far: ids, -1 where there is none, `(batch, tokens)`, what
    matched there, `(batch, tokens, edits, keys)`, and the ends of answers, `(..., edits)`."""

    ids: Tensor
    matched: Tensor
    answered: Tensor

    def rows(self, places: Tensor) -> _Read:
        places = places.to(self.ids.device)
        return _Read(self.ids[places], self.matched[places], self.answered[places])

    def then(self, later: _Read, start: int) -> _Read:
        """The first `start` tokens of this, and what was read after them."""
        parts = zip(vars(self).values(), vars(later).values(), strict=True)
        return _Read(*(torch.cat((own[:, :start].to(new), new), 1) for own, new in parts))


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
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._before: _Read | None = None
        self._read: _Read | None = None
        self._kept: WeakKeyDictionary[Any, _Read] = WeakKeyDictionary()

    def begin(self, ids: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        """A forward pass of the whole model begins, with these arguments."""
        self._start = 0 if cache is None else int(cache.get_seq_length())
        self._before = self._kept.get(cache) if self._start else None
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
        shape = inputs.shape[:2]
        seen = torch.ones(shape, dtype=torch.bool, device=inputs.device)
        if self._mask is not None and self._mask.dim() == 2:
            seen = self._mask[:, -shape[1] :].bool().to(inputs.device)
            matched &= seen[..., None, None]
        ids = torch.full(shape, -1, device=inputs.device)
        if self._ids is not None:
            ids = self._ids.to(inputs.device).masked_fill(~seen, -1)
        before = self._before
        if self._start and before is None:  # nothing matched before there was an edit
            rest = shape[0], self._start
            nothing = matched.new_zeros(*rest, *matched.shape[2:])
            before = _Read(ids.new_full(rest, -1), nothing, nothing[..., 0])
        if before is None and self._ids is not None:
            thresholds = scope.thresholds.unsqueeze(-3)
            always = (thresholds == -torch.inf).expand_as(matched).clone()
            always[..., 0] |= ids.unsqueeze(-1) == scope.openings.unsqueeze(-2)
            first = seen & (seen.cumsum(1) == 1)
            matched = torch.where(first[..., None, None], always, matched)
        known = ids.new_empty(shape[0], 0) if before is None else before.ids[:, : self._start]
        context = known[:, known.shape[1] - min(known.shape[1], scope.answers.shape[-1] - 1) :]
        answered = scope.answered(torch.cat((context.to(ids), ids), 1))[:, -shape[1] :]
        read = _Read(ids, matched, answered)
        self._read = read if before is None else before.then(read, self._start)
        self.reached = scope.in_force(self._read.matched, self._read.answered)[:, -shape[1] :]

    def end(self, output: Any) -> None:
        """The forward pass is over."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._read is not None:
            if cache not in self._kept:
                self._follow_beams(cache)
            self._kept[cache] = self._read
        self._start, self._ids, self._mask, self._before, self._read = 0, None, None, None, None

    def _follow_beams(self, cache: Any) -> None:
        """Have a cache reorder what is kept beside it along with its own rows."""
        kept, own, reorder = self._kept, ref(cache), type(cache).reorder_cache

        def reordered(beams: Tensor) -> None:
            reorder(own(), beams)
            kept[own()] = kept[own()].rows(beams)

        cache.reorder_cache = reordered
