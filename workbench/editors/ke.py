"""KE: a network reads the edit and says which of the gradient to take (De Cao et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from workbench.editors.base import TrainableEditor, register
from workbench.editors.proposals import (
    CapturedEdits,
    EditRequest,
    Proposal,
    capture_edits,
    side_by_side,
)
from workbench.encoding import Tokens, label_names
from workbench.errors import EditorError
from workbench.factors import Factors
from workbench.models import LanguageModel
from workbench.updates import LayerUpdate, Update


@dataclass(frozen=True, kw_only=True)
class KeConfig:
    """Settings of KE; the widths are those of the published code (BERT).

    That code trains with RMSprop at 3e-4 and a constraint on the KL in place of its weight; here
    KE is trained as MEND is (`Ke.training_defaults`).

    Args:
        lstm: Width of each direction of the LSTM.
        condition: Width of what it hands to the layers' heads.
        hidden: Width of each head's hidden layer.
        blocks: Blocks to edit, as `LanguageModel.layers` takes them; None: MEND's choice. (The
            paper edits all layers.)
        matrices: "mlp", "attention", "all", or suffixes of layer names.
        edit_lr: Initial alpha, the step size that each layer learns. A fresh editor takes one
            step of gradient descent of half that size. (The paper has none: random heads start.)
    """

    lstm: int = 128
    condition: int = 1024
    hidden: int = 128
    blocks: Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None = None
    matrices: str | Sequence[str] = "mlp"
    edit_lr: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lstm", "condition", "hidden"):
            if getattr(self, name) < 1:
                raise EditorError(f"{name} must be at least 1; got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class Masks:
    """What one layer's change is made of, one row for each edit (equation 5).

    Args:
        mask_out: The mask's factor over the outputs, `(batch, out)`; its mean is 1.
        mask_in: Its factor over the inputs, `(batch, in)`.
        bias_out: The bias's factor over the outputs, `(batch, out)`; its sum is 1.
        bias_in: Its factor over the inputs, `(batch, in)`.
        scale: Between 0 and 1, `(batch, 1)`.
    """

    mask_out: Tensor
    mask_in: Tensor
    bias_out: Tensor
    bias_in: Tensor
    scale: Tensor


class _Heads(nn.Module):
    """From the condition to one layer's masks; a fresh one masks nothing and has no bias."""

    def __init__(self, config: KeConfig, out_features: int, in_features: int) -> None:
        super().__init__()
        self.widths = (out_features, in_features, out_features, in_features, 1)
        self.hidden = nn.Linear(config.condition, config.hidden)
        self.output = nn.Linear(config.hidden, sum(self.widths))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, condition: Tensor) -> Masks:
        """`(batch, condition)` -> the masks of each edit."""
        raw = self.output(self.hidden(condition).tanh())
        mask_out, mask_in, bias_out, bias_in, scale = raw.split(self.widths, -1)
        # Equation 5 times the number of outputs, and 1 more, both of which its heads could learn:
        # so that a fresh mask is 1 everywhere.
        return Masks(
            mask_out.softmax(-1) * self.widths[0],
            1 + mask_in,
            bias_out.softmax(-1),
            bias_in,
            scale.sigmoid(),
        )


@register
class Ke(TrainableEditor):
    """KnowledgeEditor: an LSTM reads "prediction >> target || input", heads mask the gradient.

    Args:
        lm: The frozen model to edit.
        config: Settings; None: the defaults.
    """

    name: ClassVar[str] = "ke"
    config_class: ClassVar[type] = KeConfig
    training_defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "edit_lr_lr": 1e-3}
    config: KeConfig

    def __init__(self, lm: LanguageModel, config: KeConfig | None = None) -> None:
        config = config or KeConfig()
        super().__init__(lm, lm.layers(config.blocks, config.matrices), config)
        embeddings: Any = lm.model.get_input_embeddings()
        width = embeddings.weight.shape[-1]
        self.lstm = nn.LSTM(width, config.lstm, batch_first=True, bidirectional=True)
        self.joined = nn.Linear(2 * config.lstm, config.condition)
        self.heads = nn.ModuleList(
            _Heads(config, layer.out_features, layer.in_features) for layer in self.layers
        )
        self._before_target, self._before_input = (self._ids(text) for text in (" >> ", " || "))
        self._settle()

    def _ids(self, text: str) -> list[int]:
        return self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _reading(self, tokens: Tokens, prediction: Tensor) -> list[int]:
        """ "prediction >> target || input", each part as the model has it (section 3.2)."""
        said, wanted, prompt = prediction.tolist(), list(tokens.targets), list(tokens.ids)
        if self.lm.kind == "classifier":
            names = label_names(self.lm)
            said, wanted = (self._ids(names[index]) for index in (said[0], wanted[0]))
        elif self.lm.kind == "causal":  # all but the last of the target is read too
            prompt = prompt[: len(prompt) - len(wanted) + 1]
        return [*said, *self._before_target, *wanted, *self._before_input, *prompt]

    def masks(self, edits: CapturedEdits) -> dict[str, Masks]:
        """What each layer's change is made of, from the edits' texts alone.

        Args:
            edits: Their tokens, and what the model says in place of the targets.

        Returns:
            Layer name -> masks, one row for each edit.
        """
        readings = [
            torch.tensor(self._reading(tokens, said))
            for tokens, said in zip(edits.tokens, edits.predictions, strict=True)
        ]
        ids = pad_sequence(readings, batch_first=True).to(self.lm.device)
        with torch.no_grad():
            embedded = self.lm.model.get_input_embeddings()(ids).to(self.joined.weight.dtype)
        lengths = torch.tensor([len(reading) for reading in readings])
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        condition = self.joined(torch.cat((last[0], last[1]), -1)).tanh()
        return {
            layer.name: heads(condition)
            for layer, heads in zip(self.layers, self.heads, strict=True)
        }

    def masked(
        self, factors: Mapping[str, Factors], masks: Mapping[str, Masks]
    ) -> dict[str, Factors]:
        """Factors of the scaled and masked gradient, row by row.

        `scale * (delta_t u_t^T) * (mask_out mask_in^T)` is again of rank 1.

        Args:
            factors: Layer name -> factors, `(batch, tokens, width)`.
            masks: From `masks`.
        """
        found = {}
        for name, mask in masks.items():
            rows = factors[name]
            over = (mask.scale * mask.mask_out).unsqueeze(1)
            found[name] = Factors(
                rows.activation.to(over) * mask.mask_in.unsqueeze(1), rows.delta.to(over) * over
            )
        return found

    def update(self, masked: Mapping[str, Factors], masks: Mapping[str, Masks]) -> Update:
        """`dW = -edit_lr * scale * (mask * gradient + bias)`, one for each edit (equation 6).

        Args:
            masked: From `masked`.
            masks: From `masks`.

        Returns:
            One term for each token, and the bias as a last one.
        """
        made = {}
        for layer, alpha in zip(self.layers, self.edit_lrs, strict=True):
            rows, mask = masked[layer.name], masks[layer.name]
            A = torch.cat((rows.activation, mask.bias_in.unsqueeze(1)), 1)
            B = torch.cat((rows.delta, (mask.scale * mask.bias_out).unsqueeze(1)), 1)
            made[layer.name] = LayerUpdate(A, B, -alpha)
        return Update(made)

    def edit_batch(self, edits: CapturedEdits, *, gather: bool = False) -> Update:
        """`update` of what `masks` and `masked` give; KE keeps no running statistics."""
        masks = self.masks(edits)
        return self.update(self.masked(edits.factors, masks), masks)

    def learned(self) -> dict[str, list[nn.Parameter]]:
        """The networks, and the alphas."""
        networks = [p for p in self.parameters() if p is not self.edit_lrs]
        return {"lr": networks, "edit_lr_lr": [self.edit_lrs]}

    @torch.no_grad()
    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """One update for all requests: their terms and biases side by side."""
        edits = capture_edits(self.lm, self.layers, requests)
        masks = self.masks(edits)
        masked = self.masked(edits.factors, masks)
        kept = {name: pad(rows.live(), (0, 1), value=True) for name, rows in edits.factors.items()}
        update = side_by_side(self.update(masked, masks), kept)
        lrs = dict(zip(update, self.edit_lrs.tolist(), strict=True))
        return Proposal(update, self.layers, edits.tokens, edits.factors, masked, lrs)
