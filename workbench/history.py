"""One user's edits: which are live, how strongly, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Self

from workbench.edit import Edit, check_room, kept
from workbench.errors import EditError
from workbench.overlay import EditStack
from workbench.results import HistoryEntry
from workbench.updates import Update


class History:
    """Edits, oldest first, each on or off and of some strength; every change can be undone.

    In a `with` they last as long as it does: leaving it, by an error too, drops them all, so that
    the model answers as before the first. What was saved stays.

    Args:
        most_bytes: Of edits that are kept: beyond, undo forgets the oldest actions, and an edit
            that does not fit beside the live ones is refused.
    """

    def __init__(self, most_bytes: float = inf) -> None:
        self.most_bytes = most_bytes
        self._stack = EditStack()
        self._edits: dict[int, Edit] = {}
        self._observers: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reset()

    @property
    def _next_id(self) -> int:
        return max(self._edits, default=0) + 1

    def _add(self, edit: Edit) -> None:
        check_room(self.edits, edit, self.most_bytes)
        self._stack.push(edit.id, edit.update)
        self._edits = kept(self._stack, self._edits | {edit.id: edit}, self.most_bytes)
        self._changed()

    def _take_after(self, other: History) -> None:
        """Begin with another's edits and its way back."""
        self._stack, self._edits = other._stack.copy(), dict(other._edits)

    def observe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call back after each change of the history; returns what ends that."""
        self._observers.append(callback)
        return lambda: self._observers.remove(callback)

    def _changed(self) -> None:
        for callback in tuple(self._observers):
            callback()

    @property
    def history(self) -> tuple[HistoryEntry, ...]:
        """The live edits, oldest first."""
        return tuple(
            HistoryEntry(e.id, self._edits[e.id].title, e.enabled, e.strength)
            for e in self._stack.entries
        )

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits of the present state, oldest first, whether on or off."""
        return tuple(self._edits[entry.id] for entry in self._stack.entries)

    @property
    def can_undo(self) -> bool:
        return self._stack.can_undo

    @property
    def can_redo(self) -> bool:
        return self._stack.can_redo

    def undo(self) -> None:
        """Take the last action back exactly, whether it was an edit, a toggle or a strength."""
        self._stack.undo()
        self._changed()

    def redo(self) -> None:
        """Do again what was undone last."""
        self._stack.redo()
        self._changed()

    def remove(self, id: int) -> None:
        """Drop one edit, wherever it stands in the history."""
        self._stack.remove(id)
        self._changed()

    def toggle(self, id: int) -> bool:
        """Switch one edit off, or on again; returns whether it is now on."""
        on = self._stack.toggle(id)
        self._changed()
        return on

    def strength(self, id: int, value: float) -> None:
        """Set how strongly one edit acts: 1 as made, 0 not at all."""
        self._stack.strength(id, value)
        self._changed()

    def reset(self) -> None:
        """Drop every edit (undo brings them back)."""
        self._stack.clear()
        self._changed()

    def get(self, id: int) -> Edit:
        """The live edit with that id.

        Raises:
            EditError: There is none.
        """
        for edit in self.edits:
            if edit.id == id:
                return edit
        known = ", ".join(str(edit.id) for edit in self.edits) or "none"
        raise EditError(f"There is no edit {id!r:.80}. Edits at hand: {known}.")

    @property
    def update(self) -> Update:
        """The sum of all live edits."""
        return self._stack.combined()
