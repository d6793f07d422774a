"""ENN: the model itself learns to be edited by one step of gradient descent (Sinitsin et al.)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from workbench.copies import clone, shallow
from workbench.editors.base import TrainableEditor, register
from workbench.editors.proposals import (
    CapturedEdits,
    EditRequest,
    Proposal,
    capture_edits,
    side_by_side,
)
from workbench.errors import EditorError
from workbench.layers import DENSE, EditableLayer
from workbench.models import LanguageModel
from workbench.updates import LayerUpdate, Update


@dataclass(frozen=True, kw_only=True)
class EnnConfig:
    """Settings of ENN (Sinitsin et al. 2020, Editable Neural Networks).

    Args:
        blocks: Blocks to train and edit, as `LanguageModel.layers` takes them; None: MEND's
            choice. (The paper trains the whole model.)
        matrices: "mlp", "attention", "all", or suffixes of layer names.
        edit_lr: Initial alpha, the step size that each layer learns.
        first_order: Training takes the gradient that an edit is made from for a constant: less
            time and memory, and a poorer direction.
    """

    blocks: Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None = None
    matrices: str | Sequence[str] = "mlp"
    edit_lr: float = 3e-2
    first_order: bool = False


@register
class Enn(TrainableEditor):
    """Editable Neural Networks: one gradient step edits a base that was trained for that.

    The trained base is a checkpoint of its own: `editor.safetensors` holds the weights that it
    has in place of the original's. `lm` is the model with these weights, everything else shared
    with `original`, which is never written; edits are updates of `lm`.

    Args:
        lm: The original model.
        config: Settings; None: the defaults.

    Raises:
        EditorError: The weights to train are quantised or not in memory.
    """

    name: ClassVar[str] = "enn"
    config_class: ClassVar[type] = EnnConfig
    training_defaults: ClassVar[Mapping[str, Any]] = {"lr": 3e-5, "edit_lr_lr": 1e-3}
    config: EnnConfig

    def __init__(self, lm: LanguageModel, config: EnnConfig | None = None) -> None:
        config = config or EnnConfig()
        layers = lm.layers(config.blocks, config.matrices)
        weights = {layer.name: _copy(layer, lm) for layer in layers}
        base = _with_weights(lm, weights)
        super().__init__(base, base.layers(config.blocks, config.matrices), config, lm)
        self.second_order = not config.first_order
        named = [(name.replace(".", "-"), weight) for name, weight in weights.items()]
        self.weights = nn.ParameterDict(named)  # which sorts a dict, but not pairs
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Let the base's weights take gradient, or freeze them."""
        self.weights.requires_grad_(mode)
        return super().train(mode)

    def edit_batch(self, edits: CapturedEdits, *, gather: bool = False) -> Update:
        """`dW = -edit_lr * sum_t delta_t u_t^T`, one for each edit; no statistics are kept."""
        return Update(
            {
                name: LayerUpdate(
                    factors.activation, factors.delta, -alpha.to(factors.delta.device)
                )
                for (name, factors), alpha in zip(edits.factors.items(), self.edit_lrs, strict=True)
            }
        )

    def learned(self) -> dict[str, list[nn.Parameter]]:
        """The base's weights, and the alphas.

        Raises:
            EditorError: The weights have half precision, in which small steps are lost.
        """
        if self.lm.dtype in (torch.float16, torch.bfloat16):
            raise EditorError(
                f"ENN trains the model's own weights, and its steps are too small for "
                f"{self.lm.precision}: open the model with dtype='float32'."
            )
        return {"lr": list(self.weights.values()), "edit_lr_lr": [self.edit_lrs]}

    @torch.no_grad()
    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """One step down the requests' losses, from the trained base."""
        edits = capture_edits(self.lm, self.layers, requests)
        live = {name: factors.live() for name, factors in edits.factors.items()}
        update = side_by_side(self.edit_batch(edits), live)
        lrs = dict(zip(update, self.edit_lrs.tolist(), strict=True))
        return Proposal(update, self.layers, edits.tokens, edits.factors, edit_lrs=lrs)


def _copy(layer: EditableLayer, lm: LanguageModel) -> nn.Parameter:
    """A layer's weight, to be trained."""
    weight = getattr(layer.module, "weight", None)
    if lm.quantization or weight is None or weight.dtype not in DENSE or weight.is_meta:
        raise EditorError(
            f"ENN needs {layer.name} as a dense matrix in memory, since it trains a copy of it: "
            f"open the model without quantize, on one device."
        )
    return nn.Parameter(weight.detach().clone())


def _with_weights(lm: LanguageModel, weights: Mapping[str, nn.Parameter]) -> LanguageModel:
    """The model with other weights in some layers; it shares all else, and nothing is written."""
    twins = {name: clone(lm.model.get_submodule(name)) for name in weights}
    for name, twin in twins.items():
        twin._parameters = {**twin._parameters, "weight": weights[name]}
        twin._forward_hooks = OrderedDict()  # an overlay of the one must not act on the other
    return replace(lm, model=shallow(lm.model, twins))  # type: ignore[type-var]
