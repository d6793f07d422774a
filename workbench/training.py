"""Meta-training of an editor: vectorised steps over a trunk cache (Mitchell et al. 2022, 3.2)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from workbench.editors.base import CapturedEdits, TrainableEditor
from workbench.encoding import (
    Batch,
    Tokens,
    collate,
    kl,
    passes,
    per_sequence_mean,
    sequence_nll,
)
from workbench.errors import EditorError
from workbench.factors import Factors, capture
from workbench.overlay import overlay
from workbench.updates import Update
from workbench.views import Trunk, TrunkCache


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of meta-training; the defaults are the paper's for MEND where it gives one.

    Learning rates and weights of what an editor does not have are not looked at.

    Args:
        steps: Optimiser steps.
        batch: Edits in one step, all captured, transformed and scored together.
        at_once: Most edits that are live together when their texts are scored. Each step draws
            a power of 2 up to it, so that an editor learns to edit alone and in company.
        lr: Adam's learning rate for the networks, or for the trained base.
        edit_lr_lr: Adam's learning rate for the layers' alphas.
        gate_lr: Adam's learning rate for the logits of a gated editor's shares.
        c_edit: Weight of the edit loss (0.1 in the paper).
        c_locality: Weight of the locality loss.
        whole_targets: The edit loss is that of whole targets, summed over their tokens, so that a
            long one is not learned less for its length; False: the mean by token.
        c_base: Weight of KL(original || trained base) on the locality texts (ENN).
        clip: Largest gradient norm.
        equivalents: Equivalence samples for each edit: first a paraphrase, then the prompt itself.
        neighbors: Neighbouring prompts for each edit whose answers must not move.
        crossed: Hard negatives for each edit made from other training edits, by turns: its wording
            with another's subject, and its subject in another relation's wording.
        texts: Unrelated texts for each edit that must not move.
        text_tokens: Tokens read of an unrelated text; every position counts.
        warmup: Steps over which the learning rates rise from 0.
        decay: Share of the steps, at the end, over which they fall to 0.
        seed: Chooses the batches; a step's batch depends on the seed and the step alone.
        validate_every: Steps between two looks at the validation examples.
        validation: Validation examples looked at.
        patience: Looks without a better loss after which training stops; 0: never.
        save_every: Steps between checkpoints.
        one_alpha_optimizer: As the published code: alpha moves with `lr`, its own never acts.
        late_first_step: As the published code: the first optimiser step takes in one batch more
            (with batch 1 and accumulation, one example more).
        reset_statistics: As the published code: a resumed run gathers its running statistics anew.
        accumulate: Batches whose gradients are averaged into one step.
        chunk: Edits whose graph through the editor is held at a time. In a larger batch the
            editor runs again, chunk by chunk, against the gradient of its factors, so that
            memory for it does not grow with the batch.
        checkpointing: Run the blocks under the losses again in the backward pass rather than keep
            what they held: less memory, more time.
        cache_gb: Memory for what is constant in training: hidden states where the edited blocks
            begin, last ones, factors of the edits. 0: they are computed each time, and a resumed
            run then equals an unbroken one to the bit, not only to rounding.
        health_after: Step at which training stops if the edit loss has not fallen; 0: never.
    """

    steps: int = 1000
    batch: int = 10
    at_once: int = 1
    lr: float = 1e-6
    edit_lr_lr: float = 1e-4
    gate_lr: float = 1e-2
    c_edit: float = 0.1
    c_locality: float = 1.0
    whole_targets: bool = False
    c_base: float = 1.0
    clip: float = 100.0
    equivalents: int = 1
    neighbors: int = 1
    crossed: int = 0
    texts: int = 1
    text_tokens: int = 20
    warmup: int = 0
    decay: float = 0.0
    seed: int = 0
    validate_every: int = 200
    validation: int = 64
    patience: int = 5
    save_every: int = 100
    one_alpha_optimizer: bool = False
    late_first_step: bool = False
    reset_statistics: bool = False
    accumulate: int = 1
    chunk: int = 32
    checkpointing: bool = False
    cache_gb: float = 2.0
    health_after: int = 300

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "at_once", "accumulate", "chunk", "equivalents", "text_tokens")
        for name in (*counts, "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise EditorError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.at_once & (self.at_once - 1) or self.batch % self.at_once:
            raise EditorError(
                f"at_once must be a power of 2 that divides the batch of {self.batch}; got "
                f"{self.at_once}."
            )
        if not 0 <= self.decay <= 1:
            raise EditorError(f"decay is a share of the steps, 0 to 1; got {self.decay}.")

    def together(self, step: int) -> int:
        """How many edits of a step's batch are live together."""
        chooser = random.Random(f"{self.seed}:together:{step}")
        return 1 << chooser.randrange(self.at_once.bit_length())

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied by at a step (0-based)."""
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(rise, left, 1.0) if self.decay else min(rise, 1.0)


@dataclass(frozen=True)
class EditTexts:
    """One edit's texts as tokens: the edit, its equivalents, and what must not change."""

    edit: Tokens
    equivalents: tuple[Tokens, ...]
    locality: tuple[Tokens, ...]


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


class MetaStep:
    """The losses of a batch of edits and their gradient with respect to the editor.

    All edits are captured, made and scored together, each sequence under its own edit. The
    language model's graph ends at the edits' factors: they are the leaves of its backward pass,
    and their gradient then runs through the editor.

    Args:
        editor: What is trained.
        config: Weights of the losses.
        cached: Keep the lower part's output; False recomputes it each time.
    """

    def __init__(
        self, editor: TrainableEditor, config: TrainingConfig, cached: bool = True
    ) -> None:
        self.editor, self.config, self.lm = editor, config, editor.lm
        self.trunk = Trunk(self.lm, editor.layers, checkpointing=config.checkpointing)
        original = Trunk(editor.original, editor.layers) if editor.trains_base else self.trunk
        self.cache = TrunkCache(editor.original, original, config.cache_gb if cached else 0.0)

    def losses(
        self, edits: Sequence[EditTexts], backward: bool = True, at_once: int = 1
    ) -> StepLosses:
        """Score a batch; with `backward`, add the gradient of `total` to the editor's `.grad`.

        An editor in training mode takes the rows into its running statistics first.

        Args:
            edits: The batch.
            backward: Whether to differentiate.
            at_once: Edits, one after another in the batch, whose texts are scored under all of
                them; divides their number.
        """
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
            edit_loss, success = self._equivalents(edits, leaves, at_once)
            locality, base = self._locality(edits, leaves, at_once)
        if backward:
            slopes = [leaf.grad for leaf in leaves.tensors()]
            if whole:
                _backward(made, slopes)
            else:
                self._chunked_backward(captured, slopes, at_once)
        total = config.c_edit * edit_loss + config.c_locality * locality + config.c_base * base
        return StepLosses(edit_loss, before, locality, total, success, base)

    def _capture(self, texts: Sequence[Tokens]) -> tuple[CapturedEdits, float]:
        """Factors of each text's own loss, `(batch, tokens, width)`, and the mean loss."""
        if self.editor.trains_base:  # nothing of it is constant
            rows = self._captured(texts)
        else:
            rows = self.cache.factors(texts, self._captured)
        nlls, said, *sides = zip(*rows, strict=True)
        padded = iter([pad_sequence(list(rows), batch_first=True) for rows in sides])
        factors = {layer.name: Factors(next(padded), next(padded)) for layer in self.editor.layers}
        before = self._edit_loss(torch.stack(nlls), texts).mean().item()
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

    def _equivalents(
        self, edits: Sequence[EditTexts], leaves: Update, at_once: int
    ) -> tuple[float, float]:
        """Mean loss of the equivalents under their edits, and the share that is exact.

        Where the leaves want gradient, that of the weighted loss is added to theirs: one batch
        at a time, so that one batch's logits are held at a time.
        """
        texts, owners = _owned([edit.equivalents for edit in edits], at_once)
        losses, exact = [], []
        for places in passes(self.lm, texts):
            some = [texts[place] for place in places]
            batch, hidden = self._batch(some)
            logits = self._edited(batch, hidden, leaves, owners[places])
            nll = self._edit_loss(sequence_nll(logits, batch), some)
            if nll.requires_grad:
                (self.config.c_edit / len(texts) * nll.sum()).backward()
            right = (logits.detach().argmax(-1) == batch.targets).float()
            losses.append(nll.detach())
            exact.append((per_sequence_mean(right, batch) == 1).float())
        return torch.cat(losses).mean().item(), torch.cat(exact).mean().item()

    def _locality(
        self, edits: Sequence[EditTexts], leaves: Update, at_once: int
    ) -> tuple[float, float]:
        """Mean KL of the original to the edited model, and to a trained base, on what must not
        change; gradients as `_equivalents`."""
        texts, owners = _owned([edit.locality for edit in edits], at_once)
        edited, moved = [], []

        def divergence(base: Tensor, logits: Tensor, batch: Batch, weight: float) -> Tensor:
            found = per_sequence_mean(kl(base.to(logits.device), logits), batch)
            if found.requires_grad:
                (weight / len(texts) * found.sum()).backward()
            return found.detach()

        for places in passes(self.lm, texts) if texts else ():
            batch, hidden = self._batch([texts[place] for place in places])
            base = self.cache.logits([texts[place] for place in places])
            logits = self._edited(batch, hidden, leaves, owners[places])
            edited.append(divergence(base, logits, batch, self.config.c_locality))
            if self.editor.trains_base:
                logits = self.trunk.logits(batch, hidden, nullcontext)
                moved.append(divergence(base, logits, batch, self.config.c_base))
        return tuple(torch.cat(found).mean().item() if found else 0.0 for found in (edited, moved))  # type: ignore[return-value]

    def _batch(self, texts: Sequence[Tokens]) -> tuple[Batch, Tensor | None]:
        return collate(self.lm, texts), self.cache.hidden(texts)

    def _edited(
        self, batch: Batch, hidden: Tensor | None, leaves: Update, owners: Tensor
    ) -> Tensor:
        """Logits at the targets, each text under the edits that own it."""
        owners = owners.to(self.lm.device)
        single = all(len(tensor) == 1 for tensor in leaves.tensors())
        mine = leaves.map(lambda t: t[0] if single else t[owners.to(t.device)])
        again = partial(overlay, self.lm.model, mine)
        with again():
            return self.trunk.logits(batch, hidden, again)

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
