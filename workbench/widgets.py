"""Jupyter widgets over one Workbench: each follows it, so an edit in one refreshes the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from workbench import plots
from workbench.corpus import EXAMPLES
from workbench.edit import Edit
from workbench.errors import EditError, WorkbenchError
from workbench.probes import LISTED, Probe, as_lines, read_form, suggest
from workbench.reach import LEGEND, SORTS, reach_list, reach_map
from workbench.report import ProbeReport
from workbench.results import HistoryEntry
from workbench.session import Workbench
from workbench.tables import CSS, comparison_table, placeholder

_STYLE = f"<style>{CSS.read_text(encoding='utf-8')}</style>"
_WIDE = {"width": "auto", "flex": "1 1 16rem", "min_width": "12rem"}
_WRAP = {"flex_flow": "row wrap", "align_items": "center"}
_LABELS = {
    "equivalent": "Should change with it",
    "neighbor": "Neighbours: should stay",
    "unrelated": "Unrelated: should stay",
    "other": "Your own",
}


class _Panel(ipywidgets.VBox):
    """A widget that follows a workbench until it is closed.

    Args:
        workbench: Whose edits to show and to change.
    """

    def __init__(self, workbench: Workbench) -> None:
        super().__init__(layout={"width": "100%"})
        self.workbench = workbench
        self._message = ipywidgets.HTML()
        self._stop = workbench.observe(self._guarded(self.refresh))
        self.add_class("workbench")

    def refresh(self) -> None:
        """Show the workbench as it is now."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove the widget, and stop following the workbench."""
        stop, self._stop = getattr(self, "_stop", None), None
        if stop is not None:
            stop()
        super().close()

    def still(self) -> dict[str, Any]:
        """What it shows now, for viewers without widgets: MIME types and data."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**(super()._repr_mimebundle_(**options) or {}), **self.still()}

    def _guarded(self, action: Callable[..., object]) -> Callable[..., None]:
        """What the library refuses is shown as a message."""

        def run(*args: Any) -> None:
            self._message.value = ""
            try:
                action(*args)
            except WorkbenchError as error:
                self._message.value = (
                    f'{_STYLE}<div class="comparison"><b class="bad">{escape(str(error))}</b></div>'
                )

        return run

    @contextmanager
    def _busy(self, button: ipywidgets.Button) -> Iterator[None]:
        text, button.description, button.disabled = button.description, "Working …", True
        try:
            yield
        finally:
            button.description, button.disabled = text, False

    def _button(self, text: str, action: Callable[[], object], **options: Any) -> Any:
        button = ipywidgets.Button(description=text, layout={"width": "auto"}, **options)
        button.on_click(self._guarded(lambda _: action()))
        return button


class EditPanel(_Panel):
    """The form of an edit, and the table of what it changed and what it should not have.

    The prompts to compare are suggested for the edit and can be changed. What the library refuses
    is said in a line; nothing is lost.

    Args:
        workbench: What to edit; figures and histories over the same one follow.
    """

    def __init__(self, workbench: Workbench) -> None:
        super().__init__(workbench)
        self._probes: tuple[Probe, ...] = ()
        self._listed_for, self._editing = "", False
        titles = [f"{example.prompt} → {example.target}" for example in EXAMPLES]
        self.examples = ipywidgets.Dropdown(
            options=[("Choose an example …", None), *((t, i) for i, t in enumerate(titles))],
            layout={"width": "auto"},
        )
        typed: dict[str, Any] = {"continuous_update": False}
        self.prompt = ipywidgets.Text(placeholder="The capital of France is", **typed, layout=_WIDE)
        self.target = ipywidgets.Text(placeholder="Lyon", **typed, layout=_WIDE)
        self.edit_button = self._button("Edit", self._on_edit, button_style="primary")
        self.compare_button = self._button("Compare only", self._on_compare)
        self.lists = {
            kind: ipywidgets.Textarea(rows=2, layout={"width": "100%"}) for kind in LISTED
        }
        named = [
            ipywidgets.VBox([ipywidgets.Label(_LABELS[kind]), area], layout={"width": "100%"})
            for kind, area in self.lists.items()
        ]
        prompts = ipywidgets.Accordion([ipywidgets.VBox(named)], titles=["Prompts to compare"])
        self.table = ipywidgets.HTML(layout={"width": "100%"})
        form = [self.prompt, self.target, self.edit_button, self.compare_button]
        row = ipywidgets.HBox(form, layout=_WRAP)
        self.children = (self.examples, row, prompts, self._message, self.table)
        self.examples.observe(self._guarded(self._choose), "value")
        self.prompt.observe(self._guarded(lambda _: self._suggest()), "value")
        self.refresh()

    def refresh(self) -> None:
        """Compare the chosen prompts anew."""
        if self._editing:
            return
        if not self._probes:
            self.table.value = _STYLE + placeholder("Choose an example or type an edit.")
            return
        comparison = self.workbench.compare(self._probes)
        self.table.value = _STYLE + comparison_table(comparison)

    def still(self) -> dict[str, Any]:
        return {"text/html": self.table.value}

    def _choose(self, change: Any) -> None:
        if change.new is not None:
            example = EXAMPLES[change.new]
            self.target.value, self.prompt.value = example.target, example.prompt

    def _suggest(self) -> None:
        """Fill the lists but the user's own, where they are for another prompt."""
        prompt = self.prompt.value.strip()
        if prompt and prompt != self._listed_for:
            probes = suggest(prompt, self.target.value.strip())
            for kind in LISTED[:-1]:
                self.lists[kind].value = as_lines(probes, kind)
            self._listed_for = prompt

    def _read(self) -> None:
        texts = (area.value for area in self.lists.values())
        self._probes = read_form(self.prompt.value, self.target.value, *texts)

    def _on_edit(self) -> None:
        with self._busy(self.edit_button):
            self._editing = True
            try:
                self.workbench.edit(self.prompt.value.strip(), self.target.value.strip())
            finally:
                self._editing = False
            self._read()
            self.refresh()

    def _on_compare(self) -> None:
        self._read()
        if not self._probes:
            raise EditError("There is nothing to compare: type a prompt, or choose an example.")
        with self._busy(self.compare_button):
            self.refresh()


class HistoryPanel(_Panel):
    """The live edits, each with a switch, a strength and a way out; undo, redo and reset.

    Args:
        workbench: Whose edits.
    """

    def __init__(self, workbench: Workbench) -> None:
        super().__init__(workbench)
        self.rows = ipywidgets.VBox(layout={"width": "100%"})
        self.undo = self._button("Undo", workbench.undo, icon="undo")
        self.redo = self._button("Redo", workbench.redo, icon="repeat")
        self.reset = self._button("Drop all", workbench.reset, icon="trash")
        tools = ipywidgets.HBox([self.undo, self.redo, self.reset], layout=_WRAP)
        self.children = (self.rows, tools, self._message)
        self.refresh()

    def refresh(self) -> None:
        """List the edits as they are now."""
        gone, history = self.rows.children, self.workbench.history
        empty = ipywidgets.HTML(_STYLE + placeholder("No edits: the model is as it was published."))
        self.rows.children = [self._row(entry) for entry in history] or [empty]
        for row in gone:
            for part in (*getattr(row, "children", ()), row):
                part.close()
        self.undo.disabled = not self.workbench.can_undo
        self.redo.disabled = not self.workbench.can_redo
        self.reset.disabled = not history

    def still(self) -> dict[str, Any]:
        rows = (
            f"<li>{escape(entry.title)} ({'on' if entry.enabled else 'off'}, "
            f"strength {entry.strength:g})</li>"
            for entry in self.workbench.history
        )
        return {"text/html": f"<ol>{''.join(rows)}</ol>"}

    def _row(self, entry: HistoryEntry) -> ipywidgets.HBox:
        bench, id = self.workbench, entry.id
        switch = ipywidgets.Checkbox(
            value=entry.enabled,
            description=f"{id} · {entry.title}",
            indent=False,
            layout={"width": "auto", "flex": "1 1 18rem"},
        )
        strength = ipywidgets.FloatSlider(
            value=entry.strength,
            min=min(0.0, entry.strength),
            max=max(2.0, entry.strength),
            step=0.05,
            description="strength",
            continuous_update=False,
        )
        remove = self._button("Remove", lambda: bench.remove(id), icon="times")
        switch.observe(self._guarded(lambda _: bench.toggle(id)), "value")
        strength.observe(self._guarded(lambda change: bench.strength(id, change.new)), "value")
        return ipywidgets.HBox([switch, strength, remove], layout=_WRAP)


class _Figure(_Panel):
    """A figure of one edit: of the newest, unless another one is chosen."""

    def __init__(self, workbench: Workbench) -> None:
        super().__init__(workbench)
        self._drawn: Edit | None = None
        self._listing = False
        self.choice = ipywidgets.Dropdown(description="edit", layout={"width": "auto"})
        self.choice.observe(self._guarded(lambda _: self._listing or self._draw()), "value")
        self.refresh()

    def figure(self, edit: Edit) -> go.Figure:
        """The figure of one edit."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Offer the edits that are live now; a new one comes into view."""
        edits = {edit.id: f"{edit.id} · {edit.title}" for edit in self.workbench.edits}
        known = {id for _, id in self.choice.options}
        chosen = self.choice.value
        if chosen not in edits or not edits.keys() <= known:
            chosen = max(edits, default=None)
        self._listing = True  # new options reset the choice, which is nothing to draw
        self.choice.options = [(title, id) for id, title in edits.items()]
        self.choice.value = chosen
        self._listing = False
        self._draw()

    def save(self, path: str | Path, *, scale: float = 2.0) -> Path:
        """Write the figure as it is shown: .html, .png, .svg or .pdf (see `plots.save`).

        Raises:
            EditError: No edit is shown.
            FigureError: It cannot be written so.
        """
        content = self.children[-1]
        if not isinstance(content, go.FigureWidget):
            raise EditError("There is no figure to save: make an edit first.")
        return plots.save(content, path, scale=scale)

    def still(self) -> dict[str, Any]:
        content = self.children[2]
        if isinstance(content, ipywidgets.HTML):
            return {"text/html": content.value}
        # As a plain figure shows here: a picture comes along where plotly's renderer makes one.
        shown = go.Figure(content)._repr_mimebundle_()
        return {"application/vnd.plotly.v1+json": json.loads(content.to_json())} | shown

    def _draw(self) -> None:
        edit = None if self.choice.value is None else self.workbench.get(self.choice.value)
        if edit is None:
            text = placeholder("No edit to show yet: make one.")
            self._show(ipywidgets.HTML(_STYLE + text))
        elif edit is not self._drawn:
            self._show(go.FigureWidget(self.figure(edit)))
        self._drawn = edit

    def _show(self, content: Any) -> None:
        gone = self.children[2:]
        self.children = (self.choice, self._message, content)
        for part in gone:
            part.close()


class FactorHeatmap(_Figure):
    """Norms of an edit's factors by layer and token, before the editor and after it.

    Args:
        workbench: Whose edits.
        factor: One of "activation", "delta", "pseudoactivation", "pseudodelta"; None: all.
    """

    def __init__(self, workbench: Workbench, factor: plots.Factor | None = None) -> None:
        self._factor: plots.Factor | None = factor
        super().__init__(workbench)

    def figure(self, edit: Edit) -> go.Figure:
        trace = self.workbench.inspect(edit)
        if self._factor is None:
            return plots.factor_panels(trace)
        return plots.factor_heatmap(trace, self._factor)


class UpdateMagnitudes(_Figure):
    """The size of an edit's update in each layer.

    Args:
        workbench: Whose edits.
        relative: As a share of the layer's weight norm.
    """

    def __init__(self, workbench: Workbench, *, relative: bool = False) -> None:
        self._relative = relative
        super().__init__(workbench)

    def figure(self, edit: Edit) -> go.Figure:
        trace = self.workbench.inspect(edit)
        return plots.update_magnitudes(trace, relative=self._relative)


class ProbeMap(_Figure):
    """How far an edit reaches: its probes as a map, and those that came out wrong as a list.

    Args:
        workbench: Whose edits; all live ones act.
    """

    def __init__(self, workbench: Workbench) -> None:
        self.order = ipywidgets.Dropdown(
            options=[(said, column) for column, said in SORTS.items()],
            description="sort by",
            layout={"width": "auto"},
        )
        self.list = ipywidgets.HTML(layout={"width": "100%"})
        self.report: ProbeReport | None = None
        self.order.observe(self._guarded(lambda _: self._list()), "value")
        super().__init__(workbench)

    def figure(self, edit: Edit) -> go.Figure:
        self.report = self.workbench.probe(edit)
        return reach_map(self.report)

    def refresh(self) -> None:
        """Probe anew: switches and strengths change what there is to see."""
        self._drawn = self.report = None
        super().refresh()

    def _show(self, content: Any) -> None:
        gone = self.children[2:3]
        self._list()
        self.children = (self.choice, self._message, content, self.order, self.list)
        for part in gone:
            part.close()

    def _list(self) -> None:
        by: Any = self.order.value
        shown = self.report and placeholder(LEGEND) + reach_list(self.report, by)
        self.list.value = _STYLE + shown if shown else ""
