"""Learning scopes: by which texts an editor knows that they are about an edit's subject."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_uppercase, digits

import pytest
import torch
from families import language_model

from workbench import open_model
from workbench.__main__ import main
from workbench.data import EditExample, Statement
from workbench.editors import EditRequest, FineTune, Mend, MendConfig, TrainableEditor
from workbench.errors import EditorError, WorkbenchError
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.recipes.tables import Runner
from workbench.training import LearnedScope, learn_scope, with_scope

NAMES = [*ascii_uppercase, *digits]  # a token each: what a random model tells apart
PLACES = ["up", "on", "in", "at", "off", "out", "far", "near", "here", "home", "back", "gone"]


def about(name: str, other: str, place: str) -> EditExample:
    return EditExample(
        prompt=f"where is {name} now",
        target="up",
        subject=name,
        relation="place",
        paraphrases=(f"so {name} is {place}", f"they say that {name}"),
        neighbors=(Statement(prompt=f"where is {other} {place}", answer="on"),),
        unrelated=(Statement(prompt=f"it is {place}", answer="on"),),
    )


EXAMPLES = [
    about(name, other, PLACES[place % len(PLACES)])
    for place, (name, other) in enumerate(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


def editor_for(lm: LanguageModel, scope: int = 32) -> Mend:
    torch.manual_seed(0)
    return Mend(lm, MendConfig(rank=4, blocks=[2, 3], scope=scope, edit_lr=0.1, normalize=False))


@pytest.fixture(scope="module")
def learned(lm: LanguageModel) -> tuple[Mend, LearnedScope]:
    editor = editor_for(lm)
    return editor, learn_scope(editor, EXAMPLES, steps=300)


def test_texts_about_a_subject_match_and_others_mostly_do_not(
    learned: tuple[Mend, LearnedScope],
) -> None:
    _, found = learned
    assert found.examples == len(EXAMPLES)
    assert found.held_out == -(-len(EXAMPLES) // 10)
    assert found.matched > 0.9
    assert found.matched_elsewhere < 0.2


def test_what_is_learned_repeats_by_seed_and_is_the_metric_alone(lm: LanguageModel) -> None:
    before = {name: value.clone() for name, value in editor_for(lm).state_dict().items()}
    metrics = []
    for seed in (0, 0, 1):
        editor = editor_for(lm)
        learn_scope(editor, EXAMPLES, steps=3, seed=seed)
        after = editor.state_dict()
        assert [n for n in before if not torch.equal(before[n], after[n])] == ["scope_metric"]
        metrics.append(after["scope_metric"])
    assert torch.equal(metrics[0], metrics[1])
    assert not torch.equal(metrics[0], metrics[2])


def test_an_edit_acts_in_texts_about_its_subject_alone(
    lm: LanguageModel, learned: tuple[Mend, LearnedScope]
) -> None:
    editor, _ = learned
    example = EXAMPLES[7]
    request = EditRequest(example.prompt, example.target, example.subject)
    update = editor.propose([request]).update

    def moved(text: str) -> bool:
        inputs = lm.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            before = lm.model(**inputs).logits
            with overlay(lm.model, update):
                return not torch.equal(lm.model(**inputs).logits, before)

    assert all(moved(text) for text in (example.prompt, *example.paraphrases))
    others = [other.prompt for other in EXAMPLES if other is not example]
    assert sum(map(moved, others)) < len(others) / 5


def test_an_editor_is_given_a_scope_or_another(lm: LanguageModel) -> None:
    bare = editor_for(lm, 0)
    first = with_scope(bare, scope=8, scope_share=0.4, scope_relation=3)
    second = with_scope(first, scope=4, scope_share=0.6)
    assert (second.config.scope, second.config.scope_share) == (4, 0.6)
    assert (first.config.scope_relation, second.config.scope_relation) == (3, 0)
    learned = second.state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in bare.state_dict().items())


def test_what_has_no_scope_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(EditorError, match="no scope whose metric"):
        learn_scope(editor_for(lm, 0), EXAMPLES)
    with pytest.raises(EditorError, match="got a 'ft' editor"):
        with_scope(FineTune.from_settings(lm, {}), scope=8)
    with pytest.raises(EditorError, match="at least 1; got 0"):
        with_scope(editor_for(lm, 0), scope=0)
    with pytest.raises(EditorError, match="a classifier model"):
        with_scope(Mend(language_model("bert"), MendConfig(rank=4)), scope=8)


def test_examples_that_do_not_tell_their_subject_are_refused(lm: LanguageModel) -> None:
    untold = [EditExample(prompt="where is it", target="up", paraphrases=("is it",))] * 9
    first = EditExample(prompt="B is", target="up", subject="B", paraphrases=("so B is",))
    with pytest.raises(EditorError, match="2 of 12 examples can be used"):
        learn_scope(editor_for(lm), [*untold, first, *EXAMPLES[:2]])
    with pytest.raises(EditorError, match="steps must be at least 1"):
        learn_scope(editor_for(lm), EXAMPLES, steps=0)


def test_the_command_writes_a_scope_and_its_figures_into_the_card(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(tiny_model, device="cpu", progress=False)
    editor = editor_for(model, 0)
    editor.card = {"steps": 3, "evaluation": {"figures": {"edit_success": 1.0}}}
    editor.save_pretrained(tmp_path / "editor")
    data = tmp_path / "zsre.jsonl"
    records = [
        {"subject": name, "question": f"where is {name} now", "rephrases": [f"find {name} in"]}
        | {"alt": "up", "pred": "on", "answers": ["on"], "loc": "who is it", "loc_answer": "me"}
        | {"split": "train", "id": name}
        for name in NAMES
    ]
    data.write_text("\n".join(map(json.dumps, records)))
    command = ["scope", "--model", tiny_model, "--data", f"zsre:{data}", "--steps", "2"]
    command += ["--rank", "4", "--share", "0.4", "--examples", "30", "--out", str(tmp_path / "out")]
    assert main([*command, "--editor", str(tmp_path / "editor")]) == 2
    assert "0 of 30 examples can be used" in capsys.readouterr().err  # they ask one thing alone
    command += ["--relation-rank", "0"]
    assert main([*command, "--editor", str(tmp_path / "editor")]) == 0
    assert "matched_elsewhere" in capsys.readouterr().out
    scoped = TrainableEditor.from_pretrained(tmp_path / "out", model)
    assert (scoped.settings()["scope"], scoped.settings()["scope_share"]) == (4, 0.4)
    assert scoped.card.keys() == {"steps", "scope"}
    found = scoped.card["scope"]
    given = {key: found[key] for key in ("data", "split", "examples", "steps", "seed", "held_out")}
    assert given == {
        **{"data": ["zsre:zsre.jsonl"], "split": "train", "examples": 30},
        **{"steps": 2, "seed": 0, "held_out": 3},
    }
    learned = scoped.state_dict()
    assert learned["scope_metric"].abs().sum() > 0
    assert all(torch.equal(value, learned[name]) for name, value in editor.state_dict().items())
    assert main([*command, "--editor", "ft"]) == 2
    assert "Of the editors MEND's have a scope" in capsys.readouterr().err


def test_the_edit_command_takes_a_subject_and_says_where_it_acts(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = editor_for(open_model(tiny_model, device="cpu"), 0)
    scoped = with_scope(bare, scope=8, scope_share=0.4, scope_relation=3)
    scoped.save_pretrained(tmp_path)
    command = ["edit", "ab cd", "ef", "--model", tiny_model, "--editor", str(tmp_path)]
    for given, said in (([], "anything (no subject"), (["--subject", "ab"], "ab)")):
        assert main([*command, "--max-new-tokens", "1", *given]) == 0
        assert f"acts in texts about {said}" in capsys.readouterr().out


def test_a_recipe_ends_with_its_scope(tiny_model: str, tmp_path: Path) -> None:
    model = f"--model {tiny_model}"
    train = f"{model} --data facts --limit 9 --rank 4 --steps 2 --batch 2 --validation 2"
    recipes = {
        "editors": {
            "first": f"{train} --health-after 0",
            "packed": f"pack --editor {{work}}/first {model}",
        },
        "scopes": {"first": f"{model} --data facts --examples 20 --rank 4 --steps 2"},
    }
    runner = Runner(recipes, tmp_path, tmp_path / "out", tmp_path, None)
    folder = Path(runner.editor("@packed"))
    about = json.loads((folder / "editor.json").read_text())
    assert about["settings"]["scope"] == 4
    assert about["card"]["scope"]["data"] == ["facts"]
    assert runner.editor("@packed") == str(folder)
    recipes["scopes"]["first"] += " --seed 1"
    with pytest.raises(WorkbenchError, match="other arguments than the recipe's"):
        runner.editor("@first")


ASKED = {"place": ("where is {} now", "tell me where {} is now"), "role": ("who is {} by job",) * 2}
QUESTIONS = [
    EditExample(
        prompt=wordings[0].format(name),
        target="up",
        subject=name,
        relation=relation,
        paraphrases=(wordings[1].format(name),),
    )
    for name in NAMES
    for relation, wordings in ASKED.items()
]


@pytest.fixture(scope="module")
def asking(lm: LanguageModel) -> tuple[Mend, LearnedScope]:
    editor = editor_for(lm).changed(scope_relation=32)
    return editor, learn_scope(editor, QUESTIONS, steps=150)


def test_texts_that_ask_the_same_match_and_others_less(asking: tuple[Mend, LearnedScope]) -> None:
    _, found = asking
    assert len(QUESTIONS) / 2 < found.asked <= len(QUESTIONS)  # some draw no other question
    assert found.asked_same > 0.95
    assert found.asked_elsewhere < 0.7  # some end in the same words, whatever they ask


def test_an_edit_acts_where_its_own_question_is_asked(
    lm: LanguageModel, asking: tuple[Mend, LearnedScope]
) -> None:
    editor, _ = asking
    followed = left = 0
    for example in QUESTIONS[:20]:
        request = EditRequest(example.prompt, example.target, example.subject)
        update = editor.propose([request]).update
        for relation, wordings in ASKED.items():
            text = wordings[-1].format(example.subject)
            inputs = lm.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                before = lm.model(**inputs).logits[:, -1]
                with overlay(lm.model, update):
                    same = torch.equal(lm.model(**inputs).logits[:, -1], before)
            followed += relation == example.relation and not same
            left += relation != example.relation and same
    assert followed > 18
    assert left > 15
