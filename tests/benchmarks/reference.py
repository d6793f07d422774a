"""A reference loop that works as the published code does: one example, one dense update.

Every weight takes part in the backward pass, each edited weight is formed densely, logits are
computed for every position, nothing is cached. What the workbench's speed is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from workbench.divergence import kl
from workbench.editors import Mend
from workbench.encoding import Batch, Tokens, collate
from workbench.factors import Factors
from workbench.training import EditTexts, TrainingConfig


class ReferenceLoop:
    """Meta-training one example at a time.

    Args:
        editor: What is trained; its model's weights take part in the backward pass, as the
            published code leaves them.
        config: Weights of the losses.
    """

    def __init__(self, editor: Mend, config: TrainingConfig) -> None:
        self.editor, self.config, self.model = editor, config, editor.lm.model

    def example(self, edit: EditTexts, backward: bool = True) -> float:
        """One example's total loss. Its gradient is added to the editor's parameters, its factors
        to the running statistics."""
        self.model.requires_grad_(True)
        factors = self._factors(edit.edit)
        pseudofactors = self.editor.transform(factors, gather=backward)
        update = self.editor.update(pseudofactors, factors)
        weights = {
            f"{name}.weight": self._edited(f"{name}.weight", layer.dense()[0])
            for name, layer in update.items()
        }
        edit_loss = self._nll(edit.equivalents, weights)
        locality = self._kl(edit.locality, weights)
        total = self.config.c_edit * edit_loss + self.config.c_locality * locality
        if backward:
            total.backward()
        self.model.requires_grad_(False)
        self.model.zero_grad(set_to_none=True)
        return total.item()

    def _edited(self, name: str, change: Tensor) -> Tensor:
        weight = self.model.get_parameter(name).detach()
        return weight + change.to(weight.dtype)

    def _factors(self, tokens: Tokens) -> dict[str, Factors]:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        handles = []
        for layer in self.editor.layers:

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = layer.name) -> None:
                inputs[name], outputs[name] = args[0].detach(), output
                output.retain_grad()

            handles.append(layer.module.register_forward_hook(keep))
        batch = collate(self.editor.lm, [tokens])
        loss = cross_entropy(self._logits(batch, None), batch.targets)
        loss.backward()
        for handle in handles:
            handle.remove()
        self.model.zero_grad(set_to_none=True)
        found = {}
        for name, output in outputs.items():
            assert output.grad is not None
            found[name] = Factors(inputs[name], output.grad)
        return found

    def _logits(self, batch: Batch, weights: dict[str, Tensor] | None) -> Tensor:
        arguments = {**batch.inputs, "use_cache": False}
        output = functional_call(self.model, weights or {}, (), arguments)
        return output.logits[batch.rows, batch.columns]

    def _nll(self, texts: Sequence[Tokens], weights: dict[str, Tensor]) -> Tensor:
        losses = []
        for text in texts:
            batch = collate(self.editor.lm, [text])
            losses.append(cross_entropy(self._logits(batch, weights), batch.targets))
        return torch.stack(losses).mean()

    def _kl(self, texts: Sequence[Tokens], weights: dict[str, Tensor]) -> Tensor:
        losses = []
        for text in texts:
            batch = collate(self.editor.lm, [text])
            with torch.no_grad():
                base = self._logits(batch, None)
            losses.append(kl(base, self._logits(batch, weights)).mean())
        return torch.stack(losses).mean()
