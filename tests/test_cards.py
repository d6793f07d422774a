"""Model cards say what is known, and show what comes from outside as text."""

from __future__ import annotations

import json
from typing import Any

import yaml
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from workbench.cards import model_card
from workbench.editors import SHIPPED, shipped_editor

ABOUT: dict[str, Any] = {
    "editor": "mend",
    "settings": {"rank": 4},
    "layers": ["model.layers.3.mlp.up_proj"],
    "base_model": "some/model",
    "base_fingerprint": "float32:0123456789abcdef",
    "card": {},
}
FIGURES = {
    "edit_success": 0.96,
    "unrelated_kept": 1,
    "seconds_per_edit": 0.2,
    "confidence_95": {"edit_success": 0.04},
    "n": 50,
    "weights": "f5fae6092d6a599e",
    "seconds": 21.0,
    "device": "cpu",
}


def about(**card: Any) -> dict[str, Any]:
    return ABOUT | {"card": card}


def parts(card: str) -> tuple[dict[str, Any], BeautifulSoup]:
    """The front matter, and the text as a page shows it."""
    _, front, text = card.split("---\n", 2)
    html = MarkdownIt("commonmark").enable("table").render(text)
    return yaml.safe_load(front), BeautifulSoup(html, "html.parser")


def test_a_card_says_what_is_known_and_nothing_else() -> None:
    front, page = parts(model_card(ABOUT, NAME))
    assert front == {
        "library_name": "model-editing-workbench",
        "base_model": "some/model",
        "tags": ["model-editing", "mend"],
    }
    said = page.get_text()
    assert "Its card does not say." in said
    assert "It comes without figures." in said
    assert "chat" not in said
    assert 'Workbench.open("some/model", editor="owner/name")' in said


def test_figures_stand_in_the_front_matter_and_in_the_table() -> None:
    settings = {"data": "zsre:some/questions", "split": "dev", "at_once": 1}
    evaluation = {"settings": settings, "figures": FIGURES}
    front, page = parts(model_card(about(evaluation=evaluation), NAME))
    (result,) = front["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "edit_success": 0.96,
        "unrelated_kept": 1,
    }
    assert front["metrics"] == ["edit_success", "unrelated_kept"]
    assert (result["dataset"]["type"], result["dataset"]["split"]) == ("some/questions", "dev")
    rows = [[cell.get_text() for cell in row("td")] for row in page("table")[-1]("tr")[1:]]
    assert rows == [["edit_success", "0.96", "0.04"], ["unrelated_kept", "1", ""]]
    assert "edits 50" in page.get_text()


def test_data_sets_are_linked_by_their_ids_alone() -> None:
    data = ["counterfact:some/facts", "zsre:questions.jsonl.gz", "facts", "fever:some/facts"]
    front, page = parts(model_card(about(data=data, chat=True, steps=20), NAME))
    assert front["datasets"] == ["some/facts"]
    said = page.get_text()
    assert all(spec in said for spec in data)
    assert "It was trained on turns of a chat" in said
    assert "chat=True" in said
    front, _ = parts(model_card(ABOUT | {"base_model": "tiny-llama"}, NAME))
    assert "base_model" not in front


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        *("<script>x</script>", "[a](http://x)", "![](x)", "---", "x\n---\ny: z"),
        *("`a` | b", "``", "|", "a\\|b"),
    ]
)
NAME = "owner/name"


@given(text=TEXTS, other=TEXTS)
def test_no_text_from_outside_is_markup(text: str, other: str) -> None:
    hostile = ABOUT | {"base_model": text, "layers": [text], "base_fingerprint": other}
    hostile["card"] = {
        "data": [text, other],
        text: other,
        "evaluation": {
            "settings": {"data": text, "split": other},
            "figures": {text: 0.5, "confidence_95": {text: other}},
        },
    }
    card = model_card(hostile, NAME)
    front, page = parts(card)
    rows = [
        row.count("|") for row in card.partition("## Limits")[0].splitlines() if row[:2] == "| "
    ]
    assert set(rows) <= {3, 4}  # each ends a cell
    assert set(front) <= {
        *("library_name", "base_model", "datasets", "tags", "metrics", "model-index")
    }
    known = {
        "h1",
        "h2",
        "p",
        "pre",
        "code",
        "ul",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert {tag.name for tag in page.find_all()} <= known
    listed = page.find_all("code")[-1].get_text()
    seen = "".join(sign if sign.isprintable() else " " for sign in text)
    assert listed == (" ".join(seen.split()) or "?")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | TEXTS,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["figures", "settings", "data", "confidence_95"]), inner
            )
        ),
        max_leaves=8,
    )
)
def test_any_card_is_shown(value: Any) -> None:
    for key in ("evaluation", "data", "chat", "start", "steps"):
        parts(model_card(about(**{key: value}), NAME))


def test_the_editors_that_come_along_have_cards_with_their_figures() -> None:
    for name in SHIPPED:
        text = (shipped_editor(name) / "editor.json").read_text("utf-8")
        front, page = parts(model_card(json.loads(text), NAME))
        measured = front["model-index"][0]["results"][0]["metrics"]
        assert {"edit_success", "neighborhood_kept"} <= {each["type"] for each in measured}
        assert "counterfact" in page.get_text()
