"""Updates: changes of weights as low-rank factors, with an algebra; no model is touched here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from workbench.errors import EditError
from workbench.scope import Scope


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """A change of one weight matrix, `dW = scale * B^T A` (out x in), applied as `W + dW`.

    With a threshold the change is gated: on an input x, term t acts through `A_t x` shrunk towards
    0 by its threshold, and not at all where `|A_t x|` is below it. Such a change is no change of
    the weights; norms, spectrum and products are those of `dW`, where every term acts in full.

    Args:
        A: Input-side factor, `(..., rank, in)`; for MEND the pseudoactivations.
        B: Output-side factor, `(..., rank, out)`; for MEND the pseudodeltas.
        scale: Signed step, a float or a 0-d tensor; for MEND minus the layer's `edit_lr`.
        threshold: Of each term, `(..., rank)`, at least 0; None: 0, as in a change of weights.
        owners: Of each term, `(..., rank)`: the edit of the update's scope that it belongs to, -1
            for none; None: none of them.

    A leading axis, where there is one, holds a different update for each sequence of a batch.
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0
    threshold: Tensor | None = None
    owners: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.shape[:-1] != self.B.shape[:-1] or self.A.dim() not in (2, 3):
            raise EditError(
                f"The factors of an update must share their leading axes, (rank, in) and "
                f"(rank, out) or (batch, rank, in) and (batch, rank, out); got A "
                f"{tuple(self.A.shape)} and B {tuple(self.B.shape)}."
            )
        terms = self.A.shape[:-1]
        for name, found in (("threshold", self.threshold), ("owner", self.owners)):
            if found is not None and found.shape != terms:
                raise EditError(
                    f"A gated update has one {name} a term, {tuple(terms)}; got "
                    f"{tuple(found.shape)}."
                )

    @classmethod
    def from_dense(cls, delta_weight: Tensor) -> LayerUpdate:
        """Hold a dense change exactly, with an identity as the factor of the smaller side.

        Args:
            delta_weight: `(..., out, in)`.
        """
        *lead, out_features, in_features = delta_weight.shape
        size = min(out_features, in_features)
        identity = _identity(size, delta_weight).expand(*lead, size, size)
        if in_features <= out_features:
            return cls(identity, delta_weight.mT.contiguous())
        return cls(delta_weight, identity)

    @property
    def rank(self) -> int:
        """Number of rank-1 terms; the matrix rank can be lower."""
        return self.A.shape[-2]

    def apply(self, inputs: Tensor, reached: Tensor | None = None) -> Tensor:
        """What the change adds to the layer's output, `(..., tokens, in)` -> `(..., tokens, out)`.

        Args:
            inputs: The layer's inputs; leading axes as the factors' or none.
            reached: Which edits of the scope are in force, `(..., tokens, edits)` bool; None: all.
        """
        return (self.scale * self.acting(inputs, reached)) @ self.B

    def acting(self, inputs: Tensor, reached: Tensor | None = None) -> Tensor:
        """How strongly each term acts, `(..., tokens, rank)`; arguments as those of `apply`."""
        keyed = inputs @ self.A.mT
        if self.threshold is not None:
            # Soft thresholding (Donoho 1995): continuous, and the identity at threshold 0.
            limit = self.threshold.unsqueeze(-2)
            keyed = keyed - keyed.clamp(-limit, limit)
        if self.owners is None or reached is None:
            return keyed
        in_force = torch.cat((reached, reached.new_ones((*reached.shape[:-1], 1))), -1)
        owners = (self.owners % in_force.shape[-1]).unsqueeze(-2)  # -1 is the last
        return keyed * in_force.gather(-1, owners.expand_as(keyed))

    def dense(self) -> Tensor:
        """The change as a matrix, `(..., out, in)`, the threshold left out."""
        if _is_identity(self.A):
            return self.scale * self.B.mT
        return self.scale * (self.A if _is_identity(self.B) else self.B.mT @ self.A)

    def norm(self) -> Tensor:
        """Frobenius norm, `(...)`; exact where terms cancel, which Gram matrices are not."""
        return torch.linalg.matrix_norm(self._core()[2]).float()

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        # dW = scale * Q_b (R_b R_a^T) Q_a^T: the spectrum is that of a rank x rank matrix.
        q_a, r_a = torch.linalg.qr(self.A.double().mT)
        q_b, r_b = torch.linalg.qr(self.B.double().mT)
        return q_a, q_b, self.scale * (r_b @ r_a.mT)

    def inner(self, other: LayerUpdate) -> Tensor:
        """Frobenius inner product with another change of the same matrix, `(...)`."""
        # <B^T A, D^T C> = sum of (B D^T) * (A C^T): the dense matrices are never formed.
        B, D = self.B.double(), other.B.double()
        A, C = self.A.double(), other.A.double()
        return self.scale * other.scale * ((B @ D.mT) * (A @ C.mT)).sum((-2, -1))

    def spectrum(self) -> Tensor:
        """Singular values, largest first, `(..., min(rank, in, out))`."""
        return torch.linalg.svdvals(self._core()[2]).float()

    def compress(self, rank: int) -> LayerUpdate:
        """The nearest update of at most `rank` terms (truncated SVD, Eckart-Young).

        Raises:
            EditError: `rank` is below 1, or the change is gated: its terms cannot be mixed.
        """
        if self.gated:
            raise EditError(
                "A gated update cannot be compressed: each of its terms has a threshold or a "
                "scope of its own. Edit with an editor without a gate, or keep the update as it is."
            )
        if rank < 1:
            raise EditError(f"An update is compressed to at least 1 term a layer; got {rank}.")
        q_a, q_b, core = self._core()
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        root = values[..., :rank].sqrt().unsqueeze(-1)
        return LayerUpdate(
            (root * (right[..., :rank, :] @ q_a.mT)).to(self.A.dtype),
            (root * (q_b @ left[..., :rank]).mT).to(self.B.dtype),
        )

    def __mul__(self, factor: float) -> LayerUpdate:
        return replace(self, scale=self.scale * factor)

    __rmul__ = __mul__

    def __neg__(self) -> LayerUpdate:
        return self * -1.0

    def folded(self) -> LayerUpdate:
        """The same change with scale 1: the step multiplied into one factor.

        The narrower one; with thresholds B, since what they are compared with must stay.
        """
        if isinstance(self.scale, float) and self.scale == 1.0:
            return self
        if self.A.shape[-1] <= self.B.shape[-1] and self.threshold is None:
            return replace(self, A=self.A * self.scale, scale=1.0)
        return replace(self, B=self.B * self.scale, scale=1.0)

    @classmethod
    def sum(cls, layers: Sequence[LayerUpdate]) -> LayerUpdate:
        """The sum of several changes of one matrix: their factors side by side.

        Ungated changes whose factors take more together than their matrix are held as the matrix.

        Raises:
            EditError: They belong to matrices of other shapes, or to batches of other sizes.
        """
        shapes = {(*layer.A.shape[:-2], layer.B.shape[-1], layer.A.shape[-1]) for layer in layers}
        if len(shapes) > 1:
            raise EditError(
                f"Changes of shapes {sorted(shapes)} do not add up: (out, in), after the number "
                f"of sequences if there is one, must agree. Add updates of one model and batch."
            )
        plain = [layer for layer in layers if not layer.gated]
        gated = [layer for layer in layers if layer.gated]
        # Both forms hold `in + out` numbers a term, the matrix for min(in, out) terms.
        narrow = min(layers[0].A.shape[-1], layers[0].B.shape[-1])
        if len(plain) > 1 and sum(layer.rank for layer in plain) > narrow:
            few = [layer for layer in plain if layer.rank < narrow]
            parts = [layer for layer in plain if layer.rank >= narrow]
            first, *rest = [*parts, _side_by_side(few)] if few else parts
            # One by one: no more matrices are held at once for more parts.
            plain = [cls.from_dense(sum((part.dense() for part in rest), first.dense()))]
        return _side_by_side([*plain, *gated])

    @property
    def gated(self) -> bool:
        """Whether it has thresholds or owners, so that it is no change of the weights."""
        return self.threshold is not None or self.owners is not None

    def owner_of_each(self) -> Tensor:
        """The owner of each term, `(..., rank)` int64; -1 where there is no scope."""
        if self.owners is not None:
            return self.owners
        return torch.full(self.A.shape[:-1], -1, device=self.A.device)

    def thresholds(self) -> Tensor:
        """The threshold of each term, `(..., rank)`; 0 where there is no gate."""
        return self.A.new_zeros(self.A.shape[:-1]) if self.threshold is None else self.threshold

    def __add__(self, other: LayerUpdate) -> LayerUpdate:
        return LayerUpdate.sum((self, other))

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerUpdate:
        """Apply a function to every tensor (a move to a device, a dtype, a slice of the terms).

        Owners, which are indices, follow to another device alone.
        """
        scale = function(self.scale) if isinstance(self.scale, Tensor) else self.scale
        threshold = None if self.threshold is None else function(self.threshold)
        A = function(self.A)
        owners = None if self.owners is None else self.owners.to(A.device)
        return LayerUpdate(A, function(self.B), scale, threshold, owners)


def _is_identity(factor: Tensor) -> bool:
    """Whether a factor is a constant identity, so that the other one is the change's matrix."""
    rank, width = factor.shape[-2:]
    if rank != width or factor.requires_grad:
        return False
    return torch.equal(factor, _identity(rank, factor).expand_as(factor))


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _side_by_side(layers: Sequence[LayerUpdate]) -> LayerUpdate:
    """Changes of one matrix as one: all their terms."""
    if len(layers) == 1:
        return layers[0]
    folded = [layer.folded() for layer in layers]
    gated = any(layer.threshold is not None for layer in folded)
    owned = any(layer.owners is not None for layer in folded)
    return LayerUpdate(
        torch.cat([layer.A for layer in folded], -2),
        torch.cat([layer.B for layer in folded], -2),
        threshold=torch.cat([layer.thresholds() for layer in folded], -1) if gated else None,
        owners=torch.cat([layer.owner_of_each() for layer in folded], -1) if owned else None,
    )


def _moved(layer: LayerUpdate, start: int) -> LayerUpdate:
    owners = layer.owners
    return layer if owners is None else replace(layer, owners=owners + start * (owners >= 0))


@dataclass(frozen=True, eq=False)
class Update(Mapping[str, LayerUpdate]):
    """An immutable change of a model: layer name -> `LayerUpdate`, with `+`, `-`, `*`.

    A low-rank update is a LoRA adapter; see `workbench.adapters` for PEFT folders.

    Args:
        layers: Layer name -> its change.
        scope: Where in a text its edits act, by their terms' `owners`; None: everywhere.
    """

    layers: Mapping[str, LayerUpdate]
    scope: Scope | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(self.layers))

    def __getitem__(self, name: str) -> LayerUpdate:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that its factors, thresholds and tensor scales take."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @classmethod
    def sum(cls, updates: Iterable[Update]) -> Update:
        """The sum of several updates, added up once a layer; empty for none.

        Raises:
            EditError: Their shapes differ, or the layers that their scopes look at.
        """
        by_name: dict[str, list[LayerUpdate]] = {}
        parts = cls.in_one_scope(updates)
        for part in parts:
            for name, layer in part.items():
                by_name.setdefault(name, []).append(layer)
        layers = {name: LayerUpdate.sum(layers) for name, layers in by_name.items()}
        return cls(layers, parts[0].scope if parts else None)

    @classmethod
    def in_one_scope(cls, updates: Iterable[Update]) -> list[Update]:
        """The same updates, all with the scope that holds the edits of each of them.

        Raises:
            EditError: Their scopes look at different layers.
        """
        updates, edits = list(updates), 0
        scopes: dict[int, tuple[int, Scope]] = {}  # one that several share is held once
        for update in updates:
            if update.scope is not None and id(update.scope) not in scopes:
                scopes[id(update.scope)] = edits, update.scope
                edits += len(update.scope)
        if not scopes:
            return updates
        whole = Scope.side_by_side([scope for _, scope in scopes.values()])
        moves = [partial(_moved, start=scopes.get(id(u.scope), (0,))[0]) for u in updates]
        return [update._each(move, whole) for update, move in zip(updates, moves, strict=True)]

    def __add__(self, other: Update) -> Update:
        return Update.sum((self, other))

    def __mul__(self, factor: float) -> Update:
        return self._each(lambda layer: layer * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Update:
        return self * -1.0

    def __sub__(self, other: Update) -> Update:
        return self + (-other)

    def norm(self) -> float:
        """Frobenius norm over all layers together."""
        return sum(float(layer.norm()) ** 2 for layer in self.values()) ** 0.5

    def rank(self) -> dict[str, int]:
        """Rank-1 terms of each layer."""
        return {name: layer.rank for name, layer in self.items()}

    def spectrum(self) -> dict[str, Tensor]:
        """Singular values of each layer, largest first."""
        return {name: layer.spectrum() for name, layer in self.items()}

    def compress(self, rank: int) -> Update:
        """The nearest update of at most `rank` terms a layer."""
        return Update({name: layer.compress(rank) for name, layer in self.items()})

    def dense(self) -> dict[str, Tensor]:
        """Each layer's change as an `(out, in)` matrix."""
        return {name: layer.dense() for name, layer in self.items()}

    def inner(self, other: Update) -> float:
        """Frobenius inner product over all layers; a layer that only one changes adds nothing."""
        return float(sum(self[name].inner(other[name]).sum() for name in self if name in other))

    def map(self, function: Callable[[Tensor], Tensor]) -> Update:
        """Apply a function to every factor, and to the scope's keys and thresholds."""
        scope = None if self.scope is None else self.scope.map(function)
        return self._each(lambda layer: layer.map(function), scope)

    def _each(
        self, function: Callable[[LayerUpdate], LayerUpdate], scope: Scope | None = None
    ) -> Update:
        layers = {name: function(layer) for name, layer in self.items()}
        return Update(layers, self.scope if scope is None else scope)

    def to(self, *args, **kwargs) -> Update:
        """Move or cast every factor, as `torch.Tensor.to` does."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> Update:
        """The same numbers, cut from any autograd graph."""
        return self.map(Tensor.detach)

    def is_finite(self) -> bool:
        """Whether no factor or scale holds NaN or infinity."""
        return all(
            bool(torch.as_tensor(part).isfinite().all())
            for layer in self.values()
            for part in (layer.A, layer.B, layer.scale, layer.thresholds())
        )

    def folded(self) -> Update:
        """The same change with every layer's scale 1."""
        return self._each(LayerUpdate.folded)

    def tensors(self) -> list[Tensor]:
        """Every factor, threshold and tensor scale, layer by layer in a fixed order; its scope."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    @property
    def gated(self) -> bool:
        """Whether some layer has thresholds or owners, so that this is no change of the weights."""
        return any(layer.gated for layer in self.values())

    def numbers(self) -> int:
        """How many numbers the factors hold: `rank * (in + out)` a layer."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.values())
