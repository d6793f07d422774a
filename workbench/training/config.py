"""Settings of meta-training."""

from __future__ import annotations

import random
from dataclasses import dataclass

from workbench.errors import EditorError


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
        hardest: Of an edit's neighbours and crossed prompts, how many count: those that it moves
            most, looked for in each step. 0: all that are drawn.
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
    hardest: int = 0
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
    chunk: int = 64
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
