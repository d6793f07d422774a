"""Independent references: weights really changed, losses written out, hooks counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from families import kind_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.updates import LayerUpdate, Update

torch.set_num_threads(1)  # more threads only cost time on tiny matrices

assert_exact = partial(assert_close, rtol=1e-10, atol=1e-10)  # for float64


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal to float32's rounding, which goes with the largest term of a sum."""
    size = max(1.0, expected.abs().max().item())
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * size)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hook_count(model: nn.Module) -> int:
    """All hooks of all modules."""
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def in_double(lm: LanguageModel) -> LanguageModel:
    """A float64 copy; torch's grouped product of experts knows no float64."""
    twin = copy.deepcopy(lm.model).double()
    twin.set_experts_implementation("eager")
    return LanguageModel.wrap(twin, lm.tokenizer, lm.source)


def editable(lm: LanguageModel) -> tuple[EditableLayer, ...]:
    """Every editable layer of the upper blocks."""
    return lm.layers(matrices="all")


def random_update(
    layers: Sequence[EditableLayer],
    seed: int = 0,
    rank: int = 2,
    size: float = 0.3,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Update:
    """Random factors for every layer; large enough to move the logits."""
    generator = torch.Generator().manual_seed(seed)
    lead = (rank,) if batch is None else (batch, rank)

    def draw(width: int) -> Tensor:
        return torch.randn(*lead, width, generator=generator, dtype=dtype) * width**-0.5

    return Update(
        {
            layer.name: LayerUpdate(draw(layer.in_features), draw(layer.out_features) * size, -2.0)
            for layer in layers
        }
    )


def edited_copy(model: PreTrainedModel, update: Update) -> PreTrainedModel:
    """A deep copy whose weights are really changed, W + dW."""
    twin = copy.deepcopy(model)
    for name, layer in update.items():
        module = twin.get_submodule(name)
        weight = module.get_parameter("weight")
        change = layer.scale * (layer.B.mT @ layer.A)
        weight.add_((change.T if isinstance(module, Conv1D) else change).to(weight.dtype))
    return twin


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Plain logits at every position, without labels or a cache."""
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def losses(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of each sequence's labels, `(batch,)`."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    labels = inputs["labels"]
    if kind_of(model) == "classifier":
        return cross_entropy(logits, labels, reduction="none")
    if kind_of(model) == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = cross_entropy(logits.mT, labels, reduction="none")
    return each.sum(1) / (labels != -100).sum(1)
