"""The scope of an edit: what its prompt is about, and the key by which texts about it are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.encoding import Tokens, collate, encode, span_of, tokenize_text
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.scope import Scope, widened
from workbench.subjects import likely_subject, topic_of
from workbench.views import LayerInputs


def subject_in(prompt: str, subject: str | None = None) -> str | None:
    """What a prompt is about, as it stands there.

    Args:
        prompt: The text.
        subject: What it is about, where that is known and the prompt holds it, in whatever case.

    Returns:
        None where the prompt's form does not tell.
    """
    topic = topic_of(prompt)
    for known in (subject, topic.subject if topic.relation else None):
        found = re.findall(re.escape((known or "").strip()), prompt, re.IGNORECASE)
        if known and known.strip() and found:
            return found[-1]
    return likely_subject(prompt)


def about(lm: LanguageModel, text: Tokens, prompt: str, subject: str | None = None) -> Tokens:
    """A prompt's tokens, told where in it stands what it is about; see `subject_in`."""
    found = subject_in(prompt, subject)
    return replace(text, subject=span_of(lm, prompt, found) if found else None)


@dataclass(frozen=True, eq=False)
class Measure:
    """How a layer's inputs are compared with an edit's own.

    With a the edit's and M the metric, a token with the input x matches if
    `(M a)^T (M x) >= share |M a|^2`.

    Args:
        metric: M, `(rank, in)`.
        share: How much of the match with the edit's own is enough.
    """

    metric: Tensor
    share: float

    def keys(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, `(edits, in)`, and thresholds, `(edits,)`, of edits' own inputs, `(edits, in)`;
        zeros stand for an edit that every token matches."""
        known = own @ self.metric.mT
        match = (known * known).sum(-1)
        return known @ self.metric, (self.share * match).masked_fill(match == 0, -torch.inf)


@torch.no_grad()
def scope_of(
    lm: LanguageModel,
    layer: EditableLayer,
    subjects: Measure,
    relations: Measure | None,
    texts: Sequence[Tokens],
    inputs: Tensor,
) -> Scope:
    """The scope of edits: the texts that name what they are about and ask for the same of it.

    The first key is what the layer reads at the subject's last token, the second what it reads at
    the prompt's, from which the answer is told; with it an edit acts for as many tokens as its
    target has. Every text names a subject that is not told.

    Args:
        lm: The model.
        layer: The lowest that is edited.
        subjects: Compares subjects.
        relations: Compares what is asked; None: whatever is asked about the subject.
        texts: The edits, told what they are `about`.
        inputs: What the layer reads of them, `(edits, tokens, in)`.
    """
    names = subjects.metric.new_zeros(len(texts), layer.in_features)
    ends = torch.zeros_like(names)
    openings = torch.full((len(texts),), -1, device=names.device)
    answers = [torch.empty(0, dtype=torch.int64)] * len(texts)
    for place, text in enumerate(texts):
        end = len(text.ids) - len(text.targets)
        if relations is not None and end:
            ends[place], answers[place] = inputs[place, end], torch.tensor(text.targets)
        if text.subject is None:
            continue
        first, last = text.subject
        name = str(lm.tokenizer.decode(list(text.ids[first : last + 1]))).strip()
        openings[place] = text.ids[0] if last == 0 else _opening(lm, name)
        names[place] = inputs[place, last] if last else _elsewhere(lm, layer, name)
    found = [subjects.keys(names)]
    if relations is not None:
        found.append(relations.keys(ends))
    keys, thresholds = zip(*found, strict=True)
    longest = max(1, *map(len, answers))
    told = torch.stack([widened(answer, longest) for answer in answers]).to(openings)
    return Scope(layer.name, torch.stack(keys, -2), torch.stack(thresholds, -1), openings, told)


def _opening(lm: LanguageModel, name: str) -> int:
    """The token that is the whole name at the beginning of a text; -1 if it takes several."""
    ids = encode(lm, name[:1].upper() + name[1:])["input_ids"]
    return ids[0] if len(ids) == 1 else -1


def _elsewhere(lm: LanguageModel, layer: EditableLayer, name: str) -> Tensor:
    """What the layer reads at the name's end within a text, `(in,)`."""
    text = tokenize_text(lm, f"It is about {name}.")
    return LayerInputs(lm, layer)(collate(lm, [text]))[0, -1]
