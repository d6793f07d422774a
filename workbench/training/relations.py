"""Relations learned: the metric by which an editor knows texts that ask what an edit's prompt asks.

A prompt's last token, from which the answer is told, holds both what is asked and of whom. Whom it
is asked of the metric of subjects tells; this one learns from texts about one subject to tell what.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from workbench.crossing import Crossing
from workbench.data import EditExample
from workbench.editors.scoping import Measure
from workbench.encoding import Tokens
from workbench.models import LanguageModel
from workbench.rewrites import rewritten
from workbench.training.inputs import descend, read_of, tokens_of
from workbench.views import LayerInputs

_DRAWN = 192  # questions of a step
_RECALL = 16.0  # how much more a text counts that should match: one missed is an edit not followed
_INNER = 3  # tokens of a text that asks something else, beside its last


@dataclass(frozen=True)
class Question:
    """An edit's prompt and other texts about its subject, told where that stands.

    Args:
        edit: The prompt.
        same: Texts that ask the same.
        others: Texts that ask something else.
    """

    edit: Tokens
    same: tuple[Tokens, ...]
    others: tuple[Tokens, ...]


def questions(
    lm: LanguageModel, examples: Sequence[EditExample], chooser: random.Random
) -> list[Question]:
    """Those of examples that have texts of both kinds.

    Both kinds are asked in forms of many kinds (`rewrites`), so that what is asked is learned and
    not how.
    """
    crossing, found = Crossing(examples), []
    for example in tqdm(examples, desc="texts", disable=None):
        subject = (example.subject or "").strip()
        edit = tokens_of(lm, example.prompt, subject)
        if edit is None:
            continue
        wordings = list(example.paraphrases)
        chooser.shuffle(wordings)
        crossed = [crossing.other_relation(example, chooser) for _ in range(3)]
        others = [prompt for prompt in crossed if prompt]
        if example.relation:  # elsewhere they may ask the same in other words
            others += [statement.prompt for statement in example.same_subject[:2]]
        same = [*wordings[:3], *_rewritten([example.prompt, *wordings[:1]], subject, chooser)]
        others += _rewritten(others, subject, chooser)
        kinds = ((tokens_of(lm, t, subject) for t in dict.fromkeys(k)) for k in (same, others))
        about = (tuple(text for text in kind if text and text != edit) for kind in kinds)
        if all((question := Question(edit, *about)).__dict__.values()):
            found.append(question)
    return found


def _rewritten(prompts: Sequence[str], subject: str, chooser: random.Random) -> list[str]:
    """Up to three of the forms that prompts can take."""
    forms = [text for prompt in prompts for text, _ in rewritten(prompt, subject)]
    return chooser.sample(forms, min(3, len(forms)))


def learn_relations(
    inputs: LayerInputs,
    asked: Sequence[Question],
    rank: int,
    share: float,
    steps: int,
    chooser: random.Random,
) -> tuple[Tensor, float]:
    """The metric, `(rank, in)`, and the loss of the last step.

    Contrastive, over what the layer reads of the frozen model: at an edit's last token, against the
    last of a text that asks the same (a match), and against the last and some others of one that
    asks something else, from the subject's end on (none may match).
    """
    rows = dict[Tokens, Tensor]()
    texts = dict.fromkeys(text for q in asked for text in (q.edit, *q.same, *q.others))
    for some, _, read in read_of(inputs, texts):
        for text, row in zip(some, read, strict=True):
            assert text.subject is not None
            inner = chooser.choices(range(text.subject[1], len(text.ids)), k=_INNER)
            rows[text] = row[[len(text.ids) - 1, *inner]].float().clone()
    device = next(iter(rows.values())).device
    generator = torch.Generator().manual_seed(chooser.getrandbits(32))

    def loss_of(metric: Tensor, scale: Tensor) -> Tensor:
        drawn = chooser.choices(asked, k=_DRAWN)
        anchors = torch.stack([rows[q.edit][0] for q in drawn]) @ metric.mT
        same = torch.stack([rows[chooser.choice(q.same)][:1] for q in drawn])
        others = torch.stack([rows[chooser.choice(q.others)] for q in drawn])
        read = torch.cat([same, others], 1) @ metric.mT
        shares = (read @ anchors.unsqueeze(-1)).squeeze(-1)
        shares = shares / (anchors * anchors).sum(-1, keepdim=True)
        logits = scale * (shares - share)
        missed, met = softplus(-logits[:, 0]), softplus(logits[:, 1:]).amax(1)
        return _RECALL * missed.mean() + met.mean()

    size = rank, inputs.layer.in_features
    return descend(size, loss_of, steps, device, generator, "relations")


@torch.no_grad()
def relations_matched(
    inputs: LayerInputs, asked: Sequence[Question], measure: Measure
) -> tuple[float, float]:
    """Shares of texts that ask the same, and of those that ask something else, of which a token
    from the subject on matches the edit's own."""
    texts = dict.fromkeys(text for q in asked for text in (q.edit, *q.same, *q.others))
    rows = dict[Tokens, Tensor]()
    for some, _, read in read_of(inputs, texts):
        for text, row in zip(some, read, strict=True):
            assert text.subject is not None
            rows[text] = row[text.subject[1] : len(text.ids)].to(measure.metric)
    found: tuple[list[bool], list[bool]] = [], []
    for question in asked:
        keys, thresholds = measure.keys(rows[question.edit][None, -1:])
        for kind, texts_of_kind in zip(found, (question.same, question.others), strict=True):
            kind += [bool((rows[t] @ keys[0] >= thresholds[0]).any()) for t in texts_of_kind]
    same, others = (round(sum(kind) / len(kind), 4) for kind in found)
    return same, others
