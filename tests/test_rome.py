"""ROME: its statistics, its closed form and where it looks, against references written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import language_model
from references import assert_exact, assert_near, logits_of
from torch import Tensor

from workbench import EditorError, EditRequest, LanguageModel
from workbench.corpus import SENTENCES
from workbench.editors import Rome, RomeConfig
from workbench.editors.rome import find_subject, input_moment
from workbench.views import LayerInputs

REQUESTS = [EditRequest("Who is Abba", "xy"), EditRequest("The sea at Ulm is", "q")]
QUICK = {"block": 1, "max_steps": 6, "texts": 12, "prefix_words": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Statistics are kept for this test only."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return tmp_path / "moments"


def read_by(lm: LanguageModel, layer, text: str) -> Tensor:
    """What a layer reads of a text, by a hook of our own, `(tokens, in)`."""
    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    logits_of(lm.model, {"input_ids": ids})
    handle.remove()
    return seen[0].reshape(ids.shape[1], -1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_covariance_is_that_of_the_layers_inputs(family: str, cache: Path):
    lm = language_model(family)
    editor = Rome(lm, RomeConfig(**QUICK))
    rows = torch.cat([read_by(lm, editor.layer, text[:32]) for text in SENTENCES[:12]])
    found = input_moment(LayerInputs(lm, editor.layer), 12, 0)
    assert_near(found, rows.mT @ rows / len(rows))
    [file] = cache.iterdir()
    made = file.stat().st_mtime_ns
    assert torch.equal(input_moment(LayerInputs(lm, editor.layer), 12, 0), found)
    assert file.stat().st_mtime_ns == made


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "gemma3", "qwen2_moe"])
def test_the_subjects_key_gets_the_value_and_least_else_moves(family: str):
    lm = language_model(family)
    editor = Rome(lm, RomeConfig(prefixes=0, **QUICK))
    update = editor.propose(REQUESTS[:1]).update[editor.layer.name]
    assert (update.rank, update.A.shape, update.B.shape) == (
        1, (1, editor.layer.in_features), (1, editor.layer.out_features))  # fmt: skip
    key = read_by(lm, editor.layer, REQUESTS[0].prompt)[-1]  # the subject ends the prompt
    assert_near(update.apply(key), update.B[0])

    moment = input_moment(LayerInputs(lm, editor.layer), 12, 0).double()
    moment += editor.config.ridge * moment.diagonal().median() * torch.eye(len(moment))
    solved = torch.linalg.inv(moment) @ key.double()
    dense = torch.outer(update.B[0].double(), solved) / (solved @ key.double())
    assert_near(update.dense().double(), dense)

    def moved(change: Tensor) -> float:
        return torch.trace(change @ moment @ change.T).item()

    for seed in range(3):  # no other change that does the same to the key moves less
        noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed)).double()
        noise -= torch.outer(noise @ key.double(), key.double()) / (key.double() @ key.double())
        assert_exact((dense + noise) @ key.double(), dense @ key.double())
        assert moved(dense + 0.01 * noise) > moved(dense)


def test_several_keys_get_each_its_own_value():
    lm = language_model("llama")
    editor = Rome(lm, RomeConfig(prefixes=2, **QUICK))
    alone = [editor.propose([request]).update[editor.layer.name] for request in REQUESTS]
    both = editor.propose(REQUESTS).update[editor.layer.name]
    ends = (len("Who is Abba"), len("The sea at Ulm"))
    for request, end, own in zip(REQUESTS, ends, alone, strict=True):
        key = read_by(lm, editor.layer, request.prompt)[end - 1]
        assert_near(both.apply(key), own.B[0])
        assert_near(own.apply(key), own.B[0])


def test_the_same_request_twice_is_the_request():
    editor = Rome(language_model("llama"), RomeConfig(prefixes=1, **QUICK))
    once, twice = (editor.propose(REQUESTS[:1] * n).update[editor.layer.name] for n in (1, 2))
    assert_near(twice.dense(), once.dense())


def test_the_value_goes_no_further_than_the_clamp():
    lm = language_model("llama")
    editor = Rome(lm, RomeConfig(prefixes=1, clamp=0.25, lr=1.0, **QUICK))
    update = editor.propose(REQUESTS[:1]).update[editor.layer.name]
    written = editor.layer.module(read_by(lm, editor.layer, REQUESTS[0].prompt)[-1])
    assert_near(update.B.norm(), 0.25 * written.norm())


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("The capital of New Zealand is", None, "New Zealand"),
        ("What does iPhone cost in Rome?", "iphone", "iPhone"),
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "Danielle Darrieux"),
        ("The language of Paris, Texas is", "Berlin", "Paris, Texas"),
        ("What is made at Ulm?", None, "Ulm"),
        ("Rome is in", None, "Rome"),
        ("the sky is", None, "is"),
        ("who saw it?", None, "it"),
        ("Élan is", "  ", "Élan"),
        ("???", None, "???"),
    ],
)
def test_the_subject_is_given_or_guessed(prompt: str, subject: str | None, found: str):
    assert find_subject(EditRequest(prompt, "x", subject)) == found


def test_the_subject_says_which_key():
    lm = language_model("llama")
    editor = Rome(lm, RomeConfig(prefixes=0, **QUICK))
    prompt = "Ann met Bo in"
    for subject in ("Ann", "Bo"):
        update = editor.propose([EditRequest(prompt, "q", subject)]).update[editor.layer.name]
        key = read_by(lm, editor.layer, prompt)[prompt.index(subject) + len(subject) - 1]
        assert_near(update.apply(key), update.B[0])


def test_a_model_without_a_down_projection_is_refused():
    with pytest.raises(EditorError, match=r"none of its own.*3-D"):
        Rome(language_model("mixtral"))
    with pytest.raises(EditorError, match="no block"):
        Rome(language_model("llama"), RomeConfig(block=9))


@pytest.mark.parametrize(
    "wrong", [{"max_steps": 0}, {"ridge": 0.0}, {"prefixes": -1}, {"texts": 0}, {"clamp": -1.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]):
    with pytest.raises(EditorError, match=next(iter(wrong))):
        RomeConfig(**wrong)  # type: ignore[arg-type]
