"""Overlay: the frozen model plus updates, applied in the forward pass; the stack of live edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from torch import Tensor, nn

from workbench.checks import check_number
from workbench.errors import EditError
from workbench.layers import linear_shape
from workbench.scope import Reading
from workbench.updates import LayerUpdate, Update

UNDOABLE = 1000  # actions that a history goes back

# The overlays that are live in this thread or task; a hook set by another one stays silent.
_live: ContextVar[frozenset[int]] = ContextVar("workbench_live_overlays", default=frozenset())
_tokens = count()


def _add(
    layer: LayerUpdate,
    inputs: Tensor,
    output: Tensor,
    sequences: Tensor | None,
    reached: Tensor | None,
) -> Tensor:
    batch = len(layer.A) if layer.A.dim() == 3 else None if sequences is None else len(sequences)
    if batch is not None:
        # Mixture-of-experts blocks put the tokens of all sequences in one axis.
        if inputs.dim() == 2 and len(inputs) % batch == 0:
            inputs = inputs.unflatten(0, (batch, -1))
        elif len(inputs) != batch:
            raise EditError(
                f"The overlay is made for a batch of {batch} sequences, but the model was given "
                f"{len(inputs)}. Pass as many sequences as updates (and no beams)."
            )
    change = layer.apply(inputs.to(layer.A), reached)
    if sequences is not None:
        change = change * sequences.to(change)[:, None, None]
    return output + change.view_as(output).to(output.dtype)


def _hook(
    layer: LayerUpdate, here: Callable[[], bool], sequences: Tensor | None, reading: Reading | None
) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        nonlocal layer
        if not here():
            return None
        # Only the output tells where an offloaded layer runs.
        if layer.A.device != output.device:
            layer = layer.map(lambda factor: factor.to(output.device))
        reached = None if reading is None else reading.reached
        if reached is not None:
            reached = reached.to(output.device)
        return _add(layer, args[0], output, sequences, reached)

    return hook


def _checked(model: nn.Module, name: str, does: str, *wanted: int) -> nn.Module:
    """The layer of a model that an update does something to, if it is as wide as wanted.

    Args:
        wanted: Its in_features, and its out_features where they matter.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise EditError(
            f"The update {does} layer {name!r}, which this model does not have. "
            f"It was made for another model."
        ) from None
    shape = linear_shape(module)
    if shape is None or shape[: len(wanted)] != wanted:
        expected, there = (" -> ".join(map(str, widths or ())) for widths in (wanted, shape))
        raise EditError(
            f"The update {does} layer {name!r} as one with {expected} features; in this model it "
            f"is {there or 'no linear layer'}. It was made for another model."
        )
    return module


def _follow(
    model: nn.Module, looked_at: nn.Module, reading: Reading, here: Callable[[], bool]
) -> list[Any]:
    """Hooks that tell a reading what the model reads.

    Args:
        model: The whole model.
        looked_at: Its layer that the scope looks at.
        reading: What is told.
        here: Whether the thread at hand is the one to be followed.

    Returns:
        Handles, to be removed.
    """

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if here():
            ids = args[0] if args else kwargs.get("input_ids")
            reading.begin(ids, kwargs.get("attention_mask"), kwargs.get("past_key_values"))

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if here():
            reading.look(args[0])

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if here():
            reading.end(output)

    return [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        looked_at.register_forward_pre_hook(look),
        model.register_forward_hook(end),
    ]


@contextmanager
def overlay(
    model: nn.Module,
    update: Update | None,
    sequences: Tensor | None = None,
    reached: Tensor | None = None,
) -> Iterator[Reading | None]:
    """Run the model as if each weight W were `W + scale * B^T A`; the weights are never written.

    The overlay is local to the context (thread, task) that enters it. Overlays nest: their
    changes add up. Differentiable in both factors and the scale. Edits with a scope act from the
    token on that is in it, in texts that are read in pieces too, with a cache.

    Args:
        model: The module whose layers the update names.
        update: What to add; with a leading axis, one change for each sequence of the batch.
            None or an empty update leaves the model as it is.
        sequences: Which sequences of the batch it acts on, `(batch,)` bool; None: all. Base and
            edited model can so run in one forward pass.
        reached: Which edits of the scope are in force at each token, `(batch, tokens, edits)` bool,
            where parts of a model run again; None: that is told by what the model reads.

    Yields:
        How far the model has read, for an update with a scope; else None.

    Raises:
        EditError: The update or its scope names a layer that the model does not have, or of other
            widths; in the forward pass: the batch has another number of sequences.
    """
    token = next(_tokens)
    scope = update.scope if update else None
    reading = None if scope is None else Reading(scope, reached)

    def here() -> bool:
        return token in _live.get()

    with ExitStack() as stack:
        for name, layer in (update or {}).items():
            wanted = layer.A.shape[-1], layer.B.shape[-1]
            module = _checked(model, name, "changes", *wanted)
            hook = _hook(layer.folded(), here, sequences, reading)
            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        if reading is not None and reached is None:
            looked_at = _checked(
                model, reading.scope.layer, "looks at", reading.scope.keys.shape[-1]
            )
            for handle in _follow(model, looked_at, reading, here):
                stack.callback(handle.remove)
        reset = _live.set(_live.get() | {token})
        try:
            yield reading
        finally:
            _live.reset(reset)


@dataclass(frozen=True)
class StackEntry:
    """One edit of a stack: its id, its update, whether it is on and how strongly."""

    id: int
    update: Update
    enabled: bool = True
    strength: float = 1.0


@dataclass
class EditStack:
    """The live edits of one user, as a history of immutable states.

    Every action (push, remove, toggle, strength) adds a state; undo and redo move between
    states, so that whatever came before is back exactly, `UNDOABLE` actions back at most.
    """

    _states: list[tuple[StackEntry, ...]] = field(default_factory=lambda: [()])
    _cursor: int = 0
    _cached: tuple[tuple[StackEntry, ...], Update] | None = None

    def copy(self) -> EditStack:
        """A stack with the same history, which then goes its own way."""
        return replace(self, _states=[*self._states])

    @property
    def entries(self) -> tuple[StackEntry, ...]:
        """The edits of the present state, oldest first."""
        return self._states[self._cursor]

    def ids(self) -> set[int]:
        """The edits of every state that undo or redo can reach."""
        return {entry.id for state in self._states for entry in state}

    @property
    def can_undo(self) -> bool:
        return self._cursor > 0

    @property
    def can_redo(self) -> bool:
        return self._cursor + 1 < len(self._states)

    def combined(self) -> Update:
        """The sum of all enabled edits, each times its strength; cached until the state changes."""
        entries = self.entries
        if self._cached is None or self._cached[0] is not entries:
            live = [entry for entry in entries if entry.enabled and entry.strength != 0]
            self._cached = (entries, Update.sum(e.update * e.strength for e in live))
        return self._cached[1]

    def push(self, id: int, update: Update) -> None:
        """Add an edit, enabled at full strength."""
        if any(entry.id == id for entry in self.entries):
            raise EditError(f"Edit {id} is already in the stack.")
        self._advance((*self.entries, StackEntry(id, update)))

    def remove(self, id: int) -> None:
        """Drop one edit, wherever it stands."""
        entry = self._entry(id)
        self._advance(tuple(other for other in self.entries if other is not entry))

    def toggle(self, id: int) -> bool:
        """Switch an edit off or on again; returns whether it is now on."""
        entry = self._entry(id)
        self._replace(entry, replace(entry, enabled=not entry.enabled))
        return not entry.enabled

    def strength(self, id: int, value: float) -> None:
        """Set how strongly an edit acts: 1 as made, 0 not at all, negative reverses it."""
        value = check_number(value, "Strength", -10, 10, " (1: as made)")
        entry = self._entry(id)
        self._replace(entry, replace(entry, strength=value))

    def clear(self) -> None:
        """Drop every edit (undo brings them back)."""
        if self.entries:
            self._advance(())

    def undo(self) -> None:
        """Take the last action back.

        Raises:
            EditError: There is nothing to undo.
        """
        if not self.can_undo:
            raise EditError(
                "There is nothing to undo: no edit has been made, or what came before is no longer "
                "kept."
            )
        self._cursor -= 1

    def redo(self) -> None:
        """Do again what was undone last.

        Raises:
            EditError: There is nothing to redo.
        """
        if not self.can_redo:
            raise EditError(
                "There is nothing to redo: nothing has been undone since the last edit."
            )
        self._cursor += 1

    def forget(self) -> bool:
        """Drop the oldest state that undo could reach; returns whether there was one."""
        if not self.can_undo:
            return False
        del self._states[0]
        self._cursor -= 1
        return True

    def _entry(self, id: int) -> StackEntry:
        for entry in self.entries:
            if entry.id == id:
                return entry
        known = ", ".join(str(entry.id) for entry in self.entries) or "none"
        raise EditError(f"There is no edit {id!r:.80}. Edits at hand: {known}.")

    def _replace(self, old: StackEntry, new: StackEntry) -> None:
        self._advance(tuple(new if entry is old else entry for entry in self.entries))

    def _advance(self, state: tuple[StackEntry, ...]) -> None:
        del self._states[self._cursor + 1 :]
        self._states.append(state)
        self._cursor += 1
        if self._cursor > UNDOABLE:
            self.forget()
