"""The scope of an edit: what its prompt is about, and the key by which texts about it are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.encoding import Tokens, encode, reads_at_most, span_of
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.scope import Scope, widened
from workbench.subjects import likely_subject, topic_of

_STOPS = ".'\"\u2019\u201d"


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
    """How a layer's inputs are compared with those of an edit.

    With a the mean of what was read of the edit and M the metric, a token with the input x matches
    if `(M a)^T (M x) >= share |M a|^2`. Where the readings are so unlike that not all of them
    would, a is the first alone.

    Args:
        metric: M, `(rank, in)`.
        share: How much of the match with the edit's own is enough.
    """

    metric: Tensor
    share: float

    def keys(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, `(edits, in)`, and thresholds, `(edits,)`, of what was read of edits,
        `(edits, readings, in)`; zeros stand for an edit that every token matches."""
        known = read @ self.metric.mT
        mean = known.mean(1)
        least = (known @ mean.unsqueeze(-1)).amin((1, 2))
        unlike = least < (self.share + 0.01) * (mean * mean).sum(-1)  # .01: rounding
        mean = torch.where(unlike.unsqueeze(-1), known[:, 0], mean)
        match = (mean * mean).sum(-1)
        return mean @ self.metric, (self.share * match).masked_fill(match == 0, -torch.inf)


@torch.no_grad()
def scope_of(
    lm: LanguageModel,
    layer: EditableLayer,
    subjects: Measure,
    relations: Measure | None,
    texts: Sequence[Tokens],
    inputs: Tensor,
    read: Callable[[Sequence[Tokens]], Tensor],
) -> Scope:
    """The scope of edits: the texts that name what they are about and ask for the same of it.

    The first key is what the layer reads at the subject's last token, in the mean of the edit's
    prompt and a plain sentence, the second what it reads at the prompt's, from which the answer is
    told; with it an edit acts for as many tokens as its target has. Every text names a subject
    that is not told.

    Args:
        lm: The model.
        layer: The lowest that is edited.
        subjects: Compares subjects.
        relations: Compares what is asked; None: whatever is asked about the subject.
        texts: The edits, told what they are `about`.
        inputs: What the layer reads of them, `(edits, tokens, in)`.
        read: Tells what it reads of others.
    """
    ends = subjects.metric.new_zeros(len(texts), 1, layer.in_features)
    readings = ends.repeat(1, 2, 1)
    openings = torch.full((len(texts),), -1, device=ends.device)
    answers = [torch.empty(0, dtype=torch.int64)] * len(texts)
    for place, text in enumerate(texts):
        end = len(text.ids) - len(text.targets)
        if relations is not None and end:
            ends[place, 0], answers[place] = inputs[place, end], torch.tensor(text.targets)
        if text.subject is not None:
            last = text.subject[1]
            openings[place] = _opening(lm, _named(lm, text)) if last else text.ids[0]
            readings[place, 0] = inputs[place, last]
    plain = sentences(lm, texts)
    if plain:
        for (place, text), row in zip(plain.items(), read(list(plain.values())), strict=True):
            # What stands first in a text holds nothing to be known by.
            first = (texts[place].subject or (0, 0))[1] == 0
            readings[place, 0 if first else 1 :] = row[len(text.ids) - 1]
    found = [subjects.keys(readings)]
    if relations is not None:
        found.append(relations.keys(ends))
    keys, thresholds = zip(*found, strict=True)
    longest = max(1, *map(len, answers))
    told = torch.stack([widened(answer, longest) for answer in answers]).to(openings)
    return Scope(layer.name, torch.stack(keys, -2), torch.stack(thresholds, -1), openings, told)


def sentences(lm: LanguageModel, texts: Sequence[Tokens]) -> dict[int, Tokens]:
    """A plain sentence up to the subject's name, for each text that is told one, by its place.

    Without full stops and quotes at the name's end ("F.C.'"), which hold little of it.
    """
    told = {place: _named(lm, text) for place, text in enumerate(texts) if text.subject}
    plain = {place: f"It is about {name.rstrip(_STOPS)}" for place, name in told.items()}
    most = reads_at_most(lm) or 0  # 0: as much as there is
    ids = {place: encode(lm, text)["input_ids"][-most:] for place, text in plain.items()}
    return {place: Tokens(tuple(found), ()) for place, found in ids.items()}


def _named(lm: LanguageModel, text: Tokens) -> str:
    first, last = text.subject or (0, -1)
    return str(lm.tokenizer.decode(list(text.ids[first : last + 1]))).strip()


def _opening(lm: LanguageModel, name: str) -> int:
    """The token that is the whole name at the beginning of a text; -1 if it takes several."""
    ids = encode(lm, name[:1].upper() + name[1:])["input_ids"]
    return ids[0] if len(ids) == 1 else -1
