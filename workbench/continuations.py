"""Edits of plain text: a passage should go on as a sample says (section 5, Wikitext generation)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from workbench.compare import generate_texts
from workbench.data import EditExample, Statement
from workbench.encoding import tokenize
from workbench.errors import EditError
from workbench.models import LanguageModel

_EXTRA = 4  # tokens sampled beyond the target: the first may still belong to the prompt's last word
_WORDS = 16  # of each half of an unrelated passage


def continuations(
    lm: LanguageModel,
    passages: Sequence[EditExample],
    *,
    words: int = 24,
    tokens: int = 10,
    unrelated: int = 2,
    batch: int = 16,
    seed: int = 0,
) -> list[EditExample]:
    """Turn passages into edits whose targets the model itself has sampled.

    The paper's task: after a passage's beginning, a sampled continuation is to become the most
    likely one. Equivalents are the same beginning with up to half of its words taken off the
    front; perplexity on other passages should not move.

    Args:
        lm: A decoder; it reads the beginnings and samples, under whatever overlay is live.
        passages: As `read("passages:PATH")` gives them.
        words: Words of a passage that are read; shorter ones are read but for their last word.
        tokens: Length of a target.
        unrelated: Other passages that stand beside each; training ones meet no others.
        batch: Passages continued at a time.
        seed: Chooses samples, cuts and unrelated passages.

    Returns:
        One example for each passage whose sample is not blank, in order.

    Raises:
        EditError: The model is no decoder, or was opened for chats.
    """
    if lm.kind != "causal" or lm.chat:
        raise EditError(
            f"{lm.source} does not continue texts, so no target can be sampled from it: open a "
            "decoder-only model, without chat."
        )
    whole = [f"{passage.prompt} {passage.target}" for passage in passages]
    prompts = [" ".join(text.split()[: min(words, len(text.split()) - 1)]) for text in whole]
    samples: list[str] = []
    with torch.random.fork_rng():
        for start in range(0, len(prompts), batch):
            torch.manual_seed(seed + start)
            part = prompts[start : start + batch]
            length = tokens + _EXTRA
            options = {"do_sample": True, "top_k": 0, "min_new_tokens": length}
            samples += generate_texts(lm, part, length, **options)
    found = []
    for place, (passage, prompt, sample) in enumerate(zip(passages, prompts, samples, strict=True)):
        ending, target = _cut(lm, prompt, sample, tokens)
        if not target:
            continue
        chooser = random.Random(f"{seed}|{passage.id}|{place}")
        others = [
            Statement(prompt=" ".join(half[:_WORDS]), answer=" ".join(half[_WORDS : 2 * _WORDS]))
            for half in _others(passages, whole, place, unrelated, chooser)
        ]
        found.append(
            replace(
                passage,
                prompt=prompt + ending,
                target=target,
                paraphrases=tuple(_shortened(prompt + ending, chooser)),
                unrelated=tuple(others),
            )
        )
    return found


def _cut(lm: LanguageModel, prompt: str, sample: str, tokens: int) -> tuple[str, str]:
    """What of a sample ends the prompt's last word, and the target that follows it."""
    ending = "" if sample[:1].isspace() else sample.split(maxsplit=1)[0] if sample.strip() else ""
    target = sample[len(ending) :].strip()
    if not target:
        return "", ""
    ids = tokenize(lm, prompt + ending, target).targets[:tokens]
    return ending, str(lm.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _shortened(prompt: str, chooser: random.Random, count: int = 2) -> list[str]:
    """The prompt with some words off its front, half of them at most."""
    words = prompt.split()
    cuts = range(1, len(words) // 2 + 1)
    return [" ".join(words[cut:]) for cut in chooser.sample(cuts, min(count, len(cuts)))]


def _others(
    passages: Sequence[EditExample],
    whole: Sequence[str],
    place: int,
    count: int,
    chooser: random.Random,
) -> Iterator[list[str]]:
    """Words of other passages, long enough to be halved, that an example may meet."""
    mine = passages[place]
    order = chooser.sample(range(len(passages)), min(len(passages), 8 * count))
    fits = (
        whole[other].split()
        for other in order
        if other != place
        and (mine.split != "train" or passages[other].split == "train")
        and (mine.subject is None or passages[other].subject != mine.subject)
        and len(whole[other].split()) >= 2 * _WORDS
    )
    yield from (words for words, _ in zip(fits, range(count), strict=False))
