"""The edit stack against the plainest model of it: a list of states with a place in it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from families import batch_for, language_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from references import editable, hook_count, logits_of, random_update
from torch import Tensor
from torch.testing import assert_close

from workbench.errors import EditError
from workbench.overlay import UNDOABLE, EditStack, StackEntry, overlay
from workbench.updates import LayerUpdate, Update

LM = language_model("gpt2")
LAYERS = editable(LM)
INPUTS = batch_for(LM.model)
BASE = logits_of(LM.model, INPUTS)
CHECKSUM = LM.checksum()
# Updates of overlapping sets of layers.
UPDATES = [random_update(LAYERS[n : 2 * n + 2], seed=n, dtype=torch.float64) for n in range(5)]
DENSE = [update.dense() for update in UPDATES]


@dataclass(frozen=True)
class Row:
    id: int
    which: int
    enabled: bool = True
    strength: float = 1.0


class Stack(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = EditStack()
        self.states: list[list[Row]] = [[]]
        self.place = 0
        self.made = 0

    @property
    def rows(self) -> list[Row]:
        return self.states[self.place]

    def act(self, state: list[Row]) -> None:
        self.states = [*self.states[: self.place + 1], state]
        self.place += 1

    def swap(self, old: Row, new: Row) -> None:
        self.act([new if row is old else row for row in self.rows])

    @rule(which=st.integers(0, len(UPDATES) - 1))
    def push(self, which: int) -> None:
        self.stack.push(self.made, UPDATES[which])
        self.act([*self.rows, Row(self.made, which)])
        self.made += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def toggle(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        assert self.stack.toggle(row.id) is (not row.enabled)
        self.swap(row, Row(row.id, row.which, not row.enabled, row.strength))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), value=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
    def strength(self, data: st.DataObject, value: float) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.stack.strength(row.id, value)
        self.swap(row, Row(row.id, row.which, row.enabled, value))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.stack.remove(row.id)
        self.act([other for other in self.rows if other is not row])

    @rule()
    def clear(self) -> None:
        self.stack.clear()
        if self.rows:
            self.act([])

    @rule()
    def undo(self) -> None:
        if self.place:
            self.stack.undo()
            self.place -= 1
        else:
            with pytest.raises(EditError, match="nothing to undo"):
                self.stack.undo()

    @rule()
    def redo(self) -> None:
        if self.place + 1 < len(self.states):
            self.stack.redo()
            self.place += 1
        else:
            with pytest.raises(EditError, match="nothing to redo"):
                self.stack.redo()

    @rule()
    def refuse(self) -> None:
        """What cannot be done changes nothing."""
        for action in (self.stack.toggle, self.stack.remove):
            with pytest.raises(EditError, match="no edit -1"):
                action(-1)
        for row in self.rows[:1]:
            with pytest.raises(EditError, match="already"):
                self.stack.push(row.id, UPDATES[0])
            for strength in (11.0, float("nan")):
                with pytest.raises(EditError, match="between -10 and 10"):
                    self.stack.strength(row.id, strength)

    @invariant()
    def entries_agree(self) -> None:
        expected = [StackEntry(r.id, UPDATES[r.which], r.enabled, r.strength) for r in self.rows]
        assert list(self.stack.entries) == expected
        assert self.stack.can_undo == (self.place > 0)
        assert self.stack.can_redo == (self.place + 1 < len(self.states))

    @invariant()
    def combined_is_the_dense_sum(self) -> None:
        total: dict[str, Tensor] = {}
        for row in self.rows:
            if row.enabled and row.strength:
                for name, dense in DENSE[row.which].items():
                    total[name] = total.get(name, torch.zeros_like(dense)) + row.strength * dense
        combined = self.stack.combined()
        assert combined is self.stack.combined()
        assert set(combined) == set(total)
        for name, dense in combined.dense().items():
            assert_close(dense, total[name], rtol=1e-12, atol=1e-12)

    def teardown(self) -> None:
        """Whatever was done, undoing all of it gives the base model back, bit for bit."""
        with overlay(LM.model, self.stack.combined()):
            logits_of(LM.model, INPUTS)
        while self.stack.can_undo:
            self.stack.undo()
        assert self.stack.combined() == Update({})
        with overlay(LM.model, self.stack.combined()):
            assert torch.equal(logits_of(LM.model, INPUTS), BASE)
        assert torch.equal(logits_of(LM.model, INPUTS), BASE)
        assert hook_count(LM.model) == 0
        assert LM.checksum() == CHECKSUM


TestStack = Stack.TestCase
TestStack.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_redo_brings_the_same_bits_back() -> None:
    stack = EditStack()
    for id, update in enumerate(UPDATES):
        stack.push(id, update)
    stack.toggle(1)
    stack.strength(2, -0.5)
    with overlay(LM.model, stack.combined()):
        edited = logits_of(LM.model, INPUTS)
    assert not torch.equal(edited, BASE)
    while stack.can_undo:
        stack.undo()
    while stack.can_redo:
        stack.redo()
    with overlay(LM.model, stack.combined()):
        assert torch.equal(logits_of(LM.model, INPUTS), edited)


def test_dense_changes_are_held_as_one_and_still_removed_exactly() -> None:
    dense = [Update({n: LayerUpdate.from_dense(d) for n, d in DENSE[k].items()}) for k in (0, 0, 0)]
    stack, never = EditStack(), EditStack()
    for id, strength in enumerate((1.0, 0.3, -2.0)):
        stack.push(id, dense[id])
        stack.strength(id, strength)
        if id != 1:
            never.push(id, dense[id])
            never.strength(id, strength)
    assert stack.combined().nbytes == dense[0].nbytes
    stack.remove(1)
    for found, expected in zip(stack.combined().tensors(), never.combined().tensors(), strict=True):
        assert torch.equal(found, expected)


def test_two_stacks_share_nothing() -> None:
    one, two = EditStack(), EditStack()
    one.push(0, UPDATES[0])
    assert not two.entries
    assert not two.can_undo
    assert len(two.combined()) == 0


def test_undo_goes_back_so_far_and_no_further() -> None:
    stack = EditStack()
    stack.push(0, UPDATES[0])
    for _ in range(UNDOABLE + 2):
        stack.toggle(0)
    for _ in range(UNDOABLE):
        stack.undo()
    assert not stack.can_undo
    assert [(entry.id, entry.enabled) for entry in stack.entries] == [(0, True)]


def test_an_entry_is_a_value_that_does_not_change() -> None:
    stack = EditStack()
    stack.push(0, UPDATES[0])
    with pytest.raises(AttributeError):
        stack.entries[0].strength = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_copy_has_the_same_history_and_goes_its_own_way() -> None:
    stack = EditStack()
    stack.push(0, UPDATES[0])
    stack.push(1, UPDATES[1])
    stack.undo()
    twin = stack.copy()
    assert twin == stack
    twin.push(2, UPDATES[2])
    assert [entry.id for entry in twin.entries] == [0, 2]
    assert [entry.id for entry in stack.entries] == [0]
    stack.redo()
    assert [entry.id for entry in stack.entries] == [0, 1]


def test_what_undo_and_redo_reach_is_held_until_forgotten() -> None:
    stack = EditStack()
    for id in range(3):
        stack.push(id, UPDATES[id])
        stack.remove(id)
    stack.undo()
    assert stack.ids() == {0, 1, 2}
    before, forgotten = stack.entries, 0
    while stack.forget():
        forgotten += 1
    assert forgotten == 5  # states before the present one
    assert stack.forget() is False
    assert stack.entries == before
    assert not stack.can_undo
    assert stack.ids() == {2}
    stack.redo()
    assert stack.entries == ()


def test_strengths_lie_between_minus_10_and_10() -> None:
    stack = EditStack()
    stack.push(0, UPDATES[0])
    for strength in (-10, 10):
        stack.strength(0, strength)
        assert stack.entries[0].strength == strength
    for strength in (-10.01, 10.01):
        with pytest.raises(EditError, match="between -10 and 10"):
            stack.strength(0, strength)


def test_who_asks_for_a_missing_edit_is_told_which_there_are() -> None:
    stack = EditStack()
    with pytest.raises(EditError, match="at hand: none"):
        stack.remove(7)
    stack.push(0, UPDATES[0])
    stack.push(3, UPDATES[0])
    with pytest.raises(EditError, match=r"no edit 7\. Edits at hand: 0, 3\."):
        stack.remove(7)
