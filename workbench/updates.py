"""Updates: changes of weights as low-rank factors, with an algebra; no model is touched here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.errors import EditError


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

    A leading axis, where there is one, holds a different update for each sequence of a batch.
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0
    threshold: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.shape[:-1] != self.B.shape[:-1] or self.A.dim() not in (2, 3):
            raise EditError(
                f"The factors of an update must share their leading axes, (rank, in) and "
                f"(rank, out) or (batch, rank, in) and (batch, rank, out); got A "
                f"{tuple(self.A.shape)} and B {tuple(self.B.shape)}."
            )
        if self.threshold is not None and self.threshold.shape != self.A.shape[:-1]:
            raise EditError(
                f"A gated update has one threshold a term, {tuple(self.A.shape[:-1])}; got "
                f"{tuple(self.threshold.shape)}."
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

    def apply(self, inputs: Tensor) -> Tensor:
        """What the change adds to the layer's output, `(..., tokens, in)` -> `(..., tokens, out)`.

        Args:
            inputs: The layer's inputs; leading axes as the factors' or none.
        """
        return self.scale * (self.acting(inputs) @ self.B)

    def acting(self, inputs: Tensor) -> Tensor:
        """How strongly each term acts on inputs, `(..., tokens, in)` -> `(..., tokens, rank)`."""
        keyed = inputs @ self.A.mT
        if self.threshold is None:
            return keyed
        # Soft thresholding (Donoho 1995): continuous, and the identity at threshold 0.
        limit = self.threshold.unsqueeze(-2)
        return keyed - keyed.clamp(-limit, limit)

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
        if self.threshold is not None:
            raise EditError(
                "A gated update cannot be compressed: each of its terms has a threshold of its "
                "own. Edit with an editor without a gate, or keep the update as it is."
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
            return LayerUpdate(self.A * self.scale, self.B)
        return LayerUpdate(self.A, self.B * self.scale, threshold=self.threshold)

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
        plain = [layer for layer in layers if layer.threshold is None]
        gated = [layer for layer in layers if layer.threshold is not None]
        # Both forms hold `in + out` numbers a term, the matrix for min(in, out) terms.
        narrow = min(layers[0].A.shape[-1], layers[0].B.shape[-1])
        if len(plain) > 1 and sum(layer.rank for layer in plain) > narrow:
            few = [layer for layer in plain if layer.rank < narrow]
            parts = [layer for layer in plain if layer.rank >= narrow]
            first, *rest = [*parts, _side_by_side(few)] if few else parts
            # One by one: no more matrices are held at once for more parts.
            plain = [cls.from_dense(sum((part.dense() for part in rest), first.dense()))]
        return _side_by_side([*plain, *gated])

    def thresholds(self) -> Tensor:
        """The threshold of each term, `(..., rank)`; 0 where there is no gate."""
        return self.A.new_zeros(self.A.shape[:-1]) if self.threshold is None else self.threshold

    def __add__(self, other: LayerUpdate) -> LayerUpdate:
        return LayerUpdate.sum((self, other))

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerUpdate:
        """Apply a function to every tensor (a move to a device, a dtype, a slice of the terms)."""
        scale = function(self.scale) if isinstance(self.scale, Tensor) else self.scale
        threshold = None if self.threshold is None else function(self.threshold)
        return LayerUpdate(function(self.A), function(self.B), scale, threshold)


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
    return LayerUpdate(
        torch.cat([layer.A for layer in folded], -2),
        torch.cat([layer.B for layer in folded], -2),
        threshold=torch.cat([layer.thresholds() for layer in folded], -1) if gated else None,
    )


@dataclass(frozen=True, eq=False)
class Update(Mapping[str, LayerUpdate]):
    """An immutable change of a model: layer name -> `LayerUpdate`, with `+`, `-`, `*`.

    A low-rank update is a LoRA adapter; see `workbench.adapters` for PEFT folders.
    """

    layers: Mapping[str, LayerUpdate]

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
        """The sum of several updates, added up once a layer; empty for none."""
        by_name: dict[str, list[LayerUpdate]] = {}
        for update in updates:
            for name, layer in update.items():
                by_name.setdefault(name, []).append(layer)
        return cls({name: LayerUpdate.sum(layers) for name, layers in by_name.items()})

    def __add__(self, other: Update) -> Update:
        return Update.sum((self, other))

    def __mul__(self, factor: float) -> Update:
        return Update({name: layer * factor for name, layer in self.items()})

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
        """Apply a function to every factor."""
        return Update({name: layer.map(function) for name, layer in self.items()})

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
        return Update({name: layer.folded() for name, layer in self.items()})

    def tensors(self) -> list[Tensor]:
        """Every factor, threshold and tensor scale, layer by layer in a fixed order."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    @property
    def gated(self) -> bool:
        """Whether some layer has thresholds, so that this is no change of the weights."""
        return any(layer.threshold is not None for layer in self.values())

    def numbers(self) -> int:
        """How many numbers the factors hold: `rank * (in + out)` a layer."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.values())


def stack_sequences(updates: Sequence[Update | None]) -> Update:
    """One update whose leading axis gives each sequence of a batch its own change.

    Args:
        updates: One unbatched update a sequence, or None for the base model. Ranks may differ:
            shorter ones are padded with zero terms, which change nothing.

    Raises:
        EditError: Every entry is None, so that no shapes are known.
    """
    names = dict.fromkeys(name for update in updates if update for name in update)
    if not names:
        raise EditError("None of the sequences has an update; run the model without an overlay.")
    stacked = {}
    for name in names:
        folded = [
            update[name].folded() if update and name in update else None for update in updates
        ]
        model = next(layer for layer in folded if layer is not None)
        rank = max(layer.rank for layer in folded if layer is not None)
        A = model.A.new_zeros(len(updates), rank, model.A.shape[-1])
        B = model.B.new_zeros(len(updates), rank, model.B.shape[-1])
        gated = any(layer is not None and layer.threshold is not None for layer in folded)
        threshold = A.new_zeros(len(updates), rank) if gated else None
        for row, layer in enumerate(folded):
            if layer is not None:
                A[row, : layer.rank], B[row, : layer.rank] = layer.A, layer.B
                if threshold is not None:
                    threshold[row, : layer.rank] = layer.thresholds()
        stacked[name] = LayerUpdate(A, B, threshold=threshold)
    return Update(stacked)
