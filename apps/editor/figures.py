"""Figures on the page, each with a name to be saved by, and as files."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from gradio.components.plot import PlotData
from plotly.basedatatypes import BaseFigure

from apps.editor.sessions import Session, guarded
from workbench import EditError


def shown(session: Session, name: str, figure: BaseFigure | None) -> PlotData | None:
    """A figure as the page draws it; the session keeps it for `as_page`.

    Args:
        session: Whose page.
        name: Of the files that it is saved to, without an ending.
        figure: None: there is none to show.
    """
    if figure is None:
        session.figures.pop(name, None)
        return None
    session.figures[name] = figure
    picture = {"format": "png", "scale": 2, "filename": name}
    config = {"displaylogo": False, "toImageButtonOptions": picture}
    drawn = json.loads(str(figure.to_json())) | {"config": config}
    return PlotData(type="plotly", plot=json.dumps(drawn))


@guarded
def as_page(session: Session, names: str) -> str:
    """The figures in sight as one HTML page, whole without a network.

    Args:
        session: Whose.
        names: Theirs, one a line.

    Raises:
        EditError: None of them is there.
    """
    found = {name: session.figures[name] for name in names.splitlines() if name in session.figures}
    if not found:
        raise EditError("There is no figure to save here: make an edit, or start a training run.")
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=place == 0)
        for place, figure in enumerate(found.values())
    ]
    title = next(iter(found))
    path = session.folder("figures") / Path(f"{title}.html").name
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>{"".join(parts)}',
        encoding="utf-8",
    )
    return str(path)
