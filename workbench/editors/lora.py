"""LoRA: a low-rank adapter fine-tuned on the requests by PEFT (Hu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from workbench.copies import shallow
from workbench.editors.base import descend, register
from workbench.editors.proposals import EditRequest, Proposal, gradient_factors
from workbench.encoding import collate, sequence_nll
from workbench.errors import EditorError
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.updates import LayerUpdate, Update
from workbench.views import Trunk


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of a LoRA fine-tune.

    Args:
        blocks: Blocks to edit; None: the paper's choice.
        matrices: "mlp", "attention", "all", or suffixes of layer names.
        rank: Rank of each layer's adapter.
        alpha: The adapter acts times `alpha / rank`.
        lr: Adam's learning rate.
        max_steps: Most steps taken.
        seed: Draws the adapters' first A; B starts at zero.
    """

    blocks: Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None = None
    matrices: str | Sequence[str] = "mlp"
    rank: int = 8
    alpha: float = 16.0
    lr: float = 5e-3
    max_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.max_steps) < 1 or min(self.alpha, self.lr) <= 0:
            raise EditorError(
                f"rank and max_steps must be at least 1, alpha and lr positive; got {self.rank}, "
                f"{self.max_steps}, {self.alpha}, {self.lr}."
            )


@register
class Lora:
    """A plain LoRA fine-tune on the requests alone, as a reference; needs PEFT, no training.

    Args:
        lm: The frozen model.
        config: Settings; None: the defaults.

    Raises:
        EditorError: PEFT is not installed.
    """

    name: ClassVar[str] = "lora"

    def __init__(self, lm: LanguageModel, config: LoraConfig | None = None) -> None:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise EditorError(
                "The 'lora' editor needs PEFT: pip install 'model-editing-workbench[peft]', or use "
                "editor='ft'."
            ) from None
        self.lm, self.config = lm, config or LoraConfig()
        self.layers: tuple[EditableLayer, ...] = lm.layers(self.config.blocks, self.config.matrices)

    @classmethod
    def from_settings(cls, lm: LanguageModel, settings: Mapping[str, Any]) -> Self:
        """Make the editor from its configuration as JSON values."""
        return cls(lm, LoraConfig(**settings))

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
        adapted = self._adapted()
        trunk = Trunk(replace(self.lm, model=adapted), self.layers)
        hidden = trunk.hidden(batch)
        learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

        def look() -> tuple[Tensor, bool]:
            logits = trunk.logits(batch, hidden)
            said = logits.argmax(-1)
            return sequence_nll(logits, batch).sum(), bool((said == batch.targets).all())

        optimizer = torch.optim.Adam(learned, lr=self.config.lr, fused=True)
        descend(optimizer, self.config.max_steps, look)
        update = Update({layer.name: _change(adapted, layer.name) for layer in self.layers})
        return Proposal(update, self.layers, tokens, factors)

    def _adapted(self) -> Any:
        """A view of the model that PEFT has put its adapters into; the model itself has none."""
        import peft

        settings = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]
            target_modules=[layer.name for layer in self.layers],
            fan_in_fan_out=self.layers[0].transposed,
        )
        view = shallow(self.lm.model, {layer.name: layer.module for layer in self.layers})
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            adapted: Any = peft.inject_adapter_in_model(settings, view)
        for layer in self.layers:  # half precision is too coarse for Adam's steps
            module = adapted.get_submodule(layer.name)
            module.lora_A.float()
            module.lora_B.float()
        return adapted


def _change(adapted: nn.Module, name: str) -> LayerUpdate:
    """What PEFT has learned for one layer."""
    layer: Any = adapted.get_submodule(name)
    A, B = (side["default"].weight.detach() for side in (layer.lora_A, layer.lora_B))
    return LayerUpdate(A, B.mT.contiguous(), float(layer.scaling["default"]))
