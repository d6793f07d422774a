"""What editors are asked and what they answer: requests, captured gradients, proposals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from workbench.encoding import (
    Batch,
    Tokens,
    collate,
    per_sequence_mean,
    per_sequence_sum,
    sequence_nll,
    tokenize,
)
from workbench.errors import EditError
from workbench.factors import Factors, capture
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.scope import Scope
from workbench.updates import LayerUpdate, Update
from workbench.views import TrunkCache, target_logits


@dataclass(frozen=True)
class EditRequest:
    """What the model should say: after `prompt`, `target`.

    Args:
        prompt: What it reads.
        target: What it should say next.
        subject: What the prompt is about, a part of it; for ROME and for edits with a scope, whose
            editors guess it where it is None. Others do not look at it.
    """

    prompt: str
    target: str
    subject: str | None = None


@dataclass(frozen=True, eq=False)
class Proposal:
    """An editor's answer: the update, and the factors it was made from.

    Args:
        update: The change of weights; nothing has been applied.
        layers: The layers it changes, lowest first.
        tokens: The requests as tokens, in the order of the factors' batch axis.
        factors: Layer name -> the gradient's factors, `(batch, tokens, width)`.
        pseudofactors: Layer name -> pseudoactivations and pseudodeltas of the same shapes; None
            for editors that do not transform factors.
        edit_lrs: Layer name -> the layer's step size; empty where an editor has none.
        gates: Layer name -> the share of its own match beyond which a term acts; likewise.
    """

    update: Update
    layers: tuple[EditableLayer, ...]
    tokens: tuple[Tokens, ...]
    factors: Mapping[str, Factors]
    pseudofactors: Mapping[str, Factors] | None = None
    edit_lrs: Mapping[str, float] = field(default_factory=dict)
    gates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CapturedEdits:
    """A batch of edits as the model sees them, before any of them is made.

    Args:
        tokens: Each edit's text.
        predictions: What the model says in place of each edit's targets, `(targets,)` each.
        factors: Layer name -> factors of each edit's own mean loss, `(batch, tokens, width)`.
    """

    tokens: tuple[Tokens, ...]
    predictions: tuple[Tensor, ...]
    factors: Mapping[str, Factors]

    def __getitem__(self, part: slice) -> CapturedEdits:
        """Some of the edits."""
        factors = {n: Factors(f.activation[part], f.delta[part]) for n, f in self.factors.items()}
        return CapturedEdits(self.tokens[part], self.predictions[part], factors)


def capture_edits(
    lm: LanguageModel, layers: Sequence[EditableLayer], requests: Sequence[EditRequest]
) -> CapturedEdits:
    """Tokenise requests and capture the factors of each one's own mean loss.

    One forward pass and one backward pass down to the first edited layer.

    Args:
        lm: The frozen model.
        layers: Where to capture.
        requests: At least one.

    Raises:
        EditError: There is no request, or the loss is not finite.
    """
    return capture_texts(lm, layers, texts_of(lm, requests), lambda _, b: target_logits(lm, b))


# Logits at the targets of texts, which are also given as a batch.
Run = Callable[[Sequence[Tokens], Batch], Tensor]


def resumed(cache: TrunkCache) -> Run:
    """A run of the model for texts that are read again and again while only edits change: what
    lies below the edited layers is kept from the first time."""
    return lambda texts, batch: cache.trunk.logits(batch, cache.hidden(texts))


def texts_of(lm: LanguageModel, requests: Sequence[EditRequest]) -> tuple[Tokens, ...]:
    """Requests as tokens.

    Raises:
        EditError: There is none.
    """
    if not requests:
        raise EditError("There is nothing to edit: give at least one request (prompt, target).")
    return tuple(tokenize(lm, request.prompt, request.target) for request in requests)


def capture_texts(
    lm: LanguageModel, layers: Sequence[EditableLayer], tokens: Sequence[Tokens], run: Run
) -> CapturedEdits:
    """`capture_edits` of what has been tokenised.

    Args:
        lm: The frozen model.
        layers: Where to capture.
        tokens: At least one text.
        run: The model's forward pass.

    Raises:
        EditError: The loss is not finite.
    """
    batch = collate(lm, tokens)
    with capture(layers) as tap:
        logits = run(tokens, batch)
        loss = sequence_nll(logits, batch).sum()
        if not torch.isfinite(loss):
            raise EditError(
                f"The model's loss on this edit is {loss.item()}; its weights or activations are "
                f"not finite, so there is no gradient to edit with."
            )
        factors = tap.factors(loss, batch.size)
    said = logits.detach().argmax(-1).split([len(text.targets) for text in tokens])
    return CapturedEdits(tuple(tokens), said, factors)


def gradient_factors(
    lm: LanguageModel, layers: Sequence[EditableLayer], requests: Sequence[EditRequest]
) -> tuple[tuple[Tokens, ...], dict[str, Factors]]:
    """The tokens and the factors that `capture_edits` finds."""
    edits = capture_edits(lm, layers, requests)
    return edits.tokens, dict(edits.factors)


def side_by_side(
    batched: Update,
    kept: Mapping[str, Tensor],
    scope: Scope | None = None,
    rows: Sequence[int] | None = None,
) -> Update:
    """One update that carries out a whole batch of edits: all their terms (section 3.1).

    Args:
        batched: One change a sequence, `(batch, rank, width)`.
        kept: Layer name -> the terms to keep, `(batch, rank)` bool; those of padding go.
        scope: Where in a text the edits act; None: everywhere.
        rows: Which edit of the scope each sequence is; None: those in order.
    """
    made = {}
    for name, layer in batched.items():
        live = kept[name].to(layer.A.device)
        threshold = None if layer.threshold is None else layer.threshold[live]
        owners = None
        if scope is not None:
            edits = torch.tensor(rows or range(len(live)), device=live.device)
            owners = edits.unsqueeze(1).expand_as(live)[live]
        scale = float(layer.scale)
        made[name] = LayerUpdate(layer.A[live], layer.B[live], scale, threshold, owners)
    return Update(made, scope)


@torch.no_grad()
def missed(
    lm: LanguageModel, texts: Sequence[Tokens], run: Run, confidence: float
) -> tuple[list[Tokens], float]:
    """Those texts of whose targets some token is not likely enough, and the mean loss of all.

    Args:
        lm: The model.
        texts: At least one.
        run: Its forward pass.
        confidence: Probability that is enough.

    Returns:
        The texts missed, and nats a token.
    """
    batch = collate(lm, texts)
    losses = cross_entropy(run(texts, batch).float(), batch.targets, reduction="none")
    missing = per_sequence_sum((losses > -math.log(confidence)).float(), batch)
    left = [text for text, count in zip(texts, missing.tolist(), strict=True) if count]
    return left, per_sequence_mean(losses, batch).mean().item()


def joined(proposals: Sequence[Proposal], update: Update) -> Proposal:
    """One proposal of several that were made one by one, their texts in a row.

    Args:
        proposals: At least one, of one editor.
        update: What carries them all out.
    """
    first = proposals[0]
    pseudo = [p.pseudofactors for p in proposals if p.pseudofactors is not None]
    return replace(
        first,
        update=update,
        tokens=tuple(text for proposal in proposals for text in proposal.tokens),
        factors=_padded([proposal.factors for proposal in proposals]),
        pseudofactors=_padded(pseudo) if pseudo else None,
    )


def _padded(parts: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """Factors of several batches as those of one, zero rows filling up."""

    def batch(sides: Iterable[Tensor]) -> Tensor:
        return pad_sequence([rows for side in sides for rows in side], batch_first=True)

    return {
        name: Factors(
            batch(part[name].activation for part in parts),
            batch(part[name].delta for part in parts),
        )
        for name in parts[0]
    }
