"""Meta-training of an editor: vectorised steps over a trunk cache (Mitchell et al. 2022, 3.2)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from workbench.data import EditExample, Statement
from workbench.editors.mend import Mend
from workbench.encoding import (
    Batch,
    Tokens,
    collate,
    per_sequence_mean,
    sequence_nll,
    tokenize,
    tokenize_text,
)
from workbench.errors import EditError, EditorError
from workbench.factors import capture
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.updates import LayerUpdate, Update
from workbench.views import Trunk, TrunkCache


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of meta-training; the defaults are the paper's where it gives one.

    Args:
        steps: Optimiser steps.
        batch: Edits in one step, all captured, transformed and scored together.
        lr: Adam's learning rate for the networks.
        edit_lr_lr: Adam's learning rate for the layers' alphas.
        c_edit: Weight of the edit loss (0.1 in the paper).
        c_locality: Weight of the locality loss.
        clip: Largest gradient norm.
        equivalents: Equivalence samples for each edit: first a paraphrase, then the prompt itself.
        neighbors: Neighbouring prompts for each edit whose answers must not move.
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
        cache_gb: Memory for hidden states of the constant lower part. 0: they are computed each
            time, and a resumed run then equals an unbroken one to the bit, not only to rounding.
        health_after: Step at which training stops if the edit loss has not fallen; 0: never.
    """

    steps: int = 1000
    batch: int = 10
    lr: float = 1e-6
    edit_lr_lr: float = 1e-4
    c_edit: float = 0.1
    c_locality: float = 1.0
    clip: float = 100.0
    equivalents: int = 1
    neighbors: int = 1
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
    cache_gb: float = 2.0
    health_after: int = 300

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "accumulate", "equivalents", "text_tokens")
        for name in (*counts, "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise EditorError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.decay <= 1:
            raise EditorError(f"decay is a share of the steps, 0 to 1; got {self.decay}.")

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
        edit: Loss of the equivalents after the edit, nats a token.
        edit_before: The same before it (of the edit itself), nats a token.
        locality: KL(original || edited) on what must not change, nats a token.
        total: `c_edit * edit + c_locality * locality`.
        success: Share of equivalents whose every target token is the most likely one.
    """

    edit: float
    edit_before: float
    locality: float
    total: float
    success: float


class TextSampler:
    """Draws each step's batch: which edits, which of their equivalents and neighbours.

    Args:
        lm: For its tokenizer.
        examples: Training examples.
        texts: Unrelated texts.
        config: How many of each.
    """

    def __init__(
        self,
        lm: LanguageModel,
        examples: Sequence[EditExample],
        texts: Sequence[str],
        config: TrainingConfig,
    ) -> None:
        if not examples:
            raise EditorError("There are no training examples. Check the data's path and split.")
        self._lm, self._examples, self._texts, self._config = lm, examples, texts, config

    def batch(self, step: int) -> list[EditTexts]:
        """The edits of one step; each epoch goes through all examples in a new order."""
        size, n = self._config.batch, len(self._examples)
        chooser = random.Random(f"{self._config.seed}:{step}")
        return [self.texts(self._pick(step * size + k, n), chooser) for k in range(size)]

    def _pick(self, position: int, n: int) -> EditExample:
        # A random affine walk visits every example once an epoch, with no list to keep or save.
        epoch, place = divmod(position, n)
        chooser = random.Random(f"{self._config.seed}:epoch:{epoch}")
        start, stride = chooser.randrange(n), chooser.randrange(1, n + 1)
        while math.gcd(stride, n) != 1:
            stride += 1
        return self._examples[(start + place * stride) % n]

    def texts(self, example: EditExample, chooser: random.Random) -> EditTexts:
        """One example's texts, its equivalents and neighbours drawn by `chooser`."""
        try:
            return self._tokenized(example, chooser)
        except EditError as error:
            raise EditError(f"Training example {example.id!r}: {error}") from error

    def _tokenized(self, example: EditExample, chooser: random.Random) -> EditTexts:
        lm, config = self._lm, self._config
        others = list(example.paraphrases)
        chooser.shuffle(others)
        wordings = [*others[: max(1, config.equivalents - 1)], example.prompt]
        near = [s for s in (*example.neighbors, *example.same_subject) if s.answer]
        chooser.shuffle(near)
        far = [s for s in example.unrelated if s.answer]
        locality = [_statement(lm, s) for s in near[: config.neighbors]]
        for _ in range(config.texts):
            if far and (not self._texts or chooser.random() < 0.5):
                locality.append(_statement(lm, chooser.choice(far)))
            elif self._texts:
                text = chooser.choice(self._texts)
                locality.append(tokenize_text(lm, text, config.text_tokens))
        return EditTexts(
            tokenize(lm, example.prompt, example.target),
            tuple(tokenize(lm, w, example.target) for w in wordings[: config.equivalents]),
            tuple(locality),
        )


def _statement(lm: LanguageModel, statement: Statement) -> Tokens:
    return tokenize(lm, statement.prompt, statement.answer or "")


class MetaStep:
    """The losses of a batch of edits and their gradient with respect to the editor.

    All edits are captured, transformed and scored together, each sequence under its own edit.
    The language model's graph ends at the pseudofactors: they are the leaves of its backward
    pass, and their gradient then runs through the editor.

    Args:
        editor: What is trained.
        config: Weights of the losses.
        cached: Keep the lower part's output; False recomputes it each time.
    """

    def __init__(self, editor: Mend, config: TrainingConfig, cached: bool = True) -> None:
        self.editor, self.config, self.lm = editor, config, editor.lm
        self.trunk = Trunk(self.lm, editor.layers)
        self.cache = TrunkCache(self.lm, self.trunk, config.cache_gb if cached else 0.0)

    def losses(self, edits: Sequence[EditTexts], backward: bool = True) -> StepLosses:
        """Score a batch; with `backward`, add the gradient of `total` to the editor's `.grad`.

        An editor in training mode takes the rows into its running statistics first.
        """
        lm, editor, config = self.lm, self.editor, self.config
        texts = [edit.edit for edit in edits]
        batch = collate(lm, texts)
        hidden = self.cache.hidden(texts)
        with capture(editor.layers) as tap:
            nll = sequence_nll(self.trunk.logits(batch, hidden), batch)
            factors = tap.factors(nll.sum(), batch.size)
        with torch.set_grad_enabled(backward):
            made = editor.update(editor.transform(factors, gather=editor.training))
            folded = {name: layer.folded() for name, layer in made.items()}
        leaves = {
            name: (
                layer.A.detach().requires_grad_(backward),
                layer.B.detach().requires_grad_(backward),
            )
            for name, layer in folded.items()
        }
        with torch.set_grad_enabled(backward):
            edit_loss, locality, success = self._outer(edits, leaves)
            total = config.c_edit * edit_loss + config.c_locality * locality
        if backward:
            total.backward()
            made_flat = [t for layer in folded.values() for t in (layer.A, layer.B)]
            leaf_flat = [leaf for pair in leaves.values() for leaf in pair]
            pairs = [
                (m, leaf.grad)
                for m, leaf in zip(made_flat, leaf_flat, strict=True)
                if m.requires_grad
            ]
            torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])
        return StepLosses(
            edit_loss.item(), nll.mean().item(), locality.item(), total.item(), success.item()
        )

    def _outer(
        self, edits: Sequence[EditTexts], leaves: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [(row, t) for row, edit in enumerate(edits) for t in edit.equivalents]
        kept = [(row, t) for row, edit in enumerate(edits) for t in edit.locality]
        texts = [text for _, text in (*wanted, *kept)]
        owner = torch.tensor([row for row, _ in (*wanted, *kept)], device=self.lm.device)
        batch = collate(self.lm, texts)
        hidden = self.cache.hidden(texts)
        update = Update({name: LayerUpdate(A[owner], B[owner]) for name, (A, B) in leaves.items()})
        with overlay(self.lm.model, update):
            logits = self.trunk.logits(batch, hidden)
        split = int((batch.rows < len(wanted)).sum())
        good = _rows(batch, 0, len(wanted), split)
        edit_loss = sequence_nll(logits[:split], good).mean()
        right = (logits[:split].argmax(-1) == good.targets).float()
        success = (per_sequence_mean(right, good) == 1).float().mean()
        if not kept:
            return edit_loss, edit_loss.new_zeros(()), success
        rest = _rows(batch, len(wanted), len(kept), split)
        finals = self.cache.finals([text for _, text in kept])
        divergence = kl(self.trunk.base_logits(finals).to(logits.device), logits[split:])
        return edit_loss, per_sequence_mean(divergence, rest).mean(), success


def kl(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base || edited) of next-token distributions, nats, `(n, vocabulary)` -> `(n,)`."""
    reference = log_softmax(base.float(), -1)
    return (reference.exp() * (reference - log_softmax(edited.float(), -1))).sum(-1)


def _rows(batch: Batch, first: int, count: int, split: int) -> Batch:
    """The part of a batch's targets that belongs to `count` sequences from `first` on."""
    part = slice(0, split) if first == 0 else slice(split, None)
    inputs = {"input_ids": batch.inputs["input_ids"][first : first + count]}
    return Batch(inputs, batch.rows[part] - first, batch.columns[part], batch.targets[part])
