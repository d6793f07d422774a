"""MEND: networks that turn gradient factors into a local edit (Mitchell et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from workbench.cancel import checkpoint
from workbench.editors.base import TrainableEditor, register
from workbench.editors.proposals import (
    CapturedEdits,
    EditRequest,
    Proposal,
    capture_edits,
    capture_texts,
    joined,
    missed,
    resumed,
    side_by_side,
    texts_of,
)
from workbench.editors.statistics import RunningStatistics
from workbench.errors import EditorError
from workbench.factors import Factors
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.updates import LayerUpdate, Update
from workbench.views import Trunk

Inputs = Literal["both", "activation", "delta", "smaller"]


@dataclass(frozen=True, kw_only=True)
class MendConfig:
    """Settings of a MEND editor; the defaults are the paper's.

    Args:
        rank: Rank of `U V` in each residual block (1920 in the paper; 128 does on small models).
        blocks: Blocks to edit, as `LanguageModel.layers` takes them; None: the paper's choice.
        matrices: "mlp", "attention", "all", or suffixes of layer names.
        edit_lr: Initial alpha, the step size that each layer learns.
        shared: Layers of one shape share U, V and b (scale and offset are always per layer).
        normalize: Normalise u and delta by the running statistics of training.
        identity: Residual blocks with U = 0, so that a fresh editor returns the factors; False
            drops the residual path and starts both U and V at random.
        inputs: What the networks see and change: "both" together, only the "activation", only
            the "delta", or only the "smaller" of the two; the other one passes as it is.
        ascent: As the published code: the update is added, so that training starts uphill.
        unit_v: As the published code: V starts at standard deviation 1, not Xavier.
        gate: A term of an edit acts only on inputs that match its pseudoactivation well enough:
            beyond a share of its match with the edit's own input, which each layer learns. This
            is where the share starts; 0: no gate (the paper). Gated updates are no LoRA.
        sum_tokens: Edit with the gradient of the whole target's negative log-likelihood, summed
            over its tokens; False: of the mean by token (the published code), by which each token
            of a long target has less.
        rounds: An edit is made again, with the gradient of the edited model, while it gives some
            token of the target less than `confidence`, at most this often in all (the paper: 1).
            A round that does not lower the loss is taken back, and the next acts half as
            strongly. Training is of the first round alone.
        later_strength: How strongly rounds after the first act.
        confidence: See `rounds`; from 0.5 on a token is the most likely one.
    """

    rank: int = 1920
    blocks: Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None = None
    matrices: str | Sequence[str] = "mlp"
    edit_lr: float = 1e-4
    shared: bool = True
    normalize: bool = True
    identity: bool = True
    inputs: Inputs = "both"
    ascent: bool = False
    unit_v: bool = False
    gate: float = 0.0
    sum_tokens: bool = False
    rounds: int = 1
    later_strength: float = 0.15
    confidence: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise EditorError(f"rank must be at least 1; got {self.rank}.")
        if not 0 <= self.gate < 1:
            raise EditorError(f"gate is a share, 0 (no gate) to below 1; got {self.gate}.")
        if self.rounds < 1:
            raise EditorError(f"rounds must be at least 1; got {self.rounds}.")
        if not 0 < self.confidence < 1:
            raise EditorError(f"confidence is a probability, 0 to 1; got {self.confidence}.")
        if self.inputs not in get_args(Inputs):
            raise EditorError(
                f"inputs must be one of {', '.join(get_args(Inputs))}; got {self.inputs!r}."
            )


class _ResidualBlock(nn.Module):
    """`x + clamp(s * (U V x + b) + o, min=0)`, with s and o of each row's layer (equation 4)."""

    def __init__(self, width: int, modes: int, config: MendConfig) -> None:
        super().__init__()
        rank = min(config.rank, width)
        self.identity = config.identity
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.V = nn.Parameter(torch.empty(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.offset = nn.Parameter(torch.zeros(modes, width))
        if config.unit_v:
            nn.init.normal_(self.V)
        else:
            nn.init.xavier_uniform_(self.V)
        if not config.identity:
            nn.init.xavier_uniform_(self.U, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor) -> Tensor:
        # x: (modes, rows, width). clamp, not relu: its gradient at 0 is 1, so U = 0 can learn.
        inner = (x @ self.V.T) @ self.U.T + self.bias
        inner = (inner * self.scale.unsqueeze(1) + self.offset.unsqueeze(1)).clamp(min=0)
        return x + inner if self.identity else inner


class EditorNetwork(nn.Module):
    """g of one shape: normalises and transforms `(u, delta)` rows of its layers.

    Args:
        in_features: Width of u.
        out_features: Width of delta.
        modes: How many layers it serves.
        config: The editor's settings.
    """

    def __init__(self, in_features: int, out_features: int, modes: int, config: MendConfig) -> None:
        super().__init__()
        self.widths = (in_features, out_features)
        self.normalized = config.normalize
        smaller = "activation" if in_features <= out_features else "delta"
        self.inputs = smaller if config.inputs == "smaller" else config.inputs
        seen = {"both": sum(self.widths), "activation": in_features, "delta": out_features}
        width = seen[self.inputs]
        self.blocks = nn.Sequential(*(_ResidualBlock(width, modes, config) for _ in range(2)))
        self.activation_stats = RunningStatistics(in_features)
        self.delta_stats = RunningStatistics(out_features)

    @property
    def rows_seen(self) -> int:
        """Rows that the running statistics have taken in."""
        return int(self.activation_stats.count)

    def gather(self, activation: Tensor, delta: Tensor, live: Tensor) -> None:
        """Merge the live rows into the running statistics (training only)."""
        self.activation_stats.merge(activation[live])
        self.delta_stats.merge(delta[live])

    def forward(self, activation: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`(modes, rows, in)` and `(modes, rows, out)` -> pseudoactivations and pseudodeltas."""
        if self.normalized:
            if self.rows_seen < 2:
                raise EditorError(
                    "This editor has no running statistics yet: it was never trained. Train it "
                    "(python -m workbench train), open a trained one, or use editor='ft'."
                )
            activation = self.activation_stats.normalize(activation)
            delta = self.delta_stats.normalize(delta)
        if self.inputs == "activation":
            return self.blocks(activation), delta
        if self.inputs == "delta":
            return activation, self.blocks(delta)
        joint = self.blocks(torch.cat((activation, delta), -1))
        return tuple(joint.split(self.widths, -1))  # type: ignore[return-value]

    def transform(self, parts: Sequence[Factors], gather: bool) -> list[Factors]:
        """Pseudofactors of each layer, in the layers' order; see `Mend.transform`."""
        # An encoder and a decoder read different numbers of tokens: zero rows fill up. The layers
        # of a split model lie on several devices.
        device = self.activation_stats.mean.device
        activation, delta = (
            pad_sequence([rows.flatten(0, 1).to(device) for rows in side], True).float()
            for side in ([p.activation for p in parts], [p.delta for p in parts])
        )
        live = Factors(activation, delta).live()
        if gather:
            self.gather(activation, delta, live)
        # A token without gradient in any of the layers need not pass the network.
        kept = live.any(0).nonzero().squeeze(1)
        mask = live[:, kept].unsqueeze(-1)
        found = []
        pseudo = [rows * mask for rows in self(activation[:, kept], delta[:, kept])]
        for mode, part in enumerate(parts):
            shape = part.activation.shape[:2]
            whole = (
                rows.new_zeros(live.shape[1], rows.shape[-1]).index_copy(0, kept, rows[mode])
                for rows in pseudo
            )
            found.append(Factors(*(w[: shape.numel()].unflatten(0, shape) for w in whole)))
        return found


@register
class Mend(TrainableEditor):
    """The editor: one network for each shape of edited layer, one `edit_lr` for each layer.

    Args:
        lm: The frozen model to edit.
        config: Settings; None: the paper's.
    """

    name: ClassVar[str] = "mend"
    config_class: ClassVar[type] = MendConfig
    config: MendConfig

    def __init__(self, lm: LanguageModel, config: MendConfig | None = None) -> None:
        config = config or MendConfig()
        super().__init__(lm, lm.layers(config.blocks, config.matrices), config)
        self.groups: dict[str, list[EditableLayer]] = {}
        for layer in self.layers:
            shape = f"{layer.in_features}x{layer.out_features}"
            key = shape if self.config.shared else layer.name.replace(".", "-")
            self.groups.setdefault(key, []).append(layer)
        self.networks = nn.ModuleDict(
            {
                key: EditorNetwork(
                    group[0].in_features, group[0].out_features, len(group), self.config
                )
                for key, group in self.groups.items()
            }
        )
        self.gate_logits: nn.Parameter | None = None
        if self.config.gate:
            shares = torch.full((len(self.layers),), self.config.gate)
            self.gate_logits = nn.Parameter(shares.logit())
        self._settle()

    @property
    def trained(self) -> bool:
        """Whether every network has gathered the statistics that its inputs are normalised by."""
        found = (n for n in self.networks.children() if isinstance(n, EditorNetwork))
        return all(network.rows_seen > 1 for network in found)

    @property
    def sign(self) -> float:
        """-1: the update descends (the paper); +1: it ascends (the published code)."""
        return 1.0 if self.config.ascent else -1.0

    def transform(
        self, factors: Mapping[str, Factors], *, gather: bool = False
    ) -> dict[str, Factors]:
        """Pseudoactivations and pseudodeltas, row by row (section 3.1).

        Args:
            factors: Layer name -> factors, `(batch, tokens, width)`; every edited layer.
            gather: Merge the rows into the running statistics first, as training does.

        Returns:
            Layer name -> pseudofactors of the same shapes, float32; rows without gradient are 0.
        """
        found: dict[str, Factors] = {}
        for key, group in self.groups.items():
            network = self.networks[key]
            assert isinstance(network, EditorNetwork)
            parts = network.transform([factors[layer.name] for layer in group], gather)
            found.update(zip((layer.name for layer in group), parts, strict=True))
        return {layer.name: found[layer.name] for layer in self.layers}

    def update(
        self, pseudofactors: Mapping[str, Factors], factors: Mapping[str, Factors]
    ) -> Update:
        """`dW = -edit_lr * sum_t pseudodelta_t pseudoactivation_t^T`, one for each sequence.

        With a gate, term t acts on an input x as far as `|pseudoactivation_t x|` exceeds the
        layer's learned share of `|pseudoactivation_t activation_t|`.

        Args:
            pseudofactors: From `transform`, `(batch, tokens, width)`.
            factors: What they were made from.
        """
        made = {}
        for index, layer in enumerate(self.layers):
            pseudo, threshold = pseudofactors[layer.name], None
            if self.gate_logits is not None:
                own = factors[layer.name].activation.to(pseudo.activation)
                match = torch.linalg.vecdot(pseudo.activation, own).abs()
                threshold = self.gate_logits[index].sigmoid() * match
            scale = self.sign * self.edit_lrs[index]
            made[layer.name] = LayerUpdate(pseudo.activation, pseudo.delta, scale, threshold)
        return Update(made)

    def edit_batch(self, edits: CapturedEdits, *, gather: bool = False) -> Update:
        """`update` of what `transform` gives."""
        factors = self._factors(edits)
        return self.update(self.transform(factors, gather=gather), factors)

    def _factors(self, edits: CapturedEdits) -> Mapping[str, Factors]:
        """Factors of the loss that this editor edits with."""
        if not self.config.sum_tokens:
            return edits.factors
        tokens = torch.tensor([float(len(text.targets)) for text in edits.tokens])
        return {
            name: Factors(f.activation, f.delta * tokens.to(f.delta).view(-1, 1, 1))
            for name, f in edits.factors.items()
        }

    def learned(self) -> dict[str, list[nn.Parameter]]:
        """The networks, the alphas, and a gate's shares."""
        gates = {} if self.gate_logits is None else {"gate_lr": [self.gate_logits]}
        networks = list(self.networks.parameters())
        return {"lr": networks, "edit_lr_lr": [self.edit_lrs], **gates}

    @torch.no_grad()
    def propose(self, requests: Sequence[EditRequest]) -> Proposal:
        """One update for all requests: their rank-1 terms side by side (section 3.1).

        With several rounds, the terms of all of them.

        Args:
            requests: At least one.

        Raises:
            EditError: There is no request, one cannot be tokenised, or a loss is not finite.
            Cancelled: See `cancellable`.
        """
        lm, layers = self.lm, self.layers
        strength, confidence = self.config.later_strength, self.config.confidence
        if self.config.rounds == 1:
            return self._proposal(capture_edits(lm, layers, requests))
        texts, run = texts_of(lm, requests), resumed(lm, self._trunk)
        proposals = [self._proposal(capture_texts(lm, layers, texts, run))]
        update = proposals[0].update
        with overlay(lm.model, update):
            left, loss = missed(lm, texts, run, confidence)
        captured = None
        for _ in range(1, self.config.rounds):
            if not left:
                break
            checkpoint()
            if captured is None:
                with overlay(lm.model, update):
                    captured = capture_texts(lm, layers, left, run)
            proposal = self._proposal(captured, strength)
            more = update + proposal.update
            with overlay(lm.model, more):
                still, after = missed(lm, texts, run, confidence)
            if after < loss:
                proposals, update, captured = [*proposals, proposal], more, None
                left, loss = still, after
            else:
                strength /= 2
        return joined(proposals, update) if len(proposals) > 1 else proposals[0]

    @cached_property
    def _trunk(self) -> Trunk:
        return Trunk(self.lm, self.layers)

    def _proposal(self, edits: CapturedEdits, strength: float = 1.0) -> Proposal:
        factors = self._factors(edits)
        pseudofactors = self.transform(factors)
        if strength != 1:
            pseudofactors = {
                name: Factors(p.activation, p.delta * strength) for name, p in pseudofactors.items()
            }
        live = {name: sides.live() for name, sides in factors.items()}
        update = side_by_side(self.update(pseudofactors, factors), live)
        lrs = dict(zip(update, self.edit_lrs.tolist(), strict=True))
        shares = () if self.gate_logits is None else self.gate_logits.sigmoid().tolist()
        gates = dict(zip(update, shares, strict=False))
        return Proposal(update, self.layers, edits.tokens, factors, pseudofactors, lrs, gates)

    def changed(self, **settings: Any) -> Mend:
        """A copy that goes on from here with other settings; what it has learned stays.

        Args:
            settings: Of those that leave the networks' shapes alone: `rounds`, `later_strength`
                and `confidence`; `gate`, where there is none yet; `sum_tokens`, which makes it
                gather its running statistics anew.

        Raises:
            EditorError: Another setting is to change.
        """
        new = {k: v for k, v in settings.items() if getattr(self.config, k) != v}
        free = {"gate", "sum_tokens", "rounds", "later_strength", "confidence"}
        if new.keys() - free or ("gate" in new and self.config.gate):
            raise EditorError(
                f"An editor that was trained cannot go on with {new}: of its settings only "
                f"sum_tokens, rounds, later_strength and confidence can change, and a gate be "
                f"added. Leave the others out, or train a new editor."
            )
        twin = Mend(self.lm, replace(self.config, **new))
        twin.load_state_dict(self.state_dict(), strict=False)
        if "sum_tokens" in new:
            twin.reset_statistics()
        twin.card = self.card
        return twin.train(self.training)
