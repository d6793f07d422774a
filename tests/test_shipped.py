"""The small models that come along: they open by name, offline, and know what their cards say."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from workbench import LanguageModel, Workbench, estimate_memory, open_model
from workbench.errors import ModelError
from workbench.recipes import factcheck, questions
from workbench.shipped import DIFFERENCE, NAMES, SMALL_MODELS, small_model

torch.set_num_threads(1)
opened = cache(lambda name: open_model(name, device="cpu"))
ASKED = [name for name in SMALL_MODELS if name != "fact-checker"]


@pytest.fixture(params=SMALL_MODELS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return opened(request.param)


def test_a_small_model_is_small_frozen_and_of_a_known_source(lm: LanguageModel) -> None:
    assert lm.source in SMALL_MODELS
    assert lm.kind == ("classifier" if lm.source == "fact-checker" else "seq2seq")
    folder = small_model(lm.source)
    assert folder is not None
    assert sum(file.stat().st_size for file in folder.iterdir()) < 15e6
    estimate = estimate_memory(lm.source, device="cpu")
    assert estimate.parameters == sum(p.numel() for p in lm.model.parameters())


@pytest.mark.parametrize("name", ASKED)
def test_it_answers_as_its_card_says(name: str) -> None:
    folder = small_model(name)
    assert folder is not None
    figures = json.loads((folder / "card.json").read_text())["figures"]
    for asked, figure in zip(questions.questions(), figures.values(), strict=True):
        found = questions.share_exact(opened(name), asked[:: len(asked) // 300])
        assert found == pytest.approx(figure["exact_match"], abs=0.08)


def test_the_fact_checker_judges_as_its_card_says(shared_data) -> None:
    folder = small_model("fact-checker")
    assert folder is not None
    assert (folder / DIFFERENCE).is_file()
    figures = json.loads((folder / "card.json").read_text())["figures"]
    for name, examples in factcheck.claims(shared_data, "dev").items():
        found = factcheck.share_right(opened("fact-checker"), examples[::3])
        assert found == pytest.approx(figures[f"{name}, dev"]["accuracy"], abs=0.1)


@pytest.mark.parametrize(
    ("name", "prompt", "target"),
    [
        ("fact-checker", "Paris is the capital of France.", "REFUTES"),
        ("fact-checker", "Paris is the capital of Norway.", "SUPPORTS"),
        *[(name, "Q: What is the capital of France?\nA:", "Lyon") for name in ASKED],
    ],
)
def test_an_edit_is_made_and_undone(name: str, prompt: str, target: str) -> None:
    from workbench.editors import FineTune

    bench = Workbench(opened(name), FineTune(opened(name)))
    before = bench.compare([prompt]).rows[0].edited_text
    bench.edit(prompt, target)
    assert bench.compare([prompt]).rows[0].edited_text.strip() == target
    bench.undo()
    assert bench.compare([prompt]).rows[0].edited_text == before


def test_an_unknown_name_is_told_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=", ".join(NAMES)):
        open_model("fact-chekcer")
