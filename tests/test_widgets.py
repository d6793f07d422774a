"""Widgets without a browser: they show what the figures show, and follow one workbench."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import ipywidgets
import plotly.graph_objects as go
import pytest
from families import FAMILIES, tiny_tokenizer

from workbench import (
    FineTune,
    FineTuneConfig,
    LanguageModel,
    Mend,
    MendConfig,
    Workbench,
    plots,
    tables,
)
from workbench.corpus import EXAMPLES
from workbench.probes import suggest
from workbench.reach import reach_map
from workbench.widgets import EditPanel, FactorHeatmap, HistoryPanel, ProbeMap, UpdateMagnitudes

PAIR = ("The capital of France is", "Lyon")
OTHER = ("Bees make", "wax")


@pytest.fixture(scope="module")
def shared() -> Workbench:
    longer = {"max_position_embeddings": 512}
    lm = LanguageModel.wrap(partial(FAMILIES["llama"], **longer)(), tiny_tokenizer())
    return Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[1], max_steps=2)))


@pytest.fixture
def wb(shared: Workbench) -> Iterator[Workbench]:
    yield shared.fork()
    ipywidgets.Widget.close_all()


def as_json(figure: go.Figure | go.FigureWidget) -> dict:
    """A figure's traces and layout; a widget's traces have identifiers too."""
    found = json.loads(str(figure.to_json()))
    for trace in found["data"]:
        trace.pop("uid", None)
    return found


def drawn(panel: FactorHeatmap | UpdateMagnitudes | ProbeMap) -> dict:
    content = panel.children[2]
    assert isinstance(content, go.FigureWidget)
    return as_json(content)


def test_figures_are_those_of_plots(wb: Workbench) -> None:
    edit = wb.edit(*PAIR)
    trace = wb.inspect(edit)
    assert drawn(FactorHeatmap(wb)) == as_json(plots.factor_panels(trace))
    assert drawn(FactorHeatmap(wb, "delta")) == as_json(plots.factor_heatmap(trace, "delta"))
    assert drawn(UpdateMagnitudes(wb)) == as_json(plots.update_magnitudes(trace))
    assert drawn(UpdateMagnitudes(wb, relative=True)) == as_json(
        plots.update_magnitudes(trace, relative=True)
    )
    assert drawn(ProbeMap(wb)) == as_json(reach_map(wb.probe(edit)))


def test_an_edit_in_one_panel_shows_in_the_others(wb: Workbench) -> None:
    panel, history = EditPanel(wb), HistoryPanel(wb)
    heatmap, sizes, probes = FactorHeatmap(wb), UpdateMagnitudes(wb), ProbeMap(wb)
    assert all("No edit" in figure.children[2].value for figure in (heatmap, sizes, probes))
    assert "No edits" in history.rows.children[0].value
    panel.prompt.value, panel.target.value = PAIR
    panel.edit_button.click()
    first = wb.edits[0]
    assert first.requests[0].prompt == PAIR[0]
    assert [row.children[0].description for row in history.rows.children] == [f"1 · {first.title}"]
    assert panel.table.value.endswith(
        tables.comparison_table(wb.compare(suggest(*PAIR)))  # what is compared is what is listed
    )
    second = wb.edit(*OTHER)
    for figure in (heatmap, sizes, probes):
        assert figure.choice.value == second.id
        assert len(figure.choice.options) == 2
    assert drawn(heatmap) == as_json(plots.factor_panels(wb.inspect(second)))
    heatmap.choice.value = first.id
    assert drawn(heatmap) == as_json(plots.factor_panels(wb.inspect(first)))
    assert sizes.choice.value == second.id


def test_the_history_acts_on_the_model_and_the_table_follows(wb: Workbench) -> None:
    panel, history, probes = EditPanel(wb), HistoryPanel(wb), ProbeMap(wb)
    panel.prompt.value, panel.target.value = PAIR
    panel.edit_button.click()
    made, moved = panel.table.value, drawn(probes)
    switch, strength, _ = history.rows.children[0].children
    switch.value = False
    assert [entry.enabled for entry in wb.history] == [False]
    off = panel.table.value
    assert off != made
    assert drawn(probes) != moved
    history.undo.click()
    assert [entry.enabled for entry in wb.history] == [True]
    assert (panel.table.value, drawn(probes)) == (made, moved)
    switch, strength, _ = history.rows.children[0].children
    strength.value = 0.5
    assert wb.history[0].strength == 0.5
    remove = history.rows.children[0].children[2]
    remove.click()
    assert wb.history == ()
    assert panel.table.value == off
    assert "No edit" in probes.children[2].value
    history.undo.click()
    assert wb.history[0].strength == 0.5
    history.reset.click()
    assert wb.history == ()
    history.undo.click()
    history.redo.click()
    assert history.redo.disabled


def test_bad_input_is_answered_and_changes_nothing(wb: Workbench) -> None:
    panel = EditPanel(wb)
    panel.prompt.value = "<b>bold</b>"
    panel.edit_button.click()
    assert "target is empty" in panel.children[3].value
    assert panel.prompt.value == "<b>bold</b>"
    assert wb.history == ()
    assert panel.edit_button.description == "Edit"
    assert not panel.edit_button.disabled
    panel.target.value = "Lyon"
    panel.edit_button.click()
    assert panel.children[3].value == ""
    assert "<b>bold</b>" not in panel.table.value
    assert "&lt;b&gt;bold" in panel.table.value


def test_an_example_fills_the_form_and_own_prompts_stay(wb: Workbench) -> None:
    panel = EditPanel(wb)
    panel.lists["other"].value = "My own prompt"
    panel.examples.value = 0
    assert (panel.prompt.value, panel.target.value) == (EXAMPLES[0].prompt, EXAMPLES[0].target)
    assert len(panel.lists["equivalent"].value.splitlines()) == 2
    assert panel.lists["other"].value == "My own prompt"
    panel.compare_button.click()
    assert "My own prompt" in panel.table.value
    assert wb.history == ()


def test_a_figure_that_an_edit_lacks_is_said_not_raised(wb: Workbench) -> None:
    heatmap = FactorHeatmap(wb, "pseudodelta")
    wb.edit(*PAIR)
    assert "pseudodelta" in heatmap.children[1].value
    mend = Mend(wb.lm, MendConfig(rank=2, normalize=False))
    bench = Workbench(wb.lm, mend)
    heatmap = FactorHeatmap(bench, "pseudodelta")
    bench.edit(*PAIR)
    assert heatmap.children[1].value == ""
    assert len(drawn(heatmap)["data"]) == 1


def test_a_closed_panel_follows_no_more(wb: Workbench) -> None:
    history = HistoryPanel(wb)
    history.close()
    wb.edit(*PAIR)
    assert "No edits" in history.rows.children[0].value


def test_viewers_without_widgets_have_something_to_show(wb: Workbench) -> None:
    view = "application/vnd.jupyter.widget-view+json"
    wb.edit(*PAIR)
    heatmap = FactorHeatmap(wb)._repr_mimebundle_()
    assert view in heatmap
    assert heatmap["application/vnd.plotly.v1+json"]["data"][0]["type"] == "heatmap"
    history = HistoryPanel(wb)._repr_mimebundle_()
    assert view in history
    assert PAIR[0] in history["text/html"]
    assert "text/html" in EditPanel(wb)._repr_mimebundle_()
