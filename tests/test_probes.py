"""Suggested prompts: of the right kind, never the edit itself, the same each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.corpus import EXAMPLES, relations
from workbench.probes import Probe, as_lines, read_form, read_lines, suggest


def test_gallery_examples_bring_their_own() -> None:
    example = EXAMPLES[0]
    probes = suggest(example.prompt, example.target)
    alike = [probe for probe in probes if probe.kind == "equivalent"]
    assert [probe.prompt for probe in alike] == list(example.paraphrases[:2])
    assert {probe.target for probe in alike} == {example.target}


@pytest.mark.parametrize("name", ["country.capital", "book.author", "element.symbol"])
def test_corpus_wordings_are_recognised(name: str) -> None:
    relation = relations()[name]
    subject = relation.subjects[3]
    prompt = relation.ask(subject, "any").prompt
    probes = suggest(prompt, "Nowhere", equivalents=3)
    alike = [probe.prompt for probe in probes if probe.kind == "equivalent"]
    assert len(alike) == 3
    assert all(subject in wording for wording in alike)
    assert prompt not in alike
    near = [probe for probe in probes if probe.kind == "neighbor"]
    assert near
    assert all(probe.target != "Nowhere" for probe in near)


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_prompt_gets_probes_and_the_same_each_time(prompt: str, target: str) -> None:
    probes = suggest(prompt, target)
    assert probes == suggest(prompt, target)
    assert probes[0].prompt == prompt
    assert [probe.kind for probe in probes].count("equivalent") == 2
    assert [probe.kind for probe in probes].count("unrelated") == 3
    assert all(probe.prompt != prompt for probe in probes[1:])
    assert all(probe.made for probe in probes)


def test_lines_of_prompts_say_what_probes_say():
    probes = (
        Probe("The capital of Italy is", "neighbor", "Rome"),
        Probe("Bees make", "neighbor"),
    )
    assert read_lines(as_lines(probes, "neighbor"), "neighbor") == probes
    assert read_form("p ", "t", "a\n\n b ", "", "c => d", "e")[0] == Probe("p", "edit", "t")
    assert read_form("p", "t", "a\n\n b ", "", "c => d", "e")[1:] == (
        Probe("a", "equivalent", "t"),
        Probe("b", "equivalent", "t"),
        Probe("c", "unrelated", "d"),
        Probe("e", "other", "t"),
    )
    assert read_form("", "", "", "", "", "") == ()
