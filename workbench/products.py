"""Products with frozen float32 weights by oneDNN, where torch's own leave half the CPU idle.

torch multiplies float32 matrices with MKL, which runs AVX2 code on AMD's CPUs with AVX-512; oneDNN,
which comes with torch too, does not. Both sum in float32, in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Rows of hidden states from which on the products gain more than watching all functions costs.
_ROWS = 16


def quick_products(ids: Tensor) -> AbstractContextManager[object]:
    """A context for a forward pass whose products with frozen weights are as quick as can be.

    Args:
        ids: What the model reads, `(batch, tokens)`, on its device.
    """
    long = ids.is_cpu and ids.numel() >= _ROWS
    return OneDnnProducts() if long and helpful() else nullcontext()


def available() -> bool:
    """Whether this torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def helpful() -> bool:
    """Whether oneDNN is there and is the faster one on this CPU."""
    about = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    slow = torch.backends.mkl.is_available() and available()
    return slow and "AMD" in about.get("cpu_name", "") and about.get("avx512_f", False)


class OneDnnProducts(TorchFunctionMode):
    """Within it oneDNN computes the layers whose weights are float32, on the CPU and frozen."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            inputs, weight, *bias = args
            if _fits(inputs, weight, *bias):
                return _Product.apply(inputs, weight, *bias)
        elif func is torch.addmm and len(args) == 3 and not kwargs:  # Conv1D, as GPT-2 has it
            bias, inputs, weight = args
            if _fits(inputs, weight, bias) and bias.dim() == 1:
                return _Product.apply(inputs, weight.t(), bias)
        return func(*args, **(kwargs or {}))


def _fits(inputs: Tensor, *frozen: Tensor | None) -> bool:
    if inputs.numel() == 0 or inputs.dim() < 2:
        return False
    kinds = (t for t in (inputs, *frozen) if t is not None)
    plain = all(type(t) in _PLAIN and t.dtype is torch.float32 and t.is_cpu for t in kinds)
    learned = any(t is not None and t.requires_grad for t in frozen)
    return plain and not (learned and torch.is_grad_enabled())


_PLAIN = (Tensor, torch.nn.Parameter)


class _Product(torch.autograd.Function):
    """`inputs @ weight.T + bias`, differentiable in the inputs, as often as wanted."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        return product(inputs, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(slope, weight.t()), None, None
