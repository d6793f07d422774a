"""FT and FT+KL: fine-tune the edited layers until the requests are predicted (section 5)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from workbench.corpus import SENTENCES
from workbench.divergence import kl
from workbench.editors.base import descend, register
from workbench.editors.proposals import EditRequest, Proposal, gradient_factors
from workbench.encoding import Tokens, collate, sequence_nll, tokenize_text
from workbench.errors import EditorError
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.updates import LayerUpdate, Update
from workbench.views import Trunk

Optimizer = Literal["adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Settings of fine-tuning.

    Args:
        blocks: Blocks to edit; None: the paper's choice.
        matrices: "mlp", "attention", "all", or suffixes of layer names.
        optimizer: "adam" or "sgd".
        lr: Its learning rate; small models need more than the large ones of the paper.
        max_steps: Most steps taken (100 in the paper).
        rank: Learn a change `B^T A` of that rank, both factors from a random A and B = 0; None:
            the whole change, as in the paper.
        c_locality: Weight of KL(original || edited) on unrelated texts beside the edit loss; 0
            looks at none. The paper's c_e = 0.1 on the edit loss is 10 here.
        texts: Unrelated texts looked at in each step, drawn once an edit.
        text_tokens: Tokens read of an unrelated text; every position counts.
        seed: Draws the texts and the A of a low rank.
    """

    blocks: Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None = None
    matrices: str | Sequence[str] = "mlp"
    optimizer: Optimizer = "adam"
    lr: float = 5e-4
    max_steps: int = 100
    rank: int | None = None
    c_locality: float = 0.0
    texts: int = 4
    text_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.lr <= 0:
            raise EditorError(
                f"max_steps must be at least 1 and lr positive; got {self.max_steps}, {self.lr}."
            )
        if self.optimizer not in get_args(Optimizer):
            raise EditorError(
                f"optimizer must be one of {', '.join(get_args(Optimizer))}; got "
                f"{self.optimizer!r}."
            )
        if self.rank is not None and self.rank < 1:
            raise EditorError(f"rank must be at least 1, or None for the whole; got {self.rank}.")
        if self.c_locality < 0 or self.texts < 1 or self.text_tokens < 1:
            raise EditorError(
                f"c_locality must be at least 0, texts and text_tokens at least 1; got "
                f"{self.c_locality}, {self.texts}, {self.text_tokens}."
            )


@register
class FineTune:
    """Fine-tuning on the requests alone; needs no training of its own.

    Args:
        lm: The frozen model.
        config: Settings; None: the defaults.
        unrelated: Texts that `c_locality` watches over.
    """

    name: ClassVar[str] = "ft"
    defaults: ClassVar[FineTuneConfig] = FineTuneConfig()

    def __init__(
        self,
        lm: LanguageModel,
        config: FineTuneConfig | None = None,
        unrelated: Sequence[str] = SENTENCES,
    ) -> None:
        self.lm, self.config, self.unrelated = lm, config or self.defaults, unrelated
        self.layers: tuple[EditableLayer, ...] = lm.layers(self.config.blocks, self.config.matrices)
        self._trunk = Trunk(lm, self.layers)

    @classmethod
    def from_settings(cls, lm: LanguageModel, settings: Mapping[str, Any]) -> Self:
        """Make the editor from its configuration as JSON values."""
        return cls(lm, replace(cls.defaults, **settings))

    def settings(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return asdict(self.config)

    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """Descend until every target token is the most likely one, or steps run out.

        The loss is `sum of NLL(target | prompt) + c_locality * KL(original || edited)`, the KL a
        mean over the unrelated texts' tokens.

        Raises:
            EditError: The loss is not finite.
            Cancelled: See `cancellable`.
        """
        config, model = self.config, self.lm.model
        tokens, factors = gradient_factors(self.lm, self.layers, requests)
        chooser = random.Random(f"{config.seed}:{[(r.prompt, r.target) for r in requests]}")
        batch = collate(self.lm, (*tokens, *self._texts(chooser)))
        edits, wanted = len(tokens), sum(len(text.targets) for text in tokens)
        hidden = self._trunk.hidden(batch)
        update = self._start(chooser.getrandbits(63))
        learned = [tensor for tensor in update.tensors() if tensor.requires_grad]
        optimizer = _OPTIMIZERS[config.optimizer](learned, lr=config.lr, fused=True)
        if config.c_locality:
            with torch.no_grad():
                original = self._trunk.logits(batch, hidden)[wanted:]

        def look() -> tuple[Tensor, bool]:
            with overlay(model, update):
                logits = self._trunk.logits(batch, hidden)
            loss = sequence_nll(logits, batch)[:edits].sum()
            if config.c_locality:
                loss = loss + config.c_locality * kl(original, logits[wanted:]).mean()
            said = logits[:wanted].argmax(-1)
            return loss, bool((said == batch.targets[:wanted]).all())

        descend(optimizer, config.max_steps, look)
        return Proposal(update.detach(), self.layers, tokens, factors)

    def _texts(self, chooser: random.Random) -> list[Tokens]:
        """The unrelated texts of one edit, none where none is watched over."""
        if not self.config.c_locality:
            return []
        drawn = chooser.sample(self.unrelated, min(self.config.texts, len(self.unrelated)))
        texts = [tokenize_text(self.lm, text, self.config.text_tokens) for text in drawn]
        if self.lm.kind == "classifier":  # it says one thing of a text, whichever that is
            return [Tokens(text.ids, (0,)) for text in texts]
        return texts

    def _start(self, seed: int) -> Update:
        """The change before the first step, zero, with the factors to be learned."""
        generator = torch.Generator().manual_seed(seed)
        return Update({layer.name: self._factors(layer, generator) for layer in self.layers})

    def _factors(self, layer: EditableLayer, generator: torch.Generator) -> LayerUpdate:
        inputs, outputs, rank = layer.in_features, layer.out_features, self.config.rank
        device = self.lm.device
        if rank is None:
            zero = LayerUpdate.from_dense(torch.zeros(outputs, inputs, device=device))
            (zero.B if inputs <= outputs else zero.A).requires_grad_()
            return zero
        A = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        B = torch.zeros(rank, outputs)
        return LayerUpdate(A.to(device).requires_grad_(), B.to(device).requires_grad_())


@register
class FineTuneKL(FineTune):
    """FT+KL: fine-tuning that holds still what the model says of unrelated texts."""

    name: ClassVar[str] = "ft_kl"
    defaults: ClassVar[FineTuneConfig] = FineTuneConfig(c_locality=10.0)


_OPTIMIZERS: dict[Optimizer, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
