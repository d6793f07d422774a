"""The generalisation map: how far an edit reaches, as a figure and as a list of what went wrong."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from workbench.errors import EditError
from workbench.probes import KINDS
from workbench.report import TOLERANCE, Column, ProbeReport, ProbeResult
from workbench.style import KIND_COLORS, TEMPLATE, plain, wrapped
from workbench.tables import KINDS as NAMES
from workbench.tables import marked, percent

LEGEND = (
    "Each point is a prompt. Further right, it is closer in meaning to the edit's; further up, the "
    "edit has moved more of the next tokens' probability (half the L1 distance, 0 to 1). Warm "
    "colours should change and belong in the upper zone; blue ones should stay and belong at the "
    "foot. A cross marks what went wrong; its number is that of the list, worst first."
)
SORTS: dict[Column, str] = {
    "score": "worst first",
    "change": "change",
    "closeness": "closeness",
    "kind": "kind",
    "prompt": "prompt",
}
_COLUMNS = ("Prompt", "Before", "After", "p(answer)", "Change", "Closeness", "Score")
_SHARES = {
    "edit_success": "of the edits made",
    "generalisation": "of the equivalents follow",
    "portability": "of what follows carries over",
    "locality": "of the others kept",
}


def reach_map(report: ProbeReport) -> go.Figure:
    """Every probe as a point: closeness to the edit against how much the model changed.

    Args:
        report: Of one edit or several, from `Workbench.probe`.

    Raises:
        EditError: It has no probe.
    """
    if not report.rows:
        raise EditError("The report has no probe to show: probe an edit with Workbench.probe.")
    numbers = {id(row): str(n) for n, row in enumerate(report.wrong(), 1)}
    figure = go.Figure().update_layout(template=TEMPLATE)
    _zone(figure, 0.5, 1.04, "edit", "what should change belongs up here")
    _zone(figure, -0.04, TOLERANCE, "neighbor", "what should stay belongs down here")
    for kind in KINDS:
        rows = [row for row in report.rows if row.kind == kind]
        if rows:
            color = KIND_COLORS[kind]
            figure.add_scatter(
                x=[row.closeness for row in rows],
                y=[row.change for row in rows],
                name=NAMES[kind][0].lower(),
                mode="markers+text",
                text=[numbers.get(id(row), "") for row in rows],
                textposition="top center",
                textfont={"size": 10, "color": color},
                hovertext=[_hover(row) for row in rows],
                marker={
                    "color": color,
                    "size": [9 if row.right else 10 for row in rows],
                    "symbol": ["circle" if row.right else "x" for row in rows],
                    "opacity": 0.85,
                    "line": {"color": "rgba(128,128,128,0.6)", "width": 1},
                },
            )
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        name="went wrong",
        marker={"color": KIND_COLORS["other"], "symbol": "x", "size": 10},
    )
    ticks = [0, 0.25, 0.5, 0.75, 1]
    figure.update_xaxes(title="closeness to the edit (cosine)", range=[-0.04, 1.04], tickvals=ticks)
    figure.update_yaxes(
        title="change (total variation)", range=[-0.04, 1.1], tickvals=[TOLERANCE, *ticks]
    )
    # Of the container: hung to the plot, it slips into it where a narrow figure grows wide.
    legend = {"y": 1, "yanchor": "top", "yref": "container"}
    return figure.update_layout(height=480, legend=legend)


def _zone(figure: go.Figure, low: float, high: float, kind: str, said: str) -> None:
    """Where points of one sort should lie, faintly, with the words for it."""
    color = KIND_COLORS[kind]
    figure.add_shape(
        type="rect",
        xref="x domain",
        x0=0,
        x1=1,
        y0=low,
        y1=high,
        fillcolor=color,
        opacity=0.09,
        line_width=0,
        layer="below",
    )
    figure.add_annotation(
        text=said,
        xref="x domain",
        x=0.99,
        y=low,
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
        font={"size": 11, "color": color},
    )


def _hover(row: ProbeResult) -> str:
    lines = [f"<b>{row.verdict}</b> · {row.kind}", wrapped(row.prompt)]
    lines += [wrapped(f"{'should say' if row.should_change else 'said'} “{row.target}”")]
    for name, p, text in (
        ("before", row.base_probability, row.base_text),
        ("after", row.edited_probability, row.edited_text),
    ):
        lines += [f"{name}: p = {p:.6g}" if p is not None else name, wrapped(f"“{text}”")]
    lines += [f"change {row.change:.6g}, closeness {row.closeness:.6g}, score {row.score:.6g}"]
    return "<br>".join([*lines, plain(row.made), wrapped(f"edit: {row.edit}")])


def reach_list(report: ProbeReport, by: Column = "score", *, buttons: bool = False) -> str:
    """What went wrong as HTML, in the order of a column, under a line of scores.

    Args:
        report: Of one edit or several.
        by: The column; numbers other than the score from the highest down.
        buttons: With buttons to sort by, `data-sort` in each, for a page whose script hears them.
    """
    numbers = {id(row): n for n, row in enumerate(report.wrong(), 1)}
    wrong = report.wrong(by, descending=by in ("change", "closeness"))
    counts = "".join(
        f'<span class="{"good" if mean.value == 1 else "bad"}">{round(mean.value * mean.n)} of '
        f"{mean.n} {_SHARES[name]}</span>"
        for name, mean in report.scores().items()
    )
    note = f'<span class="note">closeness by {escape(report.encoder)}</span>'
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    several = len({row.edit for row in report.rows}) > 1
    body = "".join(_row(numbers[id(row)], row, several) for row in wrong)
    sorts = "".join(
        f'<button type="button" data-sort="{column}" aria-pressed="{str(column == by).lower()}">'
        f"{said}</button>"
        for column, said in SORTS.items()
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    sorting = f'<div class="sorts">Sort by {sorts}</div>' if buttons and wrong else ""
    nothing = '<p class="legend">Every probe came out as it should.</p>'
    return (
        f'<div class="comparison reach"><div class="counts" role="status">{counts}{note}</div>'
        f"{sorting}{table if wrong else nothing}</div>"
    )


def _row(number: int, row: ProbeResult, several: bool) -> str:
    before, after = marked(row.base_text, row.edited_text)
    edit = f"<small>{escape(row.edit)}</small><br>" if several else ""
    chance = f"{percent(row.base_probability)} → {percent(row.edited_probability)}"
    cells = (
        f'<b>{number}</b> · {escape(row.prompt)}<span class="verdict bad">✗ {row.verdict}</span>'
        f"{edit}<small>{escape(row.made)}</small>",
        before,
        after,
        f"<q>{escape(row.target or '–')}</q> {chance}",
        f"{row.change:.2f}",
        f"{row.closeness:.2f}",
        f"{row.score:.2f}",
    )
    body = "".join(
        f'<td data-column="{name}"><div>{cell}</div></td>'
        for name, cell in zip(_COLUMNS, cells, strict=True)
    )
    data = {
        "score": f"{row.score:.9f}",
        "change": f"{-row.change:.9f}",
        "closeness": f"{-row.closeness:.9f}",
        "kind": str(KINDS.index(row.kind)),
        "prompt": row.prompt,
    }
    keys = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return f'<tr style="--kind: {KIND_COLORS[row.kind]}"{keys}>{body}</tr>'
