"""Meta-training of an editor: vectorised steps over a trunk cache (Mitchell et al. 2022, 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from workbench import parallel
from workbench.disk import RowsOnDisk
from workbench.divergence import losses_of
from workbench.editors.base import TrainableEditor
from workbench.editors.proposals import CapturedEdits
from workbench.encoding import (
    Batch,
    Tokens,
    collate,
    passes,
    per_sequence_mean,
    sequence_nll,
)
from workbench.factors import Factors, capture
from workbench.overlay import overlay
from workbench.stacking import of_sequences
from workbench.training.config import TrainingConfig
from workbench.updates import Update
from workbench.views import Trunk, TrunkCache


@dataclass(frozen=True)
class EditTexts:
    """One edit's texts as tokens: the edit, its equivalents, and what must not change.

    The first `near` locality texts are those of the edit's neighbourhood, which it may well move.
    """

    edit: Tokens
    equivalents: tuple[Tokens, ...]
    locality: tuple[Tokens, ...]
    near: int = 0


@dataclass(frozen=True)
class StepLosses:
    """Means over one batch of edits.

    Args:
        edit: Loss of the equivalents after the edit, nats a token (or a whole target).
        edit_before: The same before it, of the edit itself.
        locality: KL(original || edited) on what must not change, nats a token.
        total: `c_edit * edit + c_locality * locality + c_base * base`.
        success: Share of equivalents whose every target token is the most likely one.
        base: KL(original || trained base) on the same, nats a token; 0 where the base is frozen.
    """

    edit: float
    edit_before: float
    locality: float
    total: float
    success: float
    base: float = 0.0


@dataclass(frozen=True)
class _Counts:
    """How many edits and texts the means of a batch are taken over."""

    edits: int
    equivalents: int
    locality: int

    @classmethod
    def of(cls, edits: Sequence[EditTexts], hardest: int) -> _Counts:
        left_out = sum(max(0, edit.near - hardest) for edit in edits) if hardest else 0
        return cls(
            len(edits),
            sum(len(edit.equivalents) for edit in edits),
            sum(len(edit.locality) for edit in edits) - left_out,
        )


class MetaStep:
    """The losses of a batch of edits and their gradient with respect to the editor.

    All edits are captured, made and scored together, each sequence under its own edit. The
    language model's graph ends at the edits' factors: they are the leaves of its backward pass,
    and their gradient then runs through the editor.

    Args:
        editor: What is trained.
        config: Weights of the losses.
        cached: Keep the lower part's output; False recomputes it each time.
        cache_folder: Keep it on disk, too, for what memory does not hold and for later runs.
    """

    def __init__(
        self,
        editor: TrainableEditor,
        config: TrainingConfig,
        cached: bool = True,
        cache_folder: Path | None = None,
    ) -> None:
        self.editor, self.config, self.lm = editor, config, editor.lm
        self.trunk = Trunk(self.lm, editor.layers, checkpointing=config.checkpointing)
        original = Trunk(editor.original, editor.layers) if editor.trains_base else self.trunk
        disk = RowsOnDisk(cache_folder, editor.original, editor.layers) if cache_folder else None
        held = config.cache_gb if cached else 0.0
        self.cache = TrunkCache(editor.original, original, held, disk)

    def losses(
        self, edits: Sequence[EditTexts], backward: bool = True, at_once: int = 1
    ) -> StepLosses:
        """Score a batch; with `backward`, add the gradient of `total` to the editor's `.grad`.

        An editor in training mode takes the rows into its running statistics first. Of several
        processes each scores its share of the batch: the losses are those of the whole, and the
        gradients of all are still to be summed.

        Args:
            edits: The batch.
            backward: Whether to differentiate.
            at_once: Edits, one after another in the batch, whose texts are scored under all of
                them; divides their number.
        """
        config, counts = self.config, _Counts.of(edits, self.config.hardest)
        mine = parallel.share(edits, at_once)
        parts = self._parts(mine, counts, backward, at_once) if mine else (0.0,) * 5
        edit, before, locality, success, base = parallel.added(parts)
        total = config.c_edit * edit + config.c_locality * locality + config.c_base * base
        return StepLosses(edit, before, locality, total, success, base)

    def _parts(
        self, edits: Sequence[EditTexts], counts: _Counts, backward: bool, at_once: int
    ) -> tuple[float, ...]:
        """What some edits of a batch add to its losses; their gradient, to the editor's."""
        editor, config = self.editor, self.config
        whole = len(edits) <= config.chunk
        with torch.set_grad_enabled(backward and whole):
            captured, before = self._capture([edit.edit for edit in edits])
            made = editor.edit_batch(captured, gather=editor.training).folded()
            made = made.map(lambda terms: terms.unflatten(0, (-1, at_once)).flatten(1, 2))
        leaves = made.map(lambda tensor: tensor.detach().requires_grad_(backward))
        if not whole:
            del made
        with torch.set_grad_enabled(backward):
            edit_loss, success, locality, base = self._scored(edits, leaves, at_once, counts)
        if backward:
            slopes = [leaf.grad for leaf in leaves.tensors()]
            if whole:
                _backward(made, slopes)
            else:
                self._chunked_backward(captured, slopes, at_once)
        return edit_loss, before / counts.edits, locality, success, base

    def _capture(self, texts: Sequence[Tokens]) -> tuple[CapturedEdits, float]:
        """Factors of each text's own loss, `(batch, tokens, width)`, and the sum of losses."""
        if self.editor.trains_base:  # nothing of it is constant
            rows = self._captured(texts)
        else:
            rows = self.cache.factors(texts, self._captured)
        nlls, said, *sides = zip(*rows, strict=True)
        padded = iter([pad_sequence(list(rows), batch_first=True) for rows in sides])
        factors = {layer.name: Factors(next(padded), next(padded)) for layer in self.editor.layers}
        before = self._edit_loss(torch.stack(nlls), texts).sum().item()
        return CapturedEdits(tuple(texts), said, factors), before

    def _edit_loss(self, nll: Tensor, texts: Sequence[Tokens]) -> Tensor:
        """Each text's loss as it is weighed, from its mean by token, `(batch,)`."""
        if not self.config.whole_targets:
            return nll
        return nll * torch.tensor([len(text.targets) for text in texts], device=nll.device)

    def _captured(self, texts: Sequence[Tokens]) -> list[tuple[Tensor, ...]]:
        """Each text's loss, the model's own answer, and u and delta of every layer, without the
        rows after the last live one."""
        editor, found = self.editor, dict[int, tuple[Tensor, ...]]()
        graph = editor.second_order and torch.is_grad_enabled()
        again = _again if editor.trains_base else None
        for places in passes(self.lm, texts):
            batch, hidden = self._batch([texts[place] for place in places])
            with again() if again else nullcontext(), capture(editor.layers, graph) as tap:
                logits = self.trunk.logits(batch, hidden, again)
                nll = sequence_nll(logits, batch)
                factors = tap.factors(nll.sum(), batch.size)
            said = logits.detach().argmax(-1).split([len(texts[place].targets) for place in places])
            ends = [layer.last_live().tolist() for layer in factors.values()]
            for row, place in enumerate(places):
                sides = [nll[row].detach(), said[row].clone()]
                for layer, end in zip(factors.values(), ends, strict=True):
                    rows = row, slice(end[row] + 1)
                    sides += [layer.activation[rows].clone(), layer.delta[rows].clone()]
                found[place] = tuple(sides)
        return [found[place] for place in range(len(texts))]

    def _scored(
        self, edits: Sequence[EditTexts], leaves: Update, at_once: int, counts: _Counts
    ) -> tuple[float, ...]:
        """Score each text under its edits.

        Where the leaves want gradient, that of the weighted losses is added to theirs: one pass at
        a time, so that one pass's logits are held at a time.

        Returns:
            Loss of the equivalents, share of them that are exact, KL of the original to the edited
            model on what must not change, and to a trained base; each by its count.
        """
        config, lm = self.config, self.lm
        told, tellers = _owned([edit.equivalents for edit in edits], at_once)
        held, holders = _owned(self._held(edits, leaves, at_once), at_once)
        texts, owners = told + held, torch.cat((tellers, holders))
        sums = torch.zeros(4)
        for places in map(sorted, passes(lm, texts)):
            some = [texts[place] for place in places]
            batch, hidden = self._batch(some)
            finals = self._edited(batch, hidden, leaves, owners[places])
            first = sum(place < len(told) for place in places)
            targets = batch.targets[: sum(len(text.targets) for text in some[:first])]
            base = self.cache.finals(some[first:]) if some[first:] else finals[:0]
            losses, right = losses_of(finals, targets, base, self.trunk.head)
            means = per_sequence_mean(losses, batch)
            following = self._edit_loss(means[:first], some[:first]).sum() / counts.equivalents
            moved = means[first:].sum() / max(1, counts.locality)
            if means.requires_grad:
                (config.c_edit * following + config.c_locality * moved).backward()
            right = pad(right.float(), (0, len(losses) - len(right)))
            exact = (per_sequence_mean(right, batch) == 1).sum() / counts.equivalents
            sums[:3] += torch.stack((following.detach(), exact, moved.detach())).cpu()
            if some[first:] and self.editor.trains_base:
                sums[3] += self._base_moved(some[first:], base, counts.locality)
        return tuple(sums.tolist())

    def _base_moved(self, texts: Sequence[Tokens], base: Tensor, count: int) -> Tensor:
        """KL of the original to the trained base, by its count; its weighted gradient is added to
        the base's."""
        batch, hidden = self._batch(texts)
        finals = self.trunk.final(batch, hidden, nullcontext)
        moved = per_sequence_mean(self._moved(base, finals), batch).sum() / count
        if moved.requires_grad:
            (self.config.c_base * moved).backward()
        return moved.detach().cpu()

    @torch.no_grad()
    def _held(
        self, edits: Sequence[EditTexts], leaves: Update, at_once: int
    ) -> list[tuple[Tokens, ...]]:
        """Each edit's texts that must not change; of the near ones, those that it moves most."""
        most = self.config.hardest
        if not most:
            return [edit.locality for edit in edits]
        texts, owners = _owned([edit.locality[: edit.near] for edit in edits], at_once)
        moves = torch.zeros(len(texts))
        for places in passes(self.lm, texts) if texts else ():
            some = [texts[place] for place in places]
            batch, hidden = self._batch(some)
            finals = self._edited(batch, hidden, leaves, owners[places])
            moved = self._moved(self.cache.finals(some), finals)
            moves[places] = per_sequence_mean(moved, batch).cpu()
        held = []
        for edit, mine in zip(edits, moves.split([edit.near for edit in edits]), strict=True):
            hardest = mine.topk(min(most, edit.near)).indices.tolist()
            held.append((*(edit.locality[k] for k in hardest), *edit.locality[edit.near :]))
        return held

    def _batch(self, texts: Sequence[Tokens]) -> tuple[Batch, Tensor | None]:
        return collate(self.lm, texts), self.cache.hidden(texts)

    def _edited(
        self, batch: Batch, hidden: Tensor | None, leaves: Update, owners: Tensor
    ) -> Tensor:
        """What the head reads at the targets, each text under the edits that own it."""
        single = all(len(tensor) == 1 for tensor in leaves.tensors())
        mine = of_sequences(leaves, 0 if single else owners)
        with overlay(self.lm.model, mine) as reading:

            def again() -> AbstractContextManager[Any]:
                reached = None if reading is None else reading.reached
                return overlay(self.lm.model, mine, reached=reached)

            return self.trunk.final(batch, hidden, again)

    def _moved(self, base: Tensor, finals: Tensor) -> Tensor:
        """KL of the original model's to these next-token distributions, `(n,)`."""
        none = torch.empty(0, dtype=torch.long, device=self.lm.device)
        return losses_of(finals, none, base, self.trunk.head)[0]

    def _chunked_backward(
        self, edits: CapturedEdits, slopes: Sequence[Tensor | None], at_once: int
    ) -> None:
        """Run the editor once more, some edits at a time, against the gradient of its update."""
        apart = [s if s is None else s.unflatten(1, (at_once, -1)).flatten(0, 1) for s in slopes]
        size, count = self.config.chunk, len(edits.tokens)
        for part in (slice(first, first + size) for first in range(0, count, size)):
            with torch.enable_grad():
                some = edits[part]
                if self.editor.second_order:
                    some, _ = self._capture(some.tokens)
                made = self.editor.edit_batch(some).folded()
            _backward(made, [slope if slope is None else slope[part] for slope in apart])


@contextmanager
def _again() -> Iterator[None]:
    """Attention that can be differentiated twice; layers that run again are not captured again."""
    with sdpa_kernel(SDPBackend.MATH), capture(()):
        yield


def _backward(made: Update, slopes: Sequence[Tensor | None]) -> None:
    """Send the gradient of an update's tensors on into the editor that made it."""
    pairs = [pair for pair in zip(made.tensors(), slopes, strict=True) if pair[0].requires_grad]
    # A batch captured in parts is padded less, by terms that are zero.
    cut = [slope if slope is None else slope[:, : tensor.shape[1]] for tensor, slope in pairs]
    torch.autograd.backward([tensor for tensor, _ in pairs], cut)


def _owned(texts: Sequence[Sequence[Tokens]], at_once: int) -> tuple[list[Tokens], Tensor]:
    """All edits' texts in a row, and the set of edits that each belongs to."""
    owners = [owner // at_once for owner, some in enumerate(texts) for _ in some]
    return [text for some in texts for text in some], torch.tensor(owners, dtype=torch.long)
