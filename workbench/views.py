"""Views of a model: shallow copies sharing all parameters, to start higher or give fewer logits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from workbench.copies import shallow
from workbench.disk import RowsOnDisk
from workbench.encoding import Batch, Tokens, collate
from workbench.errors import EditError, ModelError
from workbench.layers import EditableLayer, Stack
from workbench.models import LanguageModel
from workbench.products import quick_products
from workbench.recompute import Again, run_twice

# Where logits are wanted in this thread's forward pass: rows and columns of the hidden states.
_positions: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar(
    "workbench_positions", default=None
)


@dataclass
class _Resumed:
    """What enters the upper part of a model, and what the blocks below share with those above."""

    hidden: Tensor | None
    again: Again | None = None
    extras: tuple[Any, ...] = ()


# Where this thread's forward pass through a trunk starts.
_resumed: ContextVar[_Resumed] = ContextVar("workbench_resumed")


class _SelectedHead(nn.Module):
    """The output head, computed at the wanted positions only: (b, t, d) -> (1, n, vocabulary)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        positions = _positions.get()
        return self.head(hidden if positions is None else _at(hidden, *positions).unsqueeze(0))


class _Standin(nn.Module):
    """Replaces a block in a view; what else a model's forward reads of the block is the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # no submodule: its parameters stay out of the view's

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"][0], name)


class _Skip(_Standin):
    """Stands in for a block below the start of a view and hands hidden states on.

    Blocks that return a tuple share its other members with the blocks above (T5's first block
    computes the position bias that all others read), so there the first block still runs.
    """

    def __init__(self, block: nn.Module, trunk: Trunk, *, first: bool, last: bool) -> None:
        super().__init__(block)
        self._trunk, self._first, self._last = trunk, first, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        resumed = _resumed.get()
        if self._first and self._trunk.tuples is not False:
            with torch.no_grad():
                output = self._block[0](hidden_states, *args, **kwargs)
            self._trunk.tuples = isinstance(output, tuple)
            resumed.extras = output[1:] if self._trunk.tuples else ()
        hidden = resumed.hidden if self._last else hidden_states
        return (hidden, *resumed.extras) if self._trunk.tuples else hidden


class _StopAfter(_Standin):
    """Runs a block, then ends the whole forward pass with what the block gave."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(self._block[0](*args, **kwargs))


class _Twice(_Standin):
    """Runs a block, and once more in the backward pass where that is asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        again, block = _resumed.get().again, self._block[0]
        return run_twice(block, again, *args, **kwargs) if again else block(*args, **kwargs)


class _Reached(Exception):
    def __init__(self, output: Any) -> None:
        super().__init__("the wanted block was reached")
        self.output = output


class Trunk:
    """A model cut in two: the constant part below the edited blocks, and the part above.

    Training an editor never changes the lower part's output, nor the base model's last hidden
    states, so both can be computed once for each text and kept. Threads may share a trunk.

    Args:
        lm: The frozen model.
        layers: The layers that edits change.
        checkpointing: `logits` can run blocks again rather than keep what they held.
    """

    def __init__(
        self, lm: LanguageModel, layers: Sequence[EditableLayer], *, checkpointing: bool = False
    ) -> None:
        self._lm = lm
        self.tuples: bool | None = None  # whether blocks return tuples, known once one has run
        first, last = lm.stacks[0], lm.stacks[-1]
        edited = [layer.block for layer in layers if layer.stack == first.name]
        self.start = min(edited, default=len(first.blocks))
        below = self.below = self._skips(first, self.start)
        everything = {k: v for stack in lm.stacks for k, v in self._skips(stack).items()}
        twice = {
            f"{stack.path}.{i}": _Twice(block)
            for stack in (lm.stacks if checkpointing else ())
            for i, block in enumerate(stack.blocks)
        }
        end = f"{last.path}.{len(last.blocks) - 1}"
        stop = {end: _StopAfter(twice.get(end, last.blocks[-1]))}
        self._upper = shallow(lm.model, twice | below | _head(lm))
        self._upper_body = shallow(lm.model, twice | below | stop)
        self._top = shallow(lm.model, everything | _head(lm))
        self._lower = None
        if self.start:
            last_below = _StopAfter(first.blocks[self.start - 1])
            self._lower = shallow(lm.model, {f"{first.path}.{self.start - 1}": last_below})

    def _skips(self, stack: Stack, end: int | None = None) -> dict[str, nn.Module]:
        blocks = stack.blocks[:end]
        return {
            f"{stack.path}.{i}": _Skip(block, self, first=i == 0, last=i == len(blocks) - 1)
            for i, block in enumerate(blocks)
        }

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor | None:
        """Hidden states that enter the upper part, `(batch, tokens, width)`; None if it is all."""
        return None if self._lower is None else self._run(self._lower, batch)

    def final(self, batch: Batch, hidden: Tensor | None, again: Again | None = None) -> Tensor:
        """What `head` needs to give the logits at the target positions; arguments as of `logits`.

        Returns:
            The last block's hidden states, `(n, width)`, before the norm; for a classifier,
            which may pool any position, the logits themselves, `(n, labels)`.
        """
        if self._lm.kind == "classifier":
            return self.logits(batch, hidden, again)
        with _resume(hidden, again and partial(_alike, again, batch)):
            return _at(self._run(self._upper_body, batch), batch.rows, batch.columns)

    def logits(self, batch: Batch, hidden: Tensor | None, again: Again | None = None) -> Tensor:
        """Logits at the target positions, `(n, vocabulary)`, resumed from `hidden`.

        With `checkpointing`, blocks run again in the backward pass, in contexts that `again` makes.
        """
        with _resume(hidden, again and partial(_alike, again, batch)):
            return _at_targets(self._upper, batch, self._lm.kind)

    def head(self, final: Tensor) -> Tensor:
        """Logits, `(n, vocabulary)`, from what `final` returned, on the model's device."""
        if self._lm.kind == "classifier":
            return final
        n = len(final)
        ids = torch.zeros(n, 1, dtype=torch.long, device=final.device)
        inputs = {"input_ids": ids}
        if self._lm.kind == "seq2seq":
            inputs["decoder_input_ids"] = ids
        each = torch.arange(n, device=final.device)
        with _resume(final.unsqueeze(1)):
            batch = Batch(inputs, each, torch.zeros_like(each), each)
            return _at_targets(self._top, batch, self._lm.kind).to(self._lm.device)

    def _run(self, view: nn.Module, batch: Batch) -> Tensor:
        try:
            with quick_products(batch.inputs["input_ids"]):
                view(**batch.inputs, **_uncached(self._lm.kind))
        except _Reached as reached:
            output = reached.output
            self.tuples = isinstance(output, tuple)
            return output[0] if isinstance(output, tuple) else output
        raise EditError("The model never ran the block that ends this part of it.")


@contextmanager
def _resume(hidden: Tensor | None, again: Again | None = None) -> Iterator[None]:
    reset = _resumed.set(_Resumed(hidden, again))
    try:
        yield
    finally:
        _resumed.reset(reset)


@contextmanager
def _alike(again: Again, batch: Batch) -> Iterator[None]:
    """Where blocks run again: as `again` says, and with the products that they ran with."""
    with quick_products(batch.inputs["input_ids"]), again():
        yield


Rows = list[tuple[Tensor, ...]]


class TrunkCache:
    """What is constant for a text while the model is frozen, kept: computed once, then looked up.

    Args:
        lm: The model, for padding.
        trunk: The cut model.
        gigabytes: Memory to hold. 0 keeps nothing. Where it is full, gradient factors, the
            largest, make room first; then the texts kept longest.
        disk: Holds all of it, too; what memory has no room for is read from there.
    """

    def __init__(
        self, lm: LanguageModel, trunk: Trunk, gigabytes: float, disk: RowsOnDisk | None = None
    ) -> None:
        self._lm, self.trunk, self._disk = lm, trunk, disk
        self._kept: OrderedDict[tuple[str, Tokens], tuple[Tensor, ...]] = OrderedDict()
        self._factors: OrderedDict[tuple[str, Tokens], tuple[Tensor, ...]] = OrderedDict()
        self._bytes, self._limit = 0, int(gigabytes * 2**30)

    def hidden(self, texts: Sequence[Tokens]) -> Tensor | None:
        """Hidden states at the cut, padded, `(batch, tokens, width)`; None without a lower part."""
        if not self.trunk.start:
            return None
        rows = self._lookup(self._kept, "hidden", texts, self._hidden_rows)
        return pad_sequence([row for (row,) in rows], batch_first=True)

    def finals(self, texts: Sequence[Tokens]) -> Tensor:
        """What `Trunk.final` gives at the target positions, `(n, width)`."""
        return torch.cat([row for (row,) in self._lookup(self._kept, "final", texts, self._finals)])

    @torch.no_grad()
    def logits(self, texts: Sequence[Tokens]) -> Tensor:
        """The base model's logits at the target positions, `(n, vocabulary)`."""
        return self.trunk.head(self.finals(texts))

    def factors(self, texts: Sequence[Tokens], capture: Callable[[Sequence[Tokens]], Rows]) -> Rows:
        """What `capture` gives for each text, of those kept or anew."""
        return self._lookup(self._factors, "factors", texts, capture)

    def _hidden_rows(self, texts: Sequence[Tokens]) -> Rows:
        hidden = self.trunk.hidden(collate(self._lm, texts))
        assert hidden is not None
        return [(row[: len(text.ids)].clone(),) for row, text in zip(hidden, texts, strict=True)]

    @torch.no_grad()
    def _finals(self, texts: Sequence[Tokens]) -> Rows:
        final = self.trunk.final(collate(self._lm, texts), self.hidden(texts))
        return [(row.clone(),) for row in final.split([len(text.targets) for text in texts])]

    def _lookup(
        self,
        kept: OrderedDict[tuple[str, Tokens], tuple[Tensor, ...]],
        kind: str,
        texts: Sequence[Tokens],
        compute: Callable[[Sequence[Tokens]], Rows],
    ) -> Rows:
        # Computing may itself look up other things, and so push out what is kept: read it first.
        found = {text: kept[kind, text] for text in texts if (kind, text) in kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        anew = self._stored(kind, missing)
        missing = [text for text in missing if text not in anew]
        for text, value in zip(missing, compute(missing) if missing else (), strict=True):
            anew[text] = value
            if self._disk:
                self._disk.write(kind, text, value)
        for text, value in anew.items():
            found[text] = kept[kind, text] = value
            self._bytes += _size(value)
        while self._bytes > self._limit:
            # The newest factors leave: of a walk through more than fits, the rest is found again.
            least = self._factors.popitem if self._factors else partial(self._kept.popitem, False)
            _, value = least()
            self._bytes -= _size(value)
        return [found[text] for text in texts]

    def _stored(self, kind: str, texts: Sequence[Tokens]) -> dict[Tokens, tuple[Tensor, ...]]:
        """Of some texts, those on disk."""
        if not self._disk:
            return {}
        rows = ((text, self._disk.read(kind, text)) for text in texts)
        return {text: value for text, value in rows if value is not None}


def _size(value: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in value)


class _StopBefore(nn.Module):
    """Stands in for a layer and ends the whole forward pass with what the layer was to read."""

    def forward(self, inputs: Tensor) -> Tensor:
        raise _Reached(inputs)


class LayerInputs:
    """What one layer reads; the model runs no further than to it.

    Args:
        lm: The model.
        layer: The layer.
        trunk: Whose lower part, below the layer, the model can be resumed after.
    """

    def __init__(self, lm: LanguageModel, layer: EditableLayer, trunk: Trunk | None = None) -> None:
        self.lm, self.layer = lm, layer
        below = trunk.below if trunk else {}
        self._view = shallow(lm.model, below | {layer.name: _StopBefore()})

    @torch.no_grad()
    def __call__(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """The layer's inputs, `(batch, tokens, in)`; resumed from the trunk's `hidden`."""
        try:
            with _resume(hidden), quick_products(batch.inputs["input_ids"]):
                self._view(**batch.inputs)
        except _Reached as reached:
            inputs: Tensor = reached.output
            # Mixture-of-experts blocks put the tokens of all sequences in one axis.
            return inputs if inputs.dim() == 3 else inputs.unflatten(0, (batch.size, -1))
        raise EditError(f"The forward pass never ran the layer {self.layer.name}.")


def target_logits(lm: LanguageModel, batch: Batch) -> Tensor:
    """Logits at the batch's target positions only, `(n, vocabulary)`, or `(n, labels)`.

    The output head never sees the other positions, so that no `batch x tokens x vocabulary`
    tensor is made. Everything after the head (scaling, soft-capping) is the model's own.
    """
    if lm not in _selecting:
        _selecting[lm] = shallow(lm.model, _head(lm))
    return _at_targets(_selecting[lm], batch, lm.kind)


_selecting: WeakKeyDictionary[LanguageModel, nn.Module] = WeakKeyDictionary()


def _at_targets(model: nn.Module, batch: Batch, kind: str) -> Tensor:
    with quick_products(batch.inputs["input_ids"]):
        if kind == "classifier":
            return model(**batch.inputs).logits[batch.rows]
        reset = _positions.set((batch.rows, batch.columns))
        try:
            return model(**batch.inputs, **_uncached(kind)).logits.squeeze(0)
        finally:
            _positions.reset(reset)


def _uncached(kind: str) -> dict[str, bool]:
    """Nothing is generated, and blocks that run again must not read themselves."""
    return {} if kind == "classifier" else {"use_cache": False}


def _head(lm: LanguageModel) -> dict[str, nn.Module]:
    if lm.kind == "classifier":
        return {}
    head = lm.model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(lm.model).__name__} does not say which layer is its output head.")
    return {next(k for k, m in lm.model.named_modules() if m is head): _SelectedHead(head)}


def _at(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pick positions, `(b, t, d)` -> `(n, d)`; a split model's hidden states may lie elsewhere."""
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]
