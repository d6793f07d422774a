"""Figures of an edit: its factors, its updates, what became of the answers; they know no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.basedatatypes import BaseFigure

from workbench.errors import EditError, FigureError
from workbench.files import write_bytes, write_text
from workbench.results import Comparison, EditTrace, LayerTrace, Overlap, PromptComparison
from workbench.style import KIND_COLORS, MATRIX_COLORS, TEMPLATE, cut, plain, styled, wrapped

Factor = Literal["activation", "delta", "pseudoactivation", "pseudodelta"]

_SYMBOLS = {"activation": "‖u‖", "delta": "‖δ‖", "pseudoactivation": "‖ũ‖", "pseudodelta": "‖δ̃‖"}
# A training run's measures: panel, title, colour, dash.
_CURVES = {
    "edit_before": (1, "edit loss before the edit", "#8A8A8A", "dot"),
    "edit": (1, "edit loss after it", "#D55E00", "solid"),
    "locality": (2, "locality loss", "#0072B2", "solid"),
    "success": (3, "edit success", "#009E73", "solid"),
}
_DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")
_PICTURES = (".png", ".svg", ".pdf")
_WIDTH = 900  # pixels, of a picture
_ROW, _BAR, _FOOT = 20, 76, 90  # pixels: one layer, the scale above a panel, the tokens below


def factor_heatmap(trace: EditTrace, factor: Factor) -> go.Figure:
    """One factor's norm for each layer and token, colours on a log scale; zeros stay blank.

    Args:
        trace: Of an edit.
        factor: "activation", "delta", or the editor's "pseudoactivation", "pseudodelta".

    Raises:
        EditError: The edit has no such factor.
    """
    return _heatmaps(trace, [factor], 1)


def factor_panels(trace: EditTrace) -> go.Figure:
    """Heat maps of both factors, before the editor (left) and after it (right, if it has any)."""
    if any(layer.pseudodelta_norms is None for layer in trace.layers):
        return _heatmaps(trace, ["activation", "delta"], 1)
    return _heatmaps(trace, ["activation", "pseudoactivation", "delta", "pseudodelta"], 2)


def update_magnitudes(trace: EditTrace, *, relative: bool = False) -> go.Figure:
    """Frobenius norm of every layer's update, by block and matrix.

    Args:
        trace: Of an edit.
        relative: As a share of the layer's weight norm.
    """
    names = _layer_names(trace)
    blocks = list(dict.fromkeys(block for block, _ in names))
    figure = go.Figure()
    for matrix, color in styled((matrix for _, matrix in names), MATRIX_COLORS).items():
        chosen = {names[i][0]: la for i, la in enumerate(trace.layers) if names[i][1] == matrix}
        norms = [la.relative_norm if relative else la.update_norm for la in chosen.values()]
        hovers = [_layer_hover(layer) for layer in chosen.values()]
        figure.add_bar(x=list(chosen), y=norms, name=matrix, marker_color=color, hovertext=hovers)
    figure.update_xaxes(title="block", type="category", categoryarray=blocks)
    figure.update_yaxes(title="‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖ (Frobenius norm)")
    return figure.update_layout(template=TEMPLATE, height=320)


def spectra(trace: EditTrace) -> go.Figure:
    """Singular values of every layer's update: how many directions an edit uses, how strongly."""
    names = _layer_names(trace)
    longest = max(len(layer.spectrum) for layer in trace.layers)
    dashes = styled((block for block, _ in names), _DASHES)
    colors = styled((matrix for _, matrix in names), MATRIX_COLORS)
    figure = go.Figure()
    for (block, matrix), layer in zip(names, trace.layers, strict=True):
        figure.add_scatter(
            x=list(range(1, len(layer.spectrum) + 1)),
            y=list(layer.spectrum),
            name=f"{block} {matrix}",
            mode="lines+markers" if longest < 24 else "lines",
            line={"color": colors[matrix], "dash": dashes[block], "width": 1.5},
            hovertemplate=f"{layer.name}<br>singular value %{{x}}: %{{y:.6g}}<extra></extra>",
        )
    figure.update_xaxes(title="singular value, largest first", dtick=1 if longest < 12 else None)
    figure.update_yaxes(title="size (log scale)", type="log", tickformat="~g", nticks=6)
    return figure.update_layout(template=TEMPLATE, height=320 + 7 * len(names))


def overlaps(overlap: Overlap) -> go.Figure:
    """Cosine of every two live edits' updates: 0 where they write in unrelated directions.

    Args:
        overlap: From `Workbench.overlap`.

    Raises:
        EditError: There is no edit.
    """
    if not overlap.titles:
        raise EditError("There are no edits to compare: make one, or better two.")
    names = [plain(cut(title, 28)) for title in overlap.titles]
    hovers = [
        [
            f"{wrapped(a)}<br>{wrapped(b)}<br>cosine {cosine:.6g}"
            for b, cosine in zip(overlap.titles, row, strict=True)
        ]
        for a, row in zip(overlap.titles, overlap.cosines, strict=True)
    ]
    heading = {"text": "cosine of the updates", "side": "top", "font_size": 11}
    figure = go.Figure().update_layout(template=TEMPLATE)
    figure.add_heatmap(
        z=overlap.cosines,
        x=names,
        y=names,
        zmin=-1,
        zmax=1,
        colorscale="RdBu",
        hovertext=hovers,
        text=[[f"{cosine:.2f}" for cosine in row] for row in overlap.cosines],
        texttemplate="%{text}",
        colorbar={"title": heading, "x": 0, "y": 1, "tickvals": [-1, 0, 1]},
    )
    figure.update_xaxes(type="category", showgrid=False, tickangle=-30)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure.update_layout(height=_BAR + _FOOT + 60 + 40 * len(names))


def target_probabilities(comparison: Comparison) -> go.Figure:
    """Each prompt's probability of its target, before the edits (ring) and after them (disc).

    Args:
        comparison: Prompts without a target are left out, and the axis says how many.

    Raises:
        EditError: No prompt has a target.
    """
    rows = [row for row in comparison.rows if row.target is not None]
    if not rows:
        raise EditError(
            f"None of the {len(comparison.rows)} prompts has a target, so there is no probability "
            f"to show. Compare with target=..., or give probes that bring one."
        )
    figure = go.Figure()
    for kind in dict.fromkeys(row.kind for row in rows):
        _dumbbells(figure, kind, {y: row for y, row in enumerate(rows) if row.kind == kind})
    title = "probability of the target: ○ before, ● after"
    if left_out := len(comparison.rows) - len(rows):
        title += f"<br>({left_out} without a target left out)"
    figure.update_xaxes(title=title, range=[-0.02, 1.02], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(visible=False, range=[len(rows) - 0.5, -0.8])
    for y, row in enumerate(rows):
        target = cut(row.target or "", 14)
        text = plain(f"{cut(row.prompt, 44 - len(target))} → {target}")
        figure.add_annotation(x=0, y=y, text=text, xanchor="left", yshift=15, showarrow=False)
    return figure.update_layout(template=TEMPLATE, height=110 + 44 * len(rows))


def training_curves(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Losses and success of a training run, step by step: lines; diamonds are validation.

    Args:
        records: Of the run's log.jsonl: steps with their losses, and looks at the validation
            edits. A long run's points are means over several steps.

    Raises:
        EditError: No step is among them.
    """
    steps = [record for record in records if "total" in record]
    looks = [record["validation"] | record for record in records if "validation" in record]
    if not steps:
        raise EditError("There is no training step to show yet: the curves begin with the first.")
    size = math.ceil(len(steps) / 100)
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    figure = go.Figure().update_layout(template=TEMPLATE, grid={"rows": 3, "columns": 1})
    for name, (row, title, color, dash) in _CURVES.items():
        style = {"yaxis": f"y{row}", "legendgroup": name}
        means = [sum(step[name] for step in part) / len(part) for part in bins]
        spans = [" to ".join(dict.fromkeys(str(p["step"]) for p in (b[0], b[-1]))) for b in bins]
        figure.add_scatter(
            x=[part[-1]["step"] for part in bins],
            y=means,
            name=title,
            mode="lines+markers" if len(bins) < 24 else "lines",
            line={"color": color, "dash": dash, "width": 1.5},
            hovertext=[f"step {s}<br>{name} = {m:.6g}" for s, m in zip(spans, means, strict=True)],
            **style,
        )
        if looks and name != "edit_before":
            figure.add_scatter(
                x=[look["step"] for look in looks],
                y=[look[name] for look in looks],
                name=title,
                mode="markers",
                marker={"color": color, "size": 10, "symbol": "diamond"},
                hovertext=[f"step {k['step']}<br>validation {name} = {k[name]:.6g}" for k in looks],
                showlegend=False,
                **style,
            )
    titles = ("edit loss (nats)", "locality loss (nats)", "edit success")
    axes: dict[str, dict[str, Any]]
    axes = {f"yaxis{n}": {"title": t, "rangemode": "tozero"} for n, t in enumerate(titles, 1)}
    axes["yaxis3"] |= {"range": [-0.02, 1.02], "tickformat": ".0%"}
    title = "step" + " (◆ on the validation edits)" * bool(looks)
    figure.update_xaxes(title=title, anchor="y3", dtick=1 if len(steps) < 12 else None)
    return figure.update_layout(axes, height=520)


def save(figure: BaseFigure, path: str | Path, *, scale: float = 2.0) -> Path:
    """Write a figure: .html, interactive and whole without a network; or .png, .svg, .pdf.

    Args:
        figure: Of this module or of a widget; pictures have a transparent ground.
        path: Its ending says which. Pictures need the extra 'png' (kaleido) and Chrome or Chromium.
        scale: Of a .png: 2 gives two dots for each of the figure's pixels.

    Raises:
        FigureError: The ending is another, or pictures cannot be drawn here.
        FileError: The file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".html":
        write_text(path, figure.to_html(include_plotlyjs=True))
        return path
    if kind not in _PICTURES:
        raise FigureError(
            f"A figure cannot be written as {path.name!r}: let the name end in .html, "
            f"{', '.join(_PICTURES)}."
        )
    if not find_spec("kaleido"):
        raise FigureError(
            f"{path.name} needs the package kaleido (pip install kaleido) and Chrome or Chromium. "
            f"Without them write .html; its camera button makes a PNG in the browser."
        )
    kaleido, layout = import_module("kaleido"), figure["layout"]
    options = {"format": kind[1:], "scale": scale, "height": layout["height"]}
    options["width"] = layout["width"] or _WIDTH
    try:  # as it is: mathematics would be asked for on the web
        drawn = kaleido.calc_fig_sync(figure, options, kopts={"mathjax": False})
    except Exception as error:  # of a browser that is not there, or will not start
        raise FigureError(
            f"{path.name} cannot be drawn: {error!r}. It takes Chrome or Chromium, on the PATH or "
            f"named in $BROWSER_PATH; or write .html."
        ) from error
    write_bytes(path, drawn)
    return path


def _heatmaps(trace: EditTrace, factors: Sequence[Factor], columns: int) -> go.Figure:
    """Panels in reading order over shared axes: tokens, and layers with the lowest at the foot."""
    rows, panel = len(factors) // columns, _ROW * len(trace.layers)
    xgap, ygap = 0.05, _BAR / (panel + _BAR)
    grid = {"rows": rows, "columns": columns, "xgap": xgap, "ygap": ygap, "pattern": "coupled"}
    # Positions are the categories, words their aliases: a repeated word keeps its own column, and
    # plotly leaves out labels that find no room.
    longest = max(len(trace.tokens), len(trace.answers))
    tokens = [str(place) for place in range(longest)]
    words = [plain(cut(text.lstrip(" ") or "␣" * len(text) or "∅", 14)) for text in trace.tokens]
    bold = [f"<b>{w}</b>" if p else w for w, p in zip(words, trace.predicts, strict=True)]
    layers = [" ".join(name) for name in _layer_names(trace)]
    heats = [_heat(trace, factor) for factor in factors]
    ends = _request_ends(trace)
    figure = go.Figure().update_layout(template=TEMPLATE, grid=grid)
    for place, heat in enumerate(heats):
        row, column = divmod(place, columns)
        left, top = column / (columns - xgap), 1 - row / (rows - ygap)
        heat["colorbar"] |= {"x": left, "y": top, "len": (1 - xgap) / (columns - xgap)}
        xaxis, yaxis = ("x", "x2")[column], ("y", "y2")[row]
        figure.add_heatmap(x=tokens, y=layers, xaxis=xaxis, yaxis=yaxis, **heat)
        for end in ends:
            line = {"x0": end, "x1": end, "y0": 0, "y1": 1, "line": {"color": "#FFF", "width": 3}}
            figure.add_shape(type="line", xref=xaxis, yref=f"{yaxis} domain", **line)
    axis = {"type": "category", "showgrid": False}
    upright = {"tickangle": -90, "labelalias": dict(zip(tokens, bold, strict=True))}
    figure.update_layout({f"xaxis{n + 1}": axis | upright for n in range(columns)})
    figure.update_layout({f"yaxis{n + 1}": axis for n in range(rows)})
    title = "token" + " (bold: predicts the target)" * any(trace.predicts)
    if ends:
        alone, told = len(trace.requests) == 1, len(ends) == len(trace.requests) - 1
        after = "round" if alone else "request" if told else "request or round"
        title += f"<br>white line: next {after}"
    title += "<br>blank: no gradient" * any(None in row for heat in heats for row in heat["z"])
    return figure.update_layout(xaxis_title=title, height=rows * (panel + _BAR) + _FOOT)


def _heat(trace: EditTrace, factor: Factor) -> dict[str, Any]:
    """A heat map's values and texts, and its colour bar, which is its title too."""
    norms = [getattr(layer, f"{factor}_norms", None) for layer in trace.layers]
    if None in norms:
        raise EditError(
            f"This edit has no factor {factor!r}: all have 'activation' and 'delta', those of "
            f"editors that transform factors, as MEND, 'pseudoactivation' and 'pseudodelta' too."
        )
    logs = [[math.log10(n) if 0 < n < math.inf else None for n in row or ()] for row in norms]
    known = [value for row in logs for value in row if value is not None] or [0.0]
    ticks = sorted({min(known), (min(known) + max(known)) / 2, max(known)})
    side = "after" if factor.startswith("pseudo") else "before"
    title = f"{factor} {_SYMBOLS[factor]}<br>{side} (log scale)"
    shown = [f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in (10**tick for tick in ticks)]
    heading = {"text": title, "side": "top", "font_size": 11}
    colorbar = {"title": heading, "tickvals": ticks, "ticktext": shown}
    hovers = [_cell_hovers(trace, layer, factor) for layer in trace.layers]
    return {"z": logs, "hovertext": hovers, "colorbar": colorbar}


def _cell_hovers(trace: EditTrace, layer: LayerTrace, factor: Factor) -> list[str]:
    raw = factor.removeprefix("pseudo")
    cosines = getattr(layer, f"{raw}_cosines") if raw != factor else None
    # A decoder that reads an encoder has positions of its own, not the prompt's tokens.
    own = layer.stack == "decoder" and bool(trace.answers)
    tokens, predicts = ((), trace.answers) if own else (trace.tokens, trace.predicts)
    norms, found = getattr(layer, f"{factor}_norms"), []
    for i, norm in enumerate(norms):
        lines = [f"{layer.stack} position {i + 1}"]
        if not own:
            lines = [f"token {i + 1}: <b>{plain(tokens[i].replace(' ', '␣') or '∅')}</b>"]
        if predicts[i]:
            lines += [f"predicts <b>{plain(predicts[i].replace(' ', '␣'))}</b>"]
        lines += [layer.name, f"{_SYMBOLS[factor]} = {norm:.6g}"]
        lines += [f"cosine with the raw {raw}: {cosines[i]:.4f}"] if cosines else []
        found.append("<br>".join(lines))
    return found


def _request_ends(trace: EditTrace) -> list[float]:
    """Borders between the tokens of requests and of rounds; none where the trace does not tell
    all requests apart."""
    pairs = zip(trace.predicts, trace.predicts[1:], strict=False)
    ends = [place + 0.5 for place, (a, b) in enumerate(pairs) if a and not b]
    return ends if len(ends) >= len(trace.requests) - 1 else []


def _dumbbells(figure: go.Figure, kind: str, rows: dict[int, PromptComparison]) -> None:
    """One kind's prompts, each at its height: a line from a ring to a disc."""
    color = KIND_COLORS.get(kind, KIND_COLORS["other"])
    before = [row.base_probability for row in rows.values()]
    after = [row.edited_probability for row in rows.values()]
    xs = [x for pair in zip(before, after, strict=True) for x in (*pair, None)]
    ys = [y for height in rows for y in (height, height, None)]
    line = {"color": color, "width": 3}
    between = {"x": xs, "y": ys, "mode": "lines", "line": line, "opacity": 0.5, "hoverinfo": "skip"}
    hovers = [*map(_prompt_hover, rows.values())]
    points = {"y": list(rows), "mode": "markers", "hovertext": hovers}
    ring = points | {"x": before, "marker": {"color": color, "size": 14, "symbol": "circle-open"}}
    disc = points | {"x": after, "marker": {"color": color, "size": 9, "symbol": "circle"}}
    for part in (between, ring, disc):
        figure.add_scatter(**part, name=plain(kind), legendgroup=kind, showlegend=part is disc)


def _prompt_hover(row: PromptComparison) -> str:
    lines = [f"<b>{plain(row.kind)}</b>", wrapped(f"{row.prompt} → {row.target}")]
    for name, p, text in (
        ("before", row.base_probability, row.base_text),
        ("after", row.edited_probability, row.edited_text),
    ):
        lines += [f"{name}: p = {p:.6g}" if p is not None else name, wrapped(f"“{text}”")]
    return "<br>".join([*lines, f"KL(before ‖ after) of the next token: {row.divergence:.6g} nats"])


def _layer_hover(layer: LayerTrace) -> str:
    lines = [layer.name, f"‖ΔW‖ = {layer.update_norm:.6g}, ‖W‖ = {layer.weight_norm:.6g}"]
    lines += [f"‖ΔW‖ / ‖W‖ = {layer.relative_norm:.6g}, rank {len(layer.spectrum)}"]
    lines += [f"edit_lr α = {layer.edit_lr:.6g}"] if layer.edit_lr is not None else []
    lines += [f"gate: beyond {layer.gate:.3f} of a match"] if layer.gate is not None else []
    return "<br>".join(lines)


def _layer_names(trace: EditTrace) -> list[tuple[str, str]]:
    """Block and matrix of each layer, no two alike: with stack or more of the name where needed."""
    several = len({layer.stack for layer in trace.layers}) > 1
    blocks = [f"{la.stack} {la.block}" if several else str(la.block) for la in trace.layers]
    paths = [layer.name.split(".") for layer in trace.layers]
    found = []
    for block, path in zip(blocks, paths, strict=True):
        peers = [p for b, p in zip(blocks, paths, strict=True) if b == block]
        lengths = range(1, len(path) + 1)
        alone = next(n for n in lengths if sum(p[-n:] == path[-n:] for p in peers) == 1)
        found.append((block, ".".join(path[-alone:])))
    return found
