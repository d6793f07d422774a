"""Passages as edits whose targets the model sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import language_model
from runs import opened

from workbench.continuations import _cut, continuations
from workbench.data import EditExample
from workbench.encoding import tokenize
from workbench.errors import EditError

torch.set_num_threads(1)


def passages(count: int, split: str = "train") -> list[EditExample]:
    return [
        EditExample(
            prompt=" ".join(f"{split[0]}{(7 * i + k) % 10}" for k in range(24)),
            target=" ".join(f"{split[0]}{k % 10}" for k in range(10)),
            id=f"{split}{i}",
            split=split,
            subject=f"{split}{i // 2}",
        )
        for i in range(count)
    ]


def made(given: list[EditExample], **options: int) -> list[EditExample]:
    """By a model of random characters, few of them blanks: long samples, so that some have one."""
    found = continuations(opened("llama"), given, **{"words": 6, "tokens": 30} | options)
    assert found
    return found


def test_a_target_is_what_the_model_samples_and_repeats_under_its_seed() -> None:
    given = passages(16)
    state = torch.random.get_rng_state()
    first = made(given, batch=5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == made(given, batch=5, seed=3)
    assert [e.target for e in first] != [e.target for e in made(given, batch=5, seed=4)]
    for example in first:
        lm = opened("llama")
        assert len(tokenize(lm, example.prompt, example.target).targets) <= 30
        assert example.target == example.target.strip() != ""


def test_equivalents_are_the_prompt_without_some_of_its_beginning() -> None:
    for example in made(passages(16), words=8):
        assert example.paraphrases
        for shorter in example.paraphrases:
            assert example.prompt.endswith(" " + shorter)
            assert 2 * len(shorter.split()) >= len(example.prompt.split())


def test_training_passages_meet_no_others_and_none_their_own() -> None:
    mixed = [*passages(12), *passages(12, "dev")]
    for example in made(mixed, words=4):
        assert example.unrelated
        whole = next(f"{p.prompt} {p.target}" for p in mixed if p.id == example.id)
        for statement in example.unrelated:
            text = f"{statement.prompt} {statement.answer}"
            assert text not in whole
            assert any(f"{p.prompt} {p.target}".startswith(text) for p in mixed)
            assert example.split == "dev" or text.startswith("t")


def test_a_word_that_a_sample_ends_belongs_to_the_prompt() -> None:
    lm = opened("llama")
    assert _cut(lm, "The riv", "er runs to the sea", 5) == ("er", "runs")
    assert _cut(lm, "The river", " runs", 9) == ("", "runs")
    assert _cut(lm, "The river", ".", 9) == ("", "")


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_models_that_do_not_continue_texts_are_refused(family: str) -> None:
    with pytest.raises(EditError, match="does not continue texts"):
        continuations(language_model(family), [replace(passages(1)[0])])
