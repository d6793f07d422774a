"""What all figures share: the palette, the look, and how a text is written on them."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from unicodedata import east_asian_width

import plotly.graph_objects as go

from workbench.probes import KINDS

# The palette of Okabe and Ito, which colour-blind readers tell apart. Kinds: warm where an edit
# should act, cool where it should not.
_OF_KINDS = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#8A8A8A")
KIND_COLORS: dict[str, str] = dict(zip(KINDS, _OF_KINDS, strict=True))
MATRIX_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
TEXT_COLOR = "#767676"  # as legible on white as on near-black

_CLEAR, _FAINT = "rgba(0,0,0,0)", "rgba(128,128,128,0.25)"
_AXIS = {"automargin": True, "zeroline": False, "gridcolor": _FAINT, "title": {"standoff": 6}}
_FONT = {"family": "system-ui, sans-serif", "size": 12, "color": TEXT_COLOR}
_SCALE = {"orientation": "h", "xanchor": "left", "yanchor": "bottom", "thickness": 8, "ypad": 4}
_HOVER = {"hoverinfo": "text"}
_HEAT = _HOVER | {"colorscale": "Viridis", "colorbar": _SCALE, "xgap": 1, "ygap": 1}
TEMPLATE = go.layout.Template(
    data={"heatmap": [_HEAT], "bar": [_HOVER], "scatter": [_HOVER | {"cliponaxis": False}]},
    layout={
        "font": _FONT,
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "margin": {"l": 8, "r": 20, "t": 8, "b": 8},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "showlegend": True,
        # Of the container: hung to the plot, it slips into it where a narrow figure grows wide.
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "top", "yref": "container"},
        "hoverlabel": {"align": "left", "bgcolor": "#222", "font": _FONT | {"color": "#F5F5F5"}},
        "modebar": {"color": TEXT_COLOR},
        "dragmode": False,  # a finger on the figure scrolls the page
    },
)

_SIGNS = {"\n": "↵", "\t": "⇥"} | {c: c for c in "\u3000\u200c\u200d"}


def styled(keys: Iterable[str], styles: Sequence[str]) -> dict[str, str]:
    """A style for each different key, in order, round again where there are too few."""
    return dict(zip(dict.fromkeys(keys), cycle(styles), strict=False))


def _visible(text: str) -> str:
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)


def plain(text: str) -> str:
    """A text as plotly shows it unchanged: plotly reads HTML, and TeX between dollars."""
    return html.escape(_visible(text), quote=False).replace("$", "&#36;")


def cut(text: str, width: int) -> str:
    """At most `width` columns of a text, its middle left out."""
    width //= 1 + any(east_asian_width(c) in "WF" for c in text)
    head = width // 3
    return text if len(text) <= width else f"{text[:head]}…{text[head + 1 - width :]}"


def wrapped(text: str) -> str:
    """A text in a few short lines, as plotly shows it."""
    lines = textwrap.wrap(_visible(text), 44, max_lines=8, placeholder=" …")
    return "<br>".join(map(plain, lines))
