"""MEND: networks that turn gradient factors into a local edit (Mitchell et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from workbench.cancel import checkpoint
from workbench.editors.base import TrainableEditor, register
from workbench.editors.networks import EditorNetwork
from workbench.editors.proposals import (
    CapturedEdits,
    EditRequest,
    Proposal,
    capture_texts,
    joined,
    missed,
    resumed,
    side_by_side,
    texts_of,
)
from workbench.editors.scoping import Measure, about, scope_of, sentences
from workbench.encoding import Tokens, collate
from workbench.errors import EditorError
from workbench.factors import Factors
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.scope import Scope
from workbench.stacking import each_within
from workbench.updates import LayerUpdate, Update
from workbench.views import LayerInputs, Trunk, TrunkCache

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
        scope: Rank of the metric by which texts about an edit's subject are known; an edit acts in
            those alone, from its subject on (`scoping.scope_of`). Decoders only; the metric is
            learned apart, from texts (`training.scoping`). 0: no scope (the paper).
        scope_share: How much of the match with an edit's own subject is enough.
        scope_relation: Rank of the metric by which texts that ask what the edit's prompt asks are
            known, learned likewise; an edit then acts where a text about its subject asks that, for
            as many tokens as its target has. 0: whatever is asked about the subject.
        scope_relation_share: How much of the match with the edit's own prompt is enough.
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
    scope: int = 0
    scope_share: float = 0.5
    scope_relation: int = 0
    scope_relation_share: float = 0.5
    sum_tokens: bool = False
    rounds: int = 1
    later_strength: float = 0.15
    confidence: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise EditorError(f"rank must be at least 1; got {self.rank}.")
        if not 0 <= self.gate < 1:
            raise EditorError(f"gate is a share, 0 (no gate) to below 1; got {self.gate}.")
        for name in ("scope", "scope_relation"):
            rank, share = getattr(self, name), getattr(self, f"{name}_share")
            if rank < 0:
                raise EditorError(f"{name} is a rank, 0 (none) or more; got {rank}.")
            if not 0 < share < 1:
                raise EditorError(f"{name}_share lies between 0 and 1; got {share}.")
        if self.scope_relation and not self.scope:
            raise EditorError(
                f"scope_relation is {self.scope_relation}, but what a text asks is looked at "
                f"within a scope alone. Give scope a rank as well, such as 128."
            )
        if self.rounds < 1:
            raise EditorError(f"rounds must be at least 1; got {self.rounds}.")
        if not 0 < self.confidence < 1:
            raise EditorError(f"confidence is a probability, 0 to 1; got {self.confidence}.")
        if self.inputs not in get_args(Inputs):
            raise EditorError(
                f"inputs must be one of {', '.join(get_args(Inputs))}; got {self.inputs!r}."
            )


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
        if self.config.scope:
            if lm.kind != "causal":
                raise EditorError(
                    f"A scope follows a text from its subject on, as decoders read; {lm.source} is "
                    f"a {lm.kind} model. Leave scope out."
                )
            width = self.layers[0].in_features
            self.register_buffer("scope_metric", torch.zeros(self.config.scope, width))
            if self.config.scope_relation:
                size = self.config.scope_relation, width
                self.register_buffer("relation_metric", torch.zeros(size))
        self._settle()

    @property
    def trained(self) -> bool:
        """Whether every network has gathered the statistics that its inputs are normalised by."""
        found = (n for n in self.networks.children() if isinstance(n, EditorNetwork))
        return all(network.rows_seen > 1 for network in found)

    @property
    def scoped(self) -> bool:
        return self.config.scope > 0

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
        """`update` of what `transform` gives; each edit with its scope, where there are any."""
        factors = self._factors(edits)
        update = self.update(self.transform(factors, gather=gather), factors)
        scope = self._scope(edits)
        return update if scope is None else each_within(update, scope)

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
        texts, cache = texts_of(lm, requests), TrunkCache(lm, self._trunk, gigabytes=1.0)
        if self.scoped:
            pairs = zip(texts, requests, strict=True)
            texts = tuple(about(lm, text, r.prompt, r.subject) for text, r in pairs)
            cache.hidden([*texts, *sentences(lm, texts).values()])  # all in one pass
        run = resumed(cache)
        edits = capture_texts(lm, layers, texts, run)
        scope = self._scope(edits, cache)
        proposals = [self._proposal(edits, scope)]
        if self.config.rounds == 1:
            return proposals[0]
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
            rows = [texts.index(text) for text in captured.tokens]
            proposal = self._proposal(captured, scope, rows, strength)
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

    @cached_property
    def _lowest(self) -> LayerInputs:
        return LayerInputs(self.lm, self.layers[0], self._trunk)

    def _scope(self, edits: CapturedEdits, cache: TrunkCache | None = None) -> Scope | None:
        if not self.scoped:
            return None
        layer, config = self.layers[0], self.config
        kept = cache or TrunkCache(self.lm, self._trunk, gigabytes=0)

        def read(texts: Sequence[Tokens]) -> Tensor:
            return self._lowest(collate(self.lm, texts), kept.hidden(texts))

        subjects, relations = Measure(self.get_buffer("scope_metric"), config.scope_share), None
        if config.scope_relation:
            metric = self.get_buffer("relation_metric")
            relations = Measure(metric, config.scope_relation_share)
        inputs = edits.factors[layer.name].activation.to(subjects.metric)
        return scope_of(self.lm, layer, subjects, relations, edits.tokens, inputs, read)

    def _proposal(
        self,
        edits: CapturedEdits,
        scope: Scope | None,
        rows: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> Proposal:
        factors = self._factors(edits)
        pseudofactors = self.transform(factors)
        if strength != 1:
            pseudofactors = {
                name: Factors(p.activation, p.delta * strength) for name, p in pseudofactors.items()
            }
        live = {name: sides.live() for name, sides in factors.items()}
        update = side_by_side(self.update(pseudofactors, factors), live, scope, rows)
        lrs = dict(zip(update, self.edit_lrs.tolist(), strict=True))
        shares = () if self.gate_logits is None else self.gate_logits.sigmoid().tolist()
        gates = dict(zip(update, shares, strict=False))
        return Proposal(update, self.layers, edits.tokens, factors, pseudofactors, lrs, gates)

    @torch.no_grad()
    def shift_gate(self, logits: float) -> float:
        """Move every layer's share of the gate: below 0 edits reach farther, above 0 less far.

        Args:
            logits: Added to the logits of the shares.

        Returns:
            By how much they have been moved in all, as the card knows it.

        Raises:
            EditorError: There is no gate.
        """
        if self.gate_logits is None:
            raise EditorError("This editor has no gate whose shares could be moved.")
        self.gate_logits.add_(logits)
        return round(self.card.get("gate_shift", 0.0) + logits, 6)

    def changed(self, **settings: Any) -> Mend:
        """A copy that goes on from here with other settings; what it has learned stays.

        Args:
            settings: Of those that leave the networks' shapes alone: `rounds`, `later_strength`
                and `confidence`; `scope_share` and `scope_relation_share`; `scope`,
                `scope_relation` and `gate`, to none or where there is none yet; `sum_tokens`, which
                makes it gather its running statistics anew.

        Raises:
            EditorError: Another setting is to change.
        """
        if settings.get("scope") == 0:
            settings = {"scope_relation": 0, **settings}
        new = {k: v for k, v in settings.items() if getattr(self.config, k) != v}
        parts = {"gate", "scope", "scope_relation"}
        free = {"sum_tokens", "rounds", "later_strength", "confidence"}
        free |= parts | {"scope_share", "scope_relation_share"}
        another = any(getattr(self.config, part) and new.get(part) for part in parts)
        if new.keys() - free or another:
            raise EditorError(
                f"An editor that was trained cannot go on with {new}: of its settings only "
                f"sum_tokens, rounds, later_strength, confidence, scope_share and "
                f"scope_relation_share can change, a gate, a scope and its relation be added or "
                f"dropped. Leave the others out, or train a new editor."
            )
        twin = Mend(self.lm, replace(self.config, **new))
        twin.load_state_dict(self.state_dict(), strict=False)
        if "sum_tokens" in new:
            twin.reset_statistics()
        twin.card = self.card
        return twin.train(self.training)
