"""What the workbench shows: plain values that figures, tables and files are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from workbench.editors.proposals import EditRequest, Proposal
from workbench.factors import Factors
from workbench.layers import EditableLayer
from workbench.metrics import begins_with
from workbench.models import LanguageModel
from workbench.updates import Update


@dataclass(frozen=True)
class LayerTrace:
    """One edited layer of one edit, token by token.

    Args:
        name: Dotted name of the layer.
        stack: "decoder" or "encoder".
        block: Index of its block.
        matrix: Last part of the name, e.g. "down_proj".
        activation_norms: |u_t| for each token.
        delta_norms: |delta_t| for each token.
        pseudoactivation_norms: |u~_t|; None where the editor does not transform factors.
        pseudodelta_norms: |delta~_t|; likewise.
        activation_cosines: Cosine of u_t and u~_t; likewise.
        delta_cosines: Cosine of delta_t and delta~_t; likewise.
        update_norm: Frobenius norm of dW.
        weight_norm: Frobenius norm of W.
        spectrum: Singular values of dW, largest first (numerical zeros left out).
        edit_lr: The layer's step size alpha; None where the editor has none.
        gate: Share of a term's match with its own input beyond which it acts; likewise.
    """

    name: str
    stack: str
    block: int
    matrix: str
    activation_norms: tuple[float, ...]
    delta_norms: tuple[float, ...]
    pseudoactivation_norms: tuple[float, ...] | None
    pseudodelta_norms: tuple[float, ...] | None
    activation_cosines: tuple[float, ...] | None
    delta_cosines: tuple[float, ...] | None
    update_norm: float
    weight_norm: float
    spectrum: tuple[float, ...]
    edit_lr: float | None
    gate: float | None = None

    @property
    def relative_norm(self) -> float:
        """|dW| / |W|."""
        return self.update_norm / self.weight_norm if self.weight_norm else float("nan")


@dataclass(frozen=True)
class EditTrace:
    """Why an edit does what it does: every layer's factors before and after the editor.

    Args:
        requests: What was asked for.
        tokens: Text of each input token, of all requests in a row.
        predicts: Text of the target token that each position predicts; empty for the others.
        layers: One trace for each edited layer, lowest first.
        answers: Text of each token that an encoder-decoder's decoder is to say; its decoder's
            layers have one row for each of them.
    """

    requests: tuple[EditRequest, ...]
    tokens: tuple[str, ...]
    predicts: tuple[str, ...]
    layers: tuple[LayerTrace, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptComparison:
    """One prompt before and after the live edits.

    Args:
        prompt: What the model reads.
        kind: "edit", "equivalent", "portability", "neighbor", "unrelated" or "other".
        base_text: The base model's continuation.
        edited_text: The edited model's continuation.
        target: The answer whose probability is given; None for none.
        base_probability: p(target | prompt), teacher-forced, product over its tokens.
        edited_probability: The same under the edits.
        base_exact: Every target token is the base model's most likely one (teacher-forced).
        edited_exact: The same under the edits.
        divergence: KL(base || edited) of the next token, nats.
        change: Total variation of base and edited next-token distributions, 0 to 1: the mean
            over the answer's positions, the target's or else the base model's own text's.
    """

    prompt: str
    kind: str
    base_text: str
    edited_text: str
    target: str | None = None
    base_probability: float | None = None
    edited_probability: float | None = None
    base_exact: bool | None = None
    edited_exact: bool | None = None
    divergence: float = 0.0
    change: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether the continuation is another one."""
        return self.base_text != self.edited_text

    @property
    def free_running(self) -> bool | None:
        """Whether the edited continuation begins with the target."""
        return None if self.target is None else begins_with(self.edited_text, self.target)

    @property
    def kept(self) -> bool:
        """Whether what the base model writes stays: its answer where it gives it, else all."""
        answers = self.target is not None and begins_with(self.base_text, self.target)
        return not self.changed or (answers and self.free_running is True)


@dataclass(frozen=True)
class Comparison:
    """Prompts before and after.

    Args:
        rows: In the order given.
        unfinished: How many of the last ones are still being written: texts so far, no figures.
    """

    rows: tuple[PromptComparison, ...]
    unfinished: int = 0

    def of_kind(self, kind: str) -> tuple[PromptComparison, ...]:
        """The rows of one kind."""
        return tuple(row for row in self.rows if row.kind == kind)


@dataclass(frozen=True)
class HistoryEntry:
    """One live edit: its id, its title, whether it is on, and how strongly."""

    id: int
    title: str
    enabled: bool
    strength: float


@dataclass(frozen=True)
class Overlap:
    """How far live edits write in each other's direction.

    Args:
        titles: Of the edits, oldest first.
        cosines: <dW_i, dW_j> / (|dW_i| |dW_j|) over all layers; 1 on the diagonal.
    """

    titles: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]


def overlap_of(updates: Mapping[str, Update]) -> Overlap:
    """Compare every pair of updates, by title."""
    sizes = {title: math.sqrt(max(0.0, update.inner(update))) for title, update in updates.items()}
    rows = (
        tuple(
            a.inner(b) / (sizes[i] * sizes[j]) if sizes[i] and sizes[j] else 0.0
            for j, b in updates.items()
        )
        for i, a in updates.items()
    )
    return Overlap(tuple(updates), tuple(rows))


def trace_of(lm: LanguageModel, requests: Sequence[EditRequest], proposal: Proposal) -> EditTrace:
    """Reduce a proposal's tensors to the numbers that people look at."""
    lengths = {stack: [len(t.ids) for t in proposal.tokens] for stack in ("encoder", "decoder")}
    if lm.kind == "seq2seq":  # its decoder reads the target, not the prompt
        lengths["decoder"] = [len(t.targets) for t in proposal.tokens]
    texts: list[str] = []
    predicts: list[str] = []
    said: list[str] = []
    for tokens in proposal.tokens:
        texts += [str(lm.tokenizer.decode([token])) for token in tokens.ids]
        answers = [str(lm.tokenizer.decode([token])) for token in tokens.targets]
        plain = len(tokens.ids) - len(tokens.targets)
        predicts += ([""] * plain + answers) if lm.kind == "causal" else [""] * len(tokens.ids)
        said += answers if lm.kind == "seq2seq" else []
    return EditTrace(
        tuple(requests),
        tuple(texts),
        tuple(predicts),
        tuple(_layer_trace(layer, proposal, lengths[layer.stack]) for layer in proposal.layers),
        tuple(said),
    )


def _layer_trace(layer: EditableLayer, proposal: Proposal, lengths: Sequence[int]) -> LayerTrace:
    name = layer.name
    raw = _rows(proposal.factors[name], lengths)
    pseudo = None
    if proposal.pseudofactors is not None:
        pseudo = _rows(proposal.pseudofactors[name], lengths)
    change = proposal.update[name]
    spectrum = change.spectrum()
    return LayerTrace(
        name=name,
        stack=layer.stack,
        block=layer.block,
        matrix=name.rsplit(".", 1)[-1],
        activation_norms=_floats(raw[0].norm(dim=-1)),
        delta_norms=_floats(raw[1].norm(dim=-1)),
        pseudoactivation_norms=pseudo and _floats(pseudo[0].norm(dim=-1)),
        pseudodelta_norms=pseudo and _floats(pseudo[1].norm(dim=-1)),
        activation_cosines=pseudo and _floats(cosine_similarity(raw[0], pseudo[0], dim=-1)),
        delta_cosines=pseudo and _floats(cosine_similarity(raw[1], pseudo[1], dim=-1)),
        update_norm=float(change.norm()),
        weight_norm=layer.weight_norm(),
        spectrum=_floats(spectrum[spectrum > 1e-6 * spectrum[:1]]),
        edit_lr=proposal.edit_lrs.get(name),
        gate=proposal.gates.get(name),
    )


def _rows(factors: Factors, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both factors' rows without padding, requests one after another, float32."""
    parts = [
        (factors.activation[row, :length].float(), factors.delta[row, :length].float())
        for row, length in enumerate(lengths)
    ]
    return torch.cat([u for u, _ in parts]), torch.cat([delta for _, delta in parts])


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def as_json(value: object) -> object:
    """Dataclasses, tuples and mappings as JSON values."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_json(getattr(value, name)) for name in value.__dataclass_fields__}  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value
