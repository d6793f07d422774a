"""Figures: their numbers are the results' own, their texts are shown as they are."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from families import language_model
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import plots, style
from workbench.editors import Editor, EditRequest, FineTune, FineTuneConfig, Mend, MendConfig
from workbench.editors.proposals import gradient_factors
from workbench.errors import EditError
from workbench.probes import KINDS
from workbench.results import (
    Comparison,
    EditTrace,
    LayerTrace,
    PromptComparison,
    overlap_of,
    trace_of,
)
from workbench.updates import LayerUpdate, Update

torch.set_num_threads(1)

REQUESTS = (EditRequest("abba <b>", "xy"), EditRequest("no no", "z"))
FACTORS: tuple[plots.Factor, ...] = ("activation", "delta", "pseudoactivation", "pseudodelta")


def traced(editor: Editor, requests: tuple[EditRequest, ...]) -> EditTrace:
    return trace_of(editor.lm, requests, editor.propose(requests))


@cache
def mend_trace(requests: tuple[EditRequest, ...] = REQUESTS) -> EditTrace:
    """Of an untrained editor over a tiny model: its last three blocks, three matrices each."""
    torch.manual_seed(0)
    mend = Mend(language_model("llama"), MendConfig(rank=4))
    with torch.no_grad():
        mend.transform(gradient_factors(mend.lm, mend.layers, requests)[1], gather=True)
    return traced(mend, requests)


@cache
def finetune_trace() -> EditTrace:
    return traced(FineTune(language_model("llama"), FineTuneConfig(max_steps=2)), REQUESTS[:1])


def with_tokens(tokens: tuple[str, ...], predicts: tuple[str, ...] | None = None) -> EditTrace:
    """A trace whose numbers are the places 1, 2, ...; two layers of one block, no pseudofactors."""
    numbers = tuple(float(t + 1) for t in range(len(tokens)))
    layer = LayerTrace(
        name="h.0.mlp.up",
        stack="decoder",
        block=0,
        matrix="up",
        activation_norms=numbers,
        delta_norms=numbers,
        pseudoactivation_norms=None,
        pseudodelta_norms=None,
        activation_cosines=None,
        delta_cosines=None,
        update_norm=2.0,
        weight_norm=4.0,
        spectrum=(1.5, 0.5),
        edit_lr=None,
    )
    layers = (layer, replace(layer, name="h.0.mlp.down", matrix="down"))
    return EditTrace(REQUESTS[:1], tokens, predicts or ("",) * len(tokens), layers)


def compared(prompt: str = "p", kind: str = "edit", target: str | None = "t") -> PromptComparison:
    return PromptComparison(prompt, kind, "old\ntext", "new", target, 0.25, 0.75, divergence=0.125)


def sent(figure: go.Figure) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout as the browser gets them; no NaN or infinity, which JSON does not have."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the figure's JSON")

    found = json.loads(figure.to_json() or "", parse_constant=refuse)
    return found["data"], found["layout"]


def random_update(rank: int, seed: int) -> Update:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return Update({"layer": LayerUpdate(draw(rank, 5), draw(rank, 4), -0.5)})


def factor_of(heat: dict[str, Any]) -> str:
    return heat["colorbar"]["title"]["text"].split()[0]


def drawn(text: str) -> str:
    """What plotly's own rules for labels leave of a text: known tags go, entities are decoded."""
    tag = r"</?(?:br|b|i|em|u|s|sub|sup|span|a)(?:\s[^<>]*)?>"
    return html.unescape(re.sub(tag, "", text, flags=re.IGNORECASE))


def all_figures(trace: EditTrace) -> list[go.Figure]:
    return [
        plots.factor_heatmap(trace, "activation"),
        plots.factor_heatmap(trace, "delta"),
        plots.factor_panels(trace),
        plots.update_magnitudes(trace),
        plots.update_magnitudes(trace, relative=True),
        plots.spectra(trace),
    ]


@pytest.mark.parametrize("factor", FACTORS)
def test_heat_map_shows_every_norm_of_every_layer(factor):
    trace = mend_trace()
    [heat], _ = sent(plots.factor_heatmap(trace, factor))
    assert len(heat["z"]) == len(heat["y"]) == len(trace.layers) == 9
    for layer, row, hovers in zip(trace.layers, heat["z"], heat["hovertext"], strict=True):
        norms = getattr(layer, f"{factor}_norms")
        assert row == [math.log10(n) if n else None for n in norms]
        for norm, hover in zip(norms, hovers, strict=True):
            assert f"= {norm:.6g}" in hover
            assert layer.name in hover


@pytest.mark.parametrize("factor", FACTORS)
def test_hover_tells_the_cosine_with_the_raw_factor_after_the_editor_only(factor):
    trace = mend_trace()
    [heat], _ = sent(plots.factor_heatmap(trace, factor))
    cosines = getattr(trace.layers[0], factor.removeprefix("pseudo") + "_cosines")
    for cosine, hover in zip(cosines, heat["hovertext"][0], strict=True):
        assert (f"{cosine:.4f}" in hover) == ("cosine" in hover) == factor.startswith("pseudo")


def test_colour_bar_names_the_factor_and_spans_its_norms():
    trace = mend_trace()
    [heat], _ = sent(plots.factor_heatmap(trace, "pseudodelta"))
    bar = heat["colorbar"]
    norms = [n for layer in trace.layers for n in layer.pseudodelta_norms or () if n]
    assert "pseudodelta" in bar["title"]["text"]
    assert "log" in bar["title"]["text"]
    assert bar["tickvals"][0] == math.log10(min(norms))
    assert bar["tickvals"][-1] == math.log10(max(norms))
    assert float(bar["ticktext"][-1]) == pytest.approx(max(norms), rel=0.05)


def test_zero_norms_stay_blank_and_are_explained():
    trace = with_tokens(("a", "b"))
    layers = tuple(replace(layer, delta_norms=(0.0, 3.0)) for layer in trace.layers)
    [heat], layout = sent(plots.factor_heatmap(replace(trace, layers=layers), "delta"))
    assert [row[0] for row in heat["z"]] == [None, None]
    assert "= 0" in heat["hovertext"][0][0]
    assert "blank" in layout["xaxis"]["title"]["text"]
    _, layout = sent(plots.factor_heatmap(trace, "delta"))
    assert "blank" not in layout["xaxis"]["title"]["text"]


def test_panels_hold_the_four_factors_before_and_after():
    trace = mend_trace()
    heats, _ = sent(plots.factor_panels(trace))
    assert {factor_of(heat): (heat["xaxis"], heat["yaxis"]) for heat in heats} == {
        "activation": ("x", "y"),
        "pseudoactivation": ("x2", "y"),
        "delta": ("x", "y2"),
        "pseudodelta": ("x2", "y2"),
    }
    singles = {f: sent(plots.factor_heatmap(trace, f))[0][0]["z"] for f in FACTORS}
    assert {factor_of(heat): heat["z"] for heat in heats} == singles


def test_an_edit_without_pseudofactors_has_two_panels_and_says_why_not_more():
    trace = finetune_trace()
    heats, _ = sent(plots.factor_panels(trace))
    assert [factor_of(heat) for heat in heats] == ["activation", "delta"]
    with pytest.raises(EditError, match=r"no factor 'pseudodelta': .* transform factors"):
        plots.factor_heatmap(trace, "pseudodelta")


def test_repeated_tokens_keep_their_own_columns():
    trace = with_tokens((" the", " the", "the", " ", "\n", ""))
    [heat], layout = sent(plots.factor_heatmap(trace, "delta"))
    assert len(set(heat["x"])) == 6
    assert layout["xaxis"]["type"] == "category"
    labels = [layout["xaxis"]["labelalias"][position] for position in heat["x"]]
    assert labels == ["the", "the", "the", "␣", "↵", "∅"]


def test_positions_that_predict_are_marked_and_told():
    [heat], layout = sent(plots.factor_heatmap(with_tokens(("a", "b"), ("", " c")), "delta"))
    assert list(layout["xaxis"]["labelalias"].values()) == ["a", "<b>b</b>"]
    first, second = heat["hovertext"][0]
    assert "predicts" not in first
    assert "predicts <b>␣c</b>" in second


def test_lines_part_the_requests_in_every_panel():
    _, layout = sent(plots.factor_panels(mend_trace()))
    read = len(REQUESTS[0].prompt) + len(" xy") - 1  # a token a character, all but the last
    assert {(line["xref"], line["yref"], line["x0"], line["x1"]) for line in layout["shapes"]} == {
        (x, f"{y} domain", read - 0.5, read - 0.5) for x in ("x", "x2") for y in ("y", "y2")
    }
    assert "shapes" not in sent(plots.factor_panels(mend_trace(REQUESTS[:1])))[1]


@pytest.mark.parametrize(
    ("requests", "predicts", "said"),
    [
        (1, ("", " c", "", " c"), "next round"),
        (2, ("", " c", "", " c"), "next request"),
        (2, ("", " c", "", " c", "", " c"), "next request or round"),
    ],
)
def test_lines_part_the_rounds_of_an_edit(requests: int, predicts: tuple[str, ...], said: str):
    trace = replace(with_tokens(("a",) * len(predicts), predicts), requests=REQUESTS[:requests])
    _, layout = sent(plots.factor_heatmap(trace, "delta"))
    assert [line["x0"] for line in layout["shapes"]] == [1.5, 3.5][: len(predicts) // 2 - 1]
    assert layout["xaxis"]["title"]["text"].endswith(f"white line: {said}")


def test_layers_of_one_name_keep_their_own_rows():
    layer = with_tokens(("a",)).layers[0]
    names = ("encoder.1.attn.proj", "encoder.1.mlp.proj", "decoder.1.mlp.proj", "decoder.2.x.proj")
    layers = tuple(
        replace(layer, name=name, stack=name.split(".")[0], block=int(name.split(".")[1]))
        for name in names
    )
    trace = replace(with_tokens(("a",)), layers=layers)
    labels = ["encoder 1 attn.proj", "encoder 1 mlp.proj", "decoder 1 proj", "decoder 2 proj"]
    [heat], _ = sent(plots.factor_heatmap(trace, "activation"))
    assert heat["y"] == labels
    lines, _ = sent(plots.spectra(trace))
    assert [line["name"] for line in lines] == labels


def test_a_decoder_beside_an_encoder_is_not_told_by_the_prompts_tokens():
    trace = with_tokens(("word", "other"))
    below, above = trace.layers
    above = replace(above, delta_norms=(1.0,))
    layers = (replace(below, stack="encoder"), above)
    trace = replace(trace, layers=layers, answers=("answer",))
    [heat], _ = sent(plots.factor_heatmap(trace, "delta"))
    assert "<b>word</b>" in heat["hovertext"][0][0]
    [hover] = heat["hovertext"][1]
    assert "decoder position 1" in hover
    assert "predicts <b>answer</b>" in hover
    assert "word" not in hover


def test_overlaps_are_cosines_of_dense_updates_told_with_their_titles():
    updates = {"first": random_update(2, seed=0), "$x$ <b>": random_update(3, seed=1)}
    flat = [torch.cat([d.flatten() for d in u.dense().values()]) for u in updates.values()]
    overlap = overlap_of(updates)
    [heat], _ = sent(plots.overlaps(overlap))
    for i, row in enumerate(overlap.cosines):
        for j, cosine in enumerate(row):
            expected = torch.cosine_similarity(flat[i], flat[j], dim=0).item()
            assert cosine == pytest.approx(expected, abs=1e-6)
            assert f"cosine {cosine:.6g}" in heat["hovertext"][i][j]
    assert heat["x"] == heat["y"] == ["first", "&#36;x&#36; &lt;b&gt;"]
    with pytest.raises(EditError, match="no edits to compare"):
        plots.overlaps(overlap_of({}))


@pytest.mark.parametrize("relative", [False, True])
def test_bars_are_the_updates_norms(relative):
    trace = mend_trace()
    bars, layout = sent(plots.update_magnitudes(trace, relative=relative))
    shown = {
        (bar["name"], x): (y, hover)
        for bar in bars
        for x, y, hover in zip(bar["x"], bar["y"], bar["hovertext"], strict=True)
    }
    assert len(shown) == len(trace.layers)
    for layer in trace.layers:
        value, hover = shown[layer.matrix, str(layer.block)]
        assert value == (layer.relative_norm if relative else layer.update_norm)
        for number in (layer.update_norm, layer.weight_norm, layer.relative_norm, layer.edit_lr):
            assert f"= {number:.6g}" in hover
    assert layout["xaxis"]["categoryarray"] == ["1", "2", "3"]


def test_a_layers_gate_is_told_where_it_has_one():
    trace = with_tokens(("a",))
    gated = replace(trace, layers=tuple(replace(layer, gate=0.25) for layer in trace.layers))
    for shown, told in ((trace, False), (gated, True)):
        bars, _ = sent(plots.update_magnitudes(shown))
        assert all(("beyond 0.250 of a match" in bar["hovertext"][0]) == told for bar in bars)


def test_spectra_are_the_updates_singular_values():
    trace = mend_trace()
    lines, layout = sent(plots.spectra(trace))
    assert [tuple(line["y"]) for line in lines] == [layer.spectrum for layer in trace.layers]
    assert all(line["x"] == list(range(1, len(line["y"]) + 1)) for line in lines)
    assert layout["yaxis"]["type"] == "log"
    styles = {(line["line"]["color"], line["line"]["dash"]) for line in lines}
    assert len(styles) == len(trace.layers)


def test_an_update_of_nothing_has_figures():
    nothing = {"spectrum": (), "update_norm": 0.0, "weight_norm": 0.0, "delta_norms": (0.0,)}
    trace = with_tokens(("a",))
    layers = tuple(replace(layer, **nothing) for layer in trace.layers)
    figures = all_figures(replace(trace, layers=layers))
    bars, _ = sent(figures[3])
    assert [bar["y"] for bar in bars] == [[0.0], [0.0]]
    for figure in figures:
        sent(figure)


def test_probabilities_are_the_comparisons_in_its_order():
    kinds = ["neighbor", "edit", "neighbor", "made-up"]
    rows = [
        replace(compared(f"prompt {i}", kind), base_probability=i / 10, edited_probability=i / 20)
        for i, kind in enumerate(kinds)
    ]
    parts, layout = sent(plots.target_probabilities(Comparison((*rows, compared(target=None)))))
    points = [part for part in parts if part["mode"] == "markers"]
    shown = {
        (part["marker"]["symbol"], y): (x, part["marker"]["color"])
        for part in points
        for x, y in zip(part["x"], part["y"], strict=True)
    }
    for place, row in enumerate(rows):
        color = style.KIND_COLORS.get(row.kind, style.KIND_COLORS["other"])
        assert shown["circle-open", place] == (row.base_probability, color)
        assert shown["circle", place] == (row.edited_probability, color)
    labels = {note["y"]: note["text"] for note in layout["annotations"]}
    assert labels == {i: f"prompt {i} → t" for i in range(4)}
    assert sorted(part["name"] for part in parts if part["showlegend"]) == sorted(set(kinds))
    assert "1 without a target" in layout["xaxis"]["title"]["text"]


def test_hover_tells_texts_probabilities_and_divergence():
    parts, _ = sent(plots.target_probabilities(Comparison((compared("2 < 3"),))))
    [hover] = parts[-1]["hovertext"]
    for part in ("2 &lt; 3 → t", "p = 0.25", "“old↵text”", "p = 0.75", "“new”", "0.125 nats"):
        assert part in hover


@pytest.mark.parametrize("rows", [(), (compared(target=None),)])
def test_probabilities_of_no_target_say_what_to_do(rows):
    with pytest.raises(EditError, match=rf"None of the {len(rows)} prompts.*target="):
        plots.target_probabilities(Comparison(rows))


@pytest.mark.parametrize("make", [mend_trace, finetune_trace])
def test_figures_share_a_style_that_fits_any_page(make):
    figures = [*all_figures(make()), plots.target_probabilities(Comparison((compared(),)))]
    for figure in figures:
        _, layout = sent(figure)
        assert layout["template"]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
        assert layout["height"] > 100
        assert "width" not in layout


def test_every_kind_and_matrix_has_its_own_colour():
    assert set(style.KIND_COLORS) == set(KINDS)
    assert len(set(style.KIND_COLORS.values())) == len(KINDS)
    assert len(set(style.MATRIX_COLORS)) == len(style.MATRIX_COLORS)


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#0b0f19"])
def test_text_can_be_read_on_light_and_dark_pages(page):
    low, high = sorted((luminance(page), luminance(style.TEXT_COLOR)))
    assert (high + 0.05) / (low + 0.05) > 4


@pytest.mark.parametrize("text", ["<s>", "<b>x</b>", "& &amp; &lt;", "$x^2$", "%{y}", "2 < 3 > 1"])
def test_markup_is_shown_as_text(text):
    [heat], layout = sent(plots.factor_heatmap(with_tokens((text,), (text,)), "delta"))
    label = layout["xaxis"]["labelalias"]["0"]
    assert drawn(label) == text
    assert "$" not in label
    assert f"predicts {text.replace(' ', '␣')}" in drawn(heat["hovertext"][0][0])
    parts, layout = sent(plots.target_probabilities(Comparison((compared(text, text, text),))))
    assert drawn(layout["annotations"][0]["text"]) == f"{text} → {text}"
    assert f"{text}{text} → {text}" in drawn(parts[-1]["hovertext"][0])
    assert drawn(parts[-1]["name"]) == text


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text(), st.lists(st.text(), min_size=1, max_size=5))
def test_any_unicode_can_be_shown(prompt, target, tokens):
    trace = with_tokens(tuple(tokens), tuple(tokens))
    [heat], layout = sent(plots.factor_heatmap(trace, "activation"))
    texts = [*layout["xaxis"]["labelalias"].values(), *heat["hovertext"][0]]
    assert len(texts) == 2 * len(tokens)
    rows = (compared(prompt, prompt, target),)
    parts, layout = sent(plots.target_probabilities(Comparison(rows)))
    texts += [layout["annotations"][0]["text"], parts[-1]["name"], *parts[-1]["hovertext"]]
    for text in texts:
        without = re.sub("<br>|</?b>", "", text)
        assert not set(without) & set("<>$")
        assert all(c.isprintable() or c in "\u3000\u200c\u200d" for c in without)


letters = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1)


@settings(deadline=None)
@given(letters, letters)
def test_labels_stay_on_one_short_line(prompt, target):
    rows = (compared(prompt * 60, target=target * 20),)
    _, layout = sent(plots.target_probabilities(Comparison(rows)))
    label = drawn(layout["annotations"][0]["text"])
    assert len(label) <= len(" → ") + 44
    assert label[0] == prompt[0]
    assert label[-1] == target[-1]


def logged(count: int, look_every: int = 4) -> list[dict[str, Any]]:
    """Records as a trainer logs them: the edit loss is the step, the others its parts."""
    found: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        losses = {"edit": step, "edit_before": step * 2, "locality": step / 8, "total": step}
        losses |= {"success": step / count}
        found.append({"step": step, "gradient_norm": 1.0, **losses})
        if step % look_every == 0:
            found.append({"step": step, "validation": {k: v / 2 for k, v in losses.items()}})
    return found


MEASURES = ("edit_before", "edit", "locality", "success")


def lines_and_looks(records: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    traces, _ = sent(plots.training_curves(records))
    return tuple(
        [t for t in traces if ("marker" in t and t["mode"] == "markers") == looks]
        for looks in (False, True)
    )  # type: ignore[return-value]


def test_training_curves_are_the_logs_own_numbers():
    records = logged(9)
    steps = [record for record in records if "total" in record]
    lines, looks = lines_and_looks(records)
    for trace, measure in zip(lines, MEASURES, strict=True):
        assert trace["x"] == [step["step"] for step in steps]
        assert trace["y"] == [step[measure] for step in steps]
    for trace, measure in zip(looks, MEASURES[1:], strict=True):
        assert trace["x"] == [4, 8]
        assert trace["y"] == [4 / 2 * steps[0][measure], 8 / 2 * steps[0][measure]]
    panels = {trace["yaxis"] for trace in lines}
    assert panels == {"y", "y2", "y3"}
    assert lines[0]["yaxis"] == lines[1]["yaxis"] != lines[2]["yaxis"]


def test_long_training_is_drawn_by_means_of_steps():
    (_, edit, *_), looks = lines_and_looks(logged(1000, look_every=500))
    assert len(edit["x"]) == 100
    assert edit["x"][:2] == [10, 20]
    assert edit["y"][:2] == [5.5, 15.5]
    assert "step 11 to 20" in edit["hovertext"][1]
    assert looks[0]["x"] == [500, 1000]


def test_training_without_validation_has_curves_and_without_steps_none():
    lines, looks = lines_and_looks(logged(3))
    assert (len(lines), looks) == (4, [])
    with pytest.raises(EditError, match="no training step"):
        plots.training_curves([])
