"""FT: fine-tune the edited layers until the requests are predicted (section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.cancel import checkpoint
from workbench.editors.base import EditRequest, Proposal, gradient_factors, register
from workbench.encoding import collate, per_sequence_mean, sequence_nll
from workbench.errors import EditError, EditorError
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.updates import LayerUpdate, Update
from workbench.views import Trunk


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Settings of fine-tuning.

    Args:
        blocks: Blocks to edit; None: the paper's choice.
        matrices: "mlp", "attention", "all", or suffixes of layer names.
        lr: Adam's learning rate; small models need more than the large ones of the paper.
        max_steps: Most steps taken (100 in the paper).
    """

    blocks: Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None = None
    matrices: str | Sequence[str] = "mlp"
    lr: float = 5e-4
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.lr <= 0:
            raise EditorError(
                f"max_steps must be at least 1 and lr positive; got {self.max_steps}, {self.lr}."
            )


@register
class FineTune:
    """Fine-tuning on the requests alone; needs no training of its own.

    Args:
        lm: The frozen model.
        config: Settings; None: the defaults.
    """

    name: ClassVar[str] = "ft"

    def __init__(self, lm: LanguageModel, config: FineTuneConfig | None = None) -> None:
        self.lm, self.config = lm, config or FineTuneConfig()
        self.layers: tuple[EditableLayer, ...] = lm.layers(self.config.blocks, self.config.matrices)
        self._trunk = Trunk(lm, self.layers)

    @classmethod
    def from_settings(cls, lm: LanguageModel, settings: Mapping[str, Any]) -> FineTune:
        """Make the editor from its configuration as JSON values."""
        return cls(lm, FineTuneConfig(**settings))

    def settings(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return asdict(self.config)

    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """Descend with Adam until every target token is the most likely one, or steps run out.

        Raises:
            EditError: The loss is not finite.
            Cancelled: See `cancellable`.
        """
        tokens, factors = gradient_factors(self.lm, self.layers, requests)
        batch = collate(self.lm, tokens)
        hidden = self._trunk.hidden(batch)
        changes = {layer.name: self._zero(layer) for layer in self.layers}
        optimizer = torch.optim.Adam(
            [c for _, c in changes.values()], lr=self.config.lr, fused=True
        )
        for _ in range(self.config.max_steps):
            checkpoint()
            with overlay(self.lm.model, self._update(changes)), torch.enable_grad():
                logits = self._trunk.logits(batch, hidden)
                loss = sequence_nll(logits, batch).sum()
            if not torch.isfinite(loss):
                raise EditError("Fine-tuning diverged: lower lr. Nothing was changed.")
            right = (logits.argmax(-1) == batch.targets).float()
            if bool((per_sequence_mean(right, batch) == 1).all()):
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return Proposal(self._update(changes).detach(), self.layers, tokens, factors)

    def _zero(self, layer: EditableLayer) -> tuple[Tensor, Tensor]:
        """An identity for the narrower side, and the learned factor of the other, at zero."""
        narrow = min(layer.in_features, layer.out_features)
        wide = max(layer.in_features, layer.out_features)
        identity = torch.eye(narrow, device=self.lm.device)
        return identity, torch.zeros(narrow, wide, device=self.lm.device, requires_grad=True)

    def _update(self, changes: Mapping[str, tuple[Tensor, Tensor]]) -> Update:
        return Update(
            {
                layer.name: LayerUpdate(*changes[layer.name])
                if layer.in_features <= layer.out_features
                else LayerUpdate(*reversed(changes[layer.name]))
                for layer in self.layers
            }
        )
