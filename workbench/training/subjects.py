"""Subjects learned: the metric by which an editor knows texts about an edit's subject."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm.auto import tqdm

from workbench.crossing import Crossing
from workbench.data import EditExample
from workbench.encoding import Tokens
from workbench.models import LanguageModel
from workbench.training.inputs import descend, read_of, tokens_of
from workbench.views import LayerInputs

_DRAWN = 192  # subjects of a step, half of them of one relation, and other tokens beside them
_HARDEST = 24  # of each subject's non-matches those that its loss is of


@dataclass
class Subject:
    """A subject's texts.

    Args:
        relation: What its first example is of, where the data tell.
        examples: How many it has.
        edits: Their prompts.
        about: Other texts about it.
        elsewhere: Texts about others.
    """

    relation: str | None
    examples: int = 0
    edits: dict[Tokens, None] = field(default_factory=dict)
    about: dict[Tokens, None] = field(default_factory=dict)
    elsewhere: dict[Tokens, None] = field(default_factory=dict)


def subjects(
    lm: LanguageModel, examples: Sequence[EditExample], chooser: random.Random
) -> list[Subject]:
    """The subjects of examples that have two texts or more, with these."""
    crossing, found = Crossing(examples), dict[str, Subject]()
    for example in tqdm(examples, desc="texts", disable=None):
        subject = (example.subject or "").strip()
        edit = tokens_of(lm, example.prompt, subject)
        if edit is None:
            continue
        here = found.setdefault(subject, Subject(example.relation))
        here.examples += 1
        here.edits[edit] = None
        crossed = [crossing.other_relation(example, chooser) for _ in range(2)]
        same = [statement.prompt for statement in example.same_subject[:2]]
        for prompt in (*example.paraphrases[:3], *same, *crossed):
            if text := tokens_of(lm, prompt, subject):
                here.about[text] = None
        crossed = [crossing.other_subject(example, chooser) for _ in range(2)]
        others = (*example.neighbors[:4], *example.unrelated[:2])
        random_one = chooser.choice(examples).prompt
        for prompt in (*(statement.prompt for statement in others), *crossed, random_one):
            if prompt and subject not in prompt and (text := tokens_of(lm, prompt)):
                here.elsewhere[text] = None
    return [each for each in found.values() if each.about.keys() - each.edits.keys()]


def learn_subjects(
    inputs: LayerInputs,
    subjects: Sequence[Subject],
    rank: int,
    share: float,
    steps: int,
    chooser: random.Random,
) -> tuple[Tensor, float]:
    """The metric, `(rank, in)`, and the loss of the last step.

    Contrastive, over what the layer reads of the frozen model: at a subject's last token in an
    edit's prompt, against the same in other texts about the subject (matches), in texts about other
    subjects, half of them of one relation, and at other tokens of any texts (non-matches).
    """
    owners = {t.ids: n for n, each in enumerate(subjects) for t in (*each.edits, *each.about)}
    texts = (t for each in subjects for t in (*each.edits, *each.about, *each.elsewhere))
    places, names, others = dict[Tokens, int](), list[Tensor](), list[Tensor]()
    for some, _, read in read_of(inputs, dict.fromkeys(texts)):
        for text, row in zip(some, read, strict=True):
            places[text] = len(places)
            end = len(text.ids) - 1
            names.append(row[text.subject[1] if text.subject else end].float().clone())
            # Texts about others may name a subject of the step, which only the ends cannot be.
            other = chooser.choice((end, chooser.randint(0, end))) if text.subject else end
            others.append(row[other].float().clone())
    at_names, at_others = torch.stack(names), torch.stack(others)
    device = at_names.device
    whose = torch.tensor([owners.get(text.ids, -1) for text in places])
    edits = [[places[text] for text in each.edits] for each in subjects]
    about = [[places[t] for t in each.about if t not in each.edits] for each in subjects]
    alike = defaultdict[str | None, list[int]](list)
    for number, each in enumerate(subjects):
        alike[each.relation].append(number)

    generator = torch.Generator().manual_seed(chooser.getrandbits(32))
    columns = torch.arange(2 * _DRAWN, device=device)

    def loss_of(metric: Tensor, scale: Tensor) -> Tensor:
        near = alike[chooser.choice(subjects).relation]
        drawn = chooser.choices(range(len(subjects)), k=_DRAWN // 2)
        drawn += chooser.choices(near, k=_DRAWN // 2)
        beside = torch.randint(len(places), (_DRAWN,), generator=generator)
        anchors = at_names[[chooser.choice(edits[number]) for number in drawn]] @ metric.mT
        named = at_names[[chooser.choice(about[number]) for number in drawn]]
        read = torch.cat([named, at_others[beside.to(device)]]) @ metric.mT
        shares = anchors @ read.mT / (anchors * anchors).sum(-1, keepdim=True)
        who = torch.tensor(drawn)
        same = (who.unsqueeze(1) == torch.cat([who, whose[beside]])).to(device)
        matches = same & (columns < _DRAWN)
        logits = scale * (shares - share)
        losses = binary_cross_entropy_with_logits(logits, matches.float(), reduction="none")
        hardest = losses.masked_fill(same, 0).topk(_HARDEST, 1).values
        return losses[matches].mean() + 2 * hardest.mean()

    size = rank, inputs.layer.in_features
    return descend(size, loss_of, steps, device, generator, "subjects")
