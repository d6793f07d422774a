"""The scope of an edit: what its prompt is about, and the key by which texts about it are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.encoding import Tokens, collate, encode, span_of, tokenize_text
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.scope import Scope
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


@torch.no_grad()
def scope_of(
    lm: LanguageModel,
    layer: EditableLayer,
    metric: Tensor,
    share: float,
    texts: Sequence[Tokens],
    inputs: Tensor,
) -> Scope:
    """The scope of edits: the texts that name what they are about.

    With a the layer's input at the subject's last token and M the metric, a token with the input
    x matches if `(M a)^T (M x) >= share |M a|^2`. An edit whose subject is not told acts
    everywhere.

    Args:
        lm: The model.
        layer: The lowest that is edited.
        metric: M, `(rank, in)`.
        share: How much of the match with the edit's own subject is enough.
        texts: The edits, told what they are `about`.
        inputs: What the layer reads of them, `(edits, tokens, in)`.
    """
    rows = metric.new_zeros(len(texts), layer.in_features)
    openings = torch.full((len(texts),), -1, device=metric.device)
    for place, text in enumerate(texts):
        if text.subject is None:
            continue
        first, last = text.subject
        name = str(lm.tokenizer.decode(list(text.ids[first : last + 1]))).strip()
        openings[place] = text.ids[0] if last == 0 else _opening(lm, name)
        rows[place] = inputs[place, last] if last else _elsewhere(lm, layer, name)
    known = rows @ metric.mT
    own = (known * known).sum(-1)
    thresholds = (share * own).masked_fill(own == 0, -torch.inf)
    return Scope(layer.name, known @ metric, thresholds, openings)


def _opening(lm: LanguageModel, name: str) -> int:
    """The token that is the whole name at the beginning of a text; -1 if it takes several."""
    ids = encode(lm, name[:1].upper() + name[1:])["input_ids"]
    return ids[0] if len(ids) == 1 else -1


def _elsewhere(lm: LanguageModel, layer: EditableLayer, name: str) -> Tensor:
    """What the layer reads at the name's end within a text, `(in,)`."""
    text = tokenize_text(lm, f"It is about {name}.")
    return LayerInputs(lm, layer)(collate(lm, [text]))[0, -1]
