"""Gradient factors: what each edited layer read, and the loss's gradient at what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.errors import EditError
from workbench.layers import EditableLayer


@dataclass(frozen=True, eq=False)
class Factors:
    """The rank-1 terms of one layer's gradient, `dL/dW = sum_t delta_t activation_t^T`.

    Args:
        activation: u, the layer's input, `(batch, tokens, in)`.
        delta: dL/dy, the gradient at the layer's output, `(batch, tokens, out)`.
    """

    activation: Tensor
    delta: Tensor

    def gradient(self) -> Tensor:
        """The dense gradient with respect to W, `(out, in)`, summed over batch and tokens."""
        return torch.einsum("bto,bti->oi", self.delta, self.activation)

    def live(self) -> Tensor:
        """Which rows carry gradient: neither factor all zero, `(batch, tokens)` bool."""
        return (self.activation != 0).any(-1) & (self.delta != 0).any(-1)

    def last_live(self) -> Tensor:
        """Index of each sequence's last live row, `(batch,)`; 0 where none is."""
        live = self.live()
        return (live * torch.arange(live.shape[1], device=live.device)).amax(1)


# The capture of this thread or task; another thread's forward pass is none of its business.
_active: ContextVar[Capture | None] = ContextVar("workbench_capture", default=None)


class Capture:
    """Records inputs and outputs of layers during a forward pass; made by `capture`."""

    def __init__(self, layers: Sequence[EditableLayer], graph: bool) -> None:
        self._layers, self._graph = layers, graph
        self._calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record(self, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Keep one layer's input and output; returns the output as a node of the graph."""
        if name in self._calls:
            raise EditError(
                f"Layer {name!r} ran twice in one forward pass. Capture one forward pass at a "
                f"time, and leave out layers whose weights serve several blocks."
            )
        # Frozen parameters leave the first edited layer's output without a graph: it is a leaf.
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self._calls[name] = (inputs if self._graph else inputs.detach(), output)
        return output

    def factors(self, loss: Tensor, sequences: int = 1) -> dict[str, Factors]:
        """Differentiate once, down to the first captured layer; no parameter gradient is formed.

        Args:
            loss: 0-d, computed from the forward pass under this capture. The loss of several
                sequences must be a sum, so that each delta belongs to its own sequence's loss.
            sequences: Batch size, for layers that read tokens of all sequences in one row axis
                (mixture-of-experts blocks flatten them).

        Returns:
            Layer name -> `Factors`, in the layers' order, detached unless the capture keeps the
            graph. Layers that do not reach the loss have zero delta.

        Raises:
            EditError: The forward pass never ran some of the layers.
        """
        missing = [layer.name for layer in self._layers if layer.name not in self._calls]
        if missing:
            raise EditError(f"The forward pass never ran these layers: {', '.join(missing)}.")
        calls = {layer.name: self._calls[layer.name] for layer in self._layers}
        outputs = [output for _, output in calls.values()]
        deltas = torch.autograd.grad(loss, outputs, allow_unused=True, create_graph=self._graph)
        found = {}
        for (name, (activation, output)), delta in zip(calls.items(), deltas, strict=True):
            delta = torch.zeros_like(output) if delta is None else delta
            if delta.dim() == 2:
                activation = activation.unflatten(0, (sequences, -1))
                delta = delta.unflatten(0, (sequences, -1))
            found[name] = Factors(activation, delta)
        self._calls.clear()
        return found


@contextmanager
def capture(layers: Sequence[EditableLayer], graph: bool = False) -> Iterator[Capture]:
    """Watch layers during one forward pass run inside the `with`.

    The recorded deltas come from autograd with respect to the layers' outputs, so that nothing
    below the first of them is differentiated and no `.grad` appears anywhere.

    Args:
        layers: What `LanguageModel.layers` returns; none silences a capture around this one.
        graph: Factors stay functions of the weights that require grad, to be differentiated again.
    """
    tap = Capture(layers, graph)
    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            handle = layer.module.register_forward_hook(_recorder(tap, layer.name))
            stack.callback(handle.remove)
        reset = _active.set(tap)
        try:
            yield tap
        finally:
            _active.reset(reset)


def _recorder(tap: Capture, name: str) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return tap.record(name, args[0], output) if _active.get() is tap else None

    return hook
